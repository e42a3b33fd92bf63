"""Ranks from torchrun, Slurm or MPI -> an initialized process group. The only place that asks who we are."""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all. local: on its node.
    source: who started us ("torchrun", "slurm", "mpi", or "single").

    cores: CPU cores that are this rank's share of those it may run on.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = "single"
    cores: int = 1


def world() -> World:
    """Read the launcher's environment; MPI through mpi4py, and only when an MPI launcher started us."""
    env, cores = os.environ, len(_affinity())
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env):
        local = int(env.get("LOCAL_WORLD_SIZE", "1"))
        return World(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            local,
            "torchrun",
            max(1, cores // local),
        )
    # Both may be set: mpirun inside a Slurm job starts its own ranks, srun may speak MPI's protocol to its tasks. The
    # step's size tells whose ranks we are. (SLURM_NTASKS is the job's, and set in its batch script too.)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    processes = max(int(env.get(key, "1")) for key in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if processes > 1 and processes != tasks:
        return _mpi_world()
    if tasks > 1 and "SLURM_PROCID" in env:
        local = _tasks_here(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", "0")))
        share = int(env.get("SLURM_CPUS_PER_TASK") or max(1, cores // local))
        return World(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")), local, "slurm", share)
    return World(cores=cores)


def _affinity() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _tasks_here(text: str, node: int) -> int:
    """Slurm's "4(x2),3" for node 2 -> 3."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or "1")
    return counts[min(node, len(counts) - 1)]


def _mpi_world() -> World:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError("mpirun started this process but mpi4py is missing; pip install 'megnorm[mpi]'") from None
    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # A port of the system's choice, so that two jobs on a machine do not meet.
    here = "127.0.0.1" if node.size == comm.size else MPI.Get_processor_name()
    address, port = comm.bcast((here, _free_port()) if comm.rank == 0 else None)
    os.environ.setdefault("MASTER_ADDR", str(address))
    os.environ.setdefault("MASTER_PORT", str(port))
    # Ranks may be bound to cores of their own or not: each core is shared by those that may run on it.
    mine, held = _affinity(), node.allgather(_affinity())
    share = sum(1 / sum(core in cores for cores in held) for core in mine)
    return World(comm.rank, comm.size, node.rank, node.size, "mpi", max(1, int(share + 1e-6)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def device_of(where: World) -> torch.device:
    """This rank's accelerator if the machine has one, else the CPU. Raises ValueError for more ranks than accelerators."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm and MPI may show each rank its own accelerator only.
    index = 0 if count == 1 and where.source in ("slurm", "mpi") else where.local_rank
    if index >= count:
        raise ValueError(
            f"{where.local_size} ranks were started on a machine with {count} accelerator(s); start {count} a machine"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def set_threads(where: World, threads: int | None) -> None:
    """CPU threads of this rank: as configured, else OMP_NUM_THREADS, else this rank's share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS")
    # torchrun sets 1 by itself when it starts several ranks; that is nobody's wish.
    imposed = where.source == "torchrun" and where.local_size > 1 and given == "1"
    if threads is None and given is not None and not imposed:
        return
    torch.set_num_threads(threads or where.cores)


def init(where: World, device: torch.device, timeout: float) -> None:
    """Initialize the default process group (gloo on CPU, NCCL on CUDA); nothing to do for one process.

    timeout: seconds, also of every collective. Raises ValueError where MASTER_ADDR or MASTER_PORT is missing.
    """
    if where.size == 1 or dist.is_initialized():
        return
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in os.environ:
            raise ValueError(f"{where.size} ranks, but {key} is not set; use the launchers in scripts/ or set it")
    outlives = _agents_store(where)
    limit = timedelta(seconds=timeout)
    store: Store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=where.rank == 0 and not outlives,
        timeout=limit,
        wait_for_workers=False,
    )
    attempt = agree_on_attempt(store, where.rank, where.size, timeout) if outlives else 1
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    prefixed = PrefixStore(f"megnorm/attempt{attempt}", store)
    dist.init_process_group(backend, store=prefixed, rank=where.rank, world_size=where.size, timeout=limit)


def _agents_store(where: World) -> bool:
    """With torchrun the store usually belongs to its agent, and outlives the ranks that it restarts."""
    return where.source == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_store(where: World, timeout: float) -> tuple[Store | None, int | None]:
    """(another client of the store in which the ranks met, for keys of this start alone; the rank that keeps it).

    None, None for one process; no rank keeps a store of torchrun's agent. Collective.
    """
    if where.size == 1:
        return None, None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    start = from_rank_zero(lambda: uuid.uuid4().hex)
    return PrefixStore(f"megnorm/{start}", store), None if _agents_store(where) else 0


def agree_on_attempt(store: Store, rank: int, size: int, timeout: float) -> int:
    """A number that all living ranks share and no earlier ones had, from a ``store`` that may hold what those left.

    The keys of an earlier attempt would let a rank meet the dead, and hang. TORCHELASTIC_RESTART_COUNT cannot tell
    attempts apart: each agent counts its own failures, so that the nodes' counts differ. Instead rank 0 opens a new
    attempt, every rank puts a token of its own into the newest attempt it sees, and goes on when rank 0 has confirmed it.
    """
    if rank == 0:
        attempt = int(store.add("megnorm/attempts", 1))
        tokens = [store.get(f"megnorm/{attempt}/rank{other}").decode() for other in range(1, size)]
        store.set(f"megnorm/{attempt}/confirmed", ",".join(tokens))
        return attempt
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            store.wait(["megnorm/attempts"], timedelta(seconds=1))
            attempt = int(store.add("megnorm/attempts", 0))
            store.set(f"megnorm/{attempt}/rank{rank}", token)
            store.wait([f"megnorm/{attempt}/confirmed"], timedelta(seconds=1))
        except dist.DistStoreError:
            continue
        if token in store.get(f"megnorm/{attempt}/confirmed").decode().split(","):
            return attempt
        time.sleep(0.05)
    raise RuntimeError(f"rank {rank}: rank 0 did not join within {timeout:g} s")


def from_rank_zero(find: Callable[[], T]) -> T:
    """What ``find`` returns on rank 0, on every rank: file systems may show other ranks an older state."""
    if not dist.is_initialized():
        return find()
    box = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return cast(T, box[0])


def restarts_failures(where: World) -> bool:
    """Whether the launcher starts ranks again that end with another exit code than 0."""
    return where.source == "torchrun" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
