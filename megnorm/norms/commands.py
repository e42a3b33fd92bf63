"""The verb ``megnorm norms``: the table of schemes, a scheme's numbers, its drawing."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megnorm.norms.config import NormConfig
from megnorm.norms.draw import draw
from megnorm.norms.resolve import Resolved, resolve, scheme_of
from megnorm.norms.show import describe
from megnorm.norms.table import Row, rows


@dataclass(frozen=True)
class Shape:
    """Sizes named on the command line."""

    width: int
    heads: int
    kv: int
    ffn: int

    @property
    def hd(self) -> int:
        return self.width // self.heads


def add_norms_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``megnorm norms`` takes."""
    verbs = parser.add_subparsers(dest="norms_verb", metavar="show")
    parser.add_argument("--layers", type=int, default=12, help="depth that the table is computed for")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: heads")
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--kind", default="rmsnorm", help="norm kind")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown, as README has it")
    show = verbs.add_parser("show", help="a scheme's numbers at a depth, and its drawing")
    show.add_argument("scheme", help="a name of the table, or one that a plug-in registers")
    show.add_argument("--layers", type=int, default=12)
    show.add_argument("--kind", default="rmsnorm")
    show.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the scheme")
    show.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file that registers schemes")
    show.add_argument("--json", action="store_true", help="every number of every layer, as models hold it")
    show.add_argument("--draw", type=Path, metavar="OUT.SVG", help="write the block's wiring as SVG")


def run_norms(args: argparse.Namespace, native: Callable[[NormConfig, Resolved], str] | None = None) -> int:
    """Print. native: asked for the Hugging Face class of a config; without it the table has no such column."""
    if args.norms_verb == "show":
        return _show(args)
    shape = Shape(args.width, args.heads, args.kv_heads or args.heads, args.ffn)
    made = rows(shape, args.layers, norm=NormConfig(kind=args.kind), native=native)
    for line in markdown(made) if args.markdown else text(made):
        print(line)
    return 0


def _show(args: argparse.Namespace) -> int:
    options = dict(_option(word) for word in args.option)
    config = NormConfig(args.scheme, options=options, plugins=tuple(args.plugin), kind=args.kind)
    scheme, resolved = scheme_of(config), resolve(config, args.layers)
    lines = [json.dumps(resolved.to_json(), indent=1)] if args.json else describe(scheme, resolved)
    for line in lines:
        print(line)
    if args.draw is not None:
        args.draw.write_text(draw(resolved), encoding="utf-8")
        print(f"drawn in {args.draw}", file=sys.stderr)
    return 0


def _option(word: str) -> tuple[str, Any]:
    """KEY=VALUE with a value as YAML has it: true, false, null, a number, else a word."""
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--option {word}: write KEY=VALUE")
    known = {"true": True, "false": False, "null": None}
    if value in known:
        return key, known[value]
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


HEADINGS = ("scheme", "parameters / layer", "FLOPs / token", "bytes / token", "Hugging Face", "paper", "what it is")


def _cells(made: list[Row]) -> list[tuple[str, ...]]:
    cells = [HEADINGS]
    for row in made:
        numbers = (row.parameters, f"{row.flops:+,}", f"{row.bytes:+,}")
        cells.append((row.name, *numbers, row.native or "", row.paper, row.summary))
    keep = [i for i in range(len(HEADINGS)) if i != 4 or any(row.native for row in made)]
    return [tuple(line[i] for i in keep) for line in cells]


def text(made: list[Row]) -> list[str]:
    """The table in columns for a terminal; all numbers are beyond Pre-LN."""
    cells = _cells(made)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def markdown(made: list[Row]) -> list[str]:
    """The table in Markdown."""
    first, *rest = _cells(made)
    return [f"| {' | '.join(line)} |" for line in (first, tuple("---" for _ in first), *rest)]
