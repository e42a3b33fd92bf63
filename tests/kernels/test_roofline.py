"""The roofline benchmark: it runs every operation on the CPU, small, and its shares are what the numbers say."""

import json
from pathlib import Path

import pytest
import torch

from megnorm.kernels import registry
from tools.bench import kernels

SMALL = kernels.Sizes(tokens=64, width=64, head_dim=16, kv_heads=2, vocab=320)


def test_every_site_runs_forward_and_backward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--tokens", "64", "--width", "64", "--repeats", "1", "--json", str(out)]
    assert kernels.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["op"] for row in rows} == set(registry.OPS) - {"permute", "adamw"}
    assert all(row["us"] > 0 and row["gbps"] > 0 and row["share"] is None for row in rows)
    assert {(row["op"], row["pass_"]) for row in rows if row["tflops"] > 0} == {
        (op, way) for op in ("attention", "linear", "norm_linear", "grouped_gemm") for way in ("forward", "backward")
    }
    assert "runs on CUDA devices" in capsys.readouterr().out  # why the others did not run


def test_a_share_is_of_the_larger_bound() -> None:
    case = next(iter(kernels.cases("linear", SMALL, "cpu", torch.bfloat16)))
    offer = next(offer for offer in registry.offers("linear") if offer.backend == "torch")
    assert case.flops == 2.0 * 64 * 64 * 256
    moved = kernels._row(offer, case, "forward", 100.0, 1_000_000, 1e6, (100.0, 1.0))
    assert (moved.bound, moved.best_us, moved.share, moved.gbps) == ("bytes", 10.0, 0.1, 10.0)
    computed = kernels._row(offer, case, "forward", 100.0, 1_000_000, 5e7, (100.0, 1.0))
    assert (computed.bound, computed.best_us, computed.tflops) == ("products", 50.0, 0.5)
    assert kernels.peaks_of("NVIDIA H100 PCIe") == (2000, 756) and kernels.peaks_of("NVIDIA H100 80GB HBM3")
    assert kernels.peaks_of("a device of next year") is None


def test_bytes_are_those_that_nobody_can_do_without() -> None:
    case = next(iter(kernels.cases("norm_add", SMALL, "cpu", torch.bfloat16)))
    offer = next(offer for offer in registry.offers("norm_add") if offer.backend == "torch")
    ahead, back = kernels.measure(offer, case, None, 1)
    stream, gain = 64 * 64 * 2, 64 * 2
    assert ahead.gbps * ahead.us * 1e3 == pytest.approx(3 * stream + gain)
    assert back.gbps * back.us * 1e3 == pytest.approx(5 * stream + 2 * gain)
