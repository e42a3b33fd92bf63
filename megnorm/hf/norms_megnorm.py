"""Norms and residuals of a megnorm model in transformers, built from the entries of ``config.norm``.

Needs torch and transformers alone; shipped beside modeling_megnorm.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

Spec = dict[str, Any]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and angles: fp32 for low precision, else the tensor's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Norm(nn.Module):
    """One norm over the last axis, [..., size] -> [..., size] ([..., heads, size] for a gain of its own per head).

    Parameters, those the kind has: weight (absent for gain "none"; one_plus stores w and multiplies by 1 + w), bias,
    alpha (inside tanh or erf; seednorm: a vector outside), shift, beta.
    """

    def __init__(self, spec: Spec, size: int, heads: int = 1):
        super().__init__()
        self.spec, self.size = spec, size
        self.kind, self.gain, self.eps, self.scale = spec["kind"], spec["gain"], spec["eps"], spec["scale"]
        shapes = {"vector": (size,), "one_plus": (size,), "scalar": (1,), "per_head": (heads, size)}
        if self.gain != "none":
            self.weight = nn.Parameter(torch.empty(shapes[self.gain]))
        if spec["bias"]:
            self.bias = nn.Parameter(torch.empty(size))
        if self.kind in ("dyt", "derf"):
            self.alpha = nn.Parameter(torch.empty(1))
        if self.kind == "derf":
            self.shift = nn.Parameter(torch.empty(1))
        if self.kind == "seednorm":
            self.alpha = nn.Parameter(torch.empty(size))
            self.beta = nn.Parameter(torch.empty(size))
        self.reset()

    def reset(self) -> None:
        """Initial values; tensors already loaded keep theirs."""
        values = {"weight": self.spec["weight_init"] - (self.gain == "one_plus"), "alpha": self.spec["alpha"]}
        for name, parameter in self.named_parameters():
            init.constant_(parameter, values.get(name, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if self.kind == "layernorm" and self.gain == "vector":
            y = F.layer_norm(x, (self.size,), weight, bias, self.eps)
        else:
            if self.gain == "one_plus":
                weight = 1 + weight.to(wide(weight.dtype))
            y = self._affine(self._unit(x.to(wide(x.dtype))), x, weight, bias)
        return y if self.scale == 1.0 else y * self.scale

    def _unit(self, x: Tensor) -> Tensor:
        """x before gain and bias."""
        if self.kind == "layernorm":
            return F.layer_norm(x, (self.size,), eps=self.eps)
        if self.kind in ("rmsnorm", "seednorm"):
            # the order of arithmetic in training, so that fp32 outputs are equal to the bit
            return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(self.size).add(self.eps).rsqrt()
        if self.kind in ("l2", "scalenorm"):
            factor = self.size**0.5 if self.kind == "scalenorm" else 1.0
            return x * (factor / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30))
        if self.kind == "dyt":
            return torch.tanh(self.alpha * x)
        if self.kind == "derf":
            return torch.erf(self.alpha * x + self.shift)
        raise ValueError(f"config.json: norm kind '{self.kind}' is unknown to this modeling file; export again")

    def _affine(self, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Gain and bias, in y's precision or, after a cast, in x's."""
        if self.kind == "seednorm":
            seed = self.alpha * torch.tanh((x.to(y.dtype) * self.beta).sum(-1, keepdim=True))
            weight = seed if weight is None else seed + weight
        elif self.spec["cast"] == "before_gain":
            y = y.to(x.dtype)
        if weight is not None:
            y = y * weight.to(y.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)


def make_norm(spec: Spec | None, size: int, heads: int = 1) -> nn.Module:
    return nn.Identity() if spec is None else Norm(spec, size, heads)


