"""CHAOS's T2-SPIR MR scans, as few-shot papers use them: 20 training cases, four organs.

    Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm
    Train_Sets/MR/1/T2SPIR/Ground/IMG-0002-00001.png     grey values 63, 126, 189, 252

A slice and its mask have the same name. Every DICOM file of a case has another series id, so that
slices are grouped by their folder, and their geometry is checked.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from ..data.volumes import Volume
from ..errors import InputError
from .survey import Faults, FaultsError, Loaded, Survey, files_below

CORPUS = {
    "name": "CHAOS T2-SPIR",
    "description": "Abdominal MR, T2-SPIR, four organs drawn by hand (CHAOS challenge, training "
    "cases).",
    "reference": "Kavur et al., Medical Image Analysis 2021",
    "licence": "CC BY-NC-SA 4.0 by the challenge's rules",
    "channel_names": {"0": "T2"},
}

LABELS = {"liver": 1, "kidney_right": 2, "kidney_left": 3, "spleen": 4}
# The organisers' ranges around 63, 126, 189 and 252, ends included.
_GREY = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}
CASES = (1, 2, 3, 5, 8, 10, 13, 15, 19, 20, 21, 22, *range(31, 35), *range(36, 40))

_WITHIN = (".", "MR", "Train_Sets/MR", "CHAOS_Train_Sets/Train_Sets/MR")

_GAP_TOLERANCE = 0.05  # of the distance between slices: positions have few digits


def survey(source: Path) -> Survey:
    """Find the 20 cases; raises InputError if there is none, or pydicom is not installed."""
    if importlib.util.find_spec("pydicom") is None:
        raise InputError(
            'reading DICOM needs pydicom, which is not installed; pip install "lslpn[dicom]"'
        )
    root = _root(source)
    result = Survey(source, dict(LABELS))
    numbers = {int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdecimal()}
    for number in sorted(numbers.union(CASES)):
        case = f"chaos_{number:02d}"
        folder = root / str(number) / "T2SPIR"
        slices, drawings = folder / "DICOM_anon", folder / "Ground"
        if not folder.is_dir() and number not in CASES:
            result.ignored["cases that are not among the 20, without T2SPIR"] += 1
            continue
        again = "unpack CHAOS_Train_Sets.zip again"
        images, drawn = (
            _numbered(where, kind, case, result) if where.is_dir() else {}
            for where, kind in ((slices, "dcm"), (drawings, "png"))
        )
        if not images:
            result.problems.missing(slices, f"the slices of {case}", case, again)
        if not drawn:
            result.problems.missing(drawings, f"the drawings of {case}", case, again)
        for key in sorted(set(images) ^ set(drawn)) if images and drawn else ():
            path = drawings / f"{key}.png" if key in images else slices / f"{key}.dcm"
            what = f"every slice of {case} has an image and a drawing"
            result.problems.missing(path, what, case, again)
        result.cases[case] = functools.partial(_load, case=case, slices=images, drawings=drawn)
    return result


def _root(source: Path) -> Path:
    for within in _WITHIN:
        folder = source / within
        if folder.is_dir() and any((p / "T2SPIR").is_dir() for p in folder.iterdir()):
            return folder
    raise InputError(
        f"{source}: has no case, expected folders such as Train_Sets/MR/1/T2SPIR; unpack "
        "CHAOS_Train_Sets.zip and give its folder"
    )


def _numbered(folder: Path, kind: str, case: str, result: Survey) -> dict[str, Path]:
    """The files of a kind in a folder, by their names without the ending."""
    found: dict[str, Path] = {}
    for path in files_below(folder):
        name, _, ending = path.name.rpartition(".")
        if not result.finished(path, case):
            continue
        if ending.lower() != kind:
            result.ignored[f"not {kind.upper()}"] += 1
        elif not re.fullmatch(r"IMG-\d+-\d+", name):
            result.problems.misnamed(path, f"IMG-0002-00001.{kind}", case)
        elif name in found:
            result.problems.one_of([found[name], path], f"slice {name} of {case}", case)
        else:
            found[name] = path
    return found


# --- one case -------------------------------------------------------------------------------


class _Slice(NamedTuple):
    """A DICOM slice; its geometry is in mm, in LPS+ coordinates."""

    path: Path
    pixels: np.ndarray  # [rows, columns]
    position: np.ndarray
    along_row: np.ndarray
    down_column: np.ndarray
    spacing: np.ndarray  # between rows, between columns


def _load(faults: Faults, case: str, slices: dict[str, Path], drawings: dict[str, Path]) -> Loaded:
    before = len(faults)
    read = faults.read_all(slices, case, _read_slice)

    def read_drawing(path: Path) -> np.ndarray:
        labels = _read_drawing(path)
        if path.stem in read and labels.shape != read[path.stem].pixels.shape:
            raise InputError(
                f"{path}: is {_size(labels)} pixels, its slice {_size(read[path.stem].pixels)}, "
                "expected the same; unpack it again"
            )
        return labels

    labels = faults.read_all(drawings, case, read_drawing)
    if not read or len(read) < len(slices):
        raise FaultsError
    order, affine = _geometry(read, lambda path, what: faults.add(path, what, case))
    if len(faults) > before or labels.keys() != read.keys():
        raise FaultsError

    # The axes of a NIfTI array run along a row, down the columns and through the slices.
    image = _nifti([read[name].pixels for name in order], affine)
    drawn = _nifti([labels[name] for name in order], affine)
    folder, other = slices[order[0]].parent, drawings[order[0]].parent
    volume = faults.read(folder, case, lambda path: Volume.from_nibabel(image, name=str(path)))
    found = Volume.from_nibabel(drawn, labels=True).data
    if not found.any():
        faults.nothing_drawn(other, case)
    if volume is None or len(faults) > before:
        raise FaultsError
    record = {
        "image": faults.shown(folder),
        "labels": faults.shown(other),
        "slices": len(order),
        "first_slice": order[0],
        "empty": [organ for organ, value in LABELS.items() if not (found == value).any()],
    }
    return Loaded(image, volume, found, record)


def _read_slice(path: Path) -> _Slice:
    import pydicom

    try:
        data = pydicom.dcmread(path)
        pixels = np.asarray(data.pixel_array)
        position = np.array([float(v) for v in data.ImagePositionPatient])
        cosines = np.array([float(v) for v in data.ImageOrientationPatient])
        spacing = np.array([float(v) for v in data.PixelSpacing])
        slope = float(getattr(data, "RescaleSlope", 1) or 1)
        offset = float(getattr(data, "RescaleIntercept", 0) or 0)
    except Exception as error:  # what pydicom raises depends on which part of the file is broken
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a DICOM image ({what}); unpack it again"
        ) from error
    if pixels.ndim != 2:
        raise InputError(f"{path}: has an array of shape {pixels.shape}, expected one grey slice")
    if len(position) != 3 or len(cosines) != 6 or len(spacing) != 2 or (spacing <= 0).any():
        raise InputError(
            f"{path}: its position, orientation or pixel spacing is invalid; unpack it again"
        )
    if (slope, offset) != (1.0, 0.0):
        pixels = (pixels * slope + offset).astype(np.float32)
    elif pixels.dtype.kind in "iu":
        small = pixels.min() >= -32768 and pixels.max() <= 32767
        pixels = pixels.astype(np.int16 if small else np.int32)
    return _Slice(path, pixels, position, cosines[:3], cosines[3:], spacing)


def _read_drawing(path: Path) -> np.ndarray:
    """The labels of a PNG file, uint8 [rows, columns]."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            grey = np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged or cut short ({what}); unpack it again") from error
    labels = np.zeros(grey.shape, np.uint8)
    for value, (low, high) in _GREY.items():
        labels[(grey >= low) & (grey <= high)] = value
    unknown = np.unique(grey[(grey > 0) & (labels == 0)])
    if len(unknown):
        raise InputError(
            f"{path}: has the grey values {', '.join(map(str, unknown[:6]))}, expected 0, 63, 126, "
            "189 and 252; use the file as it was distributed"
        )
    return labels


