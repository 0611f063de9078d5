"""The meaning of a scan's grey values: whether it is CT in HU, and which of them are air.

A NIfTI file does not say. It is inferred from the shape of the histogram, never from single values:
a scan may be clipped to a window, stored with an offset, or padded with any value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# CT is often stored without its rescale intercept, that is as HU + 1024. (Tools that add 1000
# are 24 HU off, which does no harm in a window of 400.)
_OFFSETS = (0.0, 1024.0)

# Fat, muscle, organs and blood lie in -200..200 HU. Of all that is denser than lung, their share
# is 0.83 to 0.97 in 19 CT scans of eight sources, of chest or abdomen, with contrast agent or
# without, limited to a window or not. In MR it is at most 0.51, however its values are scaled.
_SOFT_HU = 200.0
_LUNG_HU = -500.0  # lung is thinner
_LEAST_SOFT = 0.7
_AIR_HU = -850.0  # air is thinner
_NO_GAS_HU = -1200.0  # nothing is as thin as this
AIR_BELOW_HU = -300.0  # between lung and fat (-120 and denser)
_FAT_HU = -20.0  # what is thinner cannot come from MR, which is not negative

_EDGE_SHARE = 0.1  # of the border of the slices: so many equal values are no tissue
_ATOM_SHARE = 0.05  # of the voxels, likewise
_TOP_SHARE = 0.002  # of the voxels at the high end of a window: bone, mostly
_FEW = 0.01  # voxels that are passed over: noise, ringing, metal
_MARGIN = 0.01  # of the range of values; fat (-110 HU) passes in CT limited to -125..275
_MARGIN_HU = 4.0
_CORNER = 0.08  # side of the corners of a slice, as part of the slice
_NOISE = 4.0  # standard deviations
_DARK = 0.5  # of the level of tissue: a background of noise ends below
_SAMPLE = 1 << 21  # voxels that are looked at, spread over the scan


@dataclass(frozen=True)
class Intensities:
    """How the grey values of a scan are read."""

    hu: bool  # whether it is CT
    offset: float  # subtracted from the file's values to get HU; 0 where it is not CT
    air: float  # after `offset`: a voxel up to this is air or background; -inf without any
    limits: tuple[float, float]  # after `offset`: the window that the scan was limited to, or inf
    # A value of the file, denser than air, that marks what is outside of the image, such as 0 HU
    # around the reconstructed circle.
    padding: float | None

    def apply(self, data: np.ndarray) -> np.ndarray:
        """`data` after `offset`, with air in place of the padding."""
        if self.padding is not None:
            # Tissue may have this value as well: only what reaches the border is padding.
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
    """Tell from its grey values what a scan is, and what in it is air.

    - The value that the border of the slices holds most is its *edge*, if it is too frequent to
      be tissue: padding, the low end of a window, or an empty background.
    - A scan is CT in HU, or in HU + 1024, if 0.7 of what is denser than lung lies within 200 HU
      of water, and if there is air below it or, failing that, fat or the low end of a window.
    - In CT, air ends at -300 HU or, in a window that begins above, just over its low end. In
      other scans it ends just over the low end, or above the noise in the corners.

    Args:
        data: [Z, Y, X], finite.
    """
    step = -(-data.size // _SAMPLE)
    # An odd step, so that the sample does not run down a few columns of the slices.
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


def common_window(read: Sequence[Intensities], window: tuple[float, float]) -> tuple[float, float]:
    """The part of `window` that no scan was limited to less than; `window` if that is nothing.

    What one scan lost by being limited must not tell the others from it.
    """
    low = max(window[0], *(how.limits[0] for how in read))
    high = min(window[1], *(how.limits[1] for how in read))
    return (low, high) if low < high else window


def _edge(data: np.ndarray) -> float | None:
    """The value that the border of the slices holds most, unless it may be tissue or noise."""
    border = np.concatenate([data[:, [0, -1]].ravel(), data[:, :, [0, -1]].ravel()])
    found, counts = np.unique(border, return_counts=True)
    edge, count = found[counts.argmax()], int(counts.max())
    # Noise of few grey values holds some of them often as well, but then the next ones too.
    reach = _MARGIN * float(np.ptp(data))
    near = np.count_nonzero(np.abs(border - edge) <= reach) - count
    return float(edge) if count >= max(_EDGE_SHARE * border.size, near) else None


def _low_end(rest: np.ndarray, edge: float | None, at_most: float) -> float:
    """The value at which the scan was cut off below; -inf where it was not.

    It is the edge or, within a padding, a frequent value up to `at_most`.
    """
    ends = [-math.inf]
    if edge is not None and np.count_nonzero(rest < edge) < _FEW * rest.size:
        ends.append(edge)
    low = float(np.quantile(rest, _FEW, method="lower"))
    if low <= at_most and np.count_nonzero(rest == low) > _ATOM_SHARE * rest.size:
        ends.append(low)
    return max(ends)


def _high_end(rest: np.ndarray) -> float:
    """The value at which the scan was cut off above; inf where it was not."""
    high = float(np.quantile(rest, 1 - _TOP_SHARE / 2, method="higher"))
    return high if np.count_nonzero(rest == high) > _TOP_SHARE * rest.size else math.inf


def _evidence(hu: np.ndarray, low_end: float) -> int:
    """How sure it is that values are those of CT in HU: 0 not at all, 1 likely, 2 sure."""
    dense = np.count_nonzero(hu > max(_LUNG_HU, low_end))
    soft = np.count_nonzero((hu > max(-_SOFT_HU, low_end)) & (hu <= _SOFT_HU))
    if soft == 0 or soft < _LEAST_SOFT * dense:
        return 0
    if np.count_nonzero((hu > _NO_GAS_HU) & (hu < _AIR_HU)) > _FEW * hu.size:
        return 2
    fat = np.count_nonzero(hu < _FAT_HU) > _ATOM_SHARE * hu.size
    return int(fat or -math.inf < low_end <= _FAT_HU)


def _air_of_other(data: np.ndarray, values: np.ndarray, low_end: float) -> float:
    """`Intensities.air` for what is not CT."""
    low, high = (float(v) for v in np.quantile(values, [_FEW / 2, 1 - _FEW / 2]))
    ends = [low_end + _MARGIN * (high - low_end)] if math.isfinite(low_end) else []
    height, width = (max(1, round(_CORNER * n)) for n in data.shape[1:])
    corners = data[:, [*range(height), *range(-height, 0)]][
        :, :, [*range(width), *range(-width, 0)]
    ]
    level = float(np.median(corners))
    noise = level + _NOISE * 1.4826 * float(np.median(np.abs(corners - level)))
    tissue = values[values > noise]
    if tissue.size and noise - low < _DARK * (float(np.median(tissue)) - low):
        ends.append(noise)  # else the corners hold tissue
    return max(ends, default=-math.inf)
