"""Scans on a common scale, which segmentation works on.

A frame is the bounding box of the patient's trunk over all slices of a scan, resampled to a fixed
number of millimetres per pixel, so that the network sees an organ at the same size in every scan.
Positions in it are millimetres (z, y, x) from its corner, for a patient at least 300 mm wide; the
lengths of smaller ones (children, heads, mice) are scaled up in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..data.intensities import interpret
from ..data.slices import (
    Treatment,
    Window,
    resized,
    shared_window,
    trunk_boxes,
    warn_not_cropped,
    warn_unlike,
    whole_boxes,
    window_limits,
)
from ..data.volumes import Volume, check_same_grid, label_dtype
from ..errors import InputError

_WIDE_MM = 300.0  # patients narrower than this are scaled up to it
_FIELD_MM = 360.0  # width of a patient that `ModelConfig.size` pixels cover
_SLICE_MM = 5.0  # slices closer together are resampled to this
_LARGEST_MM = (3000.0, 1200.0, 1200.0)  # z, y, x; no scan of a patient is larger
_LARGEST = 1.5  # a side has at most this many times `size` pixels
_SOFT_HU = 25.0  # between fat and soft tissue
_BRIGHTEST = 99.5  # percentile of the body's grey values that is mapped to 1, if it is not CT


@dataclass(frozen=True)
class Frame:
    """A scan as segmentation sees it.

    Attributes:
        slices: float32 [Z, H, W] in [0, 1].
        size: mm (z, y, x) of the frame.
        boxes: float32 [Z, 4], mm: the patient's trunk on each slice, y0, y1, x0, x1; the whole
            slice if scans are not cropped.
        corner: voxel (y, x) of the source at which the frame begins; the frame has all slices.
        spacing: mm (z, y, x) of the source's voxels.
        source: the volume that the frame was built from.
        labels: its labels [Z, Y, X], in the source's own grid, or None.
        treatment: how the source was processed, see `slices.warn_unlike`.
        tissue: float32 [Z, H, W], from 0 for air (the low end of the window) to 1 for soft tissue;
            None if the scan is not CT or the window begins above soft tissue.
    """

    slices: Tensor
    size: tuple[float, float, float]
    boxes: Tensor
    corner: tuple[int, int]
    spacing: tuple[float, float, float]
    source: Volume
    labels: np.ndarray | None
    treatment: Treatment
    tissue: Tensor | None

    @cached_property
    def half(self) -> tuple[np.ndarray, list[float]]:
        """Grey values [Z, h, w] at half the in-plane resolution, and their voxels' mm (z, y, x)."""
        grey = halved(self.slices[:, None])[:, 0].numpy()
        return grey, [mm / n for mm, n in zip(self.size, grey.shape, strict=True)]

    def labels_at(self, positions: Tensor) -> Tensor:
        """Labels, int64 [...], of the voxels that contain positions [..., 3]; 0 outside."""
        assert self.labels is not None
        voxel = (positions / positions.new_tensor(self.spacing)).floor().long()
        voxel += torch.tensor([0, *self.corner])
        shape = torch.tensor(self.labels.shape)
        inside = ((voxel >= 0) & (voxel < shape)).all(-1)
        z, y, x = torch.where(inside[..., None], voxel, 0).unbind(-1)
        found = torch.from_numpy(np.asarray(self.labels[z.numpy(), y.numpy(), x.numpy()]))
        return torch.where(inside, found.long(), 0)


def frames_of(
    config: ModelConfig,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    warned: bool = False,
) -> tuple[list[Frame], Frame]:
    """Frames of supports and query, with one window for all, and either all cropped or none.

    Args:
        config: the model's, for its size, window and normalisation.
        supports: pairs of an image and its labels.
        query: the scan to segment.
        warned: do not warn about scans that were not processed in the same way.

    Raises:
        InputError: labels are on another grid than their image, every voxel of a scan is on one
            side of the window, or a scan is larger than any patient.
    """
    for image, drawn in supports:
        check_same_grid(image, drawn)
    images = [*(image for image, _ in supports), query]
    labels: list[np.ndarray | None] = [*(drawn.data for _, drawn in supports), None]
    read = [interpret(image.data) for image in images]
    window = shared_window(config.window, read)
    data = [how.apply(image.data) for how, image in zip(read, images, strict=True)]
    trunks = [
        trunk_boxes(values, image.spacing, how.air)
        for values, image, how in zip(data, images, read, strict=True)
    ]
    without = [im.path.name for im, box in zip(images, trunks, strict=True) if box is None]
    boxes = [
        whole_boxes(values) if without or box is None else box
        for values, box in zip(data, trunks, strict=True)
    ]
    widest = max(
        (box[:, high].max() - box[:, low].min()) * image.spacing[axis]
        for box, image in zip(boxes, images, strict=True)
        for low, high, axis in ((0, 1, 1), (2, 3, 2))
    )
    unit = min(1.0, float(widest) / _WIDE_MM)
    treatments = [
        Treatment(image.path.name, how, not without)
        for image, how in zip(images, read, strict=True)
    ]
    if not warned:
        warn_not_cropped(without, len(images))
        warn_unlike(treatments)
    *frames, target = (
        _frame(config, window, unit, *scan)
        for scan in zip(images, labels, data, boxes, treatments, strict=True)
    )
    return frames, target


def values_of(supports: Sequence[Frame]) -> list[int]:
    """All labels that any of the supports has, in ascending order."""
    labels = [np.unique(frame.labels) for frame in supports if frame.labels is not None]
    return [int(value) for value in np.unique(np.concatenate(labels)) if value]


