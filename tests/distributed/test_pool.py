"""The pool of ranks itself: results by rank, failures told, a fresh start after one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import Pool, RankError


def total(rank: int, world: int, x: torch.Tensor) -> torch.Tensor:
    y = x * (rank + 1)
    dist.all_reduce(y)
    return y


def process(rank: int, world: int) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def loops(rank: int, world: int) -> tuple[float, int]:
    """A sum over three new groups, and how many threads of this rank wait for gloo's messages."""
    x = torch.ones(())
    for _ in range(3):
        dist.all_reduce(x, group=dist.new_group(list(range(world))))
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return float(x), names.count("gloo_tcp_loop")


def raise_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"rank {bad} has had enough")
    dist.barrier()


def leave(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(3)


def hang(rank: int, world: int) -> None:
    if rank == 0:
        dist.barrier()


def test_ranks_work_together_and_live_on(ranks) -> None:
    x = torch.arange(3.0)
    for result in ranks(2).run(total, x):
        assert torch.equal(result, 3 * x)
    first, again = ranks(2).run(process), ranks(2).run(process)
    assert first == again
    assert first[0][0] != first[1][0]
    assert first[0][1] == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are told apart by Linux's /proc")
def test_groups_share_a_thread(ranks) -> None:
    assert ranks(2).run(loops) == [(8.0, 1)] * 2


@pytest.mark.full
def test_failures_are_told_and_the_pool_starts_afresh() -> None:
    pool = Pool(2)
    with pytest.raises(RankError, match="(?s)rank 1 of 2.*rank 1 has had enough"):
        pool.run(raise_on, 1)
    with pytest.raises(RankError, match="rank 0 of 2:\nthe process ended with exit code 3"):
        pool.run(leave)
    with pytest.raises(RankError, match="rank 0 of 2:\nno answer after"):
        pool.run(hang, timeout=3.0)
    assert torch.equal(pool.run(total, torch.ones(1))[0], torch.tensor([3.0]))
    pool.close()
