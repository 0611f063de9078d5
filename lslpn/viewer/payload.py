"""What a page holds: volumes thinned to what a browser carries, organs with their measures."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from ..data.intensities import interpret
from ..data.volumes import Volume
from ..errors import InputError
from ..evaluation.overlay import colour
from ..segmentation.result import doubtful

if TYPE_CHECKING:
    from ..segmentation.why import Why


# A CT of 9.2 million voxels makes a page of 10 MB.
_VOXELS = 12_000_000
_SUPPORT_VOXELS = 4_000_000
_LARGEST_LABEL = 254  # labels that a page tells apart; uint8 without 0 and 255

# (name, low, high) in HU: level 50 width 400, level -600 width 1500, level 400 width 1800.
_WINDOWS = (("Abdomen", -150.0, 250.0), ("Lung", -1350.0, 150.0), ("Bone", -500.0, 1300.0))
_SHARES = (0.01, 0.995)  # of the voxels of a scan that is no CT: what is shown black and white


@dataclass(frozen=True)
class Support:
    """A labelled scan that the query was segmented by.

    Attributes:
        image: the scan.
        labels: [Z, Y, X] in its frame.
        match: for each slice of the query the slice of this scan, or -1.
        name: what it is called; default: its file's name.
    """

    image: Volume
    labels: np.ndarray
    match: Sequence[int] | np.ndarray
    name: str | None = None

    @property
    def title(self) -> str:
        return self.name or file_stem(self.image)


def file_stem(volume: Volume) -> str:
    """The name of a volume's file without folder and ending: no path goes into a page."""
    name = volume.path.name
    for ending in (".gz", ".nii"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


def contents(
    image: Volume,
    layers: Mapping[str, np.ndarray],
    *,
    truth: str | None,
    names: Mapping[int, str],
    confidence: Mapping[int, float],
    supports: Sequence[Support],
    why: Why | None,
    notes: Sequence[str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Facts, as JSON takes them, and blocks of base64; see `view` for the arguments."""
    notes = list(notes)
    step = _step(image, _VOXELS)
    values = _values([*layers.values(), *(s.labels for s in supports)])
    if len(values) > _LARGEST_LABEL:
        notes.append(f"Of {len(values)} labels the first {_LARGEST_LABEL} are shown.")
        values = values[:_LARGEST_LABEL]
    counts = {name: _Counts(labels, values) for name, labels in layers.items()}
    organs = [
        {
            "value": value,
            "name": names.get(value, f"label {value}"),
            "colour": colour(value),
            "ml": [round(float(c.voxels[rank]) * image.voxel_ml, 2) for c in counts.values()],
            "dice": _dice(layers, truth, counts, value, rank),
            "confidence": confidence.get(value),
            "at": next((c.at[rank] for c in counts.values() if rank in c.at), None),
        }
        for rank, value in enumerate(values.tolist(), 1)
    ]
    if unsure := [o["name"] for o in organs if o["value"] in doubtful(confidence)]:
        notes.append(f"Low confidence, check these organs: {', '.join(unsure)}.")
    if not layers:
        notes.append("No labels were given: the scan alone is shown.")
    for name, one in counts.items():
        if not one.voxels[1:].any():
            notes.append(f"{name.capitalize()}: nothing is labelled, every voxel is 0.")
    if supports and not confidence:
        notes.append(
            "No confidence is given: it is worked out where supports are registered to the scan."
        )
    if max(step) > 1:
        notes.append(
            f"The scan is large: of its voxels every {_ordinal(step[2])} along x and y and every "
            f"{_ordinal(step[0])} slice are in this page. Volumes are those of the whole scan."
        )
    facts: dict[str, Any] = {
        "image": _scan(image, step, file_stem(image)),
        "layers": list(layers),
        "truth": truth,
        "organs": organs,
        "supports": [],
        "notes": notes,
        "why": None,
    }
    blocks = {"image": _pack(image.data, image, step)}
    for i, labels in enumerate(layers.values()):
        blocks[f"layer-{i}"] = _pack(labels, image, step, values)
    for i, support in enumerate(supports):
        thin = _step(support.image, _SUPPORT_VOXELS)
        match = [int(z) for z in support.match]
        facts["supports"].append({**_scan(support.image, thin, support.title), "match": match})
        blocks[f"support-{i}"] = _pack(support.image.data, support.image, thin)
        blocks[f"support-{i}-labels"] = _pack(support.labels, support.image, thin, values)
    if why is not None:
        facts["why"], blocks["why-data"] = _pack_why(why, values)
    return facts, blocks


# --- organs ------------------------------------------------------------------------------------


def _values(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All label values, sorted; slice by slice, since a large scan leaves no room for a sort."""
    found: set[int] = set()
    for labels in arrays:
        for plane in labels:
            found.update(np.unique(plane).tolist())
    return np.array(sorted(found - {0}), np.int64)


def _ranks(plane: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Label values to 1, 2, ... in the order of `values`; 0 where there is none of them."""
    if not len(values):
        return np.zeros(plane.shape, np.uint8)
    at = np.searchsorted(values, plane).clip(0, len(values) - 1)
    return np.where(values[at] == plane, at + 1, 0).astype(np.uint8)


class _Counts:
    """Voxels of each organ, and a point in the slice that shows most of it."""

    def __init__(self, labels: np.ndarray, values: np.ndarray) -> None:
        areas = np.stack(
            [np.bincount(_ranks(p, values).ravel(), minlength=len(values) + 1) for p in labels]
        )
        self.voxels = areas.sum(0)
        self.at: dict[int, list[int]] = {}
        for rank, z in enumerate(areas[:, 1:].argmax(0), 1):
            if self.voxels[rank]:
                y, x = np.nonzero(labels[z] == values[rank - 1])
                nearest = np.argmin((y - y.mean()) ** 2 + (x - x.mean()) ** 2)
                self.at[rank] = [int(z), int(y[nearest]), int(x[nearest])]


def _dice(
    layers: Mapping[str, np.ndarray],
    truth: str | None,
    counts: Mapping[str, _Counts],
    value: int,
    rank: int,
) -> float | None:
    """Of the first layer with the truth; None where the truth does not show the organ."""
    first = next(iter(layers), None)
    if truth is None or first is None or first == truth or not counts[truth].voxels[rank]:
        return None
    both = sum(
        int(np.count_nonzero((a == value) & (b == value)))
        for a, b in zip(layers[first], layers[truth], strict=True)
    )
    total = int(counts[first].voxels[rank] + counts[truth].voxels[rank])
    return round(2 * both / total, 4)


# --- volumes -----------------------------------------------------------------------------------


def _step(volume: Volume, limit: int) -> tuple[int, int, int]:
    """Every how many voxels along (z, y, x) are kept: the finer axes are thinned first."""
    z, xy = 1, 1
    while (
        np.prod([-(-n // s) for n, s in zip(volume.data.shape, (z, xy, xy), strict=True)]) > limit
    ):
        if z * volume.spacing[0] < xy * min(volume.spacing[1:]):
            z += 1
        else:
            xy += 1
    return z, xy, xy


def _ordinal(n: int) -> str:
    return {1: "", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")


def _scan(volume: Volume, step: tuple[int, int, int], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(volume.data.shape),
        "spacing": [round(float(v), 4) for v in volume.spacing],
        "step": list(step),
        **_grey(volume),
    }


def _thinned(data: np.ndarray, step: tuple[int, int, int]) -> tuple[np.ndarray, list[int]]:
    """Every step-th voxel, and where the first of them is: in the middle of what it stands for."""
    first = [min(s // 2, n - 1) for s, n in zip(step, data.shape, strict=True)]
    z, y, x = (slice(f, None, s) for f, s in zip(first, step, strict=True))
    return data[z, y, x], first


def _pack(
    data: np.ndarray,
    like: Volume,
    step: tuple[int, int, int],
    values: np.ndarray | None = None,
) -> str:
    """A .nii.gz in display orientation as base64; labels as their ranks among `values`.

    The header is new: nothing of the file's own, which may name persons or folders, is kept.
    """
    thin, first = _thinned(data, step)
    if values is not None:
        voxels = np.stack([_ranks(plane, values) for plane in thin])
    elif thin.min() >= -32768 and thin.max() <= 32767 and (thin == np.rint(thin)).all():
        voxels = thin.astype(np.int16)
    else:
        voxels = thin
    scaled = np.diag([step[2], step[1], step[0], 1.0])
    scaled[:3, 3] = first[::-1]
    image = nib.Nifti1Image(voxels.transpose(2, 1, 0), like.affine @ scaled)
    if voxels.dtype.kind == "f":
        image.set_data_dtype(np.int16)  # nibabel finds the slope that keeps the most
    return _base64(image.to_bytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


def _grey(image: Volume) -> dict[str, Any]:
    """The window that a page opens with, and those it offers, in the values of the file."""
    how = interpret(image.data)
    if how.hu:
        windows = [[name, low + how.offset, high + how.offset] for name, low, high in _WINDOWS]
        return {"windows": windows, "unit": "HU", "offset": how.offset}
    sample = image.data.ravel()[:: max(1, image.data.size >> 20)]
    low, high = (float(v) for v in np.quantile(sample, _SHARES))
    least, most = float(image.data.min()), float(image.data.max())
    windows = [["Whole range", least, most]]
    if low < high:
        windows.insert(0, ["Tissue", low, high])
    return {"windows": windows, "unit": "", "offset": 0}


# --- why ---------------------------------------------------------------------------------------


def _pack_why(why: Why, values: np.ndarray) -> tuple[dict[str, Any], str]:
    """Three arrays [Z', R, h, w], one after the other: labels, windows, cosines x 10000."""
    slices = [z for z, sources in enumerate(why.sources) if sources]
    labels = why.labels[slices]
    ranks = np.where(labels < 0, 255, _ranks(labels, values)).astype(np.uint8)
    windows = why.windows[slices].astype("<i4")
    cosines = np.rint(why.cosines[slices] * 10000).astype("<i2")
    facts = {
        "slices": slices,
        "shape": list(labels.shape),
        "rows": why.rows.round(6).tolist(),
        "columns": why.columns.round(6).tolist(),
        "query_boxes": why.query_boxes[slices].tolist(),
        "support_boxes": [boxes.tolist() for boxes in why.support_boxes],
        "sources": [[[list(s) for s in source] for source in why.sources[z]] for z in slices],
    }
    # The widest words first, so that all lie at multiples of their size.
    return facts, _base64(windows.tobytes() + cosines.tobytes() + ranks.tobytes())


def check_labels(name: str, labels: np.ndarray, image: Volume) -> None:
    """Refuse labels of another shape than the image's, negative ones, and no whole numbers."""
    if labels.shape != image.data.shape:
        given, wanted = (" x ".join(map(str, a.shape)) for a in (labels, image.data))
        raise InputError(
            f"{name}: expected labels in the grid of the image, [Z, Y, X] = {wanted}, got {given}; "
            "give the labels that were made for this scan"
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        raise InputError(
            f"{name}: expected whole numbers from 0, got {labels.dtype} from {labels.min():g}; "
            "round them, or check that the image was not given for the labels"
        )
