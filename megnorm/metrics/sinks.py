"""Where a run's numbers go: the record (the truth), a progress bar, TensorBoard, Weights & Biases."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TextIO

from megnorm.metrics.config import MetricsConfig
from megnorm.metrics.record import FILE, Writer


class Sink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All sinks of a run as one; on every rank but 0 it holds none and does nothing.

    folder: the run folder. resume_step: the step that the run goes on from (0: a new run); the record of later steps,
    which an interrupted run left behind, is dropped. run_config: what W&B shows as the run's configuration.
    The sinks know these names: loss, tokens_per_second, mfu (a fraction). Raises ValueError for a sink whose package
    is not installed.
    """

    def __init__(
        self,
        config: MetricsConfig,
        folder: Path,
        total_steps: int,
        *,
        resume_step: int = 0,
        rank: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._sinks: list[Sink] = []
        self._config, self._folder, self._total, self._rank = config, folder, total_steps, rank
        self._run_config = run_config
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        config, folder = self._config, self._folder
        if self._rank != 0:
            return
        self._sinks.append(Writer(folder / FILE, after=resume_step))
        if config.tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", resume_step))
        if config.wandb:
            self._sinks.append(_WandB(config, folder, self._run_config))
        if config.progress:
            bar = sys.stderr.isatty()
            self._sinks.append((_Bar if bar else _Lines)(self._total, resume_step, sys.stderr))

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Log the values of ``step``; call it once a logged step, with everything that there is to say about it."""
        if self._sinks:
            numbers = {name: float(value) for name, value in values.items()}
            for sink in self._sinks:
                sink.log(step, numbers)

    def rewind(self, step: int) -> None:
        """Go on behind an earlier ``step``: the record of later ones is dropped, as at a resume."""
        self.close()
        self._open(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "metrics.tensorboard: the package 'tensorboard' is not installed; "
                "pip install tensorboard, or set metrics.tensorboard=false"
            ) from None
        purge = resume_step + 1 if resume_step or folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: MetricsConfig, folder: Path, run_config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "metrics.wandb: the package 'wandb' is not installed; "
                "pip install 'megnorm[wandb]', or set metrics.wandb=false"
            ) from None
        identity = folder / "wandb-id"  # so that a resumed run goes on under the same id
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or folder.resolve().name,
            id=identity.read_text(encoding="utf-8").strip() if identity.exists() else None,
            resume="allow",
            dir=str(folder),
            config=dict(run_config or {}),
        )
        identity.write_text(str(self._run.id) + "\n", encoding="utf-8")
        # Against our own step: W&B's counter refuses steps that an interrupted run has already sent.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def headline(values: Mapping[str, float]) -> dict[str, str]:
    """The few numbers that a person watches, as text."""
    shown = {}
    if "loss" in values:
        shown["loss"] = f"{values['loss']:.4f}"
    if "valid_loss" in values:
        shown["valid"] = f"{values['valid_loss']:.4f}"
    if "tokens_per_second" in values:
        shown["tok/s"] = _short(values["tokens_per_second"])
    if "mfu" in values:
        shown["MFU"] = f"{100 * values['mfu']:.1f}%"
    return shown


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


class _Bar:
    """A tqdm bar: steps, time left, headline numbers. The held-out loss stays until the next one."""

    def __init__(self, total_steps: int, resume_step: int, stream: TextIO) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ValueError(
                "metrics.progress: the package 'tqdm' is not installed; pip install tqdm, or set metrics.progress=false"
            ) from None
        self._bar: Any = tqdm(total=total_steps, initial=resume_step, unit="step", file=stream, dynamic_ncols=True)
        self._shown: dict[str, str] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._shown |= headline(values)
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """The same as plain lines, for log files."""

    def __init__(self, total_steps: int, resume_step: int, stream: TextIO) -> None:
        self._total, self._first, self._stream = total_steps, resume_step, stream
        self._begin = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        per_step = (time.monotonic() - self._begin) / max(step - self._first, 1)
        words = [f"{name} {text}" for name, text in headline(values).items()]
        left = _clock(per_step * max(self._total - step, 0))
        print("  ".join([f"step {step}/{self._total}", *words, f"{left} left"]), file=self._stream, flush=True)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
