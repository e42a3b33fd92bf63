"""From a declaration to plain numbers: (NormConfig, depth) -> Resolved.

Layers, checkpoints, exported models and the plan read ``Resolved`` only, so an old run keeps its meaning when a formula
is mended later.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.scheme import (
    FFN,
    Attention,
    Depth,
    Gate,
    Init,
    Layer,
    Mix,
    Norm,
    Residual,
    Scale,
    Scheme,
    SchemeError,
    Second,
    Streams,
    SubLayer,
    Where,
    evaluate,
)


@dataclass(frozen=True)
class Resolved:
    """A scheme for one stack of known depth; every formula is a number and no Norm has an open field.

    layers[i] is the layer with global 0-based index i. gains[i] maps a role to the gain of its initial weights there;
    roles without an entry have gain 1. distribution None: the user's (ModelConfig.init). encoder: of an encoder-decoder,
    whose decoder all else describes. streams: the ends of two streams; None: there is one.
    """

    scheme: str
    layers: tuple[Layer, ...]
    embedding: Norm | None
    final: Norm | None
    distribution: str | None
    gains: tuple[Mapping[str, float], ...]
    encoder: "Resolved | None" = None
    streams: Streams | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; ``from_json`` reads it back."""
        plain = asdict(self)
        return plain if self.encoder is not None else {key: item for key, item in plain.items() if key != "encoder"}


def scheme_of(config: NormConfig) -> Scheme:
    """The scheme that a config means, options and patch applied. Raises SchemeError."""
    for plugin in config.plugins:
        registry.load_plugin(plugin)
    scheme = registry.get(config.scheme, **config.options)
    return _patch(scheme, config.patch, "norm.patch") if config.patch else scheme


def resolve(
    config: NormConfig,
    layers: int,
    *,
    stack: Literal["only", "encoder", "decoder"] = "only",
    encoder_layers: int = 0,
    decoder_layers: int = 0,
) -> Resolved:
    """Resolve a config's scheme for a stack of ``layers`` layers. Raises SchemeError naming field and depth."""
    if layers < 1:
        raise SchemeError(f"model.layers: {layers} layers are no stack; give at least 1")
    scheme = scheme_of(config)
    depths = [Depth(i + 1, layers, stack, encoder_layers, decoder_layers) for i in range(layers)]
    resolved = []
    for depth in depths:
        chosen, path = scheme.layer, f"{scheme.name}: layer"
        for i, (where, layer) in enumerate(scheme.overrides):
            if where.holds(depth):
                chosen, path = layer, f"{scheme.name}: overrides[{i}]"
        resolved.append(_numbers(chosen, depth, config, path))
    return Resolved(
        scheme.name,
        tuple(resolved),
        _numbers(scheme.embedding, depths[0], config, f"{scheme.name}: embedding"),
        _numbers(scheme.final, depths[-1], config, f"{scheme.name}: final"),
        scheme.init.distribution,
        tuple(
            {r: evaluate(g, depth, f"{scheme.name}: init.gain.{r}") for r, g in scheme.init.gain.items()}
            for depth in depths
        ),
        streams=_numbers(scheme.streams, depths[0], config, f"{scheme.name}: streams"),
    )


def resolve_pair(config: NormConfig, encoder_layers: int, decoder_layers: int) -> Resolved:
    """Resolve a config's scheme for an encoder-decoder: the decoder's stack, with the encoder's inside."""
    both = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    encoder = resolve(config, encoder_layers, stack="encoder", **both)
    return replace(resolve(config, decoder_layers, stack="decoder", **both), encoder=encoder)


def plain_norm(config: NormConfig) -> Norm:
    """The norm that a config's norms are where nothing else is said, for places outside the scheme."""
    return _fill(Norm(), config)


def from_json(data: Mapping[str, Any]) -> Resolved:
    """The inverse of ``Resolved.to_json``."""

    def norm(value: Mapping[str, Any] | None) -> Norm | None:
        return None if value is None else Norm(**value)

    def sublayer(cls: type, value: Mapping[str, Any]) -> Any:
        residual = dict(value["residual"])
        residual["skip"], residual["branch"] = Scale(**residual["skip"]), Scale(**residual["branch"])
        residual["gate"] = Gate(**residual["gate"]) if residual.get("gate") else None  # older files have none
        rest = {
            k: norm(v) if isinstance(v, Mapping) else v
            for k, v in value.items()
            if k not in ("residual", "second", "mix")
        }
        return cls(**rest, residual=Residual(**residual), second=second(value.get("second")), mix=mix(value.get("mix")))

    def second(value: Mapping[str, Any] | None) -> Second | None:
        if value is None:
            return None
        norms = {"start": norm(value["start"]), "read": norm(value["read"])}
        return Second(**norms, share=Scale(**value["share"]), write=value["write"])

    def mix(value: Mapping[str, Any] | None) -> Mix | None:
        return None if value is None else Mix(**{**value, "norm": norm(value["norm"])})

    def streams(value: Mapping[str, Any] | None) -> Streams | None:
        if value is None:
            return None
        return Streams(**{**value, "x": norm(value["x"]), "y": norm(value["y"]), "exit": mix(value.get("exit"))})

    layers = tuple(
        Layer(
            sublayer(Attention, layer["attention"]),
            sublayer(FFN, layer["ffn"]),
            None if layer["cross_attention"] is None else sublayer(Attention, layer["cross_attention"]),
        )
        for layer in data["layers"]
    )
    return Resolved(
        data["scheme"],
        layers,
        norm(data["embedding"]),
        norm(data["final"]),
        data["distribution"],
        tuple(dict(gain) for gain in data["gains"]),
        from_json(data["encoder"]) if data.get("encoder") else None,
        streams(data.get("streams")),
    )


