"""What a scan's grey values mean: whether it is CT in HU, and which values are air.

NIfTI files do not say, so it is inferred from the histogram, never from single values: a scan may
be clipped to a window, stored with an offset, or padded with any value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# CT is often stored without its rescale intercept, that is as HU + 1024. (Tools that add 1000
# instead are off by 24 HU, which is harmless in a window of 400.)
_OFFSETS = (0.0, 1024.0)

# Fat, muscle, organs and blood are in -200..200 HU. Their share of everything denser than lung is
# 0.83 to 0.97 in 19 CT scans of eight sources, of chest or abdomen, with or without contrast agent,
# clipped to a window or not. In MR it is at most 0.51, however the values are scaled.
_SOFT_HU = 200.0
_LEAST_SOFT = 0.7
_FAT_HU = -20.0  # the upper limit of fat; MR has no such values
AIR_BELOW_HU = -300.0  # between lung and fat, which is above -120
_LUNG_HU = -500.0  # the upper limit of lung
_AIR_HU = -850.0  # the upper limit of air
_NO_GAS_HU = -1200.0  # nothing has values below

_EDGE_SHARE = 0.1  # of the border of the slices: a value this frequent is not tissue
_ATOM_SHARE = 0.05  # of the voxels, the same
_TOP_SHARE = 0.002  # of the voxels at the upper limit of a window, mostly bone
_FEW = 0.01  # of the voxels: outliers to ignore, such as noise, ringing and metal
_MARGIN = 0.01  # of the range of values; fat (-110 HU) passes in CT clipped to -125..275
_MARGIN_HU = 4.0
_CORNER = 0.08  # of a slice's side: the side of its corners
_NOISE = 4.0  # standard deviations
_DARK = 0.5  # of the tissue's level: background noise stays below it
_SAMPLE = 1 << 21  # voxels to look at, spread over the scan


@dataclass(frozen=True)
class Intensities:
    """How to read the grey values of a scan."""

    hu: bool  # whether it is CT
    offset: float  # subtracted from the file's values to get HU; 0 if it is not CT
    air: float  # after `offset`: voxels up to this value are air or background; -inf if none are
    limits: tuple[float, float]  # after `offset`: the window it was clipped to; infinite if none
    # A value in the file, denser than air, that marks voxels outside the image, such as 0 HU around
    # the reconstructed circle.
    padding: float | None

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Subtract `offset` from `data` and replace the padding by air."""
        if self.padding is not None:
            # Tissue may have this value, too: only regions that reach the border are padding.
            in_plane = np.zeros((3, 3, 3), bool)
            in_plane[1] = True
            pieces, count = ndimage.label(data == self.padding, in_plane)
            outside = np.zeros(count + 1, bool)
            outside[pieces[:, [0, -1]]] = outside[pieces[:, :, [0, -1]]] = True
            outside[0] = False
            air = np.float32(max(-1024.0, self.limits[0]) + self.offset)
            data = np.where(outside[pieces], air, data)
        return data - np.float32(self.offset) if self.offset else data


