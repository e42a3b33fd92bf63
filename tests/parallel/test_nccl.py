"""What NCCL is told: defaults that give way to the user's, streams by axis, groups of the right ranks."""

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megnorm.parallel import nccl
from megnorm.parallel.mesh import Axis, How, Mesh, _axes, build_mesh, stage_axis

HOPPER = {"tp": 2, "capability": (9, 0), "deterministic": False, "graphs": False}


def test_one_queue_where_products_run_beside_collectives() -> None:
    assert nccl.defaults({}, **HOPPER) == {nccl.QUEUES: "1"}
    for other in ({"tp": 1}, {"capability": (10, 0)}):
        assert nccl.defaults({}, **{**HOPPER, **other}) == {}
    assert nccl.defaults({nccl.QUEUES: "8"}, **HOPPER) == {}


def test_runs_that_must_repeat_do_not_add_in_switches() -> None:
    strict = {**HOPPER, "tp": 1, "deterministic": True}
    assert nccl.defaults({}, **strict) == {"NCCL_ALGO": "^NVLS,NVLSTree"}
    assert nccl.defaults({"NCCL_ALGO": "Ring"}, **strict) == {}
    with pytest.raises(ValueError, match="kernels.deterministic.*NCCL_ALGO=NVLS does not; unset it"):
        nccl.defaults({"NCCL_ALGO": "NVLS"}, **strict)


def test_graphs_beside_segments_that_grow() -> None:
    asked = {**HOPPER, "tp": 1, "graphs": True}
    assert nccl.defaults({}, **asked) == {}
    for key in nccl.ALLOCATOR:
        env = {key: "expandable_segments:True"}
        assert nccl.defaults(env, **asked) == {"NCCL_GRAPH_REGISTER": "0"}
        assert nccl.defaults({**env, "NCCL_GRAPH_REGISTER": "1"}, **asked) == {}


def test_they_are_set_once_and_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(nccl.QUEUES, raising=False)
    nccl.prepare(tp=2, deterministic=False, graphs=False)
    assert nccl.QUEUES not in nccl.os.environ  # a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with mock.patch.dict(nccl.os.environ):
        nccl.prepare(tp=2, deterministic=False, graphs=False)
        assert nccl.os.environ[nccl.QUEUES] == "1" and not caplog.records
    monkeypatch.setenv(nccl.QUEUES, "32")
    nccl.prepare(tp=2, deterministic=False, graphs=False)
    assert "parallel.tp=2 runs best" in caplog.text and nccl.os.environ[nccl.QUEUES] == "32"


class Options:
    """As torch's of NCCL."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.urgent, self._timeout = is_high_priority_stream, timedelta(minutes=10)


def test_groups_that_computation_waits_for_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 16 ranks that are not there: which groups are made, in which order, of what."""
    made: list[tuple[list[int], Any]] = []

    def new_group(ranks: list[int], *, timeout: Any, pg_options: Any, group_desc: str) -> Any:
        made.append((ranks, pg_options))
        return object()

    monkeypatch.setattr(dist, "ProcessGroupNCCL", mock.Mock(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 5)
    axes = _axes.__wrapped__(How(None, "cuda", 42.0), 4, 2, 2, 2, 2)
    sizes = {axis.name: axis.size for axis in axes}
    assert sizes == {"pp": 2, "dp": 2, "tp": 4, "kv": 2, "ep": 2, "edp": 1}
    by_ranks = {tuple(ranks): options for ranks, options in made}
    assert all(options._timeout == timedelta(seconds=42) for options in by_ranks.values())
    assert [(i, i + 8) in by_ranks for i in range(8)] == [True] * 8
    assert [ranks for ranks, _ in made[:2]] == [[0, 4], [1, 5]]
    assert by_ranks[(0, 1, 2, 3)].urgent and by_ranks[(5, 13)].urgent
    data = [options.urgent for ranks, options in made if tuple(ranks) == (1, 5)]
    assert data == [False, True]  # gradients of dp have time; experts of ep do not


def test_a_stages_group_has_the_limit_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made later, where kernels ask for it."""
    limits: list[Any] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, *, timeout, **_: limits.append(timeout))
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 5)
    axes = (Axis("pp", 2, 1), Axis("dp", 2, 0), Axis("tp", 2, 1))
    stage_axis(Mesh(*axes, timeout=42.0))
    assert limits == [timedelta(seconds=42)] * 2


def layout(rank: int, world: int) -> dict[str, tuple[int, int, list[int]]]:
    mesh = build_mesh(tp=2, pp=1, dp=2, kv_heads=1, device=torch.device("cpu"), timeout=60.0)
    axes = [mesh.axis(name) for name in ("pp", "dp", "tp", "kv", "ep", "edp")]
    return {
        axis.name: (axis.size, axis.rank, dist.get_process_group_ranks(axis.group) if axis.group else [])
        for axis in axes
    }


@pytest.mark.full
def test_axes_over_real_groups(ranks: Any) -> None:
    for rank, found in enumerate(ranks(4).run(layout)):
        tp, dp = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert found["tp"] == found["kv"] == (2, rank % 2, tp)
        assert found["dp"] == found["edp"] == (2, rank // 2, dp)
        assert found["pp"] == found["ep"] == (1, 0, [])
