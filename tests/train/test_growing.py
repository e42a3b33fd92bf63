"""Factors that grow with the step: what a step and its evaluation compute with, resume, and what a model leaves with."""

from pathlib import Path

import pytest

from megnorm import config as configs
from megnorm.cli import main
from megnorm.hf.native import read_native
from megnorm.metrics.record import Record
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import moves, resolve, settled
from megnorm.norms.scheme import Scale
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train.signals import EXIT_STOPPED
from tests.train.tiny import losses, write_config, write_data

PRORES = {"scheme": "prores", "options": {"steps": 4}}


def branches(norm: NormConfig, step: int, layers: int = 3) -> list[float]:
    found = settled(resolve(norm, layers), step)
    assert not moves(found)
    assert all(layer.attention.residual == layer.ffn.residual for layer in found.layers)
    return [float(layer.ffn.residual.branch.value) for layer in found.layers]  # type: ignore[arg-type]


def test_factors_are_the_papers() -> None:
    prores, branchnorm = NormConfig("prores"), NormConfig("branchnorm", {"steps": 8})
    assert moves(resolve(prores, 3)) and not moves(resolve(NormConfig("deepnorm"), 3))
    assert branches(prores, 0) == [0.0, 0.0, 0.0]
    assert branches(prores, 1500) == [1.0, 0.75, 0.5]
    assert branches(prores, 3000) == branches(prores, 10**9) == [1.0, 1.0, 1.0]
    assert branches(branchnorm, 2) == [0.25] * 3
    deep = settled(resolve(NormConfig("prores", {"host": "deepnorm"}), 8), 4000).layers[7].ffn.residual
    assert (deep.skip, deep.branch) == (Scale(2.0), Scale(0.5))


def test_a_step_and_its_evaluation_have_the_factor_of_the_step(tmp_path: Path) -> None:
    """The same numbers as with that factor as a constant."""
    prefix = write_data(tmp_path / "data")
    still = {"scheme": "preln", "patch": {
        name: {part: {"residual": {"branch": {"value": value}}} for part in ("attention", "ffn")}
        for name, value in (("layer", 0.125),)
    } | {"overrides": [{"first": 1, "layer": {
        part: {"residual": {"branch": {"value": 0.25}}} for part in ("attention", "ffn")
    }}]}}  # fmt: skip
    records = []
    for name, norm in (("grows", PRORES), ("still", still)):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, prefix, model={"norm": norm}, optim={"lr": 0.0, "warmup_steps": 0})
        assert main(["train", "--config", str(config), "train.steps=1"]) == 0
        records.append(Record.read(tmp_path / name / "run").rows[-1])
    grows, still_ = records
    assert grows["loss"] == pytest.approx(still_["loss"], rel=1e-6)
    assert grows["valid_loss"] == pytest.approx(still_["valid_loss"], rel=1e-6)
    assert grows["grad_norm"] == pytest.approx(still_["grad_norm"], rel=1e-5)


def test_a_run_goes_on_and_its_model_leaves_as_it_is(tmp_path: Path) -> None:
    prefix = write_data(tmp_path / "data")
    config = str(write_config(tmp_path, prefix, model={"norm": PRORES}))
    assert main(["train", "--config", config, f"train.out={tmp_path / 'whole'}"]) == 0
    assert main(["train", "--config", config, "train.stop_after=3"]) == EXIT_STOPPED
    branch = [layer.ffn.residual.branch for layer in read_native(tmp_path / "run").resolved.layers]
    assert branch == [Scale(3 / 4), Scale(3 / 8)]
    assert main(["train", "--config", config]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("option", ["graphs", "compile"])
def test_layers_that_keep_their_numbers_are_refused(option: str) -> None:
    with pytest.raises(PlanError, match=f"kernels.{option} keeps .* set kernels.{option}=false"):
        make_plan(configs.load(None, [f"kernels.{option}=true", "model.norm.scheme=prores"]), 1)
