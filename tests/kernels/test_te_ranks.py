"""Norm and product in one over tp ranks: the same run as a serial one without it, and a test that bites."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megnorm.config import RunConfig
from megnorm.kernels.config import KernelConfig
from megnorm.parallel.mesh import Mesh
from megnorm.plan import make_plan
from megnorm.train.build import mesh_of
from tests.distributed import cases
from tests.distributed.mutations import MUTATIONS
from tests.kernels import fakes_te, faking
from tests.kernels.serving import asked_of_cuda, installed
from tools import parity

RED = 1e-6
STEPS = 2


def not_gathered(self: fakes_te.LayerNormLinear, *args: Any, **kwargs: Any) -> None:
    """As if the layer had not said that its tokens are spread: gradients of the norm's output are summed instead."""
    _built(self, *args, **kwargs)
    if self.axis is not None:
        self.sequence_parallel = False


def not_summed(self: fakes_te.LayerNormLinear, *args: Any, **kwargs: Any) -> None:
    """As if it had no group."""
    _built(self, *args, **kwargs)
    self.axis = None


_built = fakes_te.LayerNormLinear.__init__
WIRING = {"tokens not gathered": not_gathered, "no group": not_summed}


def compare(rank: int, world: int, config: RunConfig, mutation: str | None) -> parity.Difference | None:
    plan = make_plan(config, world)
    mesh = mesh_of(plan, torch.device("cpu"))
    broken = MUTATIONS[mutation]() if mutation in MUTATIONS else nullcontext()
    if mutation in WIRING:
        broken = mock.patch.object(fakes_te.LayerNormLinear, "__init__", WIRING[mutation])
    # The library takes no float64, which is how exactly a fake is compared.
    with installed(), asked_of_cuda(["norm_linear"], torch.float32), broken:
        parallel = parity.trace(plan, mesh, STEPS)
        served = {given["return_layernorm_output"] for name, given in faking.CALLS if name.endswith(".LayerNormLinear")}
    assert served, "the library was not called"
    assert (True in served) == (config.model.norm.scheme == "hybridnorm")
    return None if rank else parity.compare(serial(config), parallel)


def serial(config: RunConfig) -> parity.Trace:
    """The same run of one rank, without the library."""
    plain = replace(parity.serial_of(config), kernels=KernelConfig())
    return parity.trace(make_plan(plain, 1), Mesh(), STEPS)


def config_of(case: dict[str, Any]) -> RunConfig:
    kernels = KernelConfig(prefer={"norm_linear": "transformer_engine"}, check=False)
    return replace(cases.config(tp=2, **case), kernels=kernels)


def measure(ranks: Any, case: dict[str, Any], mutation: str | None = None) -> parity.Difference:
    return ranks(2).run(compare, config_of(case), mutation)[0]


HYBRID = {"scheme": "hybridnorm", "sequence_parallel": True}
CASES = [
    HYBRID,
    {"scheme": "preln", "sequence_parallel": False, "model": "gpt2", "kind": "layernorm"},
    {"scheme": "sandwich", "sequence_parallel": True, "kv": 1, "model": "gpt2", "recompute": "block"},
]


@pytest.mark.parametrize(
    "case",
    [HYBRID, *(pytest.param(case, marks=pytest.mark.full) for case in CASES[1:])],
    ids=lambda case: case["scheme"],
)
def test_it_is_the_run_without_it(ranks: Any, case: dict[str, Any]) -> None:
    found = measure(ranks, case)
    assert found.initial_equal and found.worst <= parity.TOLERANCE["fp64"], found


@pytest.mark.parametrize(
    ("mutation", "case"),
    [("stream gains not summed", HYBRID), pytest.param("no group", CASES[1], marks=pytest.mark.full)],
    ids=lambda x: x if isinstance(x, str) else x["scheme"],
)
def test_parity_sees_a_broken_build(ranks: Any, mutation: str, case: dict[str, Any]) -> None:
    assert measure(ranks, case, mutation).worst > RED


@pytest.mark.full
def test_tokens_that_are_not_gathered_do_not_fit(ranks: Any) -> None:
    with pytest.raises(AssertionError, match="RuntimeError"):
        measure(ranks, HYBRID, "tokens not gathered")
