"""Encoders and encoder-decoders: stages are slices of the whole, what they share is one parameter, and who sees what."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megnorm.layers.env import Env
from megnorm.layers.init import law_of
from megnorm.layers.recompute import Recompute
from megnorm.layers.relative import buckets_of
from megnorm.metrics.throughput import flops_per_token
from megnorm.models.build import Input, build_model
from megnorm.models.config import ModelConfig
from megnorm.models.count import count_parameters
from megnorm.models.encdec import Pairs
from megnorm.models.family import resolve_model, ties, unit_costs
from megnorm.models.masked import MaskedTokens
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import from_json
from megnorm.parallel.layout import named_matrices, share_copies
from tests.marks import thinned

BASE = ModelConfig(
    layers=3, width=32, heads=4, kv_heads=2, ffn=48, vocab_size=97, max_positions=16, activation="gelu",
    positions="learned", bias=True, relative_buckets=8, label_smoothing=0.1, dropout=0.1, attention_dropout=0.1,
    norm=NormConfig("hybridnorm_star"),
)  # fmt: skip
MODELS = {
    "tied encoder": replace(BASE, family="masked", tied_head=True, segments=2, head_transform=True),
    "encoder": replace(BASE, family="masked"),
    "classifier": replace(BASE, family="classifier", classes=5, segments=2),
    "regression": replace(BASE, family="classifier", classes=1, pooler=False),
    "three-way": replace(BASE, family="encdec", encoder_layers=2, shared_embedding=True, tied_head=True),
    "shared": replace(BASE, family="encdec", encoder_layers=2, shared_embedding=True),
    "tied": replace(BASE, family="encdec", encoder_layers=2, tied_head=True),
    "apart": replace(BASE, family="encdec", encoder_layers=2, max_source_positions=20),
}


def batch_of(cfg: ModelConfig, seed: int = 0) -> Input:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, rows: torch.randint(0, high, (rows, 2), generator=generator)  # noqa: E731
    tokens, source, mask = draw(97, 8), draw(97, 12), draw(2, 8).double()
    real = torch.ones(12, 2, dtype=torch.bool)
    real[-3:, 1] = False
    if cfg.family == "masked":
        return MaskedTokens(tokens, tokens, mask, real=real[4:], segments=draw(2, 8))
    if cfg.family == "classifier":
        return MaskedTokens(
            tokens, torch.tensor([0, cfg.classes - 1]), torch.ones(2), real=real[4:], segments=draw(2, 8)
        )
    return Pairs(source, real, tokens, tokens.roll(-1), mask)


def grads(models: list[Any]) -> dict[str, Tensor]:
    """By name, summed over the stages that hold a copy."""
    found: dict[str, Tensor] = {}
    for n in (n for model in models for n in named_matrices(model)):
        grad = n.view(n.param.grad)
        found[n.name] = found[n.name] + grad if n.name in found else grad.clone()
    return found


def double(**rest: Any) -> Env:
    return Env(dtype=torch.float64, **rest)


@pytest.mark.parametrize("name", thinned(MODELS, 3))
def test_stages_in_a_row_are_the_model(name: str) -> None:
    """Loss and gradients, dropout included; every tensor has one owner, and the edges are as announced."""
    cfg = MODELS[name]
    total, batch = cfg.layers + cfg.source_layers, batch_of(cfg)
    whole: Any = build_model(cfg, double())
    loss = whole(batch)
    loss.backward()
    expected = grads([whole])
    for cuts in ([0, 1, total], [0, 2, total], [*range(total + 1)]):
        for one in (False, True):
            stages: list[Any] = [build_model(cfg, double(), layers=layers) for layers in itertools.pairwise(cuts)]
            owners = Counter(n.name for stage in stages for n in named_matrices(stage) if n.matrix.owner)
            assert set(owners.values()) == {1} and set(owners) == set(expected)
            if one:
                share_copies(stages)
            x: Tensor | None = None
            for stage, before in zip(stages, [None, *stages], strict=False):
                if x is not None and before is not None:
                    assert tuple(x.shape) == stage.edge(batch, into=True)[0] == before.edge(batch, into=False)[0]
                x = stage(batch, x)
            assert x is not None
            x.backward()
            assert torch.allclose(x, loss, rtol=1e-12)
            found = {n.name: n.view(n.param.grad) for s in stages for n in named_matrices(s)} if one else grads(stages)
            for key, grad in expected.items():
                torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-10 * float(grad.norm()))


@pytest.mark.parametrize("name", thinned(MODELS, 3))
@pytest.mark.parametrize("modes", [("block",), ("attention", "norms", "activations", "projections")])
def test_recompute_changes_no_bit(name: str, modes: tuple[str, ...]) -> None:
    cfg = MODELS[name]
    batch, models = batch_of(cfg), [build_model(cfg, double(recompute=Recompute(chosen))) for chosen in ((), modes)]
    losses = [model(batch) for model in models]
    for loss in losses:
        loss.backward()
    plain, again = (grads([model]) for model in models)
    assert torch.equal(*losses) and all(torch.equal(again[key], grad) for key, grad in plain.items())


@pytest.mark.parametrize("scheme", thinned(registry.names(), 4))
def test_parameters_are_counted(scheme: str) -> None:
    for cfg in (replace(m, norm=NormConfig(scheme, kind="layernorm")) for m in MODELS.values()):
        counted = Counter[str]()
        for n in named_matrices(build_model(cfg)):
            counted[n.matrix.role] += n.view().numel()
        assert count_parameters(cfg, resolve_model(cfg)) == counted
        assert sum(unit_costs(cfg, 8)) == flops_per_token(cfg, 8)


def test_who_sees_what() -> None:
    """An encoder's token sees both sides; padding is seen by none; a decoder's token sees the source and its left."""
    for name in ("encoder", "apart"):
        cfg = replace(MODELS[name], dropout=0.0, attention_dropout=0.0)
        model: Any = build_model(cfg, double()).eval()
        batch = batch_of(cfg)
        real = batch.real  # type: ignore[union-attr]
        key = "tokens" if cfg.family == "masked" else "source"
        plain = model.logits(batch)
        hidden = replace(batch, **{key: torch.where(real, getattr(batch, key), 5)})
        assert torch.equal(plain, model.logits(hidden))
        last = getattr(batch, key).clone()
        last[4, 0] += 1 if last[4, 0] < 96 else -1
        changed = (model.logits(replace(batch, **{key: last})) != plain).any(-1)
        assert changed[:, 0].all() and not changed[:, 1].any()
    tokens = batch.tokens.clone()
    tokens[4, 0] = (tokens[4, 0] + 1) % 97
    changed = (model.logits(replace(batch, tokens=tokens)) != plain).any(-1)
    assert changed[:, 0].tolist() == [False] * 4 + [True] * 4 and not changed[:, 1].any()


@pytest.mark.parametrize("name", ["encoder", "apart"])
def test_padding_is_as_if_it_were_not_there(name: str) -> None:
    """For the encoder itself, and for a decoder that reads what it made of the padding."""
    model: Any = build_model(MODELS[name], double()).eval()
    batch: Any = batch_of(MODELS[name])
    key = "tokens" if name == "encoder" else "source"
    length = int(batch.real[:, 1].sum())
    assert batch.real[:length, 1].all() and length < len(batch.real)
    cut = {key: getattr(batch, key)[:length], "real": None}
    if name == "encoder":
        cut["segments"] = batch.segments[:length]
    plain, short = model.logits(batch)[:, 1], model.logits(replace(batch, **cut))[:, 1]
    torch.testing.assert_close(plain[: len(short)], short, rtol=1e-9, atol=1e-10)


def test_smoothing_is_torchs_and_of_training_alone() -> None:
    cfg = replace(MODELS["apart"], dropout=0.0, attention_dropout=0.0)
    model: Any = build_model(cfg, double())
    batch: Any = batch_of(cfg)
    z = model.logits(batch).flatten(0, 1)
    for smoothing, mode in ((0.1, True), (0.0, False)):
        model.train(mode)
        each = torch.nn.functional.cross_entropy(z, batch.labels.flatten(), reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(model(batch).detach(), (each * batch.loss_mask.flatten()).sum())


def test_relative_buckets() -> None:
    """By hand, from the T5 paper's rule: of 8 buckets two are exact on each side, the rest grow up to 16."""
    distance = torch.tensor([-40, -16, -5, -2, -1, 0, 1, 2, 5, 16, 40])
    assert buckets_of(distance, 8, 16, True).tolist() == [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7]
    assert buckets_of(distance, 8, 16, False).tolist() == [7, 7, 4, 2, 1, 0, 0, 0, 0, 0, 0]


