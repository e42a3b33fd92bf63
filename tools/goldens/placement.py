"""HybridNorm's placement lists -> a normalization scheme, by wiring and not by name.

Each layer says, for attention and for the FFN, one of

    none        x + F(x)            pre_norm    x + F(N(x))        norm_then_residual_from_normed    z = N(x); z + F(z)

If a registered scheme has that wiring at this depth it is taken; else "nonorm" is patched layer by layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from goldens.case import choose, field
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from megnorm.norms.scheme import SchemeError

WORDS = {"none": "none", "pre_norm": "pre", "norm_then_residual_from_normed": "normed"}
SITES = {"query": "q", "key": "k", "value": "v", "context": "context"}


def norm_of(config: Mapping[str, Any]) -> NormConfig:
    """The scheme of a golden's ``placement_per_layer`` and ``per_head_norms``, with a final norm."""
    per_head = field(config, "per_head_norms")
    layers = [
        _layer(field(entry, "attention_sublayer"), field(entry, "ffn_sublayer"), per_head)
        for entry in field(config, "placement_per_layer")
    ]
    if len(layers) != field(config, "layers"):
        raise ValueError(f"config.placement_per_layer has {len(layers)} entries for {config['layers']} layers")
    wanted = NormConfig(scheme="nonorm", options={"depth_gain": False, "final_norm": True}, patch=_patch(layers))
    return _registered(wanted, len(layers)) or wanted


def _layer(attention: str, ffn: str, per_head: Mapping[str, Any]) -> dict[str, Any]:
    heads = {site: {"over": "head"} if per_head.get(word) else None for word, site in SITES.items()}
    return {"attention": {**_sublayer(attention), **heads}, "ffn": _sublayer(ffn)}


def _sublayer(words: str) -> dict[str, Any]:
    place = choose(WORDS, words, "placement_per_layer")
    source = "input" if place == "normed" else "stream"
    return {"input": None if place == "none" else {}, "residual": {"source": source}}


def _patch(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of equal layers, from the top: the last is the scheme's layer, each run below an override of the first n."""
    ends = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
    overrides = [{"first": end, "layer": layers[end - 1]} for end in reversed(ends)]
    return {"layer": layers[-1], **({"overrides": overrides} if overrides else {})}


def _registered(wanted: NormConfig, layers: int) -> NormConfig | None:
    """The registered scheme, without options, that resolves to the same layers and final norm.

    Of several the one without exceptions by depth (a quarter of two layers is none), then HybridNorm's own.
    """
    target = resolve(wanted, layers)

    def rank(name: str) -> tuple[int, bool, str]:
        return len(registry.get(name).overrides), not name.startswith("hybridnorm"), name

    for name in sorted(registry.names(), key=rank):
        try:
            found = resolve(NormConfig(scheme=name), layers)
        except SchemeError:
            continue
        if (found.layers, found.embedding, found.final) == (target.layers, None, target.final):
            return NormConfig(scheme=name)
    return None
