"""The equations themselves against numbers that the published code gave: logits of small random models."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.reference.equations import reference_forward
from tests.reference.model import Model, Tensor

# file: scheme, options, norm kind
FRONTIER: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixln_pre": ("preln", {}, "rmsnorm"),
    "mixln_post": ("postln", {"final_norm": True}, "rmsnorm"),
    "mixln_post_pre": ("mixln", {"post_layers": 1}, "rmsnorm"),
    "mixln_sandwich": ("sandwich", {}, "rmsnorm"),
    "mixln_deeppost": ("deepnorm_llama", {"skip": 2.8284271247461903}, "rmsnorm"),
    "gpas_repo_deeppost": ("deepnorm_llama", {}, "rmsnorm"),
    "mixln_scale_pre": ("preln", {}, "rmsnorm"),
    "mixln_scale_res_pre_norm": ("skipinit", {}, "rmsnorm"),
    "lns": ("lns", {}, "rmsnorm"),
    "xt_pre_rms": ("preln", {}, "rmsnorm"),
    "xt_post_rms": ("postln", {}, "rmsnorm"),
    "xt_sandwich": ("sandwich", {}, "rmsnorm"),
    "xt_keel": ("keel", {"exceptions": False}, "rmsnorm"),
    "xt_layerscale": ("layerscale", {}, "rmsnorm"),
    "xt_scale_residual": ("resscale", {}, "rmsnorm"),
    "xt_qk_norm": ("qknorm_l2", {}, "rmsnorm"),
    "xt_qk_norm_dim_scale": ("qknorm_l2", {"learned": "per_head"}, "rmsnorm"),
    "xt_value_rmsnorm": ("valuenorm", {"gain": "per_head"}, "rmsnorm"),
    "xt_scalenorm": ("preln", {}, "scalenorm"),
    "xt_dyt": ("preln", {}, "dyt"),
    "xt_derf": ("preln", {}, "derf"),
}
HYBRID = {
    "pre_norm": "preln",
    "hybridnorm": "hybridnorm",
    "hybridnorm_star": "hybridnorm_star",
    "hybridnorm_star_eps": "hybridnorm_star",
    "hybridnorm_embed_norm": "hybridnorm",
    "hybridnorm_layernorm_bias": "hybridnorm",
}
ABLATIONS = [
    *("first_qkv_pre", "qkvc_post", "qkc_post", "qk_post", "kv_post", "kc_post", "pre_qkv_post", "pre_qkv_pre"),
    *("pre_qk_pre", "qkv_pre", "pre_post", "post_pre", "post_norm", "mix_ln"),
]
HYBRID |= {name: f"hybridnorm_{name}" for name in ABLATIONS}


def llama(params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of Llama-like models in ours. A layer's norms go by position: see SITES."""
    for name, value in params.items():
        parts = name.split(".")
        if parts[0] == "lm_head" or parts[1] in ("norm", "embed_tokens"):
            ends = {"lm_head": "head.weight", "norm": "final_norm.weight", "embed_tokens": "embed.token.weight"}
            yield ends[parts[0] if parts[0] == "lm_head" else parts[1]], value
            continue
        layer, what = f"blocks.{parts[2]}", parts[-2]
        siblings = {key.split(".")[3] for key in params if key.startswith(f"model.layers.{parts[2]}.")}
        if what.endswith("layernorm"):
            yield f"{layer}.{site(what, siblings)}.weight", value
        elif parts[-1].startswith("raw_scaling_factor"):
            yield f"{layer}.{'attention' if parts[-1].endswith('attn') else 'ffn'}.residual.branch", value.reshape(1)
        else:
            sub = "attention" if parts[3] == "self_attn" else "ffn"
            yield f"{layer}.{sub}.{what.removesuffix('_proj')}.weight", value


def site(name: str, siblings: set[str]) -> str:
    """Where a norm of that name stands, which depends on the layer's others."""
    pre, four = "input_layernorm" in siblings, "pre_feedforward_layernorm" in siblings
    after = "attention.output_norm" if four else "ffn.input_norm" if pre else "attention.post_norm"
    return {
        "input_layernorm": "attention.input_norm",
        "pre_feedforward_layernorm": "ffn.input_norm",
        "post_attention_layernorm": after,
        "post_feedforward_layernorm": "ffn.output_norm" if four else "ffn.post_norm",
    }[name]


