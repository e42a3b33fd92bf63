"""What changes in the middle of a training run: no sample is repeated or skipped, or the change is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megnorm.cli import main
from megnorm.data.loader import Loader
from megnorm.train.signals import EXIT_STOPPED
from tests.data.helpers import write
from tests.train.tiny import write_config

Seen = list[list[int]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every row of tokens that training asks for, in order."""
    found: Seen = []
    real = Loader.batch

    def batch(self: Loader, *arguments: int) -> object:
        result = real(self, *arguments)
        found.extend(result.tokens.t().tolist())
        return result

    monkeypatch.setattr(Loader, "batch", batch)
    return found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., int]:
    """``start(key=value, ...)`` trains from where it stands; eight steps of four samples unless told otherwise."""
    random = np.random.default_rng(0)  # no two rows are alike
    prefixes = [write(tmp_path / name, random.integers(0, 61, (30, 48)).tolist()) for name in "ab"]

    def run(*overrides: str) -> int:
        data = {"path": prefixes, "weights": [3, 1], "split": [1, 0, 0]}
        config = write_config(tmp_path, Path(prefixes[0]), data=data)
        return main(["train", "--config", str(config), "train.eval_batches=0", *overrides])

    return run


@pytest.mark.parametrize("order", ("default", "megatron"))
def test_another_batch_size_goes_on_with_the_next_sample(
    tmp_path: Path, start: Callable[..., int], seen: Seen, order: str
) -> None:
    order = f"data.order={order}"
    assert start(order, f"train.out={tmp_path / 'whole'}") == 0
    whole = seen.copy()
    seen.clear()
    assert start(order, "train.stop_after=3") == EXIT_STOPPED
    assert start(order, "train.global_batch=2", "train.steps=13") == 0
    assert seen == whole


def test_another_mixture_goes_on_where_each_source_stood(start: Callable[..., int], seen: Seen) -> None:
    assert start("train.stop_after=4") == EXIT_STOPPED
    assert start("data.weights=[1,3]", "train.steps=11") == 0
    assert len(seen) == 44 and len({tuple(row) for row in seen}) == 44  # 12 + 7 and 4 + 21 draws: within one epoch


def test_a_longer_run_in_megatron_order_is_refused(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("data.order=megatron", "train.stop_after=2") == EXIT_STOPPED
    assert start("data.order=megatron", "train.steps=9") == 2
    told = capsys.readouterr().err
    assert "made for the 32 samples with which this run began" in told and "train.global_batch" in told


def test_another_sequence_length_is_refused(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start("train.stop_after=2") == EXIT_STOPPED
    assert start("train.sequence_length=8") == 2
    assert "train.sequence_length was 16 when the checkpoint was written and is 8 now" in capsys.readouterr().err


def test_a_task_that_the_model_cannot_use_is_refused(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("data.task=masked") == 2
    assert "data.task=masked is nothing that model.family=causal can be trained for" in capsys.readouterr().err
    assert start("data.mask.unit=word") == 2
    assert "data.mask has no meaning for data.task=causal" in capsys.readouterr().err


def test_evaluation_without_data_names_the_remedy(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("train.eval_batches=1") == 2
    assert "set train.eval_batches=0 to train without evaluation" in capsys.readouterr().err


def test_fill_in_the_middle_from_the_config(start: Callable[..., int], seen: Seen) -> None:
    marks = ["data.fim_rate=1.0", "data.fim_tokens=[61,62,63]", "data.eod=60", "model.vocab_size=64"]
    assert start(*marks, "train.steps=2") == 0
    assert all(torch.isin(torch.tensor([61, 62, 63]), torch.tensor(row)).any() for row in seen)
