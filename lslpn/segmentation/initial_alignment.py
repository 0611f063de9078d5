"""Initial alignment of two scans, which may show different parts of the body.

Every slice is described by its features on a grid of cells over the patient's trunk. The support is
shifted along z and scaled a little so that corresponding slices are as similar as possible. In the
plane, the bounding box of one trunk is mapped to that of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptors import Field
from .slice_matching import line_through, match_slices, slice_similarity

_CELLS = 8
_STEP_MM = 5.0
_SCALES = (0.85, 0.92, 1.0, 1.08, 1.16)
_SCALE_PENALTY = 0.2  # cosine, for a scale of e
# Scans must overlap by this share of the shorter one, or by this many mm if that is less. With
# these, the error over 30 ordered pairs of six scans is 20 mm in the median and 84 mm at most.
_LEAST_SHARE, _LEAST_MM = 0.6, 150.0
SHORT_MM = 150.0  # a scan less high than this shows only a part of the abdomen
_MIRRORED = 0.1  # cosine by which a mirrored support must be more similar to be reported


@dataclass(frozen=True)
class InitialAlignment:
    """Position of a support relative to a query along z.

    Attributes:
        scale: mm of the support per mm of the query along z.
        shift: mm, the height in the support of the query's lowest point.
        similarity: mean cosine of corresponding slices, -1 to 1.
        mirrored: the axes ("x", "y", "z") along which a mirrored support would be more similar.
    """

    scale: float
    shift: float
    similarity: float
    mirrored: tuple[str, ...] = ()


def initial_alignment(
    query: Tensor, support: Tensor, query_mm: float, support_mm: float
) -> InitialAlignment:
    """Find the shift and scale along z at which the support is most similar to the query.

    Args:
        query: [Z, D, 8, 8], from `slice_descriptors`.
        support: [Z', D, 8, 8], from `slice_descriptors`.
        query_mm: height of the query.
        support_mm: height of the support.
    """
    best = _best(query, support, query_mm, support_mm)
    least = best.similarity + _MIRRORED
    mirrored = tuple(
        name
        for name, axis in (("x", 3), ("y", 2), ("z", 0))
        if _best(query, support.flip(axis), query_mm, support_mm).similarity > least
    )
    return replace(best, mirrored=mirrored)


def _best(a: Tensor, b: Tensor, a_mm: float, b_mm: float) -> InitialAlignment:
    # The mean over a scan's slices says nothing about z and is subtracted. A short scan differs
    # little from its own mean, so the mean of the taller scan is subtracted from both.
    means = [a.mean(0), b.mean(0)]
    if min(a_mm, b_mm) < SHORT_MM:
        means = [means[0] if a_mm > b_mm else means[1]] * 2
    a, b = (
        F.normalize((scan - mean).flatten(1), dim=1)
        for scan, mean in zip((a, b), means, strict=True)
    )
    cosine = a @ b.T
    heights = (torch.arange(len(a)) + 0.5) * (a_mm / len(a))
    least = min(_LEAST_SHARE * min(a_mm, b_mm), _LEAST_MM)
    best, highest = InitialAlignment(1.0, 0.0, -1.0), -torch.inf
    for scale in _SCALES:
        penalty = _SCALE_PENALTY * abs(float(torch.tensor(scale).log()))
        for shift in torch.arange(-scale * a_mm, b_mm + _STEP_MM, _STEP_MM).tolist():
            row = ((heights * scale + shift) / (b_mm / len(b))).floor().long()
            inside = (row >= 0) & (row < len(b))
            if int(inside.sum()) * a_mm / len(a) < least:
                continue
            similarity = float(cosine[inside, row[inside]].mean())
            if similarity - penalty > highest:
                best, highest = InitialAlignment(scale, shift, similarity), similarity - penalty
    return best


def matched_line(
    query: Tensor, support: Tensor, query_mm: float, support_mm: float
) -> tuple[float, float] | None:
    """Scale and shift of a line through individually matched slices, or None.

    Arguments as for `initial_alignment`.
    """
    steps = query_mm / len(query), support_mm / len(support)
    cells = F.avg_pool2d(query, 2), F.avg_pool2d(support, 2)
    return line_through(match_slices(slice_similarity(*cells, *steps), *steps), *steps)


def slice_descriptors(features: Field, boxes: Tensor) -> Tensor:
    """Features on a grid of cells over the trunk, for each slice: [Z, D, 8, 8].

    Args:
        features: [D, Z, h, w].
        boxes: [Z, 4] mm, y0, y1, x0, x1.
    """
    height, width = features.size[1:]
    cells = (torch.arange(_CELLS) + 0.5) / _CELLS
    y = boxes[:, :1] + (boxes[:, 1:2] - boxes[:, :1]) * cells
    x = boxes[:, 2:3] + (boxes[:, 3:] - boxes[:, 2:3]) * cells
    columns, rows = (2 * x / width - 1)[:, None, :], (2 * y / height - 1)[:, :, None]
    place = torch.stack(torch.broadcast_tensors(columns, rows), -1)
    smooth = F.avg_pool2d(features.values.transpose(0, 1), 3, 1, 1, count_include_pad=False)
    return F.grid_sample(smooth, place, padding_mode="border", align_corners=False)


def trunk_to_trunk(
    positions: Tensor,
    scale: float,
    shift: float,
    query: Tensor,
    query_mm: float,
    support: Tensor,
    support_mm: float,
) -> Tensor:
    """Map the query's trunk to the support's trunk: positions [Z, Y, X, 3] in the support.

    Args:
        positions: in the query; those of a plane have the same height.
        scale: along z, as in `InitialAlignment`.
        shift: as in `InitialAlignment`.
        query: boxes of the query's trunk, [Zq, 4] mm.
        query_mm: height of the query.
        support: boxes of the support's trunk, [Zs, 4] mm.
        support_mm: height of the support.
    """
    z = positions[..., 0]
    height = z * scale + shift
    own, other = (
        boxes[(at / (mm / len(boxes))).long().clamp(0, len(boxes) - 1)]
        for boxes, at, mm in ((query, z, query_mm), (support, height, support_mm))
    )
    out = [height]
    for axis, (low, high) in ((1, (0, 1)), (2, (2, 3))):
        share = (positions[..., axis] - own[..., low]) / (own[..., high] - own[..., low])
        out.append(other[..., low] + share * (other[..., high] - other[..., low]))
    return torch.stack(out, -1)
