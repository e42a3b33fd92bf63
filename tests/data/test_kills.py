"""Killed processes, workers and ranks: a clear error, no file under a final name, and the same command goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megnorm.data.indexed import IndexedDataset
from megnorm.data.preprocess import run
from tests.data.helpers import GOOD, command, files, job


def test_a_killed_process_leaves_no_final_file(project: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    line = json.dumps({"text": "many words " * 200}).encode() + b"\n"
    source.write_bytes(line * 60000)
    process = subprocess.Popen(command(project, source, tmp_path / "out"))
    wait_for(lambda: any(tmp_path.glob("out.parts/*.done")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "out.parts").is_dir() and not list(tmp_path.glob("out_text*"))


@pytest.fixture(scope="session")
def mpirun() -> str:
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("no mpirun")
    return found


@pytest.mark.full
def test_ranks_write_the_same_bytes(project: Path, tmp_path: Path, shared: Path, mpirun: str) -> None:
    source = shared / "golden/megatron_dataset/docs.jsonl"
    one, four = tmp_path / "one", tmp_path / "four"
    subprocess.run(command(project, source, one), check=True)
    words = command(project, source, four, "--unit-bytes", 9000)
    subprocess.run([mpirun, "-n", "4", *words], check=True, timeout=120)
    assert files(f"{one}_text_document") == files(f"{four}_text_document")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(GOOD * 50 + b"{\n" + GOOD)
    words = command(project, bad, tmp_path / "bad", "--unit-bytes", 2000, "--strict")
    result = subprocess.run([mpirun, "-n", "3", *words], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "bad.jsonl:301: not JSON" in result.stdout + result.stderr
    assert not list(tmp_path.glob("bad_text*"))


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_rank_is_told_and_the_run_goes_on(project: Path, tmp_path: Path, mpirun: str, victim: int) -> None:
    psutil = pytest.importorskip("psutil")
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(b'{"text": "%d %s"}\n' % (i, b"many words " * 200) for i in range(30000)))
    words = [mpirun, "-n", "4", *command(project, source, tmp_path / "out", "--unit-bytes", 1 << 20)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(list(tmp_path.glob("out.parts/*.done"))) >= 4 or process.poll() is not None)
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if one.environ().get("PMI_RANK")]
    [one] = [
        one for one in ranks if one.environ()["PMI_RANK"] == str(victim) and "preprocess_data" in str(one.cmdline())
    ]
    one.kill()
    told = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Killed" in told and f"{tmp_path}/out is not written, and the same command goes on" in told
    assert not list(tmp_path.glob("out_text*"))
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert "units of input had been done by an earlier run" in result.stdout
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [
        f"out_text_document{s}" for s in (".bin", ".idx", ".meta.json")
    ]
    run(job(source, tmp_path / "alone"))
    assert files(tmp_path / "alone") == files(f"{tmp_path}/out_text_document")


def test_what_a_kill_while_joining_left_is_removed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    for name in (".out.bin.123.tmp", ".out.idx.123.tmp", ".other.bin.123.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    run(job(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".other.bin.123.tmp"]


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.full
def test_processes_write_the_same_bytes(project: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 200 + b"{\n")
    run(job(source, tmp_path / "one"))
    subprocess.run(command(project, source, tmp_path / "two", "--workers", 2, "--unit-bytes", 9000), check=True)
    assert files(tmp_path / "one") == files(f"{tmp_path}/two_text_document")


@pytest.mark.full
def test_a_killed_worker_is_told_and_the_run_goes_on(project: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    source = tmp_path / "in.jsonl"
    source.write_bytes((json.dumps({"text": "many words " * 200}).encode() + b"\n") * 60000)
    words = command(project, source, tmp_path / "out", "--workers", 2)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob("out.parts/*.done")) or process.poll() is not None)
    workers = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    workers[0].kill()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a worker process died" in told and "Traceback" not in told
    assert not list(tmp_path.glob("out_text*"))
    done = len(list(tmp_path.glob("out.parts/*.done")))
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done and "units of input had been done by an earlier run" in result.stdout
    assert IndexedDataset(tmp_path / "out_text_document").document_count == 60000
