"""The index cache: one builder, everybody else waits and maps; a dead builder leaves nothing."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from megnorm.data.cache import cached
from megnorm.data.config import DataConfig
from megnorm.data.loader import Loader
from tests.data.building import dies_while_building, one_of_many
from tests.data.helpers import numbered


@pytest.mark.full
def test_one_builds_for_all(tmp_path: Path) -> None:
    context, folder, log = multiprocessing.get_context("spawn"), str(tmp_path / "c"), tmp_path / "log"
    dead = context.Process(target=dies_while_building, args=(folder,))
    dead.start()
    dead.join()
    assert dead.exitcode == 9 and not (tmp_path / "c/x").exists()
    processes = [context.Process(target=one_of_many, args=(folder, str(log))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"


def test_the_cache_changes_nothing_and_knows_its_data(tmp_path: Path) -> None:
    path, cache = numbered(tmp_path / "x", 3000), str(tmp_path / "cache")

    def batch(cache: str | None) -> list[list[int]]:
        config = DataConfig(path=path, order="megatron", split=(1, 0, 0), cache=cache)
        loader = Loader(config, "train", sequence_length=32, seed=1, vocab_size=60000, samples=200)
        return loader.batch(0, 50).tokens.tolist()

    plain = batch(None)
    assert batch(cache) == plain and batch(cache) == plain
    assert len(list((tmp_path / "cache").glob("gpt-*/"))) >= 1
    numbered(tmp_path / "x", 3100, seed=5)
    assert batch(cache) == batch(None) != plain


def test_memory_when_there_is_no_folder() -> None:
    assert cached(None, "x", lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
