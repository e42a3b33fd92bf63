"""The custom class: an independent second implementation, and a good citizen of transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megnorm.hf import custom
from megnorm.hf.convert import compare_logits, from_hf, to_hf
from megnorm.hf.native import native_forward
from megnorm.models.config import AttentionConfig, ModelConfig
from megnorm.norms import registry
from megnorm.norms.resolve import Resolved, resolve
from tests.hf.tiny import SCALINGS, made, reload, tiny, tokens
from tests.marks import thinned

SCHEMES = registry.names()
KINDS = ("rmsnorm", pytest.param("layernorm", marks=pytest.mark.full))


def disagreement(state: dict[str, Tensor], model: ModelConfig, resolved: Resolved, ids: Tensor) -> float:
    """Largest relative difference of the two implementations in float64."""
    native = native_forward(state, model, resolved, dtype=torch.float64)(ids)
    with torch.no_grad():
        ours = custom.build(state, model, resolved, dtype=torch.float64)(ids).logits
    assert native.dtype == ours.dtype == torch.float64
    return ((native - ours).abs().max() / native.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", thinned(SCHEMES, 3))
def test_every_scheme_exports_and_computes_what_megnorm_does(scheme: str, kind: str, tmp_path: Path) -> None:
    model, resolved, state = made(scheme, kind)
    export = to_hf(state, model, resolved, out=tmp_path / "out", native=False)
    ids = tokens(model)
    with torch.no_grad():
        memory = custom.build(state, model, resolved)(ids).logits
        loaded = reload(tmp_path / "out")(ids).logits
    assert export.architecture == "MegnormForCausalLM"
    assert torch.equal(memory, loaded)
    assert disagreement(state, model, resolved, ids) < 1e-10


@pytest.mark.parametrize("kind", ["l2", "scalenorm", "dyt", "derf", "seednorm", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("gain", thinned(["vector", "scalar", "one_plus", "none", "per_head"], 3))
def test_every_kind_and_gain(kind: str, gain: str) -> None:
    if (kind, gain) == ("seednorm", "none"):
        pytest.skip("a gain of its own is what this kind is about")
    norm = {"norm": {"gain": gain if gain != "per_head" else "vector"}}
    if gain == "per_head":
        sites = {site: {"over": "head", "gain": "per_head"} for site in ("q", "k", "v", "context")}
        norm["norm"]["patch"] = {"layer": {"attention": sites}}
    model, resolved, state = made("sandwich", kind, **norm, bias=True, head_bias=True, tied_head=True)
    ids = tokens(model)
    assert disagreement(state, model, resolved, ids) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "sinusoidal", "padding_id": 1, "embedding_scale": "sqrt_width"},
        {"positions": "learned", "padding_id": 1, "activation": "relu_squared"},
        {"positions": "rotary", "padding_id": 1, "activation": "geglu_tanh"},
        {"positions": "sinusoidal", "width": 18, "heads": 3, "kv_heads": 1, "activation": "reglu"},
        {"positions": "none", "parallel_block": True, "head_dim": 6, "activation": "geglu", "head_bias": True},
        {"parallel_block": True, "parallel_norm": "one", "bias": True},
        {"parallel_block": True, "kv_heads": 1, "bias": True, "activation": "silu"},
        {"positions": "learned", "padding_id": 1, "attention": AttentionConfig(window=6)},
    ],
)
def test_sizes_positions_and_padding(options: dict[str, object]) -> None:
    model, resolved, state = made("normformer", **options)
    ids = tokens(model)
    if model.padding_id is not None:
        ids[0, 7:], ids[1, 4] = model.padding_id, model.padding_id
        ids[:, 0] = 5
    assert disagreement(state, model, resolved, ids) < 1e-10


FEATURES = [
    *({"rope_scaling": scaling} for scaling in SCALINGS),
    {"attention": AttentionConfig(scale=0.3)},
    {"attention": AttentionConfig(softcap=1.5), "logit_softcap": 2.0, "logit_scale": 0.5, "tied_head": True},
    {"attention": AttentionConfig(window=3), "positions": "learned"},
    {"attention": AttentionConfig(0.3, 2.0, 3, ("full", "window"), 99.0), "rope_scaling": SCALINGS[0]},
    {"rope_fraction": 0.5, "head_dim": 8, "rope_scaling": SCALINGS[0]},
    {"positions": "alibi", "heads": 6, "head_dim": 4, "kv_heads": 3},
    {"positions": "alibi", "attention": AttentionConfig(softcap=3.0, window=4, window_layers=("window", "full"))},
    {"qkv_bias": True},
    {"bias": True, "qkv_bias": False, "o_bias": False},
    {"kv_heads": 1, "o_bias": True},
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(one, id="+".join(one), marks=pytest.mark.full if i in (0, 2, 3, 5, 7, 9, 12) else ())
        for i, one in enumerate(FEATURES)
    ],
)
def test_features_of_attention(options: dict[str, object], tmp_path: Path) -> None:
    """In float64, through a folder and back, and one token at a time behind a cache."""
    model, resolved, state = made("hybridnorm", **options)
    ids = tokens(model)
    assert disagreement(state, model, resolved, ids) < 1e-10
    to_hf(state, model, resolved, out=tmp_path / "a", native=False)
    read = from_hf(tmp_path / "a")
    assert replace(read.model, max_positions=48, rope_scaling=model.rope_scaling) == replace(model, head_dim=model.hd)
    assert replace(read.model.rope_scaling, original=None) == replace(model.rope_scaling, original=None)
    decoder = custom.build(state, model, resolved, dtype=torch.float64)
    if model.rope_scaling.kind != "dynamic":  # which turns what lies in a cache no more
        cache, steps = None, []
        with torch.no_grad():
            for i in range(ids.shape[1]):
                out = decoder(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                cache, steps = out.past_key_values, [*steps, out.logits]
            whole = decoder(ids).logits
        assert (torch.cat(steps, 1) - whole).abs().max() < 1e-12 * whole.abs().max()


def test_what_a_backend_of_attention_lacks_is_not_asked_of_it() -> None:
    for options in ({"positions": "alibi"}, {"attention": AttentionConfig(softcap=1.5)}):
        model, resolved, state = made("preln", **options)
        decoder = custom.build(state, model, resolved)
        assert decoder.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            decoder.set_attn_implementation("sdpa")


@pytest.mark.parametrize("window", [None, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "none", "alibi"])
@pytest.mark.parametrize("padding_id", [None, 1])
def test_generation_with_a_cache_is_generation_without(
    positions: str, padding_id: int | None, window: int | None
) -> None:
    """Also in a batch whose shorter prompt is padded on the left: as if it stood alone."""
    if (positions, padding_id) == ("alibi", 1):
        pytest.skip("refused")
    attention = AttentionConfig(window=window, window_layers=("window", "full") if window else ("window",))
    model, resolved, state = made("normformer", positions=positions, padding_id=padding_id, attention=attention)
    decoder = custom.build(state, model, resolved)
    ids = tokens(model).clamp_min(2)
    ids[0, :4] = 1
    mask = (ids != 1).long()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": 0}
    options["suppress_tokens"] = [1]
    cached = decoder.generate(ids, attention_mask=mask, **options)
    plain = decoder.generate(ids, attention_mask=mask, use_cache=False, **options)
    alone = decoder.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], **options)
    static = decoder.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:1, 4:], alone)
    assert torch.equal(cached, static)


def test_beams_run_with_the_cache() -> None:
    model, resolved, state = made("hybridnorm")
    decoder, ids = custom.build(state, model, resolved), tokens(model)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(decoder.generate(ids, **options), decoder.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("scheme", ["hybridnorm", "normformer", "b2t", "rezero"])
def test_a_step_with_the_cache_gives_the_same_logits(scheme: str) -> None:
    model, resolved, state = made(scheme)
    decoder = custom.build(state, model, resolved, dtype=torch.float64)
    ids = tokens(model)
    with torch.no_grad():
        whole = decoder(ids).logits
        first = decoder(ids[:, :6], use_cache=True)
        rest = decoder(ids[:, 6:], past_key_values=first.past_key_values).logits
        kept = decoder(ids, logits_to_keep=1).logits
    assert (rest - whole[:, 6:]).abs().max() < 1e-12 * whole.abs().max()
    assert (kept - whole[:, -1:]).abs().max() < 1e-12 * whole.abs().max()


def test_backends_agree_and_attentions_are_recorded() -> None:
    model, resolved, state = made("hybridnorm")
    decoder = custom.build(state, model, resolved)
    ids = tokens(model)
    with torch.no_grad():
        fast = decoder(ids, output_hidden_states=True)
        decoder.set_attn_implementation("eager")
        slow = decoder(ids, output_attentions=True)
    assert (fast.logits - slow.logits).abs().max() < 2e-5
    assert len(fast.hidden_states) == model.layers + 1
    assert [tuple(a.shape) for a in slow.attentions] == [(2, 4, 11, 11)] * model.layers


def test_packed_documents_do_not_see_each_other() -> None:
    model, resolved, state = made("normformer", positions="learned")
    decoder = custom.build(state, model, resolved)
    ids = tokens(model, batch=1)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    with torch.no_grad():
        packed = decoder(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([decoder(ids[:, :5]).logits, decoder(ids[:, 5:]).logits], 1)
    assert (packed - apart).abs().max() < 2e-5


def test_gradients_with_checkpointing_are_the_same() -> None:
    model, resolved, state = made("rezero", "layernorm")
    decoder = custom.build(state, model, resolved).train()
    ids = tokens(model)
    decoder(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    decoder.gradient_checkpointing_enable()
    decoder(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.equal(plain[name], p.grad) for name, p in decoder.named_parameters())


def test_embeddings_may_be_given_and_resized() -> None:
    model, resolved, state = made("postln", embedding_scale="sqrt_width", tied_head=True)
    decoder = custom.build(state, model, resolved)
    ids = tokens(model)
    with torch.no_grad():
        given = decoder(inputs_embeds=decoder.get_input_embeddings()(ids)).logits
        assert torch.equal(given, decoder(ids).logits)
        decoder.resize_token_embeddings(70)
        assert decoder(ids).logits.shape[-1] == 70
    assert decoder.lm_head.weight is decoder.get_input_embeddings().weight


def test_a_new_model_starts_from_the_schemes_values() -> None:
    """Not from a checkpoint: gains, scales and biases begin where the scheme says."""
    from megnorm.hf.configuration_megnorm import MegnormConfig
    from megnorm.hf.modeling_megnorm import MegnormForCausalLM

    model = tiny("rezero", norm={"patch": {"final": {"gain": "one_plus", "weight_init": 1.5}}})
    resolved = resolve(model.norm, model.layers)
    fields = {k: v for k, v in custom.config(model, resolved).items() if k != "model_type"}
    state = MegnormForCausalLM(MegnormConfig(**fields)).state_dict()
    assert state["model.final_norm.weight"].eq(0.5).all()
    assert state["model.blocks.0.attention.residual.branch"].eq(0.0).all()
    assert 0.01 < state["model.blocks.0.attention.q.weight"].std() < 0.03


def test_saving_again_keeps_the_code_and_the_logits(tmp_path: Path) -> None:
    """Also in a process that compared the folder before: transformers must still have the code that it read."""
    model, resolved, state = made("hybridnorm_star")
    to_hf(state, model, resolved, out=tmp_path / "a", native=False)
    assert compare_logits(native_forward(state, model, resolved), tmp_path / "a") < 1e-4
    reload(tmp_path / "a").save_pretrained(tmp_path / "b")
    ids = tokens(model)
    assert {p.name for p in (tmp_path / "b").glob("*.py")} >= set(custom.DECODER)
    with torch.no_grad():
        assert torch.equal(reload(tmp_path / "a")(ids).logits, reload(tmp_path / "b")(ids).logits)
    assert set(from_hf(tmp_path / "b").state) == set(state)


def test_the_base_model_loads_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    model, resolved, state = made("keel")
    to_hf(state, model, resolved, out=tmp_path / "a", native=False)
    base = AutoModel.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert base(tokens(model)).last_hidden_state.shape == (2, 11, model.width)
    config = AutoConfig.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert config.norm == _as_json(resolved)


def test_low_precision_runs(tmp_path: Path) -> None:
    model, resolved, state = made("normformer")
    to_hf(state, model, resolved, out=tmp_path / "a", native=False, dtype=torch.bfloat16)
    loaded = reload(tmp_path / "a", dtype="auto")
    with torch.no_grad():
        logits = loaded(tokens(model)).logits
    assert loaded.dtype == logits.dtype == torch.bfloat16
    exact = native_forward(state, model, resolved)(tokens(model))
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_plan_for_tensor_parallelism_leaves_out_what_looks_across_heads() -> None:
    def plan(scheme: str) -> set[str]:
        model, resolved, state = made(scheme)
        return {name.rpartition(".")[2] for name in custom.build(state, model, resolved).config.base_model_tp_plan}

    assert plan("hybridnorm") == {"q", "k", "v", "o", "up", "gate", "down"}
    assert plan("subln") == set()
    assert plan("normformer") == set()
    assert plan("qknorm") == {"q", "k", "v", "o", "up", "gate", "down"}


def test_compare_logits_sees_a_difference(tmp_path: Path) -> None:
    model, resolved, state = made("hybridnorm")
    to_hf(state, model, resolved, out=tmp_path / "a", native=False)
    assert compare_logits(native_forward(state, model, resolved), tmp_path / "a") < 1e-4
    state["final_norm.weight"] = state["final_norm.weight"] * 1.01
    assert compare_logits(native_forward(state, model, resolved), tmp_path / "a") > 1e-3


def _as_json(resolved: object) -> object:
    import json

    return json.loads(json.dumps(resolved.to_json()))  # type: ignore[attr-defined]
