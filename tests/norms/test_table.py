"""The table, the numbers and the drawing that are generated from the declarations."""

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from megnorm.models.causal import build_model
from megnorm.models.config import ModelConfig
from megnorm.norms import commands, registry
from megnorm.norms.config import NormConfig
from megnorm.norms.draw import draw
from megnorm.norms.resolve import resolve
from megnorm.norms.show import groups
from megnorm.norms.table import formula, norms, outside, parameters, rows, scales, sublayers
from megnorm.parallel.layout import named_matrices
from tests.marks import thinned

SIZES = {"layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 20, "vocab_size": 11}
SYMBOLS = {"d": 16, "f": 20, "hd": 6, "h": 4, "h hd": 24, "kv hd": 12, "1": 1}


@pytest.mark.parametrize("kind", thinned(["rmsnorm", "layernorm", "derf", "seednorm"], 3))
@pytest.mark.parametrize("name", registry.names())
def test_parameters_are_those_of_the_model(name: str, kind: str) -> None:
    """Symbolic counts against the tensors that the builder makes, layer by layer."""
    cfg = ModelConfig(**SIZES, norm=NormConfig(name, kind=kind))  # type: ignore[arg-type]
    resolved = resolve(cfg.norm, cfg.layers)
    found = [0] * cfg.layers
    for named in named_matrices(build_model(cfg)):
        if named.matrix.role in ("norm", "scale", "mix") and named.name.startswith("blocks."):
            found[int(named.name.split(".")[1])] += named.view().numel()
    for i, layer in enumerate(resolved.layers):
        assert sum(SYMBOLS[s] * n for s, n in parameters(layer).items()) == found[i]


def test_known_rows() -> None:
    shape = commands.Shape(768, 12, 12, 3072)
    made = {row.name: row for row in rows(shape, 12)}
    assert made["preln"].parameters == "0" and made["preln"].flops == made["preln"].bytes == 0
    assert made["normformer"].parameters == "f + d + h"
    assert made["hybridnorm"].parameters == "3 hd - d"
    assert made["rezero"].parameters == "1 - 2 d"
    assert made["postln"].bytes == -2 * 768 * 2, "no final norm"
    assert made["periln"].bytes == 12 * 2 * 2 * 768 * 2
    assert made["lns"].flops == 11 * 2 * 768, "one multiplication a feature and norm, but for layer 1"
    assert all(row.native is None for row in made.values())
    asked = rows(shape, 12, native=lambda config, resolved: f"{config.scheme}-{len(resolved.layers)}")
    assert asked[0].native == f"{asked[0].name}-12"


def test_grouped_heads_count_once_a_head() -> None:
    made = {row.name: row for row in rows(commands.Shape(768, 12, 4, 3072), 2)}
    assert made["qknorm"].bytes == 2 * 2 * (768 + 256) * 2, "q has 768 features, k 256"
    assert made["valuenorm"].bytes == 2 * 2 * 256 * 2
    assert made["qknorm"].flops == 2 * 4 * (768 + 256)


def test_formula() -> None:
    from collections import Counter

    assert formula(Counter({"d": -1, "hd": 3})) == "3 hd - d"
    assert formula(Counter({"d": 0})) == "0"
    assert formula(Counter({"d": -2})) == "-2 d"
    assert formula(Counter({"1": 2, "f": 1})) == "f + 2"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_norms_arguments(parser)
    return commands.run_norms(parser.parse_args(words))


def test_command_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--layers", "24") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(registry.names()) and "Hugging Face" not in lines[0]
    run("--markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| --- |") and len({line.count("|") for line in lines}) == 1


def test_command_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("show", "deepnorm", "--layers", "24", "--draw", str(tmp_path / "out.svg"))
    out = capsys.readouterr().out
    assert "skip 2.63215" in out and "v 0.268642" in out and "layers 1 to 24" in out
    assert "2.632" in (tmp_path / "out.svg").read_text()
    run("show", "mixln", "--option", "post_layers=2", "--layers", "4")
    out = capsys.readouterr().out
    assert "layers 1 to 2" in out and "layers 3 to 4" in out
    run("show", "lns", "--layers", "4", "--json")
    assert json.loads(capsys.readouterr().out)["layers"][3]["ffn"]["input"]["scale"] == 0.5
    with pytest.raises(ValueError, match="KEY=VALUE"):
        run("show", "lns", "--option", "x")


@pytest.mark.parametrize("name", registry.names())
def test_drawings_show_every_norm_and_factor(name: str) -> None:
    resolved = resolve(NormConfig(name), 8)
    root = ET.fromstring(draw(resolved))
    classes = [element.get("class", "") for element in root.iter()]
    shown = [sub for group in groups(resolved) for _, sub in sublayers(group.layers[-1])]
    assert classes.count("norm") == len(list(outside(resolved))) + sum(len(list(norms(sub))) for sub in shown)
    assert classes.count("wire extra") == sum(
        sub.residual.layer_input
        + (0 if sub.second is None else 2 + (sub.second.read is not None))
        + (sub.mix is not None)
        for sub in shown
    )
    factors = sum(
        scale.learned is not None or scale.value != 1.0 or scale.warmup != 0.0
        for sub in shown
        for _, scale in scales(sub)
    ) + sum((getattr(sub, "head_scale", None) is not None) + (sub.residual.gate is not None) for sub in shown)
    assert classes.count("scale") == factors + 3 * sum(sub.mix is not None for sub in shown)
    left, low, width, high = map(float, root.get("viewBox", "").split())
    assert left == 0 and low < 0 < low + high and width > 500


def test_drawings_have_a_panel_for_each_kind_of_layer() -> None:
    titles = [group.title for group in groups(resolve(NormConfig("keel"), 8))]
    assert titles == ["layer 1", "layers 2 to 8"]
    assert all(title in draw(resolve(NormConfig("keel"), 8)) for title in titles)
    assert len(groups(resolve(NormConfig("lns"), 8))) == 1, "numbers alone make no panel"
