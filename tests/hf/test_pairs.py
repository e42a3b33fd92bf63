"""Encoder-decoders in transformers' own classes: exact or refused, and back again."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megnorm import config as configs
from megnorm.cli import main
from megnorm.hf import custom
from megnorm.hf.compare import difference
from megnorm.hf.convert import from_hf, to_hf
from megnorm.hf.families.registry import FAMILIES, choose
from megnorm.hf.fold import fold, fold_skip
from megnorm.hf.native import native_forward
from megnorm.hf.tokenizer import SpecialIds
from megnorm.infer.beam import Beam, beam_search
from megnorm.layers.env import Env
from megnorm.models.config import AttentionConfig, ModelConfig
from megnorm.models.encdec import EncoderDecoder
from megnorm.models.family import resolve_model
from megnorm.parallel.layout import named_matrices
from megnorm.plan import make_plan
from tests.hf.test_exports import inputs_of, said
from tests.hf.tiny import made, random_state, reload
from tests.marks import thinned

PAIRS: dict[str, Any] = {
    "family": "encdec", "layers": 2, "encoder_layers": 3, "kv_heads": 4, "shared_embedding": True, "tied_head": False,
    "max_positions": 32, "activation": "relu",
}  # fmt: skip
T5: dict[str, Any] = {**PAIRS, "positions": "none", "relative_buckets": 8, "relative_distance": 20}
BART: dict[str, Any] = {**PAIRS, "positions": "learned", "bias": True, "tied_head": True}
EMBEDDED = {"options": {"embedding_norm": True}}
EPS = {"eps": 1e-5}

EXACT: list[tuple[str, str, str, dict[str, Any]]] = [
    ("T5", "preln", "rmsnorm", T5),
    ("T5, gated, tied", "preln", "rmsnorm", {**T5, "activation": "geglu_tanh", "tied_head": True, "head_dim": 6}),
    ("T5, as its first version", "preln", "rmsnorm", {**T5, "tied_head": True, "logit_scale": 0.25,
                                                      "attention": AttentionConfig(scale=1.0)}),
    ("T5, scaled gains", "lns", "rmsnorm", {**T5, "activation": "swiglu", "logit_scale": 0.5}),
    ("T5, learned branch", "layerscale", "rmsnorm", {**T5, "embedding_scale": 3.0}),
    ("MBart", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}}),
    ("MBart, scaled table", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}, "embedding_scale": "sqrt_width",
                                                   "activation": "gelu"}),
    ("MBart, score scale", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS, "bias": False},
                                                  "attention": AttentionConfig(scale=0.3), "logit_scale": 0.5}),
    ("Bart", "postln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}}),
    ("Bart, head scale", "normformer", "layernorm", {**BART, "norm": {**EPS, "options": {
        "placement": "post", "attention_norm": False, "ffn_norm": False}, "patch": {"embedding": {}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scheme", "kind", "options"), thinned(EXACT, lambda row: "," not in row[0]))
def test_a_class_of_transformers_computes_the_same(
    name: str, scheme: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, resolved, state = made(scheme, kind, **options)
    reference = native_forward(state, model, resolved)
    exact = partial(native_forward, state, model, resolved, dtype=torch.float64)
    ids = SpecialIds(start=3, pad=1)
    export = to_hf(state, model, resolved, out=tmp_path / "a", reference=reference, exact=exact, ids=ids)
    assert export.architecture == f"{name.split(',')[0]}ForConditionalGeneration"
    assert not (tmp_path / "a" / "modeling_megnorm.py").exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["decoder_start_token_id"] == 3
    loaded = reload(tmp_path / "a", dtype=torch.float64)
    inputs = inputs_of(model, loaded)
    ours, theirs = said(exact(), inputs), said(loaded, inputs)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, ours.abs().max().item())  # folded weights are fp32
    read = from_hf(tmp_path / "a")
    back = said(native_forward(read.state, read.model, read.resolved, dtype=torch.float64), inputs)
    assert (back - theirs).abs().max() <= 1e-5 * max(1.0, ours.abs().max().item())
    loaded.save_pretrained(tmp_path / "b")  # as transformers writes it
    again = from_hf(tmp_path / "b")
    assert again.model == read.model and all(torch.equal(again.state[key], read.state[key]) for key in read.state)


@pytest.mark.parametrize("name", ["T5", "MBart", "Bart"])
@pytest.mark.parametrize("size", [1, 3])
def test_beam_search_is_that_of_the_exported_folder(name: str, size: int, tmp_path: Path) -> None:
    """Token for token, with caches and without."""
    scheme, kind, options = next(row[1:] for row in EXACT if row[0] == name)
    model, resolved, state = made(scheme, kind, **{**options, "vocab_size": 9})
    start, end, pad = 0, 2, 1
    to_hf(state, model, resolved, out=tmp_path / "a", ids=SpecialIds(start=start, pad=pad, eos=end))
    theirs = reload(tmp_path / "a", dtype=torch.float64)
    ours = EncoderDecoder(model, resolved, model.vocab_size, Env(dtype=torch.float64)).eval()
    for named in named_matrices(ours):
        named.view().copy_(state[named.name])
    source = torch.randint(3, 9, (4, 9), generator=torch.Generator().manual_seed(4))
    real = torch.arange(9) < torch.tensor([9, 7, 4, 2])[:, None]
    wide = {"num_beams": size, "length_penalty": 0.6, "early_stopping": "never"} if size > 1 else {}
    found = []
    for cached in (True, False):
        found.append(beam_search(ours, source.t(), real.t(), Beam(start, end, size, 0.6, longest=12, cached=cached)))
        rows = theirs.generate(
            source, attention_mask=real.long(), max_new_tokens=12, do_sample=False, use_cache=cached, **wide
        )
        found.append([row[: row.index(end)] if end in row else row[:12] for row in rows[:, 1:].tolist()])
    assert found[0] == found[1] == found[2] == found[3]


REFUSED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("max_source_positions", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}, "max_source_positions": 30}),
    ("decoder.blocks.0.cross_attention.q", "preln", "rmsnorm", {**T5, "norm": {"patch": {
        "layer": {"cross_attention": {"input": {}, "q": {}}}}}}),
    ("encoder.embedding", "preln", "layernorm", {**BART, "norm": EPS}),
    ("shared_embedding", "preln", "rmsnorm", {**T5, "shared_embedding": False}),
    ("shared_embedding, tied_head", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}, "tied_head": False}),
    ("activation", "preln", "rmsnorm", {**T5, "activation": "geglu"}),
    ("bias", "preln", "rmsnorm", {**T5, "qkv_bias": True}),
    ("head_bias", "preln", "rmsnorm", {**T5, "head_bias": True}),
    ("kv_heads", "preln", "rmsnorm", {**T5, "kv_heads": 2}),
    ("embedding_scale", "preln", "layernorm", {**BART, "norm": {**EMBEDDED, **EPS}, "embedding_scale": 3.0}),
    ("residual.skip", "deepnorm", "layernorm", {**BART, "norm": {**EPS, "patch": {"embedding": {}}}}),
    ("decoder.blocks.0.attention.output", "sandwich", "rmsnorm", T5),
]  # fmt: skip


@pytest.mark.parametrize(("what", "scheme", "kind", "options"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_no_class_holds_is_refused_with_a_reason(
    what: str, scheme: str, kind: str, options: dict[str, Any]
) -> None:
    model, resolved, _ = made(scheme, kind, **options)
    family, reasons = choose(model, resolved)
    assert family is None
    assert set(reasons) == {one.architecture for one in FAMILIES if one.family == "encdec"}
    if what == "residual.skip":
        assert "has eps 1e-05" in reasons["BartForConditionalGeneration"]
    else:
        told = what.replace("decoder.blocks.0.attention", "encoder.blocks.0.attention")  # the encoder comes first
        assert any(reason.startswith(told) for reason in reasons.values()), reasons


@pytest.mark.parametrize("scheme", ["lns", "layerscale", "deepnorm", "normformer"])
def test_folding_changes_nothing(scheme: str) -> None:
    options: dict[str, Any] = {**PAIRS, "positions": "learned", "embedding_scale": 1.5, "logit_scale": 0.5}
    norm: dict[str, Any] = {"gain": "one_plus"}
    if scheme == "normformer":
        norm["options"] = {"head_scale": "pre_projection", "residual_scale": True}
    model, resolved, state = made(scheme, "layernorm", **options, norm=norm)
    state = {name: tensor.double() for name, tensor in state.items()}
    plain_model, plain, folded = fold(model, resolved, state)
    plain, folded = fold_skip(plain, folded)
    before = custom.build(state, model, resolved, dtype=torch.float64)
    after = custom.build(folded, plain_model, plain, dtype=torch.float64)
    inputs = inputs_of(model, before)
    wanted = said(before, inputs)
    assert (wanted - said(after, inputs)).abs().max() <= 1e-12 * wanted.abs().max()
    assert (plain_model.embedding_scale, plain_model.logit_scale) == (1.0, 1.0)
    assert not [name for name in folded if "branch" in name or "head_scale" in name]


def _logits(model: Any, ids: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, **rest).logits
    return logits


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_a_folder_comes_in_and_goes_out_unchanged(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / name
    read, original = from_hf(source), reload(source)
    exact = native_forward(read.state, read.model, read.resolved, dtype=torch.float64)
    found, largest = difference(exact, source, 20, dtype=torch.float64)
    assert found <= 1e-5 * largest  # T5 computes its norms in fp32; exact numbers are in the golden itself
    to_hf(
        read.state,
        read.model,
        read.resolved,
        out=tmp_path / "out",
        reference=lambda ids, **rest: original(ids, **rest).logits,
    )
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before.pop("final_logits_bias", None)
    assert set(before) == set(after)
    for key, tensor in before.items():
        rows = 2 if key.endswith("embed_positions.weight") else 0  # that no token has
        assert torch.equal(tensor[rows:], after[key][rows:]), key
    assert from_hf(tmp_path / "out").model == read.model


def test_the_first_version_of_t5_scales_its_logits(shared: Path, tmp_path: Path) -> None:
    """It says so by tie_word_embeddings alone."""
    source = shared / "golden" / "hf" / "t5"
    fields = json.loads((source / "config.json").read_text())
    del fields["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(load_file(source / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = from_hf(tmp_path)
    assert read.model.logit_scale == 32**-0.5 and read.model.tied_head
    found, largest = difference(native_forward(read.state, read.model, read.resolved), tmp_path, 20)
    assert found <= 1e-5 * max(1.0, largest)


def test_what_megnorm_cannot_express_is_told(shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / "hf" / "mbart"
    tensors, fields = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    tensors["final_logits_bias"][0, 3] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="final_logits_bias: it is not zero"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "decoder_ffn_dim": 44}))
    with pytest.raises(ValueError, match="decoder_ffn_dim is 44; megnorm reads this class only with 40"):
        from_hf(tmp_path)


def test_an_untied_head_is_found_by_its_tensor(tmp_path: Path) -> None:
    """Later versions of transformers write of every T5 that its head is tied."""
    model, resolved, state = made("preln", **T5)
    to_hf(state, model, resolved, out=tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    read = from_hf(tmp_path / "a")
    assert not read.model.tied_head and torch.equal(read.state["head.weight"], state["head.weight"])


@pytest.mark.parametrize(("name", "pad", "start"), [("t5", 0, 0), ("mbart", 1, None)])
def test_special_tokens_come_in(name: str, pad: int, start: int | None, shared: Path, tmp_path: Path) -> None:
    """The run that is written can be planned, and leaves with the ids that it came with."""
    source = shared / "golden" / "hf" / name
    assert main(["convert", "--from", "hf", "--no-tokenizer", str(source), str(tmp_path / "run")]) == 0
    config = configs.load(tmp_path / "run" / "config.yaml", [f"data.path={tmp_path}/pairs"])
    assert (config.data.task, config.data.pad, config.data.start) == ("pairs", pad, start)
    assert make_plan(config, 1).config.model.family == "encdec"
    assert main(["convert", "--to", "hf", "--no-tokenizer", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["pad_token_id"], fields["decoder_start_token_id"]) == (pad, pad if start is None else start)


def test_odd_heads_leave_without_rotary_positions(tmp_path: Path) -> None:
    model: ModelConfig = replace(made("preln")[0], positions="learned", head_dim=5)
    resolved = resolve_model(model)
    state = random_state(model, resolved)
    reference = native_forward(state, model, resolved)
    assert to_hf(state, model, resolved, out=tmp_path / "a", reference=reference).architecture == "MegnormForCausalLM"
    assert from_hf(tmp_path / "a").model == model
