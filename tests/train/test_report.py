"""What a run that goes on says about where it goes on from."""

import json
import logging
from pathlib import Path

import pytest

from megnorm import config as configs
from megnorm.checkpoint.io import Resumed
from megnorm.cli import main
from megnorm.plan import make_plan
from megnorm.train import report
from megnorm.train.signals import EXIT_STOPPED
from tests.train.tiny import write_config, write_data


def test_a_resumed_run_says_where_it_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step, samples by source, layout, changed settings, what was verified; and both lines of every save."""
    paths = [str(write_data(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    data = {"path": paths, "weights": [3, 1], "split": [0.8, 0.2, 0.0]}
    config = write_config(tmp_path, Path("unused"), data=data)
    with caplog.at_level(logging.INFO):
        assert main(["train", "--config", str(config), "train.stop_after=3"]) == EXIT_STOPPED
        first = caplog.text
        caplog.clear()
        assert main(["train", "--config", str(config), "optim.lr=1e-3", "checkpoint.verify=false"]) == 0
    assert first.index("checkpoint of step 3 requested") < first.index("checkpoint of step 3 durable after")
    assert "resumed at" not in first
    lines = [record.getMessage() for record in caplog.records]
    start = lines.index(f"resumed at step 3, 12 samples consumed: 9 of {paths[0]}, 3 of {paths[1]}")
    assert lines[start + 1] == "  layout: 1 rank(s), as it was"
    assert lines[start + 2] == "  settings: checkpoint.verify True -> False; optim.lr 0.01 -> 0.001"
    assert lines[start + 3].startswith("  NOT verified: ") and "checkpoint.verify is false" in lines[start + 3]


def test_the_layout_then_and_now() -> None:
    before, now = (
        configs.load(None, [f"parallel.{one}" for one in chosen]) for chosen in (["tp=2", "zero=0"], ["pp=2"])
    )
    meta = {
        "step": 7,
        "ranks": 4,
        "consumed_samples": 448,
        "data": {},
        "config": json.loads(json.dumps(configs.to_dict(before))),
    }
    found = list(report.lines(make_plan(now, 2), Resumed(Path("x"), meta, 147, 5_120_000, True)))
    assert found == [
        "resumed at step 7, 448 samples consumed",
        "  layout: 4 rank(s), tp 2, zero 0 when saved, 2 rank(s), pp 2 now",
        "  verified: manifest, meta and the checksums of 147 tensors, 5.1 MB on this rank",
    ]
