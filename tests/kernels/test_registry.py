"""Offers, refusals, one choice; and that layers which join operations mean what they meant."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megnorm.config import load
from megnorm.kernels import backends, check, registry
from megnorm.kernels.config import KernelConfig
from megnorm.kernels.registry import Need, NormForm, Offer
from megnorm.layers import loss
from megnorm.layers.env import Env
from megnorm.layers.recompute import Recompute
from megnorm.models.causal import CausalLM, Tokens, build_model
from megnorm.models.config import ModelConfig
from megnorm.norms import registry as schemes
from megnorm.norms.config import NormConfig
from megnorm.parallel.mesh import Mesh
from megnorm.plan import make_plan
from megnorm.refuse import PlanError
from tests.kernels.needs import needs
from tests.kernels.serving import asked_of_cuda

assert backends.REFERENCE and loss.make_cross_entropy
NORM = Need("norm", "cpu", torch.float32, norms=(NormForm("rmsnorm", 8),))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Offer]:
    """Makes an offer for the time of a test."""
    monkeypatch.setattr(registry, "_offers", list(registry._offers))
    monkeypatch.setattr(registry, "_choices", {})

    def make(backend: str, priority: int, reason: str | None = None) -> Offer:
        registry.offer("norm", backend, priority, lambda need: reason)(lambda need: backend)
        return next(o for o in registry._offers if o.backend == backend)

    return make


def test_the_best_that_does_not_refuse(offered: Callable[..., Offer]) -> None:
    offered("fast", 100, "not on Sundays")
    offered("slow", -100)
    assert registry.choose(NORM, {}).backend == "torch"
    offered("faster", 90)
    assert registry.choose(NORM, {}).backend == "faster"
    assert registry.choose(NORM, {"norm": "slow"}).backend == "slow"
    (choice,) = [choice for choice in registry.report() if choice.backend == "slow"]
    assert choice.refusals == ()


def test_a_wish_is_never_dropped(offered: Callable[..., Offer]) -> None:
    offered("fast", 100, "not on Sundays")
    for prefer, sentence in (
        ({"norm": "fast"}, "kernels.prefer.norm: backend 'fast' refuses (fast: not on Sundays)"),
        ({"norm": "cudnn"}, "kernels.prefer.norm: backend 'cudnn' is not known; there is"),
        ({"nrm": "torch"}, "kernels.prefer.nrm: there is no such operation"),
    ):
        with pytest.raises(ValueError) as error:
            registry.choose(NORM, prefer)
        assert sentence in str(error.value)


def test_one_that_differs_does_not_serve(offered: Callable[..., Offer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a start on an accelerator, of a broken library's offers."""
    difference = check.difference
    monkeypatch.setattr(check, "difference", lambda offer, need, device: difference(offer, need, "cpu"))
    need = replace(NORM, device="cuda")
    wrong = replace(offered("broken", 100), make=lambda need: lambda x, p, args: x)
    assert "differs from the reference by" in str(check.verify(wrong, need))
    crash = replace(wrong, make=lambda need: lambda x, p, args: x.nothing)
    assert "does not run on this machine (AttributeError" in str(check.verify(crash, need))
    registry._offers[-1] = wrong
    assert registry.choose(need, {}).backend == "broken"
    assert registry.choose(need, {}, check.verify).backend == "torch"
    with pytest.raises(ValueError, match="differs from the reference"):
        registry.choose(need, {"norm": "broken"}, check.verify)


@pytest.mark.parametrize("op", check.EXAMPLES)
def test_every_operation_has_its_reference(op: str) -> None:
    """Also in low precision, on the CPU: the example, the tolerance and the reference belong together."""
    reference = next(offer for offer in registry.offers(op) if offer.backend == "torch")
    for dtype in (torch.float32, torch.bfloat16):
        for need in needs(op, dtype, "cpu"):
            if (
                need.quantize and op != "norm_linear"
            ):  # whose reference is the layer's steps, a quantized product among them
                assert reference.reason(need) == "multiplies in the dtype of activations"
                continue
            assert reference.reason(need) is None
            if dtype == torch.bfloat16 and any(form is not None and form.kind == "derf" for form in need.norms):
                continue  # the gradient of its scalars is a sum that cancels
            # It rounds between its steps, which a joined kernel need not.
            assert check.difference(reference, need, "cpu") <= 3 * check.TOLERANCE[dtype], need


@pytest.mark.parametrize("op", check.EXAMPLES)
def test_an_example_may_be_one_token(op: str) -> None:
    """The second example that tests/gpu gives every offer, of the same numbers."""
    reference = next(offer for offer in registry.offers(op) if offer.backend == "torch")
    for need in needs(op, torch.float32, "cpu"):
        assert check.difference(reference, need, "cpu", rows=(1, 1), seed=1) <= check.TOLERANCE[torch.float32], need


OURS = [offer for offer in registry.offers() if offer.backend.startswith("torch_")]


