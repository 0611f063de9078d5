"""The descriptors that registration compares.

Features of the network, reduced to their principal components, tell organs apart. MIND-SSC, the
self-similarity of a small patch, shows edges in scans of any contrast. In CT, a third descriptor
separates soft tissue from fat and air, with or without contrast agent.

    Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using
        self-similarities", MICCAI 2013 (MIND-SSC)

Positions are millimetres (z, y, x) from the corner of a scan's frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY_SPACING = 3.0  # mm, of descriptors computed from grey values
_COMPONENTS = 24
_TISSUE_WEIGHT = 4.0  # of its squared distance, relative to features and MIND


@dataclass(frozen=True)
class Field:
    """A quantity over a scan's frame.

    Attributes:
        values: float32 [C, Z, Y, X].
        size: mm (z, y, x) of the frame; values are at the centres of its cells.
    """

    values: Tensor
    size: tuple[float, float, float]

    def at(self, positions: Tensor) -> Tensor:
        """Interpolated values [C, ...] at positions [..., 3]; outside the frame, the edge's."""
        grid = (2 * positions / positions.new_tensor(self.size) - 1).flip(-1)
        return F.grid_sample(
            self.values[None], grid[None], padding_mode="border", align_corners=False
        )[0]


def centres(shape: Sequence[int], size: Sequence[float]) -> Tensor:
    """Positions [Z, Y, X, 3] of the centres of a frame's `shape` cells."""
    axes = [(torch.arange(n) + 0.5) * (mm / n) for n, mm in zip(shape, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def lattice_shape(size: Sequence[float], spacing: float) -> tuple[int, int, int]:
    """How many cells of about `spacing` mm there are along each axis of a frame."""
    z, y, x = (max(1, round(mm / spacing)) for mm in size)
    return z, y, x


@dataclass(frozen=True)
class Scan:
    """A scan for registration.

    Attributes:
        image: [1, Z, Y, X] grey values, 0 to 1 over the window, 0 outside of the body.
        features: [D, Z, h, w] of the network, over the same frame.
        tissue: for CT, [1, Z, Y, X] from 0 (air) to 1 (soft tissue), over the same frame; or None.
    """

    image: Field
    features: Field
    tissue: Field | None = None

    @cached_property
    def mind(self) -> Field:
        """MIND-SSC of the image; computed once for all registrations of the scan."""
        return mind(self.image)

    @cached_property
    def soft_tissue(self) -> Field | None:
        """The tissue descriptor: `tissue` averaged over 9 mm, weighted; at 3 mm."""
        if self.tissue is None:
            return None
        return Field(box_mean(_sampled(self.tissue)) * _TISSUE_WEIGHT**0.5, self.tissue.size)


def principal_components(a: Field, b: Field) -> tuple[Field, Field]:
    """Features of two scans, centred, normalised and projected onto their principal components."""
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
    grey = _sampled(image)
    # Six neighbours at a distance of 2 cells, in pairs at right angles to each other.
    shifts = [
        tuple(sign * 2 * (axis == a) for a in range(3)) for axis in range(3) for sign in (-1, 1)
    ]
    padded = F.pad(grey[None], (2,) * 6, mode="replicate")[0, 0]
    z, y, x = grey.shape[1:]
    neighbours = [padded[2 + dz :, 2 + dy :, 2 + dx :][:z, :y, :x] for dz, dy, dx in shifts]
    pairs = [(i, j) for i in range(6) for j in range(i) if i // 2 != j // 2]
    distances = box_mean(torch.stack([(neighbours[i] - neighbours[j]).square() for i, j in pairs]))
    distances -= distances.amin(0)
    spread = distances.mean(0)
    typical = float(spread.mean())
    distances /= spread.clamp(typical * 1e-3 + 1e-12, typical * 1e3 + 1e-12)
    return Field(box_mean((-distances).exp()), image.size)


def _sampled(image: Field) -> Tensor:
    return image.at(centres(lattice_shape(image.size, _GREY_SPACING), image.size))


def box_mean(values: Tensor) -> Tensor:
    """Mean over 3 x 3 x 3 cells, with replicated edges."""
    return F.avg_pool3d(F.pad(values[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]
