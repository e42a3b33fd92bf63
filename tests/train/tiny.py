"""A tiny run on made-up data, for tests of training as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megnorm.data.indexed import IndexedWriter
from megnorm.metrics.record import Record


def write_data(prefix: Path, *, documents: int = 40, vocab: int = 61, seed: int = 0) -> Path:
    """A learnable token stream: every token is followed by its successor, now and then by a jump."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            steps = np.where(generator.random(48) < 0.9, 1, generator.integers(2, vocab, 48))
            tokens = (generator.integers(vocab) + np.cumsum(steps)) % vocab
            writer.add(tokens, [len(tokens)], [1])
    return prefix


def write_config(folder: Path, prefix: Path, **sections: dict[str, Any]) -> Path:
    """A YAML file in ``folder``; sections update the defaults below."""
    config: dict[str, dict[str, Any]] = {
        "model": {
            "layers": 2, "width": 16, "heads": 2, "ffn": 24, "vocab_size": 61, "max_positions": 16,
            "norm": {"scheme": "hybridnorm_star"},
        },
        "data": {"path": str(prefix), "split": [0.8, 0.2, 0.0]},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {
            "out": str(folder / "run"), "steps": 8, "sequence_length": 16, "global_batch": 4, "micro_batch": 2,
            "eval_batches": 1, "threads": 1,
        },
        "checkpoint": {"every": 3},
        "metrics": {"tensorboard": False, "progress": False},
    }  # fmt: skip
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def losses(run: Path) -> dict[int, float]:
    """Loss by step, from the record."""
    return dict(zip(*Record.read(run).series("loss"), strict=True))
