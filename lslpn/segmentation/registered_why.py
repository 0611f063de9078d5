"""The windows that decided where supports were registered: `why` for maps in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models import LSLPN
from .descriptors import Field, centres
from .frames import Frame
from .registration import Alignment
from .why import Recorder


def recorder_of(model: LSLPN, supports: Sequence[Frame], query: Frame) -> Recorder:
    count = query.source.data.shape[0]
    high, wide = (round(mm / s) for mm, s in zip(query.size[1:], query.spacing[1:], strict=True))
    y0, x0 = query.corner
    boxes = np.tile(np.array([y0, y0 + high, x0, x0 + wide]), (count, 1))
    others = [np.zeros((support.source.data.shape[0], 4), np.int64) for support in supports]
    _, height, width = query.slices.shape
    return Recorder(count, model.head.grid, (height, width), boxes, others)


def record(
    recorder: Recorder,
    model: LSLPN,
    number: int,
    alignment: Alignment,
    support: Frame,
    query: Frame,
    features: Field,
    warped: Tensor,
    masks: Tensor,
    values: Sequence[int],
    reach: int,
) -> None:
    """Record the windows of support `number` that decide, for each slice of the query."""
    device = next(model.parameters()).device
    depth = len(query.slices)
    count = query.source.data.shape[0]
    near = ((np.arange(count) + 0.5) * depth / count).astype(int)
    heights = heights_of(alignment, support, query, depth)
    where = centres((depth, 16, 16), query.size)
    there = alignment.map.at(where).movedim(0, -1)
    planes = features.values.transpose(0, 1)
    for slices, prototypes in model.volume_prototypes(warped.to(device), masks.to(device), reach):
        for z, own_prototypes in zip(slices, prototypes, strict=True):
            sources = np.flatnonzero(near == z).tolist()
            span = heights[max(0, z - reach) : z + reach + 1]
            span = span[span >= 0]
            if not sources or not len(span):
                continue
            centre = int(heights[z]) if heights[z] >= 0 else int(span[len(span) // 2])
            # On a slice of the support, the query's frame is shown as the nearest rectangle.
            recorder.support_boxes[number][centre] = _rectangle(where[z], there[z], support, query)
            recorder.add(
                sources,
                [0, *values],
                planes[z].to(device).expand(len(sources), -1, -1, -1),
                own_prototypes[None],
                [[(number, int(s)) for s in span]],
                [(number, centre)],
            )


def heights_of(alignment: Alignment, support: Frame, query: Frame, count: int) -> np.ndarray:
    """The support's slice at the centre of each of `count` slices of the query, or -1."""
    z = (torch.arange(count) + 0.5) * (query.size[0] / count)
    y, x = (mm / 2 for mm in query.size[1:])
    place = torch.stack((z, torch.full_like(z, y), torch.full_like(z, x)), -1)
    return support.slice_of(alignment.map.at(place[None, None])[0, 0, 0]).numpy()


def _rectangle(here: Tensor, there: Tensor, support: Frame, query: Frame) -> list[int]:
    """Voxels y0, y1, x0, x1 of the support under the query's frame, by least squares."""
    out = []
    for axis, corner in ((1, support.corner[0]), (2, support.corner[1])):
        a, b = here[..., axis].flatten().double(), there[..., axis].flatten().double()
        slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
        ends = b.mean() + slope * (torch.tensor([0.0, query.size[axis]]) - a.mean())
        limit = support.source.data.shape[axis]
        out += [
            min(max(round(float(end) / support.spacing[axis]) + corner, 0), limit) for end in ends
        ]
    return out
