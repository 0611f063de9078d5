"""CHAOS, the T2-SPIR MR scans as few-shot papers use them: 20 training cases, four organs.

    Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm
    Train_Sets/MR/1/T2SPIR/Ground/IMG-0002-00001.png     grey values 63, 126, 189, 252

A slice and its mask have the same name. Every DICOM file of a case has a series id of its own, so
slices are grouped by their folder and checked by their geometry.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

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
# The organisers' ranges about 63, 126, 189 and 252, ends included.
_GREY = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}
CASES = (1, 2, 3, 5, 8, 10, 13, 15, 19, 20, 21, 22, *range(31, 35), *range(36, 40))

_WITHIN = (".", "MR", "Train_Sets/MR", "CHAOS_Train_Sets/Train_Sets/MR")

# Parts of the distance between slices: positions are written with few digits.
_GAP_TOLERANCE = 0.05


def survey(source: Path) -> Survey:
    """Find the 20 cases; raises InputError without any case, or without pydicom."""
    _pydicom()
    root = _root(source)
    result = Survey(source, dict(LABELS))
    numbers = {int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit()}
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
            text = f"every slice of {case} has an image and a drawing"
            result.problems.missing(path, text, case, again)
        result.cases[case] = functools.partial(_load, case=case, slices=images, drawings=drawn)
    return result


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise InputError(
            'reading DICOM needs pydicom, which is not installed; pip install "lslpn[dicom]"'
        ) from error
    return pydicom


def _root(source: Path) -> Path:
    for within in _WITHIN:
        folder = source / within
        if folder.is_dir() and any((p / "T2SPIR").is_dir() for p in folder.iterdir()):
            return folder
    raise InputError(
        f"{source}: holds no case, expected folders such as Train_Sets/MR/1/T2SPIR; unpack "
        "CHAOS_Train_Sets.zip and give its folder"
    )


def _numbered(folder: Path, kind: str, case: str, result: Survey) -> dict[str, Path]:
    """Name without its ending to file."""
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


def _load(faults: Faults, case: str, slices: dict[str, Path], drawings: dict[str, Path]) -> Loaded:
    before = len(faults)

    def fault(path: Path, what: str) -> None:
        faults.add(path, what, case)

    read: dict[str, Any] = {}
    for name, path in slices.items():
        try:
            read[name] = _read_slice(path)
        except InputError as error:
            fault(path, str(error))
    labels: dict[str, np.ndarray] = {}
    for name, path in drawings.items():
        try:
            labels[name] = _read_drawing(path)
            if name in read and labels[name].shape != read[name]["pixels"].shape:
                raise InputError(
                    f"is {_size(labels[name])} pixels, its slice {_size(read[name]['pixels'])}, "
                    "expected the same; unpack it again"
                )
        except InputError as error:
            fault(path, str(error))
    if not read or len(read) < len(slices):
        raise FaultsError
    order, affine = _geometry(read, slices, fault)
    if len(faults) > before or sorted(labels) != sorted(read):
        raise FaultsError

    # Array axes of a NIfTI file: along a row, down the columns, through the slices.
    image = np.stack([read[name]["pixels"].T for name in order], axis=-1)
    drawn = np.stack([labels[name].T for name in order], axis=-1)
    first = slices[order[0]]
    if image.min() == image.max():
        fault(first.parent, "every pixel of every slice is the same; unpack this case again")
    if not drawn.any():
        faults.nothing_drawn(drawings[order[0]].parent, case)
    if len(faults) > before:
        raise FaultsError
    record = {
        "image": faults.shown(first.parent),
        "labels": faults.shown(drawings[order[0]].parent),
        "slices": len(order),
        "first_slice": order[0],
        "empty": [organ for organ, value in LABELS.items() if not (drawn == value).any()],
    }
    return Loaded(_nifti(image, affine), _nifti(drawn, affine), record)


def _read_slice(path: Path) -> dict[str, Any]:
    """Pixels [rows, columns] and geometry of a DICOM file; InputError without the path."""
    pydicom = _pydicom()
    try:
        data = pydicom.dcmread(path)
        pixels = np.asarray(data.pixel_array)
        position = np.array([float(v) for v in data.ImagePositionPatient])
        cosines = np.array([float(v) for v in data.ImageOrientationPatient])
        spacing = np.array([float(v) for v in data.PixelSpacing])
        slope = float(getattr(data, "RescaleSlope", 1) or 1)
        offset = float(getattr(data, "RescaleIntercept", 0) or 0)
    # pydicom raises whatever the broken part of the file leads to.
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot be read as a DICOM image ({what}); unpack it again") from error
    if pixels.ndim != 2:
        raise InputError(f"holds an array of shape {pixels.shape}, expected one grey slice")
    if len(position) != 3 or len(cosines) != 6 or len(spacing) != 2 or (spacing <= 0).any():
        raise InputError("its position, orientation or pixel spacing is broken; unpack it again")
    if (slope, offset) != (1.0, 0.0):
        pixels = (pixels * slope + offset).astype(np.float32)
    elif pixels.dtype.kind in "iu":
        small = pixels.min() >= -32768 and pixels.max() <= 32767
        pixels = pixels.astype(np.int16 if small else np.int32)
    return {
        "pixels": pixels,
        "position": position,
        "along_row": cosines[:3],
        "down_column": cosines[3:],
        "spacing": spacing,  # between rows, between columns
    }


def _read_drawing(path: Path) -> np.ndarray:
    """Labels uint8 [rows, columns] of a PNG file; InputError without the path."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            grey = np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"damaged or cut short ({what}); unpack it again") from error
    labels = np.zeros(grey.shape, np.uint8)
    for value, (low, high) in _GREY.items():
        labels[(grey >= low) & (grey <= high)] = value
    strange = np.unique(grey[(grey > 0) & (labels == 0)])
    if len(strange):
        raise InputError(
            f"holds the grey values {', '.join(map(str, strange[:6]))}, expected 0, 63, 126, 189 "
            "and 252; take the file as it was distributed"
        )
    return labels


