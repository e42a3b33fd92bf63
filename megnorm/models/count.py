"""What a model holds, from its sizes alone: parameters by role, rows of a padded vocabulary. No torch."""

from typing import Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, plain_norm
from megnorm.norms.scheme import Norm


def padded_vocabulary(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows stored for a vocabulary: the least multiple of ``multiple * tp`` that holds it."""
    step = multiple * tp
    return -(-vocab_size // step) * step


def count_parameters(m: ModelConfig, resolved: Resolved) -> dict[str, int]:
    """Logical parameters by role, as the built model has them."""
    counts: dict[str, int] = {}

    def add(role: str, n: int) -> None:
        if n:
            counts[role] = counts.get(role, 0) + n

    def norm(value: Any, units: int, width: int) -> None:
        if isinstance(value, Norm):
            add("norm", _norm_parameters(value, units, width))

    d, h, kv, hd = m.width, m.heads, m.kv, m.hd
    add("embed", m.vocab_size * d)
    add("position", m.max_positions * d if m.positions == "learned" else 0)
    if m.classes:
        add("head", m.classes * d + m.pooler * d * d)
        add("bias", m.classes + m.pooler * d)
    else:
        add("head", 0 if m.tied_head else m.vocab_size * d)
        add("bias", m.vocab_size if m.head_bias else 0)
    stacks = [resolved] if resolved.encoder is None else [resolved, resolved.encoder]
    if resolved.encoder is not None:
        add("embed", 0 if m.shared_embedding else m.vocab_size * d)
        add("position", m.source_positions * d if m.positions == "learned" else 0)
    add("position", m.segments * d + len(stacks) * (m.relative_buckets or 0) * h)
    if m.head_transform:
        add("head", d * d)
        add("bias", d)
        norm(plain_norm(m.norm), 1, d)
    for value in (norms for stack in stacks for norms in (stack.embedding, stack.final)):
        norm(value, 1, d)
    for layer in (layer for stack in stacks for layer in stack.layers):
        attentions = [layer.attention]
        if resolved.encoder is not None and any(layer is one for one in resolved.layers):
            attentions.append(layer.cross_attention or layer.attention)
        for a in attentions:
            for role, rows, columns in (("q", h * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, h * hd)):
                add(role, rows * columns)
                add("bias", rows if m.bias else 0)
            for value, units in ((a.q, h), (a.k, kv), (a.v, kv), (a.context, h)):
                norm(value, units, hd)
            add("scale", h if a.head_scale else 0)
        for role in ("gate", "up") if m.gated else ("up",):
            add(role, m.ffn * d)
            add("bias", m.ffn if m.bias else 0)
        add("down", m.ffn * d)
        add("bias", d if m.bias else 0)
        norm(layer.ffn.inner, m.ffn, 1)
        for i, part in enumerate((*attentions, layer.ffn)):
            for value in (part.input, part.output, part.post):
                norm(value, 1, d)
            for scale in (part.residual.skip, part.residual.branch):
                if scale.learned and not (scale.shared and i):
                    add("scale", d if scale.learned == "width" else 1)
    return counts


def _norm_parameters(norm: Norm, units: int, width: int) -> int:
    n = width if norm.over == "head" else units * width
    gain = {"none": 0, "scalar": 1, "per_head": units * width}.get(norm.gain or "", n)
    extra = {"dyt": 1, "derf": 2, "seednorm": 2 * n}.get(norm.kind or "", 0)
    return gain + (n if norm.bias else 0) + extra
