"""Pre-LN with norms on q and k, or on v, after projection and before RoPE (arXiv:2302.05442, arXiv:2010.04245).

Over each head with one shared gain (Qwen3), over the full width (OLMo), or with a gain for every head.
"""

from typing import Literal

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


def _preln(name: str, paper: str, summary: str, attention: Attention) -> Scheme:
    return Scheme(name, paper, summary, layer=Layer(attention, FFN(input=Norm())), final=Norm())


@register
def qknorm(over: Literal["head", "width"] = "head", gain: Literal["shared", "per_head"] = "shared") -> Scheme:
    """gain "per_head" (over heads only): every head has its own vector."""
    norm = Norm(over, gain="per_head" if gain == "per_head" else None)
    attention = Attention(input=Norm(), q=norm, k=norm)
    return _preln("qknorm", "arXiv:2302.05442", "Pre-LN with q and k norms", attention)


@register
def qknorm_l2(logit_scale: float = 10.0, learned: Literal["scalar", "per_head"] | None = None) -> Scheme:
    """Cosine attention: softmax(logit_scale * cos(q, k)).

    learned "scalar": logit_scale is where one learned factor a layer starts. "per_head": q and k are L2-normalized and
    each head has its own gain vector; logits are then divided by sqrt(hd) as ever and logit_scale is not used.
    Softmax divides by sqrt(hd) and RMS(q) = sqrt(hd) * q / |q|, so RMS on q beside L2 on k leaves logit_scale alone.
    """
    if learned == "per_head":
        q = k = Norm("head", kind="l2", gain="per_head")
    elif learned == "scalar":
        q, k = Norm("head", "rmsnorm", "scalar", eps=1e-12, weight_init=logit_scale), Norm("head", kind="l2")
    else:
        q, k = Norm("head", "rmsnorm", "none", eps=1e-12, scale=logit_scale), Norm("head", kind="l2")
    attention = Attention(input=Norm(), q=q, k=k)
    return _preln("qknorm_l2", "arXiv:2010.04245", "Pre-LN, attention by cosine", attention)


@register
def valuenorm(gain: Literal["shared", "per_head"] = "shared") -> Scheme:
    """gain "per_head": every kv head has its own vector (x-transformers)."""
    norm = Norm("head", gain="per_head" if gain == "per_head" else None)
    attention = Attention(input=Norm(), v=norm)
    return _preln("valuenorm", "x-transformers", "Pre-LN with a norm on v per head", attention)
