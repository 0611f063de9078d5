"""Move the outlines of organs to where the grey values of the scan itself change.

Registration leaves an outline some millimetres off, and features of the network lie too far apart
to mend that. What was found is right in the middle of an organ, though, which tells the organ's
grey values in this very scan. The log-odds of organ n at a voxel x with grey value g(x) are

    o_n(x) = d_n(x) / 8 mm + smooth(log p(g(x) | in n) - log p(g(x) | near n))

where d_n is the signed distance to the outline that was found, positive inside, and p are
histograms, taken anew in each of a few rounds. A voxel goes to the organ of the highest odds above
0. Log-odds of signed distances as a prior are those of

    Pohl et al., "Using the logarithm of odds to define a vector space on probabilistic atlases",
    Medical Image Analysis 2007
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..config import ModelConfig
from ..data.volumes import Volume
from .frames import Frame, frames_of, restored, restored_probabilities, values_of
from .registration import centres

_DISTANCE_MM = 8.0  # what counts as much as grey values that are e times as likely
_REACH_MM = 25.0  # how far off its outline an organ may lie
_CORE_MM = 2.0  # voxels nearer to the outline do not tell the organ's grey values
_LEAST_CORE = 50  # voxels; of smaller organs all voxels tell
_SMOOTH_MM = 2.5
_BINS = 48
_FLOOR = 0.003  # added to every bin: grey values that were never seen are not impossible
_MOST_EVIDENCE = 3.0  # what one voxel's grey value adds to the odds or takes off at most
_ROUNDS = 3
OUTSIDE = -_REACH_MM / _DISTANCE_MM - _MOST_EVIDENCE  # the lowest odds


def redrawn(
    config: ModelConfig,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    labels: np.ndarray,
    *,
    probabilities: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels that were found slice by slice, once their outlines have moved.

    Args:
        config: of the model.
        supports: pairs of an image and its labels.
        query: the scan.
        labels: [Z, Y, X] in the frame of its data, with values of the supports' labels.
        probabilities: work them out as well.

    Returns:
        labels as they were given; and probabilities, see `restored_probabilities`, or None.
    """
    frames, target = frames_of(config, supports, query)
    values = values_of(frames)
    places = centres(_grey(target)[0].shape, target.size)
    at = replace(target, labels=labels).labels_at(places)
    found = torch.stack([at == value for value in (0, *values)]).byte().argmax(0)
    # What supports show is left out: of labels found slice by slice it takes off too much.
    leads = redrawn_leads(target, (), found, values)
    shares = restored_probabilities(target, leads) if probabilities else None
    return restored(target, leads, values), shares


def redrawn_leads(
    query: Frame, supports: Sequence[Frame], found: Tensor, values: Sequence[int]
) -> Tensor:
    """Leads [Z, N, h, w] once outlines have moved to where the query's grey values change.

    Args:
        query: the scan.
        supports: the labelled ones.
        found: int [Z, h, w] at half the resolution, 0 or n for the n-th of the values.
        values: the N labels.
    """
    shown: dict[int, list[np.ndarray]] = {}
    if query.treatment.intensities.hu:  # only in CT an organ is as bright in one scan as in another
        for support in supports:
            grey, cell = _grey(support)
            drawn = support.labels_at(centres(grey.shape, support.size)).numpy()
            for number, value in enumerate(values, 1):
                if (drawn == value).any():
                    histogram = grey_histogram(grey, drawn == value, cell)
                    shown.setdefault(number, []).append(histogram)
    known = {number: np.mean(each, 0) for number, each in shown.items()}
    return torch.from_numpy(moved_outlines(*_grey(query), found.numpy(), len(values), known))


