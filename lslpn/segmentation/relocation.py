"""Find organs that registration has misplaced, by template matching.

A smooth deformation displaces neighbouring organs by about the same amount. A kidney, however, may
be some centimetres off while the organs around it are in place, and may differ in contrast as well.
So each organ, with a margin around it, is mapped to the query by an affine map and displaced by up
to 60 mm. At each displacement its descriptors t are compared with those of the query, q, by
normalised cross-correlation over the voxels x of the template, summed over channels c:

    sum_c sum_x (t - mean t) q / sqrt(sum_c sum_x (t - mean t)^2 * sum_c sum_x (q - mean q)^2)

Means are taken per channel, so that only the pattern of an organ and its surroundings counts. If
the best displacement is clearly better than the map's, the map is changed around the organ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.fft import irfftn, rfftn

_REACH = 10  # lattice cells along each axis
_MARGIN = 4  # cells around an organ within the box that is displaced
_LEAST_CELLS = 64  # smaller organs have too little pattern
_PENALTY = 0.003  # correlation, for each cell of distance from the current position
_LEAST_CORRELATION, _LEAST_GAIN = 0.33, 0.05  # of a new position, and over the current one
_LEAST_MM = 12.0  # shorter displacements are left to the registration that follows
_FALL_OFF_MM = 15.0  # how far an organ moves its surroundings along


def relocate_organs(
    map_: Tensor,
    affine: Tensor,
    positions: Tensor,
    labels: Callable[[Tensor], Tensor],
    query: Tensor,
    support: Callable[[Tensor], Tensor],
    cell: Tensor,
) -> Tensor:
    """Change a map where the template of an organ fits clearly better elsewhere.

    Args:
        map_: positions [Z, Y, X, 3] in the support, mm, over the query's lattice.
        affine: [4, 3], an affine map near it: position @ affine[:3] + affine[3].
        positions: [Z, Y, X, 3] of the lattice.
        labels: returns the support's labels, int [...], at positions [..., 3]; 0 is no organ.
        query: descriptors [C, Z, Y, X] on the lattice.
        support: returns the support's descriptors [C, ...] at positions [..., 3].
        cell: mm [3] of a lattice cell.

    Returns:
        [Z, Y, X, 3]; `map_` itself if no organ has moved.
    """
    straight = positions @ affine[:3] + affine[3]
    descriptors, by_affine, by_map = support(straight), labels(straight), labels(map_)
    organs: list[tuple[Tensor, Tensor | None, float]] = []  # region, displacement, fall-off
    for value in by_affine.unique().tolist():
        template, region = by_affine == value, by_map == value
        if value == 0 or int(template.sum()) < _LEAST_CELLS or not region.any():
            continue
        current = region.nonzero().float().mean(0) - template.nonzero().float().mean(0)
        move = _better_displacement(template, descriptors, query, current, cell)
        if move is None:
            organs.append((region, None, _FALL_OFF_MM))
        else:
            # The region includes the old position: the organ must not be in two places.
            fall_off = max(_FALL_OFF_MM, float(((move - current) * cell).norm()))
            organs.append((region | _displaced(template, move), move, fall_off))
    if all(move is None for _, move, _ in organs):
        return map_
    change, weights = torch.zeros_like(map_), torch.zeros(map_.shape[:3])
    for region, move, fall_off in organs:
        distance = ndimage.distance_transform_edt(~region.numpy(), sampling=cell.tolist())
        weight = (-(torch.from_numpy(distance).float() / fall_off).square()).exp()
        weights += weight
        if move is not None:
            change += weight[..., None] * (straight - (move * cell) @ affine[:3] - map_)
    return map_ + change / weights.clamp_min(1)[..., None]


def correlation(template: Tensor, mask: Tensor, query: Tensor) -> Tensor:
    """Normalised cross-correlation of a template with the query at every offset.

    Args:
        template: [C, z, y, x].
        mask: 0 or 1 [z, y, x], the template's voxels.
        query: [C, z + a, y + b, x + c].

    Returns:
        [a + 1, b + 1, c + 1], from -1 to 1; 0 where template or query is constant.
    """
    size = query.shape[1:]
    kept = [n - m + 1 for n, m in zip(size, mask.shape, strict=True)]

    def over(kernel: Tensor, spectrum: Tensor) -> Tensor:
        """The sum over x of kernel(x) q(x + d), for every displacement d."""
        product = spectrum * rfftn(kernel, size, dim=(1, 2, 3)).conj()
        return irfftn(product, size, dim=(1, 2, 3))[:, : kept[0], : kept[1], : kept[2]]

    count, axes = mask.sum(), (1, 2, 3)
    pattern = (template - (template * mask).sum(axes, keepdim=True) / count) * mask
    spectrum = rfftn(query, dim=axes)
    common = over(pattern, spectrum).sum(0)
    sums = over(mask[None], spectrum)
    squares = over(mask[None], rfftn(query.square().sum(0, keepdim=True), dim=axes))[0]
    variation = (squares - sums.square().sum(0) / count).clamp_min(0)
    product = (pattern.square().sum() * variation).sqrt()
    # Rounding in the transforms leaves a little variation in constant parts.
    flat = product <= 1e-4 * (template.square() * mask).sum()
    return torch.where(flat, 0.0, common / product.clamp_min(1e-12)).clamp(-1, 1)


def _better_displacement(
    organ: Tensor, support: Tensor, query: Tensor, current: Tensor, cell: Tensor
) -> Tensor | None:
    """The displacement [3] in cells that fits clearly better than `current`, or None."""
    shown = organ.nonzero()
    low = (shown.amin(0) - _MARGIN).clamp_min(0).tolist()
    high = torch.minimum(shown.amax(0) + 1 + _MARGIN, torch.tensor(organ.shape)).tolist()
    z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
    mask = F.max_pool3d(organ[z, y, x].float()[None], 3, stride=1, padding=1)[0]
    padded = F.pad(query[None], (_REACH,) * 6, mode="replicate")[0]
    Z, Y, X = (slice(a, b + 2 * _REACH) for a, b in zip(low, high, strict=True))
    fit = correlation(support[:, z, y, x], mask, padded[:, Z, Y, X]).flatten()

    steps = torch.arange(-_REACH, _REACH + 1)
    moves = torch.cartesian_prod(steps, steps, steps)
    distance = ((moves - current) * cell).norm(dim=1)
    best = int((fit - _PENALTY * distance / cell.mean()).argmax())
    near = (moves - current).abs().amax(1) <= 1.5
    before = float(fit[near].max()) if near.any() else -1.0
    after = float(fit[best])
    if after < _LEAST_CORRELATION or after < before + _LEAST_GAIN or distance[best] < _LEAST_MM:
        return None
    return moves[best].float()


def _displaced(mask: Tensor, move: Tensor) -> Tensor:
    """The mask moved by whole cells, cut off at the lattice's edges."""
    cells = mask.nonzero() + move.long()
    inside = ((cells >= 0) & (cells < torch.tensor(mask.shape))).all(1)
    out = torch.zeros_like(mask)
    out[tuple(cells[inside].T)] = True
    return out
