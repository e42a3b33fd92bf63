"""NormFormer: Pre-LN plus four independent additions (arXiv:2110.09456, equations 3 to 6).

    x + N_output(F_heads(N(x)))            output norm and head scale on attention
    skip * x + W_down N_inner(act(...))    norm inside the FFN; a learned skip vector (ResScale) on the FFN only

The paper scales heads before W_o; the published code scales slices of W_o's output. Both places are options.
"""

from typing import Any, Literal

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Residual, Scale, Scheme


@register
def normformer(
    head_scale: Literal["pre_projection", "post_projection"] | None = "pre_projection",
    attention_norm: bool = True,
    ffn_norm: bool = True,
    residual_scale: bool = False,
    placement: Literal["pre", "post"] = "pre",
) -> Scheme:
    """residual_scale: the paper finds it harmful from 1.3B up. placement "post": the same additions on Post-LN."""
    norms: dict[str, Any] = {"input": Norm()} if placement == "pre" else {"post": Norm()}
    skip = Scale(1.0, learned="width") if residual_scale else Scale()
    return Scheme(
        "normformer",
        "arXiv:2110.09456",
        "Pre-LN with output norm and head scale on attention, norm inside the FFN",
        layer=Layer(
            Attention(**norms, output=Norm() if attention_norm else None, head_scale=head_scale),
            FFN(**norms, inner=Norm() if ffn_norm else None, residual=Residual(skip=skip)),
        ),
        final=Norm() if placement == "pre" else None,
    )
