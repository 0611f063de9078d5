"""Volumes, read from and written to NIfTI files.

Axes are flipped and permuted, without resampling, to one display orientation: axial slices with the
patient's right on the left of the image and the front up, as in radiology. Oblique volumes get the
closest such orientation. Labels are written in the grid, affine and header of the original file.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import ArrayLike

from ..errors import InputError
from ..files import write_bytes
from .nifti import Grid, apart_mm, array_of, axes, read, times

# x grows towards the patient's left, y towards the back, z towards the head.
_DISPLAY = axcodes2ornt(("L", "P", "S"))

# Labels stored as floats, perhaps with a slope, may be off a whole number by this much.
_WHOLE = 1e-3
_LARGEST = 2**31 - 1

# Two grids are the same if their corners differ by at most this part of a voxel: affines are stored
# in float32 and rewritten by every tool, which moves a corner by some thousandths of a voxel.
_GRID_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Volume:
    """A volume in display orientation.

    Attributes:
        data: [Z, Y, X]; z from the feet to the head, y from front to back, x from the patient's
            right to the left. float32 for images, uint8, int16 or int32 for labels.
        spacing: millimetres (z, y, x). Along z, the distance between slices perpendicular to
            them, whether or not a tilted gantry also shifts them against each other.
        grid: the geometry of the file.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    grid: Grid

    @classmethod
    def from_array(cls, data: ArrayLike, affine: np.ndarray, *, name: str = "array") -> Volume:
        """Make an image or a label map from an array.

        Args:
            data: numbers [i, j, k], as in nibabel; an array, a tensor or lists. Bools and integers
                that are all 0 or more are a label map, floats and other integers an image; convert
                a scan of unsigned integers to floats.
            affine: [4, 4], voxel indices (i, j, k) to millimetres (RAS+).
            name: takes the place of the file name in messages.

        Raises:
            InputError: as `read_image` and `read_labels`.
        """
        data = np.asarray(data)
        labels = data.dtype.kind in "bu" or (data.dtype.kind == "i" and data.min(initial=0) >= 0)
        image = nib.Nifti1Image(data if data.dtype.kind == "c" else data.astype(float), affine)
        return cls.from_nibabel(image, labels=labels, name=name)

    @classmethod
    def from_nibabel(
        cls, image: nib.Nifti1Image, *, labels: bool = False, name: str | None = None
    ) -> Volume:
        """Make a volume from a nibabel image.

        Args:
            image: NIfTI-1 or NIfTI-2.
            labels: treat it as a label map, as `read_labels` does, rather than as a scan.
            name: for messages; default: the image's file, or "image" or "labels".

        Raises:
            InputError: as `read_image` and `read_labels`.
        """
        path = Path(name or image.get_filename() or ("labels" if labels else "image"))
        return (_as_labels if labels else _as_image)(*array_of(path, image))

    def to_nibabel(self) -> nib.Nifti1Image:
        """A NIfTI image with the volume's original grid and header."""
        return _native_image(self.data, self.grid)

    @property
    def affine(self) -> np.ndarray:
        """float64 [4, 4], indices (x, y, z) of `data` to millimetres (RAS+)."""
        back = inv_ornt_aff(_to_display(self.grid), self.grid.shape)
        return np.asarray(self.grid.affine @ back)

    @property
    def voxel_ml(self) -> float:
        """The volume of a voxel in millilitres."""
        return abs(float(np.linalg.det(self.grid.affine[:3, :3]))) / 1000

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self.grid.path


def as_volume(image: Volume | nib.Nifti1Image, *, labels: bool = False) -> Volume:
    """Convert a nibabel image to a Volume, and return a Volume unchanged.

    Raises:
        InputError: as `Volume.from_nibabel`.
        TypeError: `image` is neither.
    """
    if isinstance(image, Volume):
        return image
    if isinstance(image, nib.Nifti1Image):
        return Volume.from_nibabel(image, labels=labels)
    raise TypeError(
        f"expected a Volume or a nibabel NIfTI image, got {type(image).__name__}; "
        "use lslpn.read_image for a file, Volume.from_array for an array and its affine"
    )


