"""An encoder-decoder learns a toy language and translates it, from the command line too."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megnorm.cli import main
from megnorm.infer.beam import Beam
from megnorm.infer.translate import Translator, load, quality, read_pairs, translate
from megnorm.layers.env import Env
from megnorm.models.config import ModelConfig
from megnorm.models.encdec import EncoderDecoder
from megnorm.models.family import resolve_model
from megnorm.parallel.mesh import Mesh
from tests.train.test_families import write_pairs
from tests.train.tiny import write_config

WORDS = 24


def write_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    made.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every word becomes the next one."""
    folder = tmp_path_factory.mktemp("toy")
    pairs = write_pairs(folder / "pairs", count=800, vocab=WORDS)
    data = {"path": pairs, "task": "pairs", "pairs": {"tokens_per_batch": 512, "longest": 16}, "start": 1}
    config = write_config(
        folder,
        folder / "pairs",
        model={"family": "encdec", "layers": 1, "width": 32, "heads": 2, "ffn": 64, "vocab_size": WORDS,
               "max_positions": 16, "shared_embedding": True, "tied_head": True, "norm": {"scheme": "preln"}},
        data={**data, "tokenizer": write_tokenizer(folder / "tokenizer.json")},
        train={"out": str(folder / "run"), "steps": 600, "global_batch": 1, "micro_batch": 1, "eval_batches": 0, "threads": 1,
               "log_every": 50},
        optim={"lr": 1e-2, "warmup_steps": 20},
    )  # fmt: skip
    assert main(["train", "--config", str(config)]) == 0
    return folder / "run"


LINES = ["w5 w9 w4", "w20", "w7 w7 w3 w12 w15 w6"]
WANTED = ["w6w10w5", "w21", "w8w8w4w13w16w7"]


