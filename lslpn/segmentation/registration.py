"""Align one scan with another: where in the support every place of the query lies.

The search is discrete. At each point of a coarse lattice over the query, the support is compared
at every displacement of a small cube; of all the displacements those are taken that are alike and
vary smoothly (coupled convex optimisation). An affine map is fitted to them first, by trimmed
least squares, then finer lattices bend it, from several beginnings where it is not sure how high
the scans lie; organs that were left off are found again (see `templates`), and gradient descent
ends it. Nothing is learnt.

What is compared are descriptors of each place: features of the network, reduced to their principal
components, tell organs apart; MIND-SSC, the self-similarity of a small patch, finds their edges in
scans of any contrast.

    Heinrich et al., "Non-parametric discrete registration with convex optimisation", WBIR 2014
    Siebert, Hansen, Heinrich, "Fast 3D registration with accurate optimisation and little
        learning for Learn2Reg 2021" (convexAdam)
    Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using
        self-similarities", MICCAI 2013 (MIND-SSC)

Positions are millimetres (z, y, x) from the corner of a scan's frame; a map over the query's
frame holds a position in the support for each of its places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .templates import organs_found_again

SPACING = 6.0  # mm, of the lattice that maps and descriptors live on
_MIND_SPACING = 3.0
_COMPONENTS = 24
# (points of the 6 mm lattice averaged into one, reach of the search in such points), first to last
_AFFINE_STAGES = ((3, 4), (3, 3), (2, 3))
_COARSE_STAGES = ((3, 4), (2, 3))  # of bending; from where to begin is decided after them
_FINE_STAGES = ((1, 3),)
_COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # convexAdam's
_KEPT = 0.8  # share of the displacements that an affine map is fitted to
_LEAST_POINTS = 60
_STEPS, _RATE, _SMOOTHNESS = 50, 1.0, 0.5  # of gradient descent


@dataclass(frozen=True)
class Field:
    """A quantity over a scan's frame.

    Attributes:
        values: float32 [C, Z, Y, X].
        size: mm (z, y, x) that the frame measures; places are the centres of its cells.
    """

    values: Tensor
    size: tuple[float, float, float]

    def at(self, positions: Tensor) -> Tensor:
        """Interpolated values [C, ...] at positions [..., 3]; those of the edge beyond it."""
        place = (2 * positions / positions.new_tensor(self.size) - 1).flip(-1)
        return F.grid_sample(
            self.values[None], place[None], padding_mode="border", align_corners=False
        )[0]


def centres(shape: Sequence[int], size: Sequence[float]) -> Tensor:
    """Positions [Z, Y, X, 3] of the cells of a frame that is cut into `shape`."""
    axes = [(torch.arange(n) + 0.5) * (mm / n) for n, mm in zip(shape, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def lattice_shape(size: Sequence[float], spacing: float = SPACING) -> tuple[int, int, int]:
    """Cells of about `spacing` mm along each axis of a frame."""
    z, y, x = (max(1, round(mm / spacing)) for mm in size)
    return z, y, x


@dataclass(frozen=True)
class Scan:
    """What registration compares of a scan.

    Attributes:
        image: [1, Z, Y, X] grey values, about 0 to 1 over the range that matters, 0 off the body.
        features: [D, Z, h, w] of the network, of the same frame.
    """

    image: Field
    features: Field

    @cached_property
    def mind(self) -> Field:
        """Its self-similarity, see `mind`; worked out once, however many scans are compared."""
        return mind(self.image)


@dataclass(frozen=True)
class Alignment:
    """Where the support lies, place by place of the query.

    Attributes:
        map: [3, Z, Y, X] positions in the support, over the lattice of the query's frame.
        likeness: how alike features are where the scans lie on each other: their mean cosine,
            less what all places have in common.
        overlap: share of the query's body for which the support has a place; of as much of it as
            the support's height can cover.
        folding: share of the query's body where the map turns space inside out.
    """

    map: Field
    likeness: float
    overlap: float
    folding: float


class Registration:
    """Two scans that are to be laid on each other; what is compared is worked out once.

    Args:
        query: its lattice is searched over.
        support: what is compared with it.

    Attributes:
        places: positions [Z, Y, X, 3] of the query's lattice.
    """

    def __init__(self, query: Scan, support: Scan) -> None:
        self.query, self.support = query, support
        self.places = centres(lattice_shape(query.image.size), query.image.size)
        self._body = _box((query.image.at(self.places) > 0.05).float())[0] > 0.5

    def affine(self, start: Tensor) -> Tensor:
        """The affine map that the displacements agree on.

        Args:
            start: [4, 3], the map to begin with: position @ start[:3] + start[3].

        Returns:
            [4, 3]; `start` itself where the scans share too little to tell.
        """
        matrix = start
        for width, reach in _AFFINE_STAGES:
            map_ = self.places @ matrix[:3] + matrix[3]
            moved = self._search(map_, width, reach)
            points = _pooled(self.places.movedim(-1, 0), width)
            told = (_pooled(self._body[None].float(), width)[0] > 0.7) & (
                _pooled(self._inside(map_)[None].float(), width)[0] > 0.9
            )
            if int(told.sum()) < _LEAST_POINTS:
                break
            source = points.movedim(0, -1)[told]
            target = (source + moved.movedim(0, -1)[told]) @ matrix[:3] + matrix[3]
            matrix = _trimmed_affine(source, target)
        return matrix

    def deformable(
        self, starts: Sequence[Tensor], labels: Callable[[Tensor], Tensor] | None = None
    ) -> Alignment:
        """Bend an affine map until the descriptors agree.

        Args:
            starts: [4, 3] each; the one is taken that leads to the most alike features.
            labels: gives the support's labels at positions [..., 3]; its organs are looked for
                on their own then.
        """
        coarse = [self._bent(self.places @ m[:3] + m[3], _COARSE_STAGES) for m in starts]
        best = max(coarse, key=lambda map_: self.aligned(map_).likeness)
        if labels is not None:
            best = organs_found_again(
                best,
                fitted(self.places, best),
                self.places,
                labels,
                torch.cat([pair.query for pair in self._pairs]),
                lambda places: torch.cat([pair.support.at(places) for pair in self._pairs]),
                self._cell.flatten(),
            )
        map_ = self._bent(best, _FINE_STAGES)
        return self.aligned(map_ + _descend(self._pairs, map_))

    def _bent(self, map_: Tensor, stages: Sequence[tuple[int, int]]) -> Tensor:
        places, size = self.places, self.query.image.size
        z, y, x = places.shape[:3]
        for width, reach in stages:
            moved = F.interpolate(
                self._search(map_, width, reach)[None],
                scale_factor=width,
                mode="trilinear",
                align_corners=False,
            )[0, :, :z, :y, :x].movedim(0, -1)
            # What the map adds to a displaced place is carried on beyond the frame.
            added = Field((map_ - places).movedim(-1, 0), size).at(places + moved).movedim(0, -1)
            map_ = places + moved + added
        return map_

    def aligned(self, positions: Tensor) -> Alignment:
        """Positions [Z, Y, X, 3] in the support, over the lattice, as an alignment."""
        body, inside = self._body, self._inside(positions)
        both, count = body & inside, int(body.sum())
        cell = self._cell.view(3)
        z, y, x = (n - 1 for n in positions.shape[:3])
        rows = [positions.diff(dim=axis)[:z, :y, :x] / cell[axis] for axis in range(3)]
        folded = torch.linalg.det(torch.stack(rows, -1)) <= 0
        told = both[:z, :y, :x]
        heights = self.support.image.size[0] / self.query.image.size[0]
        return Alignment(
            Field(positions.movedim(-1, 0).contiguous(), self.query.image.size),
            self._likeness(positions, both),
            min(1.0, float(both.sum()) / (count * min(1.0, heights))) if count else 0.0,
            float((folded & told).sum() / told.sum().clamp_min(1)),
        )

    @cached_property
    def _pairs(self) -> list[_Pair]:
        features = principal_components(self.query.features, self.support.features)
        kinds = [features, (self.query.mind, self.support.mind)]
        return [_Pair(own.at(self.places), other) for own, other in kinds]

    @cached_property
    def _cell(self) -> Tensor:
        """mm of a lattice cell, [3, 1, 1, 1]."""
        sides = zip(self.query.image.size, self.places.shape[:3], strict=True)
        return torch.tensor([mm / n for mm, n in sides]).view(3, 1, 1, 1)

    def _inside(self, positions: Tensor) -> Tensor:
        size = positions.new_tensor(self.support.image.size)
        return ((positions >= 0) & (positions <= size)).all(-1)

    def _search(self, map_: Tensor, width: int, reach: int) -> Tensor:
        """Displacements [3, z, y, x] in mm, over the lattice thinned by `width`."""
        here = torch.cat([_pooled(pair.query, width) for pair in self._pairs])
        there = torch.cat([_pooled(pair.support.at(map_), width) for pair in self._pairs])
        cost, moves = _costs(here, there, reach)
        return _smoothest(cost, moves) * width * self._cell

    def _likeness(self, positions: Tensor, where: Tensor) -> float:
        if not where.any():
            return -1.0
        a = self.query.features.at(self.places[where][None, None])[:, 0, 0]
        b = self.support.features.at(positions[where][None, None])[:, 0, 0]
        a, b = (F.normalize(f - f.mean(1, keepdim=True), dim=0) for f in (a, b))
        return float((a * b).sum(0).mean())


def fitted(places: Tensor, positions: Tensor) -> Tensor:
    """The affine map [4, 3] that is nearest to a map: least squares over all places."""
    known, wanted = (each.reshape(-1, 3).double() for each in (places, positions))
    known = torch.cat([known, torch.ones(len(known), 1).double()], 1)
    return torch.linalg.lstsq(known, wanted).solution.float()


# --- descriptors -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """One kind of descriptor: of the query on its lattice, of the support anywhere."""

    query: Tensor
    support: Field


def principal_components(a: Field, b: Field) -> tuple[Field, Field]:
    """Features of two scans without their mean, of length 1, along the main axes of both."""
    flat = torch.cat([f.values.flatten(1)[:, ::3] for f in (a, b)], 1).double()
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    axes = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -_COMPONENTS:].float()

    def reduced(field: Field) -> Field:
        unit = F.normalize(field.values - mean.float()[:, None, None, None], dim=0)
        return Field(torch.einsum("dzyx,dk->kzyx", unit, axes), field.size)

    return reduced(a), reduced(b)


def mind(image: Field) -> Field:
    """MIND-SSC, averaged over 9 mm: [12, Z, Y, X] in (0, 1], at 3 mm."""
    size = image.size
    grey = image.at(centres(lattice_shape(size, _MIND_SPACING), size))
    # The six neighbours at 2 cells; those of a pair are at right angles.
    shifts = [
        tuple(sign * 2 * (axis == a) for a in range(3)) for axis in range(3) for sign in (-1, 1)
    ]
    padded = F.pad(grey[None], (2,) * 6, mode="replicate")[0, 0]
    z, y, x = grey.shape[1:]
    neighbours = [padded[2 + dz :, 2 + dy :, 2 + dx :][:z, :y, :x] for dz, dy, dx in shifts]
    pairs = [(i, j) for i in range(6) for j in range(i) if i // 2 != j // 2]
    distances = torch.stack([(neighbours[i] - neighbours[j]).square() for i, j in pairs])
    distances = _box(distances)
    distances = distances - distances.amin(0)
    spread = distances.mean(0)
    typical = float(spread.mean())
    distances /= spread.clamp(typical * 1e-3 + 1e-12, typical * 1e3 + 1e-12)
    return Field(_box((-distances).exp()), size)


def _box(values: Tensor) -> Tensor:
    """Mean over 3 x 3 x 3 cells, edges repeated."""
    return F.avg_pool3d(F.pad(values[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]


# --- search ------------------------------------------------------------------------------------


def _pooled(values: Tensor, width: int) -> Tensor:
    return F.avg_pool3d(values[None], width, ceil_mode=True, count_include_pad=False)[0]


def _costs(here: Tensor, there: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Squared distance of descriptors [C, z, y, x] for every displacement up to `reach` cells.

    Returns:
        [n, z, y, x], averaged over neighbours twice, and the n displacements [n, 3].
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
    for _ in range(2):
        cost = F.avg_pool3d(cost[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return cost, moves.to(cost)


def _smoothest(cost: Tensor, moves: Tensor) -> Tensor:
    """Displacements [3, z, y, x] that are cheap and smooth: each is drawn to the mean of its
    neighbours, harder from round to round, and may jump to another as cheap."""

    def mean(best: Tensor) -> Tensor:
        field = moves[best].movedim(-1, 0)
        return F.avg_pool3d(field[None], 3, stride=1, padding=1, count_include_pad=False)[0]

    field = mean(cost.argmin(0))
    for weight in _COUPLING:
        # |move - field|^2 without the part that is the same for all moves.
        drawn = moves.square().sum(1)[:, None, None, None] - 2 * torch.einsum(
            "nk,kzyx->nzyx", moves, field
        )
        field = mean((cost + weight * drawn).argmin(0))
    return field


def _descend(pairs: Sequence[_Pair], map_: Tensor) -> Tensor:
    """What gradient descent adds to a map, [Z, Y, X, 3] mm: alike descriptors, smooth changes."""
    with torch.enable_grad(), torch.inference_mode(False):
        # Tensors made in inference mode cannot be used for gradients.
        own = [
            (pair.query.clone(), Field(pair.support.values.clone(), pair.support.size))
            for pair in pairs
        ]
        start = map_.clone()
        moved = torch.zeros(3, *start.shape[:3], requires_grad=True)
        optimizer = torch.optim.Adam([moved], lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            smooth = _thrice(moved)
            here = start + smooth.movedim(0, -1) * SPACING
            unlike = sum(
                ((field.at(here) - query).square().sum(0).mean() for query, field in own),
                start.new_zeros(()),
            )
            bent = sum(
                (smooth.diff(dim=axis).square().mean() for axis in (1, 2, 3)), start.new_zeros(())
            )
            (unlike + _SMOOTHNESS * bent).backward()
            optimizer.step()
        return _thrice(moved.detach()).movedim(0, -1) * SPACING


def _thrice(field: Tensor) -> Tensor:
    for _ in range(3):
        field = F.avg_pool3d(field[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return field


def _trimmed_affine(source: Tensor, target: Tensor) -> Tensor:
    """Least squares [4, 3] over the `_KEPT` best of the points, found by iteration."""
    ones = torch.ones(len(source), 1)
    known, wanted = torch.cat([source, ones], 1).double(), target.double()
    kept = torch.arange(len(source))
    for _ in range(8):
        matrix = torch.linalg.lstsq(known[kept], wanted[kept]).solution
        error = (wanted - known @ matrix).square().sum(1)
        kept = error.topk(max(_LEAST_POINTS // 2, int(_KEPT * len(source))), largest=False).indices
    return matrix.float()
