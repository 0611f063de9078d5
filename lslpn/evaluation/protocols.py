"""The protocols of the literature for volumes: which support slice segments which query slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Pair:
    """The index of a support slice, and the rising indices of the query slices it segments."""

    support: int
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """Which support slice segments which query slices.

    Attributes:
        chunks: number of parts into which the organ's range is divided.
        min_pixels: a support slice must show more pixels of the organ than this.
        name: its name on the command line.
        average: how its authors average over the query cases.
        normalise: how its authors scale grey values to [0, 1]; None: as the model does.
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

        Takes the organ's `areas` on each slice of support and query. No query slice is in two
        pairs. There are no pairs if either scan shows too little of the organ.
        """
        supports = self.support_slices(support_areas)
        groups = self.query_groups(query_areas) if supports else []
        return [Pair(s, group) for s, group in zip(supports, groups, strict=True) if group]

    def support_slices(self, areas: np.ndarray) -> list[int]:
        """The support slice of each chunk; empty if no slice shows enough of the organ."""
        return _middles(np.flatnonzero(areas > self.min_pixels).tolist(), self.chunks)

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        """The query slices of each chunk; chunks of a short organ may be empty."""
        return _parts(_range(areas, 0), self.chunks)


def _middles(slices: Sequence[int], chunks: int) -> list[int]:
    """The middle slices of `chunks` equal parts; empty if there are no slices."""
    length = len(slices)
    return [slices[(2 * i + 1) * length // (2 * chunks)] for i in range(chunks)] if length else []


def _parts(slices: Sequence[int], chunks: int) -> list[tuple[int, ...]]:
    """Divide slices into `chunks` equal parts; a slice belongs to the part that has its centre."""
    parts: list[list[int]] = [[] for _ in range(chunks)]
    for position, index in enumerate(slices):
        parts[(2 * position + 1) * chunks // (2 * len(slices))].append(index)
    return [tuple(part) for part in parts]


def _range(areas: np.ndarray, threshold: float) -> list[int]:
    """All slices from the first to the last one with an area above the threshold."""
    above = np.flatnonzero(areas > threshold)
    return list(range(above[0], above[-1] + 1)) if len(above) else []


@dataclass(frozen=True)
class Published(Protocol):
    """The protocol of the authors' published LSLPN code.

    In the support and (by its ground truth) in the query, the organ's range runs from the first to
    the last slice with more than 200 pixels of it, without that last slice. Both ranges are divided
    into 12 equal chunks; the middle slice of each support chunk segments the query's chunk. If a
    middle slice does not show more than 200 pixels (an organ in two pieces), the nearest one that
    does is used. Dice on the query's range; mean over the query cases.
    """

    chunks: int = 12
    min_pixels: float = 200
    name = "published"

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = np.flatnonzero(areas > self.min_pixels)
        middles = _middles(self._span(areas), self.chunks)
        return [int(shown[np.abs(shown - middle).argmin()]) for middle in middles]

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        return _parts(self._span(areas), self.chunks)

    def _span(self, areas: np.ndarray) -> list[int]:
        """The organ's range; a single slice is not dropped."""
        span = _range(areas, self.min_pixels)
        return span[:-1] or span


@dataclass(frozen=True)
class SENet(Protocol):
    """The protocol of SENet's code (Roy et al. 2020).

    The support slices with more than 10 pixels of the organ are divided into K = 10 equal parts;
    the middle one of each is used. The L query slices from the first to the last that shows the
    organ are divided into K groups that start at round(linspace(0, L - 1, K)), so that the last one
    is a single slice. Dice on that range; median over the query cases, then mean over the organs.
    Grey values are scaled to [0, 1] by the minimum and maximum of the volume.
    """

    chunks: int = 10
    min_pixels: float = 10
    name = "senet"
    average = "median"
    normalise = "volume"

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        span = _range(areas, 0)
        if not span:
            return [()] * self.chunks
        starts = np.round(np.linspace(0, len(span) - 1, self.chunks)).astype(int)
        ends = [*starts[1:], len(span)]
        return [tuple(span[a:b]) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class ALPNet(Protocol):
    """The protocol of SSL-ALPNet's code (Ouyang et al. 2020).

    Of the support slices that show the organ, those at 1/6, 1/2 and 5/6 are used. Each segments
    the query slices in the same third of the organ's ground-truth range. Dice on that range; mean
    over the query cases.
    """

    chunks: int = 3
    name = "alpnet"


@dataclass(frozen=True)
class ADNet(Protocol):
    """The second protocol of ADNet (Hansen et al. 2022), "EP2", which is a user's situation.

    The middle one of the support slices that show the organ segments all slices of the query; the
    organ's range in the query is not given. Dice over the whole volume; mean over the query cases.
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
    """Get a protocol by its name, with another number of chunks if given.

    Raises:
        InputError: the name is unknown, or the protocol cannot have so many chunks.
    """
    if name not in PROTOCOLS:
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    found = PROTOCOLS[name]
    return found if chunks is None else dataclasses.replace(found, chunks=chunks)


def areas(labels: np.ndarray, label: int) -> np.ndarray:
    """The area of a label on each slice, in pixels of a slice of 512 x 512.

    The published thresholds count pixels of such slices. In these units they are the same share of
    the image at any size: 200 pixels are 50 pixels of a 257 x 257 slice.

    Args:
        labels: [Z, Y, X] whole numbers.

    Returns:
        float64 [Z].
    """
    counts = (labels == label).sum(axis=(1, 2))
    return np.asarray(counts * (512 * 512 / (labels.shape[1] * labels.shape[2])))
