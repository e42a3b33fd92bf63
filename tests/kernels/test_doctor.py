"""megnorm doctor: what is installed, what serves what, and how to get what is missing."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megnorm.cli import main
from megnorm.kernels import libraries, registry


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    libraries.probe.cache_clear()
    libraries.no_device.cache_clear()
    yield
    libraries.probe.cache_clear()
    libraries.no_device.cache_clear()


def served(text: str) -> dict[str, str]:
    """Who serves each operation."""
    lines = (line.split() for line in text.splitlines() if line.startswith("  ") and line[2] != " ")
    return {words[0]: words[1] for words in lines if words[0] in registry.OPS}


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.count("there is no CUDA device") >= len(libraries.known())
    assert served(text) == dict.fromkeys(registry.OPS, "torch")


def test_on_a_gpu_with_torch_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found_by = importlib.import_module

    def missing(path: str) -> Any:
        if path.startswith("megnorm."):
            return found_by(path)
        raise ModuleNotFoundError(f"No module named '{path}'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for remedy in (
        "megnorm[te]",
        "megnorm[flash]",
        "megnorm[liger]",
        "in a clone of NVIDIA/apex",
        "pip install triton",
    ):
        assert remedy in text
    found = served(text)
    assert set(found) == set(registry.OPS)
    assert {op for op, backend in found.items() if backend != "torch"} <= {"grouped_gemm"}  # torch's own, in one call
