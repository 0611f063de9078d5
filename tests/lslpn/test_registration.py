"""Registration of supports to the query, and windows in three dimensions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import dice_of, part, synthetic_scan
from torch import Tensor

from lslpn.config import preset
from lslpn.data.volumes import Volume
from lslpn.errors import InputError
from lslpn.models import LSLPN, FewShotNetwork, untrained
from lslpn.segmentation.descriptors import Field, Scan, centres, lattice_shape
from lslpn.segmentation.frames import frames_of, labels_in_source
from lslpn.segmentation.initial_alignment import initial_alignment, trunk_to_trunk
from lslpn.segmentation.registration import Registration, fitted
from lslpn.segmentation.result import Segmentation
from lslpn.segmentation.segment import segment, segment_matched
from lslpn_kernels import reference

_SIZE = (240.0, 240.0, 264.0)


def _model(**changes: object) -> LSLPN:
    options: dict[str, object] = {"size": 96, "min_pixels": 0, "align": "body", **changes}
    return untrained(dataclasses.replace(preset("published").model, **options))


@pytest.fixture(scope="module")
def model() -> LSLPN:
    return _model()


# --- registration --------------------------------------------------------------------------------


def _anatomy(positions: Tensor) -> Tensor:
    """A value for each position that varies smoothly in all directions; 0 far from the middle."""
    generator = torch.Generator().manual_seed(3)
    waves = torch.randn(12, 3, generator=generator) * 0.05
    phases = torch.rand(12, generator=generator) * 6.28
    value = (positions @ waves.T + phases).sin().sum(-1) / 8 + 0.5
    middle = positions.new_tensor(_SIZE) / 2
    inside = ((positions - middle) / (middle - 12)).square().sum(-1) < 1
    return torch.where(inside, value.clamp(0.1, 1), 0.0)


def _scan(map_: Tensor | None = None, spacing: float = 3.0) -> Scan:
    """The anatomy, or a scan that shows it displaced by `map_`."""
    places = centres(lattice_shape(_SIZE, spacing), _SIZE)
    image = _anatomy(places if map_ is None else map_)[None]
    field = Field(image, _SIZE)
    coarse = torch.cat([image, image.roll(1, 1), image.square(), image.roll(2, 3)])
    return Scan(field, Field(torch.nn.functional.avg_pool3d(coarse[None], (2, 4, 4))[0], _SIZE))


def test_an_affine_displacement_is_found() -> None:
    truth = torch.tensor([[1.06, 0, 0], [0, 0.95, 0.04], [0.03, 0, 1.0], [-12.0, 14.0, 9.0]])
    places = centres(lattice_shape(_SIZE, 3.0), _SIZE)
    query, support = _scan(places @ truth[:3] + truth[3]), _scan()
    start = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    found = Registration(query, support).affine(start)
    middle = places[10:-10:5, 10:-10:5, 10:-10:5].reshape(-1, 3)
    wanted = middle @ truth[:3] + truth[3]

    def off(matrix: Tensor) -> float:
        return float((middle @ matrix[:3] + matrix[3] - wanted).norm(dim=1).mean())

    assert off(start) > 15
    assert off(found) < 5


def test_a_deformation_is_found_and_does_not_fold() -> None:
    places = centres(lattice_shape(_SIZE, 3.0), _SIZE)
    middle = places.new_tensor(_SIZE) / 2
    bump = torch.exp(-((places - middle) / 60).square().sum(-1, keepdim=True))
    query, support = _scan(places + bump * places.new_tensor([14.0, -16.0, 12.0])), _scan()
    start = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    registration = Registration(query, support)
    found = registration.deformable([start])
    wanted = places + bump * places.new_tensor([14.0, -16.0, 12.0])
    near = bump[..., 0] > 0.5
    off = (found.map.at(places).movedim(0, -1) - wanted).norm(dim=-1)[near].mean()
    before = (places - wanted).norm(dim=-1)[near].mean()
    assert before > 15
    assert off < 0.4 * before
    assert found.folding < 0.01
    assert found.overlap > 0.95
    plain = registration.aligned(registration.positions)
    assert found.similarity > plain.similarity


def test_soft_tissue_is_sufficient_for_registration() -> None:
    """Soft tissue in fat and air, with nothing for features and edges."""
    places = centres(lattice_shape(_SIZE, 3.0), _SIZE)
    truth = torch.tensor([15.0, -18.0, 12.0])
    nothing = Field(torch.ones(4, 10, 10, 10), _SIZE)
    query, support = (
        Scan(nothing, nothing, Field((2 * _anatomy(at)[None]).clamp_max(1), _SIZE))
        for at in (places + truth, places)
    )
    start = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    found = Registration(query, support).affine(start)
    middle = places[20:-20, 20:-20, 20:-20].reshape(-1, 3)
    off = (middle @ found[:3] + found[3] - middle - truth).norm(dim=1).mean()
    assert off < 0.3 * truth.norm()


def test_folds_and_missing_overlap_are_measured() -> None:
    scan = _scan()
    registration = Registration(scan, scan)
    places = registration.positions
    turned = places * places.new_tensor([-1.0, 1.0, 1.0]) + places.new_tensor([_SIZE[0], 0, 0])
    assert registration.aligned(turned).folding > 0.99
    assert registration.aligned(places).folding == 0
    away = places + places.new_tensor([_SIZE[0] * 0.75, 0, 0])
    assert registration.aligned(away).overlap < 0.3
    # A support of few slices cannot cover more of the query than its own height.
    part = Field(scan.image.values[:, :20], (60.0, *_SIZE[1:]))
    low = Registration(scan, Scan(part, scan.features))
    assert low.aligned(places).overlap > 0.5  # it shows the narrow end of the body
    assert low.aligned(away).overlap == 0
    torch.testing.assert_close(
        fitted(places, places * 2 + 5),
        torch.cat([torch.eye(3) * 2, torch.full((1, 3), 5.0)]),
        atol=1e-3,
        rtol=0,
    )


# --- initial alignment ---------------------------------------------------------------------------


def _slices(count: int, seed: int = 0) -> Tensor:
    """Descriptors that change smoothly from slice to slice."""
    noise = torch.randn(count + 8, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.stack([noise[z : z + 8].mean(0) for z in range(count)])


def test_a_part_of_a_scan_is_found_in_the_whole() -> None:
    scan = _slices(80)
    found = initial_alignment(scan[30:70], scan, 40 * 5.0, 80 * 5.0)
    assert abs(found.shift - 150) <= 5
    assert found.scale == 1
    assert found.similarity > 0.9
    assert not found.mirrored
    back = initial_alignment(scan, scan[30:70], 80 * 5.0, 40 * 5.0)
    assert abs(back.shift + 150) <= 5


def test_a_few_slices_that_differ_little_are_found_in_the_whole() -> None:
    """Slices that differ by their mean only."""
    scan, noise = _slices(80), torch.randn(8, 6, 8, 8, generator=torch.Generator().manual_seed(5))
    few = scan[40:48].mean(0) + 0.3 * noise
    for query, support, sign in ((few, scan, 1), (scan, few, -1)):
        found = initial_alignment(query, support, len(query) * 5.0, len(support) * 5.0)
        assert abs(found.shift - sign * 200) <= 15
        assert found.similarity > 0.4


@pytest.mark.parametrize(("name", "axis"), [("x", 3), ("y", 2), ("z", 0)])
def test_a_mirrored_scan_is_reported(name: str, axis: int) -> None:
    scan = _slices(60)
    assert initial_alignment(scan, scan.flip(axis), 300.0, 300.0).mirrored == (name,)


def test_the_trunk_is_mapped_to_the_trunk() -> None:
    start = initial_alignment(_slices(20), _slices(20), 100.0, 100.0)
    query, support = torch.tensor([[0.0, 100, 0, 200]]), torch.tensor([[50.0, 250, 10, 410]])
    places = torch.tensor([[[[50.0, 25.0, 150.0]]]])
    found = trunk_to_trunk(places, start.scale, start.shift, query, 100.0, support, 100.0)
    np.testing.assert_allclose(found[0, 0, 0, 1:], [100, 310])


# --- windows in three dimensions -----------------------------------------------------------------


@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_a_window_is_the_mean_over_all_pixels_of_all_its_slices(
    reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle weights each slice's masked average by its number of pixels."""
    generator = torch.Generator().manual_seed(reach)
    depth, height, width = 7, 40, 36
    network = _model(channels=5, min_pixels=4)
    query, support = torch.rand(2, depth, 5, 5, 6, generator=generator)
    masks = torch.rand(depth, 2, height, width, generator=generator) < 0.2
    masks[:, 1] &= ~masks[:, 0]
    masks[2] = False
    grid = network.head.grid
    wide = reference.cosine_match  # the oracle for matching, in float64
    classes = torch.cat([~masks.any(1, keepdim=True), masks], 1).double()
    expected = []
    for z in range(depth):
        near = range(max(0, z - reach), min(depth, z + reach + 1))
        sums, counts = [], []
        for k in near:
            one = reference.masked_average_pool(
                support[None, None, k].double(), classes[None, None, k], grid
            )
            areas = reference.masked_average_pool(
                torch.ones(1, 1, 1, 5, 6, dtype=torch.float64), classes[None, None, k], grid
            )
            count = torch.zeros_like(areas[0, ..., 0])
            for gy, top in enumerate(grid.axis(height).starts):
                for gx, left in enumerate(grid.axis(width).starts):
                    k_y, k_x = grid.axis(height).window, grid.axis(width).window
                    part = classes[k, :, top : top + k_y, left : left + k_x]
                    count[:, gy, gx] = part.sum((1, 2))
            sums.append(one[0] * count[..., None])
            counts.append(count[..., None])
        total = torch.stack(counts).sum(0)
        prototypes = torch.where(
            total > 4, torch.stack(sums).sum(0) / total.clamp_min(1), torch.zeros(())
        )
        expected.append(
            wide(query[None, None, z].double(), prototypes[None], grid, (height, width))[0, 0] * 20
        )
    found = network.match_volume(query, support, masks, (height, width), reach)
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=2e-4, rtol=0)
    monkeypatch.setattr("lslpn.models.lslpn._MOST_NUMBERS", 1)  # a slice at a time
    again = network.match_volume(query, support, masks, (height, width), reach)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["panet", "alpnet", "senet"])
