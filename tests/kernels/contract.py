"""Recorded signatures of the libraries' functions (contracts/*.json), and whether a call binds to them."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "contracts"
KINDS = {
    kind: getattr(inspect.Parameter, kind)
    for kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")
}
UNSTABLE = "differs"  # between the release and the development version: to be called by keyword


def entries() -> dict[str, dict[str, Any]]:
    """Every recorded entry by its public path."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        found.update(json.loads(path.read_text())["entries"])
    return found


ENTRIES = entries()


def signature(name: str, method: str | None = None) -> inspect.Signature:
    record = ENTRIES[name]["methods"][method] if method else ENTRIES[name]
    return inspect.Signature(
        [
            inspect.Parameter(p["name"], KINDS[p["kind"]], default=p.get("default", inspect.Parameter.empty))
            for p in record["parameters"]
        ]
    )


def bind(
    name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, method: str | None = None
) -> dict[str, Any]:
    """The arguments of a call by name. Raises TypeError where the library would, or would swallow a keyword."""
    bound = signature(name, method).bind(*args, **(kwargs or {}))
    swallowed: dict[str, Any] = {}
    for key in list(bound.arguments):
        if bound.signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            swallowed = bound.arguments.pop(key)
    allowed = ENTRIES[name].get("var_keyword_allowed") or ENTRIES[name].get("keyword_only_extras") or ()
    if set(swallowed) - set(allowed):
        raise TypeError(f"{name} would swallow {sorted(set(swallowed) - set(allowed))}")
    return {**bound.arguments, **swallowed}
