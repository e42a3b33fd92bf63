"""A masked language model is fine-tuned: to classes of pairs of texts, and to numbers, with several seeds."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.metrics.record import Record
from megnorm.train.finetune import reached, table
from tests.train.tiny import write_config, write_data

MODEL = {
    "layers": 2, "width": 32, "heads": 2, "ffn": 48, "vocab_size": 64, "max_positions": 16, "segments": 2,
    "positions": "learned", "norm": {"scheme": "normformer"}, "init": {"std": 0.08},
}  # fmt: skip


def write_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {**{f"w{i}": i for i in range(60)}, "[CLS]": 60, "[SEP]": 61, "[MASK]": 62, "[PAD]": 63}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path))
    return str(path)


def write_tasks(folder: Path, rows: int, seed: int) -> tuple[str, str]:
    """Pairs of texts: whether they begin alike; how many low words both have."""
    random = np.random.default_rng(seed)
    lines: dict[str, list[str]] = {"same": ["a\tb\tlabel"], "count": ["a\tb\tlabel"]}
    for _ in range(rows):
        a, b = random.integers(0, 60, 4), random.integers(0, 60, 3)
        if random.random() < 0.5:
            b[0] = a[0]
        texts = "\t".join(" ".join(f"w{i}" for i in part) for part in (a, b))
        lines["same"].append(f"{texts}\t{'yes' if a[0] == b[0] else 'no'}")
        lines["count"].append(f"{texts}\t{np.sum(a < 30) + np.sum(b < 30) - 3.5}")
    for name, found in lines.items():
        (folder / f"{name}-{seed}.tsv").write_text("\n".join(found) + "\n")
    return str(folder / f"same-{seed}.tsv"), str(folder / f"count-{seed}.tsv")


def classifier(folder: Path, train: str, valid: str, *, classes: int, **train_options: Any) -> Path:
    data: dict[str, Any] = {"path": train, "valid": valid, "task": "classes", "pad": 63}
    data |= {"tokenizer": write_tokenizer(folder / "tokenizer.json"), "classes": {"regression": classes == 1}}
    return write_config(
        folder,
        folder / "unused",
        model={**MODEL, "family": "classifier", "classes": classes},
        data=data,
        train={"out": str(folder / "fine"), "steps": 60, "sequence_length": 16, "global_batch": 16, "micro_batch": 8,
               "eval_batches": 2, "threads": 1, **train_options},
        optim={"lr": 1e-2, "warmup_steps": 5},
        checkpoint={"every": 0},
    )  # fmt: skip


def test_token_types_are_as_many_as_texts_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RoBERTa's one type serves all texts; two do not serve three."""
    train, valid = (write_tasks(tmp_path, rows, seed)[0] for rows, seed in ((40, 0), (16, 1)))
    config = str(classifier(tmp_path, train, valid, classes=2, steps=6))
    assert main(["train", "--config", config, "model.segments=1"]) == 0
    assert main(["train", "--config", config, f"data.test={valid}", f"train.out={tmp_path / 'judged'}"]) == 2
    assert "training scores data.valid alone" in capsys.readouterr().err
    for path in (train, valid):
        rows = [line.split("\t") for line in Path(path).read_text().splitlines()]
        Path(path).write_text("\n".join("\t".join([row[0], *row]) for row in rows).replace("a\ta\tb", "a\tb\tc") + "\n")
    capsys.readouterr()
    assert main(["train", "--config", config, "model.segments=2", f"train.out={tmp_path / 'three'}"]) == 2
    assert "rows of data.path have 3 texts; set model.segments=3" in capsys.readouterr().err


@pytest.mark.full
def test_numbers_are_learned(tmp_path: Path) -> None:
    train, valid = (write_tasks(tmp_path, rows, seed)[1] for rows, seed in ((400, 0), (51, 1)))
    config = classifier(tmp_path, train, valid, classes=1, steps=150)
    assert main(["train", "--config", str(config)]) == 0
    found = reached(tmp_path / "fine")
    assert found["spearman"] > 0.6 and found["pearson"] > 0.6 and found["mse"] < 2.0
    assert found["loss"] > 0.0 and set(found) == {"loss", "pearson", "spearman", "mse"}


