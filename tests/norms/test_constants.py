"""The constants that papers and their code print, against the schemes' formulas."""

from collections.abc import Iterable
from math import log, sqrt
from typing import Any

import pytest

from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import Resolved, resolve


def skip(resolved: Resolved) -> float:
    """The one skip of all sub-layers."""
    return one(s.residual.skip.value for layer in resolved.layers for s in (layer.attention, layer.ffn))


def one(values: Iterable[Any]) -> float:
    (value,) = set(values)
    return float(value)


# arXiv:2203.00555: layers, alpha, beta of a single stack
SINGLE = [
    (6, 1.8612, 0.3799),
    (12, 2.2134, 0.3195),
    (24, 2.6321, 0.2686),
    (100, 3.7606, 0.1880),
    (200, 4.4721, 0.1581),
    (1000, 6.6874, 0.1057),
]
# encoder layers, decoder layers, encoder alpha, encoder beta, the same with torchscale's 1.15, decoder alpha, beta
PAIRS = [
    (6, 6, 1.4179, 0.4970, 0.6569, 2.0598, 0.3433),
    (12, 6, 1.6862, 0.4179, 0.5524, 2.0598, 0.3433),
    (18, 18, 1.9987, 0.3526, 0.4660, 2.7108, 0.2608),
    (50, 50, 2.7505, 0.2562, 0.3387, 3.4996, 0.2021),
    (100, 100, 3.4157, 0.2063, 0.2727, 4.1618, 0.1699),
    (500, 500, 5.6482, 0.1248, 0.1649, 6.2233, 0.1136),
]
SCALED = {"v", "o", "up", "gate", "down"}


@pytest.mark.parametrize(("layers", "alpha", "beta"), SINGLE)
@pytest.mark.parametrize("name", ["deepnorm", "deepnorm_llama"])
def test_deepnorm_of_a_single_stack(name: str, layers: int, alpha: float, beta: float) -> None:
    resolved = resolve(NormConfig(name), layers)
    assert skip(resolved) == pytest.approx(alpha, abs=6e-5)
    for gains in resolved.gains:
        assert set(gains) == SCALED
        assert one(gains.values()) == pytest.approx(beta, abs=6e-5)
    assert resolved.distribution == "xavier_normal"


@pytest.mark.parametrize("row", PAIRS)
def test_deepnorm_of_an_encoder_decoder(row: tuple[int, int, float, float, float, float, float]) -> None:
    n, m, alpha_e, beta_e, beta_torchscale, alpha_d, beta_d = row
    pair = {"encoder_layers": n, "decoder_layers": m}
    encoder = resolve(NormConfig("deepnorm"), n, stack="encoder", **pair)
    compat = resolve(NormConfig("deepnorm", {"encoder_beta": 1.15}), n, stack="encoder", **pair)
    decoder = resolve(NormConfig("deepnorm"), m, stack="decoder", **pair)
    assert skip(encoder) == pytest.approx(alpha_e, abs=6e-5)
    assert skip(decoder) == pytest.approx(alpha_d, abs=6e-5)
    assert encoder.gains[-1]["v"] == pytest.approx(beta_e, abs=6e-5)
    assert compat.gains[-1]["down"] == pytest.approx(beta_torchscale, abs=6e-5)
    assert decoder.gains[0]["o"] == pytest.approx(beta_d, abs=6e-5)


def test_deepnorm_options() -> None:
    assert "gate" not in resolve(NormConfig("deepnorm", {"scale_gate": False}), 2).gains[0]
    assert skip(resolve(NormConfig("deepnorm_llama", {"skip": 2.8284271}), 3)) == 2.8284271
    flag = resolve(NormConfig("deepnorm", {"placement": "pre"}), 2)
    assert flag.final is not None and flag.layers[0].ffn.post is None and flag.layers[0].ffn.input is not None


