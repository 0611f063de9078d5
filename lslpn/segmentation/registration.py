"""Registration: find the position in the support of every position in the query.

The search is discrete. At each point of a coarse lattice over the query, the descriptors of the
scans (see `descriptors`) are compared at every displacement within a small cube, and displacements
are chosen that have low cost and vary smoothly (coupled convex optimisation). First an affine map
is fitted to them by trimmed least squares. Then finer lattices deform it, starting from several
maps if the offset along z is uncertain; misplaced organs are relocated (see `relocation`), and
gradient descent refines the result. Nothing is learnt.

    Heinrich et al., "Non-parametric discrete registration with convex optimisation", WBIR 2014
    Siebert, Hansen, Heinrich, "Fast 3D registration with accurate optimisation and little
        learning for Learn2Reg 2021" (convexAdam)

Positions are millimetres (z, y, x) from the corner of a scan's frame. A map over the query's frame
has a position in the support for each of its points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptors import Field, Scan, box_mean, centres, lattice_shape, principal_components
from .relocation import relocate_organs

_SPACING = 6.0  # mm, of the lattice on which maps and displacements are defined
# Stages, in order: width in 6 mm cells to which the lattice is coarsened, and reach of the search
# in coarse cells.
_AFFINE_STAGES = ((3, 4), (3, 3), (2, 3))
_COARSE_STAGES = ((3, 4), (2, 3))  # of deformation; then the best initial map is chosen
_FINE_STAGES = ((1, 3),)
_COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # as in convexAdam
_INLIERS = 0.8  # share of the displacements to which an affine map is fitted
_LEAST_POINTS = 60
_STEPS, _RATE, _SMOOTHNESS = 50, 1.0, 0.5  # of gradient descent


@dataclass(frozen=True)
class Alignment:
    """A map from the query to the support, and how good it is.

    Attributes:
        map: [3, Z, Y, X] positions in the support, over the lattice of the query's frame.
        similarity: mean cosine of the two scans' features, each less its mean over positions,
            where the query's body is mapped into the support.
        overlap: share of the query's body that is mapped into the support, relative to what the
            support's height can cover.
        folding: share of that part of the body where the map's Jacobian determinant is not
            positive.
    """

    map: Field
    similarity: float
    overlap: float
    folding: float


class Registration:
    """Registration of a support to a query.

    Args:
        query: the fixed scan; maps are defined over its lattice.
        support: the moving scan.

    Attributes:
        positions: [Z, Y, X, 3] of the query's lattice.
    """

    def __init__(self, query: Scan, support: Scan) -> None:
        self.query, self.support = query, support
        size = query.image.size
        self.positions = centres(lattice_shape(size, _SPACING), size)
        self._body = box_mean((query.image.at(self.positions) > 0.05).float())[0] > 0.5

    def affine(self, start: Tensor) -> Tensor:
        """Affine registration.

        Args:
            start: [4, 3], the initial map: position @ start[:3] + start[3].

        Returns:
            [4, 3]; `start` itself if the scans overlap too little.
        """
        matrix = start
        for width, reach in _AFFINE_STAGES:
            map_ = self.positions @ matrix[:3] + matrix[3]
            moved = self._search(map_, width, reach)
            points = _pooled(self.positions.movedim(-1, 0), width)
            valid = (_pooled(self._body[None].float(), width)[0] > 0.7) & (
                _pooled(self._inside(map_)[None].float(), width)[0] > 0.9
            )
            if int(valid.sum()) < _LEAST_POINTS:
                break
            source = points.movedim(0, -1)[valid]
            target = (source + moved.movedim(0, -1)[valid]) @ matrix[:3] + matrix[3]
            matrix = _trimmed_affine(source, target)
        return matrix

    def deformable(
        self, starts: Sequence[Tensor], labels: Callable[[Tensor], Tensor] | None = None
    ) -> Alignment:
        """Deformable registration.

        Args:
            starts: initial affine maps, [4, 3] each; the one that leads to the most similar
                features is used.
            labels: returns the support's labels at positions [..., 3]; if given, misplaced organs
                are relocated.
        """
        coarse = [self._deformed(self.positions @ m[:3] + m[3], _COARSE_STAGES) for m in starts]
        best = max(coarse, key=lambda map_: self.aligned(map_).similarity)
        if labels is not None:
            best = relocate_organs(
                best,
                fitted(self.positions, best),
                self.positions,
                labels,
                self._query_descriptors,
                self._support_descriptors,
                self._cell.flatten(),
            )
        map_ = self._deformed(best, _FINE_STAGES)
        return self.aligned(map_ + _gradient_descent(self._kinds, map_))

    def _deformed(self, map_: Tensor, stages: Sequence[tuple[int, int]]) -> Tensor:
        positions, size = self.positions, self.query.image.size
        z, y, x = positions.shape[:3]
        for width, reach in stages:
            moved = F.interpolate(
                self._search(map_, width, reach)[None],
                scale_factor=width,
                mode="trilinear",
                align_corners=False,
            )[0, :, :z, :y, :x].movedim(0, -1)
            # Composition of both; outside the frame, the map's displacement is that of the edge.
            before = Field((map_ - positions).movedim(-1, 0), size)
            map_ = positions + moved + before.at(positions + moved).movedim(0, -1)
        return map_

    def aligned(self, positions: Tensor) -> Alignment:
        """The alignment for a map: positions [Z, Y, X, 3] in the support, over the lattice."""
        body, inside = self._body, self._inside(positions)
        both, count = body & inside, int(body.sum())
        cell = self._cell.view(3)
        z, y, x = (n - 1 for n in positions.shape[:3])
        rows = [positions.diff(dim=axis)[:z, :y, :x] / cell[axis] for axis in range(3)]
        folded = torch.linalg.det(torch.stack(rows, -1)) <= 0
        where = both[:z, :y, :x]
        heights = self.support.image.size[0] / self.query.image.size[0]
        return Alignment(
            Field(positions.movedim(-1, 0).contiguous(), self.query.image.size),
            self._similarity(positions, both),
            min(1.0, float(both.sum()) / (count * min(1.0, heights))) if count else 0.0,
            float((folded & where).sum() / where.sum().clamp_min(1)),
        )

    @cached_property
    def _kinds(self) -> list[tuple[Tensor, Field]]:
        """Of each kind of descriptor, the query's [C, Z, Y, X] on the lattice and the support's."""
        kinds = [
            principal_components(self.query.features, self.support.features),
            (self.query.mind, self.support.mind),
            (self.query.soft_tissue, self.support.soft_tissue),
        ]
        return [(own.at(self.positions), other) for own, other in kinds if own and other]

    @cached_property
    def _query_descriptors(self) -> Tensor:
        return torch.cat([own for own, _ in self._kinds])

    def _support_descriptors(self, positions: Tensor) -> Tensor:
        return torch.cat([other.at(positions) for _, other in self._kinds])

    @cached_property
    def _cell(self) -> Tensor:
        """mm of a lattice cell, [3, 1, 1, 1]."""
        sides = zip(self.query.image.size, self.positions.shape[:3], strict=True)
        return torch.tensor([mm / n for mm, n in sides]).view(3, 1, 1, 1)

    def _inside(self, positions: Tensor) -> Tensor:
        size = positions.new_tensor(self.support.image.size)
        return ((positions >= 0) & (positions <= size)).all(-1)

    def _search(self, map_: Tensor, width: int, reach: int) -> Tensor:
        """Displacements [3, z, y, x] in mm, over the lattice coarsened by `width`."""
        cost, moves = _costs(
            _pooled(self._query_descriptors, width),
            _pooled(self._support_descriptors(map_), width),
            reach,
        )
        return _coupled_convex(cost, moves) * width * self._cell

    def _similarity(self, positions: Tensor, where: Tensor) -> float:
        if not where.any():
            return -1.0
        a = self.query.features.at(self.positions[where][None, None])[:, 0, 0]
        b = self.support.features.at(positions[where][None, None])[:, 0, 0]
        a, b = (F.normalize(f - f.mean(1, keepdim=True), dim=0) for f in (a, b))
        return float((a * b).sum(0).mean())


def fitted(positions: Tensor, mapped: Tensor) -> Tensor:
    """The affine map [4, 3] that fits a map best, by least squares."""
    known, wanted = (each.reshape(-1, 3).double() for each in (positions, mapped))
    known = torch.cat([known, torch.ones(len(known), 1).double()], 1)
    return torch.linalg.lstsq(known, wanted).solution.float()


# --- search --------------------------------------------------------------------------------------


def _pooled(values: Tensor, width: int) -> Tensor:
    return F.avg_pool3d(values[None], width, ceil_mode=True, count_include_pad=False)[0]


def _costs(here: Tensor, there: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Squared distance of descriptors [C, z, y, x] at every displacement up to `reach` cells.

    Returns:
        costs [n, z, y, x], smoothed, and the n displacements [n, 3].
    """
    z, y, x = here.shape[1:]
    padded = F.pad(there[None], (reach,) * 6, mode="replicate")[0]
    steps = torch.arange(-reach, reach + 1)
    moves = torch.cartesian_prod(steps, steps, steps)
    square = padded.square().sum(0)
    cost = here.new_empty(len(moves), z, y, x)
    for n, (dz, dy, dx) in enumerate((moves + reach).tolist()):
        part = (slice(dz, dz + z), slice(dy, dy + y), slice(dx, dx + x))
        cost[n] = square[part] - 2 * (here * padded[:, part[0], part[1], part[2]]).sum(0)
    cost += here.square().sum(0)
    return _smoothed(cost, 2), moves.to(cost)


