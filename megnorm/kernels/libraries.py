"""Optional libraries: found once, when an offer is first asked, and never imported where there is no CUDA device.

Each library's own file says which of its modules and names it uses. A library that imports but lacks a name (another
package of that name, a build without its extensions) is as good as absent, and the reason is kept for the report.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from megnorm.kernels.registry import Need, Refusal


@dataclass(frozen=True)
class Library:
    """distribution: as pip names it. uses: (modules, one of which is enough; names that it must have).

    remedy: how to get it. capability: the least compute capability.
    """

    name: str
    distribution: str
    uses: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    remedy: str
    capability: tuple[int, int] = (8, 0)

    def missing(self) -> Refusal:
        """Why it cannot be used here, or None."""
        return probe(self)[1]

    def module(self, index: int = 0) -> ModuleType:
        """A module of ``uses``. The library must not be missing."""
        modules, reason = probe(self)
        assert reason is None, reason
        return modules[index]

    def version(self) -> str:
        """Of the installed distribution; "-" where there is none."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "-"


_known: dict[str, Library] = {}


def known() -> list[Library]:
    return list(_known.values())


def library(found: Library) -> Library:
    """Register a library for ``megnorm doctor``."""
    _known[found.name] = found
    return found


@cache
def probe(wanted: Library) -> tuple[list[ModuleType], Refusal]:
    """The modules of a library, or why there are none."""
    reason = no_device(wanted.capability)
    if reason is not None:
        return [], reason
    found = []
    for paths, names in wanted.uses:
        module, reason = _first(paths)
        if module is None:
            return [], f"{wanted.name} cannot be imported ({reason}); {wanted.remedy}"
        lacking = [name for name in names if not hasattr(module, name)]
        if lacking:
            return [], f"{module.__name__} has no {', '.join(lacking)}; {wanted.remedy}"
        found.append(module)
    return found, None


def _first(paths: tuple[str, ...]) -> tuple[ModuleType | None, str]:
    reasons = []
    for path in paths:
        try:
            return importlib.import_module(path), ""
        except Exception as error:  # an extension built for another torch raises whatever it likes
            reasons.append(f"{type(error).__name__}: {error}")
    return None, "; ".join(reasons)


@cache
def no_device(capability: tuple[int, int] = (0, 0)) -> Refusal:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    has = torch.cuda.get_device_capability()
    if has < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, this device has {has[0]}.{has[1]}"
    return None


def low_precision(need: Need) -> bool:
    return need.dtype in (torch.bfloat16, torch.float16)


def accepts(fn: Callable[..., Any], *names: str) -> bool:
    """Whether the installed version takes these keywords; one whose signature cannot be read is believed."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return True
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return True
    return all(name in parameters for name in names)


TRITON = library(
    Library(
        "triton",
        "triton",
        ((("triton",), ("jit", "cdiv", "next_power_of_2")), (("triton.language",), ("load", "store", "erf"))),
        "it comes with torch for CUDA, or pip install triton",
        capability=(7, 0),
    )
)


def missing(name: str) -> Refusal:
    return _known[name].missing()
