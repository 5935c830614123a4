"""The plots: the right front, round ticks, and labels that stay apart."""

import random
import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_release import FIGURES

from modelmint.labels import Box, place
from modelmint.plot import FRAME, MAX_LABELS, Aside, Point, front, linear_ticks, log_ticks, scatter

pytestmark = pytest.mark.pure

POSITIVE = st.floats(min_value=1e-6, max_value=1e6)
POINTS = st.lists(st.builds(lambda x, y: point(x, y), POSITIVE, POSITIVE), min_size=1, max_size=30)


def point(x: float, y: float, label: str = "p", *, passed: bool = True) -> Point:
    return Point(x, y, y * 0.04, label, label, passed)


def sample_points(column: int) -> list[Point]:
    return [point(row[column], row[3], name, passed=row[3] < 0.15) for name, row in FIGURES.items()]


def draw(points: list[Point], **options) -> str:
    return scatter(points, title="t", x_title="x", y_title="y", **options)


def test_the_front_of_the_measured_types():
    # Q5_K_M is larger and worse than Q4_K_M, and Q4_0 smaller than Q3_K_M but worse than IQ4_NL at the same size.
    by_size = [found.label for found in front(sample_points(0), higher_x=False)]
    assert by_size == ["IQ4_NL", "Q3_K_M", "Q4_K_M", "Q6_K", "Q8_0"]
    by_speed = [found.label for found in front(sample_points(7), higher_x=True)]
    assert by_speed == ["Q3_K_M", "Q6_K", "Q8_0"]


@given(POINTS, st.booleans())
def test_a_point_is_on_the_front_unless_another_is_at_least_as_good_in_both_and_better_in_one(points, higher_x):
    sign = -1 if higher_x else 1
    kept = {(found.x, found.y) for found in front(points, higher_x=higher_x)}
    for one in points:
        dominated = any(
            sign * other.x <= sign * one.x and other.y <= one.y and (other.x, other.y) != (one.x, one.y)
            for other in points
        )
        assert ((one.x, one.y) in kept) is not dominated


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_equally_spaced_and_inside(low, width):
    ticks = linear_ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    slack = 1e-9 * (abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    gaps = [after - before for before, after in pairwise(ticks)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


def test_logarithmic_ticks_are_one_two_five_or_decades_alone():
    assert log_ticks(-2.5, -0.5) == [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert log_ticks(-4, 0) == [0.0001, 0.001, 0.01, 0.1, 1.0]


def test_labels_cover_no_label_and_no_point():
    generator = random.Random(5)
    anchors = [(generator.uniform(80, 540), generator.uniform(30, 340), "Q4_K_M") for _ in range(25)]
    covers = [Box.around(x, y, 6.5) for x, y, _ in anchors]
    labels = place(anchors, 5.5, FRAME, covers, [])
    assert all(one.overlap(other) == 0 for one, other in combinations(labels, 2))
    assert all(label.overlap(cover) == 0 for label in labels for cover in covers)
    assert all(label.overlap(FRAME) == pytest.approx((label.right - label.left) * 14) for label in labels)


def test_points_at_one_place_get_labels_at_different_places():
    labels = place([(200, 200, "Q4_0"), (200, 200, "IQ4_NL"), (200, 200, "Q4_1")], 5.5, FRAME, [], [])
    assert all(one.overlap(other) == 0 for one, other in combinations(labels, 2))


def test_passed_and_failed_differ_by_shape_and_the_gate_is_drawn():
    drawing = draw(sample_points(0), gate=0.15)
    assert drawing.count('<g class="point passed">') == 5
    assert drawing.count('<g class="point failed">') == 2
    assert drawing.count("<circle") == 5
    assert drawing.count("<path") == 2
    assert ">gate 0.15</text>" in drawing


def test_the_front_is_of_those_that_passed_and_goes_in_steps():
    drawing = draw(sample_points(0))
    line = re.search(r'<polyline class="front" points="([^"]+)"', drawing).group(1)
    corners = [tuple(map(float, corner.split(","))) for corner in line.split()]
    # Q3_K_M, Q4_K_M, Q6_K, Q8_0 with a corner between each two.
    assert len(corners) == 7
    assert all(ax == bx or ay == by for (ax, ay), (bx, by) in pairwise(corners))


@pytest.mark.parametrize(("x", "shown"), [(271, "f16 →"), (20, "← f16"), (120, ">f16<")])
def test_the_base_is_a_line_or_a_word_at_the_edge(x, shown):
    drawing = draw(sample_points(0), aside=Aside(x, "f16"))
    assert shown in drawing
    assert ('class="aside"' in drawing) is (x == 120)


def test_lossless_variants_and_single_ones_can_be_drawn():
    drawing = draw([point(100, 0.0, "F16")])
    assert ">≤ 0.0001<" in drawing
    assert "nan" not in drawing
    assert "front" not in drawing


def test_with_very_many_points_the_front_alone_is_named():
    points = [point(x, 1 / (x + (x % 7) * 3), f"v{x}") for x in range(1, 201)]
    drawing = draw(points)
    assert drawing.count("<circle") == 200
    assert 0 < drawing.count('class="label"') <= MAX_LABELS


def test_everything_drawn_is_escaped():
    drawing = draw([point(1, 0.1, "<b>&"), point(2, 0.2, '"')], aside=Aside(1.5, "<i>"))
    assert "<b>" not in drawing
    assert "<i>" not in drawing
    assert "&lt;b&gt;&amp;" in drawing
