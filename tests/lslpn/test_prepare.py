"""Window, body box, resizing, and its inverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_ct, write_nifti

from lslpn.assets import demo_image, demo_labels
from lslpn.config import ModelConfig
from lslpn.data.dataset import Dataset
from lslpn.data.intensities import interpret
from lslpn.data.slices import (
    ABDOMEN_WINDOW,
    Prepared,
    Treatment,
    body_boxes,
    prepare,
    warn_unlike,
    window_limits,
)
from lslpn.data.volumes import Volume, read_image, read_labels
from lslpn.errors import InputError


def made(image: Volume, labels: Volume | None = None, **options: Any) -> Prepared:
    return prepare(ModelConfig(**options), image, labels)


def _with(volume: Volume, data: np.ndarray) -> Volume:
    return dataclasses.replace(volume, data=np.ascontiguousarray(data, dtype=np.float32))


@pytest.fixture
def ct(tmp_path: Path) -> Volume:
    return read_image(write_nifti(tmp_path / "ct.nii.gz", synthetic_ct(0)[0]))


@pytest.fixture
def labels(tmp_path: Path) -> Volume:
    data = synthetic_ct(0)[1]
    return read_labels(write_nifti(tmp_path / "labels.nii.gz", data, dtype=np.uint8))


def _bounds(boxes: np.ndarray) -> tuple[int, int, int, int]:
    """y0, y1, x0, x1 of the smallest box that contains all of them."""
    (y0, _, x0, _), (_, y1, _, x1) = boxes.min(axis=0).tolist(), boxes.max(axis=0).tolist()
    return y0, y1, x0, x1


# --- intensities -------------------------------------------------------------------------------


def test_auto_window_is_for_ct_only(ct: Volume) -> None:
    of_ct = interpret(ct.data)
    assert window_limits(of_ct, "auto") == ABDOMEN_WINDOW == (-125.0, 275.0)
    grey = _with(ct, (ct.data.clip(-160, 240) + 160) / 400 * 255)  # an 8-bit export
    of_grey = interpret(grey.data)
    assert window_limits(of_grey, "auto") is None
    assert window_limits(of_ct, None) is None
    assert window_limits(of_grey, (-10, 90)) == (-10.0, 90.0)


def test_a_window_is_in_hu_whatever_offset_is_stored(ct: Volume) -> None:
    shifted = _with(ct, ct.data + 1024)
    for window in ("auto", (-50, 150)):
        one, other = (made(image, size=64, window=window) for image in (ct, shifted))
        np.testing.assert_array_equal(one.slices, other.slices)
    for image in (ct, shifted):
        with pytest.raises(InputError, match=r"ct\.nii\.gz: every voxel is on one side"):
            made(image, size=64, window=(5000, 6000))


def test_scans_that_were_treated_differently_are_named(
    ct: Volume, recwarn: pytest.WarningsRecorder
) -> None:
    def treatment(name: str, data: np.ndarray) -> Treatment:
        how = made(_with(ct, data), size=32, align="body").treatment
        return dataclasses.replace(how, name=name)

    whole, windowed = treatment("whole", ct.data), treatment("windowed", ct.data.clip(-200, 400))
    warn_unlike([whole, windowed])
    assert not recwarn.list
    grey = treatment("grey", (ct.data.clip(-160, 240) + 160) / 400 * 255)
    with pytest.warns(UserWarning, match=r"^grey: not treated as CT in HU, while whole and 1 more"):
        warn_unlike([whole, windowed, grey])
    with pytest.warns(UserWarning, match=r"^shifted: treated as CT stored as HU \+ 1024"):
        warn_unlike([treatment("shifted", ct.data + 1024)])
    close_up = treatment("close-up", np.random.default_rng(0).normal(100, 10, ct.data.shape))
    with pytest.warns(UserWarning, match=r"^close-up: no body was found in it, .* while grey is"):
        warn_unlike([grey, close_up])


def test_each_slice_is_scaled_to_0_to_1(ct: Volume) -> None:
    dim = ct.data.copy()
    dim[3] = dim[3].clip(-125, 275) / 2  # one slice of half the contrast
    dim[5] = 40  # one constant slice
    slices = made(_with(ct, dim), size=64).slices
    assert slices.dtype == np.float32
    assert slices.shape == (14, 64, 64)
    lows, highs = slices.min(axis=(1, 2)), slices.max(axis=(1, 2))
    assert not slices[5].any()
    assert not np.delete(lows, 5).any()
    assert (np.delete(highs, 5) == 1).all()


def test_normalise_by_volume_and_by_window(ct: Volume) -> None:
    same = ct.data.shape[1]
    square = _with(ct, ct.data[:, :, :same])
    raw = made(square, size=same, window=None, normalise="volume").slices
    low, high = square.data.min(), square.data.max()
    np.testing.assert_allclose(raw, (square.data - low) / (high - low), rtol=1e-5, atol=1e-6)
    window = made(square, size=same, window=(-50, 150), normalise="window").slices
    np.testing.assert_allclose(window, (square.data.clip(-50, 150) + 50) / 200, atol=1e-6)
    with pytest.raises(InputError, match="needs a window"):
        made(_with(ct, (ct.data + 1024) / 20), size=64, normalise="window")


def test_wrong_options(ct: Volume, labels: Volume) -> None:
    with pytest.raises(ValueError, match="size"):
        made(ct, size=0)
    with pytest.raises(ValueError, match="align"):
        made(ct, size=32, align="head")
    with pytest.raises(ValueError, match="normalise"):
        made(ct, size=32, normalise="z")
    for window in ((5, 5), "ct"):
        with pytest.raises(ValueError, match="window"):
            made(ct, size=32, window=window)
    grid = dataclasses.replace(labels.grid, shape=(64, 56, 13))
    with pytest.raises(InputError, match="shape"):
        made(ct, dataclasses.replace(labels, data=labels.data[1:], grid=grid), size=32)


# --- there and back ----------------------------------------------------------------------------


def test_a_slice_of_the_networks_size_is_not_resampled(ct: Volume, labels: Volume) -> None:
    image = _with(ct, ct.data[:, :, :56])
    mask = dataclasses.replace(labels, data=labels.data[:, :, :56])
    prepared = made(image, mask, size=56)
    assert prepared.labels is not None
    np.testing.assert_array_equal(prepared.labels, mask.data)
    np.testing.assert_array_equal(prepared.restore(prepared.labels), mask.data)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    factor=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_labels_are_unchanged_by_enlarging_and_restoring(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], factor: int, seed: int
) -> None:
    data = np.random.default_rng(seed).integers(0, 300, shape, dtype=np.int16)
    data.flat[0] = 1000
    path = write_nifti(tmp_path_factory.mktemp("p") / "a.nii", data)
    labels = read_labels(path)
    image = _with(labels, np.pad(data, 0) + np.arange(data.size).reshape(shape) * 1e-3)
    size = max(32, factor * max(shape[1:]))
    prepared = made(image, labels, size=size, window=None)
    assert prepared.slices.shape == (shape[0], size, size)
    assert prepared.slices.min() >= 0
    assert prepared.slices.max() <= 1
    assert prepared.labels is not None
    assert prepared.labels.dtype == labels.data.dtype
    np.testing.assert_array_equal(prepared.restore(prepared.labels), data)


@pytest.mark.parametrize("size", [32, 65, 256])
def test_image_and_labels_stay_aligned(ct: Volume, labels: Volume, size: int) -> None:
    # Centres of the labels, resized as labels and as an image: both must agree.
    as_image = _with(ct, (labels.data == 1) * 100.0)
    prepared = made(as_image, labels, size=size, window=None, normalise="volume")
    assert prepared.labels is not None
    for z in (6, 8):
        y, x = (c.mean() for c in np.nonzero(prepared.labels[z] == 1))
        weight = prepared.slices[z] / prepared.slices[z].sum()
        rows, columns = np.indices(weight.shape)
        # Nearest neighbours move an edge by at most half a pixel of the coarser grid.
        assert abs((weight * rows).sum() - y) < 0.5 * max(1, size / 56)
        assert abs((weight * columns).sum() - x) < 0.5 * max(1, size / 64)


def test_shrinking_averages(ct: Volume) -> None:
    stripes = np.zeros((1, 128, 128), np.float32)
    stripes[:, ::2] = 100
    small = made(_with(ct, stripes), size=32, normalise="volume").slices
    np.testing.assert_allclose(small[:, 1:-1], 0.5, atol=0.02)


def test_restore_after_the_body_crop(ct: Volume, labels: Volume) -> None:
    prepared = made(ct, labels, size=128, align="body")
    assert prepared.labels is not None
    back = prepared.restore(prepared.labels)
    assert back.shape == ct.data.shape
    np.testing.assert_array_equal(
        back, labels.data
    )  # the organs are inside the boxes, and 128 is larger
    everywhere = prepared.restore(np.ones_like(prepared.labels))
    assert prepared.boxes.shape == (14, 4)
    for plane, (y0, y1, x0, x1) in zip(everywhere, prepared.boxes, strict=True):
        assert plane.sum() == (y1 - y0) * (x1 - x0)
        assert plane[y0:y1, x0:x1].all()
    with pytest.raises(ValueError, match="expected shape"):
        prepared.restore(back)


# --- the body ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hu", "windowed", "mr"])
def test_body_box_leaves_air_and_table_out(ct: Volume, kind: str) -> None:
    data = ct.data
    if kind == "windowed":
        data = data.clip(-125, 275)
    elif kind == "mr":
        # Bright fat, dark noisy air, no negative values.
        rng = np.random.default_rng(1)
        data = np.where(data > -300, (data + 300).clip(150, 600), rng.rayleigh(8, data.shape))
    y0, y1, x0, x1 = _bounds(body_boxes(_with(ct, data)))
    # The body of synthetic_ct: y from 0.12 to 0.82 of 55, x from 0.1 to 0.9 of 63; the table is
    # at 0.95.
    assert abs(y0 - 0.12 * 55) <= 2
    assert abs(y1 - 0.82 * 55) <= 2
    assert abs(x0 - 0.10 * 63) <= 2
    assert abs(x1 - 0.90 * 63) <= 2


def test_arms_are_left_out_even_if_they_touch_the_body(ct: Volume) -> None:
    with_arms = ct.data.copy()
    y, x = np.indices(ct.data.shape[1:])
    for column in (4, 59):  # the body runs from column 6 to 57
        with_arms[:, (y - 27) ** 2 + (x - column) ** 2 <= 20] = 40
    assert (with_arms[:, 27, :9] > 0).all()  # the arms do touch the body
    assert np.abs(body_boxes(_with(ct, with_arms)) - body_boxes(ct)).max() <= 1


def test_each_slice_has_its_own_box(ct: Volume) -> None:
    tall = np.concatenate([ct.data, ct.data[:, :, ::-1]])
    tall[: len(ct.data)] = np.roll(ct.data, 6, axis=2)  # the lower half is further right
    boxes = body_boxes(_with(ct, tall))
    assert boxes.shape == (28, 4)
    np.testing.assert_allclose(boxes[0, 2:] - boxes[-1, 2:], 6, atol=1)
    # Slices of air above the head get the box of the last slice with a body.
    air = np.full((5, *ct.data.shape[1:]), -1000.0)
    capped = body_boxes(_with(ct, np.concatenate([ct.data, air])))
    assert np.abs(capped[-1] - body_boxes(ct)[-1]).max() <= 1


def test_boxes_of_large_slices_are_right_after_thinning(ct: Volume) -> None:
    large = ct.data.repeat(9, axis=1).repeat(9, axis=2)  # 504 x 576
    volume = dataclasses.replace(_with(ct, large), spacing=(4.0, 3 / 9, 3 / 9))
    assert np.abs(body_boxes(volume) - 9 * body_boxes(ct)).max() <= 9


def test_the_whole_slice_is_kept_if_no_body_is_found(ct: Volume) -> None:
    whole = (0, 56, 0, 64)
    noise = np.random.default_rng(0).normal(100, 10, ct.data.shape)
    y0, y1, x0, x1 = _bounds(body_boxes(_with(ct, noise)))
    assert (y1 - y0) * (x1 - x0) > 0.85 * 56 * 64  # only the edges differ
    speck = np.full(ct.data.shape, -1000.0)
    speck[:, 20:24, 20:24] = 50
    assert _bounds(body_boxes(_with(ct, speck))) == whole
    head_close_up = ct.data[:, 25:35, 25:40]  # tissue everywhere
    assert _bounds(body_boxes(_with(ct, head_close_up))) == (0, 10, 0, 15)


def _share_inside(labels: Volume, boxes: np.ndarray) -> float:
    inside = sum(
        np.count_nonzero(plane[y0:y1, x0:x1])
        for plane, (y0, y1, x0, x1) in zip(labels.data, boxes, strict=True)
    )
    return inside / np.count_nonzero(labels.data)


def test_body_boxes_of_the_demo_scans() -> None:
    boxes = {}
    for scan in ("a", "b"):
        image, labels = read_image(demo_image(scan)), read_labels(demo_labels(scan))  # type: ignore[arg-type]
        boxes[scan] = body_boxes(image)
        assert _share_inside(labels, boxes[scan]) == 1
    # Measured in the images by hand. The table of b begins at row 212, its arms reach to column 40
    # and from column 215 on; the one on the left touches the body.
    np.testing.assert_allclose(boxes["b"], np.tile([80, 210, 38, 212], (20, 1)), atol=4)
    # a: the liver's slices, and the hips far below, which are wider.
    np.testing.assert_allclose(boxes["a"][104], [8, 94, 9, 119], atol=4)


def test_body_boxes_of_sabs(shared_path: Callable[[str], Path]) -> None:
    data = Dataset.open(shared_path("data/Dataset101_SABS"))
    # A slice, the first row of the body and the last before the table, measured by hand.
    for case, z, top, bottom in (("sabs_00", 84, 40, 226), ("sabs_15", 64, 35, 207)):
        image, labels = data.load(case)
        boxes = body_boxes(image)
        assert abs(boxes[z, 0] - top) <= 6
        assert abs(boxes[z, 1] - bottom) <= 6
        assert _share_inside(labels, boxes) > 0.9999
