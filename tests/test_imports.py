"""The import rules: which package may import which, what stays free of torch, and no cycles at all.

Every import statement counts, also inside functions and under TYPE_CHECKING, so a cycle cannot be hidden by laziness.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# what a package (or single file) may import of megnorm, beside itself
FOUNDATION = {"parallel", "kernels", "norms"}
WORKSHOPS = {"optim", "metrics", "layers", "data", "checkpoint"}
BELOW_TRAIN = FOUNDATION | WORKSHOPS | {"models", "config"}
RULES: dict[str, set[str]] = {
    "norms": set(),
    "parallel": set(),
    "kernels": set(),
    "layers": FOUNDATION | {"models.config"},  # the sizes they are built from: options only
    "optim": {"parallel"},
    "metrics": {"parallel"},
    "checkpoint": {"parallel"},
    "data": {"parallel"},
    "models": FOUNDATION | {"layers"},
    "config": set(),
    "hf": BELOW_TRAIN,
    "infer": BELOW_TRAIN | {"hf"},  # generates from exported folders too
    "refuse": {"config", "norms", "optim.schedule", "models.check", "models.family"},
    "plan": {
        "config",
        "refuse",
        "norms",
        "parallel.schedule",
        "parallel.balance",
        "parallel.divisors",
        "models.check",
        "models.count",
        "models.family",
        "hf.families",
    },
    "train": BELOW_TRAIN | {"hf", "infer", "plan", "refuse"},
    "cli": BELOW_TRAIN | {"hf", "infer", "plan", "refuse", "train"},
    "__main__": {"cli"},
}
# these may read every package's options, and nothing of them but the options
READS_OPTIONS = {"config", "plan", "refuse"}
# may not reach torch by any chain of imports; export turns tensors, so the files of hf may name it inside functions
TORCH_FREE = (
    "norms.",
    "config",
    "plan",
    "refuse",
    "optim.schedule",
    "parallel.schedule",
    "parallel.balance",
    "parallel.divisors",
    "models.check",
    "models.count",
    "models.family",
    "hf.families.",
)

REQUIRED = {
    "matplotlib",
    "numpy",
    "pydantic",
    "pydantic_core",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "xxhash",
    "yaml",
}
# imported inside functions, or inside a `try`, so that megnorm works without them
OPTIONAL = {
    "apex", "flash_attn", "flash_attn_interface", "fsspec", "huggingface_hub", "liger_kernel", "lm_eval", "mpi4py",
    "pyarrow", "sacrebleu", "scipy", "sentencepiece", "sklearn", "tensorboard", "tiktoken", "transformer_engine",
    "transformer_engine_torch", "transformers", "triton", "wandb", "zstandard",
}  # fmt: skip
SHIPPED = {
    "hf.attention_megnorm", "hf.configuration_megnorm", "hf.encoder_megnorm", "hf.ffn_megnorm", "hf.layers_megnorm",
    "hf.modeling_megnorm", "hf.norms_megnorm", "hf.seq2seq_megnorm",
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Every module of megnorm by its dotted name below megnorm; the package itself is ''."""
    root = PROJECT / "megnorm"
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(name: str, tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute dotted names that a module imports: ``from a import b`` gives a.b where that is a module, else a."""
    package = f"megnorm.{name}".strip(".").split(".")
    if f"{name}." not in {f"{other.rpartition('.')[0]}." for other in MODULES}:
        package = package[:-1]  # a plain module: relative imports start at its package
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner if inner.removeprefix("megnorm.") in MODULES else source), node


def own(name: str, tree: ast.AST) -> set[str]:
    """The modules of megnorm that a module imports, as dotted names below megnorm."""
    found = {target for target, _ in imports(name, tree) if target.split(".")[0] == "megnorm"}
    return {target.removeprefix("megnorm").lstrip(".") for target in found} - {""}


def foreign(name: str, tree: ast.AST) -> set[str]:
    """Top-level names of the other packages it imports, without the standard library."""
    tops = {target.split(".")[0] for target, _ in imports(name, tree)}
    return tops - {"megnorm", "__future__"} - set(sys.stdlib_module_names)


def covers(allowed: set[str], target: str) -> bool:
    return any(target == one or target.startswith(f"{one}.") for one in allowed)


def breaches(name: str, tree: ast.AST) -> list[str]:
    """Imports of one module that the rules forbid."""
    top = name.split(".")[0]
    allowed = RULES[top] | {top}
    found = []
    for target in own(name, tree):
        options = target.endswith(".config") and (top in READS_OPTIONS or name.endswith("config"))
        if not options and not covers(allowed | ({"norms"} if top == "config" else set()), target):
            found.append(f"megnorm.{name} imports megnorm.{target}; {top} may import {sorted(allowed)}")
    return found


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    assert name.split(".")[0] in RULES, f"megnorm.{name}: a new package needs its line in RULES"
    assert not breaches(name, MODULES[name])


def test_there_is_no_cycle() -> None:
    graph = {name: own(name, tree) - {name} for name, tree in MODULES.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(f"megnorm.{name}" for name in error.args[1]))


def is_torch_free(name: str) -> bool:
    return name.endswith(".config") or any(name == one or name.startswith(one) for one in TORCH_FREE)


@pytest.mark.parametrize("name", [name for name in MODULES if is_torch_free(name)])
def test_what_is_torch_free_never_reaches_torch(name: str) -> None:
    seen, chains = {name}, [(name,)]
    while chains:
        chain = chains.pop()
        tree = MODULES[chain[-1]]
        tops = unguarded(tree) if chain[-1].startswith("hf.") else foreign(chain[-1], tree)
        assert "torch" not in tops, f"torch by way of {' -> '.join(chain)}"
        fresh = {target for target in own(chain[-1], tree) if target in MODULES} - seen
        seen |= fresh
        chains += [(*chain, target) for target in fresh]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("norms")])
def test_norms_use_the_standard_library_alone(name: str) -> None:
    assert not foreign(name, MODULES[name])


@pytest.mark.parametrize("name", sorted(SHIPPED & set(MODULES)))
def test_shipped_files_stand_alone(name: str) -> None:
    assert own(name, MODULES[name]) <= SHIPPED
    assert foreign(name, MODULES[name]) <= {"torch", "transformers"}


def unguarded(tree: ast.Module) -> set[str]:
    """Top-level names imported when the module itself is imported, outside any function and any `try`."""
    found: set[str] = set()
    bodies: list[list[ast.stmt]] = [tree.body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                bodies.append(node.orelse)
            elif isinstance(node, ast.If | ast.With | ast.ClassDef):
                bodies += [node.body, getattr(node, "orelse", [])]
    return found


@pytest.mark.parametrize("name", sorted(set(MODULES) - SHIPPED))
def test_optional_libraries_stay_optional(name: str) -> None:
    unknown = foreign(name, MODULES[name]) - REQUIRED - OPTIONAL
    assert not unknown, f"{unknown} are neither in setup.py's requirements nor among the optional libraries"
    assert not unguarded(MODULES[name]) & OPTIONAL, "import it inside the function that uses it, or inside a try"


def test_the_rules_bite() -> None:
    """Small modules that break each rule are caught."""
    assert breaches("layers.norm", ast.parse("from megnorm.models import causal"))
    assert breaches("norms.scheme", ast.parse("def f():\n    from megnorm.parallel.layout import Layout"))
    assert breaches("plan", ast.parse("import megnorm.parallel.mesh"))
    assert breaches("config", ast.parse("from megnorm.layers.norm import NormLayer"))
    assert not breaches("config", ast.parse("from megnorm.norms import registry\nfrom megnorm.models.config import M"))
    assert foreign("norms.scheme", ast.parse("def f():\n    import torch.nn as nn")) == {"torch"}
    assert unguarded(ast.parse("import wandb\ntry:\n    import apex\nexcept ImportError:\n    pass")) == {"wandb"}


def test_a_run_starts_without_the_compiler() -> None:
    """torch imports it for its own optimizer classes, a second in every process of a run that compiles nothing."""
    code = (
        "import sys, torch\n"
        "import megnorm.train.main\n"
        "from megnorm.kernels.torch_ref import AdamW\n"
        "x = torch.ones(3)\n"
        "x.grad = torch.ones(3)\n"
        "AdamW([{'params': [x]}], lr=0.1, betas=(0.9, 0.95), eps=1e-8).step()\n"
        "assert bool((x < 1).all())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120).returncode == 0