@pytest.mark.parametrize("offer", OURS, ids=lambda offer: f"{offer.backend}-{offer.op}-{offer.priority}")
def test_what_runs_on_a_cpu_agrees_with_the_reference(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ways to compute the same in PyTorch. One that serves accelerators alone is asked as if on one."""
    monkeypatch.setattr("megnorm.kernels.torch_experts.no_device", lambda capability: None)
    for dtype in (torch.float32, torch.bfloat16):
        device = "cpu" if offer.priority < 5 else "cuda"
        served = [need for need in needs(offer.op, dtype, device) if offer.reason(need) is None]
        assert served
        for seed, need in enumerate(served):
            assert check.difference(offer, need, "cpu", seed=seed) <= check.tolerance(need), need


COMPILED = [offer for offer in registry.offers() if offer.backend == "compiled"]


@pytest.mark.full
@pytest.mark.parametrize("offer", COMPILED, ids=lambda offer: offer.op)
def test_the_compiler_takes_the_reference_whole(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with its gradient, without the compiler of kernels, which needs an accelerator to be meant."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("megnorm.kernels.libraries.missing", lambda name: None)
    for need in _few(needs(offer.op, torch.float32)):
        assert offer.reason(need) == "kernels.compile is off"
        asked = replace(need, compiled=True)
        assert offer.reason(asked) is None
        assert "CUDA" in str(offer.reason(replace(asked, device="cpu")))
        assert check.difference(offer, asked, "cpu") <= check.TOLERANCE[torch.float32], need


def _few(every: list[Need]) -> list[Need]:
    """Norms that nobody else has a kernel for; of other operations the first."""
    rare = [n for n in every if n.norms and n.norms[0] is not None and n.norms[0].kind in ("dyt", "seednorm")]
    return [n for n in rare or every[:2] if not n.sharded]


def test_a_run_may_let_the_compiler_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megnorm.kernels.libraries.missing", lambda name: None)
    for kernels, backend in ((KernelConfig(), "torch"), (KernelConfig(compile=True), "compiled")):
        env = Env(kernels=kernels)
        need = replace(env._need("norm_add", {"norms": (NormForm("dyt", 8, bias=True),)}), device="cuda")
        assert registry.choose(need, {}).backend == backend


@pytest.mark.full
def test_a_model_of_compiled_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the model without them, and the same bit for bit when they are recomputed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("megnorm.kernels.libraries.missing", lambda name: None)
    cfg = ModelConfig(
        layers=2, width=24, heads=4, ffn=36, vocab_size=29, max_positions=16,
        norm=NormConfig(scheme="sandwich", kind="dyt"),
    )  # fmt: skip
    tokens = torch.randint(0, 29, (12, 2), generator=torch.Generator().manual_seed(1))
    batch, runs = Tokens(tokens[:-1], tokens[1:], torch.ones(11, 2)), []
    for compiled, modes in ((False, ()), (True, ()), (True, ("norms", "activations")), (True, ("block",))):
        kernels = KernelConfig(compile=compiled, check=False)
        with asked_of_cuda(["norm_add", "norm", "activation"] if compiled else []):
            model = build_model(cfg, Env(kernels=kernels, recompute=Recompute(modes)), vocab_multiple=1)
        runs.append(_results(model, batch))
    plain, first, *others = runs
    for i, value in enumerate(first):
        torch.testing.assert_close(value, plain[i], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, other[i]) for other in others)
    served = {(choice.need.op, choice.backend) for choice in registry.report() if choice.need.device == "cuda"}
    assert {("norm_add", "compiled"), ("activation", "compiled")} <= served


def test_every_offer_has_a_reference_and_an_example() -> None:
    for offer in registry.offers():
        assert offer.op in check.EXAMPLES
        assert any(other.backend == "torch" for other in registry.offers(offer.op))


def _model(scheme: str, patch: dict[str, Any] | None = None, **options: Any) -> tuple[CausalLM, Tokens]:
    cfg = ModelConfig(
        layers=2, width=24, heads=4, kv_heads=2, ffn=36, vocab_size=29, max_positions=16,
        norm=NormConfig(scheme=scheme, patch=patch or {}), **options,
    )  # fmt: skip
    model = build_model(cfg, Env(dtype=torch.float64), vocab_multiple=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator, dtype=param.dtype))
    tokens = torch.randint(0, 29, (12, 2), generator=generator)
    return model, Tokens(tokens[:-1], tokens[1:], torch.ones(11, 2))


def _results(model: CausalLM, batch: Tokens) -> list[torch.Tensor]:
    loss = model(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# what no scheme has: an output norm under a post norm
BOTH = ("postln", {"all_layers": {"ffn": {"output": {}}, "attention": {"output": {"scale": 0.5}}}})


def _joined(monkeypatch: pytest.MonkeyPatch, without: str = "") -> set[str]:
    """Let the reference's own joined operations serve from now on; which ones do. without: but for one."""
    used: set[str] = set()

    def fused(self: Env, op: str, **detail: Any) -> Callable[..., Any] | None:
        fn = self.kernel(op, **detail)
        if op == without:
            return None

        def counted(*args: Any) -> Any:
            used.add(op)
            return fn(*args)

        return counted

    monkeypatch.setattr(Env, "fused", fused)
    return used


@pytest.mark.parametrize("scheme", [*schemes.names(), BOTH], ids=str)
def test_joined_operations_mean_the_same(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scheme with every joined operation in place of the layer's steps."""
    scheme, patch = (scheme, None) if isinstance(scheme, str) else scheme
    options: dict[str, Any] = {"activation": "gelu", "bias": True} if len(scheme) % 2 else {}
    options["patch"] = patch
    wanted = _results(*_model(scheme, **options))
    for without in ("", "norm_linear"):
        with monkeypatch.context() as patched:
            _joined(patched, without)
            got = _results(*_model(scheme, **options))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("scheme", "ops", "with_products"),
    [
        ("preln", {"add_norm"}, {"norm_linear"}),
        ("deepnorm", {"add_norm"}, {"add_norm"}),
        ("sandwich", {"norm_add", "norm_add_norm"}, {"norm_add", "norm_linear"}),
        ("hybridnorm", {"add_norm", "qkv_norm_rope"}, {"norm_linear", "qkv_norm_rope"}),
        ("normformer", {"norm_add_norm", "act_stats"}, {"norm_add", "norm_linear", "act_stats"}),
        ("lns", {"add_norm"}, {"add_norm", "norm_linear"}),  # behind the first layer a factor stands between them
    ],
)
def test_what_a_scheme_can_join(
    scheme: str, ops: set[str], with_products: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for without, wanted in (("norm_linear", ops), ("", with_products)):
        with monkeypatch.context() as patched:
            used = _joined(patched, without)
            model, batch = _model(scheme)
            model(batch)
        assert used - {"linear", "activation"} == wanted


def test_a_norm_stays_apart_from_its_product_where_the_run_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that are recomputed, and gathered tokens that are kept."""
    used = _joined(monkeypatch)
    cfg = ModelConfig(layers=1, width=24, heads=4, ffn=36, vocab_size=29, max_positions=16)
    norms, kept = Recompute(["norms"]), Mesh(sequence_parallel=True, keep_gathered=True)
    for env in (Env(recompute=norms), Env(mesh=kept)):
        model = build_model(cfg, env, vocab_multiple=1)
        assert all(block.ffn.entry is None and block.attention.entry is None for block in model.blocks.values())
    assert build_model(cfg, Env(), vocab_multiple=1).blocks["0"].ffn.entry is not None
    assert "norm_linear" not in used


def test_a_watched_norm_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe sees every norm and sub-layer, joined or not."""
    monkeypatch.setattr(Env, "fused", lambda self, op, **detail: self.kernel(op, **detail))
    for scheme in ("hybridnorm", "deepnorm", "sandwich", "normformer"):
        model, batch = _model(scheme)
        seen: set[str] = set()
        watched = {n: m for n, m in model.named_modules() if n.endswith("norm") or n.endswith((".attention", ".ffn"))}
        watched = {n: m for n, m in watched.items() if not isinstance(m, torch.nn.Identity)}
        handles = [m.register_forward_hook(lambda *_, n=n, seen=seen: seen.add(n)) for n, m in watched.items()]
        model(batch)
        assert seen == set(watched)
        for handle in handles:
            handle.remove()


def test_env_names_the_backend_that_serves() -> None:
    env = Env(kernels=KernelConfig(prefer={"add_norm": "torch"}))
    assert env.fused("add_norm", norms=(NormForm("rmsnorm", 8),)) is None
    with pytest.raises(ValueError, match="kernels.prefer.add_norm: backend 'triton' refuses"):
        Env(kernels=KernelConfig(prefer={"add_norm": "triton"})).fused("add_norm", norms=(NormForm("rmsnorm", 8),))


def test_ranks_must_agree() -> None:
    mine = {NORM: "triton"}
    registry.check_agreement(mine, {str(NORM): "triton"})
    registry.check_agreement(mine, {"another stage's need": "torch"})
    with pytest.raises(ValueError, match="'norm' is served by triton on one rank and by torch on another"):
        registry.check_agreement(mine, {str(NORM): "torch"})


def test_fp8_spares_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Env(kernels=KernelConfig(fp8="current", fp8_spare=(1, 2)))
    assert [env.block(i, 6).quantize for i in range(6)] == ["", "current", "current", "current", "", ""]
    with pytest.raises(ValueError, match="kernels.fp8=current: nothing on this machine serves"):
        env.block(1, 6).fused("linear", features=(64, 64), quantize="current")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["kernels.fp8=current", "train.precision=fp32"], "quantizes bf16"),
        (["kernels.fp8=current", "train.precision=bf16", "model.family=encdec"], "padded to multiples of 8; set"),
        (["kernels.fp8=block", "train.precision=bf16", "kernels.fp8_spare=[6,6]"], "leaves none of model.layers"),
    ],
)
def test_fp8_is_refused_where_it_means_nothing(overrides: list[str], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        make_plan(load(None, overrides), 1)
