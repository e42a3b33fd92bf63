"""Ranks from torchrun, Slurm or MPI -> an initialized process group. The only place that asks who we are."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all. source: who started us ("torchrun", "slurm", "mpi", or "single")."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = "single"
    restart: int = 0


def world() -> World:
    """Read the launcher's environment; MPI through mpi4py, and only when an MPI launcher started us."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env):
        return World(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("LOCAL_WORLD_SIZE", "1")),
            "torchrun",
            int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        per_node = env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]
        return World(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env.get("SLURM_LOCALID", "0")),
            int(per_node),
            "slurm",
        )
    if any(int(env.get(key, "1")) > 1 for key in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        return _mpi_world()
    return World()


def _mpi_world() -> World:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError("mpirun started this process but mpi4py is missing; pip install 'megnorm[mpi]'") from None
    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    address = comm.bcast(MPI.Get_processor_name() if comm.rank == 0 else None)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if node.size == comm.size else str(address))
    os.environ.setdefault("MASTER_PORT", "29500")
    return World(comm.rank, comm.size, node.rank, node.size, "mpi")


def device_of(where: World) -> torch.device:
    """This rank's accelerator if the machine has one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", where.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def set_threads(where: World, threads: int | None) -> None:
    """CPU threads of this rank: as configured, else OMP_NUM_THREADS, else the cores shared among the node's ranks."""
    if threads is None and "OMP_NUM_THREADS" in os.environ and where.source != "torchrun":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // where.local_size))


def init(where: World, device: torch.device, timeout: float) -> None:
    """Initialize the default process group (gloo on CPU, NCCL on CUDA); nothing to do for one process.

    The rendezvous goes through a store of our own under a prefix that counts restarts: a default rendezvous after a
    torchrun restart can meet keys of the attempt before and hang.
    """
    if where.size == 1 or dist.is_initialized():
        return
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in os.environ:
            raise ValueError(f"{where.size} ranks, but {key} is not set; use the launchers in scripts/ or set it")
    elastic = where.source == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=where.rank == 0 and not elastic,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    prefixed = dist.PrefixStore(f"megnorm/attempt{where.restart}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=prefixed, rank=where.rank, world_size=where.size, timeout=timedelta(seconds=timeout)
    )
