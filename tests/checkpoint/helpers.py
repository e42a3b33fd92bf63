"""Shared by the tests of checkpoints: random tilings, several ranks as threads."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megnorm.checkpoint import io
from megnorm.checkpoint.io import Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)


def random_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random bits, so NaNs too; bool stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return (bits[..., 0] & 1).bool()
    return bits.view(dtype).reshape(tuple(shape))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def tilings(draw: Any, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that cover ``shape`` exactly once, by cutting again and again at random places."""
    tiles: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offset, local = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, local[dim]))
        tiles.append((offset, (*local[:dim], cut, *local[dim + 1 :])))
        second = (*offset[:dim], offset[dim] + cut, *offset[dim + 1 :])
        tiles.append((second, (*local[:dim], local[dim] - cut, *local[dim + 1 :])))
    return tiles


def piece(tensor: Tensor, box: Box) -> Tensor:
    offset, local = box
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))]


def save_ranks(
    folder: Path, step: int, ranks: Sequence[Sequence[Shard]], meta: Mapping[str, Any], **options: Any
) -> Path:
    """io.save with one thread per rank; raises what rank 0 raises, after checking that all ranks fail or none."""
    barrier = threading.Barrier(len(ranks), timeout=20)
    results: list[Any] = [None] * len(ranks)

    def wait() -> None:
        barrier.wait()

    def run(rank: int) -> None:
        try:
            results[rank] = io.save(
                folder, step, ranks[rank], meta, rank=rank, world=len(ranks), barrier=wait, **options
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [isinstance(result, Exception) for result in results]
    assert all(failed) or not any(failed), results
    if failed[0]:
        raise results[0]
    assert all(result == results[0] for result in results)
    path = results[0]
    assert isinstance(path, Path)
    return path


def state(seed: int = 0) -> dict[str, Tensor]:
    """A small model's worth of tensors, with files of a few hundred bytes."""
    return {
        "blocks.0.ffn.up.weight": random_tensor((6, 5), seed=seed),
        "blocks.0.norm.weight": random_tensor((7,), torch.bfloat16, seed + 1),
        "counter": random_tensor((), torch.int64, seed + 2),
    }


def whole(tensors: Mapping[str, Tensor]) -> list[Shard]:
    return [Shard.whole(name, tensor) for name, tensor in tensors.items()]


def blank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
