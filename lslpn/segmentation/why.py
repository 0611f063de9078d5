"""Why a pixel got its label: the windows of the support that were most similar there.

The head returns the greatest cosine of each class, not the window that it comes from. Here the same
matching is done again at the resolution of the features, and the windows are recorded.
"""

from __future__ import annotations

import math
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


class Shots(NamedTuple):
    """Slices of one support that prototypes were pooled from: first to last, `centre` matched."""

    support: int
    first: int
    centre: int
    last: int


@dataclass(frozen=True)
class Why:
    """The classes that are most similar to each part of a query, and their best windows.

    All arrays are at the resolution of the features, h x w cells over the network's square input,
    for Z query slices and R ranks, the most similar first. A cell is compared at its centre.

    Attributes:
        labels: int [Z, R, h, w], label values; 0 is the background, NONE where there is no R-th.
        windows: int [Z, R, h, w], the window in which that class was most similar:
            (s * Gy + gy) * Gx + gx, with s an index into `sources[z]`; NONE where none of the
            windows over the cell shows the class, whose cosine is 0 then.
        cosines: float [Z, R, h, w], -1 to 1.
        sources: for each query slice the sources that its windows were pooled from, each of one or
            more runs of slices; empty where no organ was searched for, and the arrays mean nothing.
        rows: [Gy, 2], where windows begin and end along y, as parts of the square's height.
        columns: [Gx, 2], along x.
        query_boxes: int [Z, 4], the part y0, y1, x0, x1 of each query slice that the square is.
        support_boxes: the same of each support, [Zs, 4].
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
    """The greatest cosine of each class in each cell, and the window that has it.

    Equation (3) at the centres of the cells, where the interpolated features are the features
    themselves. Of equal cosines the lowest window wins, as in the head.

    Args:
        features: [Q, D, h, w] of the query.
        prototypes: [S, C, Gy, Gx, D] of S sources; a zero prototype is a window without the class.
        grid: the windows.
        size: (H, W) of the image, on which the windows lie.

    Returns:
        cosines [Q, C, h, w] of the features' dtype, and int64 windows [Q, C, h, w] as `Why.windows`
        has them.
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
    """The cells whose centres each window covers."""
    over = [
        axis.covering(int((cell + 0.5) * axis.pixels / axis.cells)) for cell in range(axis.cells)
    ]
    first, last = (np.array(ends) for ends in zip(*over, strict=True))  # both never decrease
    return [
        slice(int(np.searchsorted(last, m)), int(np.searchsorted(first, m, side="right")))
        for m in range(axis.windows)
    ]


class Recorder:
    """Collects a `Why` while a scan is segmented, batch by batch.

    Args:
        slices: Z, of the query.
        grid, size: the windows, and the (H, W) of the square on which they lie.
        query_boxes, support_boxes: as in `Why`.
        ranks: R, the classes that are kept for each cell.
    """

    def __init__(
        self,
        slices: int,
        grid: GridSpec,
        size: tuple[int, int],
        query_boxes: np.ndarray,
        support_boxes: Sequence[np.ndarray],
        ranks: int = 3,
    ) -> None:
        self.grid, self.size, self.ranks = grid, size, ranks
        self.query_boxes, self.support_boxes = query_boxes, tuple(support_boxes)
        self.sources: list[tuple[tuple[Shots, ...], ...]] = [()] * slices
        # Labels, windows, cosines [Z, R, h, w], and [Z, 1, h, w] best organ less background.
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
        """Record some query slices; of slices recorded twice, the larger margin wins in each cell.

        Args:
            queries: their numbers.
            values: the label values of the C classes, 0 first.
            features: [Q, D, h, w].
            prototypes: [S, C, Gy, Gx, D].
            sources: for each source the (support, slice) that it was pooled from.
            matched: the (support, slice) that the query slices are matched with.
        """
        cosines, windows = winners(features, prototypes, self.grid, self.size)
        margin = cosines[:, 1:].amax(1, keepdim=True) - cosines[:, :1]
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, : self.ranks]
        # Sources recorded for these slices with other classes come first.
        shift = len(self.sources[queries[0]]) * math.prod(self.grid.shape(*self.size))
        windows = torch.where(windows == NONE, NONE, windows + shift)
        label = torch.tensor(values, device=features.device)[order]
        new = [label, windows.gather(1, order), cosines.gather(1, order), margin]
        if not self.arrays:
            shape = (len(self.sources), self.ranks, *features.shape[2:])
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
        """What was recorded."""
        labels, windows, cosines = self.arrays[:3] or [
            np.full((len(self.sources), self.ranks, 1, 1), NONE, kind)
            for kind in (np.int32, np.int32, np.float32)
        ]
        edges = []
        for pixels in self.size:
            axis = self.grid.axis(pixels)
            edges.append(np.array([(s, s + axis.window) for s in axis.starts]) / pixels)
        return Why(
            labels, windows, cosines, tuple(self.sources),
            edges[0], edges[1], self.query_boxes, self.support_boxes,
        )  # fmt: skip


def _spans(shots: Sequence[tuple[int, int]], centres: dict[int, int]) -> tuple[Shots, ...]:
    """Runs of slices, one for each support among `shots`."""
    out = []
    for support in sorted({support for support, _ in shots}):
        slices = sorted(z for i, z in shots if i == support)
        centre = centres.get(support, slices[len(slices) // 2])
        out.append(Shots(support, slices[0], centre, slices[-1]))
    return tuple(out)
