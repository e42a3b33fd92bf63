"""What several ranks hold must be the same on all of them, bit for bit: data-parallel copies, replicated parameters.

Every rank takes a checksum of each logical slice that it holds and all compare them with those of the same slice elsewhere.
"""

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megnorm.parallel.collectives import all_gather, all_reduce
from megnorm.parallel.layout import Named
from megnorm.parallel.mesh import Mesh
from megnorm.train.agree import gathered, world
from megnorm.train.guard import DivergedError

CHUNK = 1 << 18  # words of 8 bytes


class ReplicaError(DivergedError):
    """Copies of a parameter differ; nothing was saved since they were last equal."""


def check_replicas(named: Sequence[Named], mesh: Mesh, step: int) -> None:
    """Raise ReplicaError, on all ranks alike, where ranks hold different bits of the same slice; collective."""
    if mesh.size == 1:
        return
    everyone = world(mesh)
    count = int(all_reduce(torch.tensor(len(named), device=mesh.device), everyone, dist.ReduceOp.MAX))
    table = torch.zeros(count, 2, dtype=torch.int64, device=mesh.device)  # ranks of other stages may hold fewer
    keys = [_key(n) for n in named]
    for i, n in enumerate(named):
        table[i, 0] = keys[i]
        table[i, 1] = checksum(n.view())
    held: dict[int, dict[int, int]] = defaultdict(dict)  # slice -> rank -> checksum
    for rank, rows in enumerate(all_gather(table, everyone).view(mesh.size, count, 2).tolist()):
        for key, digest in rows:
            if key:
                held[key][rank] = digest
    different = [key for key, digests in held.items() if len(set(digests.values())) > 1]
    if not different:
        return
    mine = [[n.name, list(n.matrix.offset), key] for n, key in zip(named, keys, strict=True) if key == different[0]]
    name, offset, key = next(place for places in gathered(mine, mesh) for place in places)
    where = f"{name} (slice from {offset})" if any(offset) else name
    raise ReplicaError(
        f"step {step}: {where} differs between ranks: {_sides(held[key])}; {len(different)} slices differ in all. Nothing was "
        "saved since train.check_replicas_every last found them equal: suspect the memory or accelerator of the odd rank"
    )


def _sides(digests: dict[int, int]) -> str:
    """Which ranks agree with which; the odd one out last."""
    counts = Counter(digests.values())
    sides = [[rank for rank, digest in digests.items() if digest == one] for one, _ in counts.most_common()]
    return " against ".join(("ranks " if len(side) > 1 else "rank ") + ", ".join(map(str, side)) for side in sides)


def _key(n: Named) -> int:
    """A number for the logical slice, the same on every rank that holds it; never 0."""
    text = repr((n.name, n.matrix.offset, n.matrix.local)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True) | 1


def checksum(x: Tensor) -> Tensor:
    """64 bits of x's bits, a scalar int64 on its device: every flipped bit changes it, and so do elements that trade places.

    Words of 8 bytes times odd numbers by place, summed modulo 2^64: an odd number times 2^k is never 0.
    """
    flat = x.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    step = CHUNK * 8 // flat.element_size()
    weights = _odd(x.device)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].clone()  # a view of 8-byte words needs its own, aligned storage
        missing = -part.numel() * part.element_size() % 8 // part.element_size()
        words = torch.nn.functional.pad(part, (0, missing)).view(torch.int64)
        # 2k + 1 is odd too: a chunk's place counts like a word's.
        total += (words * weights[: words.numel()]).sum() * (2 * (start // step) + 1)
    return total


@functools.cache
def _odd(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 62), 1 << 62, (CHUNK,), generator=generator).mul_(2).add_(1).to(device)
