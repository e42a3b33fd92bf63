"""A scheme in a user's own file gets tensor parallelism, export and its drawing by being declared."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megnorm.hf.convert import to_hf
from megnorm.hf.native import native_forward
from megnorm.norms import registry
from megnorm.norms.draw import draw
from megnorm.norms.resolve import resolve
from tests.distributed import cases
from tests.hf.tiny import made
from tools import parity, write_tables

SOURCE = """
from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Residual, Scale, Scheme, Where

@register
def of_my_own(start: float = 0.5) -> Scheme:
    branch = Residual(branch=Scale(lambda d: start / d.index, learned="width"))
    layer = Layer(
        Attention(input=Norm(), context=Norm(), q=Norm("head"), residual=branch, head_scale="pre_projection"),
        FFN(input=Norm(), inner=Norm(), output=Norm(weight_init=lambda d: d.layers ** -0.5), residual=branch),
    )
    return Scheme("of_my_own", "unpublished", "everything at once", layer,
                  overrides=((Where.last(1), Layer(Attention(post=Norm()), FFN(post=Norm()))),), final=Norm())
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    yield str(path)
    registry._factories.pop("of_my_own", None)


def test_a_scheme_of_my_own(plugin: str, tmp_path: Path, ranks: Any) -> None:
    base = cases.config("preln", kv=1, kind="layernorm", model="gpt2", tp=2)
    norm = replace(base.model.norm, scheme="of_my_own", plugins=(plugin,))
    config = replace(base, model=replace(base.model, norm=norm))
    difference = ranks(2).run(parity.on_rank, config, 3)[0]
    assert difference.initial_equal and difference.worst <= 1e-10, difference

    picture = draw(resolve(norm, 3))
    assert picture.startswith("<svg") and "of_my_own" in picture

    model, resolved, state = made("of_my_own", norm={"plugins": (plugin,)})
    reference = native_forward(state, model, resolved)
    exact = partial(native_forward, state, model, resolved, dtype=torch.float64)
    exported = to_hf(state, model, resolved, out=tmp_path / "hf", reference=reference, exact=exact)
    assert exported.architecture == "MegnormForCausalLM"  # and to_hf has compared the logits: a mismatch raises


def test_what_is_generated_is_fresh() -> None:
    stale = [path for path, text in write_tables.generated().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python tools/write_tables.py"
