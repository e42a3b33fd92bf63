"""What all fakes of libraries share: the record of calls, and attention and norms with every step spelled out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.contract import ENTRIES, UNSTABLE, bind

CALLS: list[tuple[str, dict[str, Any]]] = []  # what was called, with which arguments


def record(name: str, args: Any, kwargs: Any, method: str | None = None, positional: int = 3) -> dict[str, Any]:
    """Bind and remember a call; an entry that changes between versions takes ``positional`` arguments by place at most."""
    if ENTRIES[name].get("in_checkout") == UNSTABLE and len(args) > positional:
        raise TypeError(f"{name}: its order of arguments is unstable, call it by keyword")
    given = bind(name, args, kwargs, method)
    CALLS.append((name, given))
    return given


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [b, h, sq, hd], k, v [b, kv, sk, hd], allowed [.., sq, sk] -> [b, h, sq, hd], every step spelled out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.double()).to(q.dtype)


def triangle(sq: int, sk: int, *, bottom_right: bool) -> Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq if bottom_right else 0)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor, given: Any, causal: bool) -> Tensor:
    longest = "max_seqlen_kv" if "max_seqlen_kv" in given else "max_seqlen_k"
    for at, top, x in ((at_q, given["max_seqlen_q"], q), (at_k, given[longest], k)):
        assert at.dtype == torch.int32 and at[0] == 0 and at[-1] == x.shape[0]
        assert type(top) is int and top == int(at.diff().max()), "else the library waits for the device"
    parts = []
    for first, last in zip(at_q[:-1].tolist(), at_q[1:].tolist(), strict=True):
        part = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        size = last - first
        allowed = triangle(size, size, bottom_right=True) if causal else torch.ones(size, size, dtype=torch.bool)
        parts.append(softmax_attention(*part, allowed)[0].transpose(0, 1))
    return torch.cat(parts)


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, rms: bool) -> Tensor:
    """In float64, so that the judge has no rounding of its own."""
    w, b = (None if t is None else t.double() for t in (weight, bias))
    shape = x.shape[-1:]
    if rms:
        y = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
        y = y if w is None else y * w
        return y if b is None else y + b
    return F.layer_norm(x.double(), shape, w, b, eps)


class Adam(torch.optim.Optimizer):
    """FusedAdam of two libraries: counts updates by group, and begins a parameter's moments only where it has no state."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        given = record(name, args, kwargs)
        assert given["adam_w_mode"] and given["bias_correction"]
        assert not given.get("capturable", False) and not given.get("master_weights", False)
        super().__init__(given["params"], {key: given[key] for key in ("lr", "betas", "eps")})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if p.grad is not None:
                    assert p.dtype == p.grad.dtype == torch.float32
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        (one, two), step = group["betas"], group["step"]
        mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
        assert p.grad is not None
        mean.mul_(one).add_(p.grad, alpha=1 - one)
        square.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
        update = (mean / (1 - one**step)) / ((square / (1 - two**step)).sqrt() + group["eps"])
        p.sub_(group["lr"] * (update + group["weight_decay"] * p))
