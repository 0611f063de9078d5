"""NIfTI volumes in and out.

Every volume is brought into one display orientation by flips and permutations alone, never by
resampling: the slices are axial, the patient's right is on the left of the image and the front
is up, as radiologists look at them. Oblique volumes get the closest such order of their axes.
Predictions go back through the inverse, into the grid, affine and header of their own file.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .atomic import write_bytes
from .errors import InputError

# x grows towards the patient's left, y towards the back, z towards the head.
_DISPLAY = axcodes2ornt(("L", "P", "S"))

# Grids that lie apart by less than this part of a voxel are one grid: affines are stored in
# float32 and rewritten by every tool, which moves a corner by some thousandths of a voxel.
_GRID_TOLERANCE = 0.05


@dataclass(frozen=True)
class Grid:
    """The file's own geometry, kept so that predictions can be written back into it.

    Attributes:
        shape: voxels along the file's own three axes.
        affine: float64 [4, 4], voxel indices to millimetres (RAS+).
        header: the file's header, NIfTI-1 or NIfTI-2.
        path: where it was read from; for messages.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header
    path: Path


@dataclass(frozen=True)
class Volume:
    """A volume in display orientation.

    Attributes:
        data: [Z, Y, X]; z from the feet to the head, y from front to back, x from the patient's
            right to the left. float32 for images, uint8 or int16 for labels.
        spacing: millimetres along (z, y, x).
        grid: the geometry of the file.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    grid: Grid

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self.grid.path


def read_image(path: str | os.PathLike[str]) -> Volume:
    """Read an image: .nii or .nii.gz, of any orientation and spacing.

    Returns:
        Volume of float32 [Z, Y, X], with the file's intensity slope applied.

    Raises:
        InputError: the file is missing, damaged, cut short, no NIfTI, not three-dimensional (a
            last axis of one is let pass), of a colour or complex type, without a usable affine,
            or holds NaN, infinite or constant intensities.
    """
    array, grid = _read(Path(path))
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

    Args:
        require_foreground: refuse a map without a single labelled voxel.

    Returns:
        Volume of uint8 [Z, Y, X], or int16 if a label exceeds 255.

    Raises:
        InputError: as `read_image` for the file itself; values that are no whole numbers,
            negative or above 32767; an empty map if `require_foreground`.
    """
    array, grid = _read(Path(path))
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.round(array))
        if not whole.all():
            example = array[~whole].flat[0]
            raise InputError(
                f"{path}: holds values that are no whole numbers (such as {example:g}), expected "
                "a label map; if it is a mask that was resampled, resample it again with nearest "
                "neighbours, and check that the image was not given for the mask"
            )
    low, high = array.min(), array.max()
    if low < 0 or high > 32767:
        raise InputError(
            f"{path}: labels run from {low:g} to {high:g}, expected 0 (background) to 32767; "
            "check that the image was not given for the mask"
        )
    if require_foreground and high == 0:
        raise InputError(
            f"{path}: the mask is empty (every voxel is 0), expected at least one labelled voxel; "
            "give the mask in which the organ is drawn"
        )
    return _display(array.astype(np.uint8 if high <= 255 else np.int16), grid)


def check_same_grid(image: Volume, labels: Volume) -> None:
    """Check that an image and its labels lie on one grid, in their files as well.

    Affines may differ as long as no corner of the grid moves by more than a twentieth of a
    voxel: tools round them.

    Raises:
        InputError: the shapes or the affines differ.
    """
    a, b = image.grid, labels.grid
    if a.shape != b.shape:
        raise InputError(
            f"{labels.path}: its shape {_times(b.shape)} differs from {_times(a.shape)} of its "
            f"image {image.path}; give the mask that was drawn on this image, or resample it to "
            "the image's grid with nearest neighbours"
        )
    corners = np.array(
        [[i, j, k, 1.0] for i in (0, a.shape[0]) for j in (0, a.shape[1]) for k in (0, a.shape[2])]
    )
    apart = np.abs(corners @ (a.affine - b.affine).T)[:, :3].max()
    if apart > _GRID_TOLERANCE * min(image.spacing):
        raise InputError(
            f"{labels.path}: its affine differs from that of its image {image.path} (corners lie "
            f"up to {apart:.3g} mm apart); give the mask that was drawn on this image, or copy "
            "the image's affine onto the mask if only the header is wrong"
        )


