"""Encoder-decoders, masked models and classifiers on many ranks: the losses, probes and scores of one, whatever the layout,
and a run that changes it at every stop."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from megnorm.config import RunConfig
from megnorm.data.config import ClassConfig, DataConfig, PairConfig, SpanConfig
from megnorm.metrics.config import MetricsConfig, Probe
from megnorm.train.config import WatchdogConfig
from megnorm.train.signals import EXIT_STOPPED
from tests.distributed import tiny
from tests.train.test_families import write_pairs, write_tokenizer
from tests.train.test_finetune import write_tasks
from tests.train.test_finetune import write_tokenizer as write_words
from tests.train.test_pipeline_training import assert_same, lines, start

LAYOUTS: dict[str, dict[str, Any]] = {
    "serial": {},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "pp4": {"pp": 4},
    "dp2": {"dp": 2},
}
SHORT = ("serial", "tp2 pp2", "pp2 dp2 interleaved")
KINDS = {"spans": "nmt", "pairs": "t5", "masked": "bert", "classes": "classifier"}
ORDERS = {kind: (*(LAYOUTS if kind == "spans" else SHORT), "serial") for kind in KINDS}


def data_of(kind: str, folder: Path) -> DataConfig:
    if kind == "spans":
        path = tiny.write_data(folder / "text")
        return DataConfig(path=path, task="spans", split=(0.8, 0.2, 0.0), eod=0, spans=SpanConfig(sentinels=(91, 96)))
    if kind == "pairs":
        pairs = write_pairs(folder / "pairs", vocab=97)
        return DataConfig(
            path=pairs, valid=pairs, task="pairs", start=1, pairs=PairConfig(tokens_per_batch=64, longest=16)
        )
    if kind == "masked":
        path, words = tiny.write_data(folder / "text"), write_tokenizer(folder / "tokenizer.json", 97)
        return DataConfig(path=path, task="masked", split=(0.8, 0.2, 0.0), tokenizer=words)
    train, valid = (write_tasks(folder, rows, seed)[0] for rows, seed in ((64, 0), (21, 1)))
    words = write_words(folder / "words.json")
    return DataConfig(path=train, valid=valid, task="classes", tokenizer=words, pad=63, classes=ClassConfig())


def config_of(kind: str, data: DataConfig, out: Path, layout: str, **train: Any) -> RunConfig:
    base = tiny.config(
        "", out, "deepnorm", steps=len(ORDERS[kind]), **{"model": KINDS[kind], "precision": "fp64", **LAYOUTS[layout]}
    )
    layers = 2 if base.model.family == "encdec" else 4
    classes = {"classes": 2} if kind == "classes" else {}
    if kind == "pairs":
        train["micro_batch"] = 1
    sizes = {
        "eval_every": 2,
        "eval_batches": 2,
        "log_every": 1,
        "sequence_length": 12,
        "watchdog": WatchdogConfig(timeout=0.0),
    }
    return replace(
        base,
        # A bias of k has no gradient but rounding, which AdamW makes large: softmax does not see it.
        model=replace(base.model, layers=layers, bias=False, **classes),
        data=data,
        train=replace(base.train, **{**sizes, **train}),
        metrics=MetricsConfig(tensorboard=False, progress=False, probe_every=2, probes=get_args(Probe)),
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_change_its_layout_at_every_stop(ranks: Any, tmp_path: Path, kind: str) -> None:
    data, whole, moving = data_of(kind, tmp_path), tmp_path / "whole", tmp_path / "moving"
    assert start(ranks, config_of(kind, data, whole, "serial")) == 0
    order = ORDERS[kind]
    for i, layout in enumerate(order):
        code = start(ranks, config_of(kind, data, moving, layout, stop_after=1))
        assert code == (0 if i == len(order) - 1 else EXIT_STOPPED)
    serial = lines(whole)
    assert_same(lines(moving), serial, 1e-9)
    names = serial[2]
    assert "valid_loss" in names and ("valid_mcc" in names) == (kind == "classes")
    if kind in ("spans", "pairs"):
        assert {"grad_norm/encoder.layer.0", "grad_norm/decoder.layer.1", "stream_rms/encoder.embed"} <= names.keys()
        assert "branch_rms/decoder.blocks.0.cross_attention" in names
