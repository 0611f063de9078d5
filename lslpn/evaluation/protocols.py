"""Which support slice segments which query slices: the volumetric protocols of the literature."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..errors import InputError

# The published thresholds count pixels of 512 x 512 slices.
_REFERENCE_PIXELS = 512 * 512


@dataclass(frozen=True)
class Pair:
    """The index of a support slice, and those of the query slices that it segments, rising."""

    support: int
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """Which support slice segments which query slices.

    Attributes:
        chunks: parts into which the organ's range is cut.
        min_pixels: a support slice that shows no more of the organ does not count.
        name: what the command line calls it.
        average: how its authors average over the query cases.
        normalise: how its authors bring grey values to [0, 1], where it is not up to the model.
    """

    chunks: int
    min_pixels: float = 0
    name: ClassVar[str]
    average: ClassVar[Literal["mean", "median"]] = "mean"
    normalise: ClassVar[Literal["slice", "volume", "window"] | None] = None

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise InputError(f"chunks: expected 1 or more, got {self.chunks}")

    def pairs(self, support_areas: np.ndarray, query_areas: np.ndarray) -> list[Pair]:
        """The pairs of support and query slices for one organ, in rising order.

        The organ's `areas` on each slice of support and query are in pixels of 512 x 512. No query
        slice is in two pairs; there is no pair where either scan shows too little of the organ.
        """
        supports = self.support_slices(np.asarray(support_areas))
        groups = self.query_groups(np.asarray(query_areas)) if supports else []
        return [Pair(s, group) for s, group in zip(supports, groups, strict=True) if group]

    def support_slices(self, areas: np.ndarray) -> list[int]:
        """The support slice of each chunk; empty where the organ is on no slice."""
        shown = _above(areas, self.min_pixels)
        return [shown[m] for m in _middles(len(shown), self.chunks)] if shown else []

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        """The query slices of each chunk; chunks of a short organ may be empty."""
        return _cut(_range(_above(areas, 0)), self.chunks)


def _middles(length: int, chunks: int) -> list[int]:
    """Positions of the middles of `chunks` equal parts of `length` slices."""
    return [((2 * i + 1) * length) // (2 * chunks) for i in range(chunks)]


def _cut(slices: Sequence[int], chunks: int) -> list[tuple[int, ...]]:
    """Slices in `chunks` equal parts; a slice belongs to the part that its centre lies in."""
    parts: list[list[int]] = [[] for _ in range(chunks)]
    for position, index in enumerate(slices):
        parts[(2 * position + 1) * chunks // (2 * len(slices))].append(index)
    return [tuple(part) for part in parts]


def _above(areas: np.ndarray, threshold: float) -> list[int]:
    """Slices with an area above the threshold."""
    return [int(z) for z in np.flatnonzero(areas > threshold)]


def _nearest(slices: Sequence[int], wanted: int) -> int:
    """The slice that lies nearest to the wanted one; of two, the lower."""
    return min(slices, key=lambda z: (abs(z - wanted), z))


def _range(slices: Sequence[int], *, drop_last: bool = False) -> list[int]:
    """All slices from the first to the last of some."""
    if not slices:
        return []
    full = list(range(slices[0], slices[-1] + 1))
    return full[:-1] if drop_last and len(full) > 1 else full


@dataclass(frozen=True)
class Published(Protocol):
    """The protocol of the authors' published LSLPN code.

    The organ's range runs from the first to the last slice with more than 200 pixels of it, the
    last one dropped, in the support and (by its ground truth) in the query. Both are cut into 12
    equal chunks; the middle slice of each support chunk segments the query's chunk. Where a
    middle slice does not itself show more than 200 pixels (an organ in two pieces), the nearest
    one that does stands in. Dice on the query's range; mean over the query cases.
    """

    chunks: int = 12
    min_pixels: float = 200
    name = "published"

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = _above(areas, self.min_pixels)
        span = _range(shown, drop_last=True)
        if not span:
            return []
        middles = [span[m] for m in _middles(len(span), self.chunks)]
        return [_nearest(shown, m) for m in middles]

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        return _cut(_range(_above(areas, self.min_pixels), drop_last=True), self.chunks)


@dataclass(frozen=True)
class SENet(Protocol):
    """The protocol of SENet (Roy et al. 2020), as their code has it.

    Of the support slices with more than 10 pixels of the organ, K = 10 near the centres of K equal
    parts. The L query slices from the first to the last that shows the organ fall into groups
    that start at round(linspace(0, L - 1, K)): K - 1 groups and a last one of a single slice.
    Dice on that range; median over the query cases, then the mean over the organs. Grey values
    are brought to [0, 1] by the minimum and maximum of the volume.
    """

    chunks: int = 10
    min_pixels: float = 10
    name = "senet"
    average = "median"
    normalise = "volume"

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        span = _range(_above(areas, 0))
        if not span:
            return [()] * self.chunks
        starts = np.round(np.linspace(0, len(span) - 1, self.chunks)).astype(int)
        ends = [*starts[1:], len(span)]
        return [tuple(span[a:b]) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class ALPNet(Protocol):
    """The protocol of SSL-ALPNet (Ouyang et al. 2020), as their code has it.

    3 parts. The support slices lie at 1/6, 1/2 and 5/6 of those that show the organ; a query
    slice belongs to the part that its position in the organ's ground-truth range falls into.
    Dice on that range; mean over the query cases.
    """

    chunks: int = 3
    name = "alpnet"


@dataclass(frozen=True)
class ADNet(Protocol):
    """The second protocol of ADNet (Hansen et al. 2022), "EP2": the one a user is in.

    The middle one of the support slices that show the organ segments ALL slices of the query;
    where the organ lies in the query is not told. Dice over the whole volume, mean over cases.
    """

    chunks: int = 1
    name = "adnet"

    def __post_init__(self) -> None:
        if self.chunks != 1:
            raise InputError(
                f"chunks: the protocol adnet has one support slice for the whole volume, got "
                f"{self.chunks}; leave the option out or take another protocol"
            )

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(range(len(areas)))]


PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (Published(), SENet(), ALPNet(), ADNet())}


def protocol_of(name: str, chunks: int | None = None) -> Protocol:
    """A protocol by its name, with another number of chunks if given.

    Raises:
        InputError: an unknown name, or chunks that it cannot have.
    """
    if name not in PROTOCOLS:
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    found = PROTOCOLS[name]
    return found if chunks is None else dataclasses.replace(found, chunks=chunks)


def areas(labels: np.ndarray, label: int) -> np.ndarray:
    """The area of a label on each slice, in pixels of a slice of 512 x 512.

    The published thresholds count pixels of such slices. Scaled so, they mean the same share of
    the image at any size: 200 pixels are 50 of a slice of 257 x 257.

    Args:
        labels: [Z, Y, X] whole numbers.

    Returns:
        float64 [Z].
    """
    counts = (labels == label).sum(axis=(1, 2))
    return np.asarray(counts * (_REFERENCE_PIXELS / (labels.shape[1] * labels.shape[2])))
