"""NIfTI volumes in and out.

Every volume is reoriented to one display orientation by flips and permutations, without resampling:
axial slices with the patient's right on the left of the image and the front up, as in radiology.
Oblique volumes get the closest such order of their axes. Predictions are mapped back by the inverse
to the grid, affine and header of their own file.
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

from ..errors import InputError
from ..files import write_bytes
from .nifti import Grid, apart_mm, array_of, axes, read, times

# x grows towards the patient's left, y towards the back, z towards the head.
_DISPLAY = axcodes2ornt(("L", "P", "S"))

# Labels that are so close to a whole number were stored as floats, with a slope perhaps.
_WHOLE = 1e-3
_LARGEST = 2**31 - 1

# Grids that lie apart by less than this part of a voxel are one grid: affines are stored in
# float32 and rewritten by every tool, which moves a corner by some thousandths of a voxel.
_GRID_TOLERANCE = 0.05


@dataclass(frozen=True)
class Volume:
    """A volume in display orientation.

    Attributes:
        data: [Z, Y, X]; z from the feet to the head, y from front to back, x from the patient's
            right to the left. float32 for images, uint8, int16 or int32 for labels.
        spacing: millimetres (z, y, x): from slice to slice, across them, and from pixel to pixel.
            With a tilted gantry, slices are shifted against each other as well, which does not
            count.
        grid: the geometry of the file.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    grid: Grid

    @classmethod
    def from_array(cls, data: np.ndarray, affine: np.ndarray, *, name: str = "array") -> Volume:
        """An image or a label map of an array, as `read_image` and `read_labels` make of a file.

        Args:
            data: [i, j, k] numbers, as nibabel has them. Floats make an image, integers and bools
                a label map where none is below 0 and an image otherwise; give a scan of unsigned
                integers as floats.
            affine: [4, 4], voxel indices (i, j, k) to millimetres (RAS+).
            name: stands for the file's name in messages.

        Raises:
            InputError: as `read_image` and `read_labels`.
        """
        labels = data.dtype.kind in "bu" or (data.dtype.kind == "i" and data.min(initial=0) >= 0)
        array = data.astype(np.float64 if data.dtype.kind == "f" else np.int32)
        return cls.from_nibabel(nib.Nifti1Image(array, affine), labels=labels, name=name)

    @classmethod
    def from_nibabel(
        cls, image: nib.Nifti1Image, *, labels: bool = False, name: str | None = None
    ) -> Volume:
        """A NIfTI image of nibabel's, as `read_image` makes of its file.

        Args:
            image: of nibabel, NIfTI-1 or NIfTI-2.
            labels: it is a label map, as for `read_labels`.
            name: for messages; default: the image's file, or "image".

        Raises:
            InputError: as `read_image` and `read_labels`.
        """
        path = Path(name or image.get_filename() or "image")
        return (_as_labels if labels else _as_image)(*array_of(path, image))

    def to_nibabel(self) -> nib.Nifti1Image:
        """A NIfTI image in the grid and with the header that the volume came from."""
        header = self.grid.header.copy()
        header.set_data_shape(self.grid.shape)
        if self.data.dtype.kind != "f":
            header["cal_min"] = header["cal_max"] = 0  # a scan's display range is not its labels'
        return _native_image(self.data, self.grid, header)

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
    """A volume as it is, an image of nibabel's by `Volume.from_nibabel`.

    Raises:
        InputError: as `Volume.from_nibabel`.
        TypeError: `image` is neither.
    """
    if isinstance(image, Volume):
        return image
    if isinstance(image, nib.Nifti1Image):
        return Volume.from_nibabel(image, labels=labels)
    raise TypeError(
        f"expected a Volume or a NIfTI image of nibabel's, got {type(image).__name__}; "
        "lslpn.read_image reads a file, Volume.from_array takes an array and its affine"
    )


