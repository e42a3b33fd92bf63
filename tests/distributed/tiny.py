"""A tiny run on synthetic token files, for tests of training across ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megnorm import config as configs
from megnorm.config import RunConfig
from megnorm.data.config import DataConfig
from megnorm.data.indexed import IndexedWriter
from tests.distributed import cases

VOCABULARY, END = 97, 0


def write_data(prefix: Path, tokens: int = 4000, seed: int = 3) -> str:
    """Documents of random length, each ended by END, in PREFIX.bin and PREFIX.idx; a walk, so that there is something to
    learn. Returns the prefix."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, "uint16") as writer:
        left = tokens
        while left > 0:
            length = int(random.integers(3, 40))
            walk = random.integers(0, 96) + np.cumsum(random.integers(1, 4, length))
            writer.add_document([*(1 + walk % (VOCABULARY - 1)).tolist(), END])
            left -= length + 1
    return str(prefix)


def config(data: str, out: Path, scheme: str = "hybridnorm", *, steps: int, every: int = 0, **case: Any) -> RunConfig:
    """A run of ``cases.config``'s model on the data; loss masks differ between rows (no loss behind a document's end).

    every: steps between checkpoints; 0: at the end.
    """
    base = cases.config(scheme, **{"precision": "fp32", **case})
    return replace(
        base,
        data=DataConfig(path=data, split=(1.0, 0.0, 0.0), mask_end=True, eod=END),
        optim=replace(base.optim, lr=1e-2, warmup_steps=3),
        train=replace(base.train, out=str(out), steps=steps, eval_batches=0, threads=1),
        metrics=replace(base.metrics, tensorboard=False, progress=False),
        checkpoint=replace(base.checkpoint, every=every),
    )


def write_config(path: Path, config: RunConfig) -> Path:
    path.write_text(yaml.safe_dump(configs.to_dict(config)), encoding="utf-8")
    return path
