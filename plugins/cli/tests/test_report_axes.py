"""Axes: what they show, and ticks at round values."""

import itertools
import math

import pytest
from hypothesis import assume, given, strategies as st

from tunerkit_cli.report.html.charts import fitted

values = st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=9)
positive = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9)


def text_value(text: str) -> float:
    return float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))


@given(values, st.booleans())
def test_a_linear_axis_shows_all_values_in_their_order(values: list[float], from_zero: bool) -> None:
    """Places lie within the axis and grow with the values; a few ticks stand at round values."""
    axis = fitted(values, from_zero=from_zero)
    places = [axis.place(value) for value in sorted(values)]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(-1e-6 <= place <= 100 + 1e-6 for place, _ in ticks)
    assert len({place for place, _ in ticks}) == len(ticks)
    if from_zero and min(values) >= 0:
        assert axis.place(0.0) >= 0


@given(positive)
def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances(values: list[float]) -> None:
    """All values are on it, and its ticks are labelled with what stands there."""
    axis = fitted(values, is_log=True)
    assert all(0 <= axis.place(value) <= 100 for value in values)
    middle = math.sqrt(axis.low * axis.high)
    assert axis.place(middle) == pytest.approx(50)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 30
    for place, text in ticks:
        assert axis.place(text_value(text)) == pytest.approx(place, abs=2)


@given(values)
def test_ticks_are_evenly_spaced(values: list[float]) -> None:
    """On a linear axis."""
    places = [place for place, _ in fitted(values).ticks()]
    assume(len(places) > 2)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3, abs=1e-3)
