"""Voxels and geometry of NIfTI files, with a message for every kind of damage."""

from __future__ import annotations

import gzip
import io
import itertools
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from ..errors import InputError

# How far sform and qform may be apart, in voxels; the qform's quaternions are rounded more.
_FORMS_TOLERANCE = 0.5
# Millimetres in the header's other units of length: metres and microns.
_UNITS_MM = {1: 1e3, 3: 1e-3}
_PLAUSIBLE_MM = (0.01, 100.0)  # voxels of a scan, from micro-CT to a localiser


@dataclass(frozen=True, eq=False)
class Grid:
    """A file's own geometry, kept to write predictions in it.

    Attributes:
        shape: voxels along the file's three axes.
        affine: float64 [4, 4], voxel indices to millimetres (RAS+).
        header: the file's header, NIfTI-1 or NIfTI-2; its affine may be in metres or microns.
        path: the file; for messages.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header
    path: Path


def read(path: Path) -> tuple[np.ndarray, Grid]:
    """A file's voxels in its own order, with its intensity slope applied, and its geometry."""
    raw = _bytes_of(path)
    kind = _nifti_class(path, raw)
    try:
        image = kind.from_bytes(raw)
        # nibabel accepts 0.
        if image.dataobj.offset < len(image.header.binaryblock):  # type: ignore[attr-defined]
            raise HeaderDataError("its voxels would begin inside its header")
    except Exception as error:  # what nibabel raises depends on which field is broken
        raise _damaged(path, error) from error
    return array_of(path, image)


def array_of(path: Path, image: nib.Nifti1Image) -> tuple[np.ndarray, Grid]:
    """As `read`, for an image; `path` is for messages."""
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:
        raise _damaged(path, error) from error
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"{path}: voxels have the type {image.header.get_value_label('datatype')}, expected "
            "one number per voxel; save it as a greyscale image or a label map"
        )
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        few, many = "give the whole scan, not one slice", "split it and give one volume at a time"
        raise InputError(
            f"{path}: has {array.ndim} dimensions ({times(array.shape)}), expected 3; "
            f"{few if array.ndim < 3 else many}"
        )
    if array.size == 0:
        raise InputError(f"{path}: has no voxels ({times(array.shape)}); export it again")
    shape = (array.shape[0], array.shape[1], array.shape[2])
    affine, header = _affine(path, image), image.header.copy()
    if not np.array_equal(header.get_best_affine(), affine):
        header["sform_code"] = 0  # nibabel would prefer the sform although it is singular
    return array, Grid(shape, _in_mm(path, affine, header), header, path)


def _bytes_of(path: Path) -> bytes:
    """A file's decompressed content.

    The whole gzip stream is read to verify its checksum; nibabel would stop at the last voxel and
    accept a damaged stream.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, expected a .nii or .nii.gz file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as stream:
            return stream.read()
    except (EOFError, zlib.error, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    what = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{path}: damaged or cut short ({what}); copy, download or export the file again"
    )


def _nifti_class(path: Path, raw: bytes) -> type[nib.Nifti1Image]:
    """NIfTI-1 or NIfTI-2, by the header's size and magic."""
    if len(raw) < 348:
        raise InputError(
            f"{path}: is too short for a NIfTI file ({len(raw)} bytes); "
            "copy or export the file again"
        )
    sizes = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    if 348 in sizes and raw[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if 540 in sizes and raw[4:8] == b"n+2\0":
        return nib.Nifti2Image
    if 348 in sizes and raw[344:348] == b"ni1\0":
        raise InputError(
            f"{path}: is the header of a .hdr/.img pair, expected a single .nii or .nii.gz file; "
            "convert the pair"
        )
    raise InputError(
        f"{path}: is not a NIfTI file, expected .nii or .nii.gz; convert it first "
        "(dcm2niix does so for DICOM)"
    )


def _affine(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """The affine of a file, from its sform or else its qform, with a warning if that is a choice.

    Raises:
        InputError: neither is usable.
    """
    header = image.header
    forms = {"sform": _form(header.get_sform), "qform": _form(header.get_qform)}
    coded = {name: affine for name, affine in forms.items() if affine is not None}
    given = coded or {"neither": np.array(header.get_base_affine(), dtype=np.float64)}
    faults = {name: what for name, affine in given.items() if (what := _singular(affine))}
    sound = [name for name in given if name not in faults]
    if not sound:
        raise InputError(
            f"{path}: its affine is singular ({next(iter(faults.values()))}), expected three "
            "independent axes in millimetres; repair the header or export the file again"
        )
    affine, said = given[sound[0]], None
    if not coded:
        said = (
            f"its header has neither sform nor qform; its axes are assumed to run to {axes(affine)}"
            ", so check that left and right are correct"
        )
    for name, what in faults.items():
        said = f"its {name} is singular ({what}), its {sound[0]} is used"
    if len(sound) == 2:
        apart = apart_mm(image.shape[:3], affine, given["qform"])
        if apart > _FORMS_TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min():
            said = (
                f"its sform and qform differ (corners are up to {apart:.3g} mm apart, axes run to "
                f"{axes(affine)} and {axes(given['qform'])}); the sform is used"
            )
    if said:
        warnings.warn(f"{path.name}: {said}", stacklevel=4)
    return affine


def _in_mm(path: Path, affine: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """The affine in millimetres, by the header's unit of length.

    Many tools ignore the unit, and some write a wrong one: a unit is disregarded if voxels would
    have an implausible size in it but not in millimetres.
    """
    low, high = _PLAUSIBLE_MM
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    factor = _UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    in_unit, in_mm = (low <= size.min() and size.max() <= high for size in (sizes * factor, sizes))
    shown = " x ".join(f"{size:.3g}" for size in sizes * factor)
    if factor != 1 and in_mm and not in_unit:
        unit = "metres" if factor > 1 else "microns"
        warnings.warn(
            f"{path.name}: its header gives lengths in {unit}, so that voxels would be {shown} mm; "
            "they are taken for millimetres",
            stacklevel=4,
        )
        factor = 1.0
    elif not in_unit:
        warnings.warn(
            f"{path.name}: its voxels are {shown} mm, which no scan of a patient has; check the "
            "voxel sizes and the unit of length in its header",
            stacklevel=4,
        )
    scaled = affine.copy()
    scaled[:3] *= factor
    return scaled


def _form(get: Callable[..., tuple[np.ndarray | None, int]]) -> np.ndarray | None:
    """The affine of a form; None if its code is 0, NaN if it is invalid."""
    try:
        affine = get(coded=True)[0]
    except (HeaderDataError, ValueError):  # a quaternion longer than 1
        return np.full((4, 4), np.nan)
    return None if affine is None else np.array(affine, dtype=np.float64)


def _singular(affine: np.ndarray) -> str | None:
    """Why an affine does not span space, or None if it does."""
    axes = affine[:3, :3]
    lengths = np.sqrt((axes**2).sum(axis=0))
    if not np.isfinite(affine).all() or lengths.min() == 0:
        return "it has an axis of length 0 or values that are not finite"
    # The ratio of the voxel's volume to that of a box with the same edges, 1 without shear.
    if abs(np.linalg.det(axes / lengths)) <= 1e-3:
        return "its axes lie in one plane"
    return None


def apart_mm(shape: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance along an axis, in mm, between a grid's corners under two affines."""
    corners = np.array([*itertools.product(*((0.0, n) for n in shape), [1.0])])
    return float(np.abs(corners @ (a - b).T)[:, :3].max())


def axes(affine: np.ndarray) -> str:
    return "".join(nib.aff2axcodes(affine))


def times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
