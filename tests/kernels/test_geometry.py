"""Windows, taps and segments of an axis against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strategies import given, grids, st

from lslpn_kernels import GridSpec

lengths = st.integers(1, 200)


def test_paper_size_has_225_windows_of_64_pixels() -> None:
    grid = GridSpec(scale=1 / 8, spacing=1 / 2)
    assert grid.shape(512, 512) == (15, 15)
    axis = grid.axis(512)
    assert (axis.window, axis.step, axis.starts[-1]) == (64, 32, 448)


def test_a_last_window_is_added_where_the_edge_is_not_reached() -> None:
    assert GridSpec(1 / 8).axis(257).starts == (*range(0, 225, 16), 225)


def test_a_fifth_of_forty_is_eight() -> None:
    assert GridSpec(1 / 5).axis(40).window == 8


def test_fractions_may_be_numbers_of_any_type() -> None:
    for scale in (Fraction(1, 8), np.float32(0.125)):
        assert GridSpec(scale) == GridSpec(1 / 8)  # type: ignore[arg-type]


def test_scale_one_is_one_window() -> None:
    assert GridSpec(1).axis(97).starts == (0,)


@given(grids(), lengths)
def test_windows_cover_what_they_say(grid: GridSpec, pixels: int) -> None:
    axis = grid.axis(pixels)
    starts = axis.starts
    assert len(starts) == axis.windows
    assert list(starts) == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] + axis.window == pixels
    most = 0
    for x in range(pixels):
        over = [m for m, s in enumerate(starts) if s <= x < s + axis.window]
        assert over
        assert axis.covering(x) == (over[0], over[-1])
        assert over == list(range(over[0], over[-1] + 1))
        most = max(most, len(over))
    assert axis.overlap == most


@given(lengths, st.integers(1, 40))
def test_taps_are_those_of_interpolate(pixels: int, cells: int) -> None:
    values = torch.randn(cells, dtype=torch.float64)
    expected = F.interpolate(values[None, None, :, None], (pixels, 1), mode="bilinear")
    axis = GridSpec().axis(pixels, cells)
    for x in range(pixels):
        lower, weight = axis.taps(x)
        assert 0 <= lower < cells
        assert 0 <= weight < 1
        assert weight == 0 or lower + 1 < cells
        value = values[lower] * (1 - weight) + values[min(lower + 1, cells - 1)] * weight
        assert math.isclose(value, expected[0, 0, x, 0], rel_tol=1e-12, abs_tol=1e-12)


@given(grids(), lengths, st.integers(1, 40))
def test_all_pixels_of_a_segment_have_the_same_windows_and_taps(
    grid: GridSpec, pixels: int, cells: int
) -> None:
    axis = grid.axis(pixels, cells)
    seen = []
    for s in axis.segments:
        for x in range(s.begin, s.end):
            seen.append(x)
            assert axis.covering(x) == (s.first, s.last)
            lower, weight = axis.taps(x)
            assert s.lower <= lower
            assert lower + (weight > 0) <= s.upper
    assert seen == list(range(pixels))


@pytest.mark.parametrize("name", ["scale", "spacing"])
@pytest.mark.parametrize("value", [0, -1, 1.01, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GridSpec(**{name: value})


@pytest.mark.parametrize("value", ["1/8", None, True])
def test_a_fraction_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="scale"):
        GridSpec(scale=value)  # type: ignore[arg-type]
