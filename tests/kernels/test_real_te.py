"""Transformer Engine's own Python, where it is at hand (scripts/real_te.sh brings it)."""

import importlib.util
import re
import subprocess
import sys

import pytest


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="bash scripts/real_te.sh brings Transformer Engine"
)
def test_its_python_does_what_our_calls_mean() -> None:
    """In a process of its own: it is imported over an extension that is not there."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.real_te"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"^\d+ comparisons, .* 3 runs of two ranks: passed$", done.stdout, re.M), done.stdout
