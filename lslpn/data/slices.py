"""Converts a volume to the network's square slices, and their labels back to the volume.

The method assumes that organs have similar positions in support and query images, which fails if
their fields of view differ. `align="body"` therefore crops each slice to the bounding box of the
patient's trunk before it is resized.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from .intensities import AIR_BELOW_HU, Intensities, interpret
from .volumes import Volume, check_same_grid

# The window of few-shot papers on abdominal CT since ALPNet, in HU. Dice on the demo pair, with an
# untrained network: liver 0.90 and spleen 0.74, without a window 0.88 and 0.73.
ABDOMEN_WINDOW = (-125.0, 275.0)

Window = tuple[float, float] | Literal["auto"] | None

# A body must have at least this part of the slice's height and width, and of the scan's voxels.
_LEAST_EXTENT = 0.2
_LEAST_VOLUME = 0.02
# Parts narrower than this share of the slice's widest piece are removed before the search for the
# body. The largest circle inside a trunk has a radius of about 120 mm, inside an arm 40: arms and
# the table are removed. A trunk's flanks, as round as a circle of 85 mm, stay.
_NARROW = 0.45
_NARROW_MM = 6.0  # remove at least anything narrower, such as the table on slices without a body
_SMOOTH_MM = 15.0  # boxes are averaged over this distance up and down, against noise
_WORKING_SIZE = 256  # larger slices are subsampled to find the body


@dataclass(frozen=True)
class Treatment:
    """How `prepare` treated a scan."""

    name: str  # of the scan's file; for messages
    intensities: Intensities
    body_found: bool | None  # None without align="body"


@dataclass(frozen=True)
class Prepared:
    """A volume as the network's input."""

    slices: np.ndarray  # float32 [Z, S, S] in [0, 1]
    labels: np.ndarray | None  # the labels' own dtype, [Z, S, S]
    boxes: np.ndarray  # int [Z, 4], the part used of each slice: y0, y1, x0, x1, ends excluded
    source: Volume
    air: np.ndarray  # float32 [Z], pixels of a slice up to this value are air or background
    treatment: Treatment  # for `warn_unlike`

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Resize labels [Z, S, S] back to the source's [Z, Y, X] by nearest neighbours.

        Labels outside the boxes are zero; the dtype is kept.
        """
        if labels.shape != self.slices.shape:
            raise ValueError(f"labels: expected shape {self.slices.shape}, got {labels.shape}")
        out = np.zeros(self.source.data.shape, labels.dtype)
        for z, (y0, y1, x0, x1) in enumerate(self.boxes.tolist()):
            out[z, y0:y1, x0:x1] = _nearest(labels[z], y1 - y0, x1 - x0)
        return out


def prepare(
    config: ModelConfig, image: Volume, labels: Volume | None = None, **other: Any
) -> Prepared:
    """Window a scan, crop it, resize it to squares and scale it to [0, 1].

    Images are resized bilinearly, with antialiasing; labels by nearest neighbours. If `normalise`
    is "slice", slices of a single value become zero. For CT the window is in HU, even if the file
    holds HU + 1024, see `interpret`.

    Args:
        config: the network's `size`, `align`, `window` and `normalise`.
        image: the scan.
        labels: its labels, or None.
        other: settings that replace those of `config`.

    Raises:
        InputError: `labels` has another grid; every voxel is on one side of the window;
            normalise="window" without a window; a setting is invalid.
    """
    config = dataclasses.replace(config, **other)
    size, normalise = config.size, config.normalise
    if labels is not None:
        check_same_grid(image, labels)
    how = interpret(image.data)
    data = how.apply(image.data)
    cropped = config.align == "body"
    boxes = trunk_boxes(data, image.spacing, how.air) if cropped else None
    treatment = Treatment(image.path.name, how, boxes is not None if cropped else None)
    boxes = whole_boxes(data) if boxes is None else boxes

    limits = window_limits(how, config.window)
    data = data if limits is None else data.clip(*limits)
    low, high = float(data.min()), float(data.max())
    if limits is not None and low == high:
        raise InputError(
            f"{image.path}: every voxel is on one side of the window {limits[0]:g} to "
            f"{limits[1]:g}, expected some inside; give a window that fits the image's values"
        )
    data = _resized(data, boxes, size)
    least, range_ = np.asarray(low, np.float32), np.asarray(high - low or 1, np.float32)
    if normalise == "slice":
        least = data.min(axis=(1, 2), keepdims=True)
        range_ = data.max(axis=(1, 2), keepdims=True) - least
        range_ = np.where(range_ > 0, range_, 1)
    elif normalise == "window":
        if limits is None:
            raise InputError(
                f'{image.path}: normalise="window" needs a window, and "auto" has none for an '
                "image that is not CT in HU; give (low, high) or normalise per slice"
            )
        least = np.asarray(limits[0], np.float32)
        range_ = np.asarray(limits[1] - limits[0], np.float32)
    slices = np.ascontiguousarray(((data - least) / range_).clip(0, 1), dtype=np.float32)
    # If a window clipped the air of CT, only its lowest value is air.
    air = min(how.air, AIR_BELOW_HU) if how.hu else how.air
    level = np.broadcast_to(((air - least) / range_).clip(0, 1).ravel(), len(data))

    small = None
    if labels is not None:
        small = np.empty(slices.shape, labels.data.dtype)
        for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
            small[z] = _nearest(labels.data[z, y0:y1, x0:x1], size, size)
    return Prepared(slices, small, boxes, image, level, treatment)


def shared_window(window: Window, read: Sequence[Intensities]) -> Window:
    """`window` for scans that are used together.

    For "auto" and CT, this is the part of the window that was not clipped in any of the scans, if
    there is one: values that one scan lacks must not distinguish the others from it.
    """
    if window != "auto" or not all(how.hu for how in read):
        return window
    low = max(ABDOMEN_WINDOW[0], *(how.limits[0] for how in read))
    high = min(ABDOMEN_WINDOW[1], *(how.limits[1] for how in read))
    return (low, high) if low < high else ABDOMEN_WINDOW


def window_limits(how: Intensities, window: Window) -> tuple[float, float] | None:
    """The limits (low, high) that `prepare` applies for `window`, or None."""
    if window == "auto":
        return ABDOMEN_WINDOW if how.hu else None
    return None if window is None else (float(window[0]), float(window[1]))


def warn_not_cropped(without: Sequence[str], scans: int) -> None:
    """Warn that no scan is cropped to the body if none was found in some of them, `without`."""
    if 0 < len(without) < scans:
        warnings.warn(
            f"{without[0]}: no body was found in it, so that no scan is cropped to the body",
            stacklevel=4,
        )


def warn_unlike(treatments: Sequence[Treatment]) -> None:
    """Warn if scans used together were treated differently, or if an offset was guessed."""
    read = [(t.name, t.intensities) for t in treatments]
    for offset in sorted({how.offset for _, how in read if how.offset}):
        names = [name for name, how in read if how.offset == offset]
        warnings.warn(
            f"{_some(names)}: treated as CT stored as HU + {offset:g}, because its air and soft "
            f"tissue have such values; {offset:g} is subtracted",
            stacklevel=3,
        )
    ct = [name for name, how in read if how.hu]
    other = [name for name, how in read if not how.hu]
    if ct and other:
        warnings.warn(
            f"{_some(other)}: not treated as CT in HU, while {_some(ct)} is, so that their grey "
            "values are not clipped to the same window and the result may be poor; give scans of "
            "one kind",
            stacklevel=3,
        )
    cropped = [t.name for t in treatments if t.body_found]
    whole = [t.name for t in treatments if t.body_found is False]
    if cropped and whole:
        warnings.warn(
            f"{_some(whole)}: no body was found in it, so that it is not cropped, while "
            f"{_some(cropped)} is; the result may be poor, try without cropping to the body",
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def body_boxes(image: Volume) -> np.ndarray:
    """The in-plane box around the patient's trunk on each slice: int [Z, 4], y0, y1, x0, x1.

    The trunk is the largest connected piece above air, after parts much narrower than the widest
    piece of a slice have been removed: the table, its cover, arms that touch the body. Each slice
    has its own box, averaged over its neighbours, so that the liver's does not depend on how much
    of the hips or shoulders was scanned. This works on CT, clipped to a window or not, and on
    images with a dark background; `interpret` finds the threshold of air. If no body is found,
    the boxes are the whole slices.
    """
    how = interpret(image.data)
    boxes = trunk_boxes(how.apply(image.data), image.spacing, how.air)
    return whole_boxes(image.data) if boxes is None else boxes


def trunk_boxes(
    data: np.ndarray, spacing: tuple[float, float, float], air: float
) -> np.ndarray | None:
    """`body_boxes` for data [Z, Y, X] from `Intensities.apply`; None if no body is found."""
    if not math.isfinite(air):
        return None
    step = -(-max(data.shape[1:]) // _WORKING_SIZE)
    inside = data[:, ::step, ::step] > air
    body = np.stack([_broad(plane, (spacing[1] * step, spacing[2] * step)) for plane in inside])
    pieces, _ = ndimage.label(body)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    largest = pieces == int(sizes.argmax())
    if sizes.max() < _LEAST_VOLUME * inside.size:
        return None

    bounds = np.full((len(data), 4), np.nan)
    for z, plane in enumerate(largest):
        if plane.any():
            rows, columns = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
            bounds[z] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    found = np.flatnonzero(~np.isnan(bounds[:, 0]))
    # Slices without a body (such as above the head) get the box of the nearest slice with one.
    nearest = np.abs(np.arange(len(data))[:, None] - found).argmin(axis=1)
    bounds = bounds[found[nearest]]
    reach = round(_SMOOTH_MM / spacing[0])
    if reach:
        bounds = ndimage.uniform_filter1d(bounds, 2 * reach + 1, axis=0, mode="nearest")
    bounds *= step
    limits = np.repeat(data.shape[1:], 2)
    boxes = np.minimum(np.round(bounds).astype(np.int64), limits)
    extents = boxes[:, 1::2] - boxes[:, ::2]
    return None if (extents < _LEAST_EXTENT * limits[::2]).any() else boxes


def whole_boxes(data: np.ndarray) -> np.ndarray:
    """Boxes that keep every pixel of [Z, Y, X]: int [Z, 4], y0, y1, x0, x1."""
    _, height, width = data.shape
    return np.tile(np.array([0, height, 0, width], np.int64), (len(data), 1))


def _broad(plane: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Binary opening with a disc whose radius is proportional to the slice's widest piece.

    Uses distance transforms, whose cost does not grow with the disc.
    """
    if not plane.any():
        return plane
    # Fill holes (lungs, bowel gas), or the thin chest wall would be removed.
    filled = ndimage.binary_fill_holes(plane)
    # The body continues beyond the image border, so it is not narrow there.
    padded = np.pad(filled, 1, mode="edge")
    depth = ndimage.distance_transform_edt(padded, sampling=spacing)[1:-1, 1:-1]
    radius = max(_NARROW_MM, _NARROW * float(depth.max()))
    core = depth > radius
    if not core.any():
        return core
    return ndimage.distance_transform_edt(~core, sampling=spacing) <= radius


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize [N, C, h, w] to `size`, bilinearly and with antialiasing."""
    if images.shape[2:] == torch.Size(size):
        return images
    return F.interpolate(
        images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True
    )


def _resized(data: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Crop [Z, Y, X] to the boxes and resize to float32 [Z, size, size]."""
    out = np.empty((len(data), size, size), np.float32)
    for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
        part = torch.from_numpy(np.ascontiguousarray(data[z, y0:y1, x0:x1]))
        out[z] = resized(part[None, None], (size, size))[0, 0]
    return out


def _nearest(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [Y, X] to [height, width], taking the pixel that holds each new pixel's centre."""
    rows = ((np.arange(height) + 0.5) * (plane.shape[0] / height)).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * (plane.shape[1] / width)).astype(np.intp)
    return plane[rows[:, None], columns[None, :]]
