"""Hung and slow ranks: found within the timeout, named with what the others wait in, and the job ended."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megnorm import config as configs
from megnorm.config import RunConfig
from megnorm.metrics.record import Record
from megnorm.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.parallel.recorder import RECORDER, Recorder
from megnorm.train import hang, slow, watchdog
from megnorm.train.agree import agreed, gathered, world
from megnorm.train.config import WatchdogConfig
from megnorm.train.hang import Beat, Identity, judge
from megnorm.train.watchdog import EXIT_HUNG, WARM_UP, Watchdog
from tests.distributed import launching, tiny
from tests.train.faults import Lines, Ranks, ended_at_last, start, with_train

LIMIT = 60.0  # seconds that a job may take to start and to train a few steps on a busy machine


# The flight recorder


def test_the_recorder_keeps_the_last_ones_and_the_one_that_runs(tmp_path: Path) -> None:
    recorder = Recorder(size=3)
    for i in range(5):
        recorder.begin("all_reduce", "dp" if i % 2 else "tp", 8 * i)
        recorder.end()
    recorder.begin("all_gather", "dp", 40)
    assert [(one.axis, one.number, one.bytes) for one in recorder.entries()] == [
        ("tp", 2, 16), ("dp", 2, 24), ("tp", 3, 32), ("dp", 3, 40),
    ]  # fmt: skip
    assert str(recorder.now) == "all_gather over dp (number 3, 40 bytes)"
    recorder.dump(tmp_path / "deep" / "ring.jsonl", rank=1)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "ring.jsonl").read_text().splitlines()]
    assert lines[0] == {"rank": 1} and len(lines) == 5
    assert (
        lines[-1]["op"] == "all_gather" and lines[-1]["seconds"] is None and abs(lines[-1]["begun"] - time.time()) < 60
    )


def test_time_in_collectives_and_progress_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recorder = Recorder()
    recorder.begin("all_reduce", "dp", 8)
    now[0] = 102.5
    recorder.end()
    now[0] = 103.0
    assert (recorder.seconds, recorder.pulse) == (2.5, 102.5)
    recorder.tick()
    assert recorder.pulse == 103.0


def collect(rank: int, size: int) -> list[tuple[str, str, int]]:
    axis = Axis("tp", size, rank, dist.group.WORLD)
    all_reduce(torch.ones(3), axis)
    all_gather(torch.ones(2, dtype=torch.float64), axis)
    reduce_scatter(torch.ones(4), axis)
    all_reduce(torch.ones(3), Axis("dp"))
    assert RECORDER.now is None
    return [(one.op, one.axis, one.bytes) for one in RECORDER.entries()[-3:]]


def test_collectives_are_recorded(ranks: Ranks) -> None:
    assert ranks(2).run(collect)[1] == [
        ("all_reduce", "tp", 12),
        ("all_gather", "tp", 32),
        ("reduce_scatter", "tp", 16),
    ]


def tell(rank: int, size: int) -> tuple[Any, Any]:
    mesh = Mesh(dp=Axis("dp", size, rank))
    return gathered({"rank": rank, "text": "x" * 100 * rank, "nothing": None}, mesh), agreed([rank == 1, False], mesh)


def test_ranks_tell_each_other(ranks: Ranks) -> None:
    for values, flags in ranks(2).run(tell):
        assert [value["rank"] for value in values] == [0, 1] and len(values[1]["text"]) == 100
        assert flags == [True, False]
    assert gathered({"a": 1}, Mesh()) == [{"a": 1}] and agreed([True], Mesh()) == [True] and world(Mesh()).size == 1


# Who is at fault

PEOPLE = [Identity(rank, f"node{rank // 2}", f"node{rank // 2} x", 100 + rank, "1") for rank in range(4)]


def beat(rank: int, age: float, waits: str | None = None, silent: float = 0.0, limit: float = 60.0) -> Beat:
    return Beat(rank, 7, age, limit, "in its forward and backward passes or update", waits, silent)


def test_a_silent_rank_is_at_fault() -> None:
    beats = [
        beat(0, 61, "all_reduce over dp (number 9, 8 bytes)"),
        beat(1, 1.0, silent=16),
        beat(2, 61, "all_reduce over dp"),
    ]
    verdict = judge(beats, PEOPLE, 15.0)
    assert verdict is not None and verdict.silent == (1,)
    assert verdict.text == (
        "rank 1 (host node0, pid 101) hangs: no sign of life for 16 s; last seen in step 7, in its forward and backward "
        "passes or update; waiting for it: rank 0 in all_reduce over dp (number 9, 8 bytes), rank 2 in all_reduce over dp"
    )


def test_a_rank_that_does_something_else_is_at_fault() -> None:
    verdict = judge([beat(0, 61, "A"), beat(1, 62), beat(2, 61, "A"), beat(3, 61, "A")], PEOPLE, 15.0)
    assert verdict is not None and verdict.silent == (), "it lives: it will hear that it is at fault, and go by itself"
    assert verdict.text.startswith("rank 1 (host node0, pid 101) hangs: no progress for 62 s in step 7, in its forward")
    assert verdict.text.endswith("waiting for it: ranks 0, 2 to 3 in A")


def test_who_works_within_its_limit_is_waited_for() -> None:
    assert judge([beat(0, 61, "A"), beat(1, 200, limit=600.0)], PEOPLE, 15.0) is None
    assert judge([beat(0, 61, "A"), beat(1, 3, "B")], PEOPLE, 15.0) is None
    assert judge([beat(0, 61, "A"), beat(1, 3, silent=10)], PEOPLE, 15.0) is None


def test_ranks_that_wait_for_each_other() -> None:
    verdict = judge([beat(0, 61, "all_reduce over tp"), beat(1, 61, "all_gather over dp")], PEOPLE, 15.0)
    assert verdict is not None and verdict.text == (
        "all ranks wait for each other: rank 0 in all_reduce over tp, rank 1 in all_gather over dp"
    )


# The threads, with short times


@pytest.fixture(autouse=True)
def part_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PARTING", 0.3)


@pytest.fixture
def sleeper() -> Iterator[Identity]:
    """A process that is stopped."""
    process = subprocess.Popen(["sleep", "600"])
    me, (_, born) = Identity.mine(1), hang._stat(process.pid)
    process.send_signal(signal.SIGSTOP)
    while hang._stat(process.pid)[0] != "T":
        time.sleep(0.01)
    yield replace(me, pid=process.pid, born=born)
    process.kill()
    process.wait()


def watchdogs(folder: Path, people: list[Identity], timeout: float = 0.8, keeper: int | None = None) -> list[Any]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: list[Any] = [server]
    for rank in range(len(people)):
        store = dist.TCPStore(
            "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
        )
        left: list[int] = []
        recorder = Recorder()
        dog = Watchdog(
            WatchdogConfig(timeout=timeout), rank=rank, people=people, store=store, keeper=keeper, patience=600.0,
            folder=folder, recorder=recorder, leave=left.append,
        )  # fmt: skip
        dog._times.extend([0.01] * WARM_UP)
        made.append((dog, recorder, left))
    return made


def ends(left: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not left and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(left)


def test_a_stopped_process_is_named_and_ended(
    tmp_path: Path, sleeper: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    people = [Identity.mine(0), sleeper, Identity.mine(2)]
    server, (dog, recorder, left), _, (busy, _, gone) = watchdogs(tmp_path, people)
    with dog, busy, dog.step(3), busy.patient("at a checkpoint"):
        recorder.begin("all_reduce", "dp", 8)
        assert ends(left, 6.0)
        assert ends(gone, 3.0), "one that is not stuck itself goes too when it hears of it"
    assert left == [EXIT_HUNG] and gone == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert f"rank 1 (host {sleeper.host}, pid {sleeper.pid}) hangs: no sign of life for " in said
    assert (
        "the process is stopped" in said and "waiting for it: rank 0 in all_reduce over dp (number 1, 8 bytes)" in said
    )
    assert "Thread 0x" in said, "the stacks"
    assert hang._stat(sleeper.pid)[0] in ("Z", ""), "it would have stayed for ever"
    stacks, ring = sorted(tmp_path.glob("*-rank-00000.*"), reverse=True)
    assert stacks.name == "step-00000003-rank-00000.stacks.txt" and "test_watchdog.py" in stacks.read_text()
    assert json.loads(ring.read_text().splitlines()[-1])["op"] == "all_reduce"


def test_all_hear_of_it_and_one_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server, (first, waiting, gone), (second, _, gone_too) = watchdogs(tmp_path, [Identity.mine(0), Identity.mine(1)])
    with first, second:
        waiting.begin("all_reduce", "dp", 8)
        assert ends(gone, 8.0) and ends(gone_too, 8.0)
    said = capfd.readouterr().err
    assert said.count("megnorm train: rank 1 (host") == 1 and "no progress for" in said
    assert len(list(tmp_path.glob("*.stacks.txt"))) == 2


def test_a_process_whose_threads_cannot_run_leaves_its_stack(tmp_path: Path) -> None:
    code = "import faulthandler, signal, time\nfaulthandler.register(signal.SIGUSR2)\nprint('up', flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    who = replace(Identity.mine(1), pid=process.pid, born=hang._stat(process.pid)[1])
    server, (dog, recorder, left), _ = watchdogs(tmp_path, [Identity.mine(0), who])
    with dog:
        recorder.begin("all_reduce", "dp", 8)
        assert ends(left, 6.0)
    assert 'File "<string>", line 4 in <module>' in process.communicate(timeout=5.0)[1]
    assert process.returncode == -signal.SIGKILL


def test_another_process_under_its_number_is_left_alone(sleeper: Identity) -> None:
    replace(sleeper, born="1").kill()
    assert hang._stat(sleeper.pid)[0] == "T"
    sleeper.kill()
    time.sleep(0.1)
    assert hang._stat(sleeper.pid)[0] in ("Z", "")


def test_a_store_that_is_gone_is_named_by_its_keeper(
    tmp_path: Path, sleeper: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    people = [replace(sleeper, rank=0), Identity.mine(1)]
    made = watchdogs(tmp_path, people, keeper=0)
    (dog, recorder, left) = made[2]
    made[0] = None  # the server ends with its last reference
    with dog:
        recorder.begin("all_reduce", "tp", 8)
        assert ends(left, 8.0)
    assert f"rank 0 (host {sleeper.host}, pid {sleeper.pid}) hangs" in capfd.readouterr().err
    assert hang._stat(sleeper.pid)[0] in ("Z", "")


def test_progress_of_any_kind_is_life(tmp_path: Path) -> None:
    server, (dog, recorder, left), (other, theirs, gone) = watchdogs(
        tmp_path, [Identity.mine(0), Identity.mine(1)], 0.4
    )
    with dog, other:
        for _ in range(15):
            time.sleep(0.1)
            recorder.tick()
            theirs.begin("all_reduce", "dp", 8)
            theirs.end()
        assert not left and not gone
        with dog.patient("at a checkpoint"):  # and the other one waits for it
            theirs.begin("barrier", "world", 0)
            time.sleep(1.5)
            assert not left and not gone
        theirs.end()
    assert not any(thread.name in ("watchdog", "heartbeat") for thread in threading.enumerate())


def test_the_limit_is_learned(tmp_path: Path) -> None:
    dog = Watchdog(
        WatchdogConfig(timeout=60.0, factor=10.0),
        rank=0,
        people=[],
        store=None,
        keeper=None,
        patience=600.0,
        folder=tmp_path,
    )
    assert dog.limit() == 600.0, "before the first steps"
    dog._times.extend([1.0, 1.0, 2.0, 1.0])
    assert dog.limit() == 600.0
    dog._times.append(300.0)
    assert dog.limit() == 60.0, "ten median steps are less than the timeout"
    dog._times.extend([9.0] * 60)
    assert dog.limit() == 90.0
    with dog.patient("at a checkpoint"):
        assert dog.limit() == 3600.0
    assert dog.limit() == 90.0


def test_a_process_that_was_stopped_and_goes_on_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    dog = Watchdog(
        WatchdogConfig(timeout=0.4), rank=0, people=[Identity.mine(0)], store=None, keeper=None, patience=600.0,
        folder=tmp_path, recorder=Recorder(), leave=left.append,
    )  # fmt: skip
    dog._times.extend([0.01] * WARM_UP)
    jump, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])
    with dog:
        time.sleep(0.2)
        jump[0] = 3600.0
        time.sleep(0.2)
        assert not left
        assert ends(left, 3.0), "but an hour later it must make progress again"


REFUSED = {
    "train.watchdog.timeout=-1": "train.watchdog.timeout is -1.0; set it to 0 or more",
    "train.watchdog.factor=0.5": "train.watchdog.factor is 0.5; set it to 1 or more",
    "train.watchdog.slow=0.5": "train.watchdog.slow is 0.5; set it above 1, or to 0",
    "train.watchdog.timout=3": "did you mean 'train.watchdog.timeout'?",
}


@pytest.mark.parametrize("override", REFUSED)
def test_options_without_meaning_are_refused_by_name(override: str) -> None:
    with pytest.raises(configs.ConfigError) as error:
        configs.load(None, [override])
    assert REFUSED[override] in str(error.value)


# Slow ranks


def lag(rank: int, size: int, seconds: float) -> tuple[dict[str, float], list[str]]:
    mesh, lines = Mesh(dp=Axis("dp", size, rank, dist.group.WORLD)), Lines()
    watch = slow.Slow(mesh, 2.0)
    assert watch.values() == {}, "too early to say"
    with lines.listening():
        for _ in range(2):
            for _ in range(slow.STEPS):
                time.sleep(0.002 + (seconds if rank == 1 else 0.0))
                all_reduce(torch.ones(1), mesh.dp)
                watch.add()
            values = watch.values()
    return values, lines.said


def test_a_slow_rank_is_named(ranks: Ranks) -> None:
    (values, said), (others, quiet) = ranks(2).run(lag, 0.02)
    assert values == others and values["slowest_rank"] == 1.0 and values["own_seconds_longest"] > 0.02
    assert values["own_seconds"] < 0.5 * values["own_seconds_longest"], "waiting for the slow one is no work"
    assert len(said) == 1 and said[0].startswith("rank 1 is slow: 0.02"), said
    assert not quiet


# Real jobs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train")


def a_job(data: str, folder: Path, hurt: str, *, timeout: float = 3.0, steps: int = 400, **case: Any) -> RunConfig:
    """Two ranks, of which one does ``hurt`` before some step n."""
    plugin = launching.write_plugin(folder / "hurt.py", hurt)
    config = tiny.config(data, folder / "run", steps=steps, every=2, **{"kv": 1, **case})
    norm = replace(config.model.norm, plugins=(plugin,))
    config = replace(config, model=replace(config.model, norm=norm))
    return with_train(config, watchdog_timeout=timeout)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "axis", "victim"),
    (({"dp": 2}, "dp", 1), ({"tp": 2}, "tp", 0), ({"pp": 2}, "pp", 1)),
    ids=("dp", "tp, the store's rank", "pp"),
)
def test_a_stopped_rank_ends_the_job(data: str, tmp_path: Path, layout: Any, axis: str, victim: int) -> None:
    """SIGSTOP: named by the other, with the collective that it waits in, and down within twice the timeout and 5 s.

    In one of three attempts: a machine that is busy with other tests stops a job's ranks for seconds, too.
    """
    timeout = 3.0
    ready = "if n == 10: (path.parent / 'ready').touch()\nimport time\ntime.sleep(0.02)"
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        config = a_job(data, folder, ready, timeout=timeout, **layout)
        jobs = start(tiny.write_config(folder / "run.yaml", config))
        with ended_at_last(jobs):
            wait_for(folder / "ready", jobs)
            begun = time.monotonic()
            jobs[victim].send_signal(signal.SIGSTOP)
            said = jobs[1 - victim].communicate(timeout=LIMIT)[1]
            took = time.monotonic() - begun
            assert jobs[1 - victim].returncode == EXIT_HUNG, said
            assert jobs[victim].wait(1.0) == -signal.SIGKILL
        if took < 2 * timeout + 5.0:
            break
    assert took < 2 * timeout + 5.0, took
    print(f"down after {took:.1f} s")
    assert (
        f"megnorm train: rank {victim} (host " in said and f"pid {jobs[victim].pid}) hangs: no sign of life" in said
    ), said
    assert f"waiting for it: rank {1 - victim} in " in said and (
        f" over {axis} (" in said or " over world (" in said
    ), said
    crash = folder / "run/crash"
    assert "train_step" in next(crash.glob(f"*-rank-0000{1 - victim}.stacks.txt")).read_text()
    assert f'"axis": "{axis}"' in next(crash.glob("*.collectives.jsonl")).read_text()


@pytest.mark.full
def test_a_rank_in_an_endless_loop_is_named_by_its_own_stack(data: str, tmp_path: Path) -> None:
    loop = "if n == 12:\n    def endless():\n        while True: pass\n    endless()"
    config = a_job(data, tmp_path, loop, dp=2)
    jobs = start(tiny.write_config(tmp_path / "run.yaml", config))
    with ended_at_last(jobs):
        texts = [job.communicate(timeout=2 * LIMIT)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [EXIT_HUNG] * 2, texts
    said = [line for text in texts for line in text.splitlines() if line.startswith("megnorm train:")]
    assert (
        len(said) == 1 and f"rank 1 (host {Identity.mine(0).host}, pid {jobs[1].pid}) hangs: no progress for" in said[0]
    ), said
    assert "in step 12" in said[0] and "waiting for it: rank 0 in all_reduce over" in said[0]
    assert "in endless" in (tmp_path / "run/crash/step-00000012-rank-00001.stacks.txt").read_text()
    assert "in endless" in texts[1]


@pytest.mark.full
def test_torchrun_starts_again_after_a_hang(data: str, tmp_path: Path) -> None:
    """And the second start ends with the numbers of a run that nothing happened to."""
    freeze = """\
