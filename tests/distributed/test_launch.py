"""Launching: the same numbers however the ranks were started, one rank's error ends all, killed jobs go on by restart."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megnorm.config import RunConfig
from megnorm.parallel import launch
from megnorm.train.main import main as train
from tests.distributed import launching, tiny

STEPS = 8
LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train")


def tiny_run(data: str, out: Path, *, plugin: str | None = None, **case: Any) -> RunConfig:
    config = tiny.config(data, out, steps=STEPS, every=2, **{"tp": 2, "kv": 1, **case})
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    norm = replace(config.model.norm, plugins=() if plugin is None else (plugin,))
    return replace(config, model=replace(config.model, norm=norm))


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    """The curve of one torchrun with two ranks."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = launching.run("local", tiny_run(data, out))
    assert ended.code == 0, ended.text
    curve = launching.curve(out)
    assert [step for step, _, _ in curve] == list(range(1, STEPS + 1)) and curve[-1][1] < curve[0][1]
    return curve


@pytest.mark.full
@pytest.mark.parametrize("launcher", ("static", "c10d", "mpi"))
def test_every_launcher_gives_the_same_numbers(data: str, undisturbed: Any, tmp_path: Path, launcher: str) -> None:
    """Two agents as two nodes of one rank each, and mpirun, against one torchrun: bit for bit."""
    ended = launching.run(launcher, tiny_run(data, tmp_path / "run"))
    assert ended.code == 0, ended.text
    assert launching.curve(tmp_path / "run") == undisturbed


@pytest.mark.full
@pytest.mark.parametrize("launcher", ("local", "static", "mpi"))
@pytest.mark.parametrize("when", ("before the ranks meet", "in a step"))
def test_one_error_ends_all(data: str, tmp_path: Path, launcher: str, when: str) -> None:
    if when == "in a step":
        plugin = launching.write_plugin(tmp_path / "hurt.py", "if n == 3: raise OSError('the disk of rank 1 is gone')")
    else:
        plugin = str(tmp_path / "hurt.py")
        (tmp_path / "hurt.py").write_text(
            "import os\n"
            "if os.environ.get('RANK', os.environ.get('PMI_RANK')) == '1':\n"
            "    raise ValueError('the disk of rank 1 is gone')\n"
        )
    # static: torchrun of node 0 learns of node 1's end only through its own rank
    late = {"timeout": 20.0} if launcher == "static" else {}
    ended = launching.run(launcher, tiny_run(data, tmp_path / "run", plugin=plugin, **late))
    assert ended.code != 0
    assert "the disk of rank 1 is gone" in ended.text
    assert ended.seconds < 120, "the others waited for the rank that failed"


REFUSED = {
    "parallel.tp=3": "parallel.tp=3 does not divide the 2 ranks; use 2",
    "train.sequence_length=7": "train.sequence_length=7 is not divisible by parallel.tp=2",
    "model.ffn=47": "model.ffn=47 is not divisible by parallel.tp=2; use 1 or 47 or ffn=48",
}


@pytest.mark.parametrize("override", REFUSED)
def test_sizes_that_do_not_divide_are_refused_on_every_rank(
    data: str, tmp_path: Path, environment: Any, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    """Before a rank asks for the others: each ends by itself with 2, and rank 0 says why in one sentence."""
    path = tiny.write_config(tmp_path / "run.yaml", tiny_run(data, tmp_path / "run"))
    said = []
    for rank in ("0", "1"):
        environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        assert train(["--config", str(path), override]) == 2
        said.append(capsys.readouterr().err)
    assert REFUSED[override] in said[0] and said[0].count("\n") == 1
    assert said[1] == ""
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "code"), (("mpi", 2), ("local", 1)))
def test_a_refusal_ends_the_job(data: str, tmp_path: Path, launcher: str, code: int) -> None:
    """torchrun has one code for all failures, and a report of its own."""
    config = tiny_run(data, tmp_path / "run")
    ended = launching.run(launcher, config, "parallel.tp=3")
    assert ended.code == code, ended.text
    assert "megnorm/train" not in ended.text, "a traceback of ours"
    assert not any((tmp_path / "run").iterdir())


