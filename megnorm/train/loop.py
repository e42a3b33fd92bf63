"""Steps, evaluation, checkpoints, metrics, and when to stop."""

import time

from megnorm.checkpoint.saver import Saver
from megnorm.data.classes import ClassLoader
from megnorm.metrics.sinks import Sinks
from megnorm.metrics.throughput import flops_per_token, mfu, peak_flops
from megnorm.plan import predicted
from megnorm.train import state
from megnorm.train.agree import agreed
from megnorm.train.build import DTYPES, Run
from megnorm.train.guard import DivergedError, RewindError
from megnorm.train.profile import Profile
from megnorm.train.replicas import check_replicas
from megnorm.train.rewind import rewind
from megnorm.train.score import score
from megnorm.train.signals import EXIT_STOPPED, StopRequest
from megnorm.train.slow import Slow
from megnorm.train.step import StepResult, evaluate, train_step
from megnorm.train.watchdog import Watchdog


def fit(run: Run, saver: Saver, sinks: Sinks, watchdog: Watchdog, profile: Profile) -> int:
    """Train until ``train.steps``, a signal, or ``train.stop_after``; the exit code: 0, or EXIT_STOPPED where steps remain."""
    t, every = run.plan.config.train, run.plan.config.checkpoint.every
    stop, pace = StopRequest(), Pace(run)
    last = t.steps if t.stop_after is None else min(t.steps, run.step + t.stop_after)
    stopped = False
    while run.step < last and not stopped:
        try:
            with watchdog.step(run.step + 1), profile.step(run.step + 1):
                result = train_step(run)
            if t.check_replicas_every and run.step % t.check_replicas_every == 0:
                _check_replicas(run)
        except DivergedError as error:
            with watchdog.patient("waiting for a checkpoint"):
                saver.wait()  # all ranks are here: let the save under way, which needs them all, be finished
                if not isinstance(error, RewindError):
                    raise
                rewind(run, saver, error)
            sinks.rewind(run.step)
            pace.restart()
            continue
        failed, stopped = agreed([saver.failed, stop.asked], run.mesh)
        if failed:
            saver.wait()  # raises the reason where the background save failed
            raise ValueError("the background save failed on another rank; see its message")
        pace.add(result)
        ended = run.step == last or stopped
        logs = run.step % t.log_every == 0 or ended
        values = pace.values(result) if logs or result.probes else {}
        if run.valid_data is not None and (run.step == t.steps or (t.eval_every and run.step % t.eval_every == 0)):
            values |= {**judged(run), **({} if values else pace.values(result))}
            if isinstance(run.valid_data, ClassLoader):
                values |= {f"valid_{name}": value for name, value in score(run, run.valid_data).items()}
            pace.restart()
        if values:
            sinks.log(run.step, values)
        if ended or (every and run.step % every == 0):
            with watchdog.patient("at a checkpoint"):
                if t.check_replicas_every:
                    saver.wait()  # which save does anyway: if a copy differs, the save before it is not cut off
                    _check_replicas(run)
                save(run, saver, values.get("valid_loss"))
    with watchdog.patient("waiting for the last checkpoint"):
        saver.wait()
    return 0 if run.step == t.steps else EXIT_STOPPED


def judged(run: Run) -> dict[str, float]:
    """Held-out loss, and what the run's evaluators make of it."""
    loss = evaluate(run)
    values = {"valid_loss": loss}
    for evaluator in run.evaluators:
        values |= evaluator(run, loss)
    return values


def _check_replicas(run: Run) -> None:
    run.flat.wait_weights()
    check_replicas(run.named, run.mesh, run.step)


def save(run: Run, saver: Saver, score: float | None = None) -> None:
    """Ask for a checkpoint of the present step; score: held-out loss, for ``checkpoint.keep_best``."""
    record = state.meta(run) | ({} if score is None else {"score": score})
    saver.save(run.step, state.shards(run, owned=True), record)


class Pace:
    """Throughput between records."""

    def __init__(self, run: Run) -> None:
        config = run.plan.config
        self.run = run
        self.flops = flops_per_token(config.model, config.train.sequence_length, predicted(config))
        self.peak = peak_flops(run.mesh.device, DTYPES[config.train.precision]) * run.mesh.size
        self.slow = Slow(run.mesh, config.train.watchdog.slow)
        self.restart()

    def restart(self) -> None:
        self.begin, self.sequences = time.perf_counter(), 0
        self.slow.restart()

    def add(self, result: StepResult) -> None:
        self.sequences += result.sequences
        self.slow.add()

    def values(self, result: StepResult) -> dict[str, float]:
        """The record of a step; starts the next interval."""
        seconds = time.perf_counter() - self.begin
        t = self.run.plan.config.train
        size = self.run.plan.tokens_per_sample
        rate = self.sequences * size / seconds
        self.restart()
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": self.run.consumed * size,
            "tokens_per_second": rate,
            "mfu": mfu(rate, self.flops, self.peak),
            **({"loss_scale": self.run.scale.scale} if self.run.scale.scale != 1.0 else {}),
            **({"skipped": float(result.skipped)} if self.run.scale.scale != 1.0 or result.skipped else {}),
            **({} if t.batch_ramp.start is None else {"tokens_per_step": result.sequences * size}),
            **self.slow.values(),
            **result.routing,
            **result.probes,
        }
