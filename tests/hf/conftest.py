"""Exports load their code through a cache of their own, and without progress bars."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("modules")
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        yield folder
