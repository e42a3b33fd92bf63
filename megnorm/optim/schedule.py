"""Learning rate as a function of the step.

Step 1 is the first update. A warm-up of w steps climbs linearly from ``warmup_start_lr`` (at step 0, which no update
uses) to ``lr`` at step w. What follows is the schedule's own; ``min_lr`` is its floor.
"""

import math
from collections.abc import Callable
from typing import Protocol

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


class ScheduleConfig(Protocol):
    """The fields of OptimConfig that a schedule reads.

    schedule: constant | cosine | wsd | inverse_sqrt | polynomial.
    decay_steps: cosine, polynomial: the step at which min_lr is reached, None: the last of the run. wsd: how many steps
    at the end of the run the rate falls for, None: a tenth of it. The others never read it.
    decay_shape: of wsd, "linear" | "1-sqrt" | "cosine". power: of polynomial.
    """

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmup_start_lr(self) -> float: ...
    @property
    def decay_steps(self) -> int | None: ...
    @property
    def decay_shape(self) -> str: ...
    @property
    def power(self) -> float: ...


def learning_rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The rate of update ``step`` (1, 2, ...) in a run of ``total_steps``; beyond the end it stays where it ended.

    Raises ValueError for a schedule that does not fit the run (see ``check``).
    """
    check(config, total_steps)
    if step < config.warmup_steps:
        return config.warmup_start_lr + (config.lr - config.warmup_start_lr) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        # fairseq's: through (warmup_steps, lr), proportional to step^-1/2.
        first = max(config.warmup_steps, 1)
        return max(config.lr * math.sqrt(first / max(step, first)), config.min_lr)
    start, length = decay_span(config, total_steps)
    done = min(max(step - start, 0) / length, 1.0) if length else float(step > start)  # 0: full rate, 1: min_lr
    if config.schedule == "polynomial":
        left = math.pow(1.0 - done, config.power)
    else:
        left = SHAPES["cosine" if config.schedule == "cosine" else config.decay_shape](done)
    return config.min_lr + (config.lr - config.min_lr) * left


def decay_span(config: ScheduleConfig, total_steps: int) -> tuple[int, int]:
    """(last step at full rate, steps until min_lr is reached) of cosine, polynomial and wsd."""
    if config.schedule == "wsd":
        length = max(total_steps // 10, 1) if config.decay_steps is None else config.decay_steps
        return total_steps - length, length
    end = total_steps if config.decay_steps is None else config.decay_steps
    return config.warmup_steps, end - config.warmup_steps


def check(config: ScheduleConfig, total_steps: int) -> None:
    """Refuse a schedule that cannot be what its user meant. Raises ValueError naming the field and the remedy."""
    if config.schedule not in ("constant", "cosine", "wsd", "inverse_sqrt", "polynomial"):
        raise ValueError(
            f"optim.schedule: '{config.schedule}' is none of constant, cosine, wsd, inverse_sqrt, polynomial"
        )
    if config.decay_shape not in SHAPES:
        raise ValueError(f"optim.decay_shape: '{config.decay_shape}' is none of {', '.join(SHAPES)}")
    if config.warmup_steps < 0 or (config.decay_steps is not None and config.decay_steps < 0):
        raise ValueError("optim.warmup_steps, optim.decay_steps: a number of steps is not negative")
    if not 0.0 <= config.min_lr <= config.lr:
        raise ValueError(f"optim.min_lr: {config.min_lr} does not lie between 0 and optim.lr ({config.lr})")
    if config.schedule in ("constant", "inverse_sqrt"):
        return
    start, length = decay_span(config, total_steps)
    if config.schedule == "wsd" and start < config.warmup_steps:
        raise ValueError(
            f"optim.warmup_steps ({config.warmup_steps}) and a decay of {length} steps (optim.decay_steps) do not fit "
            f"into train.steps ({total_steps}); shorten them, or train longer"
        )
    if length < 0:
        end = "train.steps" if config.decay_steps is None else "optim.decay_steps"
        raise ValueError(
            f"optim.warmup_steps ({config.warmup_steps}) goes beyond {end} ({start + length}), where the decay ends; "
            f"shorten the warm-up, or raise {end}"
        )
