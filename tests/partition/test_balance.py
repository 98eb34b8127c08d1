"""The split against every possible split."""

import itertools
import math
import random

import pytest

from dnipipe.partition import balanced_cuts


def _stages(numbers, cuts):
    return [sum(numbers[a:b]) for a, b in itertools.pairwise([0, *cuts, len(numbers)])]


def _dearest(costs, cuts, extra=0):
    *before, last = _stages(costs, cuts)
    return max([cost + extra for cost in before] + [last])


def _every_split(costs, num_stages):
    return itertools.combinations(range(1, len(costs)), num_stages - 1)


def _dearest_of_the_best_split(costs, num_stages, extra=0):
    return min(_dearest(costs, cuts, extra) for cuts in _every_split(costs, num_stages))


def _drawn(draw, largest):
    costs = [draw.randint(0, largest) for _ in range(draw.randint(1, 9))]
    return costs, draw.randint(1, len(costs))


@pytest.mark.parametrize("largest", [0, 1, 3, 20, 1000])
def test_no_split_is_better(largest):
    draw = random.Random(largest)
    for _ in range(150):
        costs, num_stages = _drawn(draw, largest)
        cuts = balanced_cuts(costs, num_stages)
        assert len(cuts) == num_stages - 1
        assert all(a < b for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        assert _dearest(costs, cuts) == _dearest_of_the_best_split(costs, num_stages), (costs, num_stages, cuts)


@pytest.mark.parametrize("largest", [0, 1, 3, 20, 1000])
def test_no_split_is_better_where_every_stage_but_the_last_costs_extra(largest):
    draw = random.Random(largest)
    for _ in range(150):
        costs, num_stages = _drawn(draw, largest)
        extra = draw.choice([1, draw.randint(0, 2 * largest + 1), 10 * largest])
        cuts = balanced_cuts(costs, num_stages, extra=extra)
        best = _dearest_of_the_best_split(costs, num_stages, extra)
        assert _dearest(costs, cuts, extra) == best, (costs, num_stages, extra, cuts)


@pytest.mark.parametrize("largest", [0, 1, 3, 20, 1000])
def test_no_split_that_fits_is_better_and_none_is_refused_that_fits(largest):
    draw, outcomes = random.Random(largest), []
    for _ in range(200):
        costs, num_stages = _drawn(draw, largest)
        sizes = [draw.randint(0, 9) for _ in costs]
        extra, max_size = draw.choice([0, draw.randint(0, 2 * largest)]), draw.randint(0, max(1, sum(sizes)))
        case = (costs, num_stages, extra, sizes, max_size)
        fit = [cuts for cuts in _every_split(costs, num_stages) if max(_stages(sizes, cuts)) <= max_size]
        outcomes.append(bool(fit))
        if fit:
            cuts = balanced_cuts(costs, num_stages, extra=extra, sizes=sizes, max_size=max_size)
            assert len(cuts) == num_stages - 1 and max(_stages(sizes, cuts)) <= max_size, (case, cuts)
            assert _dearest(costs, cuts, extra) == min(_dearest(costs, each, extra) for each in fit), (case, cuts)
        else:
            needed = _dearest_of_the_best_split(sizes, num_stages)
            found = f"of size {needed} or more in every split, and max_size = {max_size}: "
            with pytest.raises(ValueError, match=found):
                balanced_cuts(costs, num_stages, extra=extra, sizes=sizes, max_size=max_size)
    assert outcomes.count(True) > 50 and outcomes.count(False) > 50


def test_fractions_are_as_good_as_whole_numbers():
    draw = random.Random(0)
    for _ in range(100):
        costs = [draw.random() for _ in range(9)]
        for extra in (0.0, draw.random()):
            best = _dearest_of_the_best_split(costs, 4, extra)
            assert _dearest(costs, balanced_cuts(costs, 4, extra=extra), extra) == pytest.approx(best)


def test_equal_layers_are_dealt_out_evenly():
    assert balanced_cuts([1] * 12, 4) == [3, 6, 9]


def test_the_last_stage_takes_more_layers_where_the_others_predict():
    assert balanced_cuts([1] * 12, 3, extra=3) == [3, 6]
    assert balanced_cuts([1, 1], 1, extra=3) == []


def test_a_thousand_layers_are_split_at_once():
    assert len(balanced_cuts([1.0] * 1000, 16, extra=1.0, sizes=[1] * 1000, max_size=70)) == 15


def test_sizes_without_a_limit_change_nothing():
    assert balanced_cuts([1] * 12, 4, sizes=[100] + [0] * 11) == [3, 6, 9]


def test_where_nothing_fits_the_cure_is_more_stages_and_it_cures():
    sizes = [4, 4, 3, 5, 2]
    with pytest.raises(ValueError, match="of 2 stages .* size 10 or more .* max_size = 8: use more stages"):
        balanced_cuts([1] * 5, 2, sizes=sizes, max_size=8)
    assert max(_stages(sizes, balanced_cuts([1] * 5, 3, sizes=sizes, max_size=8))) <= 8


def test_a_layer_that_is_too_large_by_itself_is_named():
    with pytest.raises(
        ValueError, match="size 9 or more .* = 8: layer 1 alone is of size 9, so more stages do not help"
    ):
        balanced_cuts([1] * 3, 3, sizes=[4, 9, 3], max_size=8)


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf])
def test_an_impossible_number_is_refused(number):
    with pytest.raises(ValueError, match="the cost of layer 1"):
        balanced_cuts([1.0, number], 1)
    with pytest.raises(ValueError, match="the size of layer 1"):
        balanced_cuts([1.0, 1.0], 1, sizes=[1, number])
    with pytest.raises(ValueError, match=f"extra = {number}"):
        balanced_cuts([1.0, 1.0], 1, extra=number)
    if number != math.inf:
        with pytest.raises(ValueError, match=f"max_size = {number}; it must be"):
            balanced_cuts([1.0, 1.0], 1, sizes=[1, 1], max_size=number)


def test_a_limit_without_sizes_and_sizes_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="max_size = 3 limits nothing without sizes"):
        balanced_cuts([1.0], 1, max_size=3)
    with pytest.raises(ValueError, match="sizes has 1 numbers, costs has 2"):
        balanced_cuts([1.0, 1.0], 1, sizes=[1])