def _coupled_convex(cost: Tensor, moves: Tensor) -> Tensor:
    """Displacements [3, z, y, x] of low cost that vary smoothly, by coupled convex optimisation.

    Each round chooses at every point the displacement that minimises its cost plus its squared
    distance to the mean over the neighbours, whose weight grows from round to round.
    """
    field, flat = _smoothed(moves[cost.argmin(0)].movedim(-1, 0), 1), cost.flatten(1)
    # weight |move - field|^2 as one product, without the term that does not depend on the move.
    known = torch.cat([moves, moves.square().sum(1, keepdim=True)], 1)
    for weight in _COUPLING:
        pull = torch.cat([-2 * weight * field.flatten(1), torch.full_like(flat[:1], weight)])
        best = torch.addmm(flat, known, pull).argmin(0).view(cost.shape[1:])
        field = _smoothed(moves[best].movedim(-1, 0), 1)
    return field


def _gradient_descent(kinds: Sequence[tuple[Tensor, Field]], map_: Tensor) -> Tensor:
    """Smooth displacements [Z, Y, X, 3] mm that minimise the distance of the descriptors."""
    with torch.enable_grad(), torch.inference_mode(False):
        # Autograd cannot use tensors created in inference mode.
        kinds = [(own.clone(), Field(other.values.clone(), other.size)) for own, other in kinds]
        start = map_.clone()
        moved = torch.zeros(3, *start.shape[:3], requires_grad=True)
        optimizer = torch.optim.Adam([moved], lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            smooth = _smoothed(moved, 3)
            here = start + smooth.movedim(0, -1) * _SPACING
            distance = sum(
                ((other.at(here) - own).square().sum(0).mean() for own, other in kinds),
                start.new_zeros(()),
            )
            roughness = sum(
                (smooth.diff(dim=axis).square().mean() for axis in (1, 2, 3)), start.new_zeros(())
            )
            (distance + _SMOOTHNESS * roughness).backward()
            optimizer.step()
        return _smoothed(moved.detach(), 3).movedim(0, -1) * _SPACING


def _smoothed(values: Tensor, rounds: int) -> Tensor:
    """[C, z, y, x] averaged over neighbours, `rounds` times."""
    for _ in range(rounds):
        values = F.avg_pool3d(values[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return values


def _trimmed_affine(source: Tensor, target: Tensor) -> Tensor:
    """An affine map [4, 3] by least squares over the best `_INLIERS` of the points, iterated."""
    ones = torch.ones(len(source), 1)
    known, wanted = torch.cat([source, ones], 1).double(), target.double()
    kept = torch.arange(len(source))
    for _ in range(8):
        matrix = torch.linalg.lstsq(known[kept], wanted[kept]).solution
        error = (wanted - known @ matrix).square().sum(1)
        kept = error.topk(
            max(_LEAST_POINTS // 2, int(_INLIERS * len(source))), largest=False
        ).indices
    return matrix.float()
