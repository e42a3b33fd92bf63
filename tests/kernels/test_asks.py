"""Layers ask the registry for all that they will give a kernel: what was not asked for no offer can refuse."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.kernels import backends, libraries, registry
from megnorm.kernels.registry import Need
from megnorm.layers import env as layers
from megnorm.models.build import build_model
from tests.distributed import cases
from tests.kernels.contract import ENTRIES
from tests.kernels.serving import asked_of_cuda, installed
from tests.marks import thinned
from tools import parity

MODELS = [*cases.MODELS, *cases.FAMILIES, *cases.FEATURED]
Seen = list[tuple[Need, tuple[Any, ...], dict[str, Any]]]


def watched(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Every kernel that a layer gets notes with what it is called."""
    chosen = backends.chosen

    def noting(need: Need, config: Any) -> tuple[str, Callable[..., Any]]:
        backend, fn = chosen(need, config)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append((need, args, kwargs))
            return fn(*args, **kwargs)

        return backend, noted

    monkeypatch.setattr(layers.backends, "chosen", noting)


def run(model: str, mixture: str = "") -> None:
    config = cases.config("preln", model=model, moe=mixture)
    built = build_model(config.model, layers.Env(dtype=torch.float64), vocab_multiple=1)
    built(parity.random_batch(config, 0, 1))


@pytest.mark.parametrize("model", MODELS)
def test_attention_is_asked_for_what_it_is_given(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Seen = []
    watched(monkeypatch, seen)
    run(model)
    calls = [(need, args, kwargs) for need, args, kwargs in seen if need.op == "attention"]
    assert calls
    for need, (q, k, v), given in calls:
        assert given["causal"] == need.causal
        assert need.mask or given["mask"] is None
        assert need.biased == (given["bias"] is not None)
        assert need.packed or given["documents"] is None
        assert len(q) == len(k) or not need.causal
        assert (q.shape[2], k.shape[2], q.shape[3]) == (need.heads, need.kv_heads, need.head_dim) and k.shape == v.shape


def test_what_looks_both_ways_is_served_by_nobody_who_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every library there, an encoder's attention and a decoder's to another sequence go to the reference."""
    needs: list[Need] = []
    choose = registry.choose

    def noted(need: Need, *rest: Any) -> Any:
        found = choose(need, *rest)
        if need.op == "attention":
            needs.append(need)
            assert found.backend == ("torch" if need.mask or need.biased else "transformer_engine"), need
        return found

    monkeypatch.setattr(registry, "choose", noted)
    with installed(), asked_of_cuda(["attention"], torch.bfloat16):
        for model in ("bert", "t5", "bart"):
            config = cases.config("preln", model=model).model
            build_model(config, layers.Env(kernels=replace(layers.Env().kernels, check=False)), vocab_multiple=1)
    assert {need.causal for need in needs} == {True, False} == {need.mask for need in needs}


@pytest.mark.parametrize("mixture", thinned([name for name in cases.MIXTURES if name], 2))
def test_experts_are_asked_for_by_their_sizes(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Seen = []
    watched(monkeypatch, seen)
    run("llama", mixture)
    calls = [(need, args) for need, args, _ in seen if need.op == "grouped_gemm"]
    assert calls
    for need, (x, weight, counts) in calls:
        assert isinstance(x, Tensor) and need.features == (weight.shape[2], weight.shape[1])
        assert counts.sum() == len(x)


def test_every_name_of_a_library_has_its_record() -> None:
    """Callables that an offer uses; what is an extension's is asked for by being there."""
    for library in libraries.known():
        if library.name == "triton":
            continue
        for modules, names in library.uses:
            if any(path.split(".")[0] in ("amp_C", "fused_layer_norm_cuda") for path in modules):
                continue
            for name in names:
                recorded = [f"{path}.{name}" for path in modules if f"{path}.{name}" in ENTRIES]
                assert recorded, f"{library.name}: {name} has no recorded signature"
