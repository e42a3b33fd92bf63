"""The exported folder: whole or absent, complete, loadable, with tokenizer and card; and the verb that writes it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from megnorm import cli
from megnorm.data import tokenizer as tokenizers
from megnorm.hf.card import Card
from megnorm.hf.compare import LogitMismatch
from megnorm.hf.convert import from_hf, to_hf
from megnorm.hf.native import native_forward, read_native, write_native
from tests.hf.tiny import made, reload, tokens

TEXT = "the cat sat on the mat and the dog sat on the log " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train([TEXT], folder, vocab_size=270)
    return folder


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Path:
    """A run folder as `train` leaves it."""
    model, resolved, state = made("hybridnorm", vocab_size=280)
    write_native(tmp_path / "run", model, resolved, state, tokenizer=str(tokenizer))
    return tmp_path / "run"


def test_a_whole_folder(tmp_path: Path, tokenizer: Path) -> None:
    model, resolved, state = made("normformer", vocab_size=280)
    card = Card("apache-2.0", ["en"], ["own"])
    out = tmp_path / "deep" / "model"
    export = to_hf(
        state, model, resolved, out=out, tokenizer=tokenizer / "tokenizer.json",
        reference=native_forward(state, model, resolved), card=card,
    )  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert names >= {"modeling_megnorm.py", "configuration_megnorm.py", "norms_megnorm.py", "tokenizer_config.json"}
    assert export.difference is not None and export.difference < 1e-4 and "LlamaForCausalLM" in export.refused
    fields = json.loads((out / "config.json").read_text())
    assert set(fields["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert fields["architectures"] == ["MegnormForCausalLM"] and fields["dtype"] == "float32"
    assert fields["eos_token_id"] == 0 and fields["pad_token_id"] == 1
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "language": ["en"], "datasets": ["own"], "tags": ["megnorm", "normformer"],
    }  # fmt: skip
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_the_tokenizer_loads_and_means_the_same(run: Path, tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    assert cli.main(["convert", "--to", "hf", str(run), str(tmp_path / "out")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tokenizers.load(str(tokenizer))
    text = "the cat sat äöü\n 42"
    assert theirs(text)["input_ids"] == list(next(iter(ours.encode_batch([text]))))
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.model_max_length == 48
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)


def test_large_weights_are_sharded(tmp_path: Path) -> None:
    model, resolved, state = made("hybridnorm")
    to_hf(state, model, resolved, out=tmp_path / "a", max_shard_size="8KB",
          reference=native_forward(state, model, resolved), tolerance=1e-4)  # fmt: skip
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("model-*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in state.values())
    read = from_hf(tmp_path / "a")
    assert all(torch.equal(read.state[name], state[name]) for name in state)
    assert read.model == replace(model, head_dim=model.hd) and read.resolved == resolved


@pytest.mark.parametrize("tied", [False, True])
def test_the_tied_head_is_left_out(tied: bool, tmp_path: Path) -> None:
    model, resolved, state = made("hybridnorm", tied_head=tied)
    to_hf(state, model, resolved, out=tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    loaded = reload(tmp_path / "a")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_low_precision_is_compared_before_it_is_rounded(tmp_path: Path) -> None:
    model, resolved, state = made("keel")
    reference = native_forward(state, model, resolved)
    export = to_hf(
        state, model, resolved, out=tmp_path / "a", reference=reference, dtype=torch.bfloat16, tolerance=1e-4
    )
    assert export.difference is not None and export.difference < 1e-3
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("native", [True, False])
def test_other_logits_leave_no_folder(native: bool, tmp_path: Path) -> None:
    model, resolved, state = made("preln")
    wrong = dict(state)
    wrong["blocks.1.ffn.down.weight"] = state["blocks.1.ffn.down.weight"] * 1.01
    reference = native_forward(state, model, resolved)
    with pytest.raises(LogitMismatch, match=r"differs from the model by .* nothing was written"):
        to_hf(wrong, model, resolved, out=tmp_path / "a", reference=reference, native=native)
    assert not list(tmp_path.iterdir())


def test_rounding_is_told_from_a_difference(tmp_path: Path) -> None:
    """What fp32 makes too large fp64 decides: rounding passes, another model does not."""
    model, resolved, state = made("preln")
    plain, exact = native_forward(state, model, resolved), native_forward(state, model, resolved, dtype=torch.float64)
    rounded = {"reference": lambda ids: plain(ids) + 1e-3, "exact": lambda: exact}
    with pytest.raises(LogitMismatch, match="differs from the model by 0.001"):
        to_hf(state, model, resolved, out=tmp_path / "a", reference=rounded["reference"])
    export = to_hf(state, model, resolved, out=tmp_path / "a", **rounded)  # type: ignore[arg-type]
    assert export.precision == "fp64" and export.difference is not None and export.difference < 1e-5
    wrong = {**state, "blocks.1.ffn.down.weight": state["blocks.1.ffn.down.weight"] * 1.01}
    with pytest.raises(LogitMismatch, match="nothing was written"):
        to_hf(wrong, model, resolved, out=tmp_path / "b", **rounded)  # type: ignore[arg-type]


def test_not_a_number_is_a_mismatch(tmp_path: Path) -> None:
    model, resolved, state = made("preln")
    with pytest.raises(LogitMismatch):
        to_hf(state, model, resolved, out=tmp_path / "a", reference=lambda ids: torch.full((*ids.shape, 61), torch.nan))


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    model, resolved, state = made("preln")
    out = tmp_path / "a"
    out.mkdir()
    (out / "mine").write_text("dear")
    with pytest.raises(ValueError, match="exists already"):
        to_hf(state, model, resolved, out=out)
    with pytest.raises(LogitMismatch):
        to_hf(state, model, resolved, out=out, overwrite=True, reference=lambda ids: torch.zeros(*ids.shape, 61))
    assert (out / "mine").read_text() == "dear"
    to_hf(state, model, resolved, out=out, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("final_norm.weight"), "no tensor 'final_norm.weight'"),
        (lambda s: s.update({"final_norm.weight": torch.ones(3)}), r"'final_norm.weight' is \(3,\).*\(16,\)"),
        (lambda s: s.update({"other": torch.ones(3)}), "tensor 'other' that the model config does not know"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    model, resolved, state = made("preln")
    change(state)
    with pytest.raises(ValueError, match=message):
        to_hf(state, model, resolved, out=tmp_path / "a")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, tokenizer: Path) -> None:
    model, resolved, state = made("preln")
    with pytest.raises(ValueError, match="270 tokens and the model 61"):
        to_hf(state, model, resolved, out=tmp_path / "a", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_missing_files_are_named(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*words: str) -> str:
        assert cli.main(["convert", *words, str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no checkpoint there" in refusal("--to", "hf", str(tmp_path / "nowhere"))
    assert "config.json: there is no such file" in refusal("--from", "hf", str(tmp_path / "nowhere"))
    assert "no tokenizer there" in refusal("--to", "hf", str(run), "--tokenizer", str(tmp_path / "none.json"))


def test_there_and_back_by_the_verb(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = tmp_path / "hf", tmp_path / "again"
    assert cli.main(["convert", "--to", "hf", str(run), str(out), "--tolerance", "1e-4"]) == 0
    said = capsys.readouterr().out
    assert "max |logit difference| between megnorm and transformers, fp32:" in said
    assert "not LlamaForCausalLM: blocks.0.attention.input" in said
    assert cli.main(["convert", "--from", "hf", str(out), str(again)]) == 0
    before, after = read_native(run), read_native(again)
    assert replace(before.model, head_dim=before.model.hd) == after.model and before.resolved == after.resolved
    assert set(before.state) == set(after.state)
    assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)
    assert after.tokenizer == str(out)


def test_the_verb_refuses_a_mismatch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", "--to", "hf", str(run), str(tmp_path / "out"), "--tolerance", "0"]) == 2
    assert "differs from the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_code_stays_in_the_cache(tmp_path: Path, code_cache: Path) -> None:
    model, resolved, state = made("hybridnorm")
    before = {path for path in code_cache.rglob("*.py") if path.name.startswith("modeling")}
    to_hf(state, model, resolved, out=tmp_path / "a", reference=native_forward(state, model, resolved), tolerance=1e-4)
    assert {path for path in code_cache.rglob("*.py") if path.name.startswith("modeling")} == before
    with torch.no_grad():
        assert reload(tmp_path / "a")(tokens(model)).logits.isfinite().all()
