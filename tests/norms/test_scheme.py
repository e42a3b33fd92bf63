"""Impossible schemes are refused where they are declared, patched or named, with the field's path and a remedy."""

from math import log
from pathlib import Path
from typing import Any

import pytest

from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, from_json, resolve, scheme_of
from megnorm.norms.scheme import (
    FFN,
    Attention,
    Depth,
    Gate,
    Init,
    Layer,
    Mix,
    Norm,
    Residual,
    Scale,
    Scheme,
    SchemeError,
    Second,
    Streams,
    Where,
    warnings_for,
)


def declare(**changes: Any) -> Scheme:
    return Scheme("mine", "none", "a test", **({"layer": Layer()} | changes))


def mixed(mix: Mix, **attention: Any) -> Layer:
    return Layer(Attention(mix=mix, **attention), FFN(mix=mix))


TWO = Layer(Attention(second=Second()), FFN(second=Second()))
IMPOSSIBLE = [
    (
        {"layer": Layer(ffn=FFN(input=Norm(), post=Norm(), residual=Residual(source="input")))},
        r"mine: layer\.ffn\.post: a post norm has one residual source",
    ),
    ({"layer": Layer(ffn=FFN(residual=Residual(source="input")))}, r"layer\.ffn\.residual\.source: 'input' needs"),
    ({"layer": Layer(ffn=FFN(residual=Residual(source="both")))}, r"residual\.source: 'both'"),  # type: ignore[arg-type]
    ({"layer": Layer(ffn=FFN(residual=Residual(rule="sum")))}, r"residual\.rule: no rule 'sum'"),
    ({"layer": Layer(Attention(residual=Residual(layer_input=True)))}, r"attention\.residual\.layer_input"),
    ({"layer": Layer(Attention(input=Norm("head")))}, r"attention\.input\.over: 'head' is not possible"),
    ({"layer": Layer(Attention(q=Norm("heads")))}, r"attention\.q\.over"),  # type: ignore[arg-type]
    ({"layer": Layer(Attention(q=Norm(gain="per_head")))}, r"attention\.q\.gain: 'per_head' needs"),
    ({"layer": Layer(ffn=FFN(inner=Norm(kind="batchnorm")))}, r"ffn\.inner\.kind: no norm kind 'batchnorm'"),
    ({"layer": Layer(ffn=FFN(inner=True))}, r"ffn\.inner: give Norm"),  # type: ignore[arg-type]
    ({"layer": Layer(Attention(head_scale="late"))}, r"attention\.head_scale: 'late'"),  # type: ignore[arg-type]
    ({"layer": Layer(ffn=FFN(residual=Residual(skip=2.0)))}, r"ffn\.residual\.skip: give Scale"),  # type: ignore[arg-type]
    ({"layer": Layer(ffn=FFN(residual=Residual(branch=Scale(learned="head"))))}, r"branch\.learned"),  # type: ignore[arg-type]
    ({"layer": Layer(ffn=FFN(residual=Residual(branch=Scale(shared=True))))}, r"branch\.shared: a constant"),
    (
        {"layer": Layer(ffn=FFN(residual=Residual(branch=Scale(0.0, "scalar", shared=True))))},
        r"residual\.branch\.shared: attention and ffn",
    ),
    ({"layer": Layer(ffn=FFN(residual=Residual(branch=Scale(0.0, "scalar", warmup=9))))}, r"branch\.warmup: a learned"),
    ({"layer": Layer(ffn=FFN(residual=Residual(gate=Gate(shared=False)), post=Norm()))}, r"residual\.gate\.on: a post"),
    ({"layer": Layer(ffn=FFN(residual=Residual(gate=Gate("branch", shared=False))))}, r"gate\.on: 'branch'"),  # type: ignore[arg-type]
    ({"layer": Layer(ffn=FFN(residual=Residual(gate=Gate())))}, r"residual\.gate\.shared: attention and ffn"),
    ({"layer": Layer(ffn=FFN(residual=Residual(gate=0.5)))}, r"residual\.gate: give Gate"),  # type: ignore[arg-type]
    ({"layer": Layer(attention=FFN())}, r"layer\.attention: give Attention"),  # type: ignore[arg-type]
    ({"final": Norm("head")}, r"mine: final\.over"),
    ({"init": Init(gain={"W_q": 2.0})}, r"init\.gain: no matrix of a block has the role 'W_q'"),
    ({"init": Init(gain={"embed": 2.0})}, r"init\.gain: .*'embed'"),
    ({"overrides": ((Where("middle", 1, 2), Layer()),)}, r"overrides\[0\]: no rule 'middle'"),  # type: ignore[arg-type]
    ({"overrides": ((Where.fraction(0.5, 1.5), Layer()),)}, r"overrides\[0\]: fraction\(0\.5, 1\.5\)"),
    ({"overrides": ((Where.first(-1), Layer()),)}, r"overrides\[0\]: first\(-1\)"),
    (
        {"overrides": ((Where.first(1), Layer(ffn=FFN(residual=Residual(source="input")))),)},
        r"overrides\[0\]\.ffn\.residual\.source",
    ),
    (
        {"layer": Layer(ffn=FFN(residual=Residual(skip=Scale(lambda d: 1 / log(d.layers)))))},
        r"mine: layer\.ffn\.residual\.skip\.value: the formula fails at layer 1 of 1: float division",
    ),
    (
        {"layer": Layer(Attention(input=Norm(scale=lambda d: 1.0 / (d.index - 12))))},
        r"layer\.attention\.input\.scale: the formula fails at layer 12 of 12",
    ),
    (
        {"init": Init(gain={"o": lambda d: {"only": 1.0, "decoder": 2.0}[d.stack]})},
        r"init\.gain\.o: the formula fails at layer 1 of 1 of the encoder",
    ),
    ({"init": Init(gain={"o": lambda d: float(d.layers) ** 200})}, r"init\.gain\.o: the formula (fails|gives)"),
    ({"final": Norm(weight_init=float("nan"))}, r"final\.weight_init: the formula gives nan"),
    ({"streams": Streams()}, r"mine: layer: two streams are declared by streams, and by second"),
    ({"layer": mixed(Mix(norm=Norm()))}, r"mine: layer: mix needs streams, with mixed=4"),
    ({"streams": Streams(mixed=3), "layer": mixed(Mix(norm=Norm()))}, r"every sub-layer mixes the 3 of streams\.mixed"),
    ({"streams": Streams(mixed=4), "layer": Layer()}, r"every sub-layer mixes the 4 of streams\.mixed"),
    ({"streams": Streams(mixed=4), "layer": mixed(Mix())}, r"attention\.mix\.norm: what a token's weights"),
    ({"streams": Streams(mixed=4), "layer": mixed(Mix(norm=Norm(), rule="relu"))}, r"mix\.rule: no rule 'relu'"),  # type: ignore[arg-type]
    ({"streams": Streams(mixed=1), "layer": mixed(Mix(1, norm=Norm()))}, r"mix\.streams: 1 is no whole number from 2"),
    ({"streams": Streams(mixed=4), "layer": mixed(Mix(norm=Norm(), rounds=0))}, r"mix\.rounds: 0 is no whole"),
    ({"streams": Streams(mixed=4), "layer": mixed(Mix(norm=Norm("head")))}, r"mix\.norm\.over: 'head'"),
    ({"streams": Streams(mixed=4, y=Norm()), "layer": mixed(Mix(norm=Norm()))}, r"streams: entry, x and y are of two"),
    ({"streams": Streams(share=2.0), "layer": TWO}, r"streams: share and exit are of mixed streams"),
    (
        {"streams": Streams(mixed=4, exit=Mix(rule="tanh", norm=Norm())), "layer": mixed(Mix(norm=Norm()))},
        r"streams\.exit: the end reads all 4 streams by rule 'sinkhorn'",
    ),
    (
        {"streams": Streams(mixed=4), "layer": mixed(Mix(norm=Norm()), post=Norm())},
        r"attention\.mix: streams mixed by token have no other residual and no post norm",
    ),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=[str(i) for i in range(len(IMPOSSIBLE))])
