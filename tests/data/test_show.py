"""``data inspect --task``: every kind of shared data as samples that a person can read."""

from pathlib import Path

import pytest

from megnorm.cli import main
from megnorm.data.preprocess import Job, run
from tests.data.helpers import numbered


def inspect(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["data", "inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_text(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text through the tasks causal, masked and spans."""
    tokenizer, source = shared / "data/tokenizers/wordpiece8k-en", shared / "data/text/test.jsonl.gz"
    run(Job((str(source),), str(tmp_path / "t"), str(tokenizer), eod_token="[SEP]", progress=False))
    about = [tmp_path / "t", "--tokenizer", tokenizer, "--count", 2, "--sequence-length", 64]
    told = inspect(capsys, *about, "--task", "causal", "--set", "separate_documents=true")
    assert "task causal" in told and "--- sample 1: 64 tokens in 1 pieces" in told and " the " in told
    told = inspect(capsys, *about, "--task", "masked", "--set", "mask.unit=word", "mask.begin='[CLS]'")
    assert "[MASK]" in told and "(masked)" in told and "[CLS]" in told and "to predict" in told
    told = inspect(capsys, *about, "--task", "spans", "--set", "spans.sentinels=[8192,8200]")
    sources, targets = (
        [line for line in told.splitlines() if line.startswith(side)] for side in ("source:", "target:")
    )
    assert len(sources) == len(targets) == 2
    assert all(line.index("<0>") < line.index("<1>") < line.index("<2>") for line in sources + targets)
    assert all(line.startswith("target: <0>") for line in targets)


@pytest.mark.parametrize("languages", ["en-de", "en-fr", "en-zh"])
def test_pairs(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], languages: str) -> None:
    tokenizer, source = shared / "data/tokenizers/unigram8k-multi", shared / f"data/parallel/test.{languages}.tsv"
    keys = ("0", "1")
    run(Job((str(source),), str(tmp_path / "p"), str(tokenizer), keys=keys, eod_token="</s>", progress=False))
    told = inspect(capsys, tmp_path / "p", "--tokenizer", tokenizer, "--task", "pairs", "--count", 1)
    assert "source: " in told and "target: " in told and "of them real" in told
    english = [line.split("\t")[0] for line in source.read_text().splitlines()]
    shown = [
        line.removeprefix("source: ").replace("</s>", "").strip() for line in told.splitlines() if "source: " in line
    ]
    assert len(shown) == 3 and set(shown) <= set(english)


def test_classes(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = shared / "data/tokenizers/wordpiece8k-en"
    told = inspect(
        capsys, shared / "data/tasks/wnhyper.valid.tsv", "--tokenizer", tokenizer, "--task", "classes", "--count", 4
    )
    assert "[CLS]" in told and told.count("entailment") == 4 and "388 samples in an epoch" in told


def test_numbers_without_a_tokenizer_and_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = numbered(tmp_path / "x", 500)
    assert "[0:16] " in inspect(capsys, path, "--task", "causal", "--sequence-length", 16)
    for words, wanted in (
        (["--task", "causal", "--set", "nothing=1"], "'nothing=1': write key=value with a key of data"),
        (["--task", "causal", "--set", "mask.unit.x.y=1"], "'mask.unit.x.y=1': write key=value"),
        (["--task", "causal", "--set", "mask.token=[MASK"], "'mask.token=[MASK': the value is broken YAML"),
        (["--task", "masked", "--set", "mask.unit=letter"], "data.mask.unit: Input should be"),
        (["--set", "mask.unit=word"], "needs --task"),
        (["--task", "masked"], "data.tokenizer is needed for data.task=masked"),
    ):
        assert main(["data", "inspect", path, *words]) == 2
        assert wanted in capsys.readouterr().err
