"""Draws quality against cost as inline SVG: a logarithmic axis, the Pareto front, the gate, labels that keep apart.

Colours and fonts come from the page by class names, so that one drawing serves light, dark and paper.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from modelmint.labels import Box, place, text_width, thin_boxes

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 14, 52
RADIUS = 5.5
FLOOR = 1e-4
"""Values below have no place on the logarithmic axis and are drawn here: nobody can tell them from lossless."""

MAX_LABELS = 16


class Point(NamedTuple):
    """One variant.

    Attributes:
        x: its cost or speed.
        y: its distance to the reference, on the logarithmic axis; lower is better.
        spread: standard error of `y`.
        label: what is written beside it.
        detail: what a pointer resting on it shows.
        passed: whether its gates passed.
    """

    x: float
    y: float
    spread: float
    label: str
    detail: str
    passed: bool


class Aside(NamedTuple):
    """A value on the x axis to compare with, such as the unquantized base."""

    x: float
    label: str


FRAME = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


class Scale(NamedTuple):
    """Maps values to pixels; the logarithmic one maps their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            value = math.log10(max(value, FLOOR))
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def front(points: Iterable[Point], *, higher_x: bool) -> list[Point]:
    """The Pareto front: the points for which none other is at least as good in both and better in one.

    Args:
        points: the candidates.
        higher_x: whether a higher x is better.

    Returns:
        From the best x to the best y.
    """
    chosen: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x if higher_x else point.x, point.y)):
        if not chosen or point.y < chosen[-1].y:
            chosen.append(point)
    return chosen