def test_impossible_schemes_are_refused_when_declared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        declare(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NormConfig("prelm"), r"norm\.scheme: no scheme 'prelm'; did you mean 'preln'\?"),
        (NormConfig("normformer", {"head_scal": None}), r"norm\.options\.head_scal: .* did you mean 'head_scale'\?"),
        (NormConfig("normformer", {"head_scale": "post"}), r"norm\.options\.head_scale: .* 'pre_projection' or"),
        (NormConfig("mixln", {"fraction": "half"}), r"norm\.options\.fraction: .* takes a number here, not 'half'"),
        (NormConfig("mixln", {"post_layers": 1.5}), r"norm\.options\.post_layers: .* a whole number or null"),
        (NormConfig("postln", {"final_norm": 1}), r"norm\.options\.final_norm: .* true or false"),
        (NormConfig("mixln", {"fraction": 1.5}), r"mixln: overrides\[0\]: fraction"),
        (NormConfig("preln", patch={"layer": {"fnn": {}}}), r"norm\.patch\.layer\.fnn: no such field; there are"),
        (NormConfig("preln", patch={"layer": {"ffn": {"middle": {}}}}), r"norm\.patch\.layer\.ffn\.middle"),
        (NormConfig("preln", patch={"layer": {"ffn": {"inner": 1}}}), r"layer\.ffn\.inner: give Norm"),
        (NormConfig("postln", patch={"layer": {"ffn": {"residual": {"source": "input"}}}}), r"ffn\.residual\.source"),
        (NormConfig("preln", patch={"overrides": [{"layer": {}}]}), r"norm\.patch\.overrides\[0\]: give one of"),
        (NormConfig("preln", plugins=("nowhere.py",)), r"norm\.plugins: there is no file 'nowhere\.py'"),
        (NormConfig("preln", plugins=("no.such.module",)), r"norm\.plugins: no module 'no\.such\.module'"),
        (NormConfig("preln", kind="seednorm", gain="none"), r"input\.gain: seednorm"),
        (NormConfig("mhc", {"exit": "sum"}), r"norm\.options\.exit: .* 'learned' or 'mean'"),
        (NormConfig("prores", {"host": "mhc"}), r"attention\.mix: streams mixed by token have no other residual"),
    ],
)
def test_wrong_configs_name_the_field_and_the_remedy(config: NormConfig, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        resolve(config, 4)


def test_no_layers_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"model\.layers"):
        resolve(NormConfig(), 0)


