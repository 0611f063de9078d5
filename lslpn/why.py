"""Why a pixel took its label: the windows of the support that were most alike there.

The head keeps the greatest cosine of each class and forgets which window gave it. Here the same
comparison is made once more, at the resolution of the features, and the windows are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lslpn_kernels import GridSpec

NONE = -1  # in `Why.labels` and `Why.windows`


class Shots(NamedTuple):
    """Slices of one support that prototypes were pooled from: first to last, `centre` matched."""

    support: int
    first: int
    centre: int
    last: int


@dataclass(frozen=True)
class Why:
    """The classes that a query resembled most, with the windows that said so.

    All arrays are at the resolution of the features, h x w cells over the network's square input,
    for Z query slices and R ranks, the most alike first. A cell is compared at its centre.

    Attributes:
        labels: int [Z, R, h, w], label values; 0 is the background, NONE where there is no R-th.
        windows: int [Z, R, h, w], the window in which that class was most alike:
            (s * Gy + gy) * Gx + gx, with s an index into `sources[z]`; NONE where none of the
            windows over the cell shows the class, whose cosine is 0 then.
        cosines: float [Z, R, h, w], -1 to 1.
        sources: for each query slice the sources that its windows were pooled from, each of one or
            more runs of slices; empty where no organ was looked for, and the arrays say nothing.
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
    cells = [_cells(axis.pixels, axis.cells, axis.windows, axis.covering) for axis in axes]
    directions = torch.nn.functional.normalize(features, dim=1, eps=1e-8)
    shown = prototypes.abs().amax(-1) > 0
    unit = torch.nn.functional.normalize(prototypes.to(features.dtype), dim=-1, eps=1e-8)
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


def _cells(pixels: int, cells: int, windows: int, covering) -> list[slice]:  # type: ignore[no-untyped-def]
    """The cells whose centres each window covers."""
    over = [covering(int((cell + 0.5) * pixels / cells)) for cell in range(cells)]
    return [
        slice(
            next((c for c, (_, last) in enumerate(over) if last >= m), cells),
            next((c for c, (first, _) in enumerate(over) if first > m), cells),
        )
        for m in range(windows)
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
        self.kept: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}

    def add(
        self,
        queries: Sequence[int],
        values: Sequence[int],
        features: Tensor,
        prototypes: Tensor,
        sources: Sequence[Sequence[tuple[int, int]]],
        matched: Sequence[tuple[int, int]],
    ) -> None:
        """Record some query slices; where they come twice, the clearer organ wins in each cell.

        Args:
            queries: their numbers.
            values: the label values of the C classes, 0 first.
            features: [Q, D, h, w].
            prototypes: [S, C, Gy, Gx, D].
            sources: for each source the (support, slice) that it was pooled from.
            matched: the (support, slice) that the query slices are matched with.
        """
        cosines, windows = winners(features, prototypes, self.grid, self.size)
        lead = (cosines[:, 1:].amax(1) - cosines[:, 0]).cpu().numpy()
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, : self.ranks]
        label = torch.tensor(values, device=features.device)[order]
        found = [
            np.full((len(queries), self.ranks, *features.shape[2:]), NONE, kind)
            for kind in (np.int32, np.int32, np.float32)
        ]
        for out, ranked in zip(
            found, (label, windows.gather(1, order), cosines.gather(1, order)), strict=True
        ):
            out[:, : order.shape[1]] = ranked.cpu().numpy()
        spans = tuple(_spans(source, dict(matched)) for source in sources)
        per_source = self.grid.shape(*self.size)[0] * self.grid.shape(*self.size)[1]
        for i, z in enumerate(queries):
            labels, windows_z, cosines_z = (out[i] for out in found)
            shift = len(self.sources[z]) * per_source  # sources of an earlier part stay
            windows_z = np.where(windows_z == NONE, NONE, windows_z + shift)
            new = (labels, windows_z, cosines_z, lead[i])
            if z in self.kept:
                better = lead[i] > self.kept[z][3]
                new = tuple(np.where(better, a, b) for a, b in zip(new, self.kept[z], strict=True))  # type: ignore[assignment]
            self.kept[z] = new
            self.sources[z] += spans

    def result(self) -> Why:
        """What was recorded."""
        shape = next((kept[0].shape for kept in self.kept.values()), (self.ranks, 1, 1))
        arrays = [
            np.full((len(self.sources), *shape), fill, kind)
            for fill, kind in ((NONE, np.int32), (NONE, np.int32), (0, np.float32))
        ]
        for z, kept in self.kept.items():
            for array, one in zip(arrays, kept, strict=False):
                array[z] = one
        edges = []
        for pixels in self.size:
            axis = self.grid.axis(pixels)
            edges.append(np.array([(s, s + axis.window) for s in axis.starts]) / pixels)
        return Why(
            arrays[0], arrays[1], arrays[2], tuple(self.sources),
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
