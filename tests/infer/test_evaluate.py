"""Likelihoods against the model's own logits; perplexities against sums by hand; checkpoints judged as they come."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm import cli
from megnorm.data import tokenizer as tokenizers
from megnorm.hf.convert import to_hf
from megnorm.hf.native import write_native
from megnorm.infer.evaluate import TextLoss, begin_of, text_loss
from megnorm.infer.generate import Generator, load
from megnorm.infer.harness import continuation, pair
from megnorm.infer.score import likelihoods, windows
from megnorm.models.config import AttentionConfig
from tests.hf.tiny import made

TEXTS = ["the cat sat on the mat", "and the dog\nsat on the log, " * 6, "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(["the cat sat on the mat and the dog sat on the log " * 20], folder, vocab_size=270)
    return folder


@pytest.fixture(params=["rotary", "alibi"])
def run(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Path) -> Path:
    model, resolved, state = made(
        "hybridnorm", vocab_size=280, max_positions=16, positions=request.param, attention=AttentionConfig(window=5)
    )
    write_native(tmp_path / "run", model, resolved, state, tokenizer=str(tokenizer))
    return tmp_path / "run"


def log_p(generator: Generator, ids: Sequence[int], last: int) -> float:
    """Of the last tokens of a row, in one forward pass of it alone."""
    with torch.no_grad():
        log = generator.model(torch.tensor([ids[:-1]])).logits.double().log_softmax(-1)[0]
    return float(sum(log[len(ids) - last - 1 + i, token] for i, token in enumerate(ids[-last:])))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_likelihoods_are_the_models(run: Path, batch: int) -> None:
    """In batches of rows of all lengths; what is too long loses its beginning."""
    generator = load(run)
    rows = [([5, 9, 31], [7]), ([12], [3, 40, 41]), ([8] * 9 + [2], [4, 5]), (list(range(30)), [1, 2]), ([3], [])]
    found = likelihoods(generator.model, rows, longest=16, batch=batch)
    for one, (given, asked) in zip(found, rows, strict=True):
        if not asked:
            assert (one.log, one.greedy) == (0.0, True)
            continue
        ids = (given + asked)[-17:]
        assert one.log == pytest.approx(log_p(generator, ids, len(asked)), abs=1e-4)
        with torch.no_grad():
            best = generator.model(torch.tensor([ids[:-1]])).logits[0].argmax(-1).tolist()
        assert one.greedy == (best[-len(asked) :] == asked)
    greedy = [int(generator.model(torch.tensor([[5, 9, 31]])).logits[0, -1].argmax())]
    assert likelihoods(generator.model, [([5, 9, 31], greedy)], longest=16, batch=1)[0].greedy


@pytest.mark.parametrize("length", [1, 4, 5, 11])
@pytest.mark.parametrize("longest", [1, 4, 5, None])
def test_windows_ask_for_every_token_once(length: int, longest: int | None) -> None:
    tokens = list(range(10, 10 + length))
    rows = windows(tokens, 0, longest)
    assert [token for _, asked in rows for token in asked] == tokens
    whole = [0, *tokens]
    for given, asked in rows:
        row = given + asked
        assert given and row == whole[whole.index(row[0]) :][: len(row)]
        assert longest is None or len(row) <= longest + 1
    assert longest is None or all(len(given + asked) == longest + 1 for given, asked in rows[1:])


def test_perplexities_by_token_byte_and_word(run: Path) -> None:
    generator = load(run)
    found = text_loss(generator, TEXTS, batch=2)
    nats = tokens = 0.0
    for text in TEXTS:
        ids = [begin_of(generator), *generator.tokenizer(text, add_special_tokens=False)["input_ids"]]
        tokens += len(ids) - 1
        for first in range(1, len(ids), 16):
            last = min(first + 16, len(ids))
            row = ids[max(last - 17, 0) : last]
            nats -= log_p(generator, row, last - first)
    assert (found.tokens, found.bytes) == (tokens, sum(map(len, TEXTS)))
    assert found.words == 6 + 43 + 1  # the split of lm-eval counts the emptiness behind a last space
    assert found.nats == pytest.approx(nats, abs=1e-3)
    values = TextLoss(math.log(2.0) * 12, 4, 6, 2).values()
    assert values["token_perplexity"] == pytest.approx(8.0) and values["byte_perplexity"] == pytest.approx(4.0)
    assert values["word_perplexity"] == pytest.approx(64.0) and values["bits_per_byte"] == pytest.approx(2.0)


def test_a_run_and_its_export_are_judged_alike(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert cli.main(["convert", "--to", "hf", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--text", str(texts)]) == 0
    assert cli.main(["eval", str(tmp_path / "hf"), "--text", str(texts), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert not (tmp_path / "hf" / "eval.jsonl").exists()
    ours, theirs = (json.loads(path.read_text()) for path in (run / "eval.jsonl", tmp_path / "out.jsonl"))
    assert (ours["step"], theirs["step"]) == (0, None)
    for name, value in ours["results"][str(texts)].items():
        assert theirs["results"][str(texts)][name] == pytest.approx(value, rel=1e-4)
    assert "bits_per_byte" in capsys.readouterr().out


def test_limits_and_refusals(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert cli.main(["eval", str(run), "--text", str(texts), "--limit", "1"]) == 0
    generator = load(run)
    one = text_loss(generator, TEXTS[:1], batch=2).values()["loss"]
    assert json.loads((run / "eval.jsonl").read_text())["results"][str(texts)]["loss"] == pytest.approx(one)
    for words, message in (
        ([], "nothing to judge by"),
        (["--text", str(tmp_path / "gone.jsonl")], "no such file"),
        (["--text", str(texts), "--key", "body"], "no key 'body'"),
    ):
        assert cli.main(["eval", str(run), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no tokenizer"):
        text_loss(replace(generator, tokenizer=None), TEXTS, batch=2)


def test_every_checkpoint_of_a_run_is_judged_once(tmp_path: Path) -> None:
    """Also one that lies there twice in a row; the last step ends it."""
    from tests.train.tiny import write_config, write_data

    data = write_data(tmp_path / "text", vocab=257)
    model = {"layers": 1, "width": 16, "heads": 2, "ffn": 24, "vocab_size": 270, "max_positions": 16}
    config = write_config(tmp_path, data, model=model, checkpoint={"every": 2})
    tokens = tmp_path / "tokenizer"
    tokenizers.train(["a text of some words " * 9], tokens, vocab_size=270)
    words = [f"data.tokenizer={tokens}", "train.steps=4", "train.eval_units=true"]
    assert cli.main(["train", "--config", str(config), *words]) == 0
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a text of words"}) + "\n")
    for _ in range(2):
        assert cli.main(["eval", str(tmp_path / "run"), "--text", str(texts), "--follow", "0.1"]) == 0
        lines = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]
    other = tmp_path / "others.jsonl"
    other.write_text(json.dumps({"text": "other words"}) + "\n")
    assert cli.main(["eval", str(tmp_path / "run"), "--text", str(texts), str(other), "--follow", "0.1"]) == 0
    lines = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 2, 4], "what was not asked for before is judged"
    record = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record[-1]["valid_bits_per_byte"] > 0.0 and record[-1]["valid_word_perplexity"] > 1.0


def test_bytes_and_words_of_held_out_tokens() -> None:
    from megnorm.train.text_units import text_of

    tokenizer = tokenizers.load("bytes")
    end = tokenizer.eod

    def count(before: Any, text: str, *more: str) -> tuple[int, int]:
        ids = list(text.encode())
        for other in more:
            ids += [end, *other.encode()]
        return text_of(tokenizer, end if before is None else ord(before), ids)

    assert count(None, "two words") == (9, 2)
    assert count(" ", "two words ") == (10, 2)
    assert count("x", "yz two") == (6, 1)
    assert count("x", " yz two") == (7, 2)
    assert count("x", "yz", "one", "two three") == (14, 3)
    assert count("x", "") == (0, 0)


def test_contexts_and_continuations(run: Path) -> None:
    generator = load(run)
    encode = generator.tokenizer
    given, asked = pair(generator, "the cat ", "sat")
    assert given == encode("the cat")["input_ids"] and given + asked == encode("the cat sat")["input_ids"]
    assert pair(generator, "", "the") == ([begin_of(generator)], encode("the")["input_ids"])
    text = continuation(generator, "the cat" * 9, {"until": [" "], "max_gen_toks": 8}, seed=1)
    longer = continuation(generator, "the cat" * 9, {"max_gen_toks": 8}, seed=1)
    assert longer.startswith(text) and " " not in text


TASKS = {
    "cloze": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{target}}'\ntarget_delimiter: ''\n"
    "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]",
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
    "metric_list: [{metric: acc, aggregation: mean}]",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{context}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
    "write": "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{target}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 4, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean}]",
}


@pytest.mark.full
def test_tasks_of_lm_eval(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of request, from files; their numbers are those of likelihoods by hand."""
    pytest.importorskip("lm_eval")
    from megnorm.infer.harness import run_tasks

    generator = load(run)
    items = [{"context": "the cat sat on", "target": " the", "choices": ["a mat", "the log"], "label": 1},
             {"context": "and the dog", "target": " sat", "choices": ["on", "the cat sat"], "label": 0}]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, body in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\ntest_split: test\n"
        (tmp_path / f"tiny_{name}.yaml").write_text(f"task: tiny_{name}\n{data}{body}\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = run_tasks(generator, [f"tiny_{name}" for name in TASKS], include=tmp_path, batch=2)

    def p(context: str, text: str) -> float:
        return likelihoods(generator.model, [pair(generator, context, text)], longest=16, batch=1)[0].log

    cloze = [p(str(item["context"]), str(item["target"])) for item in items]
    assert found["tiny_cloze"]["perplexity"] == pytest.approx(math.exp(-sum(cloze) / 2), rel=1e-4)
    best = [max((0, 1), key=lambda i: p(str(item["context"]), " " + item["choices"][i])) for item in items]  # type: ignore[index]
    assert found["tiny_choice"]["acc"] == sum(b == item["label"] for b, item in zip(best, items, strict=True)) / 2
    rolling = text_loss(generator, [str(item["context"]) for item in items], batch=2).values()
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found["tiny_rolling"][name] == pytest.approx(rolling[name], rel=1e-4)
    assert 0.0 <= found["tiny_write"]["exact_match"] <= 1.0
    with pytest.raises(ValueError, match="lm-eval knows no 'tiny_gone'"):
        run_tasks(generator, ["tiny_gone"], include=tmp_path)


def test_an_export_without_tokenizer_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, resolved, state = made("hybridnorm")
    to_hf(state, model, resolved, out=tmp_path / "hf")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    assert cli.main(["eval", str(tmp_path / "hf"), "--text", str(tmp_path / "t.jsonl")]) == 2
    assert "has no tokenizer; give --tokenizer" in capsys.readouterr().err