def read_image(path: str | os.PathLike[str]) -> Volume:
    """Read an image: .nii or .nii.gz, of any orientation and spacing.

    Returns:
        Volume of float32 [Z, Y, X], with the file's intensity slope applied.

    Raises:
        InputError: the file is missing, damaged, cut short, no NIfTI, not three-dimensional (a
            last axis of one is let pass), of a colour or complex type, without a usable affine,
            or holds NaN, infinite or constant intensities.
    """
    return _as_image(*read(Path(path)))


def _as_image(array: np.ndarray, grid: Grid) -> Volume:
    path = grid.path
    # float64 beyond the range of float32 becomes infinite here and is reported below.
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
            "intensity; check that this is the scan and was exported whole"
        )
    return _display(data, grid)


def read_labels(path: str | os.PathLike[str], *, require_foreground: bool = False) -> Volume:
    """Read a label map: whole numbers, 0 is the background.

    Floats within 0.001 of whole numbers are rounded.

    Args:
        require_foreground: refuse a map without a single labelled voxel.

    Returns:
        Volume of uint8 [Z, Y, X], or int16 if a label exceeds 255, int32 if it exceeds 32767.

    Raises:
        InputError: as `read_image` for the file itself; values that are no whole numbers,
            negative or above 2147483647; an empty map if `require_foreground`.
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
                f"{path}: holds values that are no whole numbers (such as {example:.7g}), expected "
                "a label map; if it is a mask that was resampled, resample it again with nearest "
                "neighbours, and check that the image was not given for the mask"
            )
        array = rounded
    low, high = array.min(), array.max()
    if low < 0 or high > _LARGEST:
        raise InputError(
            f"{path}: labels run from {low:g} to {high:g}, expected 0 (background) to {_LARGEST}; "
            "check that the image was not given for the mask"
        )
    if require_foreground and high == 0:
        raise InputError(
            f"{path}: the mask is empty (every voxel is 0), expected at least one labelled voxel; "
            "give the mask in which the organ is drawn"
        )
    return _display(array.astype(label_dtype(high)), grid)


def check_same_grid(image: Volume, labels: Volume) -> None:
    """Check that an image and its labels lie on one grid: their `data` agree by voxel.

    Their files may hold the axes in another order or direction, which `read_image` and
    `read_labels` undo. Affines may differ as long as no corner of the grid moves by more than a
    twentieth of a voxel: tools round them.

    Raises:
        InputError: the grids differ.
    """
    mend = (
        "give the mask that was drawn on this image, or resample it to the image's grid with "
        "nearest neighbours"
    )
    # Along x, y, z, whatever the order in the files.
    a, b = image.data.shape[::-1], labels.data.shape[::-1]
    if a != b and image.grid.shape != labels.grid.shape:
        raise InputError(
            f"{labels.path}: its shape {times(labels.grid.shape)} differs from "
            f"{times(image.grid.shape)} of its image {image.path}; {mend}"
        )
    apart = apart_mm(a, image.affine, labels.affine)
    if a != b or apart > _GRID_TOLERANCE * min(image.spacing):
        how = (
            f"axes run to {axes(labels.grid.affine)} and {axes(image.grid.affine)}"
            if a != b
            else f"corners lie up to {apart:.3g} mm apart"
        )
        raise InputError(
            f"{labels.path}: its affine differs from that of its image {image.path} in more than "
            f"order and direction of the axes ({how}); {mend}"
        )


def label_dtype(high: float) -> type[np.integer[Any]]:
    """The least type for labels up to `high`."""
    return np.uint8 if high <= 255 else np.int16 if high <= 32767 else np.int32


def write_labels(path: str | os.PathLike[str], labels: np.ndarray, like: Volume) -> None:
    """Write labels into the grid, affine and header of the file that `like` was read from.

    The header's data type, intensity slope and display range are replaced; all else in it stays,
    the sform and qform with their codes among it. The same labels give the same bytes.

    Args:
        path: ends in .nii.gz or .nii, in any case; replaced whole or not at all.
        labels: [Z, Y, X] whole numbers from 0 to 2147483647, in the frame of `like.data`.
        like: the volume that was segmented.

    Raises:
        InputError: another ending, or the folder cannot be written to.
        ValueError: `labels` is of another shape than `like`, or out of range.
    """
    if labels.shape != like.data.shape:
        raise ValueError(
            f"labels: expected shape {times(like.data.shape)} as the volume, "
            f"got {times(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() > _LARGEST:
        raise ValueError(
            f"labels: expected values from 0 to {_LARGEST}, got {labels.min()} to {labels.max()}"
        )
    _write(Path(path), labels.astype(label_dtype(labels.max())), like, 1.0)


def write_probabilities(
    path: str | os.PathLike[str], probabilities: np.ndarray, like: Volume
) -> None:
    """Write probabilities into the grid, affine and header of the file that `like` was read from.

    The file has a fourth axis, one entry for each label, and stores bytes with the slope 1/255:
    whatever reads NIfTI sees numbers from 0 to 1. As `write_labels`.

    Args:
        path: ends in .nii.gz or .nii, in any case; replaced whole or not at all.
        probabilities: uint8 [N, Z, Y, X], 255 for 1, in the frame of `like.data`.
        like: the volume that was segmented.

    Raises:
        InputError: another ending, or the folder cannot be written to.
        ValueError: `probabilities` is of another type, or of another shape than `like`.
    """
    if probabilities.dtype != np.uint8 or probabilities.shape[1:] != like.data.shape:
        raise ValueError(
            f"probabilities: expected uint8 [N, {', '.join(map(str, like.data.shape))}], "
            f"got {probabilities.dtype} {list(probabilities.shape)}"
        )
    _write(Path(path), probabilities, like, 1 / 255)


def _write(path: Path, data: np.ndarray, like: Volume, slope: float) -> None:
    """[Z, Y, X] or [N, Z, Y, X], stored as they are, with a slope for readers."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name that ends in .nii.gz or .nii")
    header = like.grid.header.copy()
    header["cal_min"] = header["cal_max"] = 0  # the scan's display range is not the labels'
    image = _native_image(data, like.grid, header)
    raw = bytearray(image.to_bytes())
    if slope != 1:
        # nibabel sets the slope of whole numbers to 1, whatever the header says.
        size = len(header.binaryblock)
        header = type(header)(bytes(raw[:size]))
        header.set_slope_inter(slope, 0)
        raw[:size] = header.binaryblock
    if path.name.lower().endswith(".gz"):
        raw = bytearray(gzip.compress(raw, compresslevel=6, mtime=0))
    write_bytes(path, bytes(raw))


