"""What a scheme costs beside Pre-LN, counted from its declaration: the data behind ``megnorm norms``.

Counts are of a forward pass and of norms, scales and extra adds alone, unfused; a backward pass is about twice that.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, resolve
from megnorm.norms.scheme import Attention, Layer, Mix, Norm, Scale, SubLayer

# operations for one feature, without gain, bias and constant factor
OPERATIONS = {"rmsnorm": 3, "layernorm": 5, "l2": 3, "scalenorm": 3, "dyt": 2, "derf": 3, "seednorm": 8}
OWN_VECTORS = {"seednorm": 2}
OWN_SCALARS = {"dyt": 1, "derf": 2}


class Sizes(Protocol):
    """The sizes of a model that costs depend on; ModelConfig has them."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv(self) -> int: ...
    @property
    def hd(self) -> int: ...
    @property
    def ffn(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """A scheme in the table.

    parameters: beyond Pre-LN in one layer, as a formula in d, f, h, kv, hd. flops, bytes: of one token through the
    whole model beyond Pre-LN. native: the Hugging Face class that holds it, or "custom"; None if nobody was asked.
    """

    name: str
    paper: str
    summary: str
    parameters: str
    flops: int
    bytes: int
    native: str | None


def rows(
    sizes: Sizes,
    layers: int,
    *,
    norm: NormConfig | None = None,
    element_bytes: int = 2,
    native: Callable[[NormConfig, Resolved], str] | None = None,
) -> list[Row]:
    """Every registered scheme with its default options, for a model of these sizes.

    norm: kind, gain, bias and so on of the norms; its scheme, options and patch are not looked at. native: asked for
    the Hugging Face class of a config.
    """
    base = norm or NormConfig()
    plain = _resolve(NormConfig().scheme, base, layers)
    made = []
    for name in registry.names():
        scheme, resolved = registry.get(name), _resolve(name, base, layers)
        extra = parameters(resolved.layers[-1])
        extra.subtract(parameters(plain.layers[-1]))
        made.append(
            Row(
                name,
                scheme.paper,
                scheme.summary,
                formula(extra),
                flops(resolved, sizes) - flops(plain, sizes),
                element_bytes * (elements_moved(resolved, sizes) - elements_moved(plain, sizes)),
                None if native is None else native(_named(name, base), resolved),
            )
        )
    return made


def _named(scheme: str, base: NormConfig) -> NormConfig:
    return NormConfig(
        scheme,
        kind=base.kind,
        gain=base.gain,
        bias=base.bias,
        eps=base.eps,
        cast=base.cast,
        alpha=base.alpha,
    )


def _resolve(scheme: str, base: NormConfig, layers: int) -> Resolved:
    return resolve(_named(scheme, base), layers)


def sublayers(layer: Layer) -> tuple[tuple[str, SubLayer], ...]:
    """The sub-layers of a causal layer, by name, in order."""
    return ("attention", layer.attention), ("ffn", layer.ffn)


SITES = ("mix", "start", "read", "input", "q", "k", "v", "context", "inner", "output", "post")


def norms(sub: SubLayer) -> Iterator[tuple[str, Norm]]:
    """The norms of a sub-layer with their sites, in the order in which data meets them."""
    for site in SITES:
        norm = getattr(sub.second if site in ("start", "read") else sub, site, None)
        norm = norm.norm if isinstance(norm, Mix) else norm
        if norm is not None:
            yield site, norm


def outside(resolved: Resolved) -> Iterator[tuple[str, Norm]]:
    """The norms outside layers, with their sites."""
    streams = resolved.streams
    ends = () if streams is None else (("x", streams.x), ("y", streams.y), ("mix", streams.exit and streams.exit.norm))
    for site, norm in (("embedding", resolved.embedding), *ends, ("final", resolved.final)):
        if norm is not None:
            yield site, norm


def scales(sub: SubLayer) -> tuple[tuple[str, Scale], ...]:
    """The factors of a sub-layer, by name."""
    own = () if sub.second is None else (("share", sub.second.share),)
    return ("skip", sub.residual.skip), ("branch", sub.residual.branch), *own


def _features(site: str) -> str:
    """How many features pass a site, as a symbol."""
    return {"q": "h hd", "context": "h hd", "k": "kv hd", "v": "kv hd", "inner": "f"}.get(site, "d")


def parameters(layer: Layer) -> Counter[str]:
    """Parameters of norms, scales and mixing in a resolved layer: how many of each symbol (d, f, hd, h hd, kv hd, h, 1)."""
    count: Counter[str] = Counter()
    for place, sub in sublayers(layer):
        if sub.mix is not None:
            kinds = sub.mix.kinds()
            count["d"] += len(kinds) * (1 if sub.mix.rule == "tanh" else sub.mix.streams)
            count["1"] += max(kinds) + 1 + sub.mix.biases()
        for site, norm in norms(sub):
            vector = "hd" if norm.over == "head" else _features(site)
            gain = {"vector": vector, "one_plus": vector, "per_head": _features(site), "scalar": "1"}
            if norm.gain in gain:
                count[gain[norm.gain]] += 1
            count[vector] += bool(norm.bias) + OWN_VECTORS.get(str(norm.kind), 0)
            count["1"] += OWN_SCALARS.get(str(norm.kind), 0)
        for _, scale in scales(sub):
            if scale.learned is not None and not (scale.shared and place == "ffn"):
                count["d" if scale.learned == "width" else "1"] += 1
        gate = sub.residual.gate
        count["1"] += gate is not None and not (gate.shared and place == "ffn")
        if isinstance(sub, Attention) and sub.head_scale is not None:
            count["h"] += 1
    return count


def formula(count: Counter[str]) -> str:
    """``{"hd": 3, "d": -1}`` -> "3 hd - d"; "0" if nothing is left."""
    order = ("f", "d", "h hd", "kv hd", "hd", "h", "1")
    found = sorted(((s, n) for s, n in count.items() if n), key=lambda item: (item[1] < 0, order.index(item[0])))
    text = ""
    for symbol, n in found:
        sign = ("- " if n < 0 else "+ ") if text else ("-" if n < 0 else "")
        size = str(abs(n)) if symbol == "1" else symbol if abs(n) == 1 else f"{abs(n)} {symbol}"
        text += (" " if text else "") + sign + size
    return text or "0"


def _number(symbol: str, sizes: Sizes) -> int:
    return {"d": sizes.width, "f": sizes.ffn, "h hd": sizes.heads * sizes.hd, "kv hd": sizes.kv * sizes.hd}[symbol]


def _norm_flops(norm: Norm) -> int:
    return OPERATIONS[str(norm.kind)] + (norm.gain != "none") + bool(norm.bias) + (norm.scale != 1.0)


def flops(resolved: Resolved, sizes: Sizes) -> int:
    """Floating-point operations of norms, scales and extra adds for one token."""
    total = sum(_norm_flops(norm) * sizes.width for _, norm in outside(resolved))
    streams = resolved.streams
    total += 0 if streams is None else sizes.width * (streams.count - 1)
    total += 0 if streams is None or streams.exit is None else 2 * sizes.width * streams.mixed * (1 + streams.mixed)
    for layer in resolved.layers:
        for _, sub in sublayers(layer):
            total += sum(_norm_flops(norm) * _number(_features(site), sizes) for site, norm in norms(sub))
            total += sizes.width * sum(scale != Scale() for _, scale in scales(sub))
            total += 2 * sizes.width * (sub.residual.gate is not None)
            total += _second(sub, sizes, 1) + _mix_flops(sub.mix, sizes)
            total += sizes.width * sub.residual.layer_input + _head_scale(sub, sizes)
    return total


def elements_moved(resolved: Resolved, sizes: Sizes) -> int:
    """Activation elements that norms, head scales and the extra skip read and write for one token.

    Factors on skip and branch ride on the residual add and move nothing.
    """
    total = sum(2 * sizes.width for _ in outside(resolved))
    streams = resolved.streams
    total += 0 if streams is None else sizes.width * streams.count * (1 if streams.exit is None else 2)
    for layer in resolved.layers:
        for _, sub in sublayers(layer):
            total += sum(2 * _number(_features(site), sizes) for site, _ in norms(sub))
            total += sizes.width * sub.residual.layer_input + 2 * _head_scale(sub, sizes)
            total += 2 * sizes.width * (sub.residual.gate is not None)
            total += _second(sub, sizes, 3)
            # beside the norm of one stream and the plain add: the norms of the others, and streams read twice and written
            total += 0 if sub.mix is None else sizes.width * (2 * (sub.mix.streams - 1) + 3 * sub.mix.streams)
    return total


def _second(sub: SubLayer, sizes: Sizes, each: int) -> int:
    """Of adding to a second stream, and of adding it to what F reads; each: for one feature."""
    return 0 if sub.second is None else each * sizes.width * (1 + (sub.second.read is not None))


def _mix_flops(mix: Mix | None, sizes: Sizes) -> int:
    """Of the map and of what its weights multiply, beyond the plain add and the norm of one stream; the few operations on the
    weights themselves left out."""
    if mix is None:
        return 0
    n, rows = mix.streams, len(mix.kinds())
    assert mix.norm is not None
    products = 2 * rows * n + 2 * n + 2 * n * n + 2 * n - 1
    return sizes.width * (products + _norm_flops(mix.norm) * (n - 1))


def _head_scale(sub: SubLayer, sizes: Sizes) -> int:
    """Features that a head scale multiplies."""
    if not isinstance(sub, Attention) or sub.head_scale is None:
        return 0
    return sizes.heads * sizes.hd if sub.head_scale == "pre_projection" else sizes.width