marker = path.with_suffix('.stopped')
if n == 8 and not marker.exists():
    marker.touch()
    os.kill(os.getpid(), signal.SIGSTOP)"""
    config = a_job(data, tmp_path, freeze, tp=2, steps=10)
    begun = time.monotonic()
    ended = launching.run("alone", config, MAX_RESTARTS="1")
    print(f"the whole job: {time.monotonic() - begun:.1f} s")
    assert ended.code == 0, ended.text
    assert "hangs: no sign of life" in ended.text and "continuing from" in ended.text
    quiet = replace(config, train=replace(config.train, out=str(tmp_path / "quiet")))
    assert launching.run("local", quiet).code == 0  # the marker is there: nothing stops
    assert launching.curve(tmp_path / "run") == launching.curve(tmp_path / "quiet")


@pytest.mark.full
def test_a_slow_rank_of_a_job_is_named(data: str, tmp_path: Path) -> None:
    """At the latest when it loses two seconds a step: beside other tests the healthy rank's own work is slow, too."""
    for pause in (0.1, 0.5, 2.0):
        folder = tmp_path / str(pause)
        folder.mkdir()
        config = a_job(data, folder, f"import time\ntime.sleep({pause})", steps=25, dp=2)
        jobs = start(tiny.write_config(folder / "run.yaml", config))
        with ended_at_last(jobs):
            texts = [job.communicate(timeout=2 * LIMIT)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], texts
        assert "is slow" not in texts[1] and "rank 0 is slow" not in texts[0], texts
        _, whose = Record.read(folder / "run").series("slowest_rank")
        if texts[0].count("rank 1 is slow") == 1 and whose == [1.0, 1.0]:
            return
    pytest.fail(f"{texts}, slowest ranks {whose}")


def wait_for(path: Path, jobs: list[Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs), "a rank has ended"
        time.sleep(0.02)
