"""Which part of one scan shows what another shows: where registration begins.

Every slice is described by its features in cells of the patient's trunk. Scans are moved along
each other in z, and stretched a little, to where their slices are most alike; in the plane, trunk
goes to trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Field
from .slice_matching import line_through, match_slices, slice_similarity

_CELLS = 8
_STEP_MM = 5.0
_STRETCHES = (0.85, 0.92, 1.0, 1.08, 1.16)
_STRETCH_COST = 0.2  # cosine that a stretch by the factor e costs
# Scans must overlap by so much of the shorter, or so many mm if that is less. Least is best: with
# it, the best of 30 ordered pairs of six scans lies 20 mm off in the median, 84 at most.
_LEAST_SHARE, _LEAST_MM = 0.6, 150.0
SHORT_MM = 150.0  # along z: a scan that shows part of the abdomen
_MIRRORED = 0.1  # a mirrored scan has to be so much more alike


@dataclass(frozen=True)
class Beginning:
    """How a support lies to a query, roughly.

    Attributes:
        stretch: mm of the support for each of the query along z.
        shift: mm, the height in the support of the query's lowest point.
        likeness: mean cosine of the slices that go together, -1 to 1.
        mirrored: the axes ("x", "y", "z") along which a mirrored support would be more alike.
    """

    stretch: float
    shift: float
    likeness: float
    mirrored: tuple[str, ...]


def begin(query: Tensor, support: Tensor, query_mm: float, support_mm: float) -> Beginning:
    """Move and stretch the support along z to where it is most like the query.

    Args:
        query: [Z, D, 8, 8] of `describe`.
        support: [Z', D, 8, 8].
        query_mm: height of the query.
        support_mm: height of the support.
    """
    stretch, shift, likeness = _best(query, support, query_mm, support_mm)
    mirrored = []
    for name, axis in (("x", 3), ("y", 2), ("z", 0)):
        other = _best(query, support.flip(axis), query_mm, support_mm)[2]
        if other > likeness + _MIRRORED:
            mirrored.append(name)
    return Beginning(stretch, shift, likeness, tuple(mirrored))


def _best(a: Tensor, b: Tensor, a_mm: float, b_mm: float) -> tuple[float, float, float]:
    # What all slices of a scan have in common says nothing of where they lie, but for those of a
    # short scan, in which it is most of what there is.
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
    best = (-torch.inf, 1.0, 0.0, -1.0)
    for stretch in _STRETCHES:
        cost = _STRETCH_COST * abs(float(torch.tensor(stretch).log()))
        for shift in torch.arange(-stretch * a_mm, b_mm + _STEP_MM, _STEP_MM).tolist():
            row = ((heights * stretch + shift) / (b_mm / len(b))).floor().long()
            inside = (row >= 0) & (row < len(b))
            if int(inside.sum()) * a_mm / len(a) < least:
                continue
            likeness = float(cosine[inside, row[inside]].mean())
            if likeness - cost > best[0]:
                best = (likeness - cost, stretch, shift, likeness)
    return best[1], best[2], best[3]


def matched_line(
    query: Tensor, support: Tensor, query_mm: float, support_mm: float
) -> tuple[float, float] | None:
    """Stretch and shift of a line through slices matched one by one, or None; as `begin`."""
    steps = query_mm / len(query), support_mm / len(support)
    cells = F.avg_pool2d(query, 2), F.avg_pool2d(support, 2)
    return line_through(match_slices(slice_similarity(*cells, *steps), *steps), *steps)


def describe(features: Field, boxes: Tensor) -> Tensor:
    """Features in cells of the trunk on each slice: [Z, D, 8, 8].

    Args:
        features: [D, Z, h, w].
        boxes: [Z, 4] mm, y0, y1, x0, x1.
    """
    height, width = features.size[1:]
    cells = (torch.arange(_CELLS) + 0.5) / _CELLS
    y = boxes[:, :1] + (boxes[:, 1:2] - boxes[:, :1]) * cells
    x = boxes[:, 2:3] + (boxes[:, 3:] - boxes[:, 2:3]) * cells
    place = torch.stack(
        (
            (2 * x / width - 1)[:, None, :].expand(-1, _CELLS, -1),
            (2 * y / height - 1)[:, :, None].expand(-1, -1, _CELLS),
        ),
        -1,
    )
    smooth = F.avg_pool2d(features.values.transpose(0, 1), 3, 1, 1, count_include_pad=False)
    return F.grid_sample(smooth, place, padding_mode="border", align_corners=False)


def trunk_to_trunk(
    places: Tensor,
    stretch: float,
    shift: float,
    query: Tensor,
    query_mm: float,
    support: Tensor,
    support_mm: float,
) -> Tensor:
    """The map that lays trunk to trunk: positions [Z, Y, X, 3] in the support.

    Args:
        places: positions in the query; those of a plane have one height.
        stretch: mm of the support for each of the query along z.
        shift: mm, the height in the support of the query's lowest point.
        query: boxes of the query's trunk, [Zq, 4] mm.
        query_mm: height of the query.
        support: boxes of the support's trunk, [Zs, 4].
        support_mm: height of the support.
    """
    z = places[..., 0]
    height = z * stretch + shift
    own, other = (
        boxes[(at / (mm / len(boxes))).long().clamp(0, len(boxes) - 1)]
        for boxes, at, mm in ((query, z, query_mm), (support, height, support_mm))
    )
    out = [height]
    for axis, (low, high) in ((1, (0, 1)), (2, (2, 3))):
        share = (places[..., axis] - own[..., low]) / (own[..., high] - own[..., low])
        out.append(other[..., low] + share * (other[..., high] - other[..., low]))
    return torch.stack(out, -1)