def settled(resolved: Resolved, step: int) -> Resolved:
    """With every factor as it is after ``step`` optimizer steps, for a model that trains no further."""

    def fixed(scale: Scale) -> Scale:
        return replace(scale, value=grown(scale, step), warmup=0.0) if scale.warmup else scale

    def still(sub: SubLayer) -> SubLayer:
        skip, branch = fixed(sub.residual.skip), fixed(sub.residual.branch)
        return replace(sub, residual=replace(sub.residual, skip=skip, branch=branch))

    layers = tuple(layer.each(still) for layer in resolved.layers)
    encoder = None if resolved.encoder is None else settled(resolved.encoder, step)
    return replace(resolved, layers=layers, encoder=encoder)


def grown(scale: Scale, step: int) -> float:
    """A resolved factor in step ``step``."""
    value, warmup = float(scale.value), float(scale.warmup)  # type: ignore[arg-type]
    return value if step >= warmup else value * step / warmup


def moves(resolved: Resolved) -> bool:
    """Whether a factor changes from step to step."""
    return resolved != settled(resolved, 0)


def _numbers(value: Any, depth: Depth, config: NormConfig, path: str) -> Any:
    """``value`` (a dataclass of a scheme) with every formula evaluated and every open norm field filled."""
    if isinstance(value, Norm):
        value = _fill(value, config)
        if value.kind == "seednorm" and value.gain == "none":
            raise SchemeError(f"{path}.gain: seednorm is a gain that moves with its input; set norm.gain to vector")
    if callable(value) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return evaluate(value, depth, path)
    if is_dataclass(value) and not isinstance(value, type):
        counts = ("streams", "rounds", "mixed")  # whole numbers, no formulas
        changes = {
            f.name: _numbers(getattr(value, f.name), depth, config, f"{path}.{f.name}")
            for f in fields(value)
            if f.name not in counts
        }
        return replace(value, **changes)
    return value


def _fill(norm: Norm, config: NormConfig) -> Norm:
    kind = norm.kind or config.kind
    gain = norm.gain or ("scalar" if kind == "scalenorm" else "none" if kind == "l2" else config.gain)
    bias = norm.bias if norm.bias is not None else config.bias
    return replace(
        norm,
        kind=kind,
        gain=gain,
        bias=bias if bias is not None else kind in ("layernorm", "dyt", "derf"),
        eps=config.eps if norm.eps is None else norm.eps,
        cast=norm.cast or config.cast,
        alpha=config.alpha if norm.alpha is None else norm.alpha,
    )


_TYPES: dict[str, type] = {
    "layer": Layer, "attention": Attention, "cross_attention": Attention, "ffn": FFN, "residual": Residual,
    "skip": Scale, "branch": Scale, "gate": Gate, "init": Init, "input": Norm, "output": Norm, "post": Norm, "q": Norm,
    "k": Norm, "v": Norm, "context": Norm, "inner": Norm, "embedding": Norm, "final": Norm, "second": Second, "start": Norm,
    "read": Norm, "share": Scale, "streams": Streams, "x": Norm, "y": Norm, "mix": Mix, "norm": Norm, "exit": Mix,
}  # fmt: skip


def _patch(value: Any, changes: Mapping[str, Any], path: str) -> Any:
    """``value`` with the fields named in ``changes`` replaced; nested mappings patch nested dataclasses.

    "layer" patches a scheme's own layer, "all_layers" that and every override.
    """
    known = {f.name for f in fields(value)}
    made: dict[str, Any] = {}
    order = ("all_layers", "layer", "overrides")
    for key in sorted(changes, key=lambda key: order.index(key) if key in order else len(order)):
        change, here = changes[key], f"{path}.{key}"
        old = made.get(key, getattr(value, key, None))
        if isinstance(value, Scheme) and key == "all_layers":
            made["layer"] = _patch(value.layer, change, here)
            made["overrides"] = tuple((where, _patch(layer, change, here)) for where, layer in value.overrides)
        elif key not in known:
            raise SchemeError(f"{here}: no such field; there are {', '.join(sorted(known))}")
        elif isinstance(value, Scheme) and key == "overrides":
            base = made.get("layer", value.layer)
            made[key] = tuple(_override(item, base, f"{here}[{i}]") for i, item in enumerate(change))
        elif isinstance(change, Mapping) and key in _TYPES:
            made[key] = _patch(_TYPES[key]() if old is None else old, change, here)
        else:
            made[key] = change
    return replace(value, **made)


def _override(item: Mapping[str, Any], base: Layer, path: str) -> tuple[Where, Layer]:
    """One override from YAML: ``{first: 1, layer: {...}}``, ``{last: n, ...}`` or ``{fraction: [low, high], ...}``."""
    rules = [rule for rule in ("first", "last", "fraction") if rule in item]
    if len(rules) != 1 or set(item) - {*rules, "layer"}:
        raise SchemeError(f"{path}: give one of first, last, fraction, and layer (a patch of the scheme's own layer)")
    rule = rules[0]
    where = Where.fraction(*item[rule]) if rule == "fraction" else getattr(Where, rule)(item[rule])
    return where, _patch(base, item.get("layer", {}), f"{path}.layer")
