"""The model that megnorm builds for a scheme, against the scheme's equations: logits, loss and every gradient."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megnorm.layers.env import Env
from megnorm.models.causal import Tokens, build_model
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.norms import registry
from megnorm.norms.config import NormConfig
from megnorm.parallel.layout import named_matrices
from tests.marks import thinned
from tests.reference.equations import BLOCKS, reference_forward
from tests.reference.model import Model

SHIPPED = [name for name in registry.names() if registry.options(name) is not None]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("preln", {"embedding_norm": True}),
    ("postln", {"embedding_norm": True, "final_norm": True}),
    ("nonorm", {"final_norm": True}),
    ("normformer", {"head_scale": "post_projection", "residual_scale": True}),
    ("normformer", {"head_scale": None, "attention_norm": False}),
    ("normformer", {"ffn_norm": False}),
    ("normformer", {"placement": "post", "residual_scale": True, "head_scale": "post_projection"}),
    ("deepnorm", {"placement": "pre"}),
    ("deepnorm", {"skip": 1.7, "embedding_norm": True, "scale_gate": False}),
    ("deepnorm_llama", {"skip": 2.8284271247461903}),
    ("hybridnorm", {"embedding_norm": True}),
    ("periln", {"embedding_norm": True, "qk_norm": True, "output_gain": 0.1}),
    ("olmo2", {"qk_norm": False}),
    ("qknorm", {"over": "width"}),
    ("qknorm", {"gain": "per_head"}),
    ("qknorm_l2", {"learned": "scalar", "logit_scale": 5.0}),
    ("qknorm_l2", {"learned": "per_head"}),
    ("valuenorm", {"gain": "per_head"}),
    ("mixln", {"post_layers": 2}),
    ("mixln", {"fraction": 1.0}),
    ("admin", {"growth": "1"}),
    ("admin", {"growth": "n"}),
    ("admin", {"learned": True}),
    ("keel", {"exceptions": False}),
    ("keel", {"skip": 3.0, "final_norm": True}),
    ("rezero", {"final_norm": True}),
    ("skipinit", {"norms": False}),
    ("gpas", {"shared": False}),
    ("prores", {"host": "deepnorm_llama", "steps": 300}),
    ("branchnorm", {"steps": 600}),
    ("resi_dual", {"scale": 0.05}),
    ("hyper_connections", {"streams": 3}),
    ("mhc", {"streams": 2, "rounds": 3}),
    ("mhc", {"exit": "mean"}),
    ("gpas", {"host": "postln"}),
    ("gpas", {"host": "deepnorm_llama", "shared": False}),
]
STEP = 700  # for factors that grow
KINDS: list[dict[str, Any]] = [
    {"kind": "layernorm"},
    {"kind": "layernorm", "bias": False},
    {"kind": "rmsnorm", "gain": "one_plus", "cast": "after_gain"},
    {"kind": "rmsnorm", "gain": "none"},
    {"kind": "rmsnorm", "gain": "scalar"},
    {"kind": "rmsnorm", "bias": True, "eps": 0.05},
    {"kind": "l2"},
    {"kind": "l2", "gain": "none"},
    {"kind": "scalenorm"},
    {"kind": "dyt"},
    {"kind": "derf"},
    {"kind": "seednorm"},
]


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere, gains and scales included, so that no default value hides an error."""
    generator = torch.Generator().manual_seed(7)
    for named in named_matrices(model):
        view = named.view()
        noise = torch.rand(view.shape, generator=generator, dtype=torch.float64)
        if view.dim() == 2 and named.matrix.role not in ("norm", "scale"):
            view.copy_((noise - 0.5) * 2.0 * (3.0 / view.shape[1]) ** 0.5)
        else:
            view.copy_(0.4 + 1.2 * noise)


def compare(norm: NormConfig, layers: int = 5, moe: dict[str, Any] | None = None, **changes: Any) -> None:
    sizes = {"layers": layers, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 40, "vocab_size": 50}
    cfg = ModelConfig(**(sizes | changes), norm=norm, moe=MoEConfig(**(moe or {})))
    env = Env(dtype=torch.float64)
    env.rng.begin(0, STEP, 0, 0, 0)
    model = build_model(cfg, env, vocab_multiple=1)
    randomize(model)
    tokens = torch.randint(cfg.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))
    labels = tokens.roll(-1, 1)
    given = model(Tokens(tokens.t(), labels.t(), torch.ones(7, 2, dtype=torch.float64)))
    loss = sum(given) if isinstance(given, tuple) else given
    loss.backward()

    weights = {named.name: named.view().clone().requires_grad_() for named in named_matrices(model)}
    judge = Model(
        weights,
        layers=cfg.layers,
        heads=cfg.heads,
        kv_heads=cfg.kv,
        head_dim=cfg.hd,
        activation=cfg.activation,
        kind=norm.kind,
        eps=norm.eps,
        one_plus=norm.gain == "one_plus",
        moe=moe,
        step=STEP,
    )
    logits = reference_forward(norm.scheme, judge, tokens, **norm.options)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") + judge.extra
    expected.backward()

    idle = {name for name in set(weights) - judge.used if ".experts." in name}  # nobody chose them
    assert judge.used | idle == set(weights), "parameters that the equations do not know, or the model does not have"
    assert moe is None or len(idle) < len([name for name in weights if ".experts." in name])
    torch.testing.assert_close(model.logits(tokens.t()).transpose(0, 1), logits.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=0.0)
    grads = {name: torch.zeros_like(weight) if name in idle else weight.grad for name, weight in weights.items()}
    total = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    for named in named_matrices(model):
        wanted = grads[named.name]
        got = named.view(named.param.grad)
        error = float((got - wanted).norm()) / max(float(wanted.norm()), 1e-3 * total)
        assert error < 1e-6, f"gradient of {named.name}: relative error {error:.1e}"


