"""Native classes: exact or refused with a reason; folders of other makers come in and go out unchanged."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megnorm.hf import custom
from megnorm.hf.compare import random_tokens
from megnorm.hf.convert import from_hf, to_hf
from megnorm.hf.families.registry import FAMILIES, by_model_type, choose
from megnorm.hf.families.rope import read_rope
from megnorm.hf.fold import fold, fold_skip
from megnorm.hf.native import native_forward
from megnorm.models.config import AttentionConfig, ModelConfig, RopeScaling
from megnorm.models.family import resolve_model
from megnorm.norms.config import NormConfig
from tests.hf.tiny import made, random_state, reload, tiny, tokens
from tests.marks import thinned

PLAIN: dict[str, Any] = {"positions": "learned", "activation": "gelu", "bias": True, "kv_heads": 4}
HEADS = {"layer": {"attention": {"q": {"over": "head"}, "k": {"over": "head"}}}}
GEMMA: dict[str, Any] = {"activation": "geglu_tanh", "tied_head": True, "embedding_scale": "sqrt_width"}

ALIBI: dict[str, Any] = {"positions": "alibi", "kv_heads": 4, "ffn": 64}
BLOOM: dict[str, Any] = {"norm": {"kind": "layernorm", "options": {"embedding_norm": True}}, "activation": "gelu_tanh"}
MPT: dict[str, Any] = {**ALIBI, "norm": {"kind": "layernorm", "bias": False}, "activation": "gelu", "bias": False}
NEOX: dict[str, Any] = {
    "norm": {"kind": "layernorm"}, "activation": "gelu", "bias": True, "kv_heads": 4, "width": 32, "positions": "rotary",
    "parallel_block": True, "rope_fraction": 0.5,
}  # fmt: skip
GPTJ: dict[str, Any] = {**NEOX, "parallel_norm": "one", "qkv_bias": False, "o_bias": False, "head_bias": True}
UNNORMED = {"layer": {"ffn": {"input": None}}}
YARN = RopeScaling("yarn", 4.0, 8, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5, truncate=False)
GRID = AttentionConfig(window=3, window_layers=("window", "full"))

EXACT = [
    ("llama", "preln", {}),
    ("llama, tied, biases", "preln", {"tied_head": True, "bias": True, "activation": "geglu"}),
    ("llama, scaled gains", "lns", {}),
    ("llama, learned branch", "layerscale", {}),
    ("llama, scaled embedding", "preln", {"embedding_scale": "sqrt_width"}),
    ("llama, 1 + w", "preln", {"norm": {"gain": "one_plus"}}),
    ("llama, one gain", "preln", {"norm": {"gain": "scalar"}}),
    ("llama, no gain", "preln", {"norm": {"gain": "none"}, "head_dim": 6}),
    ("llama, head scale", "normformer", {"norm": {"options": {"attention_norm": False, "ffn_norm": False}}}),
    ("qwen3", "qknorm", {}),
    ("qwen3, wide heads", "preln", {"norm": {"patch": HEADS}, "head_dim": 6, "tied_head": True}),
    ("olmo2", "olmo2", {}),
    ("gemma2", "sandwich", GEMMA),
    ("gemma2, untied", "sandwich", {"norm": {"gain": "one_plus"}, "embedding_scale": 3.0}),
    ("gpt2", "preln", {**PLAIN, "norm": {"kind": "layernorm"}, "tied_head": True}),
    ("gpt2, no norm bias", "preln", {**PLAIN, "norm": {"kind": "layernorm", "bias": False}, "activation": "gelu_tanh"}),
    ("gpt2, scaled", "lns", {**PLAIN, "norm": {"kind": "layernorm"}, "activation": "relu_squared"}),
    ("opt", "postln", {**PLAIN, "norm": {"kind": "layernorm"}, "activation": "relu", "tied_head": True}),
    ("opt, folded skip", "deepnorm", {**PLAIN, "norm": {"kind": "layernorm", "eps": 1e-5 * 6**0.5}}),
    ("llama, linear", "preln", {"rope_scaling": RopeScaling("linear", 4.0)}),
    ("llama, dynamic", "preln", {"rope_scaling": RopeScaling("dynamic", 4.0, original=6), "head_dim": 6}),
    ("llama, yarn", "preln", {"rope_scaling": RopeScaling("yarn", 4.0, original=8), "head_dim": 16}),
    ("llama, yarn, own bounds", "preln", {"rope_scaling": YARN, "head_dim": 16}),
    ("llama, llama3", "preln", {"rope_scaling": RopeScaling("llama3", 8.0, original=8), "head_dim": 16}),
    ("llama, attention biases", "preln", {"qkv_bias": True, "o_bias": True}),
    ("llama, score scale", "preln", {"attention": AttentionConfig(scale=0.3), "bias": True}),
    ("llama, logit scale", "preln", {"logit_scale": 0.25}),
    ("llama, logit scale, tied", "preln", {"logit_scale": 0.25, "tied_head": True}),
    ("mistral", "preln", {"attention": AttentionConfig(window=3), "head_dim": 6}),
    ("ministral", "preln", {"attention": GRID, "rope_scaling": RopeScaling("yarn", 2.0, original=8)}),
    ("qwen2", "preln", {"qkv_bias": True}),
    ("qwen2, windows", "preln", {"qkv_bias": True, "attention": replace(GRID, window_layers=("full", "window"))}),
    ("qwen3, windows, score scale", "qknorm", {"attention": replace(GRID, scale=0.3)}),
    ("olmo2, score scale", "olmo2", {"attention": AttentionConfig(scale=0.3)}),
    (
        "gemma2, caps",
        "sandwich",
        {**GEMMA, "attention": replace(GRID, softcap=1.5, scale=7**-0.5), "logit_softcap": 2.0},
    ),
    ("gemma2, odd scale", "sandwich", {**GEMMA, "attention": replace(GRID, softcap=1.5, scale=0.3)}),
    (
        "gemma3",
        "sandwich",
        {
            **GEMMA,
            "norm": {"patch": HEADS},
            "attention": replace(GRID, window_rope_theta=99.0),
            "rope_scaling": RopeScaling("linear", 8.0),
        },
    ),
    ("gemma3, one theta", "sandwich", {**GEMMA, "norm": {"patch": HEADS}}),
    ("gptbigcode", "preln", {**PLAIN, "norm": {"kind": "layernorm"}, "kv_heads": 1, "tied_head": True}),
    ("bloom", "preln", {**ALIBI, **BLOOM}),
    ("bloom, three heads", "preln", {**ALIBI, **BLOOM, "heads": 3, "kv_heads": 3, "width": 18, "ffn": 72}),
    ("gptneox", "preln", NEOX),
    ("gptneox, in turn", "preln", {**NEOX, "parallel_block": False, "rope_fraction": 1.0, "tied_head": True}),
    ("gptj", "preln", GPTJ),
    ("gptj, no head bias", "lns", {**GPTJ, "head_bias": False, "rope_fraction": 1.0, "logit_scale": 0.5}),
    ("mpt", "preln", MPT),
    (
        "mpt, six heads",
        "preln",
        {
            **MPT,
            "heads": 6,
            "kv_heads": 6,
            "width": 24,
            "ffn": 96,
            "attention": AttentionConfig(scale=0.3),
        },
    ),
    (
        "minimax, linear",
        "postln",
        {"norm": {"options": {"embedding_norm": True}}, "tied_head": True, "rope_scaling": RopeScaling("linear", 2.0)},
    ),
    ("minimax", "deepnorm", {"norm": {"options": {"embedding_norm": True}}}),
    ("minimax, skip 1", "postln", {"norm": {"options": {"embedding_norm": True}}, "tied_head": True}),
]


def config_of(scheme: str, options: dict[str, Any]) -> ModelConfig:
    norm = dict(options.get("norm", {}))
    return tiny(scheme, norm.pop("kind", "rmsnorm"), **{**options, "norm": norm, "max_positions": 32})


RARE = {"llama, dynamic", "llama, yarn, own bounds", "llama, logit scale", "qwen2, windows", "qwen3, windows, score scale",
        "olmo2, score scale", "gemma2, odd scale", "gemma3, one theta", "bloom, three heads", "mpt, six heads",
        "minimax, linear"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    thinned(EXACT, lambda row: row[0] not in RARE and EXACT.index(row) % 2 == 0),
    ids=[row[0] for row in EXACT],
)
def test_a_native_class_computes_the_same(name: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = config_of(scheme, {"tied_head": False, **options})
    resolved = resolve_model(model)
    state = random_state(model, resolved)
    reference = native_forward(state, model, resolved)
    exact = partial(native_forward, state, model, resolved, dtype=torch.float64)
    export = to_hf(state, model, resolved, out=tmp_path / "a", reference=reference, exact=exact, tolerance=1e-5)
    assert export.architecture.lower().startswith(name.split(",")[0])
    assert not (tmp_path / "a" / "modeling_megnorm.py").exists()
    # the experts' kernel of transformers has no float64
    loaded = reload(tmp_path / "a", dtype=torch.float32 if name.startswith("minimax") else torch.float64)
    ids = tokens(model)
    with torch.no_grad():
        theirs = loaded(ids).logits
    wanted = exact()(ids)
    # what is folded is rounded to fp32 once; classes of transformers also compute some statistics in fp32
    assert (theirs - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


REFUSED = [
    ("head_bias", "preln", {"head_bias": True}),
    ("parallel_block", "preln", {"parallel_block": True}),
    ("blocks.0.ffn.input", "preln", {"parallel_block": True, "parallel_norm": "one"}),
    ("parallel_norm", "preln", {**GPTJ, "parallel_norm": "each", "norm": {"kind": "layernorm", "patch": UNNORMED}}),
    ("bias", "preln", {**GPTJ, "qkv_bias": True}),
    ("padding_id", "preln", {"padding_id": 1}),
    ("embedding_scale", "preln", {"embedding_scale": 3.0, "tied_head": True}),
    ("positions", "preln", {"positions": "sinusoidal"}),
    ("activation", "preln", {"activation": "silu"}),
    ("blocks.0.ffn.inner", "subln", {}),
    ("eps", "preln", {"norm": {"patch": {"final": {"eps": 1e-6}}}}),
    ("final", "preln", {"norm": {"patch": {"final": {"bias": True}}}}),
    ("residual", "hybridnorm", {}),
    ("blocks.0.attention.q", "hybridnorm_qkv_pre", {}),
    ("post", "deepnorm", {}),
    ("layer_input", "b2t", {}),
    ("skip", "resscale", {}),
    ("kind", "preln", {"norm": {"kind": "dyt"}}),
    ("softcap", "preln", {"logit_softcap": 3.0}),
    ("softcap", "preln", {"attention": AttentionConfig(softcap=3.0)}),
    ("attention.window_rope_theta", "preln", {"attention": AttentionConfig(window=3, window_rope_theta=99.0)}),
    ("o_bias", "preln", {"o_bias": True}),
    ("bias", "olmo2", {"qkv_bias": True}),
    ("bias", "qknorm", {"o_bias": True}),
    ("attention.window", "olmo2", {"attention": GRID}),
    ("logit_scale", "postln", {"logit_scale": 0.5, "tied_head": True, "norm": {"options": {"embedding_norm": True}}}),
    ("positions", "preln", {"positions": "alibi"}),
    ("rope_fraction", "preln", {"rope_fraction": 0.5, "head_dim": 8}),
    (
        "dropout",
        "preln",
        {**MPT, "dropout": 0.1},
    ),
    ("ffn", "preln", {**ALIBI, **BLOOM, "bias": True, "ffn": 32}),
]
BY_ANOTHER = {
    "parallel_norm",
    "softcap",
    "attention.window",
    "attention.window_rope_theta",
    "o_bias",
    "bias",
    "logit_scale",
    "dropout",
    "ffn",
}
TOLD = {
    "rope_fraction",
    "head_bias",
    "parallel_block",
    "padding_id",
    "embedding_scale",
    "positions",
    "activation",
    "eps",
}


@pytest.mark.parametrize(("what", "scheme", "options"), REFUSED, ids=[f"{s}: {w}" for w, s, _ in REFUSED])
def test_what_no_class_holds_is_refused_with_a_reason(what: str, scheme: str, options: dict[str, Any]) -> None:
    model = config_of(scheme, options)
    family, reasons = choose(model, resolve_model(model))
    assert family is None
    assert all(reasons.values()) and len(reasons) == len(
        {family.architecture for family in FAMILIES if family.serves(model)}
    )
    if what in TOLD:
        assert reasons["LlamaForCausalLM"].startswith(what)
    if what in TOLD | BY_ANOTHER:
        assert any(reason.startswith(what) for reason in reasons.values())


def test_a_skip_whose_eps_differs_is_not_opt() -> None:
    """OPT's eps is fixed: after folding the skip it would have to be eps / skip^2."""
    model = config_of("deepnorm", {**PLAIN, "norm": {"kind": "layernorm"}})
    family, reasons = choose(model, resolve_model(model))
    assert family is None
    assert "has eps 1e-05" in reasons["OPTForCausalLM"]