def test_methods_without_windows_pool_nearby_slices(method: str) -> None:
    network: FewShotNetwork = untrained(
        dataclasses.replace(preset("published").model, size=64, method=method)
    )
    images = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(3, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, 10:30, 10:40], masks[:, 1, 40:60, 20:50] = True, True
    with torch.no_grad():
        features = network.encode(images)
        logits = network.match_volume(features, features, masks, (64, 64), 1)
    assert logits.shape == (3, 3, 64, 64)
    assert logits.isfinite().all()


# --- frames --------------------------------------------------------------------------------------


def test_a_frame_and_back(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    (frame,), _ = frames_of(model.config, [support], query[0])
    assert float(frame.slices.min()) >= 0
    assert float(frame.slices.max()) <= 1
    # A small patient is scaled up: the trunk, 154 mm wide, becomes 300.
    assert frame.size[2] == pytest.approx(300)
    at = frame.labels_at(centres(frame.slices.shape, frame.size))
    logits = torch.stack([torch.where(at == value, 1.0, -1.0) for value in (1, 2, 3)], 1)
    back = labels_in_source(frame, logits, [1, 2, 3])
    for label in (1, 2, 3):
        assert dice_of(back, support[1].data, label) > 0.85
    outside = frame.labels_at(torch.tensor([[-1.0, 5, 5], [5, 5, 1e6]]))
    assert outside.tolist() == [0, 0]


def test_tissue_in_ct_does_not_depend_on_contrast_agent(
    model: LSLPN, support: tuple[Volume, Volume]
) -> None:
    image, labels = support
    enhanced = dataclasses.replace(image, data=np.where(labels.data == 3, 270, image.data))
    (plain,), bright = frames_of(model.config, [(image, labels)], enhanced)
    assert plain.tissue is not None
    assert bright.tissue is not None
    assert (plain.slices - bright.slices).abs().max() > 0.1
    assert (plain.tissue - bright.tissue).abs().max() < 0.05
    # Air, fat of -100 HU, soft tissue: (HU + 125) / 150 in a window from -125 HU.
    for share, least in ((0, 0.1), (1 / 6, 0.05), (1, 0.4)):
        assert ((plain.tissue - share).abs() < 0.08).float().mean() > least


def test_tissue_is_only_known_in_ct(model: LSLPN, support: tuple[Volume, Volume]) -> None:
    image, labels = support
    bright = dataclasses.replace(model.config, window=(30.0, 300.0))
    mr = dataclasses.replace(image, data=(image.data.clip(-1000, 1000) + 1000) ** 2 / 1e3)
    for config, scan in ((bright, image), (model.config, mr)):
        assert frames_of(config, [(scan, labels)], scan)[1].tissue is None


# --- segmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["affine", "deformable"])
def test_organs_are_found_in_another_scan(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], align: str
) -> None:
    result = segment_matched(model, [support], query[0], align=align)  # type: ignore[arg-type]
    assert result.labels.dtype == np.uint8
    assert result.alignments == (align,)
    assert result.confidence is not None
    for label in (1, 2, 3):
        assert dice_of(result.labels, query[1].data, label) > 0.75
        assert 0.5 < result.confidence[label] <= 1
    assert result.matches.shape == (1, 14)
    assert not result.doubtful


