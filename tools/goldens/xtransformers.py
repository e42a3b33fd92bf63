"""x-transformers in the frontier format: no positions, a bias on the GLU projection only, norms without eps."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from goldens.case import field, take, with_defaults, with_ends
from goldens.renaming import Renamed
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig

KINDS = {
    "use_rmsnorm": ("rmsnorm", "vector"), "use_simple_rmsnorm": ("rmsnorm", "none"),
    "use_scalenorm": ("scalenorm", "vector"), "use_dynamic_tanh": ("dyt", "vector"), "use_derf": ("derf", "vector"),
}  # fmt: skip
KNOWN = {
    "dim", "depth", "heads", "attn_dim_head", "ff_glu", "ff_swish", "ff_no_bias", "ff_mult", "attn_flash", "num_tokens",
    "position", "mlp", "norm_add_unit_offset", "pre_norm", "pre_and_post_norm", "sandwich_norm", "scale_residual",
    "scale_residual_constant", "use_layerscale", "layerscale_init_value", "attn_qk_norm", "attn_qk_norm_scale",
    "attn_qk_norm_dim_scale", "attn_value_rmsnorm", "resi_dual", "resi_dual_scale", *KINDS,
}  # fmt: skip
NORMS = {"0": "input_norm", "1": "output_norm", "2": "post_norm"}
LEAVES = {
    "g": "weight", "gamma": "weight", "beta": "bias", "pre_tanh_scale": "alpha", "alpha": "alpha", "s": "shift",
}  # fmt: skip
OUTSIDE = {"token_emb.emb.weight": "embed.token.weight", "to_logits.weight": "head.weight"}
BRANCH = {
    "to_q.weight": [Renamed("attention.q.weight")],
    "to_k.weight": [Renamed("attention.k.weight")],
    "to_v.weight": [Renamed("attention.v.weight")],
    "to_out.weight": [Renamed("attention.o.weight")],
    "qk_norm_q_scale": [Renamed("attention.q_norm.weight", drop=1)],
    "qk_norm_k_scale": [Renamed("attention.k_norm.weight", drop=1)],
    "value_rmsnorm.gamma": [Renamed("attention.v_norm.weight", drop=1, plus=1.0)],
    "ff.0.proj.weight": [Renamed("ffn.up.weight", (0, 2)), Renamed("ffn.gate.weight", (1, 2))],
    "ff.0.proj.bias": [Renamed("ffn.up.bias", (0, 2)), Renamed("ffn.gate.bias", (1, 2))],
    "ff.2.weight": [Renamed("ffn.down.weight")],
    "ff.2.bias": [Renamed("ffn.down.bias")],
}


def model(data: Mapping[str, Any], params: Mapping[str, Tensor]) -> ModelConfig:
    """The model of an x-transformers golden."""
    config = data["config"]
    for key, value in config.items():
        if key not in KNOWN and value not in (False, None, 0, 0.0):
            raise ValueError(f"config.{key}: not an option that the format documents")
    if not str(field(config, "position")).startswith("none"):
        raise ValueError(f"config.position: '{config['position']}' is not documented; known is none")
    if not config.get("ff_glu"):
        raise ValueError("config.ff_glu: only the gated feed-forward is documented")
    if config.get("norm_add_unit_offset"):
        raise ValueError("config.norm_add_unit_offset: gains stored minus one are not documented")
    hd = field(config, "attn_dim_head")
    return ModelConfig(
        layers=field(config, "depth"),
        width=field(config, "dim"),
        heads=field(config, "heads"),
        kv_heads=_attention(params, "to_k.weight").shape[0] // hd,
        head_dim=hd,
        ffn=_attention(params, "ff.2.weight", 1).shape[1],
        vocab_size=field(config, "num_tokens"),
        activation="swiglu" if config.get("ff_swish") else "geglu",
        positions="none",
        tied_head="to_logits.weight" not in params,
        bias=any(name.endswith(".proj.bias") for name in params),
        norm=_norm(config, any(name.startswith("attn_layers.final_norm.") for name in params)),
    )


def _attention(params: Mapping[str, Tensor], name: str, sublayer: int = 0) -> Tensor:
    wrapped = f"attn_layers.layers.{sublayer}.1.fn.{name}"
    return params[wrapped] if wrapped in params else take(params, f"attn_layers.layers.{sublayer}.1.{name}")


def _norm(config: Mapping[str, Any], final: bool) -> NormConfig:
    kinds = [kind for flag, kind in KINDS.items() if config.get(flag)]
    if len(kinds) > 1:
        raise ValueError(f"config: more than one kind of norm ({', '.join(k for k in KINDS if config.get(k))})")
    kind, gain = kinds[0] if kinds else ("layernorm", "vector")
    scheme = _scheme(config)
    # ResiDual's norm of that name is the second stream's.
    norm = with_ends(scheme, embedding=False, final=final and not config.get("resi_dual"))
    if kind == "layernorm":
        return with_defaults(norm, kind=kind, bias=False, eps=1e-5)
    return with_defaults(norm, kind=kind, gain=gain, eps=0.0)


def _scheme(config: Mapping[str, Any]) -> NormConfig:
    """The scheme of that name for Pre-LN with one addition; additions to other placements are patches."""
    constant = float(config.get("scale_residual_constant", 1.0))
    added = _additions(config)
    if config.get("pre_and_post_norm"):
        own = constant == 2 * field(config, "depth")
        return NormConfig("keel", {"exceptions": False, **({} if own else {"skip": constant})}, _merge(added))
    if constant != 1.0:
        change = {"residual": {"skip": {"value": constant}}}
        added.append((None, {"attention": change, "ffn": change}))
    if config.get("resi_dual"):
        scale = float(config.get("resi_dual_scale", 1.0))
        return NormConfig("resi_dual", {} if scale == 1.0 else {"scale": scale}, _merge(added))
    if config.get("sandwich_norm"):
        return NormConfig("sandwich", patch=_merge(added))
    if config.get("pre_norm", True) is False:
        return NormConfig("postln", patch=_merge(added))
    if len(added) == 1 and added[0][0] is not None:
        return added[0][0]
    return NormConfig("preln", patch=_merge(added))


Added = tuple[NormConfig | None, dict[str, Any]]


def _additions(config: Mapping[str, Any]) -> list[Added]:
    """Each addition as a Pre-LN scheme of its own, and as a patch of all layers."""
    added: list[Added] = []
    if config.get("use_layerscale"):
        start = float(config.get("layerscale_init_value", 0.0))
        change = {"residual": {"branch": {"value": start, "learned": "width"}}}
        added.append((NormConfig("layerscale", {"start": start}), {"attention": change, "ffn": change}))
    if config.get("scale_residual"):
        change = {"residual": {"skip": {"value": 1.0, "learned": "width"}}}
        added.append((NormConfig("resscale"), {"attention": change, "ffn": change}))
    if config.get("attn_qk_norm"):
        added.append(_qk(config))
    if config.get("attn_value_rmsnorm"):
        rms = {"over": "head", "kind": "rmsnorm", "gain": "per_head", "bias": False, "eps": 0.0}
        plain = config.get("use_rmsnorm")
        added.append((NormConfig("valuenorm", {"gain": "per_head"}) if plain else None, {"attention": {"v": rms}}))
    return added


def _qk(config: Mapping[str, Any]) -> Added:
    unit: dict[str, Any] = {"over": "head", "kind": "l2"}
    if config.get("attn_qk_norm_dim_scale"):
        both = {"q": {**unit, "gain": "per_head"}, "k": {**unit, "gain": "per_head"}}
        return NormConfig("qknorm_l2", {"learned": "per_head"}), {"attention": both}
    scale = float(config.get("attn_qk_norm_scale", 10.0))
    query = {"over": "head", "kind": "rmsnorm", "gain": "none", "bias": False, "eps": 0.0, "scale": scale}
    return NormConfig("qknorm_l2", {"logit_scale": scale}), {"attention": {"q": query, "k": unit}}


def _merge(added: list[Added]) -> dict[str, Any]:
    def join(old: Any, new: Any) -> Any:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return {key: join(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}
        return new

    merged: dict[str, Any] = {}
    for _, change in added:
        merged = join(merged, change)
    return {"all_layers": merged} if merged else {}


def renaming(data: Mapping[str, Any]) -> Callable[[str], list[Renamed]]:
    """Reference name -> canonical names. ResiDual's norm behind the layers is the second stream's."""
    return partial(rename, final="joined.y_norm" if data["config"].get("resi_dual") else "final_norm")


def rename(name: str, final: str = "final_norm") -> list[Renamed]:
    """Reference name -> canonical names. Module 2i is the attention of layer i, 2i + 1 its feed-forward."""
    if name in OUTSIDE:
        return [Renamed(OUTSIDE[name])]
    last = re.fullmatch(r"attn_layers\.final_norm\.(\w+)", name)
    if last and last.group(1) in LEAVES:
        return [_leaf(final, last.group(1))]
    match = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(\d)\.(.+)", name)
    if match is not None:
        module, slot, rest = int(match.group(1)), match.group(2), match.group(3)
        layer, part = module // 2, ("attention", "ffn")[module % 2]
        if slot == "0" and (norm := re.fullmatch(r"([012])\.(\w+)", rest)) and norm.group(2) in LEAVES:
            return [_leaf(f"blocks.{layer}.{part}.{NORMS[norm.group(1)]}", norm.group(2))]
        if slot == "1" and rest.removeprefix("fn.") in BRANCH:
            parts = BRANCH[rest.removeprefix("fn.")]
            return [Renamed(f"blocks.{layer}.{p.name}", p.rows, p.drop, p.vector, p.plus) for p in parts]
        factors = {("1", "gamma"): "branch", ("2", "residual_scale"): "skip"}
        if (slot, rest) in factors:
            return [Renamed(f"blocks.{layer}.{part}.residual.{factors[slot, rest]}")]
    raise ValueError(f"the parameter '{name}' is not documented")


def _leaf(norm: str, leaf: str) -> Renamed:
    word = LEAVES[leaf]
    return Renamed(f"{norm}.{word}", vector=word in ("alpha", "shift"))


def absent_biases(model: ModelConfig, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Biases that megnorm builds with ``bias: true`` and the reference does not have."""
    if not model.bias:
        return frozenset()
    parts = [f"attention.{m}" for m in "qkvo"] + [f"ffn.{m}" for m in ("up", "gate", "down")]
    names = {f"blocks.{i}.{part}.bias" for i in range(model.layers) for part in parts}
    return frozenset(names - set(weights))
