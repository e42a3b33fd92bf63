"""Models that cannot be: each function says why in a sentence, or gives None. No torch."""

from megnorm.models import family
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import SubLayer
from megnorm.parallel.divisors import near


def model_problem(m: ModelConfig) -> str | None:
    """Sizes that contradict each other, and options that the family does not have."""
    problem = family.problem(m)
    if problem is not None:
        return problem
    if m.head_dim is None and m.width % m.heads:
        fitting = near(m.width, m.heads)
        return f"model.heads={m.heads} does not divide model.width={m.width}; set model.head_dim or use {fitting}"
    if m.heads % m.kv:
        return f"model.kv_heads={m.kv} does not divide model.heads={m.heads}; use {near(m.heads, m.kv)}"
    if m.parallel_norm == "one" and not m.parallel_block:
        return "model.parallel_norm=one is for branches side by side; set model.parallel_block=true or leave it out"
    if m.positions == "rotary" and m.hd % 2:
        return f"model.head_dim is {m.hd}; rotary positions need an even one"
    if m.padding_id is not None and not 0 <= m.padding_id < m.vocab_size:
        return f"model.padding_id={m.padding_id} is outside the vocabulary of {m.vocab_size}"
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= getattr(m, name) < 1.0:
            return f"model.{name}={getattr(m, name)} must be in [0, 1)"
    if m.moe.experts and not m.sparse_layers:
        return (
            f"model.moe: none of the {m.layers} layers is sparse with first={m.moe.first} and every={m.moe.every}; lower one "
            "of them, or set model.moe.experts=0"
        )
    return None


def scheme_problem(m: ModelConfig, resolved: Resolved) -> str | None:
    """Combinations of scheme and model that mean nothing."""
    if len(resolved.layers) != m.layers:
        return f"model.layers={m.layers}, but the checkpoint's scheme has {len(resolved.layers)} layers"
    source = () if resolved.encoder is None else resolved.encoder.layers
    if len(source) != m.source_layers:
        return f"model.encoder_layers={m.source_layers}, but the checkpoint's scheme has {len(source)} for it"
    for i, layer in enumerate((*resolved.layers, *source)):
        places = {part.head_scale for part in (layer.attention, layer.cross_attention) if part is not None}
        if "post_projection" in places and m.heads * m.hd != m.width:
            return (
                f"head_scale=post_projection cuts the width in heads, but model.heads*head_dim={m.heads * m.hd} is not "
                f"model.width={m.width}; use pre_projection"
            )
        if m.parallel_block and not (_runs_beside(layer.attention) and _runs_beside(layer.ffn)):
            return (
                f"model.parallel_block: layer {i} of scheme '{resolved.scheme}' has a post norm, a gate or several streams, "
                "scales the skip, or adds to something else than the stream, which has no meaning for branches that run side "
                "by side; use a pre-norm scheme"
            )
        if m.parallel_norm == "one" and layer.attention.input is None:
            return (
                f"model.parallel_norm=one: layer {i} of scheme '{resolved.scheme}' has no norm before attention that the "
                "feed-forward could share; use parallel_norm=each"
            )
    return None


def _runs_beside(part: SubLayer) -> bool:
    """Whether a sub-layer only adds to the stream, as x + A(..) + F(..) needs."""
    residual = part.residual
    plain = residual.skip.learned is None and residual.skip.value == 1.0 and not residual.layer_input
    return (
        plain
        and residual.gate is None
        and part.second is None
        and part.mix is None
        and part.post is None
        and residual.source == "stream"
    )


def expert_problem(m: ModelConfig, *, tp: int, ep: int, dp: int, pp: int) -> str | None:
    """Experts that do not split over these ranks."""
    if not m.moe.experts:
        shared = f"parallel.ep={ep} shares experts, but model.moe.experts is 0; set one of them otherwise"
        return shared if ep > 1 else None
    if m.moe.balance_across == "layers" and m.moe.balance_loss and pp > 1:
        return (
            f"model.moe.balance_across=layers asks for the loads of all layers at once, but parallel.pp={pp} runs them in turn;"
            " use balance_across=layer or parallel.pp=1"
        )
    if dp % ep:
        return f"parallel.ep={ep} does not divide the {dp} data-parallel ranks; use {near(dp, ep)}"
    if m.moe.experts % ep:
        return f"parallel.ep={ep} does not divide model.moe.experts={m.moe.experts}; use {near(m.moe.experts, ep)}"
    for key, width in (("ffn", m.expert_ffn), ("shared_ffn", m.moe.shared_ffn)):
        if width % tp:
            return (
                f"model.moe.{key}: {width} is not divisible by parallel.tp={tp}; use {near(width, tp)}, or "
                f"model.moe.{key}={-(-width // tp) * tp}"
            )
    return None
