"""Sub-LN: Pre-LN with one more norm inside each sub-layer, before W_o and before W_down (Magneto, arXiv:2210.06423).

    x + W_o N(heads(N(x)))        x + W_down N(act(W_up N(x)))

Cross-attention is plain Pre-LN. The init gain of v, o and the FFN grows with depth:

    only, L layers  sqrt(ln 2L)      encoder of (N, M)  sqrt(ln(3M) ln(2N) / 3)      decoder of (N, M)  sqrt(ln 3M)
"""

from math import log, sqrt

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Depth, Init, Layer, Norm, Scheme


def gamma(d: Depth) -> float:
    if d.stack == "encoder":
        return sqrt(log(3 * d.decoder_layers) * log(2 * d.encoder_layers) / 3)
    return sqrt(log((3 if d.stack == "decoder" else 2) * d.layers))


@register
def subln() -> Scheme:
    return Scheme(
        "subln",
        "arXiv:2210.06423",
        "Pre-LN with norms before W_o and W_down, init scaled up with depth",
        layer=Layer(
            Attention(input=Norm(), context=Norm()),
            FFN(input=Norm(), inner=Norm()),
            cross_attention=Attention(input=Norm()),
        ),
        final=Norm(),
        init=Init(
            "xavier_normal",
            {**dict.fromkeys(("v", "o", "up", "gate", "down"), gamma), "cross.v": 1.0, "cross.o": 1.0},
        ),
    )
