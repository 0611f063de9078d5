"""From a volume to the network's square slices, and from its labels back to the volume.

The method assumes that the organs of support and query lie at alike places in the image. Scans
of another field of view do not, so `align="body"` cuts both to the box of the patient's trunk
before they are resized to the square, slice by slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .errors import InputError
from .volumes import Volume, check_same_grid

# What the few-shot papers on abdominal CT use (ALPNet and all after it), in HU. On the demo pair,
# untrained: liver 0.90 and spleen 0.74, against 0.88 and 0.73 of the whole range of HU.
ABDOMEN_WINDOW = (-125.0, 275.0)
# A volume that goes below this is taken for CT in HU: air is -1000, and MR is not negative.
CT_BELOW = -200.0

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
class Prepared:
    """A volume as the network sees it.

    Attributes:
        slices: float32 [Z, S, S] in [0, 1].
        labels: uint8 or int16 [Z, S, S], or None when the volume has none.
        boxes: int [Z, 4], the part of each slice that was kept: rows y0 to y1, columns x0 to x1,
            the ends left out.
        source: the volume that this came from.
    """

    slices: np.ndarray
    labels: np.ndarray | None
    boxes: np.ndarray
    source: Volume

    @property
    def box(self) -> tuple[slice, slice]:
        """The least box, as slices along (y, x), that holds the boxes of all slices."""
        return _hull(self.boxes)

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Bring labels [Z, S, S] back to [Z, Y, X] of the source, by nearest neighbours.

        Outside the boxes they are zero; the dtype stays.

        Raises:
            ValueError: `labels` is not of the shape of `slices`.
        """
        if labels.shape != self.slices.shape:
            raise ValueError(f"labels: expected shape {self.slices.shape}, got {labels.shape}")
        out = np.zeros(self.source.data.shape, labels.dtype)
        for z, (y0, y1, x0, x1) in enumerate(self.boxes.tolist()):
            out[z, y0:y1, x0:x1] = _nearest(labels[z], y1 - y0, x1 - x0)
        return out