def test_it_begins_as_the_masked_model_with_scores_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, valid = (write_tasks(tmp_path, rows, seed)[0] for rows, seed in ((64, 0), (21, 1)))
    config = classifier(tmp_path, train, valid, classes=2, steps=1)
    masked = tmp_path / "masked"
    masked.mkdir()
    text = {"path": str(write_data(masked / "text", vocab=60)), "task": "masked", "split": [0.8, 0.2, 0.0]}
    before = write_config(
        masked,
        masked / "text",
        model={**MODEL, "family": "masked", "tied_head": True, "head_transform": True},
        data={**text, "tokenizer": str(tmp_path / "tokenizer.json")},
        train={"out": str(masked / "run"), "steps": 2, "eval_batches": 0, "sequence_length": 16, "global_batch": 8,
               "micro_batch": 8, "threads": 1},
        optim={"lr": 1e-3, "warmup_steps": 0},
    )  # fmt: skip
    assert main(["train", "--config", str(before)]) == 0
    start = ["finetune", "--config", str(config), f"checkpoint.init_from={masked / 'run'}", "optim.warmup_steps=0"]
    assert main([*start, "optim.lr=1e-30", "--seeds", "4,5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["median", "seed", "4", "seed", "5"]
    assert [line.split()[0] for line in printed[1:]] == ["loss", "accuracy", "f1", "mcc"]
    old, new, other = (
        io.latest(folder / "checkpoints")
        for folder in (masked / "run", *(tmp_path / "fine" / f"seed-{i}" for i in (4, 5)))
    )
    names = [name for name in io.available(new) if not name.startswith("optim.")]
    own = [name for name in names if name.startswith(("pooler.", "classifier."))]
    assert len(own) == 4
    a, b = io.read_full(old, [name for name in names if name not in own]), io.read_full(new, names)
    assert all(np.allclose(a[name], b[name], rtol=1e-6, atol=1e-20) for name in a)
    assert not np.allclose(b["classifier.weight"], io.read_full(other, names)["classifier.weight"])


def test_predictions_are_of_every_row_once(tmp_path: Path) -> None:
    """21 rows in micro-batches of 8: the accuracy counts in 21sts."""
    train, valid = (write_tasks(tmp_path, rows, seed)[0] for rows, seed in ((64, 0), (21, 1)))
    config = classifier(tmp_path, train, valid, classes=2, steps=2)
    assert main(["train", "--config", str(config), "optim.warmup_steps=0"]) == 0
    accuracy = Record.read(tmp_path / "fine").series("valid_accuracy")[1][-1]
    assert accuracy * 21 == pytest.approx(round(accuracy * 21)) and 0.0 < accuracy < 1.0


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = (write_tasks(tmp_path, 20, seed)[0] for seed in (0, 1))
    config = classifier(tmp_path, train, valid, classes=3)
    for overrides, words in (
        ([], "data.path has 2 classes as labels; set model.classes=2"),
        (["data.classes.regression=true"], "takes numbers as labels"),
        (["model.classes=0"], "model.classes is 0"),
        (["model.tied_head=true"], "model.tied_head has no meaning for model.family=classifier"),
    ):
        assert main(["train", "--config", str(config), *overrides]) == 2
        assert words in capsys.readouterr().err
    assert main(["finetune", "--config", str(config), "--seeds", "one"]) == 2
    assert "--seeds one: give whole numbers" in capsys.readouterr().err


def test_missing_scores_are_told_before_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = classifier(tmp_path, str(tmp_path / "no.tsv"), str(tmp_path / "no.tsv"), classes=2)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert main(["train", "--config", str(config)]) == 2
    assert "pip install megnorm[scores]" in capsys.readouterr().err


def test_the_median_is_of_the_seeds() -> None:
    lines = table({1: {"f1": 0.5}, 2: {"f1": 0.9}, 7: {"f1": 0.6}}).splitlines()
    assert lines[1].split() == ["f1", "0.6000", "0.5000", "0.9000", "0.6000"]
