"""Configs: what YAML means, and which numbers are refused with the field's name."""

from pathlib import Path

import pytest

from megnorm import config as configs
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train.config import TrainConfig

REFUSED = {
    "model.kv_heads=0": "model.kv_heads",
    "model.head_dim=0": "model.head_dim",
    "model.init.std=-1": "model.init.std",
    "model.norm.eps=-1": "model.norm.eps",
    "model.rope_theta=0": "model.rope_theta",
    "parallel.vocab_multiple=0": "parallel.vocab_multiple",
    "parallel.tp=0": "parallel.tp",
    "parallel.timeout=-1": "parallel.timeout",
    "optim.lr=-1": "optim.lr",
    "optim.clip=-1": "optim.clip",
    "optim.clip=.nan": "optim.clip",
    "optim.betas=[0.9, 1.0]": "optim.betas",
    "optim.weight_decay=-0.1": "optim.weight_decay",
    "optim.power=0": "optim.power",
    "optim.loss_scale=0": "optim.loss_scale",
    "optim.rate.qq=2": "did you mean 'q'?",
    "optim.decay.nonsense=0": "optim.decay.nonsense",
    "optim.rate.q=-1": "optim.rate.q",
    "train.log_every=0": "train.log_every",
    "train.stop_after=0": "train.stop_after",
    "train.threads=0": "train.threads",
    "train.eval_every=-1": "train.eval_every",
    "train.micro_batch=128": "use 128, or a micro_batch of 64",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_number_without_meaning_is_refused_by_name(override: str) -> None:
    with pytest.raises(PlanError) as error:
        make_plan(configs.load(None, [override]), 1)
    assert REFUSED[override] in str(error.value)


def test_evaluation_without_batches_is_refused() -> None:
    with pytest.raises(PlanError, match="train.eval_every"):
        make_plan(configs.load(None, ["train.eval_every=5", "train.eval_batches=0"]), 1)


def test_a_length_that_sequence_parallelism_cannot_split_names_one_that_it_can() -> None:
    with pytest.raises(PlanError, match="use 1020"):
        make_plan(configs.load(None, ["parallel.tp=4", "train.sequence_length=1022"]), 4)


@pytest.mark.parametrize("scheme", ("resscale", "postln", "hybridnorm", "b2t"))
def test_a_parallel_block_only_adds_to_the_stream(scheme: str) -> None:
    with pytest.raises(PlanError, match="model.parallel_block"):
        make_plan(configs.load(None, ["model.parallel_block=true", f"model.norm.scheme={scheme}"]), 1)


def test_one_norm_needs_branches_that_share_it() -> None:
    one = "model.parallel_norm=one"
    with pytest.raises(PlanError, match="set model.parallel_block=true"):
        make_plan(configs.load(None, [one]), 1)
    with pytest.raises(PlanError, match="no norm before attention"):
        make_plan(configs.load(None, [one, "model.parallel_block=true", "model.norm.scheme=nonorm"]), 1)
    with pytest.raises(PlanError, match="model.parallel_norm has no meaning for model.family=encdec"):
        make_plan(configs.load(None, [one, "model.family=encdec"]), 1)


def test_a_decoder_does_not_turn_its_cache_anew() -> None:
    words = ["model.family=encdec", "data.task=pairs", "train.micro_batch=1", "model.rope_scaling.factor=2"]
    assert make_plan(configs.load(None, [*words, "model.rope_scaling.kind=linear"]), 1).config.model.family == "encdec"
    with pytest.raises(PlanError, match="use yarn or linear"):
        make_plan(configs.load(None, [*words, "model.rope_scaling.kind=dynamic"]), 1)


def test_layers_balanced_together_are_of_one_stage() -> None:
    moe = ["model.moe.experts=4", "model.moe.balance_loss=0.1", "model.moe.balance_across=layers"]
    assert make_plan(configs.load(None, moe), 2).config.parallel.pp == 1
    with pytest.raises(PlanError, match="parallel.pp=2 runs them in turn"):
        make_plan(configs.load(None, [*moe, "parallel.pp=2"]), 2)


def test_true_is_no_number() -> None:
    with pytest.raises(configs.ConfigError, match="model.layers: true"):
        configs.load(None, ["model.layers=true"])
    assert configs.load(None, ["parallel.sequence_parallel=true"]).parallel.sequence_parallel is True


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\ntrain:\n  steps: 3\n")
    assert configs.load(path).model == configs.RunConfig().model
    assert configs.load(path, ["model.layers=3", "model.norm.eps=1e-6"]).model.layers == 3


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 3\n  steps: 4\n")
    with pytest.raises(configs.ConfigError, match="'steps' stands twice"):
        configs.load(path)


def test_exponents_are_numbers_everywhere(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a word, which an option of a scheme, of no declared type in the config, would keep."""
    config = configs.load(None, ["model.norm.scheme=layerscale", "model.norm.options.start=1e-4", "train.out='1e4'"])
    assert config.model.norm.options == {"start": 1e-4}
    make_plan(config, 1)
    configs.save(config, tmp_path / "saved.yaml")
    assert configs.load(tmp_path / "saved.yaml") == config and config.train.out == "1e4"


def test_a_section_s_own_check_is_one_sentence() -> None:
    with pytest.raises(configs.ConfigError) as error:
        configs.load(None, ["checkpoint.every=-1"])
    assert str(error.value) == "command line: checkpoint.every is -1; set it to 0 or more"


def test_evaluation_may_be_off() -> None:
    assert make_plan(configs.load(None, ["train.eval_batches=0"]), 1).config.train == TrainConfig(eval_batches=0)
