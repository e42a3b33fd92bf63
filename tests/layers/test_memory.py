"""What a layer keeps for backward under each recompute mode, counted in live storages; docs/memory.md quotes ``KEPT``.

The figure of a layer is the difference of a three-layer and a two-layer model, so that embedding, head and loss drop out.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm.layers.norm import NormLayer
from megnorm.models.causal import Tokens
from megnorm.parallel.mesh import Mesh
from megnorm.plan import make_plan
from megnorm.train.build import mesh_of
from tests.layers.live import live
from tests.layers.tiny import MODES, SELECTIVE, Model, config

S, B, D, F, H = 16, 2, 32, 80, 4
CHEAP = ("attention", "norms", "activations")


def kept(scheme: str, modes: tuple[str, ...], layers: int, mesh: Mesh, **case: Any) -> int:
    """Bytes that live after a forward pass whose loss is held."""
    cfg = config(
        scheme, 0.0, {"layers": layers, "ffn": F, "max_positions": S}, **{"kv": H, "precision": "fp32", **case}
    )
    model = Model.build(cfg, modes, mesh=mesh)
    tokens = torch.zeros(S, B, dtype=torch.int64)
    with live() as alive:
        loss = model.net(Tokens(tokens, tokens, torch.ones(S, B)))
    assert loss.requires_grad
    return alive.bytes() if mesh.size == 1 else alive.settled()


def per_token(scheme: str, modes: tuple[str, ...], mesh: Mesh | None = None, **case: Any) -> float:
    """Numbers that one layer keeps per token on this rank."""
    three, two = (kept(scheme, modes, layers, mesh or Mesh(), **case) for layers in (3, 2))
    return (three - two) / (4 * S * B)


# scheme, modes: widths d, ffn widths f, numbers per head, numbers per token
KEPT: dict[tuple[str, tuple[str, ...]], tuple[int, int, int, int]] = {
    ("preln", ()): (10, 4, 1, 2),
    ("preln", ("norms",)): (8, 4, 1, 2),
    ("preln", ("activations",)): (10, 2, 1, 2),
    ("preln", ("attention",)): (7, 4, 0, 2),
    ("preln", CHEAP): (5, 2, 0, 2),
    ("preln", SELECTIVE): (5, 2, 0, 2),
    ("preln", ("block",)): (1, 0, 0, 0),
    ("normformer", ()): (12, 5, 1, 4),
    ("normformer", ("norms",)): (9, 4, 1, 4),
    ("normformer", ("activations",)): (12, 3, 1, 4),
    ("normformer", ("attention",)): (8, 5, 0, 4),
    ("normformer", CHEAP): (6, 2, 0, 4),
    ("normformer", SELECTIVE): (5, 2, 0, 4),
    ("normformer", ("block",)): (1, 0, 0, 0),
    ("hybridnorm", ()): (10, 4, 4, 1),
    ("hybridnorm", ("norms",)): (8, 4, 4, 1),
    ("hybridnorm", ("activations",)): (10, 2, 4, 1),
    ("hybridnorm", ("attention",)): (6, 4, 0, 1),
    ("hybridnorm", CHEAP): (5, 2, 0, 1),
    ("hybridnorm", SELECTIVE): (5, 2, 0, 1),
    ("hybridnorm", ("block",)): (1, 0, 0, 0),
    ("postln", ()): (10, 4, 1, 2),
    ("postln", CHEAP): (5, 2, 0, 2),
    ("sandwich", ()): (12, 4, 1, 4),
    ("sandwich", CHEAP): (7, 2, 0, 4),
    ("sandwich", SELECTIVE): (5, 2, 0, 4),
}


@pytest.mark.parametrize(
    ("scheme", "modes"), list(KEPT), ids=lambda x: x if isinstance(x, str) else "+".join(x) or "none"
)
def test_a_layer_keeps_what_the_docs_say(scheme: str, modes: tuple[str, ...]) -> None:
    widths, ffns, heads, tokens = KEPT[scheme, modes]
    assert per_token(scheme, modes) == widths * D + ffns * F + heads * H + tokens


def table() -> str:
    """Markdown rows of KEPT, as docs/memory.md shows them."""

    def term(count: int, letter: str) -> list[str]:
        return [f"{count if count > 1 or letter == '' else ''} {letter}".strip()] if count else []

    rows = []
    for (scheme, modes), numbers in KEPT.items():
        terms = [one for count, letter in zip(numbers, ("d", "f", "h", ""), strict=True) for one in term(count, letter)]
        rows.append(f"| {scheme} | {', '.join(modes) or 'none'} | {' + '.join(terms)} |")
    return "\n".join(rows)


def test_the_table_of_the_docs(project: Path) -> None:
    assert table() in (project / "docs/memory.md").read_text(encoding="utf-8"), table()


@pytest.mark.parametrize("scheme", ("normformer", "hybridnorm"))
def test_extra_norms_are_free_when_asked(scheme: str) -> None:
    """Against the scheme that has two norms a layer, under the same modes: statistics apart (1 number a token and norm)."""
    extra = per_token(scheme, SELECTIVE) - per_token("preln", SELECTIVE)
    statistics = {"normformer": 2, "hybridnorm": -1}[scheme]  # output and inner norm; no norm before q, k, v
    assert extra == statistics
    assert per_token(scheme, ()) > per_token("preln", ()) + statistics  # they are not free unasked


@pytest.mark.parametrize("modes", ((), *MODES), ids="+".join)
def test_nothing_stays_behind(modes: tuple[str, ...]) -> None:
    """After backward only gradients live, and nothing keeps what a graph that is dropped would have kept."""
    cfg = config("keel", precision="fp32")
    model = Model.build(cfg, modes)
    tokens = torch.zeros(8, 2, dtype=torch.int64)
    batch = Tokens(tokens, tokens, torch.ones(8, 2))
    model.forward(0, batch)  # what a first pass makes for good (tables of a backend) is not counted
    with live() as alive:
        loss = model.forward(0, batch)
        del loss
        assert alive.bytes() == 0
        model.forward(0, batch).backward()
    assert alive.bytes() == sum(4 * p.numel() for p in model.net.parameters())


def on_rank(rank: int, world: int, scheme: str, modes: tuple[str, ...]) -> float:
    layout = {"tp": world, "sequence_parallel": True}
    mesh = mesh_of(make_plan(config(scheme, kv=H, **layout), world), torch.device("cpu"))
    return per_token(scheme, modes, mesh, **layout)


def test_tensor_and_sequence_parallelism_divide_it(ranks: Any) -> None:
    """All but the statistics of the inner norm, which every rank keeps for all tokens."""
    for modes in ((), SELECTIVE):
        widths, ffns, heads, tokens = KEPT["normformer", modes]
        wanted = (widths * D + ffns * F + heads * H + tokens - 1) / 2 + 1
        assert ranks(2).run(on_rank, "normformer", modes) == [wanted, wanted]


def test_the_counter_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is no unit keeps its output, and the figure shows it."""
    monkeypatch.setattr(NormLayer, "forward", NormLayer._normalize)
    assert per_token("preln", CHEAP) == 7 * D + 2 * F + 2
