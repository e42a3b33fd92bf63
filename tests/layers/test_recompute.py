"""Recompute changes memory and nothing else: loss and gradients are equal bit for bit, dropout included."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from megnorm.config import RunConfig, from_dict
from megnorm.layers import recompute
from megnorm.layers.recompute import _StandIn, _Tape, _Unit
from megnorm.metrics.observe import Observer, main_grad
from megnorm.parallel.collectives import all_reduce
from megnorm.parallel.layout import named_matrices
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.pipeline import Pipeline
from megnorm.parallel.rng import DropoutRng
from megnorm.parallel.schedule import Action, make_schedule
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from megnorm.train.build import build_stages, mesh_of
from megnorm.train.config import TrainConfig
from tests.distributed import cases
from tests.layers.tiny import MODES, SELECTIVE, Model, batches, config, differences, step
from tests.marks import thinned
from tools import parity

BOTH = (("block",), SELECTIVE)
FEW = ("normformer", "hybridnorm", "keel", "normformer+post_projection+resscale")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[_Unit]:
    """The units that were run again."""
    found: list[_Unit] = []
    original = _Unit.run_again
    monkeypatch.setattr(_Unit, "run_again", lambda self: (found.append(self), original(self))[1])
    return found


def check(runs: list[_Unit], scheme: str, tried: Sequence[tuple[str, ...]] = BOTH, **case: Any) -> None:
    """Modes against none, forward passes before backward passes."""
    cfg = config(scheme, **case)
    parts = batches(cfg)
    plain = step(Model.build(cfg), parts, interleaved=True)
    assert not runs
    for modes in tried:
        again = step(Model.build(cfg, modes), parts, interleaved=True)
        assert not differences(plain, again), modes
        assert runs or modes in (("norms",), ("projections",)), f"{modes}: nothing was computed again"
        runs.clear()


@pytest.mark.parametrize("scheme", FEW)
def test_equal_bit_for_bit(runs: list[_Unit], scheme: str) -> None:
    check(runs, scheme, MODES)


@pytest.mark.full
@pytest.mark.parametrize("scheme", cases.schemes())
@pytest.mark.parametrize("kind", ("layernorm", "rmsnorm"))
def test_every_scheme(runs: list[_Unit], scheme: str, kind: str) -> None:
    check(runs, scheme, MODES, kind=kind, kv=1, precision="fp32", model="gpt2" if kind == "layernorm" else "llama")


@pytest.mark.parametrize("kind", ("l2", "scalenorm", "dyt", "derf", "seednorm"))
def test_other_norm_kinds(runs: list[_Unit], kind: str) -> None:
    check(runs, "sandwich", kind=kind)


@pytest.mark.parametrize("activation", ("gelu", "relu", "relu_squared", "silu", "reglu"))
def test_other_activations(runs: list[_Unit], activation: str) -> None:
    check(runs, "normformer", changes={"activation": activation})


def test_padding_and_parallel_blocks(runs: list[_Unit]) -> None:
    check(runs, "hybridnorm", model="fairseq")
    check(runs, "preln", changes={"parallel_block": True})
    check(runs, "preln", changes={"parallel_block": True, "parallel_norm": "one"})
    check(runs, "sandwich", changes={"parallel_block": True, "bias": True})


def test_packed_documents(runs: list[_Unit]) -> None:
    cfg = config("hybridnorm")
    parts = [replace(part, tokens=part.tokens[:, :1], labels=part.labels[:, :1]) for part in batches(cfg)]
    parts = [replace(part, loss_mask=part.loss_mask[:, :1], documents=(3, 1, 4)) for part in parts]
    plain = step(Model.build(cfg), parts, interleaved=True)
    for modes in BOTH:
        assert not differences(plain, step(Model.build(cfg, modes), parts, interleaved=True)), modes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision(dtype: torch.dtype) -> None:
    cfg = config("normformer", precision="fp32")
    models = [Model.build(cfg, modes) for modes in ((), *BOTH)]
    for model in models:
        model.net.to(dtype)
    plain, *others = (step(model, batches(cfg)) for model in models)
    for modes, again in zip(BOTH, others, strict=True):
        assert not differences(plain, again), modes


def test_without_a_gradient_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("normformer", dropout=0.0)
    part = batches(cfg, 1)[0]
    wanted = Model.build(cfg).net.eval().logits(part.tokens)
    monkeypatch.setattr(_Tape, "run", lambda *args: pytest.fail("a unit was noted"))
    assert torch.equal(Model.build(cfg, SELECTIVE).net.eval().logits(part.tokens), wanted)


def test_a_graph_may_be_run_backward_twice() -> None:
    cfg = config("keel")
    part = batches(cfg, 1)[0]
    for modes in ((), *MODES):
        model = Model.build(cfg, modes)
        loss = model.forward(0, part)
        loss.backward(retain_graph=True)
        first = model.grads()
        loss.backward()
        assert all(torch.equal(2 * first[name], twice) for name, twice in model.grads().items()), modes


@pytest.mark.parametrize("modes", (("block",), ("norms",)))
def test_only_the_first_blocks(runs: list[_Unit], modes: tuple[str, ...]) -> None:
    cfg = config("preln", dropout=0.0)
    step(Model.build(cfg, modes, blocks=1), batches(cfg, 1))
    per_block = {"block": 1, "norms": 2}[modes[0]]
    assert len(runs) == per_block
    runs.clear()
    step(Model.build(cfg, modes), batches(cfg, 1))
    assert len(runs) == 2 * per_block


def test_probes_see_the_forward_pass_alone() -> None:
    cfg = config("hybridnorm")
    part = batches(cfg, 1)[0]
    seen = []
    for modes in ((), ("block",), SELECTIVE):
        model = Model.build(cfg, modes)
        observer = Observer([model.net], ("stream_rms", "branch_rms", "norm_rms"), every=1)
        observer.begin(1)
        model.forward(0, part).backward()
        counts = {index: len(found) for index, found in observer._squares.items()}
        assert set(counts.values()) == {1}
        observer.before_update()
        seen.append(observer.collect())
    assert seen[0] == seen[1] == seen[2]


# The tests above bite: each of these mistakes is seen.


def _next_micro_batch(self: DropoutRng, place: Any) -> Any:
    """The unit is computed at the place that stands there now: of the micro-batch whose forward pass came last."""
    return nullcontext()


def _one_after_the_other(self: DropoutRng, name: str, *, local: bool) -> torch.Generator:
    """A stream that goes on, as if nobody entered."""
    return self._generator


def _zeros(self: _Unit, tensor: Tensor, index: int | None = None) -> Any:
    """An output that is thrown away although a consumer still needs it."""
    return torch.zeros_like(tensor) if index is None else _StandIn(self, tensor, index)


def _last_view(self: _StandIn) -> Tensor:
    """A consumer gets the unit's output and not its own view of it."""
    value = _take(self)
    return value if self.index is not None else value.new_zeros(()).expand_as(value)


