"""Masked language models and encoder-decoders train as a user starts them: they learn, and go on bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.data.indexed import IndexedWriter
from megnorm.metrics.record import Record
from tests.train.tiny import losses, write_config, write_data

ENCDEC = {"family": "encdec", "layers": 1, "encoder_layers": 2, "shared_embedding": True, "tied_head": True}


def write_tokenizer(path: Path, vocab: int) -> str:
    """Words w0, w1, ..., of which the last is the mask."""
    from tokenizers import Tokenizer, models

    words = {**{f"w{i}": i for i in range(vocab - 1)}, "[MASK]": vocab - 1}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path))
    return str(path)


def write_pairs(prefix: Path, *, count: int = 300, vocab: int = 61) -> str:
    """Sources of 3 to 14 tokens between 3 and vocab; a target is its source shifted by one word. 2 ends each."""
    random = np.random.default_rng(1)
    rows = [random.integers(3, vocab - 1, random.integers(3, 14)) for _ in range(count)]
    for side, shift in (("_0", 0), ("_1", 1)):
        with IndexedWriter(f"{prefix}{side}", "uint16") as writer:
            for row in rows:
                writer.add_document([*(row + shift).tolist(), 2])
    return str(prefix)


def sections(kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What a run of each kind says otherwise than the tiny causal one."""
    if kind == "masked":
        tokenizer = write_tokenizer(folder / "tokenizer.json", 61)
        data: dict[str, Any] = {"path": str(write_data(folder / "text", vocab=60)), "task": "masked"}
        data |= {"tokenizer": tokenizer, "mask": {"probability": 0.3}}
        return {"model": {"family": "masked", "head_transform": True, "tied_head": True}, "data": data}
    if kind == "spans":
        text = write_data(folder / "text", vocab=56)
        data = {"path": str(text), "task": "spans", "spans": {"sentinels": [57, 60]}, "eod": 56}
        return {"model": {**ENCDEC, "relative_buckets": 8, "positions": "none", "max_positions": 24}, "data": data}
    pairs = write_pairs(folder / "pairs")
    data = {
        "path": pairs,
        "valid": pairs,
        "task": "pairs",
        "pairs": {"tokens_per_batch": 256, "longest": 16},
        "start": 1,
    }
    model = {**ENCDEC, "label_smoothing": 0.1}
    return {"model": model, "data": data, "train": {"micro_batch": 1, "global_batch": 2}}


def config_of(kind: str, folder: Path, **train: Any) -> Path:
    given = sections(kind, folder)
    base = {"out": str(folder / "run"), "sequence_length": 16, "global_batch": 8, "micro_batch": 4, "eval_batches": 2}
    model = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "vocab_size": 61, "max_positions": 16, "dropout": 0.05}
    return write_config(
        folder,
        folder / "text",
        model={**model, "norm": {"scheme": "deepnorm"}, **given["model"]},
        data=given["data"] | ({} if kind == "pairs" else {"split": [0.8, 0.2, 0.0]}),
        train={**base, "threads": 1, **given.get("train", {}), **train},
        optim={"lr": 2e-2, "warmup_steps": 10},
    )


@pytest.mark.parametrize(
    ("kind", "steps", "share"),
    [
        ("spans", 40, 0.7),
        pytest.param("masked", 80, 0.95, marks=pytest.mark.full),
        pytest.param("pairs", 80, 0.9, marks=pytest.mark.full),
    ],
)
def test_a_run_learns_and_goes_on(tmp_path: Path, kind: str, steps: int, share: float) -> None:
    run, parts = tmp_path / "run", tmp_path / "parts"
    config = config_of(kind, tmp_path, steps=steps)
    assert main(["train", "--config", str(config), f"checkpoint.every={steps - 4}"]) == 0
    curve = losses(run)
    assert np.mean([curve[steps - i] for i in range(5)]) < share * curve[1]
    assert Record.read(run).series("valid_loss")[1][-1] < share * curve[1]
    whole = io.latest(run / "checkpoints")
    shutil.copytree(run, parts)
    shutil.rmtree(parts / "checkpoints" / whole.name)
    (parts / "checkpoints/latest").unlink()
    assert main(["train", "--config", str(config), f"train.out={parts}"]) == 0
    other = io.latest(parts / "checkpoints")
    names = list(io.available(whole))
    a, b = io.read_full(whole, names), io.read_full(other, names)
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert losses(parts) == curve


REFUSALS = {
    "a task of another family": ("masked", ["data.task=causal"], "model.family=masked can be trained for; use masked"),
    "an option of another family": ("masked", ["model.encoder_layers=2"], "only for encdec; leave it out"),
    "an odd number of buckets": ("masked", ["model.relative_buckets=7"], "model.relative_buckets=7 must be even"),
    "pairs in micro-batches": ("pairs", ["train.micro_batch=2"], "set it to 1"),
    "pairs too long": ("pairs", ["data.pairs.longest=17"], "longer than model.max_source_positions=16"),
    "spans too long": ("spans", ["train.sequence_length=32"], "longer than model.max_source_positions=24"),
    "padding by token": ("pairs", ["model.padding_id=0"], "only for causal and masked"),
    "experts in an encoder": ("masked", ["model.moe.experts=4"], "model.moe has no meaning for model.family=masked"),
    "linear biases on both sides": ("masked", ["model.positions=alibi"], "model.positions=alibi looks back alone"),
    "a window in two stacks": ("pairs", ["model.attention.window=4"], "model.attention.window looks back alone"),
    "text of masked samples": ("masked", ["train.eval_units=true"], "train.eval_units reads samples as text"),
    "smoothing of everything": ("pairs", ["model.label_smoothing=1.0"], "must be in [0, 1)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, overrides, expected = REFUSALS[name]
    assert main(["train", "--config", str(config_of(kind, tmp_path)), "train.steps=20", *overrides]) == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message


def test_a_masked_run_is_exported_and_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("masked", tmp_path, steps=2)
    assert main(["train", "--config", str(config), "optim.warmup_steps=0"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "as MegnormForMaskedLM" in said and "max |logit difference|" in said
    for source in ("run", "hf"):
        assert main(["generate", str(tmp_path / source), "--prompt", "a"]) == 2
        assert "does not continue texts; give a model of model.family=causal" in capsys.readouterr().err
