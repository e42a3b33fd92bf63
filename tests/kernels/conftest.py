"""Triton's interpreter, where triton is installed: it must be chosen before triton is imported."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
try:
    from megnorm.kernels import triton_heads, triton_norm, triton_stats

    INTERPRETED = (triton_heads, triton_norm, triton_stats)
except ImportError:
    INTERPRETED = ()
finally:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("triton is not installed: pip install 'megnorm[triton]'")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
