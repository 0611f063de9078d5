"""Converts a volume to the network's square slices, and their labels back to the volume.

The method assumes that organs have similar positions in the images of support and query. Where the
field of view differs they have not, so `align="body"` crops both to the bounding box of the
patient's trunk before they are resized to the square, slice by slice.
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
from .intensities import AIR_BELOW_HU, Intensities, common_window, interpret
from .volumes import Volume, check_same_grid

# What the few-shot papers on abdominal CT use (ALPNet and all after it), in HU. On the demo pair,
# untrained: liver 0.90 and spleen 0.74, against 0.88 and 0.73 of the whole range of HU.
ABDOMEN_WINDOW = (-125.0, 275.0)

Window = tuple[float, float] | Literal["auto"] | None

# A body smaller than this part of the slice, along either axis, is no body: see body_boxes.
_LEAST_EXTENT = 0.2
_LEAST_VOLUME = 0.02
# What is narrower than this part of the slice's widest piece is taken off before the body is
# sought. The radius that fits into a trunk is about 120 mm, into an arm 40: arms go, and with
# them the table. A trunk's flanks, as round as a circle of 85 mm, stay.
_NARROW = 0.45
_NARROW_MM = 6.0  # ... and at least what is narrower than this: the table on slices without body
_SMOOTH_MM = 15.0  # boxes are averaged this far up and down, against noise in single slices
_WORKING_SIZE = 256  # larger slices are thinned out before the body is sought


@dataclass(frozen=True)
class Treatment:
    """What `prepare` made of a scan."""

    name: str  # of the scan's file; for messages
    intensities: Intensities
    body_found: bool | None  # None if the body was not looked for


@dataclass(frozen=True)
class Prepared:
    """A volume as the network's input."""

    slices: np.ndarray  # float32 [Z, S, S] in [0, 1]
    labels: np.ndarray | None  # uint8 or int16 [Z, S, S]
    boxes: np.ndarray  # int [Z, 4], what was kept of each slice: y0, y1, x0, x1, ends excluded
    source: Volume
    air: np.ndarray  # float32 [Z]: a pixel of each slice up to this value is air or background
    treatment: Treatment  # to be compared with that of other scans, see `warn_unlike`

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Bring labels [Z, S, S] back to [Z, Y, X] of the source, by nearest neighbours.

        Outside the boxes they are zero; the dtype stays.
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
    """Window, crop, resize to a square and bring into [0, 1], as a network is given its input.

    Images are resized bilinearly, averaging over the pixels that fall together when the slice
    shrinks; labels by nearest neighbours. A slice of one value becomes zero where `normalise` is
    "slice". The window is in HU for CT even where the file holds HU + 1024; `interpret` tells
    which it is.

    Args:
        config: of the network: `size`, `align`, `window` and `normalise`.
        image: the scan.
        labels: its labels, or None.
        other: settings in the place of those of `config`.

    Raises:
        InputError: `labels` lie on another grid; every voxel is on one side of the window;
            normalise="window" without a window; a setting of another value than it may have.
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
            f"{image.path}: every voxel lies on one side of the window {limits[0]:g} to "
            f"{limits[1]:g}, expected some in it; give a window in the values of the image"
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
                f'{image.path}: normalise="window" needs a window, and "auto" finds none for '
                "an image that is not CT in HU; give (low, high) or normalise per slice"
            )
        least = np.asarray(limits[0], np.float32)
        range_ = np.asarray(limits[1] - limits[0], np.float32)
    slices = np.ascontiguousarray(((data - least) / range_).clip(0, 1), dtype=np.float32)
    # Where a window took the air of CT away, its least value alone is air.
    air = min(how.air, AIR_BELOW_HU) if how.hu else how.air
    level = np.broadcast_to(((air - least) / range_).clip(0, 1).ravel(), len(data))

    small = None
    if labels is not None:
        small = np.empty(slices.shape, labels.data.dtype)
        for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
            small[z] = _nearest(labels.data[z, y0:y1, x0:x1], size, size)
    return Prepared(slices, small, boxes, image, level, treatment)


def shared_window(window: Window, read: Sequence[Intensities]) -> Window:
    """`window` for scans that are used together: of "auto", what is left of it in all of them."""
    if window == "auto" and all(how.hu for how in read):
        return common_window(read, ABDOMEN_WINDOW)
    return window


def window_limits(how: Intensities, window: Window) -> tuple[float, float] | None:
    """The limits that `prepare` applies for `window`: (low, high), or None for no window."""
    if window == "auto":
        return ABDOMEN_WINDOW if how.hu else None
    return None if window is None else (float(window[0]), float(window[1]))


def warn_not_cropped(without: Sequence[str], scans: int) -> None:
    """Warn that none of the scans is cut to the body where some, `without`, show none."""
    if 0 < len(without) < scans:
        warnings.warn(
            f"{without[0]}: no body stands out in it, so that no scan is cut to the body",
            stacklevel=4,
        )


def warn_unlike(treatments: Sequence[Treatment]) -> None:
    """Warn where scans that are used together were not treated alike, or had to be guessed at."""
    read = [(t.name, t.intensities) for t in treatments]
    for offset in sorted({how.offset for _, how in read if how.offset}):
        names = [name for name, how in read if how.offset == offset]
        warnings.warn(
            f"{_some(names)}: taken for CT stored as HU + {offset:g}, because its air and soft "
            f"tissue lie there; {offset:g} is subtracted",
            stacklevel=3,
        )
    ct = [name for name, how in read if how.hu]
    other = [name for name, how in read if not how.hu]
    if ct and other:
        warnings.warn(
            f"{_some(other)}: not taken for CT in HU, while {_some(ct)} is, so that their grey "
            "values are not limited to the same window and the result may be poor; give scans of "
            "one kind",
            stacklevel=3,
        )
    cropped = [t.name for t in treatments if t.body_found]
    whole = [t.name for t in treatments if t.body_found is False]
    if cropped and whole:
        warnings.warn(
            f"{_some(whole)}: no body stands out in it, so that it is not cropped, while "
            f"{_some(cropped)} is; the result may be poor, try without the crop to the body",
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def body_boxes(image: Volume) -> np.ndarray:
    """The in-plane box around the patient's trunk on each slice: int [Z, 4], y0, y1, x0, x1.

    The trunk is the largest connected piece of what is denser than air, after everything much
    narrower than the widest piece of a slice has been taken off: the table, its cover, arms that
    touch the body. A box for each slice, averaged over its neighbours, rather than one for all:
    how much of the hips or shoulders a scan covers then does not matter to its liver. Works on
    CT, also where it was limited to a window, and on images with a dark background; what is air
    is told by `interpret`. Where nothing like a body stands out, the boxes are the whole slices.
    """
    how = interpret(image.data)
    boxes = trunk_boxes(how.apply(image.data), image.spacing, how.air)
    return whole_boxes(image.data) if boxes is None else boxes


def trunk_boxes(
    data: np.ndarray, spacing: tuple[float, float, float], air: float
) -> np.ndarray | None:
    """`body_boxes` of grey values [Z, Y, X] as `interpret` reads them, or None where no body
    stands out."""
    if not math.isfinite(air):
        return None
    step = -(-max(data.shape[1:]) // _WORKING_SIZE)
    inside = data[:, ::step, ::step] > air
    body = np.stack([_broad(plane, (spacing[1] * step, spacing[2] * step)) for plane in inside])
    pieces, count = ndimage.label(body)
    if count == 0:
        return None
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
    # Slices without a body (above the head, say) take the box of the nearest slice with one.
    nearest = np.abs(np.arange(len(data))[:, None] - found).argmin(axis=1)
    bounds = bounds[found[nearest]]
    reach = round(_SMOOTH_MM / spacing[0])
    if reach:
        bounds = ndimage.uniform_filter1d(bounds, 2 * reach + 1, axis=0, mode="nearest")
    bounds *= step
    limits = np.array([data.shape[1], data.shape[1], data.shape[2], data.shape[2]])
    boxes = np.minimum(np.round(bounds).astype(np.int64), limits)
    extents = boxes[:, 1::2] - boxes[:, ::2]
    return None if (extents < _LEAST_EXTENT * limits[::2]).any() else boxes


def whole_boxes(data: np.ndarray) -> np.ndarray:
    """Boxes that keep every pixel of [Z, Y, X]: int [Z, 4], y0, y1, x0, x1."""
    _, height, width = data.shape
    return np.tile(np.array([0, height, 0, width], np.int64), (len(data), 1))


def _broad(plane: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Binary opening by a disc of a radius in proportion to the widest piece of the slice.

    Through distances, whose cost does not grow with the disc.
    """
    if not plane.any():
        return plane
    # Holes first (lungs, bowel gas): they would otherwise take the thin chest wall with them.
    filled = ndimage.binary_fill_holes(plane)
    # The image ends at its border, the body does not: it is cut off there, not narrow.
    padded = np.pad(filled, 1, mode="edge")
    depth = ndimage.distance_transform_edt(padded, sampling=spacing)[1:-1, 1:-1]
    radius = max(_NARROW_MM, _NARROW * float(depth.max()))
    core = depth > radius
    if not core.any():
        return core
    return ndimage.distance_transform_edt(~core, sampling=spacing) <= radius


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """[N, C, h, w] to `size`, bilinear, averaging over the pixels that fall together."""
    if images.shape[2:] == torch.Size(size):
        return images
    return F.interpolate(
        images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True
    )


def _resized(data: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """The boxes of [Z, Y, X], resized to float32 [Z, size, size]."""
    out = np.empty((len(data), size, size), np.float32)
    for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
        # A crop is strided; torch wants a plain array.
        part = np.ascontiguousarray(data[z, y0:y1, x0:x1])
        out[z] = resized(torch.from_numpy(part)[None, None], (size, size))[0, 0]
    return out


def _nearest(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """[Y, X] to [height, width]: the pixel in which the centre of each new pixel falls."""
    rows = ((np.arange(height) + 0.5) * (plane.shape[0] / height)).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * (plane.shape[1] / width)).astype(np.intp)
    return plane[rows[:, None], columns[None, :]]
