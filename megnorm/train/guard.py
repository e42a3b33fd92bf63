"""Whether a step's loss and gradient norm can be trusted, and what is done where they cannot.

Judged are numbers that were summed over all ranks, so that every rank comes to the same judgement in the same step.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megnorm.train.config import GuardConfig

log = logging.getLogger("megnorm")

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
# Share of the median that counts as one deviation at least: a flat stretch makes no step a spike. Norms scatter more.
LEAST = {"loss": 0.01, "gradient norm": 0.1}
REMEDY = "Lower optim.lr, lengthen optim.warmup_steps or choose a more stable norm.scheme"


class DivergedError(RuntimeError):
    """The run is not worth going on with: numbers that are not finite, a spike, replicas that differ. Nothing was saved."""


class RewindError(DivergedError):
    """Go back to the last checkpoint; where there is none, or it cannot be, this is the reason to stop."""


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step: ``spike``, or else something is not finite."""

    spike: bool
    text: str


class Guard:
    """Running statistics of the good steps, and how often updates were left out or taken back.

    skips: in a row. rewinds: of the whole run.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self.losses: deque[float] = deque(maxlen=self.config.spike_window)
        self.norms: deque[float] = deque(maxlen=self.config.spike_window)
        self.skips = 0
        self.rewinds = 0

    def judge(self, loss: float, norm: float) -> Trouble | None:
        """What is wrong with these numbers, if anything; good ones enter the statistics."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Trouble(False, f"loss {loss}, gradient norm {norm}")
        if self.config.on_spike == "off":
            self.skips = 0
            return None
        factor = self.config.spike_factor
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            # Half a window must be known, or the first steps of a run would all be judged by two or three.
            if 2 * len(before) >= self.config.spike_window:
                middle, deviations = _deviations(value, before, LEAST[name])
                if deviations > factor:
                    return Trouble(
                        True,
                        f"{name} {value:.4g} is a spike, {deviations:.3g} deviations above its median {middle:.4g}",
                    )
        self.losses.append(loss)
        self.norms.append(norm)
        self.skips = 0
        return None

    def act(self, step: int, trouble: Trouble, *, speak: bool) -> None:
        """Returns where the update is to be left out; raises DivergedError or RewindError otherwise. speak: may log."""
        policy = self.config.on_spike if trouble.spike else self.config.on_nonfinite
        text = f"step {step}: {trouble.text}; nothing was saved"
        if policy == "rewind":
            raise RewindError(f"{text}. {REMEDY}")
        if policy == "stop":
            raise DivergedError(f"{text}. {REMEDY}")
        self.skips += 1
        if self.skips > self.config.max_skips:
            raise DivergedError(f"{text}, after train.guard.max_skips={self.config.max_skips} such steps. {REMEDY}")
        if speak:
            log.warning(
                "step %d: %s; this update is left out (%d of at most %d in a row)",
                step, trouble.text, self.skips, self.config.max_skips,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint: a run that goes on judges as one that was never stopped."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skips": self.skips,
            "rewinds": self.rewinds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; {} (an older checkpoint's) starts anew."""
        window = self.config.spike_window
        self.losses = deque(state.get("losses", ()), maxlen=window)
        self.norms = deque(state.get("norms", ()), maxlen=window)
        self.skips, self.rewinds = state.get("skips", 0), state.get("rewinds", 0)


def _deviations(value: float, before: Iterable[float], least: float) -> tuple[float, float]:
    """The median of ``before``, and how many robust deviations the value lies above it."""
    known = list(before)
    middle = statistics.median(known)
    spread = DEVIATION * statistics.median(abs(x - middle) for x in known)
    return middle, (value - middle) / max(spread, least * abs(middle), 1e-12)
