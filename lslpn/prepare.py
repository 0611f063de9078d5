"""From a volume to the network's square slices, and from its labels back to the volume.

The method assumes that the organs of support and query lie at alike places in the image. Scans
of another field of view do not, so `align="body"` cuts both to the box of the patient's body
before they are resized to the square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from lslpn.errors import InputError
from lslpn.volumes import Volume, check_same_grid

# What the few-shot papers on abdominal CT use (ALPNet and all after it), in HU.
ABDOMEN_WINDOW = (-125.0, 275.0)
# A volume that goes below this is taken for CT in HU: air is -1000, and MR is not negative.
CT_BELOW = -200.0

Window = tuple[float, float] | Literal["auto"] | None

# A body smaller than this part of the slice, along either axis, is no body: see body_box.
_LEAST_EXTENT = 0.2
_LEAST_VOLUME = 0.02
# Sheets thinner than twice this are taken off before the body is sought: the table top, its
# cover, and the bridge of noise between it and the patient's back.
_OPENING_MM = 6.0


@dataclass(frozen=True)
class Prepared:
    """A volume as the network sees it.

    Attributes:
        slices: float32 [Z, S, S] in [0, 1].
        labels: uint8 or int16 [Z, S, S], or None when the volume has none.
        box: the part of each slice that was kept, as slices along (y, x).
        source: the volume that this came from.
    """

    slices: np.ndarray
    labels: np.ndarray | None
    box: tuple[slice, slice]
    source: Volume

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Bring labels [Z, S, S] back to [Z, Y, X] of the source, by nearest neighbours.

        Outside the box they are zero; the dtype stays.

        Raises:
            ValueError: `labels` is not of the shape of `slices`.
        """
        if labels.shape != self.slices.shape:
            raise ValueError(f"labels: expected shape {self.slices.shape}, got {labels.shape}")
        out = np.zeros(self.source.data.shape, labels.dtype)
        height, width = (part.stop - part.start for part in self.box)
        out[:, self.box[0], self.box[1]] = _nearest(labels, height, width)
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
        align: "none" keeps the whole slice, "body" cuts to `body_box` first.
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
    whole = (slice(0, image.data.shape[1]), slice(0, image.data.shape[2]))
    box = body_box(image) if align == "body" else whole

    limits = resolve_window(image, window)
    data = image.data if limits is None else image.data.clip(*limits)
    low, high = float(data.min()), float(data.max())
    data = _bilinear(data[:, box[0], box[1]], size)
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

    small = None if labels is None else _nearest(labels.data[:, box[0], box[1]], size, size)
    return Prepared(slices, small, box, image)


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
    """The in-plane box (y, x) around the patient's body, one for the whole volume.

    The body is the largest connected piece of what is denser than air, after thin sheets have
    been taken off, so that the table, its cover and arms that lie apart are left out. Works on CT
    in HU, on CT limited to a window whose low end is air, and on images with a dark background.
    Where nothing like a body stands out, the box is the whole slice.
    """
    data = image.data
    whole = (slice(0, data.shape[1]), slice(0, data.shape[2]))
    inside = data > _air_below(data)
    # Thin sheets go by an opening in millimetres, slice by slice: the table runs along z.
    body = np.stack([_open(plane, image.spacing[1:]) for plane in inside])
    pieces, count = ndimage.label(body)
    if count == 0:
        return whole
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    largest = int(sizes.argmax())
    if sizes[largest] < _LEAST_VOLUME * data.size:
        return whole
    box = ndimage.find_objects(pieces, max_label=largest)[largest - 1]
    if box is None:
        return whole
    for part, length in zip(box[1:], data.shape[1:], strict=True):
        if part.stop - part.start < _LEAST_EXTENT * length:
            return whole
    return box[1], box[2]


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


def _open(plane: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Binary opening by a disc of `_OPENING_MM`, through distances: its cost is the plane's."""
    if not plane.any():
        return plane
    # Holes first (lungs, bowel gas): they would otherwise take the thin chest wall with them.
    filled = ndimage.binary_fill_holes(plane)
    # The image ends at its border, the body does not: it is cut off there, not thin.
    padded = np.pad(filled, 1, mode="edge")
    core = ndimage.distance_transform_edt(padded, sampling=spacing)[1:-1, 1:-1] > _OPENING_MM
    if not core.any():
        return core
    return ndimage.distance_transform_edt(~core, sampling=spacing) <= _OPENING_MM


def _bilinear(stack: np.ndarray, size: int) -> np.ndarray:
    """[Z, Y, X] to [Z, size, size], float32."""
    if stack.shape[1:] == (size, size):
        return stack
    # A crop has negative or odd strides at times; torch wants a plain array.
    batch = torch.from_numpy(np.ascontiguousarray(stack))[:, None]
    small = F.interpolate(
        batch, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return small[:, 0].numpy()


def _nearest(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """[Z, Y, X] to [Z, height, width]: the pixel in which the centre of each new pixel falls."""
    rows = ((np.arange(height) + 0.5) * (stack.shape[1] / height)).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * (stack.shape[2] / width)).astype(np.intp)
    return stack[:, rows[:, None], columns[None, :]]
