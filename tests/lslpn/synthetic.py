"""Scans and data sets drawn for the tests: CT-like bodies with three organs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from lslpn.data.volumes import Volume, read_image, read_labels

CHECKOUT = Path(__file__).resolve().parents[2]

SYNTHETIC_ORGANS = {"liver": 1, "spleen": 2, "kidney": 3}
# HU, centre (z, y, x) and radii as parts of the body's box; x grows towards the patient's left.
_ORGANS = {
    "liver": (110.0, (0.60, 0.45, 0.28), (0.30, 0.28, 0.20)),
    "spleen": (140.0, (0.65, 0.58, 0.80), (0.22, 0.18, 0.12)),
    "kidney": (190.0, (0.35, 0.70, 0.30), (0.22, 0.13, 0.11)),
}


def synthetic_ct(
    seed: int, *, shape: tuple[int, int, int] = (14, 56, 64), shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """A body with fat, muscle, a spine, three organs and a table: HU and labels, [Z, Y, X].

    `shift` moves the organs along z and the body in the plane, as parts of their extents.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.arange(n) / (n - 1) for n in shape), indexing="ij")
    # Coordinates in the body's box, in which everything else is placed.
    by, bx = (y - 0.12 - 0.2 * shift) / 0.7, (x - 0.1 - 0.2 * shift) / 0.8

    def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
        dz, dy, dx = ((a - c) / r for a, c, r in zip((z, by, bx), centre, radii, strict=True))
        return dz**2 + dy**2 + dx**2 <= 1

    def column(cy: float, cx: float, ry: float, rx: float) -> np.ndarray:
        return ((by - cy) / ry) ** 2 + ((bx - cx) / rx) ** 2 <= 1

    image = np.full(shape, -1000.0)
    image[column(0.5, 0.5, 0.5, 0.5)] = -100.0
    image[column(0.5, 0.5, 0.44, 0.46)] = 40.0
    image[column(0.78, 0.5, 0.08, 0.06)] = 500.0
    labels = np.zeros(shape, np.uint8)
    for name, (hu, (cz, cy, cx), radii) in _ORGANS.items():
        organ = ellipsoid((cz + shift, cy, cx), radii)
        image[organ] = hu
        labels[organ] = SYNTHETIC_ORGANS[name]
    table = np.abs(y - 0.95) < 0.6 / shape[1]
    image[table] = 150.0
    image += rng.normal(0, 8, shape)
    return image.round().clip(-1024, 3071), labels


def write_nifti(
    path: Path,
    data: np.ndarray,
    *,
    axes: str = "RAS",
    spacing: tuple[float, float, float] = (4.0, 3.0, 3.0),
    tilt: float = 0.0,
    dtype: type[np.generic] = np.int16,
) -> Path:
    """Write [Z, Y, X] in display orientation as a file whose axes run to `axes`.

    `spacing` is along (z, y, x) in mm, `tilt` an oblique rotation in degrees about the first axis.
    """
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # x to the left, y to the back
    affine[:3, 3] = 71.5, 83.25, -120.0
    turn = np.eye(4)
    turn[1:3, 1:3] = [
        [np.cos(np.radians(tilt)), -np.sin(np.radians(tilt))],
        [np.sin(np.radians(tilt)), np.cos(np.radians(tilt))],
    ]
    affine = turn @ affine
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    xyz = data.transpose(2, 1, 0)
    native = apply_orientation(xyz, transform)
    image = nib.Nifti1Image(
        np.ascontiguousarray(native).astype(dtype), affine @ inv_ornt_aff(transform, xyz.shape)
    )
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_synthetic_dataset(root: Path, cases: int = 4) -> Path:
    """A data set in nnU-Net's raw layout: small CT-like volumes of different orientations."""
    layouts = [("RAS", 0.0), ("LPS", 0.0), ("LAS", 4.0), ("SRP", 0.0), ("PIR", -6.0)]
    for case in range(cases):
        axes, tilt = layouts[case % len(layouts)]
        shape = (14 + case, 56, 64)
        spacing = (4.0, 3.0, 3.0 + 0.1 * case)
        image, labels = synthetic_ct(case, shape=shape, shift=0.02 * case)
        name = f"syn_{case:02d}"
        write_nifti(
            root / "imagesTr" / f"{name}_0000.nii.gz", image, axes=axes, spacing=spacing, tilt=tilt
        )
        write_nifti(
            root / "labelsTr" / f"{name}.nii.gz",
            labels,
            axes=axes,
            spacing=spacing,
            tilt=tilt,
            dtype=np.uint8,
        )
    meta = {
        "name": "synthetic",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **SYNTHETIC_ORGANS},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(meta))
    return root


def synthetic_scan(
    folder: Path,
    seed: int,
    *,
    shift: float = 0.0,
    axes: str = "RAS",
    shape: tuple[int, int, int] = (14, 56, 64),
) -> tuple[Volume, Volume]:
    """`synthetic_ct` written to files and read again: the image and its labels."""
    image, labels = synthetic_ct(seed, shape=shape, shift=shift)
    name = f"{seed}{axes}"
    return (
        read_image(write_nifti(folder / f"{name}.nii.gz", image, axes=axes)),
        read_labels(write_nifti(folder / f"{name}_l.nii.gz", labels, axes=axes, dtype=np.uint8)),
    )


def part(volume: Volume, first: int, last: int) -> Volume:
    """The slices first .. last - 1 of a volume."""
    grid = dataclasses.replace(volume.grid, shape=(*volume.data.shape[:0:-1], last - first))
    return dataclasses.replace(volume, data=volume.data[first:last], grid=grid)


def dice_of(a: np.ndarray, b: np.ndarray, label: int) -> float:
    """The Dice of one label in two label maps."""
    x, y = a == label, b == label
    return float(2 * (x & y).sum() / (x.sum() + y.sum()))
