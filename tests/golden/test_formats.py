"""What the golden tool reads: names, placements, broken files, and what it says at the end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from check_goldens import load, main
from goldens import frontier, llama, neutral, placement, xtransformers
from goldens.case import NotCovered, choose, find, from_yaml, to_yaml, with_ends
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megnorm.models.config import ModelConfig
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from megnorm.norms.scheme import Layer

PLACES = {
    "none": "none",
    "pre": "pre_norm (x+F(N(x)))",
    "normed": "norm_then_residual_from_normed (Z=N(x); Z+F(Z))",
}


def read_back(layer: Layer) -> tuple[str, str, tuple[str, ...]]:
    words = []
    for sub in (layer.attention, layer.ffn):
        assert sub.post is None and sub.output is None
        words.append("none" if sub.input is None else {"stream": "pre", "input": "normed"}[sub.residual.source])
    heads = tuple(site for site in ("q", "k", "v", "context") if getattr(layer.attention, site) is not None)
    return words[0], words[1], heads


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(list(PLACES)), st.sampled_from(list(PLACES))), min_size=1, max_size=6),
    st.sets(st.sampled_from(["query", "key", "value", "context"])),
)
def test_any_placement_list_becomes_that_model(layers: list[tuple[str, str]], heads: set[str]) -> None:
    config: dict[str, Any] = {
        "layers": len(layers),
        "per_head_norms": {word: word in heads for word in ("query", "key", "value", "context")},
        "placement_per_layer": [{"attention_sublayer": PLACES[a], "ffn_sublayer": PLACES[f]} for a, f in layers],
    }
    norm = placement.norm_of(config)
    resolved = resolve(norm, len(layers))
    sites = tuple(site for word, site in placement.SITES.items() if word in heads)
    assert [read_back(layer) for layer in resolved.layers] == [(a, f, sites) for a, f in layers]
    assert resolved.final is not None and resolved.embedding is None
    assert from_yaml(to_yaml(ModelConfig(layers=len(layers), norm=norm))).norm == norm


def test_a_placement_list_of_another_length_is_refused() -> None:
    config = {"layers": 2, "per_head_norms": {}, "placement_per_layer": []}
    with pytest.raises(ValueError, match="0 entries for 2 layers"):
        placement.norm_of(config)


@pytest.mark.parametrize(
    ("flags", "place", "final", "scheme"),
    [
        ({}, "pre", True, NormConfig("preln")),
        ({}, "post", False, NormConfig("postln")),
        ({}, "post", True, NormConfig("postln", {"final_norm": True})),
    ],
)
def test_fairseq_flags(flags: dict[str, bool], place: str, final: bool, scheme: NormConfig) -> None:
    norm, own = neutral._norm({"norm_placement": place, **flags})
    assert with_ends(norm, embedding=False, final=final) == scheme
    assert own == {"pre": "input_norm", "post": "post_norm"}[place]


def test_ends_without_an_option_are_patched() -> None:
    norm = with_ends(NormConfig("lns"), embedding=True, final=False)
    resolved = resolve(norm, 2)
    assert resolved.embedding is not None and resolved.final is None


@pytest.mark.parametrize("layers", [2, 5])
def test_alpha_of_the_json(layers: int) -> None:
    """The paper's alpha is the scheme's own formula; any other is given as a number."""
    stack = {"deepnorm": True, "layers": layers, "residual_alpha": (2 * layers) ** 0.25}
    assert neutral._torchscale(stack, "post") == NormConfig("deepnorm")
    assert neutral._torchscale({**stack, "residual_alpha": 1.25}, "post") == NormConfig("deepnorm", {"skip": 1.25})
    plain = neutral._torchscale({"layers": layers, "sub_ln": True, "residual_alpha": 1.25}, "pre")
    skips = {layer.ffn.residual.skip.value for layer in resolve(plain, layers).layers}
    assert plain.scheme == "subln" and skips == {1.25}


def test_llama_names_by_kind_of_layer() -> None:
    data = {"norm_type": "post_pre", "config": {"post_num": 2, "num_hidden_layers": 5}}
    rename = llama.renaming(data)
    name = "model.layers.{}.post_attention_layernorm.weight"
    assert rename(name.format(1))[0].name == "blocks.1.attention.post_norm.weight"
    assert rename(name.format(2))[0].name == "blocks.2.ffn.input_norm.weight"
    with pytest.raises(ValueError, match="not documented for norm_type 'post_pre'"):
        rename("model.layers.2.post_feedforward_layernorm.weight")
    assert llama.norm_of(data) == NormConfig("mixln", {"post_layers": 2})


def test_lns_is_the_kept_factor_only() -> None:
    config = {"num_hidden_layers": 3}
    kept = {"norm_type": "LNS", "branch_input_scale": "1/sqrt(i+1), i = 0-based", "config": config}
    assert llama.norm_of(kept).scheme == "lns"
    assert llama.norm_of({"norm_type": "lns", "config": config}).scheme == "preln"
    with pytest.raises(ValueError, match="branch_input_scale"):
        llama.norm_of({**kept, "branch_input_scale": "1/(i+1)"})


def test_x_transformers_additions_join_in_any_placement() -> None:
    config = {"depth": 3, "sandwich_norm": True, "use_layerscale": True, "attn_qk_norm": True, "use_rmsnorm": True}
    norm = xtransformers._norm(config, final=True)
    assert norm.scheme == "sandwich"
    for layer in resolve(norm, 3).layers:
        assert layer.attention.residual.branch.learned == layer.ffn.residual.branch.learned == "width"
        assert layer.attention.q is not None and layer.attention.q.scale == 10.0
        assert layer.attention.output is not None
    keel = xtransformers._norm({"depth": 3, "pre_and_post_norm": True, "scale_residual_constant": 6.0}, final=False)
    assert keel.options == {"exceptions": False} and resolve(keel, 3).layers[0].ffn.residual.skip.value == 6.0


def test_the_gated_projection_is_cut_in_value_and_gate() -> None:
    weight = torch.arange(12.0).view(6, 2)
    up, gate = xtransformers.rename("attn_layers.layers.3.1.ff.0.proj.weight")
    assert (up.name, gate.name) == ("blocks.1.ffn.up.weight", "blocks.1.ffn.gate.weight")
    assert up.weight(weight).tolist() == weight[:3].tolist() and gate.weight(weight).tolist() == weight[3:].tolist()
    (gain,) = xtransformers.rename("attn_layers.layers.0.1.value_rmsnorm.gamma")
    assert gain.weight(torch.zeros(2, 1, 4)).tolist() == torch.ones(2, 4).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block11.attention.query.bias", "blocks.11.attention.q.bias"),
        ("decoder.block0.ffn.norm.gain", "blocks.0.ffn.input_norm.weight"),
        ("block0.attention.inner_norm.gain", "blocks.0.attention.context_norm.weight"),
        ("block0.ffn.inner_norm.bias", "blocks.0.ffn.inner_norm.bias"),
        ("block0.ffn.residual_scale", "blocks.0.ffn.residual.skip"),
        ("embedding.norm.gain", "embed.norm.weight"),
        ("lm_head.bias", "head.bias"),
    ],
)
def test_neutral_names(name: str, expected: str) -> None:
    assert neutral.canonical(name, "input_norm") == expected


@pytest.mark.parametrize("name", ["block0.attention.foo.weight", "block0.mlp.up.weight", "block0.ffn.up", "x"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not documented"):
        neutral.canonical(name, "input_norm")


def test_remarks_in_brackets() -> None:
    assert choose(neutral.ACTIVATIONS, "gelu (exact erf)", "activation") == "gelu"
    assert choose(neutral.ACTIVATIONS, "gelu (tanh approximation)", "activation") == "gelu_tanh"
    with pytest.raises(ValueError, match=r"config.activation: 'mish' is not a documented value"):
        choose(neutral.ACTIVATIONS, "mish", "activation")


@pytest.mark.parametrize(
    ("data", "tensors", "reason"),
    [
        ({"config": {"patch": 4}}, (), "a vision model"),
        ({"config": {"base_scale": 0.1}}, ("param.sz",), "weights projected after each step"),
        ({"config": {"add_value_residual": True}}, (), "value residual"),
    ],
)
def test_not_covered(data: dict[str, Any], tensors: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        frontier.case(data, dict.fromkeys(tensors, torch.zeros(1)))


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    for name in ("hybrid_dense__hybridnorm", "frontier/mixln_pre"):
        for suffix in (".json", ".safetensors"):
            target = tmp_path / "deep" / f"{Path(name).name}{suffix}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(shared / "golden" / f"{name}{suffix}", target)
    return tmp_path


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "statistics.json").write_text('{"q": {"std": 0.02}}')
    (folder / "hf2.5").mkdir()
    for name in ("config.json", "golden.json"):
        (folder / "hf2.5" / name).write_text('{"model_type": "mamba"}')
    assert main([str(folder)]) == 0
    lines = lines_of(capsys)
    assert [line.split(":")[0] for line in lines[:-1]] == ["deep/hybrid_dense__hybridnorm", "deep/mixln_pre", "hf2.5"]
    assert lines[0].endswith("  pass") and "hybridnorm  logits " in lines[0]
    assert lines[2].endswith("not covered (megnorm does not import model_type 'mamba')")
    assert lines[-1] == "2 passed, 0 failed, 1 not covered"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json holds no fields"),
        ("config.json", "{}", "config.model_type is missing"),
        ("golden.safetensors", "{", "golden.safetensors cannot be read"),
    ],
)
def test_a_broken_folder_fails(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, words: str
) -> None:
    shutil.copytree(shared / "golden" / "hf" / "llama", tmp_path / "llama")
    (tmp_path / "llama" / file).unlink()
    (tmp_path / "llama" / file).write_text(text)
    assert main([str(tmp_path)]) == 1
    assert words in lines_of(capsys)[0]


def test_the_printed_config_is_the_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--verbose"]) == 0
    text = capsys.readouterr().out.split("# worst gradient")[0]
    assert from_yaml(text) == load(folder / "deep" / "hybrid_dense__hybridnorm.json").model


def test_broken_goldens_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = folder / "deep"
    pair = deep / "mixln_pre.safetensors"
    (deep / "torn.json").write_text((deep / "mixln_pre.json").read_text())
    (deep / "torn.safetensors").write_bytes(pair.read_bytes()[:-100])
    (deep / "lonely.safetensors").write_bytes(pair.read_bytes())
    (deep / "empty.json").write_text((deep / "mixln_pre.json").read_text())
    (deep / "garbled.json").write_text("{")
    (deep / "garbled.safetensors").write_bytes(pair.read_bytes())
    changed = json.loads((deep / "mixln_pre.json").read_text())
    changed["norm_type"] = "sideways"
    (deep / "unknown.json").write_text(json.dumps(changed))
    (deep / "unknown.safetensors").write_bytes(pair.read_bytes())
    tensors = load_file(pair)
    (deep / "partial.json").write_text((deep / "mixln_pre.json").read_text())
    save_file(
        {name: value for name, value in tensors.items() if name != "grad.model.norm.weight"},
        deep / "partial.safetensors",
    )
    assert main([str(folder)]) == 1
    lines = {line.split(":")[0]: line for line in lines_of(capsys)}
    assert lines["deep/mixln_pre"].endswith("  pass")
    assert "torn.safetensors cannot be read" in lines["deep/torn"]
    assert "there is no lonely.json beside the tensors" in lines["deep/lonely"]
    assert "there is no empty.safetensors beside the json" in lines["deep/empty"]
    assert "garbled.json is no JSON" in lines["deep/garbled"]
    assert "config.norm_type: 'sideways'" in lines["deep/unknown"]
    assert "the tensor 'grad.model.norm.weight' is missing" in lines["deep/partial"]
    assert "2 passed, 6 failed, 0 not covered" in lines


def test_a_changed_weight_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "deep" / "hybrid_dense__hybridnorm.safetensors"
    tensors = load_file(path)
    tensors["weight/block1.attention.key_norm.gain"][3] += 1e-4
    save_file(tensors, path)
    assert main([str(folder)]) == 1
    assert "1 passed, 1 failed, 0 not covered" in lines_of(capsys)


@pytest.mark.full
@pytest.mark.parametrize("words", (["--tp", "2"], ["--pp", "2"]))
def test_ranks_of_its_own(folder: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main([str(folder), *words]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 not covered"


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert lines_of(capsys)[-1] == "0 passed, 0 failed, 0 not covered"
    for arguments, words in (
        ([str(tmp_path), "--pp", "0"], "give 1 or more"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(tmp_path), "--tp", "0"], "give 1 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


def test_find_sees_every_golden_once(folder: Path) -> None:
    found = list(find(folder))
    assert len(found) == len(set(found)) == 2