@pytest.mark.parametrize(("sublayers", "omega"), [(12, 2.01701), (24, 2.60129), (36, 3.04084)])
def test_admin(sublayers: int, omega: float) -> None:
    assert skip(resolve(NormConfig("admin"), sublayers // 2)) == pytest.approx(omega, abs=1e-5)
    assert skip(resolve(NormConfig("admin", {"growth": "n"}), sublayers // 2)) == 1.0
    assert skip(resolve(NormConfig("admin", {"growth": "1"}), sublayers // 2)) == sqrt(sublayers)


def test_admin_counts_three_sublayers_in_a_decoder() -> None:
    decoder = resolve(NormConfig("admin"), 8, stack="decoder", encoder_layers=2, decoder_layers=8)
    assert skip(decoder) == pytest.approx(2.60129, abs=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3, 24])
def test_lns_scales_every_input_norm_by_its_depth(layers: int) -> None:
    resolved = resolve(NormConfig("lns"), layers)
    for index, layer in enumerate(resolved.layers):
        for sub in (layer.attention, layer.ffn):
            assert sub.input is not None and sub.input.scale == pytest.approx((index + 1) ** -0.5)
            assert sub.input.weight_init == 1.0, "a kept factor, no initial gain"
    assert resolved.final is not None and resolved.final.scale == 1.0
    assert resolved.gains[0] == {}


@pytest.mark.parametrize("layers", [1, 2, 64])
def test_keel(layers: int) -> None:
    resolved = resolve(NormConfig("keel"), layers)
    first, rest = resolved.layers[0], resolved.layers[1:]
    assert first.attention.post is None and first.attention.input is not None
    assert first.ffn.post is not None and first.ffn.input is not None
    assert first.attention.residual.skip.value == first.ffn.residual.skip.value == 1.0
    for layer in rest:
        for sub in (layer.attention, layer.ffn):
            assert sub.post is not None and sub.input is not None and sub.residual.skip.value == 2 * layers
    assert resolved.final is None
    plain = resolve(NormConfig("keel", {"exceptions": False}), layers)
    assert skip(plain) == 2.0 * layers and plain.layers[0].attention.post is not None


@pytest.mark.parametrize(("layers", "post"), [(1, 0), (3, 0), (4, 1), (12, 3), (24, 6), (29, 7)])
@pytest.mark.parametrize("name", ["mixln", "hybridnorm_mix_ln"])
def test_mixln_switches_at_a_quarter(name: str, layers: int, post: int) -> None:
    resolved = resolve(NormConfig(name), layers)
    if name == "mixln":
        found = [layer.ffn.post is not None for layer in resolved.layers]
    else:
        found = [layer.ffn.residual.source == "input" for layer in resolved.layers]
    assert found == [True] * post + [False] * (layers - post)
    assert resolved.final is not None


def test_mixln_fractions_do_not_lose_a_layer_to_rounding() -> None:
    for layers in range(1, 200):
        for post in range(layers + 1):
            resolved = resolve(NormConfig("mixln", {"fraction": post / layers}), layers)
            assert sum(layer.ffn.post is not None for layer in resolved.layers) == post
        if layers > 20:
            break


def test_subln_gains() -> None:
    assert resolve(NormConfig("subln"), 12).gains[0]["v"] == pytest.approx(sqrt(log(24)))
    assert resolve(NormConfig("subln"), 1).gains[0]["down"] == pytest.approx(sqrt(log(2)))
    pair = {"encoder_layers": 6, "decoder_layers": 4}
    encoder = resolve(NormConfig("subln"), 6, stack="encoder", **pair)
    decoder = resolve(NormConfig("subln"), 4, stack="decoder", **pair)
    assert encoder.gains[0]["up"] == pytest.approx(sqrt(log(12) * log(12) / 3))
    assert decoder.gains[0]["gate"] == pytest.approx(sqrt(log(12)))
    assert decoder.gains[0]["cross.v"] == decoder.gains[0]["cross.o"] == 1.0
    cross = decoder.layers[0].cross_attention
    assert cross is not None and cross.context is None and cross.input is not None


def test_b2t_scales_every_matrix_of_a_block() -> None:
    gains = resolve(NormConfig("b2t"), 9).gains
    assert one(gains[0].values()) == pytest.approx(1 / 3)
    assert set(gains[0]) >= {"q", "k", "v", "o", "up", "gate", "down"}
    assert resolve(NormConfig("b2t", {"scaled_init": False}), 9).gains[0] == {}


def test_hybridnorm_7b_starts_its_output_norms_small() -> None:
    resolved = resolve(NormConfig("hybridnorm_7b"), 32)
    for layer in resolved.layers:
        assert layer.attention.output is not None and layer.attention.output.weight_init == pytest.approx(0.125)
        assert layer.ffn.output is None
    assert resolved.layers[0].attention.input is not None and resolved.layers[1].attention.input is None


# name: attention none | pre | post, FFN likewise, per-head norms; arXiv:2503.04598 v4, tables 4 and 6
HYBRID = {
    "hybridnorm": ("none", "post", "qkv"),
    "hybridnorm_star": ("none", "post", "qkv"),
    "hybridnorm_first_qkv_pre": ("none", "post", "qkv"),
    "hybridnorm_qkvc_post": ("none", "post", "qkvc"),
    "hybridnorm_qkc_post": ("none", "post", "qkc"),
    "hybridnorm_qk_post": ("none", "post", "qk"),
    "hybridnorm_kv_post": ("none", "post", "kv"),
    "hybridnorm_kc_post": ("none", "post", "kc"),
    "hybridnorm_pre_qkv_post": ("pre", "post", "qkv"),
    "hybridnorm_pre_qkv_pre": ("pre", "pre", "qkv"),
    "hybridnorm_pre_qk_pre": ("pre", "pre", "qk"),
    "hybridnorm_qkv_pre": ("none", "pre", "qkv"),
    "hybridnorm_pre_post": ("pre", "post", ""),
    "hybridnorm_post_pre": ("post", "pre", ""),
    "hybridnorm_post_norm": ("post", "post", ""),
}


@pytest.mark.parametrize("name", HYBRID)
def test_hybridnorm_family(name: str) -> None:
    resolved = resolve(NormConfig(name), 3)
    attention, ffn, heads = HYBRID[name]
    for sub, place in ((resolved.layers[-1].attention, attention), (resolved.layers[-1].ffn, ffn)):
        assert (sub.input is not None) == (place != "none")
        assert (sub.residual.source == "input") == (place == "post")
        assert sub.post is None and sub.output is None
    last = resolved.layers[-1].attention
    for letter, norm in (("q", last.q), ("k", last.k), ("v", last.v), ("c", last.context)):
        assert (norm is not None) == (letter in heads)
        assert norm is None or norm.over == "head"
    assert resolved.final is not None
    first = resolved.layers[0]
    assert (first != resolved.layers[-1]) == (name in ("hybridnorm_star", "hybridnorm_first_qkv_pre"))
    if name == "hybridnorm_star":
        assert first.attention.input is not None and first.attention.v is not None
        assert first.ffn.residual.source == "stream"
