"""What a model holds, from its sizes alone: parameters by role, those that a token meets, rows of a padded vocabulary.

No torch.
"""

from typing import Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import FFN, Norm


def padded_vocabulary(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows stored for a vocabulary: the least multiple of ``multiple * tp`` that holds it."""
    step = multiple * tp
    return -(-vocab_size // step) * step


def active_parameters(m: ModelConfig, resolved: Resolved) -> int:
    """Parameters that one token meets: of the experts of a layer those that it chooses."""
    return sum(count_parameters(m, resolved, experts=min(m.moe.top_k, m.moe.experts)).values())


def count_parameters(m: ModelConfig, resolved: Resolved, *, experts: int | None = None) -> dict[str, int]:
    """Logical parameters by role, as the built model has them. experts: counted in each sparse layer; None: all."""
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

    def feed_forward(spec: FFN, width: int, times: int = 1) -> None:
        for role in ("gate", "up") if m.gated else ("up",):
            add(role, times * width * d)
            add("bias", times * width if m.bias else 0)
        add("down", times * width * d)
        add("bias", times * d if m.bias else 0)
        for _ in range(times):
            norm(spec.inner, width, 1)

    for i, layer in enumerate(resolved.layers):
        for role, rows, columns in (("q", h * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, h * hd)):
            add(role, rows * columns)
            add("bias", rows if m.bias else 0)
        a, f = layer.attention, layer.ffn
        if m.sparse(i):
            feed_forward(f, m.expert_ffn, m.moe.experts if experts is None else experts)
            add("router", m.moe.experts * d)
        common = m.moe.shared_ffn if m.sparse(i) else m.ffn
        if common:
            feed_forward(f, common)
        for value in (a.input, a.output, a.post, f.input, f.output, f.post):
            norm(value, 1, d)
        for value, units in ((a.q, h), (a.k, kv), (a.v, kv), (a.context, h)):
            norm(value, units, hd)
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