def test_organs_of_low_confidence_are_doubtful() -> None:
    none = np.zeros((1, 2, 2), np.uint8)
    assert Segmentation(none, none[0], confidence={1: 0.0, 4: 0.49, 7: 0.5}).doubtful == [4]
    assert not Segmentation(none, none[0]).doubtful


@pytest.mark.parametrize("align", ["body", "deformable"])
def test_the_most_probable_label_is_the_result(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume], align: str
) -> None:
    options = {"align": align, "keep_islands": True} if align != "body" else {"align": align}
    found = segment_matched(model, [support], query[0], probabilities=True, **options)  # type: ignore[arg-type]
    shares = found.probabilities
    assert shares is not None
    assert shares.dtype == np.uint8
    assert shares.shape == (3, *query[0].data.shape)
    likeliest = np.concatenate([255 - shares.sum(0, dtype=int, keepdims=True), shares]).argmax(0)
    # Rounding decides between equally probable labels.
    assert (likeliest == found.labels).mean() > 0.99
    for label in (1, 2, 3):
        assert dice_of(likeliest, found.labels, label) > 0.9


def test_a_support_of_several_queries_is_encoded_once(
    model: LSLPN,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda x: encoded.append(len(x)) or encode(x))
    cache: dict[int, Scan] = {}
    options = {"align": "affine", "cache": cache}
    first = segment_matched(model, [support], query[0], **options)  # type: ignore[arg-type]
    both = sum(encoded)
    again = segment_matched(model, [support], query[0], **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first.labels, again.labels)
    assert sum(encoded) < 1.6 * both
    # The cache is not used for a query that needs another window.
    darker = dataclasses.replace(query[0], data=query[0].data.clip(-1024, 0) + 1500)
    alone, beside = (
        segment_matched(model, [support], darker, align="affine", cache=c) for c in (None, cache)
    )
    np.testing.assert_array_equal(alone.labels, beside.labels)


