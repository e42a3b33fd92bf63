"""Going back to the last checkpoint after a step that went bad."""

import logging

from megnorm.checkpoint import io
from megnorm.checkpoint.saver import Saver
from megnorm.parallel import launch
from megnorm.train import state
from megnorm.train.build import Run
from megnorm.train.guard import DivergedError, RewindError

log = logging.getLogger("megnorm")


def rewind(run: Run, saver: Saver, reason: RewindError) -> None:
    """Load the newest whole checkpoint, on all ranks; with ``rewind_data: skip`` go on behind the bad step's samples.

    Raises DivergedError, with the reason, where there is no checkpoint or max_rewinds is used up.
    """
    guard, saved = run.guard.config, saver.folder
    if run.guard.rewinds >= guard.max_rewinds:
        raise DivergedError(f"{reason} (the run went back train.guard.max_rewinds={guard.max_rewinds} times)")
    found = launch.from_rank_zero(lambda: io.latest(saved) if saved.is_dir() else None)
    if found is None:
        raise DivergedError(f"{reason} (there is no checkpoint yet to go back to; lower checkpoint.every)")
    count, bad, reached = (
        run.guard.rewinds + 1,
        run.step + 1,
        run.consumed + run.plan.config.train.batch_at(run.consumed),
    )
    path = state.resume(run, saved)
    run.guard.rewinds = count
    left_out = reached - run.consumed
    if guard.rewind_data == "skip":
        run.consumed = reached
    if run.mesh.rank == 0:
        log.warning(
            "step %d went bad: back to %s, step %d (rewind %d of at most %d); its %d samples are %s",
            bad, path.name, run.step, count, guard.max_rewinds, left_out,
            "left out" if guard.rewind_data == "skip" else "taken again",
        )  # fmt: skip
