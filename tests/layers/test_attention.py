"""Attention scores against loops over tokens; rotary tables against transformers; packed documents; what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megnorm.config import RunConfig
from megnorm.kernels import registry
from megnorm.kernels.registry import Need, Scores
from megnorm.kernels.torch_ref import make_attention
from megnorm.layers.rope import alibi_slopes, rope_table
from megnorm.models.causal import build_model
from megnorm.models.config import AttentionConfig, ModelConfig, RopeScaling
from megnorm.models.count import count_parameters
from megnorm.norms.resolve import resolve
from megnorm.parallel.layout import named_matrices
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from tests.hf.tiny import SCALINGS

SCORES = [
    Scores(),
    Scores(scale=0.3),
    Scores(softcap=1.5),
    Scores(window=3),
    Scores(window=99),
    Scores(alibi=alibi_slopes(6)),
    Scores(0.7, 2.0, 4, alibi_slopes(6)),
]


def by_hand(q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Tensor | None = None) -> Tensor:
    """One score at a time: q [s, b, h, hd], k, v [s, b, kv, hd]; mask [b, 1, s, s]."""
    s, b, h, hd = q.shape
    out = torch.zeros_like(q)
    for row, head, i in ((row, head, i) for row in range(b) for head in range(h) for i in range(s)):
        group = head // (h // k.shape[2])
        seen, values = [], []
        for j in range(i + 1):
            if scores.window is not None and i - j >= scores.window or mask is not None and not mask[row, 0, i, j]:
                continue
            z = float(q[i, row, head] @ k[j, row, group]) * (hd**-0.5 if scores.scale is None else scores.scale)
            z = z if scores.softcap is None else scores.softcap * math.tanh(z / scores.softcap)
            seen.append(z - (scores.alibi[head] * (i - j) if scores.alibi else 0.0))
            values.append(v[j, row, group])
        if not seen:  # padding far behind the last token: nobody reads it
            continue
        out[i, row, head] = torch.tensor(seen, dtype=q.dtype).softmax(0) @ torch.stack(values)
    return out


def projections(s: int = 9, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(s, b, n, 4, generator=generator, dtype=torch.float64) for n in (6, 2, 2))
    return 2 * q, k, v


def attend(
    scores: Scores,
    *qkv: Tensor,
    mask: Tensor | None = None,
    documents: Any = None,
    causal: bool = True,
    bias: Any = None,
) -> Tensor:
    fn = make_attention(Need("attention", "cpu", torch.float64, head_dim=4, scores=scores))
    return fn(*qkv, mask=mask, documents=documents, dropout=0.0, causal=causal, bias=bias)


@pytest.mark.parametrize("scores", SCORES)
def test_scores_are_the_formula(scores: Scores) -> None:
    qkv = projections()
    assert (attend(scores, *qkv) - by_hand(*qkv, scores)).abs().max() < 1e-12


@pytest.mark.parametrize("scores", SCORES)
def test_scores_with_padding_are_the_formula(scores: Scores) -> None:
    """Padding at the end, and in the middle; a token that sees nothing sees itself, so nothing is NaN."""
    qkv = projections()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 7:] = real[1, 2:7] = False
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = mask | (~mask.any(-1, keepdim=True) & torch.eye(9, dtype=torch.bool))
    ours = attend(scores, *qkv, mask=mask)
    assert ours.isfinite().all()
    where = real.t()
    assert (ours[where] - by_hand(*qkv, scores, mask)[where]).abs().max() < 1e-12


@pytest.mark.parametrize("scores", SCORES)
def test_documents_are_apart(scores: Scores) -> None:
    q, k, v = projections(b=1)
    packed = attend(scores, q, k, v, documents=(2, 6, 1))
    parts = [attend(scores, *(x[first:last] for x in (q, k, v))) for first, last in ((0, 2), (2, 8), (8, 9))]
    assert torch.equal(packed, torch.cat(parts))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_is_added_to_what_else_scores_have(scores: Scores, masked: bool) -> None:
    """Linear biases are one: given by hand they do the same, and twice as much beside themselves."""
    qkv, slopes, place = projections(), torch.tensor(alibi_slopes(6), dtype=torch.float64), torch.arange(9.0).double()
    bias = (slopes[:, None, None] * (place - place[:, None]))[None]
    mask = torch.ones(9, 9, dtype=torch.bool).tril().index_fill(1, torch.tensor([2]), False) if masked else None
    mask = None if mask is None else (mask | torch.eye(9, dtype=torch.bool)).expand(2, 1, 9, 9)
    wanted = replace(
        scores, alibi=tuple(x + y for x, y in zip(scores.alibi or (0.0,) * 6, slopes.tolist(), strict=True))
    )
    assert (attend(scores, *qkv, mask=mask, bias=bias) - attend(wanted, *qkv, mask=mask)).abs().max() < 1e-12
    assert (attend(scores, *qkv, mask=mask) - attend(wanted, *qkv, mask=mask)).abs().max() > 1e-3


def test_scores_that_are_not_causal() -> None:
    """Queries of one sequence, keys and values of another; a window and linear biases look back alone."""
    (q, k, v), scores = projections(), Scores(0.7, 2.0)
    k, v = (x[:5] for x in (k, v))
    z = torch.einsum("ibhd,jbhd->bhij", q, k.repeat_interleave(3, 2))
    weights = (2.0 * torch.tanh(0.35 * z)).softmax(-1)
    wanted = torch.einsum("bhij,jbhd->ibhd", weights, v.repeat_interleave(3, 2))
    assert (attend(scores, q, k, v, causal=False) - wanted).abs().max() < 1e-12
    for lacking in (Scores(window=3), Scores(alibi=alibi_slopes(6))):
        with pytest.raises(ValueError, match="'attention'.*torch: looks back alone.*model.attention.window"):
            registry.choose(Need("attention", "cpu", torch.float32, causal=False, scores=lacking), {})
    with pytest.raises(ValueError, match="no bias to scores of packed documents"):
        registry.choose(Need("attention", "cpu", torch.float32, biased=True, packed=True), {})


@pytest.mark.parametrize("scores", SCORES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_near(scores: Scores, dtype: torch.dtype) -> None:
    qkv = projections()
    fn = make_attention(Need("attention", "cpu", dtype, head_dim=4, scores=scores))
    ours = fn(*(x.to(dtype) for x in qkv), mask=None, documents=None, dropout=0.0)
    assert ours.dtype == dtype
    assert (ours.double() - by_hand(*qkv, scores)).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("length", "kind"), [(5, torch.float32), (512, torch.bfloat16)])
def test_short_sequences_are_computed_in_fp32_on_a_cpu(length: int, kind: torch.dtype) -> None:
    """Below 512 keys the output is fp32's, rounded once; from there on it is PyTorch's own in bf16."""
    qkv = [x.bfloat16() for x in projections(length)]
    ours = make_attention(Need("attention", "cpu", torch.bfloat16, head_dim=4))(
        *qkv, mask=None, documents=None, dropout=0.0
    )
    q, k, v = (x.to(kind).permute(1, 2, 0, 3) for x in qkv)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).bfloat16().permute(2, 0, 1, 3)
    assert torch.equal(ours, wanted)


def test_gradients_and_dropout_of_capped_scores() -> None:
    qkv = [x.requires_grad_() for x in projections(5)]
    scores = Scores(0.7, 2.0, 3, alibi_slopes(6))
    assert torch.autograd.gradcheck(lambda *x: attend(scores, *x), qkv)
    fn = make_attention(Need("attention", "cpu", torch.float64, head_dim=4, dropout=True, scores=scores))
    torch.manual_seed(0)
    outs = torch.stack([fn(*qkv, mask=None, documents=None, dropout=0.3).detach() for _ in range(500)])
    assert (outs.mean(0) - attend(scores, *qkv)).abs().max() < 0.3
    assert outs.std(0)[1:].min() > 0.0


@pytest.fixture
def ignorant(monkeypatch: pytest.MonkeyPatch) -> str:
    """A better offer for attention that has no feature and says nothing about it."""
    monkeypatch.setattr(registry, "_offers", list(registry._offers))
    monkeypatch.setattr(registry, "_choices", {})
    registry.offer("attention", "ignorant", 99, lambda need: None)(lambda need: "ignorant")
    return "ignorant"


@pytest.mark.parametrize("scores", SCORES)
def test_a_kernel_that_does_not_name_a_feature_does_not_get_it(scores: Scores, ignorant: str) -> None:
    need = Need("attention", "cpu", torch.float32, scores=scores)
    assert (registry.choose(need, {}).backend == ignorant) is (scores == Scores())
    if scores != Scores():
        with pytest.raises(ValueError, match=r"'ignorant' refuses \(ignorant: has no .*\(model\."):
            registry.choose(need, {"attention": ignorant})


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [12, 40])
def test_scaled_rotary_tables_are_those_of_transformers(scaling: RopeScaling, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from megnorm.hf.families.rope import longest, rope_parameters

    model = ModelConfig(head_dim=32, rope_theta=500.0, rope_scaling=scaling, max_positions=64)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=longest(model),
            rope_parameters=rope_parameters(model),
        )
    )  # fmt: skip
    where = torch.arange(length)
    cos, sin = theirs(torch.zeros(1), where[None])
    ours = rope_table(where, 32, 500.0, torch.float32, scaling, 64)
    for mine, other in zip(ours, (cos, sin), strict=True):
        assert (mine.flatten(1) - other[0, :, :16]).abs().max() < 1e-5
    plain = rope_table(where, 32, 500.0, torch.float32)
    changed = (ours[0] - plain[0]).abs().max() > 1e-3
    assert changed == (scaling.kind != "dynamic" or length > 16)


def test_the_slopes_are_the_papers() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(3) == (2.0**-4, 2.0**-8, 2.0**-2)


def test_windows_by_layer() -> None:
    attention = AttentionConfig(window=4, window_layers=("window", "window", "full"))
    assert [attention.window_of(i) for i in range(7)] == [4, 4, None, 4, 4, None, 4]
    assert [AttentionConfig(window=4).window_of(i) for i in range(2)] == [4, 4]
    assert AttentionConfig().window_of(0) is None


@pytest.mark.parametrize("biases", [(True, None, None), (False, True, None), (True, False, None), (False, None, True)])
def test_biases_are_where_they_are_asked_and_counted(biases: tuple[bool, bool | None, bool | None]) -> None:
    everywhere, qkv, o = biases
    model = ModelConfig(
        layers=1, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=64, bias=everywhere, qkv_bias=qkv, o_bias=o
    )
    held = [named for named in named_matrices(build_model(model)) if named.matrix.role == "bias"]
    found = {".".join(named.name.split(".")[2:4]) for named in held}
    asked = {"attention.q", "attention.k", "attention.v"} if (everywhere if qkv is None else qkv) else set()
    asked |= {"attention.o"} if (everywhere if o is None else o) else set()
    assert found == asked | ({"ffn.up", "ffn.gate", "ffn.down"} if everywhere else set())
    counted = count_parameters(model, resolve(model.norm, 1)).get("bias", 0)
    assert counted == sum(named.view().numel() for named in held)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(softcap=0.0), "model.attention.softcap is 0.0"),
        (lambda: AttentionConfig(window=0), "model.attention.window is 0"),
        (lambda: AttentionConfig(window_layers=("full", "window")), "model.attention.window is missing"),
        (lambda: AttentionConfig(window=3, window_layers=("full",)), "names no layer 'window'"),
        (lambda: AttentionConfig(window_rope_theta=9.0), "model.attention.window is missing"),
        (lambda: RopeScaling("linear", 0.5), "model.rope_scaling.factor is 0.5"),
        (lambda: RopeScaling(factor=2.0), "set its kind"),
        (lambda: RopeScaling("llama3", 2.0, high_freq=1.0), "model.rope_scaling.high_freq=1.0"),
        (lambda: ModelConfig(positions="learned", rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling.kind=linear"),
        (lambda: ModelConfig(positions="alibi", rope_fraction=0.5), "model.rope_fraction=0.5 is for rotary positions"),
        (lambda: ModelConfig(head_dim=8, rope_fraction=0.4), "model.rope_fraction=0.4 of head_dim=8 is 3 features"),
        (lambda: ModelConfig(head_dim=8, rope_fraction=1.5), "it must be an even number from 2 to 8"),
        (lambda: ModelConfig(positions="alibi", padding_id=1), "positions=alibi counts padding"),
        (lambda: ModelConfig(logit_softcap=0.0), "model.logit_softcap is 0.0"),
        (lambda: ModelConfig(head_dim=2, rope_scaling=RopeScaling("dynamic", 2.0)), "head_dim of 4 or more"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_alibi_cannot_restart_within_a_row() -> None:
    config = RunConfig(model=ModelConfig(positions="alibi"))
    make_plan(replace(config, data=replace(config.data, separate_documents=True, reset_positions=True)), 1)
    with pytest.raises(PlanError, match="data.reset_positions does not reset the distances"):
        make_plan(replace(config, data=replace(config.data, reset_positions=True)), 1)