@pytest.mark.full
def test_it_translates(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = load(run)
    for size in (1, 4):
        assert translate(one, LINES, Beam(one.start, one.end, size, longest=16)) == WANTED
    assert translate(one, LINES, Beam(one.start, one.end, 2, longest=16), tokens=1) == WANTED
    file = tmp_path / "lines.tsv"
    file.write_text("\n".join(f"{a}\t{b}" for a, b in zip(LINES, WANTED, strict=True)), encoding="utf-8")
    assert main(["translate", str(run), "--input", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == WANTED
    assert main(["translate", str(run), "--input", str(file), "--longest", "40"]) == 2
    assert "the model takes 16" in capsys.readouterr().err
    file.write_text(" ".join(["w5"] * 30), encoding="utf-8")
    assert main(["translate", str(run), "--input", str(file)]) == 2
    assert "line 1 has 31 tokens and the model takes 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["eval", "x", "--task", "translation", "--pairs", "y"], ["translate", "x", "--references"]]
)
def test_scores_need_sacrebleu(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is missed before the model is looked for."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert main(words) == 2
    assert "pip install megnorm[scores]" in capsys.readouterr().err


def test_scores_are_sacrebleus() -> None:
    found = quality(["the cat sat on the mat ."], ["the cat sat on the mat ."])
    assert found.bleu == pytest.approx(100.0) and found.chrf == pytest.approx(100.0)
    bleu, chrf = found.lines
    assert bleu.startswith("BLEU = 100.00") and bleu.endswith(found.signatures["bleu"]) and "version:" in bleu
    assert chrf.startswith("chrF2 = 100.00")
    assert "tok:zh" in quality(["a"], ["a"], target="zh").signatures["bleu"]
    with pytest.raises(ValueError, match="1 translations and 2 references"):
        quality(["a"], ["a", "b"])


def test_scores_have_a_spread() -> None:
    """Half the interval that sacrebleu prints; of sentences that are all alike there is none."""
    said = ["the cat sat on the mat .", "a b c d e f"] * 10
    found = quality(said, ["the cat sat on a mat .", "a b c d e f"] * 10).values()
    assert f"± {found['bleu_spread']:.2f}" in quality(said, ["the cat sat on a mat .", "a b c d e f"] * 10).lines[0]
    assert 0.1 < found["bleu_spread"] < 20.0 and 0.1 < found["chrf_spread"] < 20.0
    alike = quality(said[:1] * 20, ["the cat sat on a mat ."] * 20).values()
    assert alike["bleu_spread"] == quality(["a"], ["b"]).spreads["bleu"] == 0.0


@pytest.mark.full
def test_translations_are_judged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the verb eval: a row for each file, with its signature, in eval.jsonl too; every checkpoint once."""
    names = [str(tmp_path / name) for name in ("right.tsv", "half.tsv")]
    for name, references in zip(names, (WANTED, [*WANTED[:2], "wrong"]), strict=True):
        text = "\n".join(f"{a}\t{b}" for a, b in zip(LINES, references, strict=True))
        Path(name).write_text(text + "\n", encoding="utf-8")
    words = ["eval", str(run), "--task", "translation", "--beam", "2", "--pairs", *names]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "chrf" in out and "eff:no|tok:13a" in out
    (report,) = (json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines())
    assert report["results"][names[0]]["chrf"] == pytest.approx(100.0)
    assert 20.0 < report["results"][names[1]]["chrf"] < 90.0
    assert report["step"] == 600 and "tok:13a" in report["signatures"][names[0]]["bleu"]
    assert main([*words, "--limit", "2", "--out", str(tmp_path / "two.jsonl")]) == 0
    limited = json.loads((tmp_path / "two.jsonl").read_text())["results"]
    assert limited[names[1]]["chrf"] == pytest.approx(100.0)
    assert main([*words, "--follow", "0", "--out", str(run / "eval.jsonl")]) == 0
    steps = [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()]
    assert steps.count(600) == 1 and len(steps) > 1  # of the other checkpoints that are kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "translation"], "give --pairs"),
        (["--task", "translation", "--pairs", "x", "--text", "y"], "--text is not for --task translation"),
        (["--task", "translation", "--pairs", "x", "--tasks", "y"], "--tasks is not for --task translation"),
        (["--task", "translation", "--pairs", "x", "--batch", "4"], "--batch is not for --task translation"),
        (["--task", "translation", "--pairs", "x", "--dtype", "bfloat16"], "computes in float32"),
        (["--text", "y", "--pairs", "x"], "--pairs is for --task translation"),
        (["--text", "y", "--to", "de"], "--to is for --task translation"),
    ],
)
def test_eval_refuses_what_it_would_not_heed(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_pairs_are_two_columns(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a b\tc\u2028d\n\ne\tf\tg\n", encoding="utf-8")
    assert read_pairs(tmp_path / "x.tsv") == (["a b", "e"], ["c\u2028d", "f"])
    (tmp_path / "x.tsv").write_text("a\tb\nc\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a line needs two columns"):
        read_pairs(tmp_path / "x.tsv")
    assert read_pairs(tmp_path / "x.tsv", limit=1) == (["a"], ["b"])


class Words:
    """Numbers as words."""

    vocab_size, eod = 100, 2

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [[int(word) for word in text.split()] for text in texts]
        return np.array([i for row in rows for i in row]), np.array([len(row) for row in rows])

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def token_id(self, name: str) -> int | None:
        return {"<2de>": 4, "<2fr>": 5}.get(name)


@pytest.mark.parametrize("tag_on", ["source", "target"])
def test_a_tag_stands_where_it_stood_in_training(tag_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """translate gives the search the source and the first token that the loader gives the model."""
    config = tiny_model()
    one = Translator(EncoderDecoder(*config), Words(), 1, 2, 0, {"de": 4, "fr": 5}, tag_on)
    asked = []

    def search(model: EncoderDecoder, source: Any, real: Any, beam: Beam) -> list[list[int]]:
        asked.append(([source[:, i][real[:, i]].tolist() for i in range(source.shape[1])], beam.start))
        return [[number] for number in range(source.shape[1])]

    monkeypatch.setattr("megnorm.infer.translate.beam_search", search)
    assert translate(one, ["8 9", "7"], Beam(1, 2, longest=8), to="fr") == ["1", "0"]  # the shorter one came first
    assert asked == [([[5, 7, 2], [5, 8, 9, 2]], 1) if tag_on == "source" else ([[7, 2], [8, 9, 2]], 5)]
    with pytest.raises(ValueError, match="translates to de, fr; choose one by --to"):
        translate(one, ["8"], Beam(1, 2, longest=8))
    with pytest.raises(ValueError, match="--to zh: the model was trained to de, fr alone"):
        translate(one, ["8"], Beam(1, 2, longest=8), to="zh")
    asked.clear()
    translate(replace(one, tags={"de": 4}), ["8"], Beam(1, 2, longest=8))
    assert asked == [([[4, 8, 2]], 1) if tag_on == "source" else ([[8, 2]], 4)]
    asked.clear()
    translate(replace(one, tags={}), ["8"], Beam(1, 2, longest=8))
    assert asked == [([[8, 2]], 1)]
    with pytest.raises(ValueError, match="without tags of languages"):
        translate(replace(one, tags={}), ["8"], Beam(1, 2, longest=8), to="de")


def tiny_model() -> tuple[ModelConfig, Any, int, Env]:
    cfg = ModelConfig(family="encdec", layers=1, width=8, heads=2, ffn=8, vocab_size=16, max_positions=8)
    return cfg, resolve_model(cfg), 16, Env(Mesh())
