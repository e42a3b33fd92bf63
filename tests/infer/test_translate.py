"""An encoder-decoder learns a toy language and translates it, from the command line too."""

import sys
from pathlib import Path

import pytest

from megnorm.cli import main
from megnorm.infer.beam import Beam
from megnorm.infer.translate import load, quality, translate
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


def test_scores_need_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"pip install megnorm\[eval\]"):
        quality(["a"], ["a"])


def test_scores_are_sacrebleus() -> None:
    pytest.importorskip("sacrebleu")
    bleu, chrf = quality(["the cat sat on the mat ."], ["the cat sat on the mat ."])
    assert bleu.startswith("BLEU = 100.00") and "version:" in bleu
    assert chrf.startswith("chrF2 = 100.00")
    with pytest.raises(ValueError, match="1 translations and 2 references"):
        quality(["a"], ["a", "b"])
