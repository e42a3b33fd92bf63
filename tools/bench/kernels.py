"""Every offer of every operation against the roofline of this accelerator: time, bytes a second, products a second.

    python tools/bench/kernels.py [--op attention ...] [--backend triton ...] [--width 4096] [--tokens 8192] [--json out.jsonl]

docs/gpu.md tells how to read the table. Sizes are those of one layer; permute and adamw are not timed. ``--device
cpu`` runs it small, to see that it works.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megnorm.kernels import backends, registry
from megnorm.kernels.check import Alone
from megnorm.kernels.registry import Need, NormForm, Offer
from megnorm.kernels.torch_ref import NormArgs
from megnorm.layers import loss

assert backends.REFERENCE and loss.make_cross_entropy  # both register offers

# GB/s and TFLOP/s of dense products in bf16, as the makers give them; the first name found in the device's own counts.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (8000, 2250),
    "H200": (4800, 989),
    "H100 PCIe": (2000, 756),
    "H100": (3350, 989),
    "A100-SXM4-80GB": (2039, 312),
    "A100 80GB PCIe": (1935, 312),
    "A100": (1555, 312),
    "L40S": (864, 362),
    "L4": (300, 121),
    "RTX 4090": (1008, 165),
    "RTX 3090": (936, 71),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """Of one layer. rows: tokens [s, b]."""

    tokens: int = 8192
    batch: int = 4
    width: int = 4096
    head_dim: int = 128
    kv_heads: int = 8
    vocab: int = 32000
    experts: int = 8

    @property
    def rows(self) -> tuple[int, int]:
        return self.tokens // self.batch, self.batch

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


@dataclass(frozen=True)
class Case:
    """leaves: what is read, by name; those that are floating and no constants are differentiated. flops: of the forward
    pass; back: how many times those the backward pass has."""

    site: str
    need: Need
    leaves: dict[str, Tensor]
    call: Callable[[Callable[..., Any], dict[str, Tensor]], Any]
    flops: float = 0.0
    back: float = 2.0
    constant: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One measurement. bound: what limits it at best; best_us: the time of the roofline. share: of that best, reached."""

    op: str
    site: str
    backend: str
    dtype: str
    pass_: str
    us: float
    gbps: float
    tflops: float
    bound: str
    best_us: float | None
    share: float | None


def _args(form: NormForm) -> NormArgs:
    return NormArgs(1e-5, form.width, form.cast_first, 1.0, lambda x: x)