def test_every_scheme_has_its_equations() -> None:
    assert set(SHIPPED) <= set(BLOCKS), "write the paper's equations in tests/reference/equations.py"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_scheme_is_its_equations(name: str) -> None:
    compare(NormConfig(name))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_scheme_holds_at_depth_one(name: str) -> None:
    compare(NormConfig(name), layers=1)


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[re.sub(r"[{}': ]+", "-", f"{name}{options}") for name, options in OPTIONS]
)
def test_options_are_their_equations(name: str, options: dict[str, Any]) -> None:
    compare(NormConfig(name, options), layers=4)


@pytest.mark.parametrize("kind", KINDS, ids=["-".join(map(str, kind.values())) for kind in KINDS])
@pytest.mark.parametrize("name", thinned(["preln", "deepnorm", "normformer", "hybridnorm", "subln", "olmo2"], 3))
def test_norm_kinds_are_their_equations(name: str, kind: dict[str, Any]) -> None:
    compare(NormConfig(name, eps=kind.get("eps", 1e-5), **{k: v for k, v in kind.items() if k != "eps"}), layers=2)


def test_a_constant_share_is_that_number() -> None:
    """The same loss as with a learned one that stands at it."""
    sizes = {"layers": 2, "width": 32, "heads": 4, "ffn": 40, "vocab_size": 50}
    tokens = torch.randint(50, (7, 2), generator=torch.Generator().manual_seed(3))
    losses = []
    for share in ({"value": 0.5}, {"value": 0.5, "learned": None}, {"value": 1.0}):
        norm = NormConfig("siamese_hybrid", patch={"layer": {"attention": {"second": {"share": share}}}})
        model = build_model(ModelConfig(**sizes, norm=norm), Env(dtype=torch.float64), vocab_multiple=1)  # type: ignore[arg-type]
        loss = model(Tokens(tokens, tokens.roll(-1, 0), torch.ones(7, 2, dtype=torch.float64)))
        assert isinstance(loss, torch.Tensor)
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0] != pytest.approx(losses[2], rel=1e-9)


def test_layernorm_with_biases_everywhere() -> None:
    compare(NormConfig("normformer", kind="layernorm"), layers=2, bias=True, activation="gelu", tied_head=True)


EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {"experts": 4, "top_k": 2, "ffn": 12},
    "capacity": {"experts": 4, "top_k": 2, "ffn": 12, "capacity": 0.6, "balance_loss": 0.3},
    "sigmoid": {
        "experts": 3, "top_k": 2, "ffn": 12, "score": "sigmoid", "normalize": True, "scale": 1.7, "shared_ffn": 8,
        "balance_loss": 0.2, "z_loss": 0.1,
    },
    "every other layer": {"experts": 4, "top_k": 1, "first": 1, "every": 2, "z_loss": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("moe", EXPERTS)
@pytest.mark.parametrize(
    "name", thinned(["preln", "postln", "deepnorm", "normformer", "hybridnorm_star", "sandwich"], 3)
)
def test_schemes_of_experts_are_their_equations(name: str, moe: str) -> None:
    """Tokens that no expert takes included: their branch is 0, and the scheme's equation holds."""
    compare(NormConfig(name, kind="layernorm" if moe == "capacity" else "rmsnorm"), layers=3, moe=EXPERTS[moe])


def test_experts_with_biases() -> None:
    compare(NormConfig("normformer"), layers=2, moe=EXPERTS["capacity"], bias=True, activation="gelu")


def test_the_comparison_bites() -> None:
    """A wrong constant is seen: DeepNorm's layers against the equations with another skip."""
    with pytest.raises(AssertionError):
        compare_wrong()


def compare_wrong() -> None:
    cfg = ModelConfig(layers=2, width=32, heads=4, ffn=40, vocab_size=50, norm=NormConfig("deepnorm"))
    env = Env(dtype=torch.float64)
    env.rng.begin(0, STEP, 0, 0, 0)
    model = build_model(cfg, env, vocab_multiple=1)
    randomize(model)
    tokens = torch.arange(14).view(2, 7)
    weights = {named.name: named.view() for named in named_matrices(model)}
    judge = Model(weights, layers=2, heads=4, kv_heads=4, head_dim=8)
    logits = reference_forward("deepnorm", judge, tokens, skip=1.001 * 4**0.25)
    torch.testing.assert_close(model.logits(tokens.t()).transpose(0, 1), logits, rtol=1e-9, atol=1e-10)