def interpret(data: np.ndarray) -> Intensities:
    """Infer from its grey values what kind of scan it is, and which values are air.

    - The most frequent value at the border of the slices is the *edge*, if it is too frequent to be
      tissue: padding, the lower limit of a window, or an empty background.
    - A scan is CT in HU, or in HU + 1024, if 0.7 of everything denser than lung is within 200 HU of
      water, and if there is air or, failing that, fat or the lower limit of a window.
    - In CT, air ends at -300 HU or, if the scan was clipped to a window above that, just over its
      lower limit. In other scans it ends just over the lower limit, or above the noise in the
      corners.

    Args:
        data: [Z, Y, X], finite.
    """
    step = -(-data.size // _SAMPLE)
    # An odd step, because an even one might sample only a few columns of the slices.
    values = data.ravel()[:: step + (step % 2 == 0)]
    edge = _edge(data)
    rest = values if edge is None else values[values != edge]
    if rest.size == 0:
        rest = values
    floors = [_low_end(rest, edge, offset + _FAT_HU) for offset in _OFFSETS]
    evidence = [
        _evidence(rest - offset, floor - offset)
        for offset, floor in zip(_OFFSETS, floors, strict=True)
    ]
    if not any(evidence):
        floor = _low_end(rest, edge, math.inf if edge is None else -math.inf)
        air = _air_of_other(data, values, floor)
        return Intensities(False, 0.0, air, (-math.inf, math.inf), None)
    best = int(np.argmax(evidence))
    offset = _OFFSETS[best]
    low, high = floors[best] - offset, _high_end(rest) - offset
    air = max(AIR_BELOW_HU, low + _MARGIN_HU)
    padding = edge if edge is not None and edge - offset > air else None
    return Intensities(True, offset, air, (low, high), padding)


def _edge(data: np.ndarray) -> float | None:
    """The most frequent value at the border of the slices; None if it may be tissue or noise."""
    border = np.concatenate([data[:, [0, -1]].ravel(), data[:, :, [0, -1]].ravel()])
    found, counts = np.unique(border, return_counts=True)
    edge, count = found[counts.argmax()], int(counts.max())
    # Noise with few grey values has frequent ones, too, but then their neighbours are as frequent.
    reach = _MARGIN * float(np.ptp(data))
    near = np.count_nonzero(np.abs(border - edge) <= reach) - count
    return float(edge) if count >= max(_EDGE_SHARE * border.size, near) else None


def _low_end(rest: np.ndarray, edge: float | None, at_most: float) -> float:
    """The lower limit to which the scan was clipped, or -inf.

    It is the edge or, inside a padding, a frequent value up to `at_most`.
    """
    ends = [-math.inf]
    if edge is not None and np.count_nonzero(rest < edge) < _FEW * rest.size:
        ends.append(edge)
    low = float(np.quantile(rest, _FEW, method="lower"))
    if low <= at_most and np.count_nonzero(rest == low) > _ATOM_SHARE * rest.size:
        ends.append(low)
    return max(ends)


def _high_end(rest: np.ndarray) -> float:
    """The upper limit to which the scan was clipped, or inf."""
    high = float(np.quantile(rest, 1 - _TOP_SHARE / 2, method="higher"))
    return high if np.count_nonzero(rest == high) > _TOP_SHARE * rest.size else math.inf


def _evidence(hu: np.ndarray, low_end: float) -> int:
    """The evidence that values are CT in HU: 0 none, 1 some, 2 strong."""
    dense = np.count_nonzero(hu > max(_LUNG_HU, low_end))
    soft = np.count_nonzero((hu > max(-_SOFT_HU, low_end)) & (hu <= _SOFT_HU))
    if soft == 0 or soft < _LEAST_SOFT * dense:
        return 0
    if np.count_nonzero((hu > _NO_GAS_HU) & (hu < _AIR_HU)) > _FEW * hu.size:
        return 2
    fat = np.count_nonzero(hu < _FAT_HU) > _ATOM_SHARE * hu.size
    return int(fat or -math.inf < low_end <= _FAT_HU)


def _air_of_other(data: np.ndarray, values: np.ndarray, low_end: float) -> float:
    """`Intensities.air` for scans other than CT."""
    low, high = (float(v) for v in np.quantile(values, [_FEW / 2, 1 - _FEW / 2]))
    ends = [low_end + _MARGIN * (high - low_end)] if math.isfinite(low_end) else []
    height, width = (max(1, round(_CORNER * n)) for n in data.shape[1:])
    corners = data[:, np.r_[:height, -height:0]][:, :, np.r_[:width, -width:0]]
    level = float(np.median(corners))
    noise = level + _NOISE * 1.4826 * float(np.median(np.abs(corners - level)))
    tissue = values[values > noise]
    if tissue.size and noise - low < _DARK * (float(np.median(tissue)) - low):
        ends.append(noise)  # otherwise the corners show tissue
    return max(ends, default=-math.inf)
