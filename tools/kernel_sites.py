"""Which kernel would serve which norm of every scheme: models are built on the meta device, libraries taken for granted.

python tools/kernel_sites.py            write docs/kernel_sites.md, with what every preset of examples/papers asks for
python tools/kernel_sites.py --check    exit 1 if it is not what the registry says now

No accelerator and no library is needed: an offer is asked what it refuses, and is not made.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from megnorm import config as configs
from megnorm.kernels import backends, libraries, registry, torch_experts
from megnorm.kernels.config import KernelConfig
from megnorm.kernels.registry import Need
from megnorm.layers.block import Block
from megnorm.layers.env import Env
from megnorm.layers.fused import watched
from megnorm.layers.norm import NormLayer
from megnorm.models.build import FAMILIES
from megnorm.models.causal import CausalLM
from megnorm.models.config import ModelConfig
from megnorm.norms import registry as schemes
from megnorm.norms.config import NormConfig
from megnorm.norms.resolve import resolve
from megnorm.parallel.mesh import Axis, Mesh
from megnorm.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernel_sites.md"
PRESETS = sorted(
    path for path in (ROOT / "examples" / "papers").glob("*.yaml") if path.with_stem(f"{path.stem}-tiny").exists()
)
NAMES = {
    "torch": "torch",
    "torch_grouped": "torch, one call",
    "triton": "ours",
    "transformer_engine": "TE",
    "flash_attn": "flash-attn",
    "liger": "Liger",
    "apex": "apex",
}
PREFIXES = {"TE": "transformer_engine", "flash-attn": "flash-attn", "Liger": "liger", "apex": "apex"}
INTRODUCTION = """# Which kernel serves which norm

Made by `python tools/kernel_sites.py`, which builds every scheme on the meta device as if on a Hopper GPU with the libraries of
each column, and asks the registry; nothing was run. bf16, width 2048, 16 heads of 128 (4 for keys and values), RMSNorm, SwiGLU.
`cast` is model.norm.cast, `fp8` kernels.fp8; `ours` are megnorm's Triton kernels, which need nothing beside torch for CUDA; TE
is Transformer Engine. In brackets stands the operation, where it holds more than the norm: `add+norm` the sum before it,
`norm+add` the sum behind it, `norm+add+norm` also the next sub-layer's norm, `norm+linear` the product behind it, `heads` the
norms of q, k and v and the rotation, `act+norm` the activation before it.

"""

PRESETS_INTRODUCTION = """
The presets of `examples/papers` as they are (family, sizes, dropout, documents, tensor parallelism), but for their depth, cut
to 4 layers a stack. Each operation that a preset asks for, and what serves it; several where layers or sites differ.