def linear_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= about)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10**low to 10**high: 1, 2 and 5 of each decade, or 1 alone where there are many."""
    digits = (1, 2, 5) if high - low <= 2.6 else (1,)
    ticks = [float(f"{digit}e{power}") for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str,
    y_title: str,
    higher_x: bool = False,
    gate: float | None = None,
    aside: Aside | None = None,
) -> str:
    """The drawing of some variants as one ``<svg>`` element.

    Args:
        points: at least one.
        title: what a screen reader says.
        x_title: written under the x axis.
        y_title: written beside the logarithmic y axis.
        higher_x: whether a higher x is better.
        gate: the highest y allowed, where all variants have the same.
        aside: drawn as a line where it lies within the axis, and named at the edge where it does not.
    """
    x, y = _scales(points, gate)
    best = front([point for point in points if point.passed], higher_x=higher_x)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(x, y, x_title, y_title),
        *(_gate(gate, y) if gate is not None else ()),
        *(_aside(aside, x) if aside is not None else ()),
        *_front(best, x, y),
        *(_mark(point, x, y) for point in points),
        *_labels(points, best, x, y, gate, aside),
        "</svg>",
    ]
    return "\n".join(parts)


def _scales(points: Sequence[Point], gate: float | None) -> tuple[Scale, Scale]:
    xs = [point.x for point in points]
    margin = (max(xs) - min(xs)) * 0.09 or max(abs(xs[0]) * 0.1, 1e-9)
    ys = [math.log10(max(value, FLOOR)) for point in points for value in (point.y, point.y + point.spread)]
    if gate is not None:
        ys.append(math.log10(max(gate, FLOOR)))
    room = max((max(ys) - min(ys)) * 0.09, 0.1)
    return (
        Scale(min(xs) - margin, max(xs) + margin, FRAME.left, FRAME.right),
        Scale(min(ys) - 1.6 * room, max(ys) + room, FRAME.bottom, FRAME.top, log=True),
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in linear_ticks(x.low, x.high):
        parts.append(_line("grid", x(tick), FRAME.top, x(tick), FRAME.bottom))
        parts.append(_text("tick", x(tick), FRAME.bottom + 17, f"{tick:g}"))
    for tick in log_ticks(y.low, y.high):
        parts.append(_line("grid", FRAME.left, y(tick), FRAME.right, y(tick)))
        shown = f"≤ {tick:g}" if tick == FLOOR else f"{tick:g}"
        parts.append(_text("tick", FRAME.left - 8, y(tick) + 4.5, shown, "end"))
    middle = (FRAME.top + FRAME.bottom) / 2
    parts.append(_line("axis", FRAME.left, FRAME.bottom, FRAME.right, FRAME.bottom))
    parts.append(_text("title", (FRAME.left + FRAME.right) / 2, HEIGHT - 10, x_title))
    parts.append(f'<g transform="translate(14 {middle:.1f}) rotate(-90)">{_text("title", 0, 0, y_title)}</g>')
    return parts


def _gate(gate: float, y: Scale) -> list[str]:
    level = y(gate)
    width, height = FRAME.right - FRAME.left, level - FRAME.top
    return [
        f'<rect class="beyond" x="{FRAME.left}" y="{FRAME.top}" width="{width:.1f}" height="{height:.1f}"/>',
        _line("gate", FRAME.left, level, FRAME.right, level),
        _text("gate-label", FRAME.right - 6, level - 5, f"gate {gate:g}", "end"),
    ]


def _aside(aside: Aside, x: Scale) -> list[str]:
    place = x(aside.x)
    box = _aside_box(aside, x)
    middle, bottom = (box.left + box.right) / 2, box.bottom - 4
    if place <= FRAME.left:
        return [_text("aside-label", middle, bottom, f"← {aside.label}")]
    if place >= FRAME.right:
        return [_text("aside-label", middle, bottom, f"{aside.label} →")]
    line = _line("aside", place, FRAME.top, place, FRAME.bottom)
    return [line, _text("aside-label", middle, bottom, aside.label)]


def _aside_box(aside: Aside, x: Scale) -> Box:
    """Where its label stands: above the axis, at the line or at the edge beyond which the line would be."""
    width = text_width(aside.label + " ←")
    place = min(max(x(aside.x), FRAME.left), FRAME.right)
    left = place - width - 6 if place > (FRAME.left + FRAME.right) / 2 else place + 6
    return Box(left, FRAME.bottom - 20, left + width, FRAME.bottom - 2)


def _corners(best: Sequence[Point], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """The front as the border of what it dominates: steps, not slopes, for nothing lies between two variants."""
    corners: list[tuple[float, float]] = []
    for point in best:
        if corners:
            corners.append((x(point.x), corners[-1][1]))
        corners.append((x(point.x), y(point.y)))
    return corners


def _front(best: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    corners = _corners(best, x, y)
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)
    return [f'<polyline class="front" points="{path}"/>'] if len(best) > 1 else []


def _mark(point: Point, x: Scale, y: Scale) -> str:
    """A disc for passed, a cross for failed: told apart without colour."""
    px, py = x(point.x), y(point.y)
    kind = "passed" if point.passed else "failed"
    whisker = ""
    if point.spread:
        whisker = _line("whisker", px, y(point.y - point.spread), px, y(point.y + point.spread))
    if point.passed:
        shape = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{RADIUS}"/>'
    else:
        arm = RADIUS - 0.5
        shape = (
            f'<path d="M{px - arm:.1f} {py - arm:.1f}L{px + arm:.1f} {py + arm:.1f}'
            f'M{px - arm:.1f} {py + arm:.1f}L{px + arm:.1f} {py - arm:.1f}"/>'
        )
    return f'<g class="point {kind}"><title>{escape(point.detail)}</title>{whisker}{shape}</g>'


def _labels(
    points: Sequence[Point], best: Sequence[Point], x: Scale, y: Scale, gate: float | None, aside: Aside | None
) -> list[str]:
    """Each label beside its point, with a leader where it had to go far; of very many points only the front's."""
    named = points if len(points) <= MAX_LABELS else best[:MAX_LABELS]
    covers = [Box.around(x(point.x), y(point.y), RADIUS + 1) for point in points]
    lines = thin_boxes(_corners(best, x, y))
    if gate is not None:
        lines.append(Box(FRAME.left, y(gate) - 1, FRAME.right, y(gate) + 1))
        covers.append(Box(FRAME.right - 76, y(gate) - 18, FRAME.right, y(gate) - 3))
    if aside is not None:
        covers.append(_aside_box(aside, x))
    ordered = sorted(named, key=lambda point: (y(point.y), x(point.x), point.label))
    anchors = [(x(point.x), y(point.y), point.label) for point in ordered]
    parts = []
    for point, label in zip(ordered, place(anchors, RADIUS, FRAME, covers, lines), strict=True):
        px, py = x(point.x), y(point.y)
        if label.distance(px, py) > 2 * RADIUS + 2:
            parts.append(_line("leader", px, py, *label.nearest(px, py)))
        parts.append(_text("label", (label.left + label.right) / 2, label.bottom - 3, point.label))
    return parts