def _geometry(
    read: dict[str, _Slice], fault: Callable[[Path, str], None]
) -> tuple[list[str], np.ndarray]:
    """The slices' names in their order along the normal, and the affine to RAS+ in mm.

    DICOM PS3.3, C.7.6.2.1.1: the pixel in row r and column c is at position + c dc X + r dr Y,
    with X the direction along a row and Y down a column, in LPS+. The step between slices is
    computed from their positions, because a slice's thickness does not include the gap.
    """
    names = sorted(read)
    one = read[names[0]]
    for name in names[1:]:
        for key in ("along_row", "down_column", "spacing"):
            if not np.allclose(getattr(read[name], key), getattr(one, key), atol=1e-3):
                what = f"its {key} differs from that of {names[0]}, expected the same"
                fault(read[name].path, what)
        if read[name].pixels.shape != one.pixels.shape:
            sizes = f"{_size(read[name].pixels)} pixels, {names[0]} {_size(one.pixels)}"
            fault(read[name].path, f"is {sizes}, expected the same")
    normal = np.cross(one.along_row, one.down_column)
    if abs(np.linalg.norm(normal) - 1) > 1e-2 or len(names) < 2:
        what = "it is the only slice" if len(names) < 2 else "its axes are not at right angles"
        fault(one.path, f"{what}, expected a stack of slices; unpack this case again")
        return names, np.eye(4)
    along = {name: float(read[name].position @ normal) for name in names}
    order = sorted(names, key=along.__getitem__)
    first, last = read[order[0]], read[order[-1]]
    gaps = np.diff([along[name] for name in order])
    usual = float(np.median(gaps))
    if usual <= 0:
        fault(first.path, "has the same position as other slices; unpack this case again")
        return order, np.eye(4)
    for k in np.flatnonzero(np.abs(gaps - usual) > _GAP_TOLERANCE * usual):
        fault(
            read[order[k + 1]].path,
            f"is {gaps[k]:.3g} mm from slice {order[k]}, the others {usual:.3g} mm apart, "
            "expected even distances: a slice is missing or duplicated",
        )
    affine = np.eye(4)
    affine[:3, 0] = one.along_row * one.spacing[1]
    affine[:3, 1] = one.down_column * one.spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(order) - 1)
    affine[:3, 3] = first.position
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _nifti(slices: list[np.ndarray], affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(np.stack([pixels.T for pixels in slices], axis=-1), affine)
    image.set_sform(affine, 1)  # 1: the scanner's own coordinates
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return image


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