"""


@dataclass(frozen=True)
class Machine:
    """A column: what is installed beside torch, and how the run is set."""

    title: str
    has: Collection[str] = ()
    cast: Literal["before_gain", "after_gain"] = "before_gain"
    fp8: Literal["current"] | None = None
    tp: int = 1


ALL = tuple(PREFIXES)
MACHINES = (
    Machine("torch alone"),
    Machine("all", ALL),
    Machine("flash-attn, `cast: after_gain`", ("flash-attn",), "after_gain"),
    Machine("apex, Liger, after_gain", ("apex", "Liger"), "after_gain"),
    Machine("all, after_gain", ALL, "after_gain"),
    Machine("all, after_gain, `fp8: current`", ALL, "after_gain", "current"),
    Machine("the same, tp 2", ALL, "after_gain", "current", 2),
)


@dataclass(frozen=True)
class Kernel:
    """Stands where a layer keeps what serves it."""

    need: Need
    backend: str

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("nothing is run here")

    @property
    def words(self) -> str:
        op = {
            "add_norm": "add+norm", "norm_add": "norm+add", "norm_add_norm": "norm+add+norm", "norm_linear": "norm+linear",
            "qkv_norm_rope": "heads", "act_stats": "act+norm",
        }.get(self.need.op)  # fmt: skip
        return NAMES[self.backend] + (f" ({op})" if op else "")


@dataclass
class Asked:
    """All that a model asked for, by operation."""

    served: dict[str, set[str]] = field(default_factory=dict)

    def choose(self, need: Need, config: KernelConfig) -> tuple[str, Callable[..., Any]]:
        kernel = Kernel(need, registry.choose(need, config.prefer).backend)
        self.served.setdefault(need.op, set()).add(NAMES[kernel.backend])
        return kernel.backend, kernel


@contextlib.contextmanager
def on(machine: Machine) -> Iterator[Asked]:
    """As if on that machine."""
    asked, need = Asked(), Env._need
    there = tuple(PREFIXES[name] for name in machine.has) + ("triton",)

    def missing(library: libraries.Library) -> str | None:
        return None if library.name.startswith(there) else "is not installed"

    class Answers:
        """A library's functions that say whether the device has a recipe."""

        def __getattr__(self, name: str) -> Any:
            return lambda **_: (True, "")

    with (
        mock.patch.object(libraries.Library, "missing", missing),
        mock.patch.object(libraries.Library, "module", lambda self, index=0: Answers()),
        mock.patch.object(libraries, "no_device", lambda capability=(0, 0): None),
        mock.patch.object(torch_experts, "no_device", lambda capability=(0, 0): None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(Env, "_need", lambda self, op, detail: replace(need(self, op, detail), device="cuda")),
        mock.patch.object(backends, "chosen", asked.choose),
    ):
        yield asked


def build(scheme: str, machine: Machine) -> CausalLM:
    norm = NormConfig(scheme, kind="rmsnorm", cast=machine.cast)
    cfg = ModelConfig(
        layers=4, width=2048, heads=16, kv_heads=4, ffn=5632, vocab_size=50304, max_positions=4096, norm=norm
    )
    mesh = Mesh(tp=Axis("tp", machine.tp), device=torch.device("meta"), sequence_parallel=machine.tp > 1)
    env = Env(mesh, torch.bfloat16, KernelConfig(fp8=machine.fp8, check=False), tokens=8192)
    return CausalLM(cfg, resolve(norm, cfg.layers), cfg.vocab_size, env)


def sites(model: CausalLM) -> dict[str, str]:
    """What serves each norm; where blocks differ, all that do."""
    found: dict[str, list[str]] = {}

    def add(site: str, kernel: Any) -> None:
        words = found.setdefault(site, [])
        if kernel.words not in words:
            words.append(kernel.words)

    if isinstance(getattr(model.embed, "norm", None), NormLayer):
        add("embedding", model.embed.norm.kernel)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        _block(block, add)
    if isinstance(model.final_norm, NormLayer):
        add("final", model.final_norm.kernel)
    return {site: " or ".join(words) for site, words in found.items()}


def _block(block: Block, add: Callable[[str, Any], None]) -> None:
    joined: dict[str, Any] = {}
    for name, sub in (("attention", block.attention), ("ffn", block.ffn)):
        if sub.join is not None:
            joined[f"{name} post" if sub.join.post else f"{name} output"] = sub.join.kernel
        if sub.entry is not None:
            joined[f"{name} input"] = sub.entry.kernel
    if block.boundary is not None:
        joined["ffn input"] = block.boundary.kernel
        if block.boundary.output:
            joined["attention output"] = block.boundary.kernel
    if block.attention.prepare is not None:
        joined.update({f"attention {x}": block.attention.prepare for x in "qkv"})
    if block.ffn.act_norm is not None:
        joined["ffn inner"] = block.ffn.act_norm
    for name, sub in (("attention", block.attention), ("ffn", block.ffn)):
        for place in ("input", "q", "k", "v", "context", "inner", "output", "post"):
            norm: nn.Module | None = getattr(sub, f"{place}_norm", None)
            if isinstance(norm, NormLayer):
                assert not watched(norm)
                add(f"{name} {place}", joined.get(f"{name} {place}", norm.kernel))


def asked_by(path: Path, machine: Machine) -> dict[str, str]:
    """What serves each operation of a preset. Raises ValueError where nothing does."""
    config = configs.load(path, [f"model.norm.cast={machine.cast}", "model.layers=4"])
    tp = max(machine.tp, config.parallel.tp)
    config = replace(
        config, parallel=replace(config.parallel, tp=tp), kernels=KernelConfig(fp8=machine.fp8, check=False)
    )
    m, d, t = config.model, config.data, config.train
    if m.family == "encdec":
        config = replace(config, model=replace(m, encoder_layers=4))
    plan = make_plan(config, 64)
    mesh = Mesh(tp=Axis("tp", tp), device=torch.device("meta"), sequence_parallel=plan.sequence_parallel)
    tokens = t.micro_batch * t.sequence_length
    env = Env(mesh, torch.bfloat16, config.kernels, packed=d.separate_documents, tokens=tokens)
    with on(machine) as asked:
        FAMILIES[m.family](config.model, plan.resolved, plan.padded_vocab, env)
    return {op: ", ".join(sorted(served)) for op, served in asked.served.items()}


def presets() -> list[str]:
    """The table of presets, those alike in one row, and why some are refused somewhere."""
    rows: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for path in PRESETS:
        columns: list[dict[str, str] | None] = []
        for machine in MACHINES:
            try:
                columns.append(asked_by(path, machine))
            except ValueError as error:
                columns.append(None)
                why = str(error).rpartition(": ")[2].rstrip(")")
                if path.stem not in reasons.setdefault(why, []):
                    reasons[why].append(path.stem)
        asked = [op for op in registry.OPS if any(op in column for column in columns if column)]
        cells = [tuple("refused" if c is None else c.get(op, "-") for c in columns) for op in asked]
        rows.setdefault(tuple(zip(asked, cells, strict=True)), []).append(path.stem)
    refused = [f"- {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in reasons.items()]
    return [*_table("preset", "operation", rows), "", "Refused by `fp8`:", "", *refused]


def _table(first: str, second: str, rows: Mapping[tuple[tuple[str, tuple[str, ...]], ...], list[str]]) -> list[str]:
    titles = " | ".join(machine.title for machine in MACHINES)
    lines = [f"| {first} | {second} | {titles} |", "|---" * (2 + len(MACHINES)) + "|"]
    for key, names in rows.items():
        of = ", ".join(f"`{name}`" for name in names)
        for place, cells in key or (("none", ("-",) * len(MACHINES)),):
            lines.append(f"| {of} | {place} | " + " | ".join(cells) + " |")
            of = ""
    return lines


def page() -> str:
    rows: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}
    other: dict[str, list[str]] = {}
    for scheme in schemes.names():
        columns = []
        for machine in MACHINES:
            with on(machine) as asked:
                columns.append(sites(build(scheme, machine)))
            if scheme == "preln":
                for op in ("linear", "attention", "rope", "activation", "cross_entropy"):
                    other.setdefault(op, []).append(", ".join(sorted(asked.served[op])))
        key = tuple((site, tuple(column[site] for column in columns)) for site in columns[0])
        rows.setdefault(key, []).append(scheme)
    lines = [INTRODUCTION + "\n".join(_table("scheme", "norm", rows))]
    lines += ["", "The other operations, which no scheme changes:", ""]
    titles = " | ".join(machine.title for machine in MACHINES)
    lines += [f"| operation | {titles} |", "|---" * (1 + len(MACHINES)) + "|"]
    lines += [f"| `{op}` | " + " | ".join(cells) + " |" for op, cells in other.items()]
    lines += [PRESETS_INTRODUCTION + "\n".join(presets())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
