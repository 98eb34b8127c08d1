"""How the picture looks is judged by eye; here that a bar is as high as its number, and what it stands among."""

import numpy
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from benchmarks.bars import BOUND_INK, DNI, NUMBER_HEIGHT, OTHER, PAD, TORCH, _number_base, draw_bars
from tests.benchmarks.test_rows import a_row

# letters and axes have the greys of the others at their edges; no grey is blue or orange
BLUE, ORANGE = TORCH["InterleavedZeroBubble"], DNI["DNI linear"]


def blue(**changes):
    return a_row("InterleavedZeroBubble", **changes)


def orange(**changes):
    return a_row("DNI", interface="linear", **changes)


def drawn(rows, path):
    draw_bars(rows, path)
    return imread(path)[:, :, :3]


def pixels(picture, colour):
    """Rows and columns of the pixels that are of one colour, below the legend."""
    same = numpy.abs(picture - to_rgb(colour)).max(axis=2) < 0.01
    same[:100] = False
    return numpy.nonzero(same)


def height(picture, colour):
    return int(numpy.ptp(pixels(picture, colour)[0])) + 1


def test_a_bar_is_as_high_as_its_utilisation(tmp_path):
    rows = [blue(utilisation=0.4, bound=None), orange(utilisation=0.8, bound=None)]
    picture = drawn(rows, tmp_path / "new" / "bars.png")
    assert height(picture, ORANGE) / height(picture, BLUE) == pytest.approx(2, rel=0.02)


def test_bars_stand_in_one_order_whatever_that_of_the_rows(tmp_path):
    rows = [a_row(label.split()[0], interface=label.split()[1]) for label in DNI] + [a_row(name) for name in TORCH]
    picture = drawn(rows, tmp_path / "bars.png")
    middles = [numpy.median(pixels(picture, colour)[1]) for colour in (*TORCH.values(), *DNI.values())]
    assert middles == sorted(middles) and len(set(middles)) == 8
    assert (picture == drawn(rows[::-1], tmp_path / "turned.png")).all()


def test_theory_is_a_line_at_its_height(tmp_path):
    bound = drawn([blue(utilisation=0.3, bound=0.9)], tmp_path / "bound.png")
    full = drawn([blue(utilisation=0.9, bound=None)], tmp_path / "full.png")
    line, top = pixels(bound, BOUND_INK)[0], pixels(full, BLUE)[0].min()
    assert line.size and abs(numpy.median(line) - top) <= 2
    assert not pixels(full, BOUND_INK)[0].size


def test_a_refused_schedule_says_so_and_has_no_bar(tmp_path):
    refused = drawn([a_row(), blue(tokens_per_s=None)], tmp_path / "refused.png")
    assert not pixels(refused, BLUE)[0].size
    unknown = drawn([a_row(), blue(utilisation=None, bound=None)], tmp_path / "unknown.png")
    assert (refused != unknown).any()


def test_it_grows_wider_with_its_bars_and_higher_with_its_workloads(tmp_path):
    few = drawn([a_row()], tmp_path / "few.png").shape
    names = [*TORCH, "DNI"]
    many = [a_row(name, count) for count in (4, 8, 16, 32, 64) for name in names]
    assert drawn(many, tmp_path / "many.png").shape[1] > few[1] == 1500
    two = drawn([a_row(), a_row(stages=2)], tmp_path / "two.png").shape
    assert two[0] > 1.5 * few[0] and two[1] == few[1]


def test_a_schedule_without_a_colour_is_drawn_too(tmp_path):
    assert pixels(drawn([a_row(), a_row("Other")], tmp_path / "bars.png"), OTHER)[0].size


def test_a_number_stands_on_its_bar_unless_the_bound_would_strike_it_through():
    assert _number_base(0.5, None) == _number_base(0.5, 0.9) == _number_base(0.5, 0.3) == 0.5 + PAD
    for bound in (0.5, 0.51, 0.5 + PAD + NUMBER_HEIGHT):
        assert _number_base(0.5, bound) == bound + PAD


def test_a_bar_above_one_and_its_number_stay_inside(tmp_path):
    picture = drawn([blue(utilisation=0.5, bound=None), orange(utilisation=1.5, bound=None)], tmp_path / "bars.png")
    assert height(picture, ORANGE) / height(picture, BLUE) == pytest.approx(3, rel=0.02)


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        draw_bars([], tmp_path / "bars.png")
    assert not (tmp_path / "bars.png").exists()
