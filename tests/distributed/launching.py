"""Starting real training jobs through the scripts, for test_launch.py."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megnorm.config import RunConfig
from megnorm.metrics.record import Record
from tests.distributed import tiny

PROJECT = Path(__file__).resolve().parent.parent.parent
LIMIT = 240.0  # seconds that a job may take
OURS = (
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "TORCHELASTIC",
    "SLURM",
    "PMI",
    "OMPI",
    "RDZV",
    "NNODES",
    "NODE_RANK",
)


@dataclass(frozen=True)
class Ended:
    """How a job ended. code: of the node that took longest; text: stdout and stderr of all nodes."""

    code: int
    text: str
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(script: str, arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """A script of scripts/ in a session of its own, with nothing of a launcher in its environment but ``variables``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    return subprocess.Popen(
        ["bash", str(PROJECT / "scripts" / script), *arguments],
        env={**clean, "PATH": path, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1", **variables},
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(jobs: Sequence[subprocess.Popen[str]], begun: float) -> Ended:
    """Wait for the nodes of a job. Fails, with what they said, if they take longer than LIMIT."""
    texts, late = [], False
    for job in jobs:
        try:
            texts.append(job.communicate(timeout=max(0.1, begun + LIMIT - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(job.pid, signal.SIGKILL)
            texts.append(job.communicate()[0])
    seconds, text = time.monotonic() - begun, "\n".join(texts)
    assert not late, f"no end after {LIMIT} s:\n{text}"
    return Ended(max((job.returncode for job in jobs), key=abs), text, seconds)


def nodes(launcher: str, arguments: Sequence[str], **variables: str) -> list[subprocess.Popen[str]]:
    """A job of two ranks on this machine: one torchrun ("local", "alone": with restarts), two torchruns of one rank each
    ("static", "c10d"), or mpirun ("mpi")."""
    if launcher == "local":
        return [start("local.sh", arguments, GPUS_PER_NODE="2", **variables)]
    if launcher == "mpi":
        return [start("mpirun.sh", arguments, NP="2", **variables)]
    if launcher == "alone":
        one = {"RDZV": "c10d", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NNODES": "1"}
        return [start("multinode.sh", arguments, **one, GPUS_PER_NODE="2", **variables)]
    meet = {"RDZV": launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NNODES": "2"}
    first = start("multinode.sh", arguments, **meet, NODE_RANK="0", **variables)
    wait_for_port(int(meet["MASTER_PORT"]))  # with c10d on one machine, the node that comes first keeps the store
    return [first, start("multinode.sh", arguments, **meet, NODE_RANK="1", **variables)]


def wait_for_port(port: int, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def run(launcher: str, config: RunConfig, *overrides: str, **variables: str) -> Ended:
    """Train ``config`` on two ranks to the end."""
    out = Path(config.train.out)
    out.mkdir(parents=True, exist_ok=True)
    path = tiny.write_config(out.parent / f"{out.name}.yaml", config)
    begun = time.monotonic()
    return finish(nodes(launcher, [str(path), *overrides], **variables), begun)


def curve(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of the record, as they were written."""
    steps, losses = Record.read(out).series("loss")
    _, norms = Record.read(out).series("grad_norm")
    return list(zip(steps, losses, norms, strict=True))


def write_plugin(path: Path, body: str) -> str:
    """A plugin (a file that every rank imports while it reads its config) that does ``body`` on rank 1 before step n.

    In ``body``: n, the step that begins; path, this file.
    """
    lines = [
        "import os, signal, sys",
        "from pathlib import Path",
        "from megnorm.train import loop",
        f"path, step = Path({str(path)!r}), loop.train_step",
        "def hurt(run):",
        "    n = run.step + 1",
        *(f"    {line}" for line in body.splitlines()),
        "    return step(run)",
        "if os.environ.get('RANK', os.environ.get('PMI_RANK')) == '1' and step.__name__ != 'hurt':",
        "    loop.train_step = hurt",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
