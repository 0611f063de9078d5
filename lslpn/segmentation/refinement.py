"""Refine the boundaries of organs by the grey values of the scan itself.

Registration leaves a boundary some millimetres off, and the network's features are too coarse to
correct that. The middle of an organ is right in most cases, however, and shows the organ's grey
values in this scan. The log-odds of organ n at a voxel x with grey value g(x) are

    o_n(x) = d_n(x) / 8 mm + smooth(log p(g(x) | inside n) - log p(g(x) | near n))

where d_n is the signed distance to the current boundary, positive inside, and the p are histograms,
which are estimated again in each of a few rounds. A voxel is assigned to the organ with the highest
log-odds above 0. Signed distances as the log-odds of a prior are due to

    Pohl et al., "Using the logarithm of odds to define a vector space on probabilistic atlases",
    Medical Image Analysis 2007
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .descriptors import centres
from .frames import Frame

_DISTANCE_MM = 8.0  # distance with the weight of a likelihood ratio of e
_REACH_MM = 25.0  # a boundary moves outwards by no more than this
_CORE_MM = 2.0  # voxels nearer to the boundary are left out of the organ's histogram
_LEAST_CORE = 50  # voxels; with fewer, all voxels of the organ are used
_SMOOTH_MM = 2.5
_BINS = 48
_FLOOR = 0.003  # added to every bin: unseen grey values are not impossible
_LARGEST_RATIO = 3.0  # log-likelihood ratios of single voxels are clipped to this
_ROUNDS = 3
_NEAR_MM = 12.0  # contrast is measured to voxels up to this far outside the organ
OUTSIDE = -_REACH_MM / _DISTANCE_MM - _LARGEST_RATIO  # the lowest log-odds


def refined_logits(
    query: Frame, supports: Sequence[Frame], found: Tensor, values: Sequence[int]
) -> Tensor:
    """Logits [Z, N, h, w] of each organ against the background, with refined boundaries.

    Args:
        query: the scan to segment.
        supports: the labelled scans.
        found: int [Z, h, w] at half the in-plane resolution, 0 or n for the n-th of the values.
        values: the N labels.
    """
    histograms: dict[int, list[np.ndarray]] = {}
    if query.treatment.intensities.hu:  # only CT has a common scale of grey values
        for support in supports:
            grey, cell = support.half
            labels = support.labels_at(centres(grey.shape, support.size)).numpy()
            for number, value in enumerate(values, 1):
                if (labels == value).any():
                    histogram = grey_histogram(grey, labels == value, cell)
                    histograms.setdefault(number, []).append(histogram)
    known = {number: np.mean(each, 0) for number, each in histograms.items()}
    return torch.from_numpy(refined_log_odds(*query.half, found.numpy(), len(values), known))


def contrast(query: Frame, found: Tensor, count: int) -> Tensor:
    """Contrast of each organ to its surroundings, 0 to 1: float64 [count].

    1 - exp(-KL), where KL is the Kullback-Leibler divergence of the grey values near the organ from
    those inside; 0 for an organ that was not found.

    `found` is as for `refined_logits`, with numbers up to `count`.
    """
    grey, cell = query.half
    out = torch.zeros(count, dtype=torch.float64)
    organs = found.numpy()
    for number, box in _boxes(organs, count, _NEAR_MM, cell).items():
        mask, bins = organs[box] == number, _bins(grey[box])
        near = (_signed_distance(mask, cell) > -_NEAR_MM) & ~mask
        if near.any():
            outside = _histogram(bins, near)
            ratio = _log_ratio(_histogram(bins, _core(mask, cell)), outside)
            out[number - 1] = 1 - np.exp(min(0.0, float((outside * ratio).sum())))
    return out


def grey_histogram(grey: np.ndarray, mask: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    """Smoothed histogram of the grey values in the middle of an organ, with sum 1.

    Args:
        grey: [Z, Y, X] in [0, 1].
        mask: bool [Z, Y, X], the organ, at least one voxel.
        cell: mm (z, y, x) of a voxel.
    """
    box = _boxes(mask, 1, 0.0, cell)[1]
    return _histogram(_bins(grey[box]), _core(mask[box], cell))


def refined_log_odds(
    grey: np.ndarray,
    cell: Sequence[float],
    found: np.ndarray,
    count: int,
    known: Mapping[int, np.ndarray],
) -> np.ndarray:
    """Log-odds of each organ against the background, see the equation above.

    Args:
        grey: float32 [Z, Y, X] in [0, 1].
        cell: mm (z, y, x) of a voxel.
        found: int [Z, Y, X], 0 or the number of an organ from 1.
        count: how many organs there are.
        known: maps organs to their `grey_histogram` in the supports, which is averaged with that
            of this scan; need not have all organs.

    Returns:
        float32 [Z, count, Y, X], above 0 inside. An organ that was not found is not added, and one
        whose grey values do not differ from its surroundings hardly changes.
    """
    log_odds = np.full((len(grey), count, *grey.shape[1:]), OUTSIDE, np.float32)
    bins = _bins(grey)
    boxes = _boxes(found, count, _REACH_MM, cell)
    distances = {n: _signed_distance(found[box] == n, cell) for n, box in boxes.items()}
    sigma = [_SMOOTH_MM / mm for mm in cell]
    for _ in range(_ROUNDS):
        for number, box in boxes.items():
            distance, grey_values, mask = distances[number], bins[box], found[box] == number
            if not mask.any():
                continue
            inside = _histogram(grey_values, _core(mask, cell))
            if number in known:
                inside = (inside + known[number]) / 2
            near = _histogram(grey_values, (distance > -_REACH_MM) & ~mask)
            ratio = _log_ratio(inside, near).astype(np.float32)
            prior = distance.clip(-_REACH_MM, _REACH_MM) / _DISTANCE_MM
            new = prior + ndimage.gaussian_filter(ratio[grey_values], sigma)
            new = new if (new > 0).any() else prior
            new[distance <= -_REACH_MM] = OUTSIDE
            log_odds[box[0], number - 1, box[1], box[2]] = new
        found = np.where(log_odds.max(1) > 0, log_odds.argmax(1) + 1, 0)
    return log_odds


def _boxes(
    found: np.ndarray, count: int, margin_mm: float, cell: Sequence[float]
) -> dict[int, tuple[slice, ...]]:
    """Bounding boxes of the organs that were found, enlarged by the margin and a voxel."""
    margin = [math.ceil(margin_mm / mm) + 1 for mm in cell]
    return {
        number: tuple(
            slice(max(0, part.start - more), part.stop + more)
            for part, more in zip(box, margin, strict=True)
        )
        for number, box in enumerate(ndimage.find_objects(found, count), 1)
        if box is not None
    }


def _signed_distance(mask: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    """float32 mm to the boundary, positive inside."""
    inside, outside = (
        ndimage.distance_transform_edt(part, sampling=cell) for part in (mask, ~mask)
    )
    return (inside - outside).astype(np.float32)


def _core(mask: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    """The voxels of an organ that its histogram is taken from."""
    core: np.ndarray = ndimage.distance_transform_edt(mask, sampling=cell) > _CORE_MM
    return core if core.sum() >= _LEAST_CORE else mask


def _bins(grey: np.ndarray) -> np.ndarray:
    return (grey * (_BINS - 1)).round().astype(np.int16).clip(0, _BINS - 1)


def _log_ratio(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.log((inside + _FLOOR) / (outside + _FLOOR))
    return ratio.clip(-_LARGEST_RATIO, _LARGEST_RATIO)


def _histogram(bins: np.ndarray, mask: np.ndarray) -> np.ndarray:
    counts = np.bincount(bins[mask], minlength=_BINS).astype(np.float64)
    smooth: np.ndarray = ndimage.gaussian_filter1d(counts, 1.5, mode="nearest") + 1e-3
    return smooth / smooth.sum()