def cases(op: str, sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The sites of an operation."""
    generator = torch.Generator(device).manual_seed(0)
    (s, b), d, hd, h, kv = sizes.rows, sizes.width, sizes.head_dim, sizes.heads, sizes.kv_heads
    base = {"op": op, "device": device, "dtype": dtype}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def gain(form: NormForm, prefix: str = "") -> dict[str, Tensor]:
        found = {prefix + "weight": 1.0 + 0.1 * draw(form.width)}
        return {**found, prefix + "bias": draw(form.width)} if form.bias else found

    for kind in ("rmsnorm", "layernorm"):
        form = NormForm(kind, d, bias=kind == "layernorm")
        yield from _norm_cases(op, kind, form, base, draw, gain, sizes)
    angles = {name: draw(s, 1, 1, hd // 2) for name in ("cos", "sin")}
    if op == "qkv_norm_rope":
        form = NormForm("rmsnorm", hd)
        leaves = {"q": draw(s, b, h, hd), "k": draw(s, b, kv, hd), "v": draw(s, b, kv, hd), **gain(form), **angles}
        need = Need(**base, heads=h, kv_heads=kv, head_dim=hd, norms=(form, form, None))

        def qkv(fn: Callable[..., Any], at: dict[str, Tensor]) -> Any:
            norm = ({"weight": at["weight"]}, _args(form))
            return fn(at["q"], at["k"], at["v"], (norm, norm, None), (at["cos"], at["sin"]))

        yield Case("q, k by head", need, leaves, qkv, constant=("cos", "sin"))
    if op == "rope":
        need = Need(**base, head_dim=hd)
        leaves = {"x": draw(s, b, h, hd), **angles}
        yield Case("q", need, leaves, lambda fn, at: fn(at["x"], at["cos"], at["sin"]), constant=("cos", "sin"))
    if op == "head_scale":
        leaves = {"y": draw(s, b, d), "scale": draw(h)}
        yield Case("before W_o", Need(**base, heads=h, head_dim=hd), leaves, lambda fn, at: fn(at["y"], at["scale"]))
    if op == "activation":
        need, leaves = Need(**base, kind="silu", gated=True), {"gate": draw(s, b, d), "up": draw(s, b, d)}
        yield Case("swiglu", need, leaves, lambda fn, at: fn(at["gate"], at["up"]))
    if op == "attention":
        yield from _attention_cases(base, draw, sizes)
    if op == "cross_entropy":
        labels = torch.randint(0, sizes.vocab, (s, b), generator=generator, device=device)
        leaves = {"logits": draw(s, b, sizes.vocab), "labels": labels}

        def entropy(fn: Callable[..., Any], at: dict[str, Tensor]) -> Any:
            return fn(at["logits"] * 1.0, at["labels"], 0, sizes.vocab, Alone())  # a copy: it may be overwritten

        yield Case("head (a copy of the logits included)", Need(**base), leaves, entropy)
    if op == "linear":
        for recipe in ("", "current"):
            need = Need(**base, features=(d, 4 * d), tokens=s * b, quantize=recipe)
            leaves = {"x": draw(s, b, d), "w": draw(4 * d, d)}
            yield Case(recipe or "W_up", need, leaves, lambda fn, at: fn(at["x"], at["w"], None), 8.0 * s * b * d * d)
    if op == "grouped_gemm":
        each = s * b // sizes.experts
        leaves = {"x": draw(each * sizes.experts, d), "w": draw(sizes.experts, d, d)}
        counts = torch.full((sizes.experts,), each, device=device)
        need, flops = Need(**base, features=(d, d), tokens=s * b), 2.0 * each * sizes.experts * d * d
        yield Case("experts alike", need, leaves, lambda fn, at: fn(at["x"], at["w"], counts), flops)


def _norm_cases(
    op: str, kind: str, form: NormForm, base: dict[str, Any], draw: Any, gain: Any, sizes: Sizes
) -> Iterator[Case]:
    (s, b), d = sizes.rows, sizes.width
    stream = {"x": draw(s, b, d), "f": draw(s, b, d)}

    def params(at: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        names = ("weight", "bias") if form.bias else ("weight",)
        return {name: at[prefix + name] for name in names}

    one, alone = {**stream, **gain(form)}, {"x": stream["x"], **gain(form)}
    need = Need(**base, norms=(form,))
    if op in ("norm", "sharded_norm"):
        need = Need(**base, norms=(form,), sharded=op == "sharded_norm")
        yield Case(kind, need, alone, lambda fn, at: fn(at["x"], params(at), _args(form)))
    if op == "add_norm":
        yield Case(kind, need, one, lambda fn, at: fn(at["x"], at["f"], params(at), _args(form), 1.0, 1.0, True))
    if op == "norm_add":
        yield Case(kind, need, one, lambda fn, at: fn(at["x"], at["f"], params(at), _args(form), 1.0, 1.0))
    if op == "norm_add_norm":

        def joined(fn: Callable[..., Any], at: dict[str, Tensor]) -> Any:
            return fn(at["x"], at["f"], (params(at), _args(form)), (params(at, "2."), _args(form)), 1.0, 1.0)

        yield Case(kind, Need(**base, norms=(form, form)), {**one, **gain(form, "2.")}, joined)
    if op == "act_stats":
        need = Need(**base, kind="silu", gated=True, norms=(form,))
        leaves = {"gate": draw(s, b, d), "up": draw(s, b, d), **gain(form)}
        yield Case(kind, need, leaves, lambda fn, at: fn(at["gate"], at["up"], params(at), _args(form)))
    if op == "norm_linear":
        need = Need(**base, norms=(form,), features=(d, 4 * d), tokens=s * b)
        leaves = {**alone, "w": draw(4 * d, d)}

        def product(fn: Callable[..., Any], at: dict[str, Tensor]) -> Any:
            return fn(at["x"], params(at), _args(form), at["w"], None, Alone())

        yield Case(kind, need, leaves, product, 8.0 * s * b * d * d)


def _attention_cases(base: dict[str, Any], draw: Any, sizes: Sizes) -> Iterator[Case]:
    (s, b), h, kv, hd = sizes.rows, sizes.heads, sizes.kv_heads, sizes.head_dim
    heads = {"heads": h, "kv_heads": kv, "head_dim": hd}
    flops = 4.0 * b * h * s * s * hd
    leaves = {"q": draw(s, b, h, hd), "k": draw(s, b, kv, hd), "v": draw(s, b, kv, hd)}
    documents = (s // 2, s - s // 2)
    packed = {"q": draw(s, 1, h, hd), "k": draw(s, 1, kv, hd), "v": draw(s, 1, kv, hd)}
    for site, given, held, causal, share in (
        ("causal", None, leaves, True, 0.5),
        ("both sides", None, leaves, False, 1.0),
        ("two documents", documents, packed, True, 0.25 / b),
    ):

        def attend(fn: Callable[..., Any], at: dict[str, Tensor], given: Any = given, causal: bool = causal) -> Any:
            return fn(at["q"], at["k"], at["v"], mask=None, documents=given, dropout=0.0, causal=causal, bias=None)

        need = Need(**base, **heads, causal=causal, packed=given is not None)
        yield Case(site, need, held, attend, flops * share, 2.5)


def measure(offer: Offer, case: Case, peaks: tuple[float, float] | None, repeats: int) -> Iterator[Row]:
    """Forward, and backward. Bytes: every input and output once, which no kernel can do without."""
    fn = offer.make(case.need)
    inputs = {
        name: x.detach().requires_grad_(x.is_floating_point() and name not in case.constant)
        for name, x in case.leaves.items()
    }
    wanted = [x for x in inputs.values() if x.requires_grad]

    def forward() -> list[Tensor]:
        out = case.call(fn, inputs)
        return [y for y in (out if isinstance(out, tuple | list) else (out,)) if y.requires_grad]

    outputs = forward()
    grads = [torch.randn_like(y) for y in outputs]
    read, written = sum(x.nbytes for x in inputs.values()), sum(y.nbytes for y in outputs)
    del outputs

    def backward(graph: list[Tensor]) -> None:
        torch.autograd.grad(graph, wanted, grads)

    # Each backward pass has a forward pass of its own, which is not timed: libraries free or overwrite what they kept.
    before, after = _microseconds(lambda _: forward(), repeats), _microseconds(backward, repeats, forward)
    backward_bytes = written + read + sum(x.nbytes for x in wanted)
    for name, us, size, flops in (
        ("forward", before, read + written, case.flops),
        ("backward", after, backward_bytes, case.flops * case.back),
    ):
        yield _row(offer, case, name, us, size, flops, peaks)


def _row(
    offer: Offer, case: Case, name: str, us: float, size: int, flops: float, peaks: tuple[float, float] | None
) -> Row:
    bound, best = "-", None
    if peaks is not None:
        factor = 2.0 if case.need.quantize else 1.0
        moved, computed = size / peaks[0] / 1e3, flops / (peaks[1] * factor) / 1e6
        bound, best = ("bytes", moved) if moved >= computed else ("products", computed)
    dtype = next(key for key, value in DTYPES.items() if value == case.need.dtype)
    share = None if best is None else best / us
    rates = size / us / 1e3, flops / us / 1e6
    return Row(offer.op, case.site, offer.backend, dtype, name, us, *rates, bound, best, share)


def _microseconds(run: Callable[[Any], object], repeats: int, prepare: Callable[[], Any] = lambda: None) -> float:
    """The median of single runs, each of what ``prepare`` gives, by the device's own clock where it has one."""
    for _ in range(3):
        run(prepare())
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            given = prepare()
            begin = time.perf_counter()
            run(given)
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        given = prepare()
        begin.record()
        run(given)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in marks)