def _frame(
    config: ModelConfig,
    window: Window,
    unit: float,
    image: Volume,
    labels: np.ndarray | None,
    data: np.ndarray,
    boxes: np.ndarray,
    treatment: Treatment,
) -> Frame:
    depth = len(data)
    (y0, x0), (y1, x1) = boxes[:, ::2].min(0).tolist(), boxes[:, 1::2].max(0).tolist()
    dz, dy, dx = (mm / unit for mm in image.spacing)
    size = (depth * dz, (y1 - y0) * dy, (x1 - x0) * dx)
    if any(mm > largest for mm, largest in zip(size, _LARGEST_MM, strict=True)):
        voxel = " x ".join(f"{mm:.3g}" for mm in image.spacing)
        extent = " x ".join(f"{mm:.0f}" for mm in size)
        raise InputError(
            f"{image.path}: voxels of {voxel} mm make a body of {extent} mm, larger than any "
            "patient's; correct the voxel sizes or the unit of length in its header"
        )
    limits = window_limits(treatment.intensities, window)
    if limits is None:
        body = data[data > treatment.intensities.air]
        limits = (float(data.min()), float(np.percentile(body if body.size else data, _BRIGHTEST)))
    low, high = limits
    part = data[:, y0:y1, x0:x1]
    if not (low < high and part.max() > low and part.min() < high):
        raise InputError(
            f"{image.path}: every voxel is on one side of the window {low:g} to {high:g}, "
            "expected some in it; give a window in the values of the image"
        )
    values = ((part.clip(low, high) - low) / (high - low)).astype(np.float32)
    pixel = max(_FIELD_MM / config.size, max(size[1:]) / (_LARGEST * config.size))
    shape = (
        depth if dz >= _SLICE_MM else max(1, round(size[0] / _SLICE_MM)),
        max(32, round(size[1] / pixel)),
        max(32, round(size[2] / pixel)),
    )
    slices = _resized(torch.from_numpy(values), shape)
    tissue = None
    if treatment.intensities.hu and low < _SOFT_HU:
        tissue = (slices * ((high - low) / (_SOFT_HU - low))).clamp_max(1)
    if config.normalise == "slice":
        least = slices.amin((1, 2), keepdim=True)
        range_ = slices.amax((1, 2), keepdim=True) - least
        slices = (slices - least) / torch.where(range_ > 0, range_, 1.0)
    # Boxes in mm of the frame, on its own slices.
    rows = ((np.arange(shape[0]) + 0.5) * depth / shape[0]).astype(int)
    corners = (boxes[rows] - [y0, y0, x0, x0]) * np.array([dy, dy, dx, dx])
    return Frame(
        slices,
        size,
        torch.from_numpy(corners.astype(np.float32)),
        (y0, x0),
        (dz, dy, dx),
        image,
        labels,
        treatment,
        tissue,
    )


def halved(planes: Tensor) -> Tensor:
    """[Z, N, H, W] averaged to half the in-plane resolution."""
    size = [(side + 1) // 2 for side in planes.shape[2:]]
    return F.interpolate(planes, size=size, mode="area")


def _resized(data: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[Z, Y, X] resampled to `shape`, with averaging along axes that shrink."""
    out = data.new_empty(len(data), *shape[1:])
    for z, plane in enumerate(data):
        out[z] = resized(plane[None, None], shape[1:])[0, 0]
    if shape[0] == len(data):
        return out
    columns = out.flatten(1).T[None, None]
    columns = resized(columns, (columns.shape[2], shape[0]))
    return columns[0, 0].T.reshape(shape).contiguous()


def labels_in_source(frame: Frame, logits: Tensor, values: Sequence[int]) -> np.ndarray:
    """Labels [Z, Y, X] of the source: at each voxel the one with the greatest logit above 0.

    Args:
        frame: of the scan.
        logits: [Z', N, h, w] against the background, over the frame at any resolution; they are
            interpolated linearly.
        values: the N labels.
    """
    kind = label_dtype(max(values))
    out = np.zeros(frame.source.data.shape, kind)
    known = np.array([0, *values], kind)
    for place, plane in _planes(frame, logits):
        highest, winner = plane.max(0)
        out[place] = known[torch.where(highest > 0, winner + 1, 0).numpy()]
    return out


def probabilities_in_source(frame: Frame, logits: Tensor) -> np.ndarray:
    """Probability of each label at each voxel of the source, uint8 [N, Z, Y, X], 255 for 1.

    The softmax of the logits and the background's, which is 0. Outside the frame it is 0.
    Arguments as for `labels_in_source`.
    """
    out = np.zeros((logits.shape[1], *frame.source.data.shape), np.uint8)
    for (z, rows, columns), plane in _planes(frame, logits):
        shares = F.pad(plane, (0, 0, 0, 0, 1, 0)).softmax(0)[1:]
        out[:, z, rows, columns] = (shares * 255).round().byte().numpy()
    return out


def _planes(frame: Frame, logits: Tensor) -> Iterator[tuple[tuple[int, slice, slice], Tensor]]:
    """Logits [N, y, x] for the part of each of the source's slices that is in the frame."""
    depth, given = frame.source.data.shape[0], len(logits)
    height, width = (round(mm / s) for mm, s in zip(frame.size[1:], frame.spacing[1:], strict=True))
    y0, x0 = frame.corner
    heights = ((np.arange(depth) + 0.5) * given / depth - 0.5).clip(0, given - 1).tolist()
    for z, at in enumerate(heights):
        low = int(at)
        high = min(low + 1, given - 1)
        plane = torch.lerp(logits[low].float(), logits[high].float(), at - low)
        plane = F.interpolate(plane[None], size=(height, width), mode="bilinear")[0]
        yield (z, slice(y0, y0 + height), slice(x0, x0 + width)), plane
