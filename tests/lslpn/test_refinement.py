"""Refinement of organ boundaries by grey values."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from lslpn.segmentation.frames import Frame
from lslpn.segmentation.refinement import OUTSIDE, contrast, grey_histogram, refined_log_odds
from lslpn.segmentation.slice_matching import BEYOND, line_through

CELL = (5.0, 3.0, 3.0)
SHAPE = (24, 40, 40)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """A ball, in mm."""
    places = np.meshgrid(
        *((np.arange(n) + 0.5) * mm for n, mm in zip(SHAPE, CELL, strict=True)), indexing="ij"
    )
    return sum((p - c) ** 2 for p, c in zip(places, centre, strict=True)) < radius**2


def scan(*parts: tuple[np.ndarray, float]) -> np.ndarray:
    """Noise around 0.4, with offsets in some parts."""
    grey = np.random.default_rng(0).normal(0.4, 0.05, SHAPE)
    for where, more in parts:
        grey[where] += more
    return grey.clip(0, 1).astype(np.float32)


def labels(log_odds: np.ndarray) -> np.ndarray:
    return np.where(log_odds.max(1) > 0, log_odds.argmax(1) + 1, 0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_a_boundary_that_is_a_centimetre_off_is_corrected() -> None:
    organ, found = ball((60, 60, 60), 25), ball((66, 54, 66), 25)
    refined = labels(refined_log_odds(scan((organ, 0.2)), CELL, found.astype(int), 1, {}))
    assert dice(found, organ) < 0.7
    assert dice(refined == 1, organ) > 0.95


def test_neighbours_of_other_grey_values_are_separated() -> None:
    one, other = ball((60, 40, 60), 20), ball((60, 80, 60), 20)
    found = np.zeros(SHAPE, int)
    found[ball((60, 46, 60), 20)] = 1
    found[ball((60, 86, 60), 20)] = 2
    refined = labels(refined_log_odds(scan((one, 0.2), (other, -0.2)), CELL, found, 2, {}))
    assert dice(refined == 1, one) > 0.95
    assert dice(refined == 2, other) > 0.95


def test_an_organ_without_contrast_is_unchanged() -> None:
    found = ball((60, 60, 60), 20)
    refined = labels(refined_log_odds(scan(), CELL, found.astype(int), 1, {}))
    assert dice(refined == 1, found) > 0.9


def test_histograms_of_the_supports_correct_an_organ_that_is_mostly_off() -> None:
    """Most of the initial mask is outside the organ, so this scan's histogram is not enough."""
    organ, found = ball((60, 60, 60), 18), ball((60, 60, 80), 18)
    grey = scan((organ, 0.2))
    known = {1: grey_histogram(grey, organ, CELL)}
    alone, helped = (
        labels(refined_log_odds(grey, CELL, found.astype(int), 1, k)) for k in ({}, known)
    )
    assert dice(helped == 1, organ) > dice(alone == 1, organ) + 0.1


def test_contrast_is_measured_to_the_surroundings_of_an_organ() -> None:
    organ, other = ball((60, 40, 60), 20), ball((60, 90, 60), 20)
    grey = torch.from_numpy(scan((organ, 0.3), (other, 0.05)))
    size = (24 * 5.0, 40 * 3.0, 40 * 3.0)
    doubled = grey.repeat_interleave(2, 1).repeat_interleave(2, 2)  # `half` averages them again
    frame = Frame(doubled, size, *[cast(Any, None)] * 7)
    found = torch.zeros(SHAPE, dtype=torch.int64)
    found[torch.from_numpy(organ)], found[torch.from_numpy(other)] = 1, 2
    found[20:22, 2:10, 2:10] = 4  # noise, like its surroundings
    clear, faint, absent, none = contrast(frame, found, 4).tolist()
    assert 0.8 < clear < 1
    assert 0.05 < faint < 0.7 * clear
    assert absent == 0
    assert none < 0.1


@pytest.mark.parametrize("voxels", [0, 1])
def test_an_organ_of_no_or_one_voxel_is_unchanged(voxels: int) -> None:
    found = np.zeros(SHAPE, int)
    found[12, 20, 20] = 2 * voxels
    log_odds = refined_log_odds(scan(), CELL, found, 2, {})
    assert log_odds.shape == (24, 2, 40, 40)
    assert (log_odds[:, 0] == OUTSIDE).all()
    assert bool((log_odds[:, 1] > 0).any()) == bool(voxels)


def test_a_line_through_matched_slices_ignores_outliers() -> None:
    match = 10 + np.arange(40)
    match[:8] = 17
    match[36:] = BEYOND
    scale, shift = line_through(match, 5.0, 4.0) or (0.0, 0.0)
    assert scale == pytest.approx(0.8, abs=0.02)
    assert shift == pytest.approx(40.0, abs=1.0)
    assert line_through(np.full(40, BEYOND), 5.0, 4.0) is None
