"""The result of a segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from .why import Why

Align = Literal["none", "body", "affine", "deformable"]

_LOW_CONFIDENCE = 0.5


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of a scan.

    Attributes:
        labels: uint8, int16 or int32 [Z, Y, X] in the frame of the query's data.
        matches: int [supports, Z], the slice of each support that each query slice was matched
            with, or -1.
        why: the windows that decided, if requested and if the method has windows. If the supports
            were registered, their propagated labels have an influence as well.
        confidence: for registered supports, maps each label to a number from 0 to 1 (0 for an
            organ that was not found): the mean of two measures that predict its Dice, the Dice
            between the organ by the propagated labels only and by the features only, and its
            `refinement.contrast`.
        alignments: for registered supports, the alignment that was used for each of them.
        probabilities: if requested, uint8 [N, Z, Y, X]: 255 times the probability of each of the
            supports' N labels, in ascending order.
    """

    labels: np.ndarray
    matches: np.ndarray
    why: Why | None = None
    confidence: Mapping[int, float] | None = None
    alignments: tuple[Align, ...] = ()
    probabilities: np.ndarray | None = None

    @property
    def doubtful(self) -> list[int]:
        """Labels that were found with a confidence below 0.5; check these organs."""
        return doubtful(self.confidence or {})


def doubtful(confidence: Mapping[int, float]) -> list[int]:
    """Labels with a confidence below 0.5, except those that were not found (0)."""
    return [label for label, sure in confidence.items() if 0 < sure < _LOW_CONFIDENCE]
