"""Ranges of flat storage: their boxes, the packing of buckets, and pieces that tile every logical matrix over dp ranks."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megnorm.layers.env import Env
from megnorm.models.causal import build_model
from megnorm.parallel.data_parallel import ALIGN, DataParallel, pack
from megnorm.parallel.layout import Piece, boxes_of, named_matrices
from megnorm.parallel.mesh import Axis, Mesh
from tests.distributed import cases
from tests.marks import thinned

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
def test_boxes_cover_a_range_once_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    whole = torch.arange(size).view(shape)
    at, boxes = first, list(boxes_of(first, last, shape))
    for corner, box, start in boxes:
        assert start == at, "boxes follow one another"
        elements = whole[tuple(slice(c, c + n) for c, n in zip(corner, box, strict=True))].flatten()
        assert elements.tolist() == list(range(at, at + math.prod(box))), "a box is contiguous"
        at += math.prod(box)
    assert at == last
    assert len(boxes) <= max(1, 2 * len(shape) - 1), "no more boxes than a range needs"


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    bucket=st.integers(1, 20000),
    shards=st.sampled_from((1, 2, 3, 4, 8, 128)),
)
def test_packing(sizes: list[int], bucket: int, shards: int) -> None:
    offsets, ranges = pack(sizes, bucket, shards)
    assert ranges[0].start == 0 and all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    assert [i for found in ranges for i in found.members] == list(range(len(sizes)))
    for found in ranges:
        length = found.stop - found.start
        assert length % (shards * ALIGN) == 0, "equal, aligned parts for all ranks"
        for i, after in itertools.pairwise([*found.members, None]):
            assert i is not None and offsets[i] % ALIGN == 0
            end = found.stop if after is None else offsets[after]
            assert offsets[i] + sizes[i] <= end, "tensors overlap"
        used = sum(-(-sizes[i] // ALIGN) * ALIGN for i in found.members)
        assert length - used < shards * ALIGN, "more padding than parts of equal size need"
        rest = sum(-(-sizes[i] // ALIGN) * ALIGN for i in found.members[:-1])
        assert rest < bucket, "a bucket goes on after it is full"
    assert all(found.stop - found.start >= bucket for found in ranges[:-1]), "a bucket ends before it is full"


def pieces_of(model: str, tp: int, dp: int, stage: tuple[int, int], bucket_bytes: float) -> list[list[Piece]]:
    """Of one stage, by (tp rank, dp rank); built without processes."""
    found = []
    cfg = cases.config("normformer", model=model).model
    cfg = replace(cfg, layers=3)
    for t, r in itertools.product(range(tp), range(dp)):
        kv = Axis("kv", max(1, tp // cfg.kv), t % max(1, tp // cfg.kv))
        mesh = Mesh(dp=Axis("dp", dp, r), tp=Axis("tp", tp, t), kv=kv)
        built = build_model(cfg, Env(mesh), layers=stage)
        flat = DataParallel(
            {0: built}, mesh, compute=torch.bfloat16, accumulate=torch.float32, shard=True, bucket_bytes=bucket_bytes
        )
        found.append(flat.pieces)
    return found


@pytest.mark.parametrize("bucket_bytes", thinned((3000.0, 1.0, 1e9), 3))
@pytest.mark.parametrize("stage", ((0, 3), (0, 1), (1, 2), (2, 3)))
@pytest.mark.parametrize(("model", "tp", "dp"), [("gpt2", 1, 3), ("llama", 2, 4), ("fairseq", 4, 2), ("llama", 1, 64)])
def test_pieces_tile_every_matrix(model: str, tp: int, dp: int, stage: tuple[int, int], bucket_bytes: float) -> None:
    """Owned pieces of all ranks cover each element of each logical matrix once; a master holds what it was built with."""
    cfg = replace(cases.config("normformer", model=model).model, layers=3)
    whole = {n.name: n for n in named_matrices(build_model(cfg, layers=stage))}
    times = {name: torch.zeros(n.matrix.shape, dtype=torch.int32) for name, n in whole.items()}
    held: dict[str, int] = defaultdict(int)
    for pieces in pieces_of(model, tp, dp, stage, bucket_bytes):
        for piece in pieces:
            matrix = piece.named.matrix
            assert piece.weight.numel() == piece.master.numel() == piece.grad.numel() == piece.last - piece.first
            full = whole[piece.named.name].view()
            for offset, view in piece.boxes(piece.master):
                box = tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))
                assert torch.equal(view, full[box])
                if matrix.owner or matrix.copy:
                    times[piece.named.name][box] += 1
            held[piece.named.name] += piece.last - piece.first
    assert all(bool((count == 1).all()) for count in times.values())
    assert set(held) == set(whole)
