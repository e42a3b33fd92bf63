"""A run that has ended leaves nothing in memory."""

import gc
import weakref
from pathlib import Path

import torch

from megnorm.plan import make_plan
from megnorm.train.build import build
from megnorm.train.step import train_step
from tests.distributed import tiny


def test_a_run_is_freed(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    run = build(make_plan(tiny.config(data, tmp_path / "run", steps=4), 1), torch.device("cpu"))
    train_step(run)
    left = [weakref.ref(thing) for thing in (run.flat, run.optimizer, *run.stages.values(), run.flat.grads)]
    del run
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
