"""Matching slices along z, and segmenting a scan slice by slice."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import dice_of, part, synthetic_ct, synthetic_scan, write_nifti

import lslpn.segmentation.segment
import lslpn.segmentation.slicewise
from lslpn.config import ModelConfig, preset
from lslpn.data.slices import Prepared, prepare
from lslpn.data.volumes import Volume, read_image, read_labels, write_labels
from lslpn.errors import InputError
from lslpn.models import LSLPN, untrained
from lslpn.segmentation.slice_matching import (
    _STRETCH_COST,
    BEYOND,
    BEYOND_COSINE,
    match_slices,
    slice_similarity,
)
from lslpn.segmentation.slicewise import _prepare

# Slice by slice; test_registration.py tests registration.
segment = functools.partial(lslpn.segmentation.segment.segment, align="body")
segment_matched = functools.partial(lslpn.segmentation.segment.segment_matched, align="body")


@pytest.fixture(scope="module")
def model() -> LSLPN:
    config = dataclasses.replace(preset("published").model, size=64, min_pixels=0, align="body")
    return untrained(config)


# --- matching slices ---------------------------------------------------------------------------


def _worth(similarity: np.ndarray, path: tuple[int, ...], dq: float, ds: float) -> float:
    """The score that `match_slices` maximises; `path` has -1 below the support and S above it."""
    count = similarity.shape[1]
    total = 0.0
    for z, s in enumerate(path):
        total += dq * (similarity[z, s] if 0 <= s < count else BEYOND_COSINE)
        if not z:
            continue
        before = path[z - 1]
        if before < 0 <= s < count:
            total -= _STRETCH_COST * ds * s
        elif 0 <= before < count <= s:
            total -= _STRETCH_COST * ds * (count - 1 - before)
        elif before >= 0 and s < count:
            total -= _STRETCH_COST * abs((s - before) * ds - dq)
    return total


def _allowed(path: tuple[int, ...], count: int) -> bool:
    steps = list(itertools.pairwise(path))
    return all(a <= b for a, b in steps) and (-1, count) not in steps


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dq=st.sampled_from([1.0, 2.5]),
    ds=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 9999),
)
def test_no_path_has_a_higher_score(
    shape: tuple[int, int], dq: float, ds: float, seed: int
) -> None:
    similarity = np.random.default_rng(seed).uniform(-0.3, 0.5, shape)
    queries, count = shape
    paths = [
        p for p in itertools.product(range(-1, count + 1), repeat=queries) if _allowed(p, count)
    ]
    best = max(paths, key=lambda p: _worth(similarity, p, dq, ds))
    if all(s in (-1, count) for s in best):  # a query must have a match
        inside = [p for p in paths if all(0 <= s < count for s in p)]
        best = max(inside, key=lambda p: _worth(similarity, p, dq, ds))
    expected = [BEYOND if s in (-1, count) else s for s in best]
    assert match_slices(similarity, dq, ds).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 30)), seed=st.integers(0, 9999))
def test_slices_are_matched_in_order_and_unmatched_ones_are_at_the_ends(
    shape: tuple[int, int], seed: int
) -> None:
    similarity = np.random.default_rng(seed).uniform(-1, 1, shape)
    match = match_slices(similarity, 3.0, 2.0)
    assert match.shape == (shape[0],)
    inside = np.flatnonzero(match != BEYOND)
    assert len(inside)
    assert (np.diff(inside) == 1).all()
    assert (np.diff(match[inside]) >= 0).all()
    assert match.max() < shape[1]


def _bumps(query_mm: np.ndarray, support_mm: np.ndarray) -> np.ndarray:
    """Similarity 1 where positions in mm agree, slightly negative far apart."""
    return np.exp(-(((query_mm[:, None] - support_mm[None, :]) / 12) ** 2)) - 0.3


def test_scans_of_different_spacings_are_matched_by_position() -> None:
    support = np.arange(0, 90, 3.0)
    query = np.arange(6, 60, 1.5)
    match = match_slices(_bumps(query, support), 1.5, 3.0)
    assert np.abs(support[match] - query).max() <= 3


def test_a_longer_query_is_unmatched_at_both_ends() -> None:
    support = np.arange(60, 120, 3.0)
    query = np.arange(0, 200, 4.0)
    match = match_slices(_bumps(query, support), 4.0, 3.0)
    assert (match[query < 40] == BEYOND).all()
    assert (match[query > 140] == BEYOND).all()
    inside = (query >= 60) & (query <= 117)
    assert np.abs(support[match[inside]] - query[inside]).max() <= 4


def test_a_longer_support_matches_the_whole_query() -> None:
    support = np.arange(0, 300, 3.0)
    query = np.arange(90, 130, 2.0)
    match = match_slices(_bumps(query, support), 2.0, 3.0)
    assert np.abs(support[match] - query).max() <= 3


def test_dissimilar_slices_are_still_matched() -> None:
    assert (match_slices(np.full((5, 3), -1.0), 3.0, 3.0) != BEYOND).all()
    assert match_slices(np.array([[-1.0]]), 3.0, 3.0).tolist() == [0]


def test_similarity_of_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    scan = torch.rand(6, 32, 4, 4, generator=generator) + 5  # all slices have much in common
    same = slice_similarity(scan, scan, 3.0, 3.0)
    np.testing.assert_allclose(np.diag(same), 1, atol=1e-5)
    off = same[~np.eye(6, dtype=bool)]
    assert off.max() < 0.3
    # Twice as many slices at half the distance are the same scan and have the same mean.
    dense = slice_similarity(scan.repeat_interleave(2, dim=0), scan, 1.5, 3.0)
    np.testing.assert_allclose(dense[::2], same, atol=1e-5)


# --- segmenting --------------------------------------------------------------------------------


def test_organs_are_found_in_another_synthetic_scan(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    found = segment(model, [support], query[0])
    assert found.shape == query[0].data.shape
    assert found.dtype == np.uint8
    for label in (1, 2, 3):
        assert dice_of(found, query[1].data, label) > 0.6
    # Slices far from every organ are empty, such as the first of the phantom.
    assert not query[1].data[0].any()
    assert not found[0].any()


def test_field_of_view_does_not_matter_after_the_body_crop(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], tmp_path: Path
) -> None:
    image, labels = synthetic_ct(1, shift=0.04)
    wide = np.full((14, 112, 120), -1000.0)
    wide[:, 40:94, 8:72] = image[:, :54]  # without the table
    truth = np.zeros(wide.shape, np.uint8)
    truth[:, 40:94, 8:72] = labels[:, :54]
    volume = read_image(write_nifti(tmp_path / "wide.nii.gz", wide))
    aligned = segment(model, [support], volume)
    plain = segment(model, [support], volume, align="none")
    for label in (1, 2, 3):
        assert dice_of(aligned, truth, label) > 0.6
    assert dice_of(plain, truth, 1) < dice_of(aligned, truth, 1) - 0.2


def test_the_files_own_orientation_does_not_matter(
    model: LSLPN, support: tuple[Volume, Volume], tmp_path: Path
) -> None:
    scans = [synthetic_scan(tmp_path, 1, axes=axes)[0] for axes in ("RAS", "LPI", "SRP")]
    first, *others = [segment(model, [support], scan) for scan in scans]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_result_is_written_in_the_grid_of_the_query(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], tmp_path: Path
) -> None:
    found = segment(model, [support], query[0])
    write_labels(tmp_path / "p.nii.gz", found, query[0])
    back = read_labels(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(back.data, found)
    np.testing.assert_array_equal(back.grid.affine, query[0].grid.affine)


def test_nibabel_images_give_the_same_result_as_their_files(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(_: LSLPN, supports: list[tuple[Volume, Volume]], scan: Volume, **__: Any) -> Any:
        for volume, file in zip((*supports[0], scan), (*support, query[0]), strict=True):
            assert volume.data.dtype == file.data.dtype
            np.testing.assert_array_equal(volume.data, file.data)
        return SimpleNamespace(labels=query[1].data)

    monkeypatch.setattr(lslpn.segmentation.segment, "segment_matched", found)
    image, drawn, scan = (nib.load(volume.path) for volume in (*support, query[0]))
    scan.header["cal_max"] = 400  # the display range of a scan
    labels = segment(model, [(image, drawn)], scan)
    assert isinstance(labels, nib.Nifti1Image)
    truth = nib.load(query[1].path)
    np.testing.assert_array_equal(labels.dataobj, truth.dataobj)
    np.testing.assert_array_equal(labels.affine, scan.affine)
    assert labels.header["cal_max"] == 0
    np.testing.assert_array_equal(segment(model, [(image, support[1])], query[0]), query[1].data)
    with pytest.raises(TypeError, match=r"got ndarray; .*Volume.from_array"):
        segment(model, [support], query[0].data)


def test_label_values_are_kept(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    image, labels = support
    renamed = np.array([0, 300, 7, 0], np.int16)[labels.data]
    found = segment(model, [(image, dataclasses.replace(labels, data=renamed))], query[0])
    assert found.dtype == np.int16
    assert set(np.unique(found)) == {0, 7, 300}
    assert dice_of(found, np.array([0, 300, 7, 0])[query[1].data], 300) > 0.6


def test_several_supports_with_different_labels(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], tmp_path: Path
) -> None:
    other = synthetic_scan(tmp_path, 2, shift=0.08, axes="SRP", shape=(18, 50, 60))
    both = segment_matched(model, [support, other], query[0])
    assert both.matches.shape == (2, 14)
    for label in (1, 2, 3):
        assert dice_of(both.labels, query[1].data, label) > 0.6
    # The liver is labelled in one support, the spleen in the other.
    liver, spleen = (
        (image, dataclasses.replace(labels, data=np.where(labels.data == v, v, 0).astype("u1")))
        for (image, labels), v in ((support, 1), (other, 2))
    )
    found = segment(model, [liver, spleen], query[0])
    assert dice_of(found, query[1].data, 1) > 0.5
    assert dice_of(found, query[1].data, 2) > 0.5
    assert not (found == 3).any()


def test_a_query_slice_beyond_the_support_is_empty(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    """The support ends in the middle of the liver; slices above it have no match and no label."""
    image, labels = (part(volume, 0, 9) for volume in support)
    assert labels.data[8].any()
    result = segment_matched(model, [(image, labels)], query[0])
    outside = result.matches[0] == BEYOND
    assert not result.labels[outside].any()
    assert dice_of(result.labels[:8], query[1].data[:8], 1) > 0.5


def test_size_of_the_batch_does_not_matter(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    one, many = (segment(model, [support], query[0], batch=batch) for batch in (1, 64))
    # Convolutions with another batch size round differently, which may change a tie.
    assert (one == many).mean() > 0.9999
    with pytest.raises(ValueError, match="batch: expected 1 slice or more, got 0"):
        segment(model, [support], query[0], batch=0)


@pytest.mark.parametrize("align", ["body", "affine"])
def test_an_encoder_without_parameters(
    support: tuple[Volume, Volume], query: tuple[Volume, Volume], align: Any
) -> None:
    config = dataclasses.replace(preset("published").model, size=64, min_pixels=0)
    fixed = LSLPN(config, encoder=torch.nn.AvgPool2d(4))
    assert not list(fixed.parameters())
    assert segment(fixed, [support], query[0], align=align).shape == query[0].data.shape


def test_a_single_slice_is_segmented(model: LSLPN, support: tuple[Volume, Volume]) -> None:
    image, labels = (part(volume, 7, 8) for volume in support)
    found = segment(model, [(image, labels)], image)
    assert found.shape == (1, 56, 64)
    assert dice_of(found, labels.data, 1) > 0.7


def test_model_mode_and_weights_are_unchanged(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    evaluated = segment(model, [support], query[0])
    model.train()
    try:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        again = segment(model, [support], query[0])
        assert model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    finally:
        model.eval()
    np.testing.assert_array_equal(again, evaluated)  # without dropout, with stored statistics


def test_progress_is_shown_only_on_request(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    capsys: pytest.CaptureFixture[str],
) -> None:
    segment(model, [support], query[0])
    assert capsys.readouterr() == ("", "")
    segment(model, [support], query[0], progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "Matching slices: 100%" in err
    assert "Segmenting: 100%" in err


# --- scans that were stored differently ----------------------------------------------------------


def _changed(scan: tuple[Volume, Volume], data: np.ndarray) -> tuple[Volume, Volume]:
    return dataclasses.replace(scan[0], data=np.ascontiguousarray(data, np.float32)), scan[1]


@pytest.mark.parametrize("changed", ["support", "query"])
@pytest.mark.parametrize(("low", "high", "offset"), [(-200, 400, 0), (-1024, 3071, 1024)])
@pytest.mark.filterwarnings("ignore:.*treated as CT stored as HU:UserWarning")
def test_a_window_or_an_offset_of_either_scan_does_not_matter(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    changed: str,
    low: float,
    high: float,
    offset: float,
) -> None:
    plain = segment(model, [support], query[0])
    if changed != "query":
        support = _changed(support, support[0].data.clip(low, high) + offset)
    if changed != "support":
        query = _changed(query, query[0].data.clip(low, high) + offset)
    found = segment(model, [support], query[0])
    assert (found != plain).sum() < 0.02 * (plain > 0).sum()  # the box may move by a pixel


def test_two_scans_are_limited_to_their_common_window(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    limited = _changed(query, query[0].data.clip(-60, 180))
    ready, target = _prepare(model, [support], limited[0], "none")
    (scan,) = ready
    whole = prepare(ModelConfig(size=64, window=(-60, 180)), support[0]).slices
    np.testing.assert_array_equal(scan.slices, whole)
    np.testing.assert_array_equal(target.slices, prepare(ModelConfig(size=64), limited[0]).slices)


@pytest.mark.parametrize(
    ("align", "slices"), [("body", (0, 14)), ("affine", (0, 14)), ("affine", (7, 8))]
)
def test_a_subtracted_offset_is_reported_once(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    align: str,
    slices: tuple[int, int],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """A single slice cannot be registered and is segmented by the fallback."""
    shifted = _changed(query, query[0].data + 1024)[0]
    segment(model, [support], part(shifted, *slices), align=align)
    notes = [str(warning.message) for warning in recwarn]
    reports = [note for note in notes if "treated as CT stored as HU + 1024" in note]
    assert len(reports) == 1
    assert reports[0].startswith("1LPI.nii.gz: ")


def _mr(scan: tuple[Volume, Volume], noise: float) -> tuple[Volume, Volume]:
    """The scan as an MR, with a background of zeros or of noise."""
    rng = np.random.default_rng(0)
    levels = [0, 0, 300, 150, 1800]
    clean = np.interp(scan[0].data, [-1000, -300, -100, 40, 190], levels)
    noisy = np.hypot(
        clean + noise * rng.normal(size=clean.shape), noise * rng.normal(size=clean.shape)
    )
    return _changed(scan, noisy)


def test_mr_with_a_noisy_background_by_a_support_with_a_zero_background(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    recwarn: pytest.WarningsRecorder,
) -> None:
    found = segment(model, [_mr(support, 0)], _mr(query, 8)[0])
    for label in (1, 2, 3):
        assert dice_of(found, query[1].data, label) > 0.6
    assert not recwarn.list


def test_no_scan_is_cropped_if_one_shows_no_body(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    support = _mr(support, 0)
    close_up = _changed(query, np.random.default_rng(0).normal(100, 10, query[0].data.shape))
    with pytest.warns(UserWarning, match=r"1LPI\.nii\.gz: no body was found .* no scan is cropped"):
        ready, target = _prepare(model, [support], close_up[0], "body")
    for scan in (*ready, target):
        assert (scan.boxes == [0, 56, 0, 64]).all()


def _stuck(matches: np.ndarray) -> np.ndarray:
    return np.full_like(matches, 13)


def test_collapsed_matches_are_repeated_without_cropping(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = segment(model, [support], query[0], align="none")
    real = lslpn.segmentation.slicewise._match

    def stuck_if_cropped(model: LSLPN, supports: list[Prepared], *rest: Any) -> np.ndarray:
        matches = real(model, supports, *rest)
        return _stuck(matches) if supports[0].treatment.body_found else matches

    monkeypatch.setattr(lslpn.segmentation.slicewise, "_match", stuck_if_cropped)
    with pytest.warns(UserWarning, match=r"match the same few of 0RAS\.nii\.gz; whole slices"):
        found = segment(model, [support], query[0])
    np.testing.assert_array_equal(found, plain)


def test_collapsed_matches_and_an_empty_result_are_reported(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = lslpn.segmentation.slicewise._match
    monkeypatch.setattr(lslpn.segmentation.slicewise, "_match", lambda *given: _stuck(real(*given)))
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        found = segment(model, [support], query[0])
    assert not found.any()
    notes = [str(one.message) for one in caught]
    assert len(notes) == 2
    assert "so the result is doubtful" in notes[0]
    assert "nothing was found, every voxel is 0: none of its slices matches one" in notes[1]


def test_an_empty_result_is_reported(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    image, labels = support
    one = np.zeros_like(labels.data)
    z, y, x = np.argwhere(labels.data == 3)[0]
    one[z, y, x] = 1
    blank = dataclasses.replace(
        query[0], data=np.where(query[0].data > -300, 40, -1000).astype("f4")
    )
    with pytest.warns(UserWarning, match="nothing was found, every voxel is 0"):
        assert not segment(model, [(image, dataclasses.replace(labels, data=one))], blank).any()


def test_nan_weights_are_refused(
    support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    broken = untrained(dataclasses.replace(preset("published").model, size=64))
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="its weights are damaged"):
        segment(broken, [support], query[0])


def test_bad_supports_are_refused(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="at least one labelled scan"):
        segment(model, [], query[0])
    image, labels = support
    with pytest.raises(TypeError, match="supports: expected pairs"):
        segment(model, (image, labels), query[0])
    empty = dataclasses.replace(labels, data=np.zeros_like(labels.data))
    with pytest.raises(InputError, match=r"0RAS_l\.nii\.gz: the mask is empty"):
        segment(model, [support, (image, empty)], query[0])
    affine = labels.grid.affine.copy()
    affine[0, 3] += 5
    moved = dataclasses.replace(labels.grid, affine=affine)
    with pytest.raises(InputError, match="affine differs"):
        segment(model, [(image, dataclasses.replace(labels, grid=moved))], query[0])
