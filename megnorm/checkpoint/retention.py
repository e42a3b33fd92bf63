"""Which checkpoints stay: the last K, every N-th step, the best."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megnorm.checkpoint.config import CheckpointConfig
from megnorm.checkpoint.folder import discard, recorded, step_of, steps
from megnorm.checkpoint.format import CheckpointError
from megnorm.checkpoint.read import read_meta

log = logging.getLogger(__name__)


def keep(found: Sequence[int], newest: int, scores: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """The steps that stay, of those ``found``; ``newest`` is the one that ``latest`` names.

    Steps after the newest are of a branch that the run has left; they stay until it gets there and count for nothing.
    """
    reached = sorted(step for step in found if step <= newest)
    stay = set(reached[-config.keep_last :]) | {step for step in found if step >= newest}
    if config.keep_every:
        stay |= {step for step in reached if step % config.keep_every == 0}
    if config.keep_best:
        sign = 1.0 if config.best == "lowest" else -1.0
        ranked = sorted((step for step in reached if step in scores), key=lambda step: (sign * scores[step], -step))
        stay |= set(ranked[: config.keep_best])
    return stay


def prune(folder: Path, config: CheckpointConfig) -> list[Path]:
    """Delete what ``config`` does not keep; the paths deleted. A failure to delete is a warning: training goes on."""
    name = recorded(folder)
    if name is None:
        return []
    found = {step: path for path in steps(folder) if (step := step_of(path)) is not None}
    scored = found.items() if config.keep_best else ()
    scores = {step: score for step, path in scored if (score := _score(path)) is not None}
    stay = keep(list(found), step_of(Path(name)) or 0, scores, config)
    deleted = []
    for step, path in found.items():
        if step in stay:
            continue
        try:
            discard(path)
        except OSError as error:
            log.warning("cannot delete checkpoint %s (%s); the next save will try again", path, error.strerror)
            continue
        log.info("checkpoint of step %d deleted: checkpoint.keep_last is %d", step, config.keep_last)
        deleted.append(path)
    return deleted


def _score(path: Path) -> float | None:
    """The ``score`` in a checkpoint's meta; None without one, or if the meta is damaged."""
    try:
        score = read_meta(path).get("score")
    except CheckpointError as error:
        log.warning("no score of checkpoint %s: %s", path.name, error)
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return None
    return float(score)
