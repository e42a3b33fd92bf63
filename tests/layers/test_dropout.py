"""Dropout's masks are a function of place and name: equal where they must be, different everywhere else."""

import itertools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.layers.attention import SelfAttention
from megnorm.layers.sublayer import Dropout
from megnorm.parallel.rng import DropoutRng, Place
from tests.layers.tiny import Model, batches, config

HERE = Place(seed=3, step=5, micro_batch=2, dp_rank=1, tp_rank=1)
OTHERS = {field: replace(HERE, **{field: 9}) for field in asdict(HERE)}


def draw(place: Place, name: str = "blocks.7.ffn", *, local: bool = False) -> Tensor:
    rng = DropoutRng(torch.device("cpu"))
    rng.begin(**asdict(place))
    return torch.rand(64, generator=rng.enter(name, local=local))


def draw_default(place: Place, *, local: bool) -> Tensor:
    rng = DropoutRng(torch.device("cpu"))
    rng.begin(**asdict(place))
    with rng.as_default("blocks.7.attention.core", local=local):
        return torch.rand(64)


@pytest.mark.parametrize("field", list(OTHERS))
def test_shared_numbers_differ_by_all_but_the_tp_rank(field: str) -> None:
    assert torch.equal(draw(HERE), draw(OTHERS[field])) == (field == "tp_rank")


@pytest.mark.parametrize("field", list(OTHERS))
def test_local_numbers_differ_by_the_tp_rank_too(field: str) -> None:
    assert not torch.equal(draw(HERE, local=True), draw(OTHERS[field], local=True))
    assert not torch.equal(draw_default(HERE, local=True), draw_default(OTHERS[field], local=True))


def test_streams_and_units_differ_from_each_other() -> None:
    drawn = [draw(HERE, name, local=local) for name in ("embed", "blocks.7.ffn", "blocks.8.ffn") for local in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_nothing_is_carried_from_one_unit_to_the_next() -> None:
    rng = DropoutRng(torch.device("cpu"))
    rng.begin(**asdict(HERE))
    torch.rand(17, generator=rng.enter("embed", local=True))
    assert torch.equal(torch.rand(64, generator=rng.enter("blocks.7.ffn", local=False)), draw(HERE))


def test_a_place_is_returned_to_and_left_again() -> None:
    rng = DropoutRng(torch.device("cpu"))
    rng.begin(**asdict(OTHERS["micro_batch"]))
    with pytest.raises(KeyError), rng.at(HERE):
        assert torch.equal(torch.rand(64, generator=rng.enter("blocks.7.ffn", local=False)), draw(HERE))
        raise KeyError
    assert rng.place == OTHERS["micro_batch"]


def test_torchs_own_generator_is_only_borrowed() -> None:
    torch.manual_seed(11)
    wanted = torch.rand(8)
    torch.manual_seed(11)
    draw_default(HERE, local=True)
    assert torch.equal(torch.rand(8), wanted)


def test_every_unit_of_a_model_has_a_name_of_its_own() -> None:
    """Layers are numbered globally, so a pipeline's stages draw what one rank would."""
    net = Model.build(config("preln")).net
    names = [m.name for m in net.modules() if isinstance(m, Dropout)]
    names += [m.core_name for m in net.modules() if isinstance(m, SelfAttention)]
    assert sorted(names) == sorted(
        ["embed", *(f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "attention.core", "ffn"))]
    )


def test_a_models_masks_follow_the_place() -> None:
    cfg = config("preln")
    model, part = Model.build(cfg), batches(cfg, 1)[0]
    first = model.forward(0, part)
    assert torch.equal(model.forward(0, part), first)
    assert not torch.equal(model.forward(1, part), first)
    assert not torch.equal(model.forward(0, part, step=1), first)


@pytest.mark.parametrize("changes", ({"dropout": 0.0}, {"eval": True}))
def test_where_there_is_no_dropout_nobody_enters(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DropoutRng, "_seed", lambda *args: pytest.fail("a unit entered"))
    cfg = config("preln", changes.get("dropout", 0.1))
    model = Model.build(cfg)
    model.net.train(not changes.get("eval"))
    assert model.forward(0, batches(cfg, 1)[0]).isfinite()


def masks(rank: int, world: int) -> tuple[Tensor, Tensor]:
    from megnorm.plan import make_plan
    from megnorm.train.build import mesh_of

    cfg = config("preln", tp=world, sequence_parallel=False)
    mesh = mesh_of(make_plan(cfg, world), torch.device("cpu"))
    model = Model.build(cfg, mesh=mesh)
    model.rng.begin(7, 0, 0, mesh.dp.rank, mesh.tp.rank)
    block = next(m for name, m in model.net.named_modules() if name == "blocks.0.ffn.dropout")
    core = next(m for m in model.net.modules() if isinstance(m, SelfAttention))
    q = torch.ones(8, 2, 2, 8)
    eye = torch.eye(8)[:, None, None, :].expand(8, 2, 2, 8)
    return block(torch.ones(64)), core._attend(q, q, eye, _no_context())


def _no_context() -> Any:
    from megnorm.layers.env import Context

    return Context()


def test_tp_ranks_share_the_mask_of_the_stream_and_not_that_of_their_heads(ranks: Any) -> None:
    (stream, heads), (other_stream, other_heads) = ranks(2).run(masks)
    assert torch.equal(stream, other_stream) and 0.0 in stream
    assert not torch.equal(heads == 0, other_heads == 0)
