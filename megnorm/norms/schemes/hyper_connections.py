"""Hyper-connections: n residual streams, which each token reads, mixes and writes to with weights of its own.

    z = sum_s read_s X_s,  y = F(N(z)),  X_t' = sum_s mix_st X_s + write_t y

All streams begin as the embedding. The weights come from the streams themselves by a small learned map (norms/parts.py: Mix):

    hyper_connections   arXiv:2409.19606, algorithm 2 with tanh: each stream gives its own; the sum of all goes to N_f.
                        Sub-layer k (from 0, of its stack) begins by reading stream k mod n, and writes to all.
    mhc                 arXiv:2512.24880: all streams together give them; the mixing matrix is doubly stochastic, so that
                        no signal grows or dies on its way through many layers. As published with DeepSeek-V4, whose learned
                        read weights close the stack (exit "learned"; "mean": the streams' mean, as Megatron Core has it).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Init, Layer, Mix, Norm, Scheme, SchemeError, Streams


@register
def hyper_connections(streams: int = 4) -> Scheme:
    """streams: n."""

    def turn(place: int) -> Callable[[Depth], float]:
        """The stream that a layer's sub-layer of this number reads at first; a decoder has three in a layer."""
        return lambda d: float(((3 if d.stack == "decoder" else 2) * (d.index - 1) + place) % streams)

    def last(d: Depth) -> float:
        return turn(2 if d.stack == "decoder" else 1)(d)

    mix = Mix(streams, "tanh", Norm(kind="scalenorm", gain="one_plus", bias=False), first=turn(0))
    attention = Attention(Norm(), mix=mix)
    return Scheme(
        "hyper_connections",
        "arXiv:2409.19606",
        "n streams, mixed by weights that each token gives each of them",
        layer=Layer(
            attention,
            FFN(Norm(), mix=replace(mix, first=last)),
            cross_attention=replace(attention, mix=replace(mix, first=turn(1))),
        ),
        final=Norm(),
        init=Init(gain={"mix": 0.0}),
        streams=Streams(mixed=streams),
    )


@register
def mhc(
    streams: int = 4, rounds: int = 20, scale: float = 0.01, exit: Literal["learned", "mean"] = "learned"
) -> Scheme:
    """streams: n. rounds: of Sinkhorn's iteration. scale: where the learned factors of the maps start."""
    if exit not in ("learned", "mean"):
        raise SchemeError(f"mhc: exit: '{exit}' is neither 'learned' nor 'mean'")
    norm = Norm(kind="rmsnorm", gain="none", bias=False, eps=1e-6)
    mix = Mix(streams, "sinkhorn", norm, scale=scale, rounds=rounds)
    ends = Streams(mixed=streams, exit=mix) if exit == "learned" else Streams(mixed=streams, share=1.0 / streams)
    return Scheme(
        "mhc",
        "arXiv:2512.24880",
        "n streams, mixed by a doubly stochastic matrix of each token's own",
        layer=Layer(Attention(Norm(), mix=mix), FFN(Norm(), mix=mix)),
        final=Norm(),
        streams=ends,
    )