def _native_image(data: np.ndarray, grid: Grid, header: nib.Nifti1Header) -> nib.Nifti1Image:
    """[..., Z, Y, X] in the file's own order of voxels, stored as they are; changes the header."""
    back = ornt_transform(_DISPLAY, io_orientation(grid.affine))
    native = apply_orientation(data.transpose(), back)
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    two = isinstance(header, nib.Nifti2Header)
    return (nib.Nifti2Image if two else nib.Nifti1Image)(native, header.get_best_affine(), header)


def _to_display(grid: Grid) -> np.ndarray:
    """nibabel's orientation from the file's axes to those of the display."""
    return np.asarray(ornt_transform(io_orientation(grid.affine), _DISPLAY))


def _display(array: np.ndarray, grid: Grid) -> Volume:
    """Bring the file's own order of voxels into display orientation."""
    transform = _to_display(grid)
    data = np.ascontiguousarray(apply_orientation(array, transform).transpose(2, 1, 0))
    x, y, z = grid.affine[:3, :3].T[np.argsort(transform[:, 0])]
    normal = np.cross(x, y)
    apart = abs(float(z @ normal)) / float(np.linalg.norm(normal))
    return Volume(data, (apart, float(np.linalg.norm(y)), float(np.linalg.norm(x))), grid)