def _grey(frame: Frame) -> tuple[np.ndarray, list[float]]:
    """Grey values [Z, h, w] at half the resolution, and mm (z, y, x) of a voxel."""
    size = [(side + 1) // 2 for side in frame.slices.shape[1:]]
    grey = F.interpolate(frame.slices[:, None], size=size, mode="area")[:, 0].numpy()
    return grey, [mm / n for mm, n in zip(frame.size, grey.shape, strict=True)]


def grey_histogram(grey: np.ndarray, where: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    """Share of the grey values in the middle of an organ.

    Args:
        grey: [Z, Y, X] in [0, 1].
        where: bool [Z, Y, X], the organ, at least one voxel.
        cell: mm (z, y, x) of a voxel.

    Returns:
        float64 [bins], smoothed, sum 1.
    """
    box = _box(where, [1, 1, 1])
    return _histogram(_bins(grey[box]), _core(where[box], cell))


def moved_outlines(
    grey: np.ndarray,
    cell: Sequence[float],
    found: np.ndarray,
    count: int,
    known: Mapping[int, np.ndarray],
) -> np.ndarray:
    """Odds of each organ once its outline has moved.

    Args:
        grey: float32 [Z, Y, X] in [0, 1].
        cell: mm (z, y, x) of a voxel.
        found: int [Z, Y, X], 0 or the number of the organ found there, 1 to `count`.
        count: organs.
        known: of some organs, the histogram (see `grey_histogram`) that the supports show, in the
            same units; it counts as much as that of this scan.

    Returns:
        float32 [Z, count, Y, X], log-odds against the background, above 0 inside. An organ that
        was not found stays so, and one whose grey values are those of its surroundings stays
        where it is rather than vanish.
    """
    odds = np.full((len(grey), count, *grey.shape[1:]), OUTSIDE, np.float32)
    bins = _bins(grey)
    margin = [int(np.ceil(_REACH_MM / mm)) + 1 for mm in cell]
    boxes = {
        number: _box(found == number, margin)
        for number in range(1, count + 1)
        if (found == number).any()
    }
    distances = {n: _signed_distance(found[box] == n, cell) for n, box in boxes.items()}
    sigma = [_SMOOTH_MM / mm for mm in cell]
    for _ in range(_ROUNDS):
        for number, box in boxes.items():
            distance, grey_values, own = distances[number], bins[box], found[box] == number
            if not own.any():
                continue
            inside = _histogram(grey_values, _core(own, cell))
            if number in known:
                inside = (inside + known[number]) / 2
            near = _histogram(grey_values, (distance > -_REACH_MM) & ~own)
            evidence = np.log((inside + _FLOOR) / (near + _FLOOR))
            evidence = evidence.clip(-_MOST_EVIDENCE, _MOST_EVIDENCE).astype(np.float32)
            before = distance.clip(-_REACH_MM, _REACH_MM) / _DISTANCE_MM
            new = before + ndimage.gaussian_filter(evidence[grey_values], sigma)
            new = new if (new > 0).any() else before
            new[distance <= -_REACH_MM] = OUTSIDE
            odds[box[0], number - 1, box[1], box[2]] = new
        found = np.where(odds.max(1) > 0, odds.argmax(1) + 1, 0)
    return odds


def _box(where: np.ndarray, margin: Sequence[int]) -> tuple[slice, ...]:
    """The smallest box around the voxels, and a margin."""
    out = []
    for axis, more in enumerate(margin):
        shown = np.flatnonzero(where.any(tuple({0, 1, 2} - {axis})))
        out.append(slice(max(0, int(shown[0]) - more), int(shown[-1]) + 1 + more))
    return tuple(out)


def _signed_distance(inside: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    """mm to the outline, positive inside: float32."""
    within, without = (
        ndimage.distance_transform_edt(mask, sampling=cell) for mask in (inside, ~inside)
    )
    return (within - without).astype(np.float32)


def _core(own: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    core: np.ndarray = ndimage.distance_transform_edt(own, sampling=cell) > _CORE_MM
    return core if core.sum() >= _LEAST_CORE else own


def _bins(grey: np.ndarray) -> np.ndarray:
    return (grey * (_BINS - 1)).round().astype(np.int16).clip(0, _BINS - 1)


def _histogram(bins: np.ndarray, where: np.ndarray) -> np.ndarray:
    counts = np.bincount(bins[where], minlength=_BINS).astype(np.float64)
    smooth: np.ndarray = ndimage.gaussian_filter1d(counts, 1.5, mode="nearest") + 1e-3
    return smooth / smooth.sum()