KILL = """\
marker = path.with_suffix('.killed')
if n == 6 and not marker.exists():
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "own_store"), (("alone", "0"), ("alone", "1"), ("c10d", "1")))
def test_a_killed_rank_costs_a_restart(
    data: str, undisturbed: Any, tmp_path: Path, launcher: str, own_store: str
) -> None:
    """torchrun starts all ranks again, which must meet afresh: in the agent's store that the dead ones used, or in one of
    rank 0's."""
    plugin = launching.write_plugin(tmp_path / "hurt.py", KILL)
    config = tiny_run(data, tmp_path / "run", plugin=plugin)
    ended = launching.run(launcher, config, MAX_RESTARTS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE=own_store)
    assert ended.code == 0, ended.text
    assert (tmp_path / "hurt.killed").exists()
    assert ended.text.count("continuing from") == 1 and "step 4, 32 samples consumed" in ended.text, ended.text
    assert launching.curve(tmp_path / "run") == undisturbed


LOSE = """\
marker = path.with_suffix('.lost')
if n == 6 and not marker.exists():
    marker.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)"""


@pytest.mark.full
def test_a_lost_node_is_replaced(data: str, undisturbed: Any, tmp_path: Path) -> None:
    """A node dies with its agent and another takes its place: the agents then count different numbers of restarts."""
    plugin = launching.write_plugin(tmp_path / "hurt.py", LOSE)
    config = tiny_run(data, tmp_path / "run", plugin=plugin)
    path = tiny.write_config(tmp_path / "run.yaml", config)
    meet = {"RDZV": "c10d", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "NNODES": "2"}
    begun = time.monotonic()
    jobs = [launching.start("multinode.sh", [str(path)], **meet)]
    launching.wait_for_port(int(meet["MASTER_PORT"]))
    lost = launching.start("multinode.sh", [str(path)], **meet)
    lost.communicate(timeout=launching.LIMIT)
    assert lost.returncode == -signal.SIGKILL
    jobs.append(launching.start("multinode.sh", [str(path)], **meet))
    ended = launching.finish(jobs, begun)
    assert ended.code == 0, ended.text
    assert launching.curve(tmp_path / "run") == undisturbed


@pytest.mark.full
def test_a_stopped_job_continues(data: str, undisturbed: Any, tmp_path: Path) -> None:
    """SIGTERM to torchrun (as Slurm sends it) saves; the next start, of another launcher, goes on to the same numbers."""
    ask = "if n == 4 and not (path.parent / 'asked').exists():\n    (path.parent / 'asked').touch()"
    slow = "import time\ntime.sleep(0.5)"
    plugin = launching.write_plugin(tmp_path / "hurt.py", f"{ask}\n{slow}")
    config = tiny_run(data, tmp_path / "run", plugin=plugin)
    path = tiny.write_config(tmp_path / "run.yaml", config)
    begun = time.monotonic()
    jobs = launching.nodes("local", [str(path)])
    while not (tmp_path / "asked").exists() and time.monotonic() < begun + 120:
        time.sleep(0.05)
    os.kill(jobs[0].pid, signal.SIGTERM)
    ended = launching.finish(jobs, begun)
    assert ended.code != 0
    last = launching.curve(tmp_path / "run")[-1][0]
    assert 3 <= last < STEPS, ended.text
    again = launching.run("mpi", config)
    assert again.code == 0 and f"step {last}," in again.text, again.text
    assert launching.curve(tmp_path / "run") == undisturbed


