"""NIfTI: orientation, exact geometry of written files, and every kind of invalid file."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_ct, write_nifti

from lslpn.data.volumes import (
    Volume,
    check_same_grid,
    read_image,
    read_labels,
    write_labels,
)
from lslpn.errors import InputError

ORIENTATIONS = [
    "".join(pairs[axis][flips[axis]] for axis in range(3))
    for pairs in itertools.permutations(("LR", "PA", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]


def _write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 3, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    image, _ = synthetic_ct(0)
    return read_image(write_nifti(tmp_path / "image.nii.gz", image, axes="PIR"))


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_reads_the_same_and_writes_back(axes: str, tmp_path: Path) -> None:
    data = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    path = write_nifti(tmp_path / "a.nii.gz", data, axes=axes, spacing=(3.0, 2.0, 1.5))
    assert nib.aff2axcodes(nib.load(path).affine) == tuple(axes)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.spacing == pytest.approx((3.0, 2.0, 1.5))
    assert volume.data.dtype == np.float32
    assert volume.data.flags.c_contiguous

    out = tmp_path / "out.nii.gz"
    write_labels(out, data, volume)
    ours, theirs = nib.load(out), nib.load(path)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    np.testing.assert_array_equal(ours.affine, theirs.affine)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    axes=st.sampled_from(ORIENTATIONS),
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
    tilt=st.floats(-40, 40),
    two=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip_of_any_grid(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    axes: str,
    spacing: tuple[float, float, float],
    tilt: float,
    two: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("grid")
    data = np.random.default_rng(seed).integers(0, 400, shape, dtype=np.int16)
    path = write_nifti(folder / "a.nii", data, axes=axes, spacing=spacing, tilt=tilt)
    if two:
        image = nib.load(path)
        nib.save(nib.Nifti2Image(np.asarray(image.dataobj).copy(), image.affine), path)
    labels = read_labels(path)
    np.testing.assert_array_equal(labels.data, data)  # only flips and permutations
    write_labels(folder / "b.nii.gz", labels.data, labels)
    ours, theirs = nib.load(folder / "b.nii.gz"), nib.load(path)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.header.sizeof_hdr == theirs.header.sizeof_hdr
    check_same_grid(labels, read_labels(folder / "b.nii.gz"))


def test_display_orientation_shows_the_patients_right_on_the_left(tmp_path: Path) -> None:
    data = np.zeros((4, 5, 6), np.float32)  # RAS+: x to the right, y to the front, z up
    data[-1, -1, 0] = 7  # right, front, lowest
    volume = read_image(_write(tmp_path / "a.nii", data, np.eye(4)))
    assert volume.data.shape == (6, 5, 4)
    assert volume.data[0, 0, 0] == 7


def test_header_is_kept_except_fields_of_the_intensities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(0, 99, (4, 5, 6, 1), np.int16), np.diag([2.0, 2, 3, 1]))
    header = image.header
    image.set_qform(np.diag([-2.0, -2, 3, 1]), code=3)
    image.set_sform(np.diag([-2.0, -2, 3, 1]), code=1)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = b"a scan"
    header["cal_max"] = 400
    header.set_slope_inter(2, -1000)
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    nib.save(image, tmp_path / "a.nii.gz")

    scan = read_image(tmp_path / "a.nii.gz")
    write_labels(tmp_path / "b.nii.gz", np.ones(scan.data.shape, np.int64), scan)
    ours = nib.load(tmp_path / "b.nii.gz")
    assert ours.shape == (4, 5, 6)
    assert ours.get_data_dtype() == np.uint8
    assert np.asarray(ours.dataobj).dtype == np.uint8  # no slope, so whole numbers stay whole
    assert [e.get_content() for e in ours.header.extensions] == [b"kept"]
    changed = {"dim", "datatype", "bitpix", "scl_slope", "scl_inter", "cal_max", "vox_offset"}
    before = nib.load(tmp_path / "a.nii.gz").header
    for field in before:
        if field not in changed:
            assert ours.header[field].tobytes() == before[field].tobytes(), field
    assert (int(ours.header["qform_code"]), int(ours.header["sform_code"])) == (3, 1)


def test_big_endian_file(tmp_path: Path) -> None:
    data = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 1, 1]), header), tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    volume = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.data, data.transpose(2, 1, 0))
    write_labels(tmp_path / "b.nii", volume.data.astype(int), volume)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii").dataobj), data)


@pytest.mark.parametrize(
    ("label", "dtype"), [(255, np.uint8), (300, np.int16), (40000, np.int32), (2**31 - 1, np.int32)]
)
def test_labels_are_read_and_written_in_the_smallest_sufficient_type(
    tmp_path: Path, volume: Volume, label: int, dtype: type
) -> None:
    labels = np.zeros(volume.data.shape, np.int64)
    labels[0, 0, 0] = label
    write_labels(tmp_path / "l.nii.gz", labels, volume)
    back = read_labels(tmp_path / "l.nii.gz")
    assert back.data.dtype == dtype
    np.testing.assert_array_equal(back.data, labels)


def test_float_labels_with_a_slope_are_read_as_integers(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.array([[[0, 1], [2, 1]]], np.uint8), np.eye(4))
    image.header.set_slope_inter(2, 0)  # nibabel stores the array unchanged with this slope
    nib.save(image, tmp_path / "l.nii.gz")
    labels = read_labels(tmp_path / "l.nii.gz")
    assert labels.data.dtype == np.uint8
    assert set(np.unique(labels.data)) == {0, 2, 4}


def test_labels_near_integers_because_of_a_slope_are_rounded(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.array([[[0, 1], [2, 1]]], np.int16), np.eye(4))
    image.header.set_slope_inter(1.000015, 0)
    nib.save(image, tmp_path / "l.nii.gz")
    assert (nib.load(tmp_path / "l.nii.gz").get_fdata() % 1 > 0).any()
    np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz").data.ravel(), [2, 0, 1, 1])


def test_same_labels_give_the_same_bytes(tmp_path: Path, volume: Volume) -> None:
    labels = np.ones(volume.data.shape, np.uint8)
    write_labels(tmp_path / "x.nii.gz", labels, volume)
    write_labels(tmp_path / "y.nii.gz", labels, volume)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()


# --- bad input ---------------------------------------------------------------------------------


def _refused(path: Path, *words: str, labels: bool = False) -> None:
    with pytest.raises(InputError) as caught:
        (read_labels if labels else read_image)(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "none.nii.gz", "no such file")
    _refused(tmp_path, "is a folder")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b", b"\x1f\x8b" + b"\0" * 500])
def test_not_a_nifti(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    _refused(tmp_path / "a.nii.gz")


def test_other_formats_are_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(b"\x89PNG" + b"\0" * 1000)
    _refused(tmp_path / "a.nii", "not a NIfTI", "convert")
    image = nib.Nifti1Pair(np.ones((2, 3, 4), np.int16), np.eye(4))
    nib.save(image, tmp_path / "b.hdr")
    _refused(tmp_path / "b.hdr", "pair")


def test_a_gzip_cut_anywhere_or_with_a_flipped_bit(tmp_path: Path) -> None:
    image, _ = synthetic_ct(0)
    whole = write_nifti(tmp_path / "w.nii.gz", image).read_bytes()
    cut = tmp_path / "cut.nii.gz"
    # The last cuts remove only the checksum, which nibabel does not read.
    for length in [*range(3, len(whole), len(whole) // 25), len(whole) - 8, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        _refused(cut, "cut short" if length > 400 else "")
    for place in range(300, len(whole), len(whole) // 10):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        cut.write_bytes(bytes(flipped))
        _refused(cut, "damaged")


def test_a_plain_file_cut_short(tmp_path: Path) -> None:
    image, _ = synthetic_ct(0)
    whole = gzip.decompress(write_nifti(tmp_path / "w.nii.gz", image).read_bytes())
    for length in (100, 347, 348, 352, 400, len(whole) - 1):
        (tmp_path / "cut.nii").write_bytes(whole[:length])
        _refused(tmp_path / "cut.nii", "export")


@settings(max_examples=150, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=6))
def test_a_broken_header_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    header = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes()
    broken = bytearray(header)
    for place, value in places:
        broken[place] = value
    path = tmp_path_factory.mktemp("broken") / "a.nii"
    path.write_bytes(bytes(broken))
    message = f"{path} was read"
    try:
        read_image(path)
    except InputError as error:  # and nothing else
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2), (4, 5, 1, 2), (4,)])
def test_other_numbers_of_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    _refused(_write(tmp_path / "a.nii", data), f"{len(shape)} dimensions", "expected 3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_intensities_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    data = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    data[1, 2, 3] = bad
    _refused(_write(tmp_path / "a.nii.gz", data), "NaN or infinite", "1 of 60", "-1024")
    _refused(_write(tmp_path / "a.nii.gz", data), "whole numbers", labels=True)


def test_float64_beyond_float32_counts_as_infinite(tmp_path: Path) -> None:
    data = np.full((2, 2, 2), 1e300)
    data[0] = 0
    _refused(_write(tmp_path / "a.nii.gz", data), "infinite")


def test_constant_image(tmp_path: Path) -> None:
    _refused(_write(tmp_path / "a.nii.gz", np.full((3, 4, 5), 7, np.int16)), "every voxel is 7")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (0.5, "whole numbers (such as 0.5)"),
        (2.00203, "whole numbers (such as 2.00203)"),
        (-1.0, "from -1"),
        (3e9, "2147483647"),
        (2.0**31, "2147483647"),  # to which float32 rounds 2147483647
    ],
)
def test_values_that_are_not_labels(tmp_path: Path, data: float, word: str) -> None:
    array = np.zeros((3, 4, 5), np.float32)
    array[0, 0, 0] = data
    _refused(_write(tmp_path / "l.nii.gz", array), word, labels=True)


def test_empty_mask_is_refused_only_on_request(tmp_path: Path) -> None:
    path = _write(tmp_path / "l.nii.gz", np.zeros((3, 4, 5), np.uint8))
    assert not read_labels(path).data.any()
    with pytest.raises(InputError, match=r"l\.nii\.gz: the mask is empty"):
        read_labels(path, require_foreground=True)


def test_a_header_that_places_voxels_at_the_start_of_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.nii", np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    raw = bytearray(path.read_bytes())
    raw[108:112] = bytes(4)  # vox_offset
    path.write_bytes(raw)
    _refused(path, "damaged", "inside its header")


def test_colour_and_complex_voxels(tmp_path: Path) -> None:
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    _refused(_write(tmp_path / "a.nii", rgb), "greyscale")
    _refused(_write(tmp_path / "a.nii", np.zeros((3, 4, 5), np.complex64)), "one number")


def test_singular_affine(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    flat = np.eye(4)
    flat[:, 2] = flat[:, 1]  # two axes in one direction
    nothing = np.diag([1.0, 0, 1, 1])
    for affine in (flat, nothing):
        image = nib.Nifti1Image(data, np.eye(4))
        image.header.set_sform(affine, code=1)
        image.header["qform_code"] = 0
        raw = image.header.binaryblock + b"\0" * 4 + data.tobytes(order="F")
        (tmp_path / "a.nii").write_bytes(raw)
        _refused(tmp_path / "a.nii", "singular")


def test_labels_with_another_grid_are_refused(tmp_path: Path, volume: Volume) -> None:
    affine = volume.grid.affine
    shape = volume.grid.shape
    mask = np.zeros(shape, np.uint8)
    same = read_labels(_write(tmp_path / "same.nii.gz", mask, affine + 1e-4))
    check_same_grid(volume, same)
    moved, mirrored = affine.copy(), affine @ np.diag([-1.0, 1, 1, 1])
    moved[0, 3] += 1.0
    for other, mm in ((moved, "1"), (mirrored, r"\d+")):
        path = _write(tmp_path / "moved.nii.gz", mask, other)
        with pytest.raises(
            InputError, match=rf"moved\.nii\.gz: its affine differs.* {mm} mm"
        ) as caught:
            check_same_grid(volume, read_labels(path))
        assert "copy" not in str(caught.value)  # an affine copied onto it would mirror the organs
    other = read_labels(_write(tmp_path / "other.nii.gz", np.zeros((56, 14, 65), "u1"), affine))
    with pytest.raises(InputError, match=r"other\.nii\.gz: its shape 56 x 14 x 65 differs"):
        check_same_grid(volume, other)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3).filter(lambda shape: np.prod(shape) > 1),
    axes=st.tuples(*[st.sampled_from(ORIENTATIONS)] * 2),
    tilt=st.floats(-40, 40),
)
def test_a_mask_may_hold_the_axes_in_another_order_and_direction(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    axes: tuple[str, str],
    tilt: float,
) -> None:
    folder = tmp_path_factory.mktemp("same")
    data = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    options = {"spacing": (4.0, 3.0, 2.5), "tilt": tilt}
    image = read_image(write_nifti(folder / "i.nii", data - 2, axes=axes[0], **options))
    mask = read_labels(write_nifti(folder / "l.nii", data, axes=axes[1], **options))
    check_same_grid(image, mask)
    np.testing.assert_array_equal(image.data, mask.data - 2.0)


def test_a_tilted_gantry_shifts_slices_without_enlarging_them(tmp_path: Path) -> None:
    data = np.zeros((4, 5, 6), np.int16)
    data[1] = 1
    affine = np.diag([-2.0, -3, 5, 1])
    affine[1, 2] = 5 * np.tan(np.radians(25))
    volume = read_image(_write(tmp_path / "tilted.nii", data.transpose(2, 1, 0), affine))
    assert volume.spacing == pytest.approx((5, 3, 2))
    assert volume.voxel_ml == pytest.approx(0.03)
    column = 5 / np.cos(np.radians(25))  # from a voxel to the next one up
    assert np.linalg.norm(volume.affine[:3, 2]) == pytest.approx(column)


# --- headers that say too little or too much ---------------------------------------------------


def _with_forms(
    path: Path, sform: np.ndarray | None, qform: np.ndarray | None, *, sform_code: int = 1
) -> tuple[Path, np.ndarray]:
    """A file with these forms, code 0 for None; nibabel would make them equal."""
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nib.Nifti1Image(data, np.eye(4))
    header = image.header
    header.set_qform(np.diag([2.0, 2, 3, 1]) if qform is None else qform, code=1)
    header["qform_code"] = 0 if qform is None else 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        header[name] = 0 if sform is None else sform[row]
    header["sform_code"] = 0 if sform is None else sform_code
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + b"\0" * 4 + data.tobytes(order="F"))
    return path, data


_GOOD = np.array([[-2.0, 0, 0, 9], [0, 0, 3, 8], [0, -2, 0, 7], [0, 0, 0, 1]])  # LIA


def _noted(path: Path, *words: str) -> Volume:
    with pytest.warns(UserWarning, match=path.name) as caught:
        volume = read_image(path)
    (one,) = caught
    for word in words:
        assert word in str(one.message)
    return volume


def test_a_singular_sform_beside_a_good_qform(tmp_path: Path) -> None:
    path, _ = _with_forms(tmp_path / "a.nii", np.zeros((4, 4)), _GOOD)
    volume = _noted(path, "sform is singular", "qform is used")
    np.testing.assert_allclose(volume.grid.affine, _GOOD, atol=1e-5)
    write_labels(tmp_path / "b.nii", np.ones(volume.data.shape, np.uint8), volume)
    ours = nib.load(tmp_path / "b.nii")  # usable by every reader, with the qform unchanged
    np.testing.assert_allclose(ours.affine, _GOOD, atol=1e-5)
    assert int(ours.header["qform_code"]) == 1


def test_a_broken_qform_beside_a_good_sform(tmp_path: Path) -> None:
    path, _ = _with_forms(tmp_path / "a.nii", _GOOD, _GOOD)
    raw = bytearray(path.read_bytes())
    raw[256:260] = np.float32(3).tobytes()  # quatern_b: longer than 1
    path.write_bytes(bytes(raw))
    volume = _noted(path, "qform is singular", "sform is used")
    np.testing.assert_allclose(volume.grid.affine, _GOOD)


def test_neither_sform_nor_qform(tmp_path: Path) -> None:
    path, data = _with_forms(tmp_path / "a.nii", None, None)
    volume = _noted(path, "neither sform nor qform", "LAS")
    assert volume.spacing == pytest.approx((3, 2, 2))
    np.testing.assert_array_equal(volume.data, data.transpose(2, 1, 0)[:, ::-1])
    write_labels(tmp_path / "b.nii", volume.data.astype(int), volume)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii").dataobj), data)


def test_sform_and_qform_that_differ(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    near = _GOOD.copy()
    near[:3, 3] += 0.1  # as tools do when they round
    read_image(_with_forms(tmp_path / "near.nii", _GOOD, near)[0])
    assert not recwarn.list
    other = np.diag([2.0, 2, 3, 1])
    path, _ = _with_forms(tmp_path / "a.nii", _GOOD, other)
    volume = _noted(path, "sform and qform differ", "LIA", "RAS", "sform is used")
    np.testing.assert_allclose(volume.grid.affine, _GOOD)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3)])
def test_lengths_in_another_unit_than_millimetres(
    tmp_path: Path, unit: str, factor: float, recwarn: pytest.WarningsRecorder
) -> None:
    affine = _GOOD.copy()
    affine[:3] *= factor
    path, data = _with_forms(tmp_path / "a.nii", affine, affine)
    image = nib.load(path)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "b.nii")
    volume = read_image(tmp_path / "b.nii")
    assert volume.spacing == pytest.approx((2, 3, 2))
    np.testing.assert_allclose(volume.grid.affine, _GOOD, rtol=1e-6)
    check_same_grid(volume, Volume.from_array(np.ones(data.shape, np.uint8), _GOOD))
    assert not recwarn.list
    write_labels(tmp_path / "c.nii", np.ones(volume.data.shape, np.uint8), volume)
    ours = nib.load(tmp_path / "c.nii")  # in the file's own unit
    np.testing.assert_array_equal(ours.affine, nib.load(tmp_path / "b.nii").affine)
    assert ours.header.get_xyzt_units()[0] == unit


def test_a_wrong_unit_of_length_is_disregarded(tmp_path: Path) -> None:
    image = nib.load(_with_forms(tmp_path / "a.nii", _GOOD, _GOOD)[0])
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "b.nii")
    volume = _noted(tmp_path / "b.nii", "microns", "taken for millimetres")
    assert volume.spacing == pytest.approx((2, 3, 2))


def test_voxels_of_an_implausible_size_are_reported(tmp_path: Path) -> None:
    path, _ = _with_forms(tmp_path / "a.nii", _GOOD @ np.diag([1e-3, 1e-3, 1e-3, 1]), None)
    _noted(path, "0.002 x 0.002 x 0.003 mm", "unit of length")


# --- writing -----------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_previous_file_and_nothing_else(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    target = folder / "p.nii.gz"
    labels = np.ones(volume.data.shape, np.uint8)
    write_labels(target, labels, volume)
    before = target.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_labels(target, 2 * labels, volume)
    assert target.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["p.nii.gz"]


def test_folder_that_cannot_be_written(tmp_path: Path, volume: Volume) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    labels = np.ones(volume.data.shape, np.uint8)
    for target in (tmp_path / "file" / "p.nii.gz", Path("/dev/null/p.nii.gz")):
        with pytest.raises(InputError, match="cannot be written"):
            write_labels(target, labels, volume)
    (tmp_path / "d.nii.gz").mkdir()
    with pytest.raises(InputError, match="folder"):
        write_labels(tmp_path / "d.nii.gz", labels, volume)


def test_file_endings_in_capitals(tmp_path: Path, volume: Volume) -> None:
    labels = np.ones(volume.data.shape, np.uint8)
    for name in ("P.NII.GZ", "P.NII"):
        write_labels(tmp_path / name, labels, volume)
        assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.endswith("GZ")
        np.testing.assert_array_equal(read_labels(tmp_path / name).data, labels)


def test_written_files_have_ordinary_permissions(tmp_path: Path, volume: Volume) -> None:
    write_labels(tmp_path / "p.nii.gz", np.ones(volume.data.shape, np.uint8), volume)
    (tmp_path / "plain").touch()
    assert (tmp_path / "p.nii.gz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_wrong_ending_shape_and_range(tmp_path: Path, volume: Volume) -> None:
    labels = np.ones(volume.data.shape, np.int32)
    with pytest.raises(InputError, match=r"ends in \.nii\.gz"):
        write_labels(tmp_path / "p.png", labels, volume)
    with pytest.raises(ValueError, match="expected shape 14 x 56 x 64"):
        write_labels(tmp_path / "p.nii.gz", labels[1:], volume)
    with pytest.raises(ValueError, match="0 to 2147483647"):
        write_labels(tmp_path / "p.nii.gz", labels * np.int64(2**31), volume)
    for number, message in ((0.7, "whole numbers"), (np.nan, "0 to 2147483647")):
        with pytest.raises(ValueError, match=message):
            write_labels(tmp_path / "p.nii.gz", labels * number, volume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii.gz"]


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
def test_arrays_and_nibabel_images_are_read_as_their_file(tmp_path: Path, axes: str) -> None:
    rng = np.random.default_rng(0)
    for data, read in (
        (rng.normal(size=(4, 5, 6)).astype(np.float32), read_image),
        (rng.integers(0, 3, (4, 5, 6)).astype(np.uint8), read_labels),
    ):
        path = write_nifti(tmp_path / "scan.nii", data, axes=axes, dtype=data.dtype.type)
        file, image = read(path), nib.load(path)
        for volume in (
            Volume.from_nibabel(image, labels=read is read_labels),
            Volume.from_array(np.asarray(image.dataobj), image.affine),
        ):
            assert volume.data.dtype == file.data.dtype
            assert np.array_equal(volume.data, file.data)
            assert np.allclose(volume.affine, file.affine)
            assert volume.spacing == pytest.approx(file.spacing)
            again = volume.to_nibabel()
            assert np.array_equal(np.asarray(again.dataobj), np.asarray(image.dataobj))
            assert np.allclose(again.affine, image.affine)
    with pytest.raises(InputError, match=r"mine: .*NaN"):
        Volume.from_array(np.full((2, 2, 2), np.nan), np.eye(4), name="mine")


def test_lists_and_tensors_are_arrays_and_complex_numbers_are_refused() -> None:
    data = np.arange(24.0).reshape(2, 3, 4)
    for same in (data.tolist(), torch.from_numpy(data)):
        assert np.array_equal(Volume.from_array(same, np.eye(4)).to_nibabel().dataobj, data)
    with pytest.raises(InputError, match="array: voxels have the type complex128"):
        Volume.from_array(data + 1j, np.eye(4))


def test_volumes_may_be_compared_and_be_keys(volume: Volume) -> None:
    again = read_image(volume.path)
    assert volume == volume
    assert volume != again
    assert len({volume, again, volume}) == 2


def test_messages_tell_an_image_from_its_labels() -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.eye(4))
    labels = Volume.from_nibabel(image.slicer[1:], labels=True)
    with pytest.raises(InputError, match=r"labels: its shape 1 x 3 x 4 .* of its image image"):
        check_same_grid(Volume.from_nibabel(image), labels)


def test_an_array_of_integers_too_large_for_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"array: labels run from 0 to 1\.0995"):
        Volume.from_array(np.array([[[0, 2**40]]]), np.eye(4))
