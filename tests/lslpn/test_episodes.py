"""Which slices train the network, how episodes are drawn, and the augmentation."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SYNTHETIC_ORGANS, synthetic_ct, write_nifti, write_synthetic_dataset

from lslpn.config import Config, TrainConfig, preset, with_overrides
from lslpn.data import episodes as episodes_module
from lslpn.data.augment import augment
from lslpn.data.dataset import Dataset
from lslpn.data.episodes import Batch, Episodes
from lslpn.data.slices import Prepared
from lslpn.errors import InputError

SIZE = 64


def small(**values: object) -> Config:
    plain = {"size": SIZE, "augment_probability": 0, "slices_per_organ": "none"}
    return with_overrides(preset("published"), **{**plain, **values})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=4))


def load(dataset: Dataset, config: Config, **arguments: object) -> Episodes:
    given_arguments = {"cases": dataset.cases, "progress": False, **arguments}
    return Episodes(dataset, config, **given_arguments)  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("N", "K", "Q"), [(1, 1, 1), (2, 1, 1), (1, 3, 2), (3, 2, 4)])
def test_shapes_types_and_ranges(dataset: Dataset, N: int, K: int, Q: int) -> None:
    config = small(ways=N, shots=K, queries=Q, batch=3, augment_probability=1)
    batch = load(dataset, config).batch(0)
    assert batch.support_images.shape == (3, N * K, SIZE, SIZE)
    assert batch.support_masks.shape == (3, N * K, N, SIZE, SIZE)
    assert batch.query_images.shape == batch.query_labels.shape == (3, Q, SIZE, SIZE)
    assert batch.support_images.dtype == batch.query_images.dtype == torch.float32
    assert batch.support_masks.dtype == torch.uint8
    assert batch.query_labels.dtype == torch.int64
    for images in (batch.support_images, batch.query_images):
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.01
    assert int(batch.query_labels.max()) <= N
    for image in range(N * K):
        for n in range(N):  # one organ per mask, and only the image's own way
            shown = batch.support_masks[:, image, n].flatten(1).any(1)
            assert bool(shown.all()) is (image // K == n)
            assert bool(shown.any()) is (image // K == n)
    for j in range(Q):  # query j shows way j mod N
        assert (batch.query_labels[:, j] == j % N + 1).flatten(1).any(1).all()


def test_a_batch_is_a_function_of_seed_and_step(dataset: Dataset) -> None:
    config = small(augment_probability=0.5)
    one, other = load(dataset, config), load(dataset, config)
    late = one.batch(7)
    one.batch(3)
    assert equal(late, one.batch(7))
    assert equal(late, other.batch(7))
    assert not equal(late, one.batch(8))
    assert not equal(late, load(dataset, small(augment_probability=0.5, seed=5)).batch(7))


def organs_drawn(episodes: Episodes, steps: int = 12) -> Counter[str]:
    """Organs of the support masks, recognised by the labels of the slice they came from."""
    drawn: Counter[str] = Counter()
    for step in range(steps):
        for mask in episodes.batch(step).support_masks[:, 0, 0]:
            for scan in episodes._scans:
                for organ, label in SYNTHETIC_ORGANS.items():
                    if ((scan.labels == label) == mask.bool().numpy()).all((1, 2)).any():
                        drawn[organ] += 1
    return drawn


def test_held_out_organs_are_never_a_class(dataset: Dataset) -> None:
    free = organs_drawn(load(dataset, small()))
    assert set(free) == set(SYNTHETIC_ORGANS)
    held = organs_drawn(load(dataset, small(), hold_out=["liver"]))
    assert set(held) == {"spleen", "kidney"}
    assert held.total() == 48
    episodes = load(dataset, small(organs="kidney"), hold_out=["liver"])
    assert episodes.organs == ("kidney",)
    assert set(organs_drawn(episodes)) == {"kidney"}


@pytest.fixture
def staggered(tmp_path: Path) -> Dataset:
    """Two scans of 10 slices: liver on 1-3, kidney on 3-4, spleen on 2-8."""
    image, _ = synthetic_ct(0, shape=(10, 56, 64))
    labels = np.zeros(image.shape, np.uint8)
    labels[1:4, 10:20, 10:30] = SYNTHETIC_ORGANS["liver"]
    labels[3:5, 22:32, 10:30] = SYNTHETIC_ORGANS["kidney"]
    labels[2:9, 34:44, 10:30] = SYNTHETIC_ORGANS["spleen"]
    for case in ("a", "b"):
        write_nifti(tmp_path / "imagesTr" / f"{case}_0000.nii.gz", image)
        write_nifti(tmp_path / "labelsTr" / f"{case}.nii.gz", labels, dtype=np.uint8)
    meta = {"labels": {"background": 0, **SYNTHETIC_ORGANS}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    return Dataset.open(tmp_path)


def test_setting_one_keeps_slices_with_held_out_organs_unlabelled(staggered: Dataset) -> None:
    episodes = load(staggered, small(batch=32), hold_out=["liver", "kidney"])
    assert [list(scan.z) for scan in episodes._scans] == [list(range(2, 9))] * 2
    batch = episodes.batch(0)
    for image, labels in zip(batch.query_images, batch.query_labels, strict=True):
        scan = episodes._scans[0]
        rows = [r for r in range(7) if np.array_equal(scan.images[r].astype(np.float32), image[0])]
        truth = scan.labels[rows[0]]
        assert np.array_equal(labels[0].numpy() == 1, truth == SYNTHETIC_ORGANS["spleen"])


def test_setting_two_drops_every_slice_that_shows_any_held_out_organ(staggered: Dataset) -> None:
    config = small(drop_test_slices=True)
    # Only slice 3 shows both; 1, 2 and 4 show one of them and must be dropped, too.
    both = load(staggered, config, hold_out=["liver", "kidney"])
    assert [list(scan.z) for scan in both._scans] == [[5, 6, 7, 8]] * 2
    one = load(staggered, config, hold_out=["kidney"])
    assert [list(scan.z) for scan in one._scans] == [[1, 2, 5, 6, 7, 8]] * 2
    with pytest.raises(InputError, match="drop_test_slices"):
        load(staggered, small(drop_test_slices=True, organs="kidney"), hold_out=["liver", "spleen"])
    none = load(staggered, config)
    assert [list(scan.z) for scan in none._scans] == [list(range(1, 9))] * 2


@pytest.mark.filterwarnings("ignore:no training slice shows")
def test_a_slice_qualifies_with_more_pixels_than_the_minimum(dataset: Dataset) -> None:
    threshold = 9000
    episodes = load(dataset, small(min_organ_pixels=threshold))
    everything = load(dataset, small(min_organ_pixels=0))
    scaled = threshold * (SIZE / 512) ** 2
    assert 0 < episodes.slice_count < everything.slice_count
    for few, all_ in zip(episodes._scans, everything._scans, strict=True):
        for organ, label in SYNTHETIC_ORGANS.items():
            area = (all_.labels == label).sum((1, 2))
            rows = few.rows.get(organ, np.zeros(0, int))
            assert set(few.z[rows]) == set(all_.z[area > scaled])


def test_a_random_subset_is_kept_if_many_slices_qualify(dataset: Dataset) -> None:
    everything = load(dataset, small())
    some = load(dataset, small(slices_per_organ=3, subsample_above=6))
    again = load(dataset, small(slices_per_organ=3, subsample_above=6), cases=dataset.cases[1:])
    sizes = set()
    for all_, few in zip(everything._scans, some._scans, strict=True):
        for organ, rows in all_.rows.items():
            kept = len(few.rows[organ])
            assert kept == (3 if len(rows) > 6 else len(rows))
            assert set(few.z[few.rows[organ]]) <= set(all_.z[rows])
            assert few.ranges[organ] == all_.ranges[organ]
            sizes.add(kept == 3)
    assert sizes == {True, False}  # both branches were taken
    for first, second in zip(some._scans[1:], again._scans, strict=True):
        assert np.array_equal(first.z, second.z)  # independent of the other cases


def locate(episodes: Episodes, image: np.ndarray) -> tuple[str, int]:
    found = [
        (scan.case, row)
        for scan in episodes._scans
        for row in range(len(scan.z))
        if np.array_equal(scan.images[row].astype(np.float32), image)
    ]
    assert len(found) == 1
    return found[0]


def test_support_comes_from_another_scan_at_a_similar_position(dataset: Dataset) -> None:
    episodes = load(dataset, small(organs="liver", batch=8))
    by_case = {scan.case: scan for scan in episodes._scans}
    gaps = []
    for step in range(6):
        batch = episodes.batch(step)
        for support, query in zip(batch.support_images, batch.query_images, strict=True):
            (s_case, s_row), (q_case, q_row) = (
                locate(episodes, image[0].numpy()) for image in (support, query)
            )
            assert s_case != q_case
            anchor = by_case[q_case].position(q_row, "liver")
            scan = by_case[s_case]
            all_gaps = [abs(scan.position(r, "liver") - anchor) for r in scan.rows["liver"]]
            gap = abs(scan.position(s_row, "liver") - anchor)
            assert gap <= max(1 / 12, min(all_gaps)) + 1e-9
            gaps.append(gap)
    far = load(dataset, small(organs="liver", batch=8, max_position_gap=1))
    wide = []
    for step in range(6):
        batch = far.batch(step)
        for support, query in zip(batch.support_images, batch.query_images, strict=True):
            (s_case, s_row), (q_case, q_row) = (
                locate(far, image[0].numpy()) for image in (support, query)
            )
            wide.append(
                abs(
                    by_case[s_case].position(s_row, "liver")
                    - by_case[q_case].position(q_row, "liver")
                )
            )
    assert np.mean(wide) > 2 * np.mean(gaps)


def test_masks_and_labels_belong_to_their_images(dataset: Dataset) -> None:
    episodes = load(dataset, small(ways=2, batch=6))
    by_case = {scan.case: scan for scan in episodes._scans}
    batch = episodes.batch(1)
    for b in range(6):
        chosen = []
        for n in range(2):
            case, row = locate(episodes, batch.support_images[b, n].numpy())
            labels = by_case[case].labels[row]
            mask = batch.support_masks[b, n, n].numpy().astype(bool)
            (label,) = np.unique(labels[mask])
            assert np.array_equal(labels == label, mask)
            chosen.append(label)
        assert len(set(chosen)) == 2
        case, row = locate(episodes, batch.query_images[b, 0].numpy())
        labels = by_case[case].labels[row]
        expected = (labels == chosen[0]) * 1 + (labels == chosen[1]) * 2
        assert np.array_equal(batch.query_labels[b, 0].numpy(), expected)


def test_pixels_labelled_255_have_no_loss(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        data[data == SYNTHETIC_ORGANS["spleen"]] = 255
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    episodes = load(Dataset.open(root), small(organs="liver", batch=16))
    labels = episodes.batch(0).query_labels
    assert set(labels.unique().tolist()) == {0, 1, 255}


def with_value(root: Path, organ: str, value: int) -> None:
    """Give an organ's voxels another value."""
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        data[data == SYNTHETIC_ORGANS[organ]] = value
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def test_a_held_out_organ_of_value_255_is_background(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    with_value(root, "spleen", 255)
    meta = json.loads((root / "dataset.json").read_text())
    meta["labels"]["spleen"] = 255
    (root / "dataset.json").write_text(json.dumps(meta))
    data = Dataset.open(root)
    for config, hold_out in ((small(batch=16), ["spleen"]), (small(batch=16, organs="liver"), [])):
        labels = load(data, config, hold_out=hold_out).batch(0).query_labels
        assert set(labels.unique().tolist()) == {0, 1}


def test_the_ignore_label_has_no_loss(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    meta = json.loads((root / "dataset.json").read_text())
    meta["labels"]["ignore"] = meta["labels"].pop("kidney")
    (root / "dataset.json").write_text(json.dumps(meta))
    episodes = load(Dataset.open(root), small(batch=16))
    assert episodes.organs == ("liver", "spleen")
    batch = episodes.batch(0)
    shown = [locate(episodes, image.numpy()) for image in batch.query_images[:, 0]]
    by_case = {scan.case: scan for scan in episodes._scans}
    ignored = 0
    for (case, row), labels in zip(shown, batch.query_labels[:, 0], strict=True):
        given = by_case[case].labels[row] == SYNTHETIC_ORGANS["kidney"]
        assert np.array_equal(labels.numpy() == 255, given)
        ignored += given.sum()
    assert ignored > 0


def test_a_single_scan_is_reported_and_two_of_its_slices_are_used(dataset: Dataset) -> None:
    with pytest.warns(UserWarning, match="only one training scan shows liver, spleen, kidney"):
        episodes = load(dataset, small(batch=8), cases=dataset.cases[:1])
    batch = episodes.batch(0)
    for support, query in zip(batch.support_images, batch.query_images, strict=True):
        assert not torch.equal(support[0], query[0])


def test_an_organ_without_slices_is_reported_and_left_out(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    meta = json.loads((root / "dataset.json").read_text())
    meta["labels"]["heart"] = 9
    (root / "dataset.json").write_text(json.dumps(meta))
    with pytest.warns(UserWarning, match="no training slice shows heart"):
        episodes = load(Dataset.open(root), small())
    assert episodes.organs == ("liver", "spleen", "kidney")


def test_no_warning_without_a_cause(dataset: Dataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(dataset, small())


def test_fingerprint_changes_with_the_data(dataset: Dataset, tmp_path: Path) -> None:
    value = load(dataset, small()).fingerprint()
    assert value == load(dataset, small()).fingerprint()
    assert value != load(dataset, small(), cases=dataset.cases[:3]).fingerprint()
    root = write_synthetic_dataset(tmp_path / "data", cases=4)
    assert value == load(Dataset.open(root), small()).fingerprint()
    path = root / "labelsTr" / "syn_02.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[data == 1] = 2
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    assert value != load(Dataset.open(root), small()).fingerprint()


def test_the_fingerprint_is_computed_from_the_original_voxels(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized slices would differ in the last bit between processors."""
    value = load(dataset, small()).fingerprint()
    real = episodes_module.prepare

    def otherwise(*arguments: object, **options: object) -> Prepared:
        prepared = real(*arguments, **options)  # type: ignore[arg-type]
        return dataclasses.replace(prepared, slices=prepared.slices * np.float32(0.999))

    monkeypatch.setattr(episodes_module, "prepare", otherwise)
    assert load(dataset, small()).fingerprint() == value


def test_body_alignment_crops(tmp_path: Path) -> None:
    dataset = Dataset.open(write_synthetic_dataset(tmp_path / "data", cases=2))
    whole, body = (load(dataset, small(align=align)) for align in ("none", "body"))
    share = [np.mean([(s.labels > 0).mean() for s in e._scans]) for e in (whole, body)]
    assert share[1] > 1.15 * share[0]


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({}, {"cases": []}, "cases: none given"),
        ({}, {"cases": ["syn_00", "syn_99"]}, "syn_99"),
        ({}, {"cases": ["syn_00", "syn_00"]}, "'syn_00' is given twice"),
        ({}, {"hold_out": ["livr"]}, "livr.*liver"),
        ({}, {"hold_out": "liver"}, "hold_out: expected a list of names, got 'liver'"),
        ({}, {"cases": "syn_00"}, "cases: expected a list of names, got 'syn_00'"),
        ({"organs": "hart"}, {}, "hart"),
        ({"organs": "liver,spleen"}, {"hold_out": ["spleen"]}, "spleen.*both"),
        ({}, {"hold_out": list(SYNTHETIC_ORGANS)}, "every organ.*held out"),
        ({"ways": 3}, {"hold_out": ["liver"]}, "ways: 3 classes.*2 organs"),
        ({"min_organ_pixels": 250_000}, {}, "no slice.*min_organ_pixels"),
    ],
)
def test_unusable_training_data_is_one_clear_error(
    dataset: Dataset, values: dict[str, object], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(dataset, small(**values), **arguments)
    assert "\n" not in str(caught.value)


def test_an_unreadable_scan_is_an_input_error(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    path = root / "imagesTr" / "syn_01_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"syn_01_0000\.nii\.gz"):
        load(Dataset.open(root), small())


def test_image_and_labels_with_different_grids_are_an_input_error(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=2)
    data = np.zeros((5, 56, 64), np.uint8)
    data[2:4, 20:40, 20:40] = 1
    write_nifti(root / "labelsTr" / "syn_01.nii.gz", data)
    with pytest.raises(InputError, match="syn_01"):
        load(Dataset.open(root), small())


images = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).random((9, 7), dtype=np.float32)
)


@given(image=images, seed=st.integers(0, 2**32 - 1), probability=st.floats(0, 1))
def test_augmented_images_stay_in_range_and_the_original_is_unchanged(
    image: np.ndarray, seed: int, probability: float
) -> None:
    before = image.copy()
    after = augment(
        image, np.random.default_rng(seed), TrainConfig(augment_probability=probability)
    )
    assert np.array_equal(image, before)
    assert after.dtype == np.float32
    assert after.shape == image.shape
    assert after.min() >= 0
    assert after.max() <= 1


def test_augmentation_never_and_always() -> None:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert np.array_equal(augment(image, rng, TrainConfig(augment_probability=0)), image)
        assert not np.array_equal(augment(image, rng, TrainConfig(augment_probability=1)), image)
        constant = TrainConfig(augment_probability=1, augment_low=1, augment_high=1)
        assert np.allclose(augment(image, rng, constant), image, atol=1e-6)


def test_each_augmentation_happens_half_of_the_time_with_factors_over_the_range() -> None:
    """With p = 1/2, an eighth of the images is unchanged, and factors cover their range."""
    image = np.full((4, 4), 0.25, dtype=np.float32)
    image[0, 0], image[0, 1] = 0.2, 0.3  # the mean is still 0.25
    rng = np.random.default_rng(0)
    options = TrainConfig()
    results = [augment(image, rng, options) for _ in range(4000)]
    same = np.mean([np.array_equal(r, image) for r in results])
    assert same == pytest.approx(1 / 8, abs=0.02)
    middle = np.array([r[2, 2] for r in results])
    # Contrast keeps the mean; a quarter have neither gamma nor brightness.
    assert np.mean(np.isclose(middle, 0.25, atol=1e-4)) == pytest.approx(1 / 4, abs=0.03)
    spread = np.array([r[0, 1] - r[0, 0] for r in results])
    contrast = spread[np.isclose(middle, 0.25, atol=1e-4) & ~np.isclose(spread, 0.1)] / 0.1
    assert contrast.min() == pytest.approx(0.5, abs=0.05)
    assert contrast.max() == pytest.approx(2.0, abs=0.05)
    assert contrast.mean() == pytest.approx(1.25, abs=0.05)
