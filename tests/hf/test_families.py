"""Native classes: exact or refused with a reason; folders of other makers come in and go out unchanged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megnorm.hf import custom
from megnorm.hf.convert import from_hf, random_tokens, to_hf
from megnorm.hf.families.registry import choose
from megnorm.hf.fold import fold, fold_skip
from megnorm.hf.native import native_forward
from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from tests.hf.tiny import made, random_state, reload, tiny, tokens

PLAIN: dict[str, Any] = {"positions": "learned", "activation": "gelu", "bias": True, "kv_heads": 4}
HEADS = {"layer": {"attention": {"q": {"over": "head"}, "k": {"over": "head"}}}}
GEMMA: dict[str, Any] = {"activation": "geglu_tanh", "tied_head": True, "embedding_scale": "sqrt_width"}

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
    ("minimax", "deepnorm", {"norm": {"options": {"embedding_norm": True}}}),
    ("minimax, skip 1", "postln", {"norm": {"options": {"embedding_norm": True}}, "tied_head": True}),
]


def config_of(scheme: str, options: dict[str, Any]) -> ModelConfig:
    norm = dict(options.get("norm", {}))
    return tiny(scheme, norm.pop("kind", "rmsnorm"), **{**options, "norm": norm, "max_positions": 32})


@pytest.mark.parametrize(("name", "scheme", "options"), EXACT, ids=[name for name, _, _ in EXACT])
def test_a_native_class_computes_the_same(name: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = config_of(scheme, {"tied_head": False, **options})
    resolved = resolve(model.norm, model.layers)
    state = random_state(model, resolved)
    reference = native_forward(state, model, resolved)
    export = to_hf(state, model, resolved, out=tmp_path / "a", reference=reference, tolerance=1e-5)
    assert export.architecture.lower().startswith(name.split(",")[0])
    assert not (tmp_path / "a" / "modeling_megnorm.py").exists()
    # the experts' kernel of transformers has no float64
    loaded = reload(tmp_path / "a", dtype=torch.float32 if name.startswith("minimax") else torch.float64)
    ids = tokens(model)
    with torch.no_grad():
        theirs = loaded(ids).logits
    exact = native_forward(state, model, resolved, dtype=torch.float64)(ids)
    # what is folded is rounded to fp32 once; classes of transformers also compute some statistics in fp32
    assert (theirs - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max().item())


REFUSED = [
    ("head_bias", "preln", {"head_bias": True}),
    ("parallel_block", "preln", {"parallel_block": True}),
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
]


@pytest.mark.parametrize(("what", "scheme", "options"), REFUSED, ids=[f"{s}: {w}" for w, s, _ in REFUSED])
def test_what_no_class_holds_is_refused_with_a_reason(what: str, scheme: str, options: dict[str, Any]) -> None:
    model = config_of(scheme, options)
    family, reasons = choose(model, resolve(model.norm, model.layers))
    assert family is None
    assert all(reasons.values()) and len(reasons) == 7
    if what in ("head_bias", "parallel_block", "padding_id", "embedding_scale", "positions", "activation", "eps"):
        assert reasons["LlamaForCausalLM"].startswith(what)


def test_a_skip_whose_eps_differs_is_not_opt() -> None:
    """OPT's eps is fixed: after folding the skip it would have to be eps / skip^2."""
    model = config_of("deepnorm", {**PLAIN, "norm": {"kind": "layernorm"}})
    family, reasons = choose(model, resolve(model.norm, model.layers))
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


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2", "qwen3"])
def test_a_folder_comes_in_and_goes_out_unchanged(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / name
    read = from_hf(source)
    golden = load_file(source / "golden.safetensors")
    ids = next(t for k, t in golden.items() if k.endswith(("input_ids", "input/ids"))).long()
    exact = next(t for k, t in golden.items() if k.endswith("logits")).double()
    ours = native_forward(read.state, read.model, read.resolved, dtype=torch.float64)(ids)
    assert (ours - exact).abs().max() < 1e-10
    original = reload(source)
    export = to_hf(
        read.state, read.model, read.resolved, out=tmp_path / "out", reference=lambda ids: original(ids).logits
    )
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert export.architecture == read.architecture == original.config.architectures[0]
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == name
    assert from_hf(tmp_path / "out").model == read.model


@pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [
        ("opt", "postln", {**PLAIN, "norm": {"kind": "layernorm"}, "tied_head": True}),
        ("opt", "preln", {**PLAIN, "norm": {"kind": "layernorm"}, "activation": "relu"}),
        ("gemma2", "sandwich", {**GEMMA, "norm": {"gain": "one_plus"}}),
    ],
)
def test_own_exports_come_back(family: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    from megnorm.hf import convert
    from megnorm.hf.families import registry

    model = config_of(scheme, options)
    resolved = resolve(model.norm, model.layers)
    state = random_state(model, resolved)
    chosen = [f for f in registry.FAMILIES if f.name == family and f.accepts(*fold(model, resolved)[:2]) is None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "choose", lambda *_: (chosen[0], {}))
        to_hf(state, model, resolved, out=tmp_path / "a", reference=native_forward(state, model, resolved))
    read = from_hf(tmp_path / "a")
    assert set(read.state) == set(state)
    assert all(torch.allclose(read.state[name], state[name], atol=1e-6) for name in state)


def test_a_folder_megnorm_cannot_express_is_refused(shared: Path) -> None:
    with pytest.raises(ValueError, match="attn_logit_softcapping|layer_types"):
        from_hf(shared / "golden" / "hf" / "gemma2")
    with pytest.raises(ValueError, match="model_type 'mixtral' cannot be read"):
        from_hf(shared / "golden" / "hf" / "mixtral")


def test_scaled_rotary_positions_are_refused(shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / "llama"
    fields = json.loads((source / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="type 'linear'"):
        from_hf(tmp_path)


def test_random_tokens_do_not_begin_with_padding() -> None:
    from megnorm.hf.configuration_megnorm import MegnormConfig

    tokens = random_tokens(MegnormConfig(vocab_size=3, position_padding_id=2, max_position_embeddings=9))
    assert tokens.shape == (2, 9)
    assert (tokens[:, 0] != 2).all() and (tokens == 2).any()


def test_patched_imports_name_no_other_norm() -> None:
    """An imported Qwen3 is Pre-LN with two more norms."""
    model = replace(tiny("preln"), norm=NormConfig(patch=HEADS))
    assert choose(model, resolve(model.norm, model.layers))[0].name == "qwen3"  # type: ignore[union-attr]