def test_a_scheme_may_have_cross_attention_of_its_own() -> None:
    cfg = replace(MODELS["apart"], norm=NormConfig("subln"))
    names = {n.name for n in named_matrices(build_model(cfg))}
    assert "decoder.blocks.0.attention.context_norm.weight" in names
    assert "decoder.blocks.0.cross_attention.input_norm.weight" in names
    assert "decoder.blocks.0.cross_attention.context_norm.weight" not in names
    patched = replace(cfg, norm=NormConfig("subln", patch={"layer": {"cross_attention": {"q": {"over": "head"}}}}))
    assert "decoder.blocks.1.cross_attention.q_norm.weight" in {n.name for n in named_matrices(build_model(patched))}


def test_shared_factors_are_one_parameter_in_all_three_sub_layers() -> None:
    model: Any = build_model(replace(MODELS["apart"], norm=NormConfig("rezero")), double())
    block = model.decoder.blocks["0"]
    assert block.attention.residual.branch is block.cross_attention.residual.branch is block.ffn.residual.branch


def test_ties() -> None:
    """By hand: an encoder of 2 and a decoder of 3 layers, over three stages and over four of two ranks."""
    three, four = ((0, 2), (2, 4), (4, 5)), ((0, 1), (1, 2), (2, 4), (4, 5))
    bias = {"encoder.relative": (0,), "decoder.relative": (1, 2)}
    assert ties(MODELS["three-way"], three, 3) == {"embed": (0, 1, 2), **bias}
    assert ties(MODELS["shared"], three, 3) == {"embed": (0, 1), **bias}
    assert ties(MODELS["tied"], three, 3) == {"embed": (1, 2), **bias}
    assert ties(MODELS["apart"], three, 3) == bias
    assert ties(MODELS["shared"], four, 2)["embed"] == (0,)
    assert ties(MODELS["tied"], four, 2)["embed"] == (0, 1)
    assert ties(MODELS["encoder"], ((0, 1), (1, 3)), 2) == {"relative": (0, 1)}