def over_heads(norm: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """Apply a norm over heads or width to x [b, s, heads * head_dim], or split already: [b, s, heads, head_dim]."""
    if isinstance(norm, Norm) and norm.spec["over"] == "width":
        return norm(x.flatten(-2) if x.dim() == 4 else x).unflatten(-1, (-1, head_dim))
    return norm(x if x.dim() == 4 else x.unflatten(-1, (-1, head_dim)))


class Residual(nn.Module):
    """skip * r + branch * y, each factor a number or a parameter; a shared one is the attention's. The sum, or r, may be damped
    by a gate."""

    def __init__(self, spec: Spec, width: int, shared: "Residual | None" = None):
        super().__init__()
        self.spec, self.initial = spec, {}
        if spec["rule"] != "add":
            raise ValueError(f"config.json: residual rule '{spec['rule']}' is unknown to this file; export again")
        for name in ("skip", "branch"):
            scale = spec[name]
            if scale.get("warmup"):
                raise ValueError(f"config.json: residual.{name} still grows with the step; export a checkpoint again")
            if scale["learned"] is None:
                setattr(self, name, scale["value"])
            elif not (scale["shared"] and shared is not None and shared.spec[name]["shared"]):
                setattr(self, name, nn.Parameter(torch.empty(width if scale["learned"] == "width" else 1)))
                self.initial[name] = scale["value"]
        gate = spec.get("gate")
        if gate and not (gate["shared"] and shared is not None):
            self.gate = nn.Parameter(torch.empty(1))
            self.initial["gate"] = gate["value"]
        self.reset()

    def reset(self) -> None:
        for name, value in self.initial.items():
            init.constant_(getattr(self, name), value)

    def forward(
        self, stream: Tensor, u: Tensor, y: Tensor, layer_input: Tensor, shared: "Residual | None" = None
    ) -> Tensor:
        """stream, u (the normalized input), y (the branch), layer_input: [b, s, d]."""
        skip: Any = self.skip if hasattr(self, "skip") else shared.skip
        branch: Any = self.branch if hasattr(self, "branch") else shared.branch
        r = u if self.spec["source"] == "input" else stream
        on = (self.spec.get("gate") or {}).get("on")
        gate: Any = getattr(self if hasattr(self, "gate") else shared, "gate", None)
        r = damped(r, gate) if on == "skip" else r
        r = r if isinstance(skip, float) and skip == 1.0 else skip * r
        x = r + (y if isinstance(branch, float) and branch == 1.0 else branch * y)
        x = x + layer_input if self.spec["layer_input"] else x
        return damped(x, gate) if on == "stream" else x


def damped(x: Tensor, gate: Tensor) -> Tensor:
    """x - silu(gate) * x, whose gradient by x is that of x alone (GPAS)."""
    return x - F.silu(gate) * x.detach()


class SecondStream(nn.Module):
    """A sub-layer's side of a second stream beside the first, both in one tensor [2, b, s, d]."""

    def __init__(self, spec: Spec, width: int):
        super().__init__()
        self.spec = spec
        self.start_norm, self.read_norm = make_norm(spec["start"], width), make_norm(spec["read"], width)
        if spec["share"]["learned"] is not None:
            self.share = nn.Parameter(torch.empty(width if spec["share"]["learned"] == "width" else 1))
        self.reset()

    def reset(self) -> None:
        if hasattr(self, "share"):
            init.constant_(self.share, self.spec["share"]["value"])

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first stream, the second one, and what the branch reads."""
        x, y = streams.unbind()
        x = self.start_norm(x)
        if self.spec["read"] is None:
            return x, y, x
        return x, y, x * (self.share if hasattr(self, "share") else self.spec["share"]["value"]) + self.read_norm(y)


class Mixing(nn.Module):
    """The weights that tokens give n streams [n, b, s, d]: [b, s, n, n + 2], of stream s as columns its share in what the
    branch reads, its shares in each new stream, and how much of the branch it gets; with exits the first column alone."""

    def __init__(self, spec: Spec, width: int, exits: bool = False):
        super().__init__()
        n = self.n = spec["streams"]
        self.spec, self.exits, self.alone = spec, exits, spec["rule"] == "tanh"
        if spec["rule"] not in ("tanh", "sinkhorn"):
            raise ValueError(f"config.json: mix rule '{spec['rule']}' is unknown to this file; export again")
        features = width if self.alone else n * width
        self.norm = make_norm(spec["norm"], features)
        self.parts = [n + 1, 1] if self.alone else [n] if exits else [n, n, n * n]  # rows of the map that share a scale
        self.map = nn.Parameter(torch.empty(sum(self.parts), features))
        self.scale = nn.Parameter(torch.empty(len(self.parts)))
        self.bias = nn.Parameter(torch.empty((n, n + 2) if self.alone else sum(self.parts)))
        self.reset()

    def reset(self) -> None:
        """Initial values; tensors already loaded keep theirs."""
        init.constant_(self.scale, self.spec["scale"])
        if not self.alone:
            init.normal_(self.map, 0.0, 0.02)
            init.zeros_(self.bias)
            return
        read = torch.zeros(self.n, 1)
        read[int(self.spec["first"])] = 1.0
        init.zeros_(self.map)
        init.copy_(self.bias, torch.cat([read, torch.eye(self.n), torch.ones(self.n, 1)], 1))

    def forward(self, streams: Tensor) -> Tensor:
        x = streams.permute(1, 2, 0, 3)
        u = self.norm(x if self.alone else x.flatten(2))
        kind = wide(u.dtype)
        raw = F.linear(u.to(kind), self.map.to(kind))
        scale = torch.cat([one.expand(count) for one, count in zip(self.scale.to(kind), self.parts, strict=True)])
        if self.alone:
            return torch.tanh(raw) * scale + self.bias.to(kind)
        n, eps = self.n, self.spec["eps"]
        raw = raw * scale + self.bias.to(kind)
        read = (raw[..., :n].sigmoid() + eps).unsqueeze(-1)
        if self.exits:
            return read
        mix = raw[..., 2 * n :].unflatten(-1, (n, n)).softmax(-1) + eps
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
        for _ in range(self.spec["rounds"] - 1):
            mix = mix / (mix.sum(-1, keepdim=True) + eps)
            mix = mix / (mix.sum(-2, keepdim=True) + eps)
        return torch.cat([read, mix, 2 * raw[..., n : 2 * n].sigmoid().unsqueeze(-1)], -1)

    def read(self, streams: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bsn,nbsd->bsd", weights[..., 0].to(streams.dtype), streams)

    def join(self, streams: Tensor, weights: Tensor, branch: Tensor) -> Tensor:
        weights = weights.to(streams.dtype)
        mixed = torch.einsum("bsnt,nbsd->tbsd", weights[..., 1:-1], streams)
        return torch.addcmul(mixed, weights[..., -1].permute(2, 0, 1).unsqueeze(-1), branch)


class Ends(nn.Module):
    """How streams begin and end, by ``config.norm``: one as it is, more as [n, b, s, d] from the embedding to a sum."""

    def __init__(self, spec: Spec | None, width: int):
        super().__init__()
        self.spec, self.mixed = spec, 0 if spec is None else spec.get("mixed", 0)
        if self.mixed and spec["exit"] is not None:
            self.mix = Mixing(spec["exit"], width, exits=True)
        elif spec is not None and not self.mixed:
            self.x_norm, self.y_norm = make_norm(spec["x"], width), make_norm(spec["y"], width)

    def begin(self, x: Tensor) -> Tensor:
        if self.spec is None:
            return x
        return torch.stack([x] * self.mixed if self.mixed else [x, x * self.spec["entry"]])

    def forward(self, streams: Tensor) -> Tensor:
        if self.spec is None:
            return streams
        if hasattr(self, "mix"):
            return self.mix.read(streams, self.mix(streams))
        if self.mixed:
            return streams.sum(0) * self.spec["share"]
        return self.x_norm(streams[0]) + self.y_norm(streams[1])


class SubLayer(nn.Module):
    """A branch of a block, with the norms around it and the residual that it ends in."""

    input_norm: nn.Module
    output_norm: nn.Module
    post_norm: nn.Module
    residual: Residual
    second: SecondStream | None
    mix: Mixing | None

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The stream that the residual takes, the second one (or weights of all) or None, and what the input norm sees."""
        if self.mix is not None:
            weights = self.mix(streams)
            return streams, weights, self.mix.read(streams, weights)
        return (streams, None, streams) if self.second is None else self.second(streams)

    def write(
        self,
        x: Tensor,
        second: Tensor | None,
        u: Tensor,
        y: Tensor,
        layer_input: Tensor,
        shared: Residual | None = None,
    ) -> Tensor:
        """What goes on, from what ``read`` gave, the normalized input and the branch."""
        if self.mix is not None:
            return self.mix.join(x, second, y)
        out = self.post_norm(self.residual(x, u, y, layer_input, shared))
        return out if self.second is None else torch.stack([out, second + self.second.spec["write"] * y])

    def surround(self, spec: Spec, width: int, first: Residual | None = None) -> None:
        """Make these modules. first: the attention's residual, whose factors this one may share."""
        self.input_norm, self.output_norm = make_norm(spec["input"], width), make_norm(spec["output"], width)
        self.post_norm = make_norm(spec["post"], width)
        self.residual = Residual(spec["residual"], width, first)
        self.second = SecondStream(spec["second"], width) if spec.get("second") else None
        self.mix = Mixing(spec["mix"], width) if spec.get("mix") else None
