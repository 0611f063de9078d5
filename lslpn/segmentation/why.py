"""Why a pixel got its label: the windows of the support that were most similar there.

The head returns the greatest cosine of each class, but not its window. Here the matching is
repeated at the resolution of the features, and the windows are recorded.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn_kernels import GridSpec
from lslpn_kernels.geometry import Axis

NONE = -1  # in `Why.labels` and `Why.windows`
_RANKS = 3  # classes that are recorded for each cell


class Shots(NamedTuple):
    """Slices of a support, `first` to `last`, from which prototypes were pooled.

    `centre` is the one that was matched.
    """

    support: int
    first: int
    centre: int
    last: int


@dataclass(frozen=True)
class Why:
    """The classes that are most similar to each part of a query, and their best windows.

    All arrays are at the resolution of the features, h x w cells over the network's input, for Z
    query slices and R ranks, the most similar first. A cell is compared at its centre.

    Attributes:
        labels: int [Z, R, h, w], label values; 0 is the background, NONE if there is no R-th class.
        windows: int [Z, R, h, w], the window in which that class was most similar:
            (s * Gy + gy) * Gx + gx, with s an index into `sources[z]`; NONE if none of the windows
            over the cell shows the class, whose cosine then is 0.
        cosines: float [Z, R, h, w], -1 to 1.
        sources: for each query slice the sources from which windows were pooled, each of one or
            more runs of slices; empty if no organ was searched for, so that the arrays are void.
        rows: [Gy, 2], where windows begin and end along y, as fractions of the input's height.
        columns: [Gx, 2], the same along x.
        query_boxes: int [Z, 4], the part y0, y1, x0, x1 of each query slice that was the input.
        support_boxes: the same for each support, [Zs, 4].
    """

    labels: np.ndarray
    windows: np.ndarray
    cosines: np.ndarray
    sources: tuple[tuple[tuple[Shots, ...], ...], ...]
    rows: np.ndarray
    columns: np.ndarray
    query_boxes: np.ndarray
    support_boxes: tuple[np.ndarray, ...]


def winners(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The greatest cosine of each class in each cell, and its window.

    Equation (3) at the centres of the cells, where the interpolated features are the features
    themselves. Of equal cosines the lowest window wins, as in the head.

    Args:
        features: [Q, D, h, w] of the query.
        prototypes: [S, C, Gy, Gx, D] of S sources; a zero prototype is a window without the class.
        grid: the windows.
        size: (H, W) of the image that the windows cover.

    Returns:
        cosines [Q, C, h, w] of the features' dtype, and int64 windows [Q, C, h, w] as in
        `Why.windows`.
    """
    _, _, h, w = features.shape
    axes = grid.axis(size[0], h), grid.axis(size[1], w)
    cells = [_cells(axis) for axis in axes]
    directions = F.normalize(features, dim=1, eps=1e-8)
    shown = prototypes.abs().amax(-1) > 0
    unit = F.normalize(prototypes.to(features.dtype), dim=-1, eps=1e-8)
    best = features.new_full((len(features), unit.shape[1], h, w), -torch.inf)
    which = torch.full(best.shape, NONE, device=features.device)
    for s in range(len(unit)):
        for i, y in enumerate(cells[0]):
            for j, x in enumerate(cells[1]):
                here = (..., y, x)
                cosine = torch.einsum("qdyx,cd->qcyx", directions[here], unit[s, :, i, j])
                index = (s * axes[0].windows + i) * axes[1].windows + j
                window = torch.where(shown[s, :, i, j], index, NONE)[:, None, None]
                better = cosine > best[here]
                best[here] = torch.where(better, cosine, best[here])
                which[here] = torch.where(better, window, which[here])
    return best, which


def _cells(axis: Axis) -> list[slice]:
    """The cells whose centres are in each window."""
    centres = [int((cell + 0.5) * axis.pixels / axis.cells) for cell in range(axis.cells)]
    return [
        slice(bisect_left(centres, start), bisect_left(centres, start + axis.window))
        for start in axis.starts
    ]