def test_initial_weights_by_stack() -> None:
    """DeepNorm's beta by the paper's table, for 6 and 4 layers; Sub-LN leaves cross-attention alone."""
    cfg = replace(MODELS["apart"], encoder_layers=6, layers=4, norm=NormConfig("deepnorm"))
    xavier = (2.0 / 64) ** 0.5

    def std(name: str, model: ModelConfig) -> float:
        law = law_of(f"{name}.weight", name.rpartition(".")[2], (32, 32), model, resolve_model(model))
        assert law is not None and law[0] == "xavier_normal"
        return law[1] / xavier

    encoder, decoder = 0.87 * (6**4 * 4) ** (-1 / 16), (12 * 4) ** -0.25
    assert std("encoder.blocks.5.attention.v", cfg) == pytest.approx(encoder)
    assert std("encoder.blocks.0.ffn.up", cfg) == pytest.approx(encoder)
    assert std("decoder.blocks.3.cross_attention.o", cfg) == pytest.approx(decoder)
    assert std("decoder.blocks.0.ffn.down", cfg) == pytest.approx(decoder)
    assert std("encoder.blocks.0.attention.q", cfg) == std("decoder.blocks.0.cross_attention.k", cfg) == 1.0
    other = replace(cfg, norm=NormConfig("subln"))
    assert std("decoder.blocks.0.attention.v", other) == pytest.approx(math.log(12) ** 0.5)
    assert std("decoder.blocks.0.cross_attention.v", other) == 1.0


def test_the_resolved_scheme_of_two_stacks_survives_json() -> None:
    resolved = resolve_model(MODELS["apart"])
    assert resolved.encoder is not None and len(resolved.encoder.layers) == 2 and len(resolved.layers) == 3
    assert from_json(json.loads(json.dumps(resolved.to_json()))) == resolved
    assert "encoder" not in resolve_model(MODELS["encoder"]).to_json()


@pytest.mark.parametrize("name", ["tied encoder", "encoder"])
def test_the_head_reads_masked_tokens_alone(name: str) -> None:
    """The loss is that of all tokens' logits under the mask; without a masked token it is 0, and so is every gradient."""
    cfg = replace(MODELS[name], dropout=0.0, attention_dropout=0.0, label_smoothing=0.0)
    model: Any = build_model(cfg, double())
    batch = batch_of(cfg)
    assert isinstance(batch, MaskedTokens)
    rows: list[int] = []
    weight = model.head.weight
    model.head.token_loss, told = lambda z, *rest: rows.append(len(z)) or told(z, *rest), model.head.token_loss
    loss = model(batch)
    logits = model.logits(batch)
    each = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), batch.labels, reduction="none")
    torch.testing.assert_close(loss.detach(), (each * batch.loss_mask).sum(), rtol=1e-12, atol=0.0)
    assert rows == [int(batch.loss_mask.sum())] and 0 < rows[0] < batch.tokens.numel()
    nothing = model(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    nothing.backward()
    assert float(nothing.detach()) == 0.0 and weight.grad is not None
    assert not any(float(param.grad.abs().max()) for param in model.parameters() if param.grad is not None)