def _geometry(
    read: dict[str, Any], slices: dict[str, Path], fault: Callable[[Path, str], None]
) -> tuple[list[str], np.ndarray]:
    """Names of the slices in their order along the normal, and the affine to RAS+ in mm.

    DICOM PS3.3, C.7.6.2.1.1: the pixel in row r and column c lies at position + c dc X + r dr Y,
    with X the direction along a row and Y down a column, in LPS+. The step from slice to slice is
    taken from the positions, because the thickness of a slice leaves out the gap.
    """
    names = sorted(read)
    one = read[names[0]]
    for name in names[1:]:
        for key in ("along_row", "down_column", "spacing"):
            if not np.allclose(read[name][key], one[key], atol=1e-3):
                fault(slices[name], f"its {key} differs from that of {names[0]}, expected the same")
        if read[name]["pixels"].shape != one["pixels"].shape:
            fault(
                slices[name],
                f"is {_size(read[name]['pixels'])} pixels, {names[0]} {_size(one['pixels'])}, "
                "expected the same",
            )
    x, y = one["along_row"], one["down_column"]
    normal = np.cross(x, y)
    length = float(np.linalg.norm(normal))
    if abs(length - 1) > 1e-2 or len(names) < 2:
        what = "only one slice is there" if len(names) < 2 else "its axes are not at right angles"
        fault(slices[names[0]], f"{what}, expected a stack of slices; unpack this case again")
        return names, np.eye(4)
    along = {name: float(read[name]["position"] @ normal) for name in names}
    order = sorted(names, key=along.__getitem__)
    gaps = np.diff([along[name] for name in order])
    usual = float(np.median(gaps))
    if usual <= 0:
        fault(slices[order[0]], "lies where other slices do; unpack this case again")
        return order, np.eye(4)
    for k in np.flatnonzero(np.abs(gaps - usual) > _GAP_TOLERANCE * usual):
        fault(
            slices[order[k + 1]],
            f"lies {gaps[k]:.3g} mm from slice {order[k]}, the others {usual:.3g} mm apart, "
            "expected even distances: a slice is missing or there twice",
        )
    first, last = read[order[0]]["position"], read[order[-1]]["position"]
    affine = np.eye(4)
    affine[:3, 0] = x * one["spacing"][1]
    affine[:3, 1] = y * one["spacing"][0]
    affine[:3, 2] = (last - first) / (len(order) - 1)
    affine[:3, 3] = first
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _nifti(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)  # 1: the scanner's own coordinates
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return image


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
