"""Find an organ again that registration left off: its template, laid over the query.

A deformation moves neighbours alike. But a kidney may lie some centimetres elsewhere among organs
that lie where they do in the support, and be brighter than in the support besides. So each organ,
with a margin around it, is brought over the query by an affine map and displaced by up to 60 mm.
At each displacement its descriptors t are compared with those of the query, q, by normalised
cross-correlation over the N voxels of the template, summed over channels c:

    sum_c sum_x (t - mean t) q / sqrt(sum_c sum_x (t - mean t)^2 * sum_c sum_x (q - mean q)^2)

Means are those of a channel, so that only the pattern of an organ and what lies around it counts.
Where the best place is clearly more alike than the one that the map has, the map is changed there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.fft import irfftn, rfftn

_REACH = 10  # lattice cells along each axis
_MARGIN = 4  # cells around an organ that belong to the box that is searched for
_LEAST_CELLS = 64  # smaller organs have too little of a pattern
_PER_CELL = 0.003  # what a cell of distance from the place before costs
_LEAST_LIKE, _LEAST_GAIN = 0.33, 0.05  # of a place that is believed, alone and over the one before
_LEAST_MM = 12.0  # the search that follows mends less by itself
_FALL_MM = 15.0  # an organ moves its surroundings along, this far


def organs_found_again(
    map_: Tensor,
    affine: Tensor,
    places: Tensor,
    labels: Callable[[Tensor], Tensor],
    query: Tensor,
    support: Callable[[Tensor], Tensor],
    cell: Tensor,
) -> Tensor:
    """The map, changed where the template of an organ lies clearly better elsewhere.

    Args:
        map_: positions [Z, Y, X, 3] in the support, mm, over the query's lattice.
        affine: [4, 3], an affine map near it: position @ affine[:3] + affine[3].
        places: positions [Z, Y, X, 3] of the lattice.
        labels: gives the support's labels, int [...], at positions [..., 3]; 0 is no organ.
        query: descriptors [C, Z, Y, X] on the lattice.
        support: gives descriptors [C, ...] of the support at positions [..., 3].
        cell: mm [3] of a lattice cell.

    Returns:
        [Z, Y, X, 3]; `map_` itself where no organ has moved.
    """
    straight = places @ affine[:3] + affine[3]
    descriptors, drawn, bent = support(straight), labels(straight), labels(map_)
    placed: list[tuple[Tensor, Tensor | None, float]] = []  # where, moved by, how far around it
    for value in drawn.unique().tolist():
        own, lies = drawn == value, bent == value
        if value == 0 or int(own.sum()) < _LEAST_CELLS or not lies.any():
            continue
        before = _middle(lies) - _middle(own)
        move = _better_place(own, descriptors, query, before, cell)
        if move is None:
            placed.append((lies, None, _FALL_MM))
        else:
            # Where it was before is changed as well, or it would be in two places.
            fall = max(_FALL_MM, float(((move - before) * cell).norm()))
            placed.append((lies | _displaced(own, move), move, fall))
    if all(move is None for _, move, _ in placed):
        return map_
    change, weights = torch.zeros_like(map_), torch.zeros(map_.shape[:3])
    for lies, move, fall in placed:
        distance = ndimage.distance_transform_edt(~lies.numpy(), sampling=cell.tolist())
        weight = (-(torch.from_numpy(distance).float() / fall).square()).exp()
        weights += weight
        if move is not None:
            change += weight[..., None] * (straight - (move * cell) @ affine[:3] - map_)
    return map_ + change / weights.clamp_min(1)[..., None]


def correlation(template: Tensor, weight: Tensor, query: Tensor) -> Tensor:
    """Normalised cross-correlation of a template with every part of the query.

    Args:
        template: [C, z, y, x].
        weight: 0 or 1 [z, y, x], the template's voxels.
        query: [C, z + a, y + b, x + c].

    Returns:
        [a + 1, b + 1, c + 1], from -1 to 1; 0 where either has no pattern.
    """
    size = query.shape[1:]
    kept = [n - m + 1 for n, m in zip(size, weight.shape, strict=True)]

    def over(kernel: Tensor, spectrum: Tensor) -> Tensor:
        """Sums over x of kernel(x) q(x + d) for every displacement d."""
        product = spectrum * rfftn(kernel, size, dim=(1, 2, 3)).conj()
        return irfftn(product, size, dim=(1, 2, 3))[:, : kept[0], : kept[1], : kept[2]]

    count, axes = weight.sum(), (1, 2, 3)
    pattern = (template - (template * weight).sum(axes, keepdim=True) / count) * weight
    spectrum = rfftn(query, dim=axes)
    common = over(pattern, spectrum).sum(0)
    sums = over(weight[None], spectrum)
    squares = over(weight[None], rfftn(query.square().sum(0, keepdim=True), dim=axes))[0]
    spread = (squares - sums.square().sum(0) / count).clamp_min(0)
    product = (pattern.square().sum() * spread).sqrt()
    # Rounding of the transforms leaves something of what is flat.
    flat = product <= 1e-4 * (template.square() * weight).sum()
    return torch.where(flat, 0.0, common / product.clamp_min(1e-12)).clamp(-1, 1)


def _better_place(
    own: Tensor, support: Tensor, query: Tensor, before: Tensor, cell: Tensor
) -> Tensor | None:
    """Displacement [3] in cells at which an organ is clearly more alike than at `before`."""
    shown = own.nonzero()
    low = (shown.amin(0) - _MARGIN).clamp_min(0).tolist()
    high = torch.minimum(shown.amax(0) + 1 + _MARGIN, torch.tensor(own.shape)).tolist()
    z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
    around = F.max_pool3d(own[z, y, x].float()[None], 3, stride=1, padding=1)[0]
    padded = F.pad(query[None], (_REACH,) * 6, mode="replicate")[0]
    Z, Y, X = (slice(a, b + 2 * _REACH) for a, b in zip(low, high, strict=True))
    alike = correlation(support[:, z, y, x], around, padded[:, Z, Y, X])

    steps = torch.arange(-_REACH, _REACH + 1)
    moves = torch.cartesian_prod(steps, steps, steps)
    distance = ((moves - before) * cell).norm(dim=1)
    best = int((alike.flatten() - _PER_CELL * distance / cell.mean()).argmax())
    near = (moves - before).abs().amax(1) <= 1.5
    kept = float(alike.flatten()[near].max()) if near.any() else -1.0
    found = float(alike.flatten()[best])
    if found < _LEAST_LIKE or found < kept + _LEAST_GAIN or distance[best] < _LEAST_MM:
        return None
    return moves[best].float()


def _middle(mask: Tensor) -> Tensor:
    return mask.nonzero().float().mean(0)


def _displaced(mask: Tensor, move: Tensor) -> Tensor:
    """The mask moved by whole cells; what leaves the lattice is gone."""
    places = mask.nonzero() + move.long()
    inside = ((places >= 0) & (places < torch.tensor(mask.shape))).all(1)
    out = torch.zeros_like(mask)
    out[tuple(places[inside].T)] = True
    return out