def write_labels(path: str | os.PathLike[str], labels: np.ndarray, like: Volume) -> None:
    """Write labels into the grid, affine and header of the file that `like` was read from.

    The header's data type, intensity slope and display range are set anew; all else in it stays,
    the sform and qform with their codes among it. The same labels give the same bytes.

    Args:
        path: ends in .nii.gz or .nii; replaced whole or not at all.
        labels: [Z, Y, X] whole numbers from 0 to 32767, in the frame of `like.data`.
        like: the volume that was segmented.

    Raises:
        InputError: another ending, or the folder cannot be written to.
        ValueError: `labels` is of another shape than `like`, or out of range.
    """
    target = Path(path)
    if not target.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{target}: expected a name that ends in .nii.gz or .nii")
    if labels.shape != like.data.shape:
        raise ValueError(
            f"labels: expected shape {_times(like.data.shape)} as the volume, "
            f"got {_times(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() > 32767:
        raise ValueError(
            f"labels: expected values from 0 to 32767, got {labels.min()} to {labels.max()}"
        )
    dtype = np.uint8 if labels.max() <= 255 else np.int16
    grid = like.grid
    back = ornt_transform(_DISPLAY, io_orientation(grid.affine))
    native = apply_orientation(labels.astype(dtype).transpose(2, 1, 0), back)

    header = grid.header.copy()
    header.set_data_shape(grid.shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the scan's display range is not the labels'
    two = isinstance(header, nib.Nifti2Header)
    kind = nib.Nifti2Image if two else nib.Nifti1Image
    data = kind(native, grid.affine, header).to_bytes()
    if target.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_bytes(target, data)


def _read(path: Path) -> tuple[np.ndarray, Grid]:
    """The voxels in the file's own order, slope applied, and the geometry."""
    raw = _bytes_of(path)
    kind = _nifti_class(path, raw)
    try:
        image = kind.from_bytes(raw)
        array = np.asanyarray(image.dataobj)
        affine = np.array(image.affine, dtype=np.float64)
    # What nibabel raises depends on which field is broken.
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InputError(
            f"{path}: damaged or cut short ({_one_line(error)}); copy or export the file again"
        ) from error
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"{path}: voxels are of type {image.header.get_value_label('datatype')}, expected "
            "one number per voxel; save it as a greyscale image or a label map"
        )
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        mend = (
            "give the whole scan, not one slice"
            if array.ndim < 3
            else "split it and give one volume at a time"
        )
        raise InputError(
            f"{path}: has {array.ndim} dimensions ({_times(array.shape)}), expected 3; {mend}"
        )
    if array.size == 0:
        raise InputError(f"{path}: holds no voxels ({_times(array.shape)}); export it again")
    _check_affine(path, affine)
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return array, Grid(shape, affine, image.header.copy(), path)


def _bytes_of(path: Path) -> bytes:
    """The file's content, unpacked.

    The whole gzip stream is read, so that its checksum is verified: nibabel stops at the last
    voxel and would let a damaged stream pass.
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
        raise InputError(
            f"{path}: damaged or cut short ({_one_line(error)}); copy or download the file again"
        ) from error


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


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Refuse an affine that does not span space."""
    axes = affine[:3, :3]
    lengths = np.sqrt((axes**2).sum(axis=0))
    if np.isfinite(affine).all() and lengths.min() > 0:
        # The volume of the voxel against that of a box with its edges: 1 without shear.
        if abs(np.linalg.det(axes / lengths)) > 1e-3:
            return
        what = "its axes lie in one plane"
    else:
        what = "it holds zeros or values that are not finite"
    raise InputError(
        f"{path}: its affine is singular ({what}), expected three independent axes in "
        "millimetres; repair the header or export the file again"
    )


def _display(array: np.ndarray, grid: Grid) -> Volume:
    """Bring the file's own order of voxels into display orientation."""
    transform = ornt_transform(io_orientation(grid.affine), _DISPLAY)
    data = np.ascontiguousarray(apply_orientation(array, transform).transpose(2, 1, 0))
    lengths = np.sqrt((grid.affine[:3, :3] ** 2).sum(axis=0))
    # transform[i, 0] is the display axis that the file's axis i becomes.
    x, y, z = (float(lengths[int(np.flatnonzero(transform[:, 0] == axis)[0])]) for axis in range(3))
    return Volume(data, (z, y, x), grid)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
