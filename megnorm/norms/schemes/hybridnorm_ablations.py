"""The ablations of the HybridNorm paper, as its code builds them (arXiv:2503.04598, tables 4 and 6).

How a sub-layer places its norm:   none  x + F(x)      pre  x + F(N(x))      post  z = N(x); z + F(z)

"post" here adds to the normalized value: Post-LN with every norm moved by one site. A stack of it with a final norm is
Post-LN with an embedding norm. True Post-LN is ``postln``, true Mix-LN ``mixln``.
"""

from collections.abc import Callable

from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Residual, Scheme, Where
from megnorm.norms.schemes.hybridnorm import FROM_NORMED, heads

PLACES: dict[str, tuple[Norm | None, Residual]] = {
    "none": (None, Residual()),
    "pre": (Norm(), Residual()),
    "post": (Norm(), FROM_NORMED),
}

#   name           attention  FFN     norms per head
TABLE = {
    "first_qkv_pre": ("none", "post", "qkv"),
    "qkvc_post": ("none", "post", "qkvc"),
    "qkc_post": ("none", "post", "qkc"),
    "qk_post": ("none", "post", "qk"),
    "kv_post": ("none", "post", "kv"),
    "kc_post": ("none", "post", "kc"),
    "pre_qkv_post": ("pre", "post", "qkv"),
    "pre_qkv_pre": ("pre", "pre", "qkv"),
    "pre_qk_pre": ("pre", "pre", "qk"),
    "qkv_pre": ("none", "pre", "qkv"),
    "pre_post": ("pre", "post", ""),
    "post_pre": ("post", "pre", ""),
    "post_norm": ("post", "post", ""),
    "mix_ln": ("pre", "pre", ""),
}
OVERRIDES = {
    "first_qkv_pre": (Where.first(1), ("none", "pre", "qkv")),
    "mix_ln": (Where.fraction(0, 0.25), ("post", "post", "")),
}


def layer(attention: str, ffn: str, sites: str) -> Layer:
    (a, a_residual), (f, f_residual) = PLACES[attention], PLACES[ffn]
    return Layer(Attention(input=a, residual=a_residual, **heads(sites)), FFN(input=f, residual=f_residual))


def _words(attention: str, ffn: str, sites: str) -> str:
    return f"attention {attention}, FFN {ffn}" + (f", norms on {', '.join(sites)}" if sites else "")


def _factory(name: str) -> Callable[[], Scheme]:
    attention, ffn, sites = TABLE[name]
    where, first = OVERRIDES.get(name, (None, None))
    overrides = ((where, layer(*first)),) if where and first else ()
    summary = _words(attention, ffn, sites) + (f"; first layers: {_words(*first)}" if first else "")

    def build() -> Scheme:
        return Scheme(
            f"hybridnorm_{name}", "arXiv:2503.04598", summary, layer(attention, ffn, sites), overrides, final=Norm()
        )

    return build


for _name in TABLE:
    register(_factory(_name))