def peaks_of(name: str) -> tuple[float, float] | None:
    return next((peaks for key, peaks in PEAKS.items() if key in name), None)


def line(row: Row) -> str:
    best = "        -      -" if row.best_us is None or row.share is None else f"{row.best_us:>9.1f}{row.share:>7.0%}"
    rates = f"{row.us:>9.1f}{row.gbps:>9.0f}{row.tflops:>9.1f}"
    return f"{row.op:<15}{row.site:<18.17}{row.backend:<20}{row.dtype:<6}{row.pass_:<9}{rates}{best}  {row.bound}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=sorted(registry.OPS), default=sorted(registry.OPS))
    parser.add_argument("--backend", nargs="*", help="offers of these alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--width", type=int, default=Sizes.width)
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", help="write one object a line here, too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("kernels: there is no CUDA device; --device cpu runs the reference, small", file=sys.stderr)
        return 2
    small = {"head_dim": 16, "kv_heads": 2, "vocab": 320} if args.device == "cpu" else {}
    sizes = Sizes(tokens=args.tokens, width=args.width, **small)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    peaks = peaks_of(name)
    print(f"{name}: " + ("no peaks are known" if peaks is None else f"{peaks[0]:g} GB/s, {peaks[1]:g} TFLOP/s in bf16"))
    print(f"{'operation':<15}{'site':<18}{'backend':<20}{'dtype':<6}{'pass':<9}", end="")
    print(f"{'us':>9}{'GB/s':>9}{'TFLOP/s':>9}{'best us':>9}{'share':>7}  bound")
    rows = []
    for op in args.op:
        for case in cases(op, sizes, args.device, DTYPES[args.dtype]):
            for offer in registry.offers(op):
                if args.backend and offer.backend not in args.backend:
                    continue
                reason = offer.reason(case.need)
                if reason is not None:
                    print(f"{op:<15}{case.site:<18.17}{offer.backend:<20}{reason}")
                    continue
                for row in measure(offer, case, peaks, args.repeats):
                    rows.append(row)
                    print(line(row), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
