"""A signal to one rank of two: all save in the same step and end with their own code; the next start goes on."""

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megnorm.checkpoint import io
from megnorm.train.signals import EXIT_STOPPED
from tests.distributed import launching, tiny
from tests.train.faults import ended_at_last, start

LIMIT = 120.0


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "number", "victim"),
    [({"tp": 2}, signal.SIGUSR1, 1), ({"dp": 2}, signal.SIGTERM, 0)],
    ids=("tp, SIGUSR1", "dp, SIGTERM"),
)
def test_a_signal_to_one_rank_saves_on_all(tmp_path: Path, layout: Any, number: int, victim: int) -> None:
    plugin = launching.write_plugin(
        tmp_path / "slow.py", "import time\ntime.sleep(0.1)\nif n == 4: (path.parent / 'ready').touch()"
    )
    config = tiny.config(tiny.write_data(tmp_path / "data"), tmp_path / "run", steps=60, every=1000, **layout)
    config = replace(config, model=replace(config.model, norm=replace(config.model.norm, plugins=(plugin,))))
    path = tiny.write_config(tmp_path / "run.yaml", config)
    jobs = start(path)
    with ended_at_last(jobs):
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
            time.sleep(0.02)
        jobs[victim].send_signal(number)
        texts = [job.communicate(timeout=LIMIT)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [EXIT_STOPPED] * 2, texts
    assert not any("Warning" in text or "[W" in text or "Traceback" in text for text in texts), texts
    step = io.read_meta(io.latest(tmp_path / "run/checkpoints"))["step"]
    assert 4 <= step <= 8 and launching.curve(tmp_path / "run")[-1][0] == step, (
        "within a step, and the record ends there"
    )
    again = start(path, [f"train.steps={step + 2}"])
    with ended_at_last(again):
        texts = [job.communicate(timeout=LIMIT)[1] for job in again]
        assert [job.returncode for job in again] == [0, 0], texts
    assert f"step {step}, {8 * step} samples consumed" in texts[0]
