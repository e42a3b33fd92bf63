"""The loader of a task: what ``data.task`` names, with every option that it does not heed refused."""

from collections.abc import Mapping
from typing import Any, Protocol

from megnorm.data.batch import Batch, ClassBatch, PairBatch
from megnorm.data.classes import ClassLoader
from megnorm.data.config import DataConfig, Task
from megnorm.data.denoising import MaskedLoader, SpanLoader
from megnorm.data.errors import DataError
from megnorm.data.loader import Loader
from megnorm.data.pairs import PairLoader


class Samples(Protocol):
    """What training needs of a loader; batches are pure functions of the sample ids."""

    def samples(self) -> int: ...
    def batch(
        self, first_sample: int, count: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Batch | PairBatch | ClassBatch | list[PairBatch]: ...
    def state(self, consumed_samples: int) -> dict[str, Any]: ...


TASKS: dict[Task, type[Loader] | type[MaskedLoader] | type[SpanLoader] | type[PairLoader] | type[ClassLoader]] = {
    "causal": Loader,
    "masked": MaskedLoader,
    "spans": SpanLoader,
    "pairs": PairLoader,
    "classes": ClassLoader,
}
CAUSAL = ("separate_documents", "reset_positions", "mask_end", "fim_rate")  # options of task causal alone
STREAM = ("weights", "epochs", "order")  # options of tasks that read a stream of tokens
SECTIONS = {"mask": "masked", "spans": "spans", "pairs": "pairs", "classes": "classes"}


def open_split(
    config: DataConfig,
    split: str,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    samples: int | None = None,
    state: Mapping[str, Any] | None = None,
) -> Samples:
    """The loader of a split for the task of the config; the arguments are those of ``Loader``."""
    plain, task = DataConfig(), config.task
    idle = [name for name in CAUSAL if task != "causal"] + [name for name in STREAM if task in ("pairs", "classes")]
    idle += [name for name, owner in SECTIONS.items() if owner != task]
    idle += ["verify"] if task == "classes" else []
    for name in idle:
        if getattr(config, name) != getattr(plain, name):
            raise DataError(f"data.{name} has no meaning for data.task={task}: leave it out.")
    return TASKS[task](
        config,
        split,
        sequence_length=sequence_length,
        seed=seed,
        vocab_size=vocab_size,
        samples=samples,
        state=state,
    )