# Who we are, from the environment alone


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets a launcher's variables in an environment that has none, on a machine of 16 cores."""
    for key in list(os.environ):
        if key in LAUNCHER_KEYS or key.startswith(("SLURM", "LOCAL_", "TORCHELASTIC")):
            monkeypatch.delenv(key)
    monkeypatch.setattr(launch, "_affinity", lambda: frozenset(range(16)))
    monkeypatch.setattr(launch, "_mpi_world", lambda: launch.World(5, 8, 1, 4, "mpi", 4))
    return lambda **variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = {
    "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, launch.World(cores=16)),
        (TORCHRUN, launch.World(3, 8, 1, 2, "torchrun", 8)),
        ({**STEP, **TORCHRUN}, launch.World(3, 8, 1, 2, "torchrun", 8)),
        (STEP, launch.World(6, 7, 2, 3, "slurm", 5)),
        ({**STEP, "SLURM_CPUS_PER_TASK": "6"}, launch.World(6, 7, 2, 3, "slurm", 6)),
        ({**STEP, "PMI_SIZE": "7", "PMI_RANK": "6"}, launch.World(6, 7, 2, 3, "slurm", 5)),
        ({"PMI_SIZE": "8"}, launch.World(5, 8, 1, 4, "mpi", 4)),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, launch.World(5, 8, 1, 4, "mpi", 4)),
        # mpirun's daemons are tasks of a Slurm step, one a node; their variables reach the ranks
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "8"},
            launch.World(5, 8, 1, 4, "mpi", 4),
        ),
        # the batch script of a job of four tasks is one process
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, launch.World(cores=16)),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, launch.World(cores=16)),
    ],
)
def test_who_we_are(environment: Any, variables: dict[str, str], expected: launch.World) -> None:
    environment(**variables)
    assert launch.world() == expected


@pytest.mark.parametrize(
    ("where", "given", "configured", "threads"),
    [
        (launch.World(cores=16), None, None, 16),
        (launch.World(cores=16), None, 3, 3),
        (launch.World(cores=16), "4", None, None),
        (launch.World(cores=16), "4", 2, 2),
        (launch.World(size=2, local_size=2, source="torchrun", cores=8), "1", None, 8),
        (launch.World(size=2, local_size=2, source="torchrun", cores=8), "4", None, None),
        (launch.World(size=2, local_size=1, source="torchrun", cores=16), "1", None, None),
        (launch.World(size=2, local_size=2, source="mpi", cores=8), "1", None, None),
    ],
)
def test_threads_of_a_rank(
    environment: Any,
    monkeypatch: pytest.MonkeyPatch,
    where: launch.World,
    given: str | None,
    configured: int | None,
    threads: int | None,
) -> None:
    """None: torch keeps the number that it took from OMP_NUM_THREADS."""
    if given is not None:
        environment(OMP_NUM_THREADS=given)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    launch.set_threads(where, configured)
    assert chosen == ([] if threads is None else [threads])


def test_ranks_without_an_address_are_told(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="2 ranks, but MASTER_ADDR is not set; use the launchers in scripts/"):
        launch.init(launch.World(size=2), torch.device("cpu"), 1.0)


def meet(store: Any, size: int) -> list[int | BaseException]:
    """What each of ``size`` ranks agrees on, the ranks being threads."""
    found: list[Any] = [None] * size

    def rank(i: int) -> None:
        time.sleep(0.02 * ((i * 7) % size))
        try:
            found[i] = launch.agree_on_attempt(store.clone(), i, size, 10.0)
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_attempt_has_a_number_of_its_own() -> None:
    """In one store that outlives the ranks, also after attempts that died while they met."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert meet(store, 4) == [1] * 4
    assert meet(store, 4) == [2] * 4
    store.add("megnorm/attempts", 1)  # a rank 0 that died before any other came
    assert meet(store, 3) == [4] * 3
    store.add("megnorm/attempts", 1)
    for rank in (1, 2):
        store.set(f"megnorm/5/rank{rank}", "dead")
    store.set("megnorm/5/confirmed", "dead,dead")  # all came, and died at once
    assert meet(store, 3) == [6] * 3


def test_attempts_share_no_keys(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of two ranks through the store of one torchrun agent: what the first left is not there for the second."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
    stores: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, store, **kwargs: stores.append(store))
    for _ in range(2):
        ranks = [launch.World(rank, 2, rank, 2, "torchrun") for rank in (0, 1)]
        threads = [threading.Thread(target=launch.init, args=(one, torch.device("cpu"), 10.0)) for one in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first, also_first, second, also_second = stores
    first.set("address of rank 1", "a dead one's")
    assert also_first.check(["address of rank 1"])
    assert not second.check(["address of rank 1"]) and not also_second.check(["address of rank 1"])