_take = _StandIn.take

MISTAKES: list[tuple[type, str, Callable[..., Any], tuple[str, ...]]] = [
    (DropoutRng, "at", _next_micro_batch, ("block",)),
    (DropoutRng, "enter", _one_after_the_other, ("block",)),
    (_Unit, "leave_out", _zeros, ("norms",)),
    (_StandIn, "take", _last_view, ("activations",)),
]


@pytest.mark.parametrize(("target", "name", "mistake", "modes"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_a_mistake_is_seen(
    monkeypatch: pytest.MonkeyPatch, target: type, name: str, mistake: Any, modes: tuple[str, ...]
) -> None:
    cfg = config("hybridnorm")
    if name == "enter":  # for both: what differs is then what is drawn the second time
        monkeypatch.setattr(target, name, mistake)
    plain = step(Model.build(cfg), batches(cfg), interleaved=True)
    monkeypatch.setattr(target, name, mistake)
    assert differences(plain, step(Model.build(cfg, modes), batches(cfg), interleaved=True))


def test_an_address_that_another_storage_is_given_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weak reference, the address of an output that is gone belongs to the next tensor."""
    monkeypatch.setattr(recompute, "StorageWeakRef", lambda storage: None)
    cfg = config("hybridnorm")
    plain = step(Model.build(cfg), batches(cfg))
    try:
        different = differences(plain, step(Model.build(cfg, SELECTIVE), batches(cfg)))
    except RuntimeError:
        return
    assert different


def test_dropout_switched_off_before_backward_is_refused() -> None:
    cfg = config("preln")
    model = Model.build(cfg, ("block",))
    loss = model.forward(0, batches(cfg, 1)[0])
    model.net.eval()
    with pytest.raises(RuntimeError, match="call train\\(\\) or eval\\(\\) only when no backward pass"):
        loss.backward()


# Ranks


def on_rank(rank: int, world: int, scheme: str, kv: int) -> list[str]:
    """Modes in which this rank's losses or gradients differ from those without recompute."""
    cfg = config(scheme, kv=kv, tp=world, sequence_parallel=True)
    mesh = mesh_of(make_plan(cfg, world), torch.device("cpu"))
    plain = step(Model.build(cfg, mesh=mesh), batches(cfg), interleaved=True)
    return [
        str(modes)
        for modes in MODES
        if differences(plain, step(Model.build(cfg, modes, mesh=mesh), batches(cfg), interleaved=True))
    ]


@pytest.mark.parametrize(("scheme", "kv"), thinned((("normformer", 2), ("olmo2", 1)), 2))
def test_with_tensor_and_sequence_parallelism(ranks: Any, scheme: str, kv: int) -> None:
    """Collectives of what is computed again meet: sharded statistics, W_o's and W_down's scatter, a block's gathers."""
    assert ranks(2).run(on_rank, scheme, kv) == [[], []]


def through_stages(config: RunConfig, world: int, mesh: Mesh) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of this rank's layers after one step of four micro-batches with dropout."""
    plan = make_plan(config, world)
    stages, rng = build_stages(plan, mesh)
    flat, parallel = parity.flatten(plan, mesh, stages), config.parallel

    def before(action: Action, final: bool) -> None:
        if action.kind == "F":
            rng.begin(7, 0, action.micro_batch, mesh.dp.rank, mesh.tp.rank)
        if final:
            flat.expect(action.stage)

    flat.zero()
    schedule = make_schedule(parallel.schedule, parallel.pp, parallel.virtual_stages, 4)
    total = Pipeline(stages, mesh).run(schedule, batches(config, 4), weight=1.0, before=before)
    flat.finish()
    return float(all_reduce(total, mesh.pp)), {
        n.name: n.view(main_grad(n.param)) for n in named_matrices(*stages.values())
    }


def on_stage(rank: int, world: int, modes: str) -> list[str]:
    """What two stages compute otherwise than one rank without recompute."""
    cfg = config("hybridnorm", pp=world, schedule="1f1b", recompute=modes)
    loss, grads = through_stages(cfg, world, mesh_of(make_plan(cfg, world), torch.device("cpu")))
    plain_loss, plain = through_stages(config("hybridnorm"), 1, Mesh())
    assert grads and set(grads) < set(plain)
    return [name for name, grad in grads.items() if not torch.equal(grad, plain[name])] + ["loss"] * (
        loss != plain_loss
    )


@pytest.mark.parametrize("modes", ("", "block", "+".join(SELECTIVE)))
def test_with_pipeline_stages(ranks: Any, modes: str) -> None:
    """Masks do not know the stage, and under 1F1B other micro-batches have begun when a unit is computed again."""
    assert ranks(2).run(on_stage, modes) == [[], []]


# Options


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"recompute": ["block", "norms"]}, r"train.recompute: 'block' .* norms included; use \['block'\] alone"),
        ({"recompute_blocks": 1}, "train.recompute is empty"),
        ({"recompute": ["norms"], "recompute_blocks": 3}, "more than model.layers=2"),
        ({"recompute": ["norms"], "recompute_blocks": 0}, "must be at least 1"),
    ],
)
def test_options_that_contradict_are_refused(train: dict[str, Any], message: str) -> None:
    config = from_dict({"model": {"layers": 2}, "train": train}, "test")
    with pytest.raises(PlanError, match=message):
        make_plan(config, 1)


def test_every_mode_of_the_options_is_a_unit_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that no layer knows would be accepted and do nothing; one that no option knows could not be asked for."""
    seen: set[str] = set()
    original = _Tape.run
    monkeypatch.setattr(_Tape, "run", lambda self, mode, *args: (seen.add(mode), original(self, mode, *args))[1])
    options = get_args(get_args(get_type_hints(TrainConfig)["recompute"])[0])
    for mode in options:
        Model.build(config("normformer"), (mode,)).forward(0, batches(config("normformer"), 1)[0])
    assert seen == set(options) == {mode for modes in MODES for mode in modes}


def test_gathered_inputs_that_are_kept_are_warned_of() -> None:
    train, layout = {"recompute": ["norms"]}, {"tp": 2, "keep_gathered": True}
    plan = make_plan(from_dict({"train": train, "parallel": layout}, "test"), 2)
    assert any("set parallel.keep_gathered=false" in warning for warning in plan.warnings)
    plan = make_plan(from_dict({"train": train, "parallel": {"tp": 2}}, "test"), 2)
    assert not any("keep_gathered" in warning for warning in plan.warnings)
