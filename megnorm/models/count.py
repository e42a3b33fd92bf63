"""What a model holds, from its sizes alone: parameters by role, those that a token meets, rows of a padded vocabulary.

No torch.
"""

from collections.abc import Sequence
from typing import Any

from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved, plain_norm
from megnorm.norms.scheme import FFN, Attention, Mix, Norm, Second


def padded_vocabulary(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows stored for a vocabulary: the least multiple of ``multiple * tp`` that holds it."""
    step = multiple * tp
    return -(-vocab_size // step) * step


def active_parameters(m: ModelConfig, resolved: Resolved) -> int:
    """Parameters that one token meets: of the experts of a layer those that it chooses."""
    return sum(count_parameters(m, resolved, experts=min(m.moe.top_k, m.moe.experts)).values())


def count_parameters(m: ModelConfig, resolved: Resolved, *, experts: int | None = None) -> dict[str, int]:
    """Logical parameters by role, as the built model has them. experts: counted in each sparse layer; None: all."""
    tally = _Tally(m)
    stacks = [resolved] if resolved.encoder is None else [resolved, resolved.encoder]
    tally.ends(resolved, stacks)
    for stack in stacks:
        for i, layer in enumerate(stack.layers):
            attentions = [layer.attention]
            if resolved.encoder is not None and stack is resolved:
                attentions.append(layer.cross_attention or layer.attention)
            for attention in attentions:
                tally.attention(attention)
            if m.sparse(i):
                tally.feed_forward(layer.ffn, m.expert_ffn, m.moe.experts if experts is None else experts)
                tally.add("router", m.moe.experts * m.width)
            common = m.moe.shared_ffn if m.sparse(i) else m.ffn
            if common:
                tally.feed_forward(layer.ffn, common)
            for place, part in enumerate((*attentions, layer.ffn)):
                second = part.second or Second()
                for value in (second.start, second.read, part.input, part.output, part.post):
                    tally.norm(value, 1, m.width)
                for scale in (part.residual.skip, part.residual.branch, second.share):
                    if scale.learned and not (scale.shared and place):
                        tally.add("scale", m.width if scale.learned == "width" else 1)
                if part.mix is not None:
                    tally.mix(part.mix)
                gate = part.residual.gate
                if gate is not None and not (gate.shared and place):
                    tally.add("scale", 1)
    return tally.counts


class _Tally:
    def __init__(self, m: ModelConfig) -> None:
        self.m = m
        self.counts: dict[str, int] = {}

    def add(self, role: str, n: int) -> None:
        if n:
            self.counts[role] = self.counts.get(role, 0) + n

    def norm(self, value: Any, units: int, width: int) -> None:
        if isinstance(value, Norm):
            self.add("norm", _norm_parameters(value, units, width))

    def ends(self, resolved: Resolved, stacks: Sequence[Resolved]) -> None:
        """What stands before and behind the layers."""
        m, d, add = self.m, self.m.width, self.add
        add("embed", m.vocab_size * d)
        add("position", m.max_positions * d if m.positions == "learned" else 0)
        if m.classes:
            add("head", m.classes * d + m.pooler * d * d)
            add("bias", m.classes + m.pooler * d)
        else:
            add("head", 0 if m.tied_head else m.vocab_size * d)
            add("bias", m.vocab_size if m.head_bias else 0)
        if resolved.encoder is not None:
            add("embed", 0 if m.shared_embedding else m.vocab_size * d)
            add("position", m.source_positions * d if m.positions == "learned" else 0)
        add("position", m.segments * d + len(stacks) * (m.relative_buckets or 0) * m.heads)
        if m.head_transform:
            add("head", d * d)
            add("bias", d)
            self.norm(plain_norm(m.norm), 1, d)
        for value in (norms for stack in stacks for norms in (stack.embedding, stack.final)):
            self.norm(value, 1, d)
        for ends in (stack.streams for stack in stacks if stack.streams is not None):
            self.norm(ends.x, 1, d)
            self.norm(ends.y, 1, d)
            if ends.exit is not None:
                self.mix(ends.exit, exits=True)

    def mix(self, mix: Mix, *, exits: bool = False) -> None:
        kinds, units = mix.kinds(exits=exits), 1 if mix.rule == "tanh" else mix.streams
        self.add("scale", max(kinds) + 1 + mix.biases(exits=exits))
        self.add("mix", len(kinds) * units * self.m.width)
        self.norm(mix.norm, units, self.m.width)

    def attention(self, a: Attention) -> None:
        m = self.m
        d, h, kv, hd = m.width, m.heads, m.kv, m.hd
        for role, rows, columns in (("q", h * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, h * hd)):
            self.add(role, rows * columns)
            self.add("bias", rows if (m.biased_o if role == "o" else m.biased_qkv) else 0)
        for value, units in ((a.q, h), (a.k, kv), (a.v, kv), (a.context, h)):
            self.norm(value, units, hd)
        self.add("scale", h if a.head_scale else 0)

    def feed_forward(self, spec: FFN, width: int, times: int = 1) -> None:
        m = self.m
        for role in ("gate", "up") if m.gated else ("up",):
            self.add(role, times * width * m.width)
            self.add("bias", times * width if m.bias else 0)
        self.add("down", times * width * m.width)
        self.add("bias", times * m.width if m.bias else 0)
        for _ in range(times):
            self.norm(spec.inner, width, 1)


def _norm_parameters(norm: Norm, units: int, width: int) -> int:
    n = width if norm.over == "head" else units * width
    gain = {"none": 0, "scalar": 1, "per_head": units * width}.get(norm.gain or "", n)
    extra = {"dyt": 1, "derf": 2, "seednorm": 2 * n}.get(norm.kind or "", 0)
    return gain + (n if norm.bias else 0) + extra
