"""Relocation of misplaced organs by template matching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn.segmentation.descriptors import centres
from lslpn.segmentation.relocation import correlation, relocate_organs

_CELL = torch.tensor([6.0, 5.0, 5.5])
_SHAPE = (24, 26, 28)
_SIZE = tuple((torch.tensor(_SHAPE) * _CELL).tolist())
_PLACES = centres(_SHAPE, _SIZE)
_AFFINE = torch.cat([torch.eye(3), torch.zeros(1, 3)])


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(6, *shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool3d(values[None], 3, stride=1, padding=1)[0] * 3


def _scene(seed: int, corner: tuple[int, int, int], level: float) -> Tensor:
    """Descriptors of a scene with one organ of 7 x 6 x 5 cells."""
    out = 0.3 * _noise(seed, _SHAPE)
    z, y, x = corner
    out[:, z : z + 9, y : y + 8, x : x + 7] = _noise(9, (9, 8, 7)) + level
    return out


def _labels(corner: tuple[int, int, int]) -> Tensor:
    out = torch.zeros(_SHAPE, dtype=torch.int64)
    z, y, x = (n + 1 for n in corner)
    out[z : z + 7, y : y + 6, x : x + 5] = 4
    return out


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Values [..., Z, Y, X] of the cells that contain the positions; 0 outside."""
    cells = (positions / _CELL).floor().long()
    inside = ((cells >= 0) & (cells < torch.tensor(_SHAPE))).all(-1)
    z, y, x = cells.clamp(torch.zeros(3, dtype=torch.int64), torch.tensor(_SHAPE) - 1).unbind(-1)
    return torch.where(inside, values[..., z, y, x], torch.zeros((), dtype=values.dtype))


def _found(query: Tensor, corner: tuple[int, int, int]) -> Tensor:
    support, labels = _scene(1, corner, 0.0), _labels(corner)
    return relocate_organs(
        _PLACES, _AFFINE, _PLACES, lambda p: _at(labels, p), query, lambda p: _at(support, p), _CELL
    )


def test_correlation_equals_its_definition() -> None:
    template, query = _noise(0, (4, 3, 5)), _noise(1, (7, 6, 9)) + 2
    weight = (torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.6).float()
    query[:, 3:, 3:, 4:] = 0.5  # a constant part
    found = correlation(template, weight, query)
    assert found.shape == (4, 4, 5)
    inside = weight > 0
    t = template[:, inside]
    t = t - t.mean(1, keepdim=True)
    for z, y, x in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        q = query[:, z : z + 4, y : y + 3, x : x + 5][:, inside]
        q = q - q.mean(1, keepdim=True)
        length = float((t.square().sum() * q.square().sum()).sqrt())
        expected = float((t * q).sum()) / length if length > 1e-5 else 0.0
        assert abs(float(found[z, y, x]) - expected) < 1e-4


def test_a_displaced_and_brighter_organ_is_found() -> None:
    here, there = (4, 5, 6), (9, 2, 12)
    map_ = _found(_scene(2, there, level=1.5), here)
    drawn = _at(_labels(here), map_) == 4
    truth = _labels(there) == 4
    assert 2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()) > 0.9
    assert (map_ - _PLACES)[:, -4:, :4].norm(dim=-1).max() < 12


def test_an_organ_in_place_or_absent_leaves_the_map_unchanged() -> None:
    here = (8, 8, 8)
    for query in (_scene(2, here, level=1.0), 0.3 * _noise(3, _SHAPE), torch.ones(6, *_SHAPE)):
        assert torch.equal(_found(query, here), _PLACES)
