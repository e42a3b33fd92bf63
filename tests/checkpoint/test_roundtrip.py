"""What is saved under one layout loads under any other, bit for bit."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megnorm.checkpoint import io
from megnorm.checkpoint.format import box_count, boxes
from megnorm.checkpoint.io import CheckpointError, Shard
from tests.checkpoint.helpers import (
    DTYPES,
    bits,
    blank,
    piece,
    random_tensor,
    same,
    save_ranks,
    state,
    tilings,
    whole,
)

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout_loads_any_other(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3))
    tensors = {}
    ranks: list[list[Shard]] = [[] for _ in range(world)]
    for i in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes)
        tensor = random_tensor(shape, data.draw(st.sampled_from(DTYPES)), seed=i)
        tensors[f"t.{i}"] = tensor
        for box in data.draw(tilings(shape)):
            ranks[data.draw(st.integers(0, world - 1))].append(Shard(f"t.{i}", piece(tensor, box), shape, box[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = save_ranks(
            Path(folder), 3, ranks, {"seed": 1},
            chunk_bytes=data.draw(st.sampled_from([8, 64, 4096])),
            max_file_bytes=data.draw(st.sampled_from([64, 1 << 20])),
        )  # fmt: skip
        assert io.verify(path) == []
        assert io.available(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        loaded = blank(tensors)
        wanted = []
        for name, tensor in loaded.items():
            for box in data.draw(tilings(tuple(tensor.shape))):
                wanted.append(Shard(name, piece(tensor, box), tuple(tensor.shape), box[0]))
        options = {"verify": data.draw(st.booleans()), "untouched": data.draw(st.booleans())}
        assert io.load(path, wanted, threads=2, **options) == {"seed": 1}
        assert same(loaded, tensors)
        assert same(io.read_full(path, tensors), tensors)


@given(shape=shapes, itemsize=st.sampled_from([1, 2, 4, 8]), limit=st.integers(8, 500))
@settings(max_examples=200, deadline=None)
def test_boxes_are_consecutive_and_small(shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    index = torch.arange(math.prod(shape)).reshape(shape)
    cut = list(boxes(shape, itemsize, limit))
    assert len(cut) == box_count(shape, itemsize, limit)
    assert all(math.prod(local) * itemsize <= limit for _, local in cut)
    parts = [piece(index, box).reshape(-1) for box in cut]
    assert torch.equal(torch.cat([index.new_empty(0), *parts]), index.reshape(-1))


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    """A rank's slice does not touch the files of slices it does not meet."""
    tensor = random_tensor((8, 4))
    ranks = [[Shard("w", tensor[2 * r : 2 * r + 2], (8, 4), (2 * r, 0))] for r in range(4)]
    path = save_ranks(tmp_path, 1, ranks, {})
    for rank in (0, 3):
        (path / f"rank-{rank:05d}-00000.safetensors").unlink()
    target = torch.zeros(3, 4)
    io.load(path, [Shard("w", target, (8, 4), (2, 0))])
    assert torch.equal(bits(target), bits(tensor[2:5]))


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    tensors = state()
    path = io.save(tmp_path, 1, whole(tensors), {})
    files = sorted(path.glob("*.safetensors"))
    assert same({name: t for file in files for name, t in load_file(file).items()}, tensors)


def test_strided_and_gradient_tensors(tmp_path: Path) -> None:
    source = torch.randn(6, 8).t()[::2]
    path = io.save(tmp_path, 1, [Shard.whole("w", source)], {})
    target = torch.nn.Parameter(torch.zeros(8, 4))
    io.load(path, [Shard("w", target.t()[:, :6], (4, 6), (0, 0))])
    assert torch.equal(target.detach().t()[:, :6], source)
    assert torch.equal(target.detach()[6:], torch.zeros(2, 4))


def test_conversion_only_when_asked(tmp_path: Path) -> None:
    path = io.save(tmp_path, 1, [Shard.whole("w", torch.tensor([1.0, 2.5]))], {})
    target = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="tensor w is float32 in the checkpoint and bfloat16"):
        io.load(path, [Shard.whole("w", target)])
    io.load(path, [Shard.whole("w", target)], convert=True)
    assert target.tolist() == [1.0, 2.5]


def test_missing_tensor_and_other_shape(tmp_path: Path) -> None:
    path = io.save(tmp_path, 1, whole(state()), {})
    with pytest.raises(CheckpointError, match="no tensor blocks.1.w"):
        io.load(path, [Shard.whole("blocks.1.w", torch.zeros(2))])
    with pytest.raises(CheckpointError, match=r"blocks.0.norm.weight has shape \[7\] in the checkpoint and \[8\]"):
        io.load(path, [Shard.whole("blocks.0.norm.weight", torch.zeros(8, dtype=torch.bfloat16))])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [((0, 2), "cover 12 of its 18"), ((0, 1, 4), "covered twice"), ((0, 2, 2, 4), "covered twice")],
)
def test_each_tensor_is_covered_once(tmp_path: Path, offsets: tuple[int, ...], message: str) -> None:
    ranks = [[Shard("blocks.0.w", torch.zeros(2, 3), (6, 3), (offset, 0))] for offset in offsets]
    with pytest.raises(CheckpointError, match=message) as caught:
        save_ranks(tmp_path, 1, ranks, {})
    assert "blocks.0.w" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree(tmp_path: Path) -> None:
    ranks = [[Shard("w", torch.zeros(2), (4,), (0,))], [Shard("w", torch.zeros(2).half(), (4,), (2,))]]
    with pytest.raises(CheckpointError, match="disagree about tensor w"):
        save_ranks(tmp_path, 1, ranks, {})


def test_meta_must_be_json(tmp_path: Path) -> None:
    for bad in ({"x": {1, 2}}, {"x": float("nan")}):
        with pytest.raises(CheckpointError, match="meta is not JSON"):
            io.save(tmp_path, 1, whole(state()), bad)
    assert list(tmp_path.iterdir()) == []
