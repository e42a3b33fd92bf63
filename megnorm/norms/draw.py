"""A scheme's wiring as SVG, drawn from its resolved declaration; data flows upwards.

Grey boxes are matrices and attention, blue ones norms, green circles factors. What stands on the left line is done to
the residual stream itself; what stands in the right column belongs to a branch; a red line is a second stream, the
weights of streams that tokens mix, or a skip of its own. Layers wired differently get a panel each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import Attention, Norm, Scale, SubLayer
from megnorm.norms.show import Group, groups, span
from megnorm.norms.table import norms, outside, sublayers

STREAM, BRANCH, PANEL = 96.0, 262.0, 440.0
SECOND = 26.0  # the second stream, or what else passes by on the left
HEADS = {"q": BRANCH - 66, "k": BRANCH, "v": BRANCH + 66}
STEP, BOX = 36.0, 22.0
KINDS = {"layernorm": "LN", "rmsnorm": "RMS", "l2": "L2", "scalenorm": "Scale", "dyt": "DyT", "derf": "Derf"}
KINDS["seednorm"] = "SeeD"
STYLE = """
  text { font: 12px Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #1a1a1a; text-anchor: middle; }
  .small { font-size: 10px; } .left { text-anchor: start; } .right { text-anchor: end; } .title { font-weight: bold; }
  .quiet { fill: #6b6b6b; }
  .wire { stroke: #1a1a1a; stroke-width: 1.4; fill: none; stroke-linejoin: round; }
  .extra { stroke: #b0492f; } .dot { fill: #1a1a1a; }
  .norm { fill: #cfe0f5; stroke: #2f5d9b; } .matrix { fill: #ececec; stroke: #7a7a7a; }
  .scale { fill: #d8eed3; stroke: #3b7d32; } .add { fill: #ffffff; stroke: #1a1a1a; stroke-width: 1.4; }
  .frame { fill: #fafafa; stroke: #c4c4c4; stroke-dasharray: 3 3; }
"""


@dataclass
class Panel:
    """A drawing that grows upwards: y falls from 0. Shapes lie above wires, wires above frames.

    mixed: the scheme has norms of several kinds, so each is drawn with its kind.
    """

    mixed: bool = False
    y: float = 0.0
    frames: list[str] = field(default_factory=list)
    wires: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def wire(self, *points: tuple[float, float], arrow: bool = False, extra: bool = False) -> None:
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        head = ' marker-end="url(#arrow)"' if arrow else ""
        self.wires.append(f'<path class="wire{" extra" if extra else ""}" d="{path}"{head}/>')

    def text(self, x: float, y: float, words: str, style: str = "") -> None:
        """``words``: plain text, or "W_q" for a letter with a subscript, "W_up|, more" with words after it."""
        letter, mark, low = words.partition("_")
        body = escape(words)
        if mark and len(letter) == 1:
            low, _, tail = low.partition("|")
            body = f'<tspan font-style="italic">{letter}</tspan><tspan dy="3" font-size="9">{escape(low)}</tspan>'
            body += f'<tspan dy="-3">{escape(tail)}</tspan>' if tail else ""
        self.shapes.append(f'<text class="{style}" x="{x:g}" y="{y + 4:g}">{body}</text>')

    def box(self, x: float, y: float, words: str, kind: str, width: float = 84.0) -> None:
        self.shapes.append(
            f'<rect class="{kind}" x="{x - width / 2:g}" y="{y - BOX / 2:g}" width="{width:g}" height="{BOX:g}"'
            ' rx="4"/>'
        )
        self.text(x, y, words)

    def factor(self, x: float, y: float, words: str, style: str) -> None:
        """A multiplication, its factor written beside it."""
        self.shapes.append(f'<circle class="scale" cx="{x:g}" cy="{y:g}" r="9"/>')
        self.text(x, y, "\u00d7")
        self.text(x + (-14 if "right" in style else 14), y, words, f"small {style}")

    def name(self, norm: Norm) -> str:
        return KINDS[str(norm.kind)] if self.mixed else "Norm"

    def add(self, y: float, x: float = STREAM) -> None:
        self.shapes.append(f'<circle class="add" cx="{x:g}" cy="{y:g}" r="9"/>')
        self.shapes.append(f'<path class="wire" d="M{x - 5:g} {y:g} h10 M{x:g} {y - 5:g} v10"/>')

    def dot(self, x: float, y: float) -> None:
        self.shapes.append(f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="2.6"/>')


def draw(resolved: Resolved) -> str:
    """The SVG text: a panel for the whole stack, then one for each kind of layer."""
    mixed = len(set(_kinds(resolved))) > 1
    panels = [_layer(group, len(resolved.layers), mixed) for group in groups(resolved)]
    top = min(panel.y for panel in panels) - 44
    stack = _stack(resolved, mixed)
    width, height = 150 + PANEL * len(panels), 24 - min(top, stack.y - 44)
    parts = [_place(stack, 0.0, (top - stack.y + 44) / 2)]
    parts += [_place(panel, 150 + PANEL * i) for i, panel in enumerate(panels)]
    title = f"{escape(resolved.scheme)}, {len(resolved.layers)} layers"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {24 - height:g} {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{title}">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0.8 L8 4 L0 7.2 z" fill="#1a1a1a"/></marker></defs>\n'
        f'<rect x="0" y="{24 - height:g}" width="{width:g}" height="{height:g}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _place(panel: Panel, x: float, y: float = 0.0) -> str:
    return "\n".join([f'<g transform="translate({x:g} {y:g})">', *panel.frames, *panel.wires, *panel.shapes, "</g>"])


def _kinds(resolved: Resolved) -> Iterator[str]:
    yield from (str(norm.kind) for _, norm in outside(resolved))
    for layer in resolved.layers:
        for _, sub in sublayers(layer):
            yield from (str(norm.kind) for _, norm in norms(sub))


def _stack(resolved: Resolved, mixed: bool) -> Panel:
    """Embedding, layers, final norm, head: a column on the left."""
    panel, x, y = Panel(mixed), 68.0, -12.0
    boxes = [("embedding", "matrix")]
    boxes += [(panel.name(resolved.embedding), "norm")] if resolved.embedding is not None else []
    boxes += [(group.title, "layers") for group in groups(resolved)]
    ends = resolved.streams
    for name, norm in (("X", ends.x), ("Y", ends.y)) if ends is not None else ():
        boxes += [(f"{name}: {panel.name(norm)}", "norm")] if norm is not None else []
    if ends is not None and ends.exit is not None:
        boxes += [(f"weights: {panel.name(ends.exit.norm)}", "norm")]  # type: ignore[arg-type]
    if ends is not None:
        boxes += [(f"sum of {ends.mixed}" if ends.mixed else "X + Y", "add")]
    boxes += [(panel.name(resolved.final), "norm")] if resolved.final is not None else []
    boxes += [("head", "matrix")]
    for i, (words, kind) in enumerate(boxes):
        if i:
            panel.wire((x, y + STEP - BOX / 2), (x, y + BOX / 2), arrow=True)
        panel.box(x, y, words, "add" if kind == "layers" else kind, 108)
        y -= STEP
    panel.text(x, y + 2, resolved.scheme, "title")
    panel.y = y
    return panel


def _layer(group: Group, depth: int, mixed: bool) -> Panel:
    panel = Panel(mixed)
    start = panel.y
    panel.text(STREAM, 12, "layer input", "small quiet")
    panel.y -= 8
    for i, (name, _) in enumerate(sublayers(group.layers[0])):
        subs = [sublayers(layer)[i][1] for layer in group.layers]
        _sublayer(panel, name, subs, start)
    panel.wire((STREAM, panel.y + 8), (STREAM, panel.y - 14), arrow=True)
    panel.y -= 16
    panel.text(STREAM, panel.y - 8, "layer output", "small quiet")
    if len(group.layers) < depth:
        panel.text(BRANCH, panel.y - 8, group.title, "title")
    return panel


def _sublayer(panel: Panel, name: str, subs: Sequence[SubLayer], layer_start: float) -> None:
    """A sub-layer: the branch from its tap on the stream, and the stream beside it up to the add and a post norm."""
    sub, begin = subs[0], panel.y
    if sub.residual.source == "input":
        panel.wire((STREAM, begin + 8), (STREAM, begin - STEP))
        _norm(panel, STREAM, begin - 22, [s.input for s in subs], "right")
        panel.y = begin - STEP - 4
    if sub.second is not None and sub.second.start is not None:
        panel.wire((STREAM, begin + 8), (STREAM, begin - STEP))
        _norm(panel, STREAM, begin - 22, [s.second.start for s in subs if s.second is not None], "right")
        panel.y = begin - STEP - 4
    tap = panel.y - 6
    panel.dot(STREAM, tap)
    if sub.mix is not None:
        _weights(panel, subs, tap)
    _branch(panel, name, subs, tap)
    join = panel.y - 12
    panel.wire((BRANCH, panel.y), (BRANCH, join), (STREAM + 10, join), arrow=True)
    panel.wire((STREAM, begin + 8), (STREAM, join + 10), arrow=True)
    gated = "" if sub.residual.gate is None else sub.residual.gate.on
    words = [*(["gate"] if gated == "skip" else []), *filter(None, [_factor_words([s.residual.skip for s in subs])])]
    if words:
        panel.factor(STREAM, (tap + join) / 2, ", ".join(words), "right")
    if sub.residual.layer_input:
        low = layer_start - 2
        panel.dot(STREAM, low)
        panel.wire((STREAM, low), (SECOND, low), (SECOND, join), (STREAM - 10, join), arrow=True, extra=True)
    panel.add(join)
    panel.y = join - 10
    if gated == "stream":
        panel.wire((STREAM, panel.y), (STREAM, panel.y - STEP))
        panel.factor(STREAM, panel.y - STEP / 2, "gate", "right")
        panel.y -= STEP
    if sub.post is not None:
        panel.wire((STREAM, panel.y), (STREAM, panel.y - STEP))
        _norm(panel, STREAM, panel.y - 20, [s.post for s in subs], "right")
        panel.y -= STEP
    panel.wire((STREAM, panel.y), (STREAM, panel.y - 10))
    panel.y -= 10
    if sub.second is not None:
        panel.wire((SECOND, begin + 8), (SECOND, panel.y), extra=True)


def _branch(panel: Panel, name: str, subs: Sequence[SubLayer], tap: float) -> None:
    """The branch column, from the stream at ``tap`` up to its factor; its frame holds what the branch normalizes."""
    sub = subs[0]
    panel.y = tap - 14
    bottom = panel.y + 8
    panel.wire((STREAM, tap), (BRANCH, tap), (BRANCH, panel.y))
    if sub.second is not None and sub.second.read is not None:
        _read(panel, subs)
    if sub.mix is not None:
        _step(panel, lambda y: panel.factor(BRANCH, y, "read", "left"))
    if sub.input is not None and sub.residual.source == "stream":
        _step(panel, lambda y: _norm(panel, BRANCH, y, [s.input for s in subs], "left"))
    (_attention if isinstance(sub, Attention) else _ffn)(panel, subs)
    if sub.output is not None:
        _step(panel, lambda y: _norm(panel, BRANCH, y, [s.output for s in subs], "left"))
    _frame(panel, name, bottom, panel.y - 2)
    if sub.second is not None:
        _step(panel, lambda y: _write(panel, subs, y))
    words = "write" if sub.mix is not None else _factor_words([s.residual.branch for s in subs])
    if words:
        _step(panel, lambda y: panel.factor(BRANCH, y, words, "left"))


def _weights(panel: Panel, subs: Sequence[SubLayer], tap: float) -> None:
    """The weights that tokens give their streams, and the mixing of these; "read" and "write" stand in the branch."""
    norms = [s.mix.norm for s in subs if s.mix is not None]
    top = tap - 22 - STEP
    panel.wire((STREAM, tap), (SECOND, tap), (SECOND, top), (STREAM - 10, top), arrow=True, extra=True)
    panel.box(SECOND, tap - 22, panel.name(norms[0]), "norm", 44)  # type: ignore[arg-type]
    panel.box(SECOND, top, "weights", "matrix", 50)
    panel.factor(STREAM, top, "mix", "left")


def _read(panel: Panel, subs: Sequence[SubLayer]) -> None:
    """What the branch reads: X, with a factor or none, and the norm of the second stream."""
    seconds = [s.second for s in subs if s.second is not None]
    words = _factor_words([second.share for second in seconds])
    if words:
        _step(panel, lambda y: panel.factor(BRANCH, y, words, "left"))

    def place(y: float) -> None:
        panel.wire((SECOND, y), (168, y), arrow=True, extra=True)
        panel.box(200, y, panel.name(seconds[0].read), "norm", 60)  # type: ignore[arg-type]
        panel.wire((230, y), (BRANCH - 10, y), arrow=True)
        panel.add(y, BRANCH)

    _step(panel, place)


def _write(panel: Panel, subs: Sequence[SubLayer], y: float) -> None:
    """The branch on its way to the second stream, before the factor that the first one sees."""
    words = _span([s.second.write for s in subs if s.second is not None])
    panel.dot(BRANCH, y)
    panel.wire((BRANCH, y), (SECOND + 1, y), arrow=True, extra=True)
    panel.text(SECOND - 6, y, f"+ {words if words != '1' else ''}", "small right quiet")


def _step(panel: Panel, place: Callable[[float], None]) -> None:
    """One more element in the branch column, with its wire."""
    panel.wire((BRANCH, panel.y), (BRANCH, panel.y - STEP))
    place(panel.y - STEP / 2)
    panel.y -= STEP


def _attention(panel: Panel, subs: Sequence[SubLayer]) -> None:
    first = subs[0]
    assert isinstance(first, Attention)
    bus = panel.y
    normed = any(getattr(first, part) is not None for part in HEADS)
    scaled = any(norm is not None and norm.scale != 1.0 for norm in (getattr(first, part) for part in HEADS))
    top = bus - STEP * (2 if normed else 1) - (14 if scaled else 6)
    panel.wire((HEADS["q"], bus), (HEADS["v"], bus))
    for part, x in HEADS.items():
        panel.wire((x, bus), (x, top))
        panel.box(x, bus - 20, f"W_{part}", "matrix", 44)
        norm = getattr(first, part)
        if norm is not None:
            panel.box(x, bus - 20 - STEP, panel.name(norm), "norm", 50)
            if norm.scale != 1.0:
                panel.text(x + 4, bus - 20 - STEP * 1.45, f"\u00d7 {norm.scale:.4g}", "small left")
    if normed:
        marks = {_over(getattr(first, part)) for part in HEADS if getattr(first, part) is not None}
        panel.text(HEADS["v"] + 30, bus - 20 - STEP, " / ".join(sorted(marks)), "small left quiet")
    panel.box(BRANCH, top - BOX / 2, "softmax attention", "matrix", 176)
    panel.y = top - BOX
    if first.context is not None:
        _step(panel, lambda y: _norm(panel, BRANCH, y, [s.context for s in subs if isinstance(s, Attention)], "left"))
    if first.head_scale == "pre_projection":
        _step(panel, lambda y: panel.factor(BRANCH, y, "per head, learned", "left"))
    _step(panel, lambda y: panel.box(BRANCH, y, "W_o", "matrix"))
    if first.head_scale == "post_projection":
        _step(panel, lambda y: panel.factor(BRANCH, y, "per head, learned", "left"))


def _ffn(panel: Panel, subs: Sequence[SubLayer]) -> None:
    inner = [getattr(sub, "inner", None) for sub in subs]
    _step(panel, lambda y: panel.box(BRANCH, y, "W_up|, activation", "matrix", 120))
    if inner[0] is not None:
        _step(panel, lambda y: _norm(panel, BRANCH, y, inner, "left"))
    _step(panel, lambda y: panel.box(BRANCH, y, "W_down", "matrix"))


def _frame(panel: Panel, name: str, bottom: float, top: float) -> None:
    x, width = BRANCH - 104, 264.0
    panel.frames.append(
        f'<rect class="frame" x="{x:g}" y="{top:g}" width="{width:g}" height="{bottom - top:g}" rx="8"/>'
    )
    words, middle = {"ffn": "feed-forward"}.get(name, name), (bottom + top) / 2
    panel.shapes.append(f'<g transform="translate({x + width + 8:g} {middle:g}) rotate(-90)">')
    panel.text(0, 0, words, "small quiet")
    panel.shapes.append("</g>")


def _over(norm: Norm) -> str:
    return "per head" if norm.over == "head" else "full width"


def _norm(panel: Panel, x: float, y: float, found: Sequence[Norm | None], side: str) -> None:
    """A norm, with its constant factor or initial gain beside it."""
    present = [norm for norm in found if norm is not None]
    panel.box(x, y, panel.name(present[0]), "norm", 66)
    words = []
    if any(norm.scale != 1.0 for norm in present):
        words.append(f"\u00d7 {_span([norm.scale for norm in present])}")
    if any(norm.weight_init != 1.0 for norm in present):
        words.append(f"gain from {_span([norm.weight_init for norm in present])}")
    if words:
        panel.text(x + (-40 if side == "right" else 40), y, ", ".join(words), f"small {side}")


def _factor_words(found: Sequence[Scale]) -> str:
    """What is written beside a factor; "" for a constant 1."""
    scale, values = found[0], [item.value for item in found]
    if scale.warmup:
        return f"0 to {_span(values)} in {_span([item.warmup for item in found])} steps"
    if scale.learned is None:
        return "" if all(value == 1.0 for value in values) else _span(values)
    shape = "vector" if scale.learned == "width" else "scalar"
    return f"{shape} from {_span(values)}" + (", shared" if scale.shared else "")


def _span(values: Sequence[object]) -> str:
    return span([f"{float(value):.4g}" for value in values]).replace(" .. ", " \u2026 ")  # type: ignore[arg-type]
