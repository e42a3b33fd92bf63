"""The state of the repository: fixed top level, nothing of one machine, one place for scheme names."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megnorm.norms import registry

PROJECT = Path(__file__).resolve().parent.parent
THIS = Path(__file__).resolve()
ALLOWED = {"README.md", "setup.py", "megnorm", "tools", "examples", "tests", "scripts"}
COMPANIONS = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "docs"}  # what every open project has
HIDDEN = {".ci", ".pre-commit-config.yaml", ".gitignore"}
MAY_NAME_SCHEMES = ("megnorm/norms/schemes/", "megnorm/norms/config.py")
LARGEST = 2 * 1024 * 1024  # bytes


def files() -> list[Path]:
    """What git tracks or would track; in an unpacked archive, everything."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    names = [name for name in listing.stdout.split("\0") if name]
    return [path for path in ((PROJECT / name for name in names) if names else PROJECT.rglob("*")) if path.is_file()]


FILES = files()


def code(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """Relative path and syntax tree of every Python file under a folder."""
    for path in FILES:
        name = path.relative_to(PROJECT).as_posix()
        if name.startswith(folder) and path.suffix == ".py":
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def lines() -> Iterator[tuple[str, int, str]]:
    """Relative path, line number and line of every text file but this one."""
    for path in FILES:
        data = path.read_bytes()
        if path != THIS and b"\0" not in data and not data.startswith(b"\x1f\x8b"):
            for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
                yield path.relative_to(PROJECT).as_posix(), number, line


def test_the_top_level_is_fixed() -> None:
    assert {path.relative_to(PROJECT).parts[0] for path in FILES} <= ALLOWED | COMPANIONS | HIDDEN


@pytest.mark.parametrize(
    "pattern",
    [
        re.escape(str(PROJECT)),
        r"(?<![\w.~])/(home|root|Users|work)/\w",
        r"(?i)--(extra-)?index-url|pypi\.org|pythonhosted|download\.pytorch",
    ],
    ids=["where it lies now", "someone's folder", "package index"],
)
def test_nothing_of_one_machine(pattern: str) -> None:
    wanted = re.compile(pattern)
    assert not [f"{name}:{number}" for name, number, line in lines() if wanted.search(line)]


def test_files_are_small() -> None:
    assert not [path.name for path in FILES if path.stat().st_size > LARGEST]


def test_no_file_outside_the_schemes_knows_a_scheme() -> None:
    """Else a scheme is not a value but a branch. A paper's name in prose, spelled as there, is no such name."""
    names = re.compile(rf"\b({'|'.join(map(re.escape, registry.names()))})\b")
    assert not [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in lines()
        if name.startswith("megnorm/") and not name.startswith(MAY_NAME_SCHEMES) and names.search(line)
    ]


def test_package_inits_are_empty_or_a_docstring() -> None:
    for name, tree in code("megnorm/"):
        if name.endswith("/__init__.py") and name != "megnorm/__init__.py":
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body), name


def test_no_pickle_and_no_eval() -> None:
    """Files from strangers are never code."""
    hits = []
    for name, tree in code("megnorm/"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                unsafe = {"pickle", "dill", "shelve"} & {module.split(".")[0] for module in modules}
                hits += [f"{name}:{node.lineno}: {module}" for module in unsafe]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "torch.load", "torch.save"}:
                hits.append(f"{name}:{node.lineno}: {ast.unparse(node.func)}")
    assert not hits


def test_scripts_are_strict_and_parse() -> None:
    for path in FILES:
        name = path.relative_to(PROJECT).as_posix()
        if (name.startswith("scripts/") and path.suffix in {".sh", ".sbatch"}) or name == ".ci/run":
            assert re.search(r"^set -e?uo pipefail$", path.read_text(encoding="utf-8"), re.MULTILINE), name
            subprocess.run(["bash", "-n", str(path)], check=True)