def read_image(path: str | os.PathLike[str]) -> Volume:
    """Read an image from a .nii or .nii.gz file of any orientation and spacing.

    Returns:
        Volume of float32 [Z, Y, X], with the file's intensity slope applied.

    Raises:
        InputError: the file is missing, damaged or not NIfTI; the image is not three-dimensional
            (trailing axes of length 1 are dropped), has colour or complex voxels or no usable
            affine; intensities are NaN, infinite or all the same.
    """
    return _as_image(*read(Path(path)))


def _as_image(array: np.ndarray, grid: Grid) -> Volume:
    path = grid.path
    # float64 values outside float32's range become infinite here and are reported below.
    with np.errstate(over="ignore"):
        data = array.astype(np.float32)
    bad = int(data.size - np.count_nonzero(np.isfinite(data)))
    if bad:
        raise InputError(
            f"{path}: {bad} of {data.size} voxels are NaN or infinite, expected finite "
            "intensities; replace them (for CT by -1024, which is air) and save the image again"
        )
    if data.min() == data.max():
        raise InputError(
            f"{path}: every voxel is {data.flat[0]:g}, expected an image with more than one "
            "intensity; check that this is the scan and that it was exported completely"
        )
    return _display(data, grid)


def read_labels(path: str | os.PathLike[str], *, require_foreground: bool = False) -> Volume:
    """Read a label map: whole numbers, 0 for the background.

    Floats within 0.001 of a whole number are rounded.

    Args:
        require_foreground: reject a map without any labelled voxel.

    Returns:
        Volume of uint8 [Z, Y, X], or int16 if a label exceeds 255, int32 if it exceeds 32767.

    Raises:
        InputError: as `read_image` for the file itself; a value is not a whole number from 0 to
            2147483647; the map is empty and `require_foreground` is set.
    """
    return _as_labels(*read(Path(path)), require_foreground)


def _as_labels(array: np.ndarray, grid: Grid, require_foreground: bool = False) -> Volume:
    path = grid.path
    if array.dtype.kind == "f":
        rounded = np.round(array)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            whole = np.abs(array - rounded) <= _WHOLE
        if not whole.all():
            example = array[~whole].flat[0]
            raise InputError(
                f"{path}: holds values that are not whole numbers (such as {example:.7g}), "
                "expected a label map; if it is a mask that was resampled, resample it again with "
                "nearest neighbours, and check that the image was not given as the mask"
            )
        array = rounded
    low, high = float(array.min()), float(array.max())  # float32 would round the limit up
    if low < 0 or high > _LARGEST:
        raise InputError(
            f"{path}: labels run from {low:g} to {high:g}, expected 0 (background) to {_LARGEST}; "
            "check that the image was not given as the mask"
        )
    if require_foreground and high == 0:
        raise InputError(
            f"{path}: the mask is empty (every voxel is 0), expected at least one labelled voxel; "
            "give the mask in which the organ is drawn"
        )
    return _display(array.astype(label_dtype(high)), grid)


def check_same_grid(image: Volume, labels: Volume) -> None:
    """Check that an image and its labels have the same grid, so that their `data` match.

    The order and direction of the axes may differ between the files, because `read_image` and
    `read_labels` undo them. Affines may differ by rounding: no corner of the grid may move by more
    than a twentieth of a voxel.

    Raises:
        InputError: the grids differ.
    """
    remedy = (
        "give the mask that was drawn on this image, or resample it to the image's grid with "
        "nearest neighbours"
    )
    # Along x, y, z, whatever the order in the files.
    a, b = image.data.shape[::-1], labels.data.shape[::-1]
    if a != b and image.grid.shape != labels.grid.shape:
        raise InputError(
            f"{labels.path}: its shape {times(labels.grid.shape)} differs from "
            f"{times(image.grid.shape)} of its image {image.path}; {remedy}"
        )
    apart = apart_mm(a, image.affine, labels.affine)
    if a != b or apart > _GRID_TOLERANCE * min(image.spacing):
        how = (
            f"axes run to {axes(labels.grid.affine)} and {axes(image.grid.affine)}"
            if a != b
            else f"corners are up to {apart:.3g} mm apart"
        )
        raise InputError(
            f"{labels.path}: its affine differs from that of its image {image.path} in more than "
            f"the order and direction of the axes ({how}); {remedy}"
        )


def label_dtype(high: float) -> type[np.integer[Any]]:
    """The smallest type for labels up to `high`."""
    return np.uint8 if high <= 255 else np.int16 if high <= 32767 else np.int32


