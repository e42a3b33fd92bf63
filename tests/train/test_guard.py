"""Numbers that are not finite, and spikes: found on all ranks in the same step, explained, and dealt with as configured."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm import config as configs
from megnorm.checkpoint import io
from megnorm.cli import main
from megnorm.config import RunConfig
from megnorm.metrics.record import Record
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train.config import GuardConfig
from megnorm.train.guard import DivergedError, Guard, RewindError, Trouble
from tests.distributed import tiny as ranked
from tests.train.faults import Fault, Ranks, Told, train, with_train
from tests.train.tiny import losses, write_config, write_data

NAN = float("nan")


def a_run(folder: Path, name: str, *, every: int = 2, steps: int = 8, **changes: Any) -> RunConfig:
    """Two micro-batches a step on each of two ranks."""
    layout = {key: changes.pop(key) for key in ("tp", "dp", "pp", "kv") if key in changes}
    data = folder / "data"
    prefix = str(data) if data.with_suffix(".bin").exists() else ranked.write_data(data)
    return with_train(ranked.config(prefix, folder / name, steps=steps, every=every, **layout), **changes)


# One rank's view


def test_good_steps_pass_and_others_are_told_apart() -> None:
    guard = Guard(GuardConfig(on_spike="skip", spike_window=8, spike_factor=5.0))
    assert guard.judge(9.0, 1.0) is None, "too few steps to call anything a spike"
    for i in range(8):
        assert guard.judge(2.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) is None
    assert guard.judge(2.05, 1.0) is None
    loss = guard.judge(3.0, 1.0)
    assert (
        loss is not None
        and loss.spike
        and re.search(r"^loss 3 is a spike, [\d.]+ deviations above .* 2\.01", loss.text)
    )
    norm = guard.judge(2.0, 30.0)
    assert norm is not None and norm.spike and "gradient norm 30" in norm.text
    for values in ((NAN, 1.0), (2.0, NAN), (2.0, float("inf"))):
        trouble = guard.judge(*values)
        assert trouble is not None and not trouble.spike
    assert guard.judge(2.0, 0.001) is None and guard.judge(0.1, 1.0) is None, "falling is no spike"
    assert 3.0 not in guard.losses and 30.0 not in guard.norms, "spikes do not enter the statistics"


def test_a_flat_curve_makes_no_spike_of_noise() -> None:
    guard = Guard(GuardConfig(on_spike="stop", spike_window=4))
    assert all(guard.judge(2.0, 1.0) is None for _ in range(4))
    assert guard.judge(2.0 * 1.09, 1.0) is None
    assert guard.judge(2.0 * 1.2, 1.0) is not None


def test_spikes_are_not_looked_for_by_default() -> None:
    guard = Guard()
    assert all(guard.judge(loss, loss) is None for loss in [1.0] * 100 + [1e9])
    assert guard.state() == {"losses": [], "norms": [], "skips": 0, "rewinds": 0}


def test_policies() -> None:
    bad = Trouble(False, "loss nan, gradient norm nan")
    with pytest.raises(DivergedError) as stopped:
        Guard().act(7, bad, speak=True)
    assert str(stopped.value) == (
        "step 7: loss nan, gradient norm nan; nothing was saved. Lower optim.lr, lengthen optim.warmup_steps or choose a "
        "more stable norm.scheme"
    )
    assert not isinstance(stopped.value, RewindError)
    with pytest.raises(RewindError):
        Guard(GuardConfig(on_nonfinite="rewind")).act(7, bad, speak=True)
    guard = Guard(GuardConfig(on_nonfinite="skip", on_spike="rewind", max_skips=2))
    guard.act(7, bad, speak=True)
    guard.act(8, bad, speak=True)
    assert guard.judge(1.0, 1.0) is None and guard.skips == 0, "a good step ends the row"
    with pytest.raises(RewindError):
        guard.act(9, Trouble(True, "loss 9 is a spike"), speak=True)
    guard.act(9, bad, speak=True)
    guard.act(10, bad, speak=True)
    with pytest.raises(DivergedError, match=r"after train.guard.max_skips=2 such steps\. Lower"):
        guard.act(11, bad, speak=True)


def test_statistics_go_on_with_the_run() -> None:
    guard = Guard(GuardConfig(on_spike="skip", spike_window=8))
    for i in range(20):
        guard.judge(2.0 + 0.1 * (i % 5), 1.0 + 0.01 * i)
    other = Guard(guard.config)
    other.load(guard.state())
    assert other.state() == guard.state() and len(other.losses) == 8
    assert [other.judge(loss, 1.0) for loss in (2.2, 5.0)] == [guard.judge(loss, 1.0) for loss in (2.2, 5.0)]
    other.load({})
    assert other.state() == Guard().state()


REFUSED = {
    "train.guard.on_nonfinite=ignore": "train.guard.on_nonfinite",
    "train.guard.spike_factor=0.5": "train.guard.spike_factor is 0.5; set it to 1 or more",
    "train.guard.spike_factor=.nan": "train.guard.spike_factor",
    "train.guard.spike_window=3": "train.guard.spike_window is 3; set it to 4 or more",
    "train.guard.max_skips=0": "train.guard.max_skips",
    "train.guard.max_rewinds=0": "train.guard.max_rewinds",
    "train.guard.rewind_data=other": "train.guard.rewind_data",
    "train.guard.on_nan=skip": "did you mean 'train.guard.on_nonfinite'?",
    "train.check_replicas_every=-1": "train.check_replicas_every is -1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_options_without_meaning_are_refused_by_name(override: str) -> None:
    with pytest.raises((configs.ConfigError, PlanError)) as error:
        make_plan(configs.load(None, [override]), 1)
    assert REFUSED[override] in str(error.value)


@pytest.mark.parametrize("key", ("on_nonfinite", "on_spike"))
def test_a_rewind_that_cannot_be_is_refused(key: str) -> None:
    wish = f"train.guard.{key}=rewind"
    make_plan(configs.load(None, [wish]), 1)
    with pytest.raises(PlanError, match="set checkpoint.every"):
        make_plan(configs.load(None, [wish, "checkpoint.every=0"]), 1)
    with pytest.raises(PlanError, match="use rewind_data=repeat"):
        make_plan(configs.load(None, [wish, "data.order=megatron"]), 1)
    make_plan(configs.load(None, [wish, "data.order=megatron", "train.guard.rewind_data=repeat"]), 1)


# Two ranks


LAYOUTS = [
    pytest.param({"dp": 2}, id="dp"),
    pytest.param({"tp": 2, "kv": 1}, id="tp", marks=pytest.mark.full),
    pytest.param({"pp": 2}, id="pp", marks=pytest.mark.full),
]


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}, LAYOUTS[2]], ids=("dp", "tp", "pp"))
def test_stop(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    config = a_run(tmp_path, "run", every=2, **layout)
    fault = Fault((5,), rank=1, micro_batch=1)
    told: list[Told] = ranks(2).run(train, config, fault)
    for one in told:
        assert isinstance(one.ended, str) and one.ended.startswith(
            "step 5: loss nan, gradient norm nan; nothing was saved"
        )
        assert (one.step, one.updates) == (4, 4)
    said = told[0].log
    assert "first not finite: the output of blocks.1.ffn.down (blocks.1.ffn.down.weight), in the forward" in said, said
    assert "in the forward pass on rank 1 (" in said and "micro-batch 1, samples" in said
    # sample ids: 4 steps of 8 rows; with dp rank 1 has the last 4 of a step
    assert f"samples {38 if 'dp' in layout else 34} to {39 if 'dp' in layout else 35}" in said
    assert re.search(r"\d+ gradients are not finite, in the order of the model from embed\.token\.weight to ", said), (
        said
    )
    assert told[1].log.count("not finite") == 0, "rank 0 speaks for all"
    assert io.read_meta(io.latest(tmp_path / "run/checkpoints"))["step"] == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    """The update of the bad step is left out, and nothing else: as if its gradients had never been."""
    config = a_run(tmp_path, "run", guard_on_nonfinite="skip", **layout)
    told: list[Told] = ranks(2).run(train, config, Fault((3, 4), rank=1))
    for one in told:
        assert (one.ended, one.step, one.consumed, one.updates, one.skipped) == (0, 8, 64, 6, [3, 4])
        assert all(torch.isfinite(weight).all() for weight in one.weights.values())
    assert "step 4: loss nan, gradient norm nan; this update is left out (2 of at most 10 in a row)" in told[0].log
    found = io.latest(tmp_path / "run/checkpoints")
    weights = io.read_full(found, list(io.available(found)))
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    record = {row["step"]: row for row in Record.read(tmp_path / "run").rows}
    assert [step for step, row in record.items() if row.get("skipped")] == [3, 4]


@pytest.mark.full
def test_a_fault_between_modules_is_told_by_its_neighbours(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", steps=4, dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((2,), rank=1, at="body"))
    found = r"first not finite: before the dropout of blocks\.1\.ffn \(blocks\.1\.ffn\.\w+\.weight, "
    assert re.search(found, told[0].log), told[0].log


def test_a_weight_that_is_not_finite_is_named(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", steps=4, dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((2,), rank=1, at="weight"))
    assert "the output of blocks.1.ffn.down, whose blocks.1.ffn.down.weight is not finite, in" in told[0].log, told[
        0
    ].log


def test_a_fault_in_backward_is_told_apart(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((2,), rank=1, layer=0, backward=True))
    assert isinstance(told[1].ended, str) and "gradient norm nan" in told[1].ended
    said = told[0].log
    assert re.search(r"first not finite: the gradient of the output of blocks\.0\.ffn\.\w+ ", said), said
    assert "in the backward pass on rank 1 (dp 1, tp 0, pp 0), micro-batch 0, samples 12 to 13" in said
    # what lies behind the fault in the order of computation has good gradients
    assert re.search(
        r"gradients are not finite, in the order of the model from embed\.\S+ to blocks\.0\.ffn\.", said
    ), said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewind_after_a_fault_that_passes(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    """With the same samples again, the run ends as one that nothing happened to: bit for bit."""
    options = {"guard_on_nonfinite": "rewind", "guard_rewind_data": "repeat", **layout}
    quiet: list[Told] = ranks(2).run(train, a_run(tmp_path, "quiet", every=3, **options))
    fault = Fault((5,), rank=1, passing=True)
    told: list[Told] = ranks(2).run(train, a_run(tmp_path, "run", every=3, **options), fault)
    for one, other in zip(told, quiet, strict=True):
        assert (one.ended, one.step, one.consumed, one.updates) == (0, 8, 64, 8)
        assert one.curve == other.curve
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)
    assert (
        "step 5 went bad: back to step-00000003, step 3 (rewind 1 of at most 3); its 16 samples are taken again"
        in told[0].log
    )
    assert "are finite: the fault has passed" in told[0].log
    assert losses(tmp_path / "run") == losses(tmp_path / "quiet")
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 8, (
        "the record of step 4 is that of the second time"
    )
    state = io.read_meta(io.latest(tmp_path / "run/checkpoints"))["guard"]
    assert state["rewinds"] == 1


@pytest.mark.full
def test_the_rank_of_a_passing_fault_is_told_by_its_loss(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((2,), rank=1, passing=True))
    assert "the fault has passed (the loss was not finite on rank 1)" in told[0].log


def test_rewind_leaves_samples_out(ranks: Ranks, tmp_path: Path) -> None:
    """A step that is bad for its samples: with others in its place the run goes on."""
    config = a_run(tmp_path, "run", every=3, guard_on_nonfinite="rewind", dp=2)
    fault = Fault((5,), rank=0, passing=True)
    told: list[Told] = ranks(2).run(train, config, fault)
    for one in told:
        assert (one.ended, one.step, one.updates) == (0, 8, 8)
        assert one.consumed == 64 + 16, "steps 4 and 5 were made with the samples of 6 and 7"
    assert "its 16 samples are left out" in told[0].log


@pytest.mark.full
def test_rewinds_end(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", every=3, guard_on_nonfinite="rewind", guard_max_rewinds=2, dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((5,), rank=1))
    for one in told:
        assert isinstance(one.ended, str) and "(the run went back train.guard.max_rewinds=2 times)" in one.ended
    assert told[0].log.count("went bad: back to step-00000003") == 2
    assert io.read_meta(io.latest(tmp_path / "run/checkpoints"))["step"] == 3


@pytest.mark.full
def test_there_is_nothing_to_go_back_to(ranks: Ranks, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", every=3, guard_on_nonfinite="rewind", dp=2)
    told: list[Told] = ranks(2).run(train, config, Fault((2,), rank=1))
    for one in told:
        assert isinstance(one.ended, str) and "there is no checkpoint yet to go back to" in one.ended


@pytest.mark.parametrize(
    "policy", ("skip", pytest.param("rewind", marks=pytest.mark.full), pytest.param("stop", marks=pytest.mark.full))
)
def test_a_spike(ranks: Ranks, tmp_path: Path, policy: str) -> None:
    """Logits fifty times too large: the loss rises far above its median, and stays finite."""
    config = a_run(
        tmp_path,
        "run",
        every=5,
        steps=14,
        guard_on_spike=policy,
        guard_spike_window=8,
        guard_rewind_data="repeat",
        dp=2,
    )
    told: list[Told] = ranks(2).run(
        train, config, Fault((12,), rank=1, at="head", factor=50.0, passing=policy == "rewind")
    )
    said = told[0].log
    assert re.search(r"step 12: (loss|gradient norm) \S+ is a spike, .* deviations above its median", said), said
    assert re.search(r"the largest gradient is that of \S+\.weight, \d+% of the square of the norm", said), said
    for one in told:
        if policy == "stop":
            assert isinstance(one.ended, str) and "is a spike" in one.ended and one.step == 11
        else:
            assert (one.ended, one.step, one.updates) == (0, 14, 13 if policy == "skip" else 14)
            assert one.skipped == ([12] if policy == "skip" else [])


# The whole program


@pytest.mark.full
def test_overflow_of_fp16_is_the_loss_scale_s_business(tmp_path: Path) -> None:
    path = write_config(tmp_path, write_data(tmp_path / "text"))
    assert (
        main(["train", "--config", str(path), "train.precision=fp16", f"optim.loss_scale={2.0**40}", "train.steps=30"])
        == 0
    )
    rows = Record.read(tmp_path / "run").rows
    assert rows[0]["skipped"] == 1.0 and rows[-1]["skipped"] == 0.0 and rows[-1]["loss_scale"] < 2.0**40
    assert io.read_meta(io.latest(tmp_path / "run/checkpoints"))["guard"]["skips"] == 0


@pytest.mark.full
def test_a_resumed_run_judges_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    path = write_config(tmp_path, write_data(tmp_path / "text"))
    options = ["train.guard.on_spike=skip", "train.guard.spike_window=8", "train.steps=12"]
    assert main(["train", "--config", str(path), *options]) == 0
    whole = io.read_meta(io.latest(tmp_path / "run/checkpoints"))["guard"]
    parts = [*options, f"train.out={tmp_path / 'parts'}"]
    main(["train", "--config", str(path), *parts, "train.stop_after=7"])
    assert main(["train", "--config", str(path), *parts]) == 0
    assert io.read_meta(io.latest(tmp_path / "parts/checkpoints"))["guard"] == whole
    assert len(whole["losses"]) == 8