def _found(*given: object, **options: object) -> Segmentation:
    return segment_matched(*given, align="deformable", **options)  # type: ignore[arg-type]


def test_two_supports_with_different_labels(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    image, labels = support
    one, two = (
        dataclasses.replace(labels, data=np.where(labels.data == v, v * 300, 0).astype(np.int16))
        for v in (1, 2)
    )
    result = segment_matched(model, [(image, one), (image, two)], query[0], align="affine")
    assert result.labels.dtype == np.int16
    assert set(np.unique(result.labels)) == {0, 300, 600}
    assert dice_of(result.labels, query[1].data.astype(int) * 300, 300) > 0.7
    assert dice_of(result.labels, query[1].data.astype(int) * 300, 600) > 0.7


def test_the_files_own_orientation_does_not_matter(
    model: LSLPN, support: tuple[Volume, Volume], tmp_path: Path
) -> None:
    first, other = (
        segment(model, [support], synthetic_scan(tmp_path, 1, axes=axes)[0], align="affine")
        for axes in ("RAS", "SRP")
    )
    np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("small", ["one slice", "low"])
def test_a_scan_too_small_to_be_registered_is_matched_slice_by_slice(
    model: LSLPN, support: tuple[Volume, Volume], small: str
) -> None:
    if small == "one slice":
        image, labels = (part(volume, 7, 8) for volume in support)
    else:  # 14 slices of 1 mm in a patient 192 mm wide
        image, labels = (dataclasses.replace(v, spacing=(1.0, 3.0, 3.0)) for v in support)
    with pytest.warns(UserWarning, match="too small to be registered"):
        result = segment_matched(model, [(image, labels)], image)
    body = segment_matched(model, [(image, labels)], image, align="body")
    assert np.array_equal(result.labels, body.labels)
    assert result.alignments == ()
    assert dice_of(result.labels, labels.data, 1) > 0.7


def test_a_scan_larger_than_any_patient_is_refused(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    huge = dataclasses.replace(query[0], spacing=(50.0, 30.0, 30.0))
    with pytest.raises(InputError, match="larger than any patient's; correct the voxel sizes"):
        segment(model, [support], huge)


def test_a_few_slices_are_aligned_with_a_whole_scan(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    image, truth = (part(volume, 3, 12) for volume in query)
    found = segment_matched(model, [support], image)
    assert found.alignments == ("deformable",)
    assert min(dice_of(found.labels, truth.data, organ) for organ in (1, 2)) > 0.9


def test_a_few_slices_without_a_result_are_matched_one_by_one(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    labels = np.zeros_like(support[1].data)
    labels[12:, 20:30, 20:30] = 1  # beyond the query's slices
    drawn = dataclasses.replace(support[1], data=labels)
    with (
        pytest.warns(UserWarning, match="matched one by one instead"),
        pytest.warns(UserWarning, match="nothing was found, every voxel is 0"),
    ):
        found = segment_matched(model, [(support[0], drawn)], part(query[0], 3, 12))
    assert found.alignments == ()
    assert not found.labels.any()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_windows_that_decided_are_in_the_right_place_of_the_support(
    model: LSLPN, support: tuple[Volume, Volume]
) -> None:
    """A scan segmented by itself: each window is at its own position in the support."""
    image = support[0]
    found = segment_matched(model, [support], image, align="affine", explain=True)
    why = found.why
    assert why is not None
    middle = len(image.data) // 2
    [[shots]] = why.sources[middle]
    assert shots.first <= shots.centre <= shots.last
    assert abs(shots.centre - middle) <= 1
    box = why.support_boxes[0][shots.centre]
    assert np.abs(box - why.query_boxes[middle]).max() <= 3  # voxels
    liver = why.labels[middle, 0] == 1
    assert liver.any()
    assert why.cosines[middle, 0][liver].min() > 0.5


def test_dissimilar_scans_are_reported(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    noise = np.random.default_rng(0).normal(0, 60, query[0].data.shape).astype(np.float32)
    body = np.where(query[0].data > -300, noise, -1000).astype(np.float32)
    with pytest.warns(UserWarning, match="are dissimilar"):
        _found(model, [support], dataclasses.replace(query[0], data=body))


def test_a_dissimilar_second_support_does_not_lower_dice(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    noise = np.random.default_rng(0).normal(40, 60, support[0].data.shape).astype(np.float32)
    body = np.where(support[0].data > -300, noise, -1000).astype(np.float32)
    poor = dataclasses.replace(support[0], data=body), support[1]
    image, truth = query
    with pytest.warns(UserWarning, match="are dissimilar"):
        both = segment_matched(model, [support, poor], image, align="affine")
    alone = segment_matched(model, [support], image, align="affine")
    for organ in (1, 2, 3):
        least = dice_of(alone.labels, truth.data, organ) - 0.01
        assert dice_of(both.labels, truth.data, organ) > least


def test_options_are_checked(
    model: LSLPN, support: tuple[Volume, Volume], query: tuple[Volume, Volume]
) -> None:
    with pytest.raises(ValueError, match="align: expected none, body, affine or deformable"):
        segment(model, [support], query[0], align="rigid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth: expected 0 mm or more"):
        segment(model, [support], query[0], align="affine", depth=-1)
    broken = _model()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="its weights are damaged"):
        _found(broken, [support], query[0])