@pytest.mark.parametrize("name", registry.names())
def test_every_scheme_holds_at_every_depth_and_survives_json(name: str) -> None:
    for layers in (1, 2, 3, 7, 40):
        resolved = resolve(NormConfig(name), layers)
        assert len(resolved.layers) == len(resolved.gains) == layers
        assert from_json(resolved.to_json()) == resolved
        assert not list(callables(resolved.to_json()))
    for stack, layers in (("encoder", 3), ("decoder", 2)):
        resolve(NormConfig(name), layers, stack=stack, encoder_layers=3, decoder_layers=2)  # type: ignore[arg-type]


def callables(value: Any) -> Any:
    if isinstance(value, dict):
        for item in value.values():
            yield from callables(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from callables(item)
    elif not isinstance(value, str | float | int | bool | None):
        yield value


def test_patches_change_what_they_name() -> None:
    inner = resolve(NormConfig("preln", patch={"layer": {"ffn": {"inner": {}}}, "final": None}), 2)
    assert inner.layers[1].ffn.inner is not None and inner.layers[1].ffn.input is not None and inner.final is None
    heads = {"attention": {"q": {"over": "head", "kind": "l2"}}}
    own = resolve(NormConfig("hybridnorm_7b", patch={"layer": {"attention": {"q": None}}}), 2)
    assert own.layers[0].attention.q is not None and own.layers[1].attention.q is None
    every = resolve(NormConfig("mixln", patch={"all_layers": heads}), 4)
    assert [layer.attention.q.kind for layer in every.layers if layer.attention.q] == ["l2"] * 4
    last = {"last": 1, "layer": {"ffn": {"output": {"weight_init": 0.5}}}}
    end = resolve(NormConfig("preln", patch={"overrides": [last]}), 3)
    assert [layer.ffn.output is not None for layer in end.layers] == [False, False, True]
    assert end.layers[-1].ffn.output is not None and end.layers[-1].ffn.output.weight_init == 0.5


def test_open_fields_of_norms_are_the_users() -> None:
    user = NormConfig("hybridnorm", kind="layernorm", eps=1e-3, gain="one_plus", cast="after_gain")
    norm = resolve(user, 1).layers[0].attention.q
    assert norm is not None
    assert (norm.kind, norm.eps, norm.gain, norm.cast, norm.bias) == ("layernorm", 1e-3, "one_plus", "after_gain", True)
    fixed = resolve(NormConfig("qknorm_l2", kind="layernorm"), 1).layers[0].attention
    assert fixed.k is not None and fixed.k.kind == "l2" and fixed.k.gain == "none"


def test_the_final_norm_stands_at_the_last_layer() -> None:
    scheme = declare(final=Norm(scale=lambda d: float(d.index)), embedding=Norm(scale=lambda d: float(d.index)))
    registry.register(lambda: scheme)
    resolved = resolve(NormConfig("mine"), 5)
    assert resolved.final is not None and resolved.final.scale == 5.0
    assert resolved.embedding is not None and resolved.embedding.scale == 1.0


@pytest.fixture(autouse=True)
def forget() -> Any:
    """What a test registers is gone after it."""
    before = dict(registry._factories), set(registry._plugins)
    yield
    registry._factories.clear()
    registry._factories.update(before[0])
    registry._plugins.clear()
    registry._plugins.update(before[1])


def test_warnings_where_the_literature_speaks_against_a_combination() -> None:
    def warned(name: str, depth_scaled: bool = True) -> list[str]:
        return warnings_for(scheme_of(NormConfig(name)), depth_scaled=depth_scaled)

    assert "loses its gain" in warned("lns")[0]
    assert "o and down" in warned("deepnorm")[0]
    assert warned("lns", depth_scaled=False) == warned("preln") == warned("hybridnorm") == []


PLUGIN = """
from megnorm.norms.registry import register
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Scheme


@register
def cubic(power: float = 0.5) -> Scheme:
    norm = Norm(scale=lambda d: d.index**-power)
    return Scheme("cubic", "none", "from a file", Layer(Attention(input=norm), FFN(input=norm)), final=Norm())
"""


def test_a_file_outside_the_package_brings_a_scheme(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    config = NormConfig("cubic", {"power": 1.0}, plugins=(str(path),))
    resolved = resolve(config, 4)
    assert isinstance(resolved, Resolved) and resolved.layers[3].ffn.input is not None
    assert resolved.layers[3].ffn.input.scale == 0.25
    assert "cubic" in registry.names()


def test_a_name_is_taken_once() -> None:
    def factory() -> Scheme:
        return Scheme("preln", "none", "another", Layer())

    with pytest.raises(SchemeError, match="preln: the name is taken by"):
        registry.register(factory)


def test_where() -> None:
    def held(where: Where, layers: int) -> list[int]:
        return [i for i in range(1, layers + 1) if where.holds(Depth(i, layers))]

    assert held(Where.first(2), 5) == [1, 2]
    assert held(Where.last(2), 5) == [4, 5]
    assert held(Where.fraction(0.25, 0.5), 8) == [3, 4]
    assert held(Where.fraction(0, 0.29), 100) == list(range(1, 30)), "0.29 * 100 is 28.999999999999996"
    assert held(Where.first(9), 3) == [1, 2, 3]


def test_the_example_of_a_custom_scheme(project: Path) -> None:
    source = project / "examples" / "custom_scheme" / "taper.py"
    resolved = resolve(NormConfig("taper", {"power": 1.0}, plugins=(str(source),)), 4)
    first, *rest = resolved.layers
    assert first.ffn.output is None and first.attention.q is not None
    assert [layer.ffn.output.scale for layer in rest if layer.ffn.output] == [1 / 2, 1 / 3, 1 / 4]
    assert resolved.gains[0]["o"] == pytest.approx(8**-0.5)
