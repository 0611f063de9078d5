"""Scans and labels as one HTML page that any browser opens, without a network.

Takes plain data: volumes, arrays, names. Knows nothing of networks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..atomic import write_text
from ..volumes import Volume

from .page import viewer
from .payload import Support, check_shape, file_stem, payload

if TYPE_CHECKING:
    from ..why import Why

__all__ = ["Support", "page", "write_page"]

Labels = np.ndarray | Volume


def page(
    image: Volume,
    labels: Labels | Mapping[str, Labels] | None = None,
    *,
    truth: Labels | None = None,
    names: Mapping[int, str] | None = None,
    confidence: Mapping[int, float] | None = None,
    supports: Sequence[Support] = (),
    why: Why | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as text; see `write_page`."""
    named = labels if isinstance(labels, Mapping) else {"prediction": labels}
    layers = {name: _array(one) for name, one in named.items() if one is not None}
    if truth is not None:
        layers["ground truth"] = _array(truth)
    for name, array in layers.items():
        check_shape(name, array, image)
    for support in supports:
        check_shape(support.title, support.labels, support.image)
    facts, blocks = payload(
        image,
        layers,
        truth=None if truth is None else "ground truth",
        names=names or {},
        confidence=confidence or {},
        supports=supports,
        why=why,
        notes=notes,
    )
    return viewer(title or file_stem(image), facts, blocks)


def write_page(
    path: str | os.PathLike[str],
    image: Volume,
    labels: Labels | Mapping[str, Labels] | None = None,
    *,
    truth: Labels | None = None,
    names: Mapping[int, str] | None = None,
    confidence: Mapping[int, float] | None = None,
    supports: Sequence[Support] = (),
    why: Why | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write a scan with its labels as one HTML file, which holds everything that it shows.

    A scan of more than 12 million voxels is thinned, and the page says so; volumes and Dice are
    those of the whole scan. Of files no more than their names go into the page.

    Args:
        path: the file; replaced whole or not at all.
        image: the scan.
        labels: [Z, Y, X] whole numbers in the frame of `image.data`, or several of them by name;
            the first is shown on the left.
        truth: ground truth in the same frame; it is shown beside the labels, with the Dice.
        names: label value to the organ's name.
        confidence: label value to how sure the segmentation is of the organ, 0 to 1.
        supports: the labelled scans; the slices that were matched follow those of the query.
        why: what decided, see `lslpn.why`; asks for `supports` in the order that it knows.
        title: default: the name of the image's file.
        notes: lines that the page shows on top.

    Returns:
        the path written.

    Raises:
        InputError: labels of another shape than their image, or no whole numbers; the file cannot
            be written.
    """
    text = page(
        image, labels, truth=truth, names=names, confidence=confidence, supports=supports, why=why,
        title=title, notes=notes,
    )  # fmt: skip
    write_text(path, text)
    return Path(path)


def _array(labels: Labels) -> np.ndarray:
    return labels.data if isinstance(labels, Volume) else np.asarray(labels)
