"""Every scheme once more, as the equations of its paper in plain torch: the judge of megnorm's layers.

Nothing of megnorm is imported. ``m`` stands for the model at one layer: ``m.N(site, x)`` is the norm of that site,
``m.A(u, ...)`` attention and ``m.F(u, ...)`` the feed-forward with what is named normalized inside, ``m.p(name)`` a
parameter, ``m.l`` the layer from 1 to ``m.L``. Shapes are [b, s, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.reference.model import Model, Tensor

Block = Callable[..., Tensor]
BLOCKS: dict[str, Block] = {}
OUTSIDE: dict[str, Callable[..., tuple[bool, bool]]] = {}


def scheme(final: Any, embedding: Any = lambda **o: o.get("embedding_norm", False)) -> Callable[[Block], Block]:
    """Register a block; ``final`` and ``embedding`` say from the options whether these norms exist."""

    def keep(block: Block) -> Block:
        BLOCKS[block.__name__] = block
        OUTSIDE[block.__name__] = lambda **o: (embedding(**o), final(**o) if callable(final) else final)
        return block

    return keep


@scheme(final=True)
def preln(m: Model, x: Tensor, embedding_norm: bool = False) -> Tensor:
    x = x + m.A(m.N("attention.input_norm", x))
    return x + m.F(m.N("ffn.input_norm", x))


@scheme(final=lambda final_norm=False, **o: final_norm)
def postln(m: Model, x: Tensor, **options: Any) -> Tensor:
    x = m.N("attention.post_norm", x + m.A(x))
    return m.N("ffn.post_norm", x + m.F(x))


@scheme(final=lambda final_norm=False, **o: final_norm)
def nonorm(m: Model, x: Tensor, **options: Any) -> Tensor:
    x = x + m.A(x)
    return x + m.F(x)


@scheme(final=lambda placement="pre", **o: placement == "pre")
def normformer(
    m: Model,
    x: Tensor,
    head_scale: str | None = "pre_projection",
    attention_norm: bool = True,
    ffn_norm: bool = True,
    residual_scale: bool = False,
    placement: str = "pre",
) -> Tensor:
    pre, post = placement == "pre", placement == "post"
    y = m.A(m.N("attention.input_norm", x) if pre else x, head_scale=head_scale)
    x = x + (m.N("attention.output_norm", y) if attention_norm else y)
    x = m.N("attention.post_norm", x) if post else x
    y = m.F(m.N("ffn.input_norm", x) if pre else x, inner=ffn_norm)
    x = (m.p("ffn.residual.skip") * x if residual_scale else x) + y
    return m.N("ffn.post_norm", x) if post else x


@scheme(final=lambda placement="post", **o: placement == "pre")
def deepnorm(m: Model, x: Tensor, skip: float | None = None, placement: str = "post", **options: Any) -> Tensor:
    a = (2 * m.L) ** 0.25 if skip is None else skip
    if placement == "pre":
        x = a * x + m.A(m.N("attention.input_norm", x))
        return a * x + m.F(m.N("ffn.input_norm", x))
    x = m.N("attention.post_norm", a * x + m.A(x))
    return m.N("ffn.post_norm", a * x + m.F(x))


@scheme(final=True)
def deepnorm_llama(m: Model, x: Tensor, **options: Any) -> Tensor:
    return deepnorm(m, x, **options)


def _hybrid(m: Model, x: Tensor, heads: str) -> Tensor:
    y = x + m.A(x, heads=heads)
    z = m.N("ffn.input_norm", y)
    return z + m.F(z)


@scheme(final=True)
def hybridnorm(m: Model, x: Tensor, embedding_norm: bool = False) -> Tensor:
    return _hybrid(m, x, "qkv")


@scheme(final=True)
def hybridnorm_star(m: Model, x: Tensor) -> Tensor:
    return hybridnorm_pre_qkv_pre(m, x) if m.l == 1 else _hybrid(m, x, "qkv")


@scheme(final=True)
def hybridnorm_7b(m: Model, x: Tensor) -> Tensor:
    u = m.N("attention.input_norm", x) if m.l == 1 else x
    y = x + m.N("attention.output_norm", m.A(u, heads="qkv"))
    z = m.N("ffn.input_norm", y)
    return (y if m.l == 1 else z) + m.F(z)


@scheme(final=True)
def hybridnorm_first_qkv_pre(m: Model, x: Tensor) -> Tensor:
    return hybridnorm_qkv_pre(m, x) if m.l == 1 else _hybrid(m, x, "qkv")


@scheme(final=True)
def hybridnorm_qkvc_post(m: Model, x: Tensor) -> Tensor:
    return _hybrid(m, x, "qkvc")


@scheme(final=True)
def hybridnorm_qkc_post(m: Model, x: Tensor) -> Tensor:
    return _hybrid(m, x, "qkc")


@scheme(final=True)
def hybridnorm_qk_post(m: Model, x: Tensor) -> Tensor:
    return _hybrid(m, x, "qk")


@scheme(final=True)
def hybridnorm_kv_post(m: Model, x: Tensor) -> Tensor:
    return _hybrid(m, x, "kv")


@scheme(final=True)
def hybridnorm_kc_post(m: Model, x: Tensor) -> Tensor:
    return _hybrid(m, x, "kc")


@scheme(final=True)
def hybridnorm_pre_qkv_post(m: Model, x: Tensor) -> Tensor:
    y = x + m.A(m.N("attention.input_norm", x), heads="qkv")
    z = m.N("ffn.input_norm", y)
    return z + m.F(z)


@scheme(final=True)
def hybridnorm_pre_qkv_pre(m: Model, x: Tensor) -> Tensor:
    y = x + m.A(m.N("attention.input_norm", x), heads="qkv")
    return y + m.F(m.N("ffn.input_norm", y))


@scheme(final=True)
def hybridnorm_pre_qk_pre(m: Model, x: Tensor) -> Tensor:
    y = x + m.A(m.N("attention.input_norm", x), heads="qk")
    return y + m.F(m.N("ffn.input_norm", y))


@scheme(final=True)
def hybridnorm_qkv_pre(m: Model, x: Tensor) -> Tensor:
    y = x + m.A(x, heads="qkv")
    return y + m.F(m.N("ffn.input_norm", y))


@scheme(final=True)
def hybridnorm_pre_post(m: Model, x: Tensor) -> Tensor:
    y = x + m.A(m.N("attention.input_norm", x))
    z = m.N("ffn.input_norm", y)
    return z + m.F(z)


@scheme(final=True)
def hybridnorm_post_pre(m: Model, x: Tensor) -> Tensor:
    z = m.N("attention.input_norm", x)
    y = z + m.A(z)
    return y + m.F(m.N("ffn.input_norm", y))


@scheme(final=True)
def hybridnorm_post_norm(m: Model, x: Tensor) -> Tensor:
    z = m.N("attention.input_norm", x)
    y = z + m.A(z)
    z = m.N("ffn.input_norm", y)
    return z + m.F(z)


@scheme(final=True)
def hybridnorm_mix_ln(m: Model, x: Tensor) -> Tensor:
    return hybridnorm_post_norm(m, x) if m.l <= m.L // 4 else preln(m, x)


@scheme(final=True)
def subln(m: Model, x: Tensor) -> Tensor:
    x = x + m.A(m.N("attention.input_norm", x), width="c")
    return x + m.F(m.N("ffn.input_norm", x), inner=True)


@scheme(final=True)
def sandwich(m: Model, x: Tensor) -> Tensor:
    x = x + m.N("attention.output_norm", m.A(m.N("attention.input_norm", x)))
    return x + m.N("ffn.output_norm", m.F(m.N("ffn.input_norm", x)))


@scheme(final=True)
def periln(m: Model, x: Tensor, qk_norm: bool = False, **options: Any) -> Tensor:
    y = m.A(m.N("attention.input_norm", x), heads="qk" if qk_norm else "")
    x = x + m.N("attention.output_norm", y)
    return x + m.N("ffn.output_norm", m.F(m.N("ffn.input_norm", x)))


@scheme(final=True)
def olmo2(m: Model, x: Tensor, qk_norm: bool = True) -> Tensor:
    x = x + m.N("attention.output_norm", m.A(x, width="qk" if qk_norm else ""))
    return x + m.N("ffn.output_norm", m.F(x))


@scheme(final=True)
def qknorm(m: Model, x: Tensor, over: str = "head", gain: str = "shared") -> Tensor:
    x = x + m.A(m.N("attention.input_norm", x), **{"heads" if over == "head" else "width": "qk"})
    return x + m.F(m.N("ffn.input_norm", x))


@scheme(final=True)
def qknorm_l2(m: Model, x: Tensor, logit_scale: float = 10.0, learned: str | None = None) -> Tensor:
    q_scale, k_scale, logits = 1.0, 1.0, logit_scale
    if learned == "scalar":
        logits = m.p("attention.q_norm.weight")
    if learned == "per_head":
        q_scale, k_scale = m.p("attention.q_norm.weight"), m.p("attention.k_norm.weight")
        logits = m.hd**-0.5
    x = x + m.A(m.N("attention.input_norm", x), cosine=(q_scale, k_scale, logits))
    return x + m.F(m.N("ffn.input_norm", x))


@scheme(final=True)
def valuenorm(m: Model, x: Tensor, gain: str = "shared") -> Tensor:
    x = x + m.A(m.N("attention.input_norm", x), heads="v")
    return x + m.F(m.N("ffn.input_norm", x))


@scheme(final=True)
def lns(m: Model, x: Tensor) -> Tensor:
    x = x + m.A(m.N("attention.input_norm", x) / math.sqrt(m.l))
    return x + m.F(m.N("ffn.input_norm", x) / math.sqrt(m.l))


@scheme(final=True)
def mixln(m: Model, x: Tensor, fraction: float = 0.25, post_layers: int | None = None) -> Tensor:
    first = math.floor(fraction * m.L) if post_layers is None else post_layers
    return postln(m, x) if m.l <= first else preln(m, x)


@scheme(final=False)
def b2t(m: Model, x: Tensor, scaled_init: bool = True) -> Tensor:
    y = m.N("attention.post_norm", x + m.A(x))
    return m.N("ffn.post_norm", x + y + m.F(y))


@scheme(final=False)
def admin(m: Model, x: Tensor, growth: str = "log n", learned: bool = False) -> Tensor:
    n = 2 * m.L
    omega = {"log n": math.sqrt((n + 1) / math.log(n + 1) - 1), "n": 1.0, "1": math.sqrt(n)}[growth]
    first, last = (m.p(f"{f}.residual.skip") if learned else omega for f in ("attention", "ffn"))
    x = m.N("attention.post_norm", first * x + m.A(x))
    return m.N("ffn.post_norm", last * x + m.F(x))


@scheme(final=lambda final_norm=False, **o: final_norm)
def keel(m: Model, x: Tensor, exceptions: bool = True, skip: float | None = None, **options: Any) -> Tensor:
    a = 2 * m.L if skip is None else skip
    if exceptions and m.l == 1:
        x = x + m.A(m.N("attention.input_norm", x))
        return m.N("ffn.post_norm", x + m.F(m.N("ffn.input_norm", x)))
    x = m.N("attention.post_norm", a * x + m.A(m.N("attention.input_norm", x)))
    return m.N("ffn.post_norm", a * x + m.F(m.N("ffn.input_norm", x)))


@scheme(final=lambda final_norm=False, **o: final_norm)
def rezero(m: Model, x: Tensor, **options: Any) -> Tensor:
    a = m.p("attention.residual.branch")
    x = x + a * m.A(x)
    return x + a * m.F(x)


@scheme(final=lambda norms=True, **o: norms)
def skipinit(m: Model, x: Tensor, norms: bool = True, **options: Any) -> Tensor:
    first, last = m.p("attention.residual.branch"), m.p("ffn.residual.branch")
    x = x + first * m.A(m.N("attention.input_norm", x) if norms else x)
    return x + last * m.F(m.N("ffn.input_norm", x) if norms else x)


@scheme(final=True)
def layerscale(m: Model, x: Tensor, **options: Any) -> Tensor:
    x = x + m.p("attention.residual.branch") * m.A(m.N("attention.input_norm", x))
    return x + m.p("ffn.residual.branch") * m.F(m.N("ffn.input_norm", x))


@scheme(final=True)
def resscale(m: Model, x: Tensor, **options: Any) -> Tensor:
    x = m.p("attention.residual.skip") * x + m.A(m.N("attention.input_norm", x))
    return m.p("ffn.residual.skip") * x + m.F(m.N("ffn.input_norm", x))


@scheme(final=lambda host="preln", **o: host != "postln")
def gpas(m: Model, x: Tensor, host: str = "preln", shared: bool = True) -> Tensor:
    def damped(x: Tensor, f: str) -> Tensor:
        gate = m.p(f"{'attention' if shared else f}.residual.gate")
        return x - gate / (1 + (-gate).exp()) * x.detach()

    if host == "preln" or (host == "mixln" and m.l > m.L // 4):
        x = damped(x + m.A(m.N("attention.input_norm", x)), "attention")
        return damped(x + m.F(m.N("ffn.input_norm", x)), "ffn")
    a = (2 * m.L) ** 0.25 if host == "deepnorm_llama" else 1.0
    x = m.N("attention.post_norm", a * damped(x, "attention") + m.A(x))
    return m.N("ffn.post_norm", a * damped(x, "ffn") + m.F(x))


@scheme(final=lambda host="preln", **o: host != "postln")
def prores(m: Model, x: Tensor, host: str = "preln", steps: int = 1000) -> Tensor:
    g = min(m.step / (steps * m.l), 1.0)
    if host == "preln":
        x = x + g * m.A(m.N("attention.input_norm", x))
        return x + g * m.F(m.N("ffn.input_norm", x))
    a = (2 * m.L) ** 0.25 if host == "deepnorm_llama" else 1.0
    x = m.N("attention.post_norm", a * x + g * m.A(x))
    return m.N("ffn.post_norm", a * x + g * m.F(x))


@scheme(final=False)
def branchnorm(m: Model, x: Tensor, steps: int = 4000) -> Tensor:
    g = min(m.step / steps, 1.0)
    x = m.N("attention.post_norm", x + g * m.A(x))
    return m.N("ffn.post_norm", x + g * m.F(x))


@scheme(final=False)
def resi_dual(m: Model, x: Tensor, scale: float = 1.0) -> Tensor:
    x, y = x.chunk(2, -1)
    o = m.A(x)
    x, y = m.N("attention.post_norm", x + o), y + scale * o
    o = m.F(x)
    return join(m.N("ffn.post_norm", x + o), y + scale * o)


@scheme(final=True)
def siamese(m: Model, x: Tensor) -> Tensor:
    x, y = x.chunk(2, -1)
    for f, body in (("attention", m.A), ("ffn", m.F)):
        x = m.N(f"{f}.second.start_norm", x)
        o = body(m.N(f"{f}.input_norm", x + m.N(f"{f}.second.read_norm", y)))
        x, y = x + o / math.sqrt(2 * m.l), y + o
    return join(x, y)


@scheme(final=True)
def siamese_hybrid(m: Model, x: Tensor) -> Tensor:
    x, y = x.chunk(2, -1)
    z = m.p("attention.second.share") * x + m.N("attention.second.read_norm", y)
    o = m.A(z, heads="qkv")
    x, y = x + o / math.sqrt(2 * m.l), y + o
    x = m.N("ffn.second.start_norm", x)
    o = m.F(m.N("ffn.input_norm", x + m.N("ffn.second.read_norm", y)))
    return join(x + o / math.sqrt(2 * m.l), y + o)


@scheme(final=True)
def hyper_connections(m: Model, x: Tensor, streams: int = 4) -> Tensor:
    n = streams
    for f, body in (("attention", m.A), ("ffn", m.F)):
        xs, b, c = x.chunk(n, -1), m.p(f"{f}.mix.bias"), m.p(f"{f}.mix.scale")
        units = [math.sqrt(y.shape[-1]) * y / (y**2).sum(-1, keepdim=True) ** 0.5 for y in xs]
        raw = [torch.tanh((1 + m.p(f"{f}.mix.norm.weight")) * v @ m.p(f"{f}.mix.map").T) for v in units]
        alpha = [c[0] * raw[s][..., : n + 1] + b[s, : n + 1] for s in range(n)]
        beta = [c[1] * raw[s][..., n + 1] + b[s, n + 1] for s in range(n)]
        o = body(m.N(f"{f}.input_norm", sum(alpha[s][..., 0, None] * xs[s] for s in range(n))))
        new = [sum(alpha[s][..., 1 + t, None] * xs[s] for s in range(n)) + beta[t][..., None] * o for t in range(n)]
        x = torch.cat(new, -1)
    return x


@scheme(final=True)
def mhc(m: Model, x: Tensor, streams: int = 4, rounds: int = 20, **options: Any) -> Tensor:
    n = streams
    for f, body in (("attention", m.A), ("ffn", m.F)):
        c, b = m.p(f"{f}.mix.scale"), m.p(f"{f}.mix.bias")
        raw = unit(x) @ m.p(f"{f}.mix.map").T
        pre, post = sigmoid(c[0] * raw[..., :n] + b[:n]) + 1e-6, 2 * sigmoid(c[1] * raw[..., n : 2 * n] + b[n : 2 * n])
        grid = (c[2] * raw[..., 2 * n :] + b[2 * n :]).exp().unflatten(-1, (n, n))
        grid = grid / grid.sum(-1, keepdim=True) + 1e-6
        for turn in range(2 * rounds - 1):
            grid = grid / (grid.sum(-2 if turn % 2 == 0 else -1, keepdim=True) + 1e-6)
        xs = x.chunk(n, -1)
        o = body(m.N(f"{f}.input_norm", sum(pre[..., s, None] * xs[s] for s in range(n))))
        new = [sum(grid[..., s, t, None] * xs[s] for s in range(n)) + post[..., t, None] * o for t in range(n)]
        x = torch.cat(new, -1)
    return x


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def unit(x: Tensor) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** 0.5


def learned_exit(m: Model, x: Tensor, n: int) -> Tensor:
    """What mhc makes of its streams behind the layers."""
    weight, bias, scale = (m.get(f"joined.mix.{name}") for name in ("map", "bias", "scale"))
    assert weight is not None and bias is not None and scale is not None
    share = sigmoid(scale * (unit(x) @ weight.T) + bias) + 1e-6
    return sum(share[..., s, None] * y for s, y in enumerate(x.chunk(n, -1)))  # type: ignore[return-value]


def join(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], -1)


MIXED = ("hyper_connections", "mhc")
"""Schemes of n streams, likewise."""
TWO = {"resi_dual": False, "siamese": True, "siamese_hybrid": True}
"""Schemes of two streams, side by side in the last dimension: whether the first is normalized behind the layers too."""


def reference_forward(name: str, model: Model, tokens: Tensor, **options: Any) -> Tensor:
    """tokens [b, s] -> logits [b, s, v] of scheme ``name`` with these options, by its equations."""
    embedding, final = OUTSIDE[name](**options)
    x = model.embed(tokens)
    x = model.norm("embed.norm", x) if embedding else x
    if name in TWO:
        x = join(x, options.get("scale", 1.0) * x)
    n = options.get("streams", 4)
    x = torch.cat([x] * n, -1) if name in MIXED else x
    for layer in range(1, model.L + 1):
        model.l = layer
        x = BLOCKS[name](model, x, **options)
    if name in TWO:
        x, y = x.chunk(2, -1)
        x = (model.norm("joined.x_norm", x) if TWO[name] else x) + model.norm("joined.y_norm", y)
    if name in MIXED and (name == "hyper_connections" or options.get("exit") == "mean"):
        x = sum(x.chunk(n, -1)) / (1 if name == "hyper_connections" else n)  # type: ignore[arg-type]
    elif name in MIXED:
        x = learned_exit(model, x, n)
    x = model.norm("final_norm", x) if final else x
    return model.head(x)
