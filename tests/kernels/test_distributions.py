"""What setup.py and the docs tell pip to install is there, by the recorded metadata of the libraries (distributions.json)."""

import ast
import json
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
RECORDED = json.loads((HERE / "distributions.json").read_text(encoding="utf-8"))


def problem(text: str) -> str | None:
    """Why a requirement does not resolve to the recorded distribution."""
    wanted = Requirement(text)
    record = RECORDED.get(canonicalize_name(wanted.name))
    if record is None:
        return f"{wanted.name} is not recorded"
    if not wanted.specifier.contains(record["version"]):
        return f"{text} excludes {record['version']}"
    unknown = {canonicalize_name(extra) for extra in wanted.extras} - set(record["extras"] or wanted.extras)
    return f"{wanted.name} has no extra {', '.join(sorted(unknown))}" if unknown else None


def extras() -> dict[str, list[str]]:
    """Those of setup.py that name a library of kernels."""
    tree = ast.parse((PROJECT / "setup.py").read_text(encoding="utf-8"))
    (given,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    assert isinstance(given, ast.Dict)
    pairs = {ast.unparse(k): v for k, v in zip(given.keys, given.values, strict=True) if k is not None}
    return {name.strip("'"): ast.literal_eval(pairs[name]) for name in ("'te'", "'flash'", "'liger'", "'triton'")}


def test_extras_resolve() -> None:
    for name, requirements in extras().items():
        assert requirements
        for requirement in requirements:
            assert problem(requirement) is None, f"megnorm[{name}]: {problem(requirement)}"


def test_what_the_docs_say_resolves() -> None:
    text = (PROJECT / "docs" / "kernels.md").read_text(encoding="utf-8")
    named = re.findall(r"pip install[^\n]* '([^']+)'", text)
    assert {name for name in named if name.startswith("megnorm[")} == {f"megnorm[{e}]" for e in extras()}
    others = [name for name in named if not name.startswith("megnorm[")]
    assert any("core_cu12" in name for name in others) and any("core_cu13" in name for name in others)
    assert all(problem(name) is None for name in others), [problem(name) for name in others]


def test_the_record_bites() -> None:
    assert "no extra" in str(problem("transformer-engine[core_cu11]"))
    assert "excludes" in str(problem("flash-attn>=3"))
    assert "not recorded" in str(problem("apex"))


def test_python_versions_fit() -> None:
    """Every Python that megnorm names can install them."""
    text = (PROJECT / "setup.py").read_text(encoding="utf-8")
    oldest = re.search(r'python_requires=">=(3\.\d+)"', text)
    assert oldest is not None
    assert all(SpecifierSet(record["python"]).contains(f"{oldest[1]}.0") for record in RECORDED.values())
