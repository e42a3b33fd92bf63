"""What a model's family means: its tasks and options, its stacks, what pipeline stages share. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, resolve, resolve_pair
from megnorm.parallel import balance

# What each family can be trained for, and the options that only some families have.
TASKS = {"causal": ("causal",), "masked": ("masked",), "encdec": ("pairs", "spans"), "classifier": ("classes",)}
OPTIONS = {
    "encoder_layers": ("encdec",),
    "max_source_positions": ("encdec",),
    "shared_embedding": ("encdec",),
    "relative_buckets": ("masked", "encdec", "classifier"),
    "relative_distance": ("masked", "encdec", "classifier"),
    "segments": ("masked", "classifier"),
    "head_transform": ("masked",),
    "tied_head": ("causal", "masked", "encdec"),
    "head_bias": ("causal", "masked", "encdec"),
    "logit_scale": ("causal", "masked", "encdec"),
    "logit_softcap": ("causal", "masked", "encdec"),
    "classes": ("classifier",),
    "pooler": ("classifier",),
    "parallel_block": ("causal", "masked", "classifier"),
    "parallel_norm": ("causal", "masked", "classifier"),
    "padding_id": ("causal", "masked", "classifier"),
    "moe": ("causal",),
}


def problem(m: ModelConfig) -> str | None:
    """Why the family's options cannot be, in a sentence; None if they can."""
    for name, families in OPTIONS.items():
        if m.family not in families and getattr(m, name) != ModelConfig.__dataclass_fields__[name].default:
            return f"model.{name} has no meaning for model.family={m.family}, only for {' and '.join(families)}; leave it out"
    if m.family != "causal" and m.positions == "alibi":
        return f"model.positions=alibi looks back alone, which model.family={m.family} does not; use learned or rotary"
    if m.family != "causal" and m.attention.window is not None:
        return f"model.attention.window looks back alone, which model.family={m.family} does not; leave it out"
    if m.family == "encdec" and m.rope_scaling.kind == "dynamic":
        return (
            "model.rope_scaling.kind=dynamic turns all tokens anew with the length of a row, which a decoder's cache has not; "
            "use yarn or linear"
        )
    if m.family == "classifier" and m.classes < 1:
        return "model.classes is 0; set it to the number of classes, or to 1 for a model that tells a number"
    buckets = m.relative_buckets
    if buckets is not None and (buckets % 2 or m.relative_distance <= buckets // 2):
        return (
            f"model.relative_buckets={buckets} must be even, and model.relative_distance={m.relative_distance} above their "
            "half; T5 has 32 and 128"
        )
    if not 0.0 <= m.label_smoothing < 1.0:
        return f"model.label_smoothing={m.label_smoothing} must be in [0, 1)"
    return None


def resolve_model(m: ModelConfig) -> Resolved:
    """The scheme of a config for its stack, or for its two. Raises SchemeError."""
    if m.family == "encdec":
        return resolve_pair(m.norm, m.source_layers, m.layers)
    resolved = resolve(m.norm, m.layers)
    if m.parallel_norm == "each":
        return resolved
    layers = (replace(layer, ffn=replace(layer.ffn, input=None)) for layer in resolved.layers)
    return replace(resolved, layers=tuple(layers))


def unit_costs(m: ModelConfig, sequence: int, predicted: float = 1.0) -> tuple[int, ...]:
    """Training FLOPs a token of embedding, each layer (an encoder's before a decoder's), and head with the final norm.

    predicted: share of tokens that the head reads.
    """
    attention = m.heads * m.hd
    projections = m.width * (2 * attention + 2 * m.kv * m.hd)
    layers = [
        balance.unit_costs(1, projections + m.ffn_weights(i), attention, sequence, round(predicted * m.head_weights))
        for i in range(m.layers)
    ]
    start, first, end = layers[0]
    if not m.source_layers:
        return (start, *(layer for _, layer, _ in layers), end)
    _, crossing, _ = balance.unit_costs(1, projections, attention, sequence, 0)
    return (start, *(first,) * m.source_layers, *(layer + crossing for _, layer, _ in layers), end)


def ties(m: ModelConfig, stages: Sequence[tuple[int, int]], pp: int) -> dict[str, tuple[int, ...]]:
    """By name, the pp ranks that hold the same parameter, beside a tied head of one stack (``Mesh.ends``).

    stages: [first, last) layers of each, the encoder's before the decoder's.
    """
    source, total = m.source_layers, m.source_layers + m.layers

    def ranks(layers: Iterable[int]) -> tuple[int, ...]:
        wanted = set(layers)
        return tuple(sorted({i % pp for i, stage in enumerate(stages) if wanted & set(range(*stage))}))

    found = {}
    if m.family == "encdec" and (m.shared_embedding or m.tied_head):
        ends = [*([0] if m.shared_embedding else []), source, *([total - 1] if m.tied_head else [])]
        found["embed"] = ranks(ends)
    if m.relative_buckets and m.family == "encdec":
        found |= {"encoder.relative": ranks(range(source)), "decoder.relative": ranks(range(source, total))}
    elif m.relative_buckets:
        found["relative"] = ranks(range(total))
    return found
