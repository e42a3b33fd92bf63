"""Every shared golden of a covered kind passes, under the scheme that is expected, and a wrong model does not."""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from check_goldens import Line, check, load
from goldens import run as running
from goldens.case import NEUTRAL, SINGLE, Case, NotCovered, find
from goldens.run import Errors, mesh_of, run

from megnorm.norms.config import NormConfig
from megnorm.parallel.mesh import Axis
from tests.marks import thinned

FOLDER = Path(os.environ.get("MEGNORM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "golden"
ALL = [path.relative_to(FOLDER).as_posix() for path in find(FOLDER)] if FOLDER.is_dir() else []

SCHEMES = {
    "fairseq_lm__pre_ln_baseline": "preln",
    "fairseq_lm__post_ln_baseline": "postln",
    "fairseq_lm__normformer": "normformer",
    "frontier/gpas_repo_deeppost": "deepnorm_llama",
    "frontier/gpas": "gpas",
    "frontier/hc_dynamic": "hyper_connections",
    "frontier/hf_deepseek_v4_mhc": "mhc",
    "frontier/lns": "lns",
    "frontier/mixln_deeppost": "deepnorm_llama",
    "frontier/mixln_post": "postln",
    "frontier/mixln_post_pre": "mixln",
    "frontier/mixln_pre": "preln",
    "frontier/mixln_sandwich": "sandwich",
    "frontier/mixln_scale_pre": "preln",
    "frontier/mixln_scale_res_pre_norm": "skipinit",
    "frontier/prores": "prores",
    "frontier/siamese_hybrid_pre": "siamese_hybrid",
    "frontier/xtold_resi_dual": "resi_dual",
    "frontier/xt_derf": "preln",
    "frontier/xt_dyt": "preln",
    "frontier/xt_keel": "keel",
    "frontier/xt_layerscale": "layerscale",
    "frontier/xt_post_rms": "postln",
    "frontier/xt_pre_rms": "preln",
    "frontier/xt_qk_norm": "qknorm_l2",
    "frontier/xt_qk_norm_dim_scale": "qknorm_l2",
    "frontier/xt_sandwich": "sandwich",
    "frontier/xt_scale_residual": "resscale",
    "frontier/xt_scalenorm": "preln",
    "frontier/xt_value_rmsnorm": "valuenorm",
    "hybrid_dense__pre_norm": "preln",
    "hybrid_dense__hybridnorm": "hybridnorm",
    "hybrid_dense__hybridnorm_star": "hybridnorm_star",
    "hybrid_dense__hybridnorm_star_eps": "hybridnorm_star",
    "hybrid_dense__": "hybridnorm_",
    "hybrid_moe_hybridnorm": "hybridnorm",
    "hybrid_moe_hybridnorm_star": "hybridnorm_star",
    "hybrid_moe_pre_qk_pre": "hybridnorm_pre_qk_pre",
    "torchscale__decoder_deepnorm": "deepnorm",
    "torchscale__decoder_post_ln": "postln",
    "torchscale__decoder_pre_ln": "preln",
    "torchscale__decoder_subln": "subln",
    "torchscale__encdec_deepnorm": "deepnorm",
    "torchscale__encdec_subln": "subln",
    "torchscale__encoder_deepnorm": "deepnorm",
    "torchscale__encoder_subln": "subln",
    "hf/": "preln",  # and its import's patch
}
NOT_COVERED = {
    "a vision model", "weights projected after each step", "value residual",
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_golden(shared: Path, name: str) -> None:
    line = check(FOLDER / name, name)
    assert line.status != "fail", str(line)
    if line.status == "not covered":
        assert line.reason in NOT_COVERED
        return
    stem = name.removesuffix(".json")
    expected = SCHEMES[max((key for key in SCHEMES if stem.startswith(key)), key=len)]
    if expected == "hybridnorm_":
        expected += stem.partition("__")[2].removeprefix("hybridnorm_")
        expected = "hybridnorm" if expected in ("hybridnorm_embed_norm", "hybridnorm_layernorm_bias") else expected
    assert line.scheme.split(" ")[0].split("(")[0] == expected
    assert "patched" not in line.scheme or name.startswith("hf/")


def test_every_kind_is_there(shared: Path) -> None:
    """The expectations above are not vacuous: 87 of the shared goldens are of covered kinds."""
    covered = 0
    for name in ALL:
        with contextlib.suppress(NotCovered):
            covered += isinstance(load(FOLDER / name), Case)
    assert covered == 87


def test_gptj_with_angles_in_fp32(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wider limit is for the reference's rotary table alone: with that the numbers are as close as all others."""

    def table(positions: torch.Tensor, turned: int, theta: float, dtype: torch.dtype, *_: Any) -> Any:
        steps = 1.0 / theta ** (torch.arange(0, turned, 2) / turned)
        angles = (positions.float()[:, None] * steps)[:, None, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    monkeypatch.setattr("megnorm.layers.rope.rope_table", table)
    case = golden("hf/gptj")
    assert case.tolerance == SINGLE
    assert passes(replace(case, tolerance=NEUTRAL), run(case))


@pytest.mark.parametrize("name", ["hybridnorm_star", "mix_ln", "first_qkv_pre", "kc_post", "pre_post"])
def test_a_placement_without_a_name(shared: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Were no scheme registered under it, a placement list would give the same model as a patch."""
    monkeypatch.setattr("goldens.placement._registered", lambda wanted, layers: None)
    line = check(FOLDER / f"hybrid_dense__{name}.json", name)
    assert (line.status, line.scheme) == ("pass", "nonorm(depth_gain=False, final_norm=True) patched")


def golden(name: str) -> Case:
    return load(place(FOLDER, name))


def place(folder: Path, name: str) -> Path:
    """A folder of Hugging Face's, or the json of a pair."""
    return folder / name if name.startswith("hf/") else folder / f"{name}.json"


def passes(case: Case, errors: Errors) -> bool:
    limit = case.tolerance
    return errors.logits <= limit.logits and errors.loss <= limit.loss and errors.worst[1] <= limit.gradient


def with_norm(case: Case, **changes: Any) -> Case:
    return replace(case, model=replace(case.model, norm=replace(case.model.norm, **changes)))


def patched(case: Case, **fields: Any) -> Case:
    return with_norm(case, patch={"all_layers": fields})


WRONG: list[tuple[str, str, Callable[[Case], Case]]] = [
    (
        "the head scale before W_o",
        "fairseq_lm__normformer_scale_heads",
        lambda c: with_norm(c, options={**c.model.norm.options, "head_scale": "pre_projection"}),
    ),
    (
        "the FFN adds to the stream",
        "hybrid_dense__hybridnorm",
        lambda c: patched(c, ffn={"residual": {"source": "stream"}}),
    ),
    (
        "attention adds to its normalized input",
        "hybrid_dense__pre_norm",
        lambda c: patched(c, attention={"residual": {"source": "input"}}),
    ),
    ("no first-layer exception", "hybrid_dense__mix_ln", lambda c: with_norm(c, scheme="preln")),
    (
        "no alpha",
        "torchscale__decoder_deepnorm",
        lambda c: with_norm(c, options={"skip": 1.0}),
    ),
    (
        "alpha on the attention only",
        "torchscale__decoder_deepnorm_flag_only",
        lambda c: patched(c, ffn={"residual": {"skip": {"value": 1.0}}}),
    ),
    ("alpha of the depth", "frontier/mixln_deeppost", lambda c: with_norm(c, options={})),
    ("a skip of 1", "frontier/xt_keel", lambda c: with_norm(c, options={**c.model.norm.options, "skip": 1.0})),
    (
        "the factor of the first layer everywhere",
        "frontier/lns",
        lambda c: with_norm(c, scheme="preln"),
    ),
    ("another logit scale", "frontier/xt_qk_norm", lambda c: with_norm(c, options={"logit_scale": 9.99})),
    ("eps of another site", "hybrid_dense__hybridnorm_star_eps", lambda c: with_norm(c, eps=1e-5)),
    (
        "the gains of q and k exchanged",
        "hybrid_dense__hybridnorm",
        lambda c: exchanged(c, "blocks.0.attention.q_norm.weight", "blocks.0.attention.k_norm.weight"),
    ),
    (
        "gate and up exchanged",
        "frontier/xt_pre_rms",
        lambda c: exchanged(c, "blocks.0.ffn.gate.weight", "blocks.0.ffn.up.weight"),
    ),
    (
        "padding in attention and in positions",
        "fairseq_lm__normformer_all4_relu_squared_padded",
        lambda c: replace(c, model=replace(c.model, padding_id=None)),
    ),
    (
        "no embedding scale",
        "fairseq_lm__pre_ln_baseline",
        lambda c: replace(c, model=replace(c.model, embedding_scale=1.0)),
    ),
    (
        "gelu by tanh",
        "torchscale__decoder_pre_ln",
        lambda c: replace(c, model=replace(c.model, activation="gelu_tanh")),
    ),
    (
        "weights of experts that sum to 1",
        "hybrid_moe_hybridnorm_star",
        lambda c: replace(c, model=replace(c.model, moe=replace(c.model.moe, normalize=True))),
    ),
    (
        "another number of experts",
        "hybrid_moe_pre_qk_pre",
        lambda c: replace(c, model=replace(c.model, moe=replace(c.model.moe, top_k=3))),
    ),
    (
        "experts without room for all tokens",
        "hybrid_moe_hybridnorm",
        lambda c: replace(c, model=replace(c.model, moe=replace(c.model.moe, capacity=0.8))),
    ),
    (
        "rotary theta",
        "frontier/mixln_pre",
        lambda c: replace(c, model=replace(c.model, rope_theta=9000.0)),
    ),
    (
        "padding of an encoder",
        "torchscale__encoder_subln_padded",
        lambda c: replace(c, real=None),
    ),
    (
        "distances of the position bias",
        "torchscale__encoder_deepnorm_relbias_padded",
        lambda c: replace(c, model=replace(c.model, relative_distance=32)),
    ),
    (
        "the alpha of one stack in both",
        "torchscale__encdec_deepnorm",
        lambda c: with_norm(c, options={"skip": 2.0}),
    ),
    (
        "the projections of cross-attention exchanged",
        "torchscale__encdec_subln",
        lambda c: exchanged(
            c, "decoder.blocks.0.cross_attention.k.weight", "decoder.blocks.0.cross_attention.v.weight"
        ),
    ),
    (
        "norms on cross-attention like attention's",
        "torchscale__encdec_deepnorm",
        lambda c: patched(c, cross_attention={"post": {}, "residual": {"skip": {"value": 1.0}}}),
    ),
    (
        "gains that are not stored minus one",
        "hf/gemma2",
        lambda c: with_norm(c, gain="vector"),
    ),
    ("token types", "hf/bert_mlm", lambda c: replace(c, segments=None)),
    (
        "rows of the position table one too early",
        "hf/roberta_mlm",
        lambda c: replace(c, weights={**c.weights, POSITIONS: c.weights[POSITIONS].roll(1, 0)}),
    ),
]
POSITIONS = "embed.position.weight"


def exchanged(case: Case, a: str, b: str) -> Case:
    weights = dict(case.weights)
    weights[a], weights[b] = weights[b], weights[a]
    return replace(case, weights=weights)


@pytest.mark.parametrize(("what", "name", "mutate"), thinned(WRONG, 3), ids=[what for what, _, _ in WRONG])
def test_a_wrong_model_fails(shared: Path, what: str, name: str, mutate: Callable[[Case], Case]) -> None:
    case = golden(name)
    assert passes(case, run(case))
    wrong = mutate(case)
    errors = run(wrong)
    assert not passes(wrong, errors)
    assert errors.logits > 10 * case.tolerance.logits


MISSING: list[tuple[str, str, dict[str, Any], str]] = [
    ("head scale", "fairseq_lm__normformer_all4", {"attention": {"head_scale": None}}, "head_scale' has no place"),
    ("inner norm", "torchscale__decoder_subln", {"ffn": {"inner": None}}, "inner_norm.bias' has no place"),
    ("a norm too many", "hybrid_dense__hybridnorm", {"attention": {"input": {}}}, "input_norm.weight' is not in"),
    ("a norm over the width", "hybrid_dense__qk_post", {"attention": {"q": {"over": "width"}}}, "is [32] in the model"),
]


@pytest.mark.parametrize(("what", "name", "patch", "words"), MISSING, ids=[what for what, *_ in MISSING])
def test_a_parameter_left_over_or_missing_is_named(
    shared: Path, what: str, name: str, patch: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        run(patched(golden(name), **patch))


@pytest.mark.parametrize("name", ["fairseq_lm__normformer_all3", "frontier/mixln_pre"])
def test_a_wrong_gradient_fails(shared: Path, name: str) -> None:
    """Each gradient is compared by itself: an error in the smallest shows, above a thousandth of the global norm."""
    case = golden(name)
    smallest = min(case.grads, key=lambda key: case.grads[key].norm())
    everything = torch.stack([grad.norm() for grad in case.grads.values()]).norm()
    bump = torch.zeros_like(case.grads[smallest])
    bump.view(-1)[0] = 2 * case.tolerance.gradient * max(case.grads[smallest].norm(), 1e-3 * everything)
    errors = run(replace(case, grads={**case.grads, smallest: case.grads[smallest] + bump}))
    assert errors.worst[0] == smallest
    assert errors.worst[1] > case.tolerance.gradient


def test_a_nan_fails(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden("frontier/mixln_pre")
    broken = replace(case, grads={**case.grads, "final_norm.weight": torch.full((32,), torch.nan)})
    monkeypatch.setattr("check_goldens.load", lambda path: broken)
    line = check(FOLDER / "x.json", "x")
    assert line.status == "fail"
    assert "final_norm.weight" in line.reason


TP_NAMES = [
    "fairseq_lm__normformer_all4_relu_squared_padded",
    "fairseq_lm__normformer_post_ln_all4",
    "frontier/gpas_mix",
    "frontier/prores_deeppost",
    "frontier/xt_derf",
    "frontier/xt_qk_norm_dim_scale",
    "hybrid_dense__hybridnorm_layernorm_bias",
    "hybrid_dense__qkvc_post",
    "hybrid_moe_hybridnorm_star",
    "hf/gptj",
    "hf/mbart",
    "hf/t5",
    "torchscale__decoder_subln",
    "torchscale__encdec_deepnorm",
    "torchscale__encdec_subln",
    "torchscale__encoder_deepnorm_relbias_padded",
    "torchscale__encoder_subln_padded",
    "hf/bert_mlm",
    "hf/gemma3",
]

DEEPER = "hybrid_dense__mix_ln"  # 4 layers


def tp_check(rank: int, world: int, folder: str, name: str) -> Line:
    return check(place(Path(folder), name), name, tp=world)


def pp_check(rank: int, world: int, folder: str, names: list[str], tp: int) -> list[Line]:
    return [check(place(Path(folder), name), name, tp=tp, pp=world // tp) for name in names]


def pp_without_ends(rank: int, world: int, folder: str, name: str) -> tuple[float, float]:
    """The two stages of a tied embedding each keep their own gradient of it."""
    case = load(Path(folder) / f"{name}.json")
    mesh = replace(mesh_of(case, 1, world), ends=Axis("ends"))
    errors = run(case, mesh)
    return errors.logits, errors.gradients["embed.token.weight"]


def pp_without_ties(rank: int, world: int, folder: str, name: str) -> tuple[float, float]:
    """The stages of a position bias each keep their own gradient of it."""
    case = load(Path(folder) / f"{name}.json")
    mesh = mesh_of(case, 1, world)
    errors = run(case, replace(mesh, ties={name: Axis(name) for name in mesh.ties}))
    return errors.logits, errors.gradients["relative.weight"]


def tp_without_reduction(rank: int, world: int, folder: str, name: str) -> tuple[float, float]:
    case = load(Path(folder) / f"{name}.json")
    reduce = running.reduce_replicated_grads
    running.reduce_replicated_grads = lambda params, mesh: None
    try:
        errors = run(case, mesh_of(case, world))
    finally:
        running.reduce_replicated_grads = reduce
    return errors.logits, errors.worst[1]


@pytest.mark.parametrize("name", thinned([*TP_NAMES, "hf/mixtral"], 4))
def test_tensor_parallel(shared: Path, ranks: Callable[[int], Any], name: str) -> None:
    for line in ranks(2).run(tp_check, str(FOLDER), name):
        assert line.status == "pass", str(line)


def test_stages(shared: Path, ranks: Callable[[int], Any]) -> None:
    for lines in ranks(2).run(pp_check, str(FOLDER), [*TP_NAMES, DEEPER], 1):
        assert [line.status for line in lines] == ["pass"] * len(lines), "\n".join(map(str, lines))


@pytest.mark.full
def test_stages_of_tensor_parallel_ranks(shared: Path, ranks: Callable[[int], Any]) -> None:
    for lines in ranks(4).run(pp_check, str(FOLDER), [*TP_NAMES, DEEPER], 2):
        assert [line.status for line in lines] == ["pass"] * len(lines), "\n".join(map(str, lines))


def test_more_stages_than_layers_are_not_covered(shared: Path, ranks: Callable[[int], Any]) -> None:
    for deep, shallow in ranks(4).run(pp_check, str(FOLDER), [DEEPER, "hybrid_dense__hybridnorm"], 1):
        assert deep.status == "pass", str(deep)
        assert (shallow.status, shallow.reason) == ("not covered", "pp 4 asks for a layer each, of 2")


def test_a_tied_gradient_of_one_end_fails(shared: Path, ranks: Callable[[int], Any]) -> None:
    for logits, gradient in ranks(2).run(pp_without_ends, str(FOLDER), "hybrid_dense__hybridnorm"):
        assert logits < 1e-10
        assert gradient > 1e-3


def test_a_position_bias_of_one_stage_fails(shared: Path, ranks: Callable[[int], Any]) -> None:
    for logits, gradient in ranks(2).run(pp_without_ties, str(FOLDER), "torchscale__encoder_deepnorm_relbias_padded"):
        assert logits < 1e-10
        assert gradient > 1e-3


@pytest.mark.full
def test_replicated_key_value_heads(shared: Path, ranks: Callable[[int], Any]) -> None:
    lines = ranks(4).run(tp_check, str(FOLDER), "hybrid_dense__hybridnorm_layernorm_bias")
    assert {line.status for line in lines} == {"pass"}
    lines = ranks(4).run(tp_check, str(FOLDER), "frontier/mixln_pre")
    assert {(line.status, line.reason) for line in lines} == {("not covered", "tp 4 does not divide heads 2")}


def test_partial_gradients_fail(shared: Path, ranks: Callable[[int], Any]) -> None:
    """The tool sees it when gradients of replicated parameters are not summed over the group."""
    for logits, gradient in ranks(2).run(tp_without_reduction, str(FOLDER), "hybrid_dense__hybridnorm"):
        assert logits < 1e-10
        assert gradient > 1e-3


def test_norm_config_is_a_value(shared: Path) -> None:
    assert golden("hybrid_dense__hybridnorm").model.norm == NormConfig("hybridnorm", bias=False)