@pytest.mark.parametrize("scheme", ["lns", "layerscale", "rezero", "deepnorm", "normformer", "admin", "skipinit"])
@pytest.mark.parametrize("place", ["pre_projection", "post_projection"])
def test_folding_changes_nothing(scheme: str, place: str) -> None:
    norm: dict[str, Any] = {"gain": "one_plus"}
    if scheme == "normformer":
        norm["options"] = {"head_scale": place, "residual_scale": True}
    model, resolved, state = made(scheme, "layernorm", norm=norm, embedding_scale=1.5, tied_head=False, kv_heads=4)
    state = {name: tensor.double() for name, tensor in state.items()}
    ids = tokens(model)
    plain_model, plain, folded = fold(model, resolved, state)
    plain, folded = fold_skip(plain, folded)
    with torch.no_grad():
        before = custom.build(state, model, resolved, dtype=torch.float64)(ids).logits
        after = custom.build(folded, plain_model, plain, dtype=torch.float64)(ids).logits
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()
    assert plain_model.embedding_scale == 1.0
    assert not [name for name in folded if "branch" in name or "head_scale" in name]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "olmo2", "qwen3", "gemma2", "gemma3", "mixtral", "olmoe"])
def test_a_folder_comes_in_and_goes_out_unchanged(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / name
    read = from_hf(source)
    golden = load_file(source / "golden.safetensors")
    ids = next(t for k, t in golden.items() if k.endswith(("input_ids", "input/ids"))).long()
    exact = next(t for k, t in golden.items() if k.endswith("logits")).double()
    ours = native_forward(read.state, read.model, read.resolved, dtype=torch.float64)(ids)
    assert (ours - exact).abs().max() < (1e-7 if name == "gptj" else 1e-10)  # the reference's angles are in fp32
    original = reload(source)
    export = to_hf(
        read.state, read.model, read.resolved, out=tmp_path / "out", reference=lambda ids: original(ids).logits
    )
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert export.architecture == read.architecture == original.config.architectures[0]
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == {"gemma3": "gemma3_text"}.get(name, name)
    assert from_hf(tmp_path / "out").model == read.model


COME_BACK = [
    ("opt", "postln", {**PLAIN, "norm": {"kind": "layernorm"}, "tied_head": True}),
    ("opt", "preln", {**PLAIN, "norm": {"kind": "layernorm"}, "activation": "relu"}),
    ("gemma2", "sandwich", {**GEMMA, "norm": {"gain": "one_plus"}}),
    ("gemma2", "sandwich", {**GEMMA, "norm": {"gain": "one_plus"}, "logit_softcap": 2.0,
                            "attention": replace(GRID, softcap=1.5, scale=7**-0.5)}),
    ("gemma3_text", "sandwich", {**GEMMA, "norm": {"gain": "one_plus", "patch": HEADS},
                                 "attention": replace(GRID, window_rope_theta=99.0),
                                 "rope_scaling": RopeScaling("linear", 8.0)}),
    ("mistral", "preln", {"attention": AttentionConfig(window=3)}),
    ("ministral", "preln", {"attention": GRID, "rope_scaling": YARN, "head_dim": 16}),
    ("qwen2", "preln", {"qkv_bias": True, "attention": replace(GRID, window_layers=("full", "window", "window"))}),
    ("qwen3", "qknorm", {"attention": GRID, "rope_scaling": RopeScaling("llama3", 8.0, 8), "head_dim": 16}),
    ("llama", "preln", {"qkv_bias": True, "o_bias": True, "rope_scaling": RopeScaling("dynamic", 4.0)}),
    ("gpt_bigcode", "preln", {**PLAIN, "norm": {"kind": "layernorm"}, "kv_heads": 1}),
    ("bloom", "preln", {**ALIBI, **BLOOM, "bias": True}),
    ("mpt", "preln", {**MPT, "attention": AttentionConfig(scale=0.3)}),
    ("gpt_neox", "preln", {**NEOX, "rope_scaling": RopeScaling("linear", 4.0)}),
    ("gptj", "preln", GPTJ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [pytest.param(*row, marks=pytest.mark.full if i % 2 else ()) for i, row in enumerate(COME_BACK)],
)
def test_own_exports_come_back(family: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    from megnorm.hf import convert
    from megnorm.hf.families import registry

    model = config_of(scheme, options)
    resolved = resolve_model(model)
    state = random_state(model, resolved)
    chosen = [f for f in registry.FAMILIES if f.name == family and f.accepts(*fold(model, resolved)[:2]) is None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "choose", lambda *_: (chosen[0], {}))
        exact = partial(native_forward, state, model, resolved, dtype=torch.float64)
        reference = native_forward(state, model, resolved)
        to_hf(state, model, resolved, out=tmp_path / "a", reference=reference, exact=exact)
    read = from_hf(tmp_path / "a")
    assert set(read.state) == set(state)
    assert all(torch.allclose(read.state[name], state[name], atol=1e-6) for name in state)
    ids = tokens(model)
    ours, back = native_forward(state, model, resolved), native_forward(read.state, read.model, read.resolved)
    assert (ours(ids) - back(ids)).abs().max() < 1e-4
    assert replace(read.model.attention, scale=None) == replace(model.attention, scale=None)
    assert read.model.rope_scaling == model.rope_scaling


def test_a_folder_megnorm_cannot_express_is_refused(shared: Path, tmp_path: Path) -> None:
    weights = shared / "golden" / "hf" / "gptj" / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' cannot be read"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"sliding_window": 4, "layer_types": ["chunked_attention", "sliding_attention"]}, "chunked_attention"),
    ],
)
def test_positions_megnorm_cannot_express_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config |= {"vocab_size": 9, "max_position_embeddings": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        by_model_type("llama").read_config(config | changes)


def test_logarithmic_factors_of_yarn_become_one() -> None:
    rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    _, scaling, _ = read_rope({"rope_parameters": {**rope, "mscale_all_dim": 0.7}})
    assert scaling.attention_factor == pytest.approx(1.3688879454 / 1.2582215617, rel=1e-9)
    assert read_rope({"rope_parameters": rope})[1].attention_factor is None


def test_random_tokens_do_not_begin_with_padding() -> None:
    from megnorm.hf.configuration_megnorm import MegnormConfig

    tokens = random_tokens(MegnormConfig(vocab_size=3, position_padding_id=2, max_position_embeddings=9))
    assert tokens.shape == (2, 9)
    assert (tokens[:, 0] != 2).all() and (tokens == 2).any()


def test_patched_imports_name_no_other_norm() -> None:
    """An imported Qwen3 is Pre-LN with two more norms."""
    model = replace(tiny("preln"), norm=NormConfig(patch=HEADS))
    assert choose(model, resolve_model(model))[0].name == "qwen3"  # type: ignore[union-attr]
