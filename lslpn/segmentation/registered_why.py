"""The windows that decided if supports were registered: `why` in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models import LSLPN, device_of
from .descriptors import centres
from .frames import Frame
from .registration import Alignment
from .why import Recorder, Why


class VolumeRecorder:
    """Collects a `Why`, support by support.

    Args:
        model: the network, with `reduce` "max".
        supports: all supports.
        query: the scan to segment.
        features: [Z, D, h, w] of the query's slices.
        reach: how many slices a window extends to either side.
    """

    def __init__(
        self, model: LSLPN, supports: Sequence[Frame], query: Frame, features: Tensor, reach: int
    ) -> None:
        self.model, self.supports, self.query = model, supports, query
        self.features, self.reach = features, reach
        y, x = (round(mm / s) for mm, s in zip(query.size[1:], query.spacing[1:], strict=True))
        y0, x0 = query.corner
        count = query.source.data.shape[0]
        boxes = np.tile([y0, y0 + y, x0, x0 + x], (count, 1))
        others = [np.zeros((support.source.data.shape[0], 4), np.int64) for support in supports]
        _, height, width = query.slices.shape
        self.recorder = Recorder(count, model.head.grid, (height, width), boxes, others)

    def add(
        self,
        number: int,
        alignment: Alignment,
        warped: Tensor,
        masks: Tensor,
        values: Sequence[int],
    ) -> None:
        """Record the windows of a support.

        Args:
            number: of the support.
            alignment: of the support with the query.
            warped: [Z, D, h, w], its features warped to the query.
            masks: bool [Z, N, H, W], its labels warped to the query.
            values: the N labels.
        """
        support, query, reach = self.supports[number], self.query, self.reach
        device = device_of(self.model)
        depth, count = len(query.slices), query.source.data.shape[0]
        nearest = ((np.arange(count) + 0.5) * depth / count).astype(int)
        heights = heights_of(alignment, support, query, depth)
        here = centres((depth, 16, 16), query.size)
        there = alignment.map.at(here).movedim(0, -1)
        for slices, prototypes in self.model.volume_prototypes(
            warped.to(device), masks.to(device), reach
        ):
            for z, own_prototypes in zip(slices, prototypes, strict=True):
                sources = np.flatnonzero(nearest == z).tolist()
                span = heights[max(0, z - reach) : z + reach + 1]
                span = span[span >= 0]
                if not sources or not len(span):
                    continue
                centre = int(heights[z]) if heights[z] >= 0 else int(span[len(span) // 2])
                # The query's frame is shown on the support's slice as the nearest rectangle.
                box = _rectangle(here[z], there[z], support, query)
                self.recorder.support_boxes[number][centre] = box
                self.recorder.add(
                    sources,
                    [0, *values],
                    self.features[z].to(device).expand(len(sources), -1, -1, -1),
                    own_prototypes[None],
                    [[(number, int(s)) for s in span]],
                    [(number, centre)],
                )

    def result(self) -> Why:
        """The windows recorded so far."""
        return self.recorder.result()


def heights_of(alignment: Alignment, support: Frame, query: Frame, count: int) -> np.ndarray:
    """The support's slice at the centre of each of `count` slices of the query, or -1."""
    z = (torch.arange(count) + 0.5) * (query.size[0] / count)
    y, x = (torch.full_like(z, mm / 2) for mm in query.size[1:])
    heights = alignment.map.at(torch.stack((z, y, x), -1)[None, None])[0, 0, 0]
    index = (heights / support.spacing[0]).floor().long()
    outside = (index < 0) | (index >= len(support.source.data))
    return torch.where(outside, -1, index).numpy()


def _rectangle(here: Tensor, there: Tensor, support: Frame, query: Frame) -> list[int]:
    """Voxels y0, y1, x0, x1 of the support under the query's frame, by least squares."""
    out = []
    for axis, corner in enumerate(support.corner, 1):
        a, b = here[..., axis].flatten().double(), there[..., axis].flatten().double()
        slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
        for end in (0.0, query.size[axis]):
            place = float(b.mean() + slope * (end - a.mean())) / support.spacing[axis]
            out.append(min(max(round(place) + corner, 0), support.source.data.shape[axis]))
    return out
