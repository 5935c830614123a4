"""Finds places for labels beside their points: on no other label, on no point, on no line, inside the frame."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

HEIGHT, CHARACTER_WIDTH = 14.0, 7.4
"""Pixels of a line and of an average character at the plots' font size; a wide font overlaps little."""

DISTANCES = (5.0, 14.0, 26.0, 40.0, 56.0)
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
OUTSIDE, HIDDEN, CROSSED = 20.0, 10.0, 1.0
"""What a square pixel outside the frame, on a label or point, and on a line costs, in pixels of distance."""


class Box(NamedTuple):
    """A rectangle in the drawing's pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, half: float) -> Self:
        """The square around a point."""
        return cls(x - half, y - half, x + half, y + half)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Its point that is nearest to another."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def distance(self, x: float, y: float) -> float:
        """How far a point is from it; 0 inside."""
        return math.dist((x, y), self.nearest(x, y))

    def overlap(self, other: "Box") -> float:
        """Area shared with another."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0


def text_width(text: str) -> float:
    """Pixels that a text takes, about."""
    return len(text) * CHARACTER_WIDTH


def thin_boxes(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """The segments of a line of steps as boxes two pixels wide."""
    return [
        Box(min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1)
        for (ax, ay), (bx, by) in pairwise(corners)
    ]


def place(
    anchors: Sequence[tuple[float, float, str]],
    radius: float,
    frame: Box,
    covers: Sequence[Box],
    lines: Sequence[Box],
) -> list[Box]:
    """A box for each label, one after the other, each where it hides least.

    Args:
        anchors: x, y and text of each label.
        radius: of the points' marks.
        frame: where labels belong.
        covers: what must not be covered.
        lines: what should not be crossed.
    """
    placed: list[Box] = []
    for x, y, text in anchors:
        reach = Box.around(x, y, radius + DISTANCES[-1] + text_width(text))
        near = [box for box in (*covers, *placed) if box.overlap(reach)]

        def cost(box: Box, x: float = x, y: float = y, near: Sequence[Box] = near) -> float:
            outside = (box.right - box.left) * HEIGHT - box.overlap(frame)
            hidden = sum(box.overlap(other) for other in near)
            crossed = sum(box.overlap(line) for line in lines)
            return OUTSIDE * outside + HIDDEN * hidden + CROSSED * crossed + box.distance(x, y)

        placed.append(min(_candidates(x, y, radius, text_width(text)), key=cost))
    return placed


def _candidates(x: float, y: float, radius: float, width: float) -> list[Box]:
    """Where a label could stand: eight directions at growing distances."""
    boxes = []
    for distance in DISTANCES:
        for dx, dy in DIRECTIONS:
            reach = radius + distance * (0.75 if dx and dy else 1.0)
            left = x + dx * (reach + width / 2) - width / 2
            top = y + dy * (reach + HEIGHT / 2 - (2 if dy else 0)) - HEIGHT / 2
            boxes.append(Box(left, top, left + width, top + HEIGHT))
    return boxes