def write_labels(path: str | os.PathLike[str], labels: np.ndarray, like: Volume) -> None:
    """Write labels with the grid, affine and header of the file that `like` was read from.

    The header keeps everything, including sform, qform and their codes, except data type, intensity
    slope and display range. The same labels always give the same bytes.

    Args:
        path: ends in .nii.gz or .nii, upper or lower case; replaced as a whole or not at all.
        labels: whole numbers [Z, Y, X] from 0 to 2147483647, aligned with `like.data`.
        like: the volume that was segmented.

    Raises:
        InputError: `path` has another ending, or its folder cannot be written to.
        ValueError: `labels` has another shape than `like`, is out of range, or is not whole
            numbers.
    """
    if labels.shape != like.data.shape:
        raise ValueError(
            f"labels: expected shape {times(like.data.shape)} like the volume, "
            f"got {times(labels.shape)}"
        )
    low, high = float(labels.min()), float(labels.max())
    if not 0 <= low <= high <= _LARGEST:  # false for NaN too
        raise ValueError(f"labels: expected values from 0 to {_LARGEST}, got {low:g} to {high:g}")
    if labels.dtype.kind == "f" and (labels != np.rint(labels)).any():
        raise ValueError("labels: expected whole numbers; round them, or choose a threshold")
    _write(Path(path), labels.astype(label_dtype(high)), like, 1.0)


def write_probabilities(
    path: str | os.PathLike[str], probabilities: np.ndarray, like: Volume
) -> None:
    """Write probabilities as `write_labels` writes labels.

    The file has a fourth axis, one entry per label. It stores bytes with the slope 1/255, so that
    NIfTI readers see numbers from 0 to 1.

    Args:
        path: as for `write_labels`.
        probabilities: uint8 [N, Z, Y, X], 255 for 1, aligned with `like.data`.
        like: the volume that was segmented.

    Raises:
        InputError: as `write_labels`.
        ValueError: `probabilities` has another type, or another shape than `like`.
    """
    if probabilities.dtype != np.uint8 or probabilities.shape[1:] != like.data.shape:
        raise ValueError(
            f"probabilities: expected uint8 [N, {', '.join(map(str, like.data.shape))}], "
            f"got {probabilities.dtype} {list(probabilities.shape)}"
        )
    _write(Path(path), probabilities, like, 1 / 255)


def _write(path: Path, data: np.ndarray, like: Volume, slope: float) -> None:
    """Write [Z, Y, X] or [N, Z, Y, X] with its values unchanged and an intensity slope."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name that ends in .nii.gz or .nii")
    image = _native_image(data, like.grid)
    raw = bytearray(image.to_bytes())
    if slope != 1:
        # nibabel resets the slope of whole numbers to 1, so set it in the bytes.
        size = len(image.header.binaryblock)
        header = type(image.header)(bytes(raw[:size]))
        header.set_slope_inter(slope, 0)
        raw[:size] = header.binaryblock
    if path.name.lower().endswith(".gz"):
        raw = bytearray(gzip.compress(raw, compresslevel=6, mtime=0))
    write_bytes(path, bytes(raw))


def _native_image(data: np.ndarray, grid: Grid) -> nib.Nifti1Image:
    """[..., Z, Y, X] in the file's own voxel order, with its header and unchanged values."""
    header = grid.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    if data.dtype.kind != "f":
        header["cal_min"] = header["cal_max"] = 0  # a scan's display range does not suit labels
    back = ornt_transform(_DISPLAY, io_orientation(grid.affine))
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(apply_orientation(data.transpose(), back), header.get_best_affine(), header)


def _to_display(grid: Grid) -> np.ndarray:
    """nibabel's transform from the file's axes to those of the display."""
    return np.asarray(ornt_transform(io_orientation(grid.affine), _DISPLAY))


def _display(array: np.ndarray, grid: Grid) -> Volume:
    """Bring voxels from the file's own order into display orientation."""
    transform = _to_display(grid)
    data = np.ascontiguousarray(apply_orientation(array, transform).transpose(2, 1, 0))
    x, y, z = grid.affine[:3, :3].T[np.argsort(transform[:, 0])]
    normal = np.cross(x, y)
    apart = abs(float(z @ normal)) / float(np.linalg.norm(normal))
    return Volume(data, (apart, float(np.linalg.norm(y)), float(np.linalg.norm(x))), grid)
