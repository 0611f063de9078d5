"""The content of a page: volumes, thinned if too large for a browser, and measures of organs."""

from __future__ import annotations

import base64
import gzip
import re
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
_MOST_LABELS = 254  # uint8 without 0 and 255

# (name, low, high) in HU: level 50 width 400, level -600 width 1500, level 400 width 1800.
_WINDOWS = (("Abdomen", -150.0, 250.0), ("Lung", -1350.0, 150.0), ("Bone", -500.0, 1300.0))
_QUANTILES = (0.01, 0.995)  # shown black and white in scans other than CT


@dataclass(frozen=True, eq=False)
class Support:
    """A labelled scan that the query was segmented by.

    Attributes:
        image: the scan.
        labels: [Z, Y, X] in the frame of `image.data`.
        match: for each slice of the query, the matched slice of this scan, or -1.
        name: shown on the page; default: the file's name.
    """

    image: Volume
    labels: np.ndarray
    match: Sequence[int] | np.ndarray
    name: str | None = None

    @property
    def title(self) -> str:
        return self.name or file_stem(self.image)


def file_stem(volume: Volume) -> str:
    """The name of a volume's file without folder and ending, since pages must not contain paths."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", volume.path.name, flags=re.IGNORECASE)


def contents(
    image: Volume,
    layers: Mapping[str, np.ndarray],
    *,
    truth: np.ndarray | None,
    names: Mapping[int, str],
    confidence: Mapping[int, float],
    supports: Sequence[Support],
    why: Why | None,
    notes: Sequence[str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Facts for JSON, and blocks of base64; see `view` for the arguments."""
    notes = list(notes)
    step = _step(image, _VOXELS)
    values = _values([*layers.values(), *(s.labels for s in supports)])
    if len(values) > _MOST_LABELS:
        notes.append(f"Only the first {_MOST_LABELS} of {len(values)} labels are shown.")
        values = values[:_MOST_LABELS]
    counts = {name: _counts(labels, values) for name, labels in layers.items()}
    organs = [
        {
            "value": value,
            "name": names.get(value, f"label {value}"),
            "colour": colour(value),
            "ml": [round(float(n[rank]) * image.voxel_ml, 2) for n, _ in counts.values()],
            "dice": _dice(layers, truth, value),
            "confidence": float(confidence[value]) if value in confidence else None,
            "at": next((at[rank] for _, at in counts.values() if rank in at), None),
        }
        for rank, value in enumerate(values.tolist(), 1)
    ]
    if unsure := [o["name"] for o in organs if o["value"] in doubtful(confidence)]:
        notes.append(f"Low confidence, check these organs: {', '.join(unsure)}.")
    if not layers:
        notes.append("No labels were given, so only the scan is shown.")
    for name, (_, at) in counts.items():
        if not at:
            notes.append(f"{name.capitalize()}: nothing is labelled, every voxel is 0.")
    if supports and not confidence:
        notes.append("No confidence: it is computed only if supports are registered to the scan.")
    if max(step) > 1:
        notes.append(
            f"The scan is large, so this page has only {_every(step[2])} voxel along x and y, and "
            f"{_every(step[0])} slice. Volumes are those of the whole scan."
        )
    facts: dict[str, Any] = {
        "image": _scan(image, step, file_stem(image)),
        "layers": list(layers),
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
    """All label values, sorted; slice by slice, to save memory."""
    found: set[int] = set()
    for labels in arrays:
        for plane in labels:
            found.update(np.unique(plane).tolist())
    return np.array(sorted(found - {0}), np.int64)


def _ranks(plane: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Label values to 1, 2, ... in the order of `values`; others to 0."""
    if not len(values):
        return np.zeros(plane.shape, np.uint8)
    at = np.searchsorted(values, plane).clip(0, len(values) - 1)
    return np.where(values[at] == plane, at + 1, 0).astype(np.uint8)


def _counts(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Voxels of each rank, and a point of each organ found, in the slice that shows most of it."""
    areas = np.stack(
        [np.bincount(_ranks(p, values).ravel(), minlength=len(values) + 1) for p in labels]
    )
    at = {}
    for rank, z in enumerate(areas[:, 1:].argmax(0), 1):
        y, x = np.nonzero(labels[z] == values[rank - 1])
        if len(y):
            nearest = np.argmin((y - y.mean()) ** 2 + (x - x.mean()) ** 2)
            at[rank] = [int(z), int(y[nearest]), int(x[nearest])]
    return areas.sum(0), at


def _dice(layers: Mapping[str, np.ndarray], truth: np.ndarray | None, value: int) -> float | None:
    """Dice of the first layer with the truth; None if the truth does not show the organ."""
    first = next(iter(layers.values()), None)
    if truth is None or first is None or first is truth or not (truth == value).any():
        return None
    found, expected = first == value, truth == value
    # `evaluation.results` has a function for this, but imports torch.
    both = np.count_nonzero(found & expected)
    return round(2 * both / (np.count_nonzero(found) + np.count_nonzero(expected)), 4)


# --- volumes -----------------------------------------------------------------------------------


def _step(volume: Volume, limit: int) -> tuple[int, int, int]:
    """Keep every how many-th voxel along (z, y, x); the finer axes are thinned first."""
    z, xy = 1, 1
    while volume.data[::z, ::xy, ::xy].size > limit:
        if z * volume.spacing[0] < xy * min(volume.spacing[1:]):
            z += 1
        else:
            xy += 1
    return z, xy, xy


def _every(n: int) -> str:
    return {1: "every", 2: "every 2nd", 3: "every 3rd"}.get(n, f"every {n}th")


def _scan(volume: Volume, step: tuple[int, int, int], name: str) -> dict[str, Any]:
    """Facts about a scan; its windows are in the values of the file, the first shown initially."""
    data, how = volume.data, interpret(volume.data)
    windows = [[name, low + how.offset, high + how.offset] for name, low, high in _WINDOWS]
    if not how.hu:
        windows = [["Whole range", float(data.min()), float(data.max())]]
        sample = data.ravel()[:: max(1, data.size >> 20)]
        low, high = (float(v) for v in np.quantile(sample, _QUANTILES))
        if low < high:
            windows.insert(0, ["Tissue", low, high])
    return {
        "name": name,
        "shape": list(data.shape),
        "spacing": [round(float(v), 4) for v in volume.spacing],
        "step": list(step),
        "windows": windows,
        "unit": "HU" if how.hu else "",
        "offset": how.offset,
    }


def _pack(
    data: np.ndarray, like: Volume, step: tuple[int, int, int], values: np.ndarray | None = None
) -> str:
    """A thinned .nii.gz in display orientation as base64; labels become ranks among `values`.

    Its header is a new one, since the file's own may contain names of persons or folders.
    """
    # The voxel that is kept is in the middle of those that it stands for.
    first = [min(s // 2, n - 1) for s, n in zip(step, data.shape, strict=True)]
    thin = data[tuple(slice(f, None, s) for f, s in zip(first, step, strict=True))]
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
        image.set_data_dtype(np.int16)  # nibabel chooses the slope
    return _base64(image.to_bytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


# --- why ---------------------------------------------------------------------------------------


def _pack_why(why: Why, values: np.ndarray) -> tuple[dict[str, Any], str]:
    """Facts, and arrays [Z', R, h, w] one after the other: windows, cosines x 10000, ranks."""
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
    # The widest type first, so that each array is aligned.
    return facts, _base64(windows.tobytes() + cosines.tobytes() + ranks.tobytes())


def check_labels(name: str, labels: np.ndarray, image: Volume) -> None:
    """Refuse labels that do not have the image's shape or are not whole numbers from 0."""
    if labels.shape != image.data.shape:
        given, wanted = (" x ".join(map(str, a.shape)) for a in (labels, image.data))
        raise InputError(
            f"{name}: expected labels in the grid of the image, [Z, Y, X] = {wanted}, got {given}; "
            "give labels of this scan"
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        raise InputError(
            f"{name}: expected whole numbers from 0, got {labels.dtype} from {labels.min():g}; "
            "round them, or check that the image was not given as labels"
        )
