"""The parts of a causal transformer as plain equations over a dict of named tensors; shapes are [b, s, d]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: (x * (x > 0)) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class Model:
    """Named tensors, and what the equations do with them. ``used`` collects the names that were read.

    kind, eps, one_plus: of every norm but those that an equation fixes. rope_theta None: no positions at all. moe: options
    of layers that have a router. ``extra`` adds up their own losses, those of a sequence as often as it has tokens.
    step: of the optimizer.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        activation: str = "swiglu",
        rope_theta: float | None = 10000.0,
        kind: str = "rmsnorm",
        eps: float = 1e-5,
        one_plus: bool = False,
        moe: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        self.step = step
        self.moe, self.extra = moe or {}, torch.zeros((), dtype=torch.float64)
        self.weights, self.used = weights, set[str]()
        self.L, self.l = layers, 0
        self.h, self.kv, self.hd = heads, kv_heads, head_dim
        self.activation, self.rope_theta = activation, rope_theta
        self.kind, self.eps, self.one_plus = kind, eps, one_plus

    # parameters

    def get(self, name: str) -> Tensor | None:
        if name in self.weights:
            self.used.add(name)
        return self.weights.get(name)

    def p(self, name: str) -> Tensor:
        """A parameter of the layer at hand."""
        found = self.get(f"blocks.{self.l - 1}.{name}")
        assert found is not None, f"the model has no blocks.{self.l - 1}.{name}"
        return found

    # norms

    def N(self, site: str, x: Tensor) -> Tensor:
        """The norm of a site of the layer at hand."""
        return self.norm(f"blocks.{self.l - 1}.{site}", x)

    def norm(self, path: str, x: Tensor) -> Tensor:
        weight, bias = self.get(f"{path}.weight"), self.get(f"{path}.bias")
        weight = 1 + weight if weight is not None and self.one_plus else weight
        n = x.shape[-1]
        if self.kind == "layernorm":
            mean = x.sum(-1, keepdim=True) / n
            variance = ((x - mean) ** 2).sum(-1, keepdim=True) / n
            y = (x - mean) / torch.sqrt(variance + self.eps)
        elif self.kind == "rmsnorm":
            y = x / torch.sqrt((x**2).sum(-1, keepdim=True) / n + self.eps)
        elif self.kind == "l2":
            y = x / torch.sqrt((x**2).sum(-1, keepdim=True))
        elif self.kind == "scalenorm":
            y = math.sqrt(n) * x / torch.sqrt((x**2).sum(-1, keepdim=True))
        elif self.kind == "dyt":
            y = torch.tanh(self.get(f"{path}.alpha") * x)
        elif self.kind == "derf":
            y = torch.erf(self.get(f"{path}.alpha") * x + self.get(f"{path}.shift"))
        elif self.kind == "seednorm":
            alpha, beta = self.get(f"{path}.alpha"), self.get(f"{path}.beta")
            y = x / torch.sqrt((x**2).sum(-1, keepdim=True) / n + self.eps)
            return (alpha * torch.tanh((x * beta).sum(-1, keepdim=True)) + weight) * y
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    # sub-layers

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.p(f"{name}.weight").T
        bias = self.get(f"blocks.{self.l - 1}.{name}.bias")
        return y if bias is None else y + bias

    def A(
        self,
        u: Tensor,
        *,
        heads: str = "",
        width: str = "",
        head_scale: str | None = None,
        cosine: tuple[Any, Any, Any] | None = None,
    ) -> Tensor:
        """Causal attention. heads, width: which of q, k, v, c (context) are normalized, over what.

        head_scale: before W_o or after it. cosine: (gain of q, gain of k, logit factor) on L2-normalized q and k.
        """
        parts = {}
        for name, count in (("q", self.h), ("k", self.kv), ("v", self.kv)):
            y = self.linear(f"attention.{name}", u)
            y = self.N(f"attention.{name}_norm", y) if name in width else y
            y = y.unflatten(-1, (count, self.hd))
            parts[name] = self.N(f"attention.{name}_norm", y) if name in heads else y
        q, k, v = parts["q"], parts["k"], parts["v"]
        logit_factor: Any = 1 / math.sqrt(self.hd)
        if cosine is not None:
            q = q / torch.sqrt((q**2).sum(-1, keepdim=True)) * cosine[0]
            k = k / torch.sqrt((k**2).sum(-1, keepdim=True)) * cosine[1]
            logit_factor = cosine[2]
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(self.h // self.kv, dim=2) for t in (k, v))
        scores = torch.einsum("bihe,bjhe->bhij", q, k) * logit_factor
        s = u.shape[1]
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
        context = torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), v)
        context = self.N("attention.context_norm", context) if "c" in heads else context
        if head_scale == "pre_projection":
            context = context * self.p("attention.head_scale")[:, None]
        context = context.flatten(2)
        context = self.N("attention.context_norm", context) if "c" in width else context
        y = self.linear("attention.o", context)
        if head_scale == "post_projection":
            y = y * self.p("attention.head_scale").repeat_interleave(y.shape[-1] // self.h)
        return y

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE on [b, s, heads, hd]: the two halves of a head are the coordinates of its planes."""
        if self.rope_theta is None:
            return x
        half = self.hd // 2
        frequency = self.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency)[:, None, :]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def F(self, u: Tensor, *, inner: bool = False) -> Tensor:
        """Feed-forward, gated if the activation is; inner: a norm before W_down. Of experts where there is a router."""
        router = self.get(f"blocks.{self.l - 1}.ffn.router.weight")
        if router is not None:
            return self.mixture(u, router, inner)
        return self.dense("ffn", u, inner)

    def dense(self, path: str, u: Tensor, inner: bool) -> Tensor:
        if self.activation in GATES:
            act = ACTIVATIONS[GATES[self.activation]]
            y = act(self.linear(f"{path}.gate", u)) * self.linear(f"{path}.up", u)
        else:
            y = ACTIVATIONS[self.activation](self.linear(f"{path}.up", u))
        return self.linear(f"{path}.down", self.N(f"{path}.inner_norm", y) if inner else y)

    def mixture(self, u: Tensor, router: Tensor, inner: bool) -> Tensor:
        """Token by token: the experts of the largest scores, as long as they have room in the token's sequence."""
        o, experts = self.moe, len(router)
        k, rows = o["top_k"], []
        for sequence in u:
            s, room = len(sequence), [math.inf] * experts
            if o.get("capacity") is not None:
                room = [math.ceil(o["capacity"] * k * s / experts)] * experts
            out, taken, means = [], [0] * experts, torch.zeros(experts, dtype=u.dtype)
            squares = torch.zeros((), dtype=u.dtype)
            for x in sequence:
                logits = router @ x
                scores = logits.exp() / logits.exp().sum() if o.get("score") != "sigmoid" else 1 / (1 + (-logits).exp())
                chosen = sorted(range(experts), key=(-scores.detach()).tolist().__getitem__)[:k]
                weights = [scores[e] / (sum(scores[c] for c in chosen) if o.get("normalize") else 1) for e in chosen]
                y = torch.zeros_like(x)
                for e, weight in zip(chosen, weights, strict=True):
                    if taken[e] < room[e]:
                        y = y + o.get("scale", 1.0) * weight * self.dense(f"ffn.experts.{e}", x, inner)
                    taken[e] += 1
                means, squares = means + scores / scores.sum() / s, squares + logits.exp().sum().log() ** 2 / s
                out.append(y + self.dense("ffn.shared", x, inner) if o.get("shared_ffn") else y)
            rows.append(torch.stack(out))
            balance = experts * sum(n / (k * s) * means[e] for e, n in enumerate(taken))
            own = o.get("balance_loss", 0.0) * balance + o.get("z_loss", 0.0) * squares
            self.extra = self.extra + s * own / self.sparse_layers()
        return torch.stack(rows)

    def sparse_layers(self) -> int:
        return sum(name.endswith("router.weight") for name in self.weights)

    # ends

    def embed(self, tokens: Tensor) -> Tensor:
        table = self.get("embed.token.weight")
        assert table is not None
        return table[tokens]

    def head(self, x: Tensor) -> Tensor:
        weight = self.get("head.weight")
        weight = self.get("embed.token.weight") if weight is None else weight
        assert weight is not None
        bias = self.get("head.bias")
        y = x @ weight.T
        return y if bias is None else y + bias
