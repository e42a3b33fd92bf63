"""Every library's offers over fakes: calls bind to the recorded signatures, and what comes out is what the reference says."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megnorm.kernels import backends, check, libraries, registry, te_products
from megnorm.kernels.registry import NormForm, Scores
from megnorm.layers import loss
from tests.kernels import faking
from tests.kernels.needs import needs
from tests.kernels.serving import installed

assert backends.REFERENCE and loss.make_cross_entropy
BORROWED = [offer for offer in registry.offers() if not offer.backend.startswith(("torch", "triton", "compiled"))]
# flash-attn 4 and 2 share a package name; a need of each offer that it must serve
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.parametrize("offer", BORROWED, ids=lambda offer: f"{offer.backend}-{offer.op}-{offer.priority}")
def test_agrees_with_the_reference(offer: registry.Offer) -> None:
    served = [need for dtype in DTYPES for need in needs(offer.op, dtype) if offer.reason(need) is None]
    assert served, "an offer without a contract test"
    for seed, need in enumerate(served):
        faking.CALLS.clear()
        found = check.difference(offer, need, "cpu", seed=seed)
        assert found <= check.tolerance(need), (need, found)
        assert faking.CALLS, "the library was not called"


def test_every_offer_is_under_one_of_the_tests() -> None:
    """Libraries: here. Ours in Triton: test_triton.py. The compiler's and PyTorch's own: test_registry.py."""
    ours = {"torch", "torch_grouped", "triton", "compiled"}
    others = {offer.backend for offer in registry.offers()} - {offer.backend for offer in BORROWED}
    assert others == ours, "a backend that no test goes over"


@pytest.mark.parametrize(
    "offer", [o for o in BORROWED if o.op == "attention"], ids=lambda o: f"{o.backend}{o.priority}"
)
def test_packed_documents_and_determinism(offer: registry.Offer) -> None:
    base = replace(needs("attention", torch.bfloat16)[0], packed=True, deterministic=True)
    if offer.priority == -3:  # for masks alone
        assert offer.reason(base) == "serves masks alone"
        return
    assert offer.reason(base) is None
    assert check.difference(offer, base, "cpu") <= check.TOLERANCE[torch.bfloat16]
    if offer.backend.startswith("flash"):
        assert all(given.get("deterministic") is True for _, given in faking.CALLS)
    assert "graph" in str(offer.reason(replace(base, capture=True)))


def test_nothing_is_dropped_silently() -> None:
    """What a library cannot do it refuses when the layer is built."""
    attention = needs("attention", torch.bfloat16)[0]
    by_name = {o.backend: o for o in registry.offers("attention") if o.priority > -3}
    for backend in ("flash_attn_3", "flash_attn_4"):
        assert "dropout" in str(by_name[backend].reason(replace(attention, dropout=True)))
    assert by_name["flash_attn"].reason(replace(attention, dropout=True)) is None
    assert "mask" in str(by_name["flash_attn"].reason(replace(attention, mask=True)))
    assert "256" in str(by_name["flash_attn"].reason(replace(attention, head_dim=264)))
    for backend, offer in by_name.items():
        asked = [offer.reason(replace(attention, scores=scores)) for scores in (Scores(window=4), Scores(softcap=1.0))]
        assert (backend == "torch") == (asked == [None, None]), (
            "no library is asked for what attention does to its scores"
        )
    assert "multiples of 8" in str(by_name["flash_attn_4"].reason(replace(attention, head_dim=20)))
    norms = {o.backend: o for o in registry.offers("norm")}
    cast = next(n for n in needs("norm", torch.bfloat16) if n.norm.cast_first)
    for backend in ("transformer_engine", "flash_attn", "apex"):
        assert "model.norm.cast" in str(norms[backend].reason(cast))
    assert norms["liger"].reason(cast) is None


def test_a_library_without_the_names_is_absent() -> None:
    """A namespace package (flash-attn 4 alone) or another package called apex imports, and is of no use."""
    del sys.modules["flash_attn"].flash_attn_func
    offer = next(o for o in registry.offers("attention") if o.backend == "flash_attn")
    assert "has no flash_attn_func" in str(offer.reason(needs("attention", torch.bfloat16)[0]))


def test_a_library_that_fails_to_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    offer = next(o for o in registry.offers("norm") if o.backend == "transformer_engine")
    assert "cannot be imported" in str(offer.reason(needs("norm", torch.float32)[0]))
    libraries.probe.cache_clear()
    libraries.no_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert offer.reason(needs("norm", torch.float32)[0]) == "there is no CUDA device"


@pytest.mark.parametrize(
    "ops", [("norm", "flash_attn"), ("attention", "transformer_engine"), ("cross_entropy", "flash_attn")]
)
def test_an_explicit_wish_is_served(ops: tuple[str, str]) -> None:
    op, backend = ops
    need = next(n for n in needs(op, torch.bfloat16) if not n.mask and not (n.norms and n.norm.gain == "none"))
    assert registry.choose(need, {op: backend}).backend == backend


def test_fp8_is_served_or_refused() -> None:
    """By its recipe, with the sizes it needs; never by a product in another precision."""
    base = next(n for n in needs("linear", torch.bfloat16) if n.quantize == "current")
    te = registry.choose(base, {})
    assert te.backend == "transformer_engine"
    for recipe, (name, _, _) in te_products.RECIPES.items():
        if recipe == "mxfp8":
            continue
        faking.CALLS.clear()
        need = replace(base, quantize=recipe)
        check.difference(registry.choose(need, {}), need, "cpu")
        assert ("Linear.forward", {"recipe": name}) in faking.CALLS
    assert "multiples of 16" in str(te.reason(replace(base, features=(48, 24))))
    assert "multiples of 32" in str(te.reason(replace(base, quantize="mxfp8")))
    assert "train.micro_batch" in str(te.reason(replace(base, tokens=24)))
    assert "train.precision" in str(te.reason(replace(base, dtype=torch.float32)))
    spread = replace(base, op="norm_linear", norms=(NormForm("rmsnorm", 48),), ranks=4, split_tokens=True)
    joined = next(o for o in registry.offers("norm_linear") if o.priority > 0)
    assert joined.reason(spread) is None
    assert "on each of 4 ranks, not 32 in all" in str(joined.reason(replace(spread, tokens=32)))
    assert "keeps no history" in str(joined.reason(replace(spread, quantize="delayed")))
    assert "serves who asks" in str(joined.reason(replace(spread, quantize="")))
    del sys.modules["transformer_engine.pytorch"].autocast
    libraries.probe.cache_clear()
    with pytest.raises(ValueError, match="kernels.fp8=current: nothing on this machine serves.*2.9 or newer"):
        registry.choose(base, {})