def x_transformers(params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of x-transformers in ours: sub-layers are counted singly, and [up; gate] is one matrix."""
    letters = {"g": "weight", "gamma": "weight", "beta": "bias"}
    letters |= {"alpha": "alpha", "pre_tanh_scale": "alpha", "s": "shift"}
    for name, value in params.items():
        parts = name.removeprefix("attn_layers.").split(".")
        if parts[0] == "final_norm":
            yield f"final_norm.{letters[parts[-1]]}", value
        elif parts[0] == "token_emb":
            yield "embed.token.weight", value
        elif parts[0] == "to_logits":
            yield "head.weight", value
        else:
            index, slot, last = int(parts[1]), parts[2], parts[-1]
            sub = f"blocks.{index // 2}.{'ffn' if index % 2 else 'attention'}"
            inside = [part for part in parts[3:] if part != "fn"]
            if slot == "0":
                place = ("input", "output", "post")[int(parts[3])]
                yield f"{sub}.{place}_norm.{letters[last]}", value
            elif last == "residual_scale":
                yield f"{sub}.residual.skip", value
            elif inside == ["gamma"]:
                yield f"{sub}.residual.branch", value
            elif last.startswith("qk_norm"):
                yield f"{sub}.{last[8]}_norm.weight", value.squeeze(1)
            elif inside[0] == "value_rmsnorm":
                yield f"{sub}.v_norm.weight", 1 + value.squeeze(1)
            elif inside[0] == "ff" and inside[1] == "0":
                up, gate = value.chunk(2)
                yield f"{sub}.up.{last}", up
                yield f"{sub}.gate.{last}", gate
            elif inside[0] == "ff":
                yield f"{sub}.down.{last}", value
            else:
                yield f"{sub}.{inside[0].removeprefix('to_').replace('out', 'o')}.{last}", value


@pytest.mark.parametrize("name", FRONTIER)
def test_equations_give_the_published_codes_logits(name: str, shared: Path) -> None:
    folder = shared / "golden" / "frontier"
    tensors, about = load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
    cfg, (scheme, options, kind) = about["config"], FRONTIER[name]
    params = {k.removeprefix("param."): v.double() for k, v in tensors.items() if k.startswith("param.")}
    library = name.startswith("xt_")
    weights = dict((x_transformers if library else llama)(params))
    heads = cfg["heads"] if library else cfg["num_attention_heads"]
    model = Model(
        weights,
        layers=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        heads=heads,
        kv_heads=heads,
        head_dim=weights["blocks.0.attention.q.weight"].shape[0] // heads,
        rope_theta=None if library else cfg["rope_theta"],
        kind=kind,
        eps=0.0 if library else cfg["rms_norm_eps"],
    )
    logits = reference_forward(scheme, model, tensors["input_ids"], **options)
    assert model.used == set(weights)
    torch.testing.assert_close(logits, tensors["logits"].double(), rtol=0.0, atol=5e-5)


NEUTRAL = {"query": "q", "key": "k", "value": "v", "output": "o"}
SITES = {"norm": "input_norm", "query_norm": "q_norm", "key_norm": "k_norm", "value_norm": "v_norm"}
ENDS = {"embedding.token": "embed.token", "embedding.norm": "embed.norm", "lm_head": "head"}


@pytest.mark.parametrize("name", HYBRID)
def test_equations_give_hybridnorms_logits(name: str, shared: Path) -> None:
    path = shared / "golden" / f"hybrid_dense__{name}"
    tensors = load_file(path.with_suffix(".safetensors"))
    cfg = json.loads(path.with_suffix(".json").read_text())["config"]
    weights = {}
    for key, value in tensors.items():
        if key.startswith("weight/"):
            owner, _, last = key.removeprefix("weight/").rpartition(".")
            last = "weight" if last == "gain" else last
            if owner.startswith("block"):
                block, sub, part = owner.split(".")
                owner = f"blocks.{block[5:]}.{sub}.{SITES.get(part, NEUTRAL.get(part, part))}"
            weights[f"{ENDS.get(owner, owner)}.{last}"] = value.double()
    model = Model(
        weights,
        layers=cfg["layers"],
        heads=cfg["heads"],
        kv_heads=cfg["kv_heads"],
        head_dim=cfg["head_dim"],
        activation=cfg["activation"].split()[0],
        rope_theta=float(cfg["rope_theta"]),
        kind=cfg["norm"],
        eps=cfg["norm_eps"],
    )
    options = {"embedding_norm": True} if cfg["embedding_norm"] else {}
    logits = reference_forward(HYBRID[name], model, tensors["input/ids"], **options)
    assert model.used == set(weights)
    torch.testing.assert_close(logits, tensors["output/logits"], rtol=1e-10, atol=1e-10)
