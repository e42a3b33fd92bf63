"""What a model holds, from its sizes alone: parameters by role, rows of a padded vocabulary. No torch."""

from typing import Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
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
    add("head", 0 if m.tied_head else m.vocab_size * d)
    add("bias", m.vocab_size if m.head_bias else 0)
    for value in (resolved.embedding, resolved.final):
        norm(value, 1, d)
    for layer in resolved.layers:
        for role, rows, columns in (("q", h * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, h * hd)):
            add(role, rows * columns)
            add("bias", rows if (m.biased_o if role == "o" else m.biased_qkv) else 0)
        for role in ("gate", "up") if m.gated else ("up",):
            add(role, m.ffn * d)
            add("bias", m.ffn if m.bias else 0)
        add("down", m.ffn * d)
        add("bias", d if m.bias else 0)
        a, f = layer.attention, layer.ffn
        for value in (a.input, a.output, a.post, f.input, f.output, f.post):
            norm(value, 1, d)
        for value, units in ((a.q, h), (a.k, kv), (a.v, kv), (a.context, h)):
            norm(value, units, hd)
        norm(f.inner, m.ffn, 1)
        add("scale", h if a.head_scale else 0)
        for part in (a, f):
            for scale in (part.residual.skip, part.residual.branch):
                if scale.learned and not (scale.shared and part is f):
                    add("scale", d if scale.learned == "width" else 1)
    return counts


def _norm_parameters(norm: Norm, units: int, width: int) -> int:
    n = width if norm.over == "head" else units * width
    gain = {"none": 0, "scalar": 1, "per_head": units * width}.get(norm.gain or "", n)
    extra = {"dyt": 1, "derf": 2, "seednorm": 2 * n}.get(norm.kind or "", 0)
    return gain + (n if norm.bias else 0) + extra
