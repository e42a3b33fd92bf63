"""Copies of weights on several ranks: one differing bit is found, named, and never saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.config import RunConfig
from megnorm.plan import make_plan
from megnorm.train import loop
from megnorm.train.build import Run, build
from megnorm.train.replicas import CHUNK, ReplicaError, check_replicas, checksum
from tests.distributed import tiny
from tests.train.faults import Ranks, Told, train, with_train

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@given(
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    place=st.integers(0, 10_000),
    bit=st.integers(0, 63),
    offset=st.integers(0, 3),
)
def test_every_flipped_bit_changes_the_sum(size: int, dtype: torch.dtype, place: int, bit: int, offset: int) -> None:
    storage = torch.randn(size + offset, generator=torch.Generator().manual_seed(size)).to(dtype)
    x = storage[offset:]  # a slice of flat storage may begin anywhere
    before = checksum(x)
    assert torch.equal(before, checksum(x.clone())), "where it lies does not matter"
    flip(x, place % size, bit % (8 * dtype.itemsize))
    assert not torch.equal(before, checksum(x))
    flip(x, place % size, bit % (8 * dtype.itemsize))
    assert torch.equal(before, checksum(x))


def flip(x: Tensor, place: int, bit: int) -> None:
    """Flip one bit of an element in place."""
    words = x.reshape(-1)[place : place + 1].clone().view(torch.uint8)
    words[bit // 8] ^= 1 << bit % 8
    x.reshape(-1)[place] = words.view(x.dtype)[0]


def test_places_count() -> None:
    x = torch.randn(64)
    assert not torch.equal(checksum(x), checksum(x.flip(0)))
    assert not torch.equal(checksum(x), checksum(torch.cat([x[8:], x[:8]])))
    long = torch.zeros(6 * CHUNK)  # three chunks: equal parts in other chunks are not the same
    long[0] = 1.0
    assert not torch.equal(checksum(long), checksum(long.roll(2 * CHUNK)))
    assert not torch.equal(checksum(long), checksum(long.roll(1)))


def hurt(rank: int, world: int, config: RunConfig, name: str) -> list[str]:
    """One flipped bit of a parameter on rank 1: what each rank says, of sound weights and of these."""
    run, said = build(make_plan(config, world), torch.device("cpu")), list[str]()
    for change in (False, True):
        if change and rank == 1:
            matrix = next(n for n in run.named if n.name == name)
            flip(matrix.view(), 5, 3)
        try:
            check_replicas(run.named, run.mesh, 7)
            said.append("equal")
        except ReplicaError as error:
            said.append(str(error))
    return said


CASES = [
    ({"dp": 2}, "blocks.1.ffn.down.weight", True),
    ({"tp": 2}, "blocks.1.attention.q_norm.weight", True),
    ({"tp": 2}, "blocks.1.ffn.down.weight", False),  # each rank has its own half
    ({"tp": 2, "kv": 1}, "blocks.0.attention.k.weight", True),  # one kv head on both ranks
    ({"pp": 2, "model": "gpt2", "kind": "layernorm"}, "embed.token.weight", True),  # a tied head: on both end stages
    ({"pp": 2}, "blocks.1.ffn.down.weight", False),
]


@pytest.mark.parametrize(("layout", "name", "found"), CASES)
def test_a_differing_copy_is_named(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any], name: str, found: bool
) -> None:
    config = tiny.config(tiny.write_data(tmp_path / "data"), tmp_path / "run", steps=4, **layout)
    for sound, broken in ranks(2).run(hurt, config, name):
        assert sound == "equal"
        assert broken.startswith(f"step 7: {name} differs between ranks: rank 0 against rank 1; 1 slices") == found, (
            broken
        )
        assert found or broken == "equal"


@pytest.mark.full
def test_the_odd_one_out_is_told_from_the_rest(ranks: Ranks, tmp_path: Path) -> None:
    config = tiny.config(tiny.write_data(tmp_path / "data"), tmp_path / "run", steps=4, tp=2, dp=2, kv=1)
    name = "blocks.0.attention.v.weight"
    for _, broken in ranks(4).run(hurt, config, name):
        assert broken.startswith(f"step 7: {name} differs between ranks: ranks 0, 2, 3 against rank 1;"), broken


def drift(rank: int, world: int, config: RunConfig, at: int) -> Told:
    """Train; in step ``at`` a bit flips on rank 1."""
    step = loop.train_step

    def broken(run: Run) -> Any:
        result = step(run)
        if run.step == at and rank == 1:
            flip(next(iter(run.named)).view(), 0, 9)
        return result

    loop.train_step = broken  # type: ignore[attr-defined]
    try:
        return train(rank, world, config)
    finally:
        loop.train_step = step  # type: ignore[attr-defined]


@pytest.mark.parametrize(("every", "found", "saved"), ((2, 4, 3), (100, 6, 3), (0, None, 8)))
def test_a_run_ends_before_it_saves_a_differing_copy(
    ranks: Ranks, tmp_path: Path, every: int, found: int | None, saved: int
) -> None:
    """Saves come every 3 steps, and a bit flips in step 4: found at the next check, which a save is too.

    Without ZeRO-1, under which every step brings a rank the weights that others update, and so mends such a bit."""
    config = tiny.config(tiny.write_data(tmp_path / "data"), tmp_path / "run", steps=8, every=3, dp=2, zero=0)
    config = with_train(config, check_replicas_every=every)
    config = replace(config, optim=replace(config.optim, lr=1e-6))  # the flipped bit stays
    for told in ranks(2).run(drift, config, 4):
        if found is None:
            assert told.ended == 0
        else:
            assert isinstance(told.ended, str) and told.ended.startswith(f"step {found}: ")
    assert io.read_meta(io.latest(tmp_path / "run/checkpoints"))["step"] == saved


def test_sound_runs_pass_all_checks(ranks: Ranks, tmp_path: Path) -> None:
    config = tiny.config(tiny.write_data(tmp_path / "data"), tmp_path / "run", steps=6, every=3, tp=2, kv=1)
    for told in ranks(2).run(train, with_train(config, check_replicas_every=1)):
        assert told.ended == 0 and told.step == 6
