"""Exports are loaded without progress bars, and their code lies in the cache that tests/conftest.py made."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def code_cache() -> Iterator[Path]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield Path(os.environ["HF_MODULES_CACHE"])