class Recorder:
    """Collects a `Why` while a scan is segmented, batch by batch.

    Args:
        slices: how many the query has.
        grid: the windows.
        size: (H, W) of the input that they cover.
        query_boxes: as in `Why`.
        support_boxes: as in `Why`.
    """

    def __init__(
        self,
        slices: int,
        grid: GridSpec,
        size: tuple[int, int],
        query_boxes: np.ndarray,
        support_boxes: Sequence[np.ndarray],
    ) -> None:
        self.grid, self.size = grid, size
        self.query_boxes, self.support_boxes = query_boxes, tuple(support_boxes)
        self.sources: list[tuple[tuple[Shots, ...], ...]] = [()] * slices
        # Labels, windows and cosines [Z, R, h, w]; the best organ's cosine less the background's,
        # [Z, 1, h, w].
        self.arrays: list[np.ndarray] = []

    def add(
        self,
        queries: Sequence[int],
        values: Sequence[int],
        features: Tensor,
        prototypes: Tensor,
        sources: Sequence[Sequence[tuple[int, int]]],
        matched: Sequence[tuple[int, int]],
    ) -> None:
        """Record some query slices.

        If a slice is recorded twice, each cell keeps the larger margin of an organ over the
        background.

        Args:
            queries: numbers of the slices.
            values: the label values of the C classes, 0 first.
            features: [Q, D, h, w].
            prototypes: [S, C, Gy, Gx, D].
            sources: for each source, the (support, slice) pairs from which it was pooled.
            matched: the (support, slice) pairs with which the query slices are matched.
        """
        cosines, windows = winners(features, prototypes, self.grid, self.size)
        margin = cosines[:, 1:].amax(1, keepdim=True) - cosines[:, :1]
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :_RANKS]
        # Sources already recorded for these slices, with other classes, come first.
        shift = len(self.sources[queries[0]]) * math.prod(self.grid.shape(*self.size))
        windows = torch.where(windows == NONE, NONE, windows + shift)
        label = torch.tensor(values, device=features.device)[order]
        new = [label, windows.gather(1, order), cosines.gather(1, order), margin]
        if not self.arrays:
            shape = (len(self.sources), _RANKS, *features.shape[2:])
            self.arrays = [
                np.full(shape, NONE, np.int32),
                np.full(shape, NONE, np.int32),
                np.zeros(shape, np.float32),
                np.full((shape[0], 1, *shape[2:]), -np.inf, np.float32),
            ]
        at = list(queries)
        better = margin.cpu().numpy() > self.arrays[3][at]
        for array, found in zip(self.arrays, new, strict=True):
            kept = array[at]
            if array.shape[1] > found.shape[1]:  # fewer classes than ranks
                missing = (0, 0, 0, 0, 0, array.shape[1] - found.shape[1])
                found = F.pad(found, missing, value=0 if found.is_floating_point() else NONE)
            array[at] = np.where(better, found.cpu().numpy(), kept)
        for z in queries:
            self.sources[z] += tuple(_spans(source, dict(matched)) for source in sources)

    def result(self) -> Why:
        """The windows recorded so far."""
        labels, windows, cosines = self.arrays[:3] or [
            np.full((len(self.sources), _RANKS, 1, 1), NONE, kind)
            for kind in (np.int32, np.int32, np.float32)
        ]
        rows, columns = (
            np.array([(s, s + axis.window) for s in axis.starts]) / axis.pixels
            for axis in map(self.grid.axis, self.size)
        )
        return Why(
            labels, windows, cosines, tuple(self.sources),
            rows, columns, self.query_boxes, self.support_boxes,
        )  # fmt: skip


def _spans(shots: Sequence[tuple[int, int]], centres: dict[int, int]) -> tuple[Shots, ...]:
    """Runs of slices, one for each support among `shots`."""
    out = []
    for support in sorted({support for support, _ in shots}):
        slices = sorted(z for i, z in shots if i == support)
        centre = centres.get(support, slices[len(slices) // 2])
        out.append(Shots(support, slices[0], centre, slices[-1]))
    return tuple(out)