def prepare(
    image: Volume,
    labels: Volume | None = None,
    *,
    size: int,
    align: Literal["none", "body"] = "none",
    window: Window = "auto",
    normalise: Literal["slice", "volume", "window"] = "slice",
) -> Prepared:
    """Window, crop, resize to `size` x `size` and bring into [0, 1].

    Images are resized bilinearly, averaging over the pixels that fall together when the slice
    shrinks; labels by nearest neighbours.

    Args:
        image: the scan.
        labels: its labels, or None.
        size: side of the network's square input, in pixels.
        align: "none" keeps the whole slice, "body" cuts each to its box of `body_boxes` first.
        window: intensities are limited to (low, high) first. "auto" is -125..275 HU for a volume
            that goes below -200, which only CT in HU does, and None otherwise.
        normalise: what becomes 0 and 1: the least and greatest of each "slice" (the published
            code), of the whole "volume" (SENet's), or the ends of the "window". A constant
            slice becomes zero under "slice".

    Raises:
        InputError: `labels` lie on another grid; normalise="window" without a window.
        ValueError: an option of another value than those above.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if align not in ("none", "body"):
        raise ValueError(f'align: expected "none" or "body", got {align!r}')
    if normalise not in ("slice", "volume", "window"):
        raise ValueError(f'normalise: expected "slice", "volume" or "window", got {normalise!r}')
    if labels is not None:
        check_same_grid(image, labels)
    boxes = body_boxes(image) if align == "body" else _whole(image.data)

    limits = resolve_window(image, window)
    data = image.data if limits is None else image.data.clip(*limits)
    low, high = float(data.min()), float(data.max())
    data = _resized(data, boxes, size)
    if normalise == "slice":
        least = data.min(axis=(1, 2), keepdims=True)
        range_ = data.max(axis=(1, 2), keepdims=True) - least
        data = (data - least) / np.where(range_ > 0, range_, 1)
    else:
        if normalise == "window":
            if limits is None:
                raise InputError(
                    f'{image.path}: normalise="window" needs a window, and "auto" finds none for '
                    "an image that is not CT in HU; give (low, high) or normalise per slice"
                )
            low, high = limits
        data = (data - low) / (high - low if high > low else 1)
    slices = np.ascontiguousarray(data.clip(0, 1), dtype=np.float32)

    small = None
    if labels is not None:
        small = np.empty(slices.shape, labels.data.dtype)
        for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
            small[z] = _nearest(labels.data[z, y0:y1, x0:x1], size, size)
    return Prepared(slices, small, boxes, image)


def resolve_window(image: Volume, window: Window) -> tuple[float, float] | None:
    """The limits that `prepare` applies for `window`: (low, high), or None for no window.

    Raises:
        ValueError: low is not below high, or a word other than "auto".
    """
    if window is None:
        return None
    if window == "auto":
        return ABDOMEN_WINDOW if float(image.data.min()) <= CT_BELOW else None
    if isinstance(window, str) or not window[0] < window[1]:
        raise ValueError(f'window: expected "auto", None or (low, high), got {window!r}')
    return float(window[0]), float(window[1])


def body_box(image: Volume) -> tuple[slice, slice]:
    """The least in-plane box, as slices along (y, x), that holds all of `body_boxes`."""
    return _hull(body_boxes(image))


def body_boxes(image: Volume) -> np.ndarray:
    """The in-plane box around the patient's trunk on each slice: int [Z, 4], y0, y1, x0, x1.

    The trunk is the largest connected piece of what is denser than air, after everything much
    narrower than the widest piece of a slice has been taken off: the table, its cover, arms that
    touch the body. A box for each slice, averaged over its neighbours, rather than one for all:
    how much of the hips or shoulders a scan covers then does not matter to its liver. Works on
    CT in HU, on CT limited to a window whose low end is air, and on images with a dark
    background. Where nothing like a body stands out, the boxes are the whole slices.
    """
    data, spacing = image.data, image.spacing
    step = -(-max(data.shape[1:]) // _WORKING_SIZE)
    inside = data[:, ::step, ::step] > _air_below(data)
    body = np.stack([_broad(plane, (spacing[1] * step, spacing[2] * step)) for plane in inside])
    pieces, count = ndimage.label(body)
    if count == 0:
        return _whole(data)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    largest = pieces == int(sizes.argmax())
    if sizes.max() < _LEAST_VOLUME * inside.size:
        return _whole(data)

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
    if (extents < _LEAST_EXTENT * limits[::2]).any():
        return _whole(data)
    return boxes


def _whole(data: np.ndarray) -> np.ndarray:
    """Boxes that keep every pixel."""
    _, height, width = data.shape
    return np.tile(np.array([0, height, 0, width], np.int64), (len(data), 1))


def _hull(boxes: np.ndarray) -> tuple[slice, slice]:
    low, high = boxes.min(axis=0).tolist(), boxes.max(axis=0).tolist()
    return slice(low[0], high[1]), slice(low[2], high[3])


def _air_below(data: np.ndarray) -> float:
    """The intensity up to which a voxel is taken for air."""
    low, high = float(data.min()), float(data.max())
    if low <= CT_BELOW:
        return -300.0  # between lung (-500 and less) and fat (-120 and more)
    if np.count_nonzero(data == low) > 0.05 * data.size:
        # The low end of a window, or a background set to zero: anything above it is tissue. One
        # part in a hundred lets fat (-110 HU) pass in CT limited to -125..275.
        return low + 0.01 * (high - low)
    return _otsu(data)


def _otsu(data: np.ndarray) -> float:
    """The threshold that parts the histogram into the two classes of least variance."""
    low, high = float(data.min()), float(np.percentile(data, 99))
    if high <= low:
        return low
    counts, edges = np.histogram(data, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1 + int(np.nanargmax(between))])


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


def _resized(data: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """The boxes of [Z, Y, X], resized to float32 [Z, size, size]."""
    out = np.empty((len(data), size, size), np.float32)
    for z, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
        part = data[z, y0:y1, x0:x1]
        if part.shape != (size, size):
            # A crop is strided; torch wants a plain array.
            pixels = torch.from_numpy(np.ascontiguousarray(part))[None, None]
            part = F.interpolate(
                pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True
            )[0, 0].numpy()
        out[z] = part
    return out


def _nearest(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """[Y, X] to [height, width]: the pixel in which the centre of each new pixel falls."""
    rows = ((np.arange(height) + 0.5) * (plane.shape[0] / height)).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * (plane.shape[1] / width)).astype(np.intp)
    return plane[rows[:, None], columns[None, :]]
