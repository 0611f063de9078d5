"""Episodes without labels: the regions, the views of a slice, and the training on them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from synthetic import write_synthetic_dataset

from lslpn.checkpoint import load_checkpoint
from lslpn.cli import main
from lslpn.config import Config, preset, with_overrides
from lslpn.data.augment import deformed
from lslpn.data.dataset import Dataset
from lslpn.data.superpixels import SuperpixelEpisodes, superpixels
from lslpn.errors import InputError
from lslpn.training import train

pytest.importorskip("skimage")


def config(**values: object) -> Config:
    plain = {"method": "alpnet", "supervision": "superpixels", "size": 64, "batch": 2, "steps": 2}
    small = {"weights": "random", "channels": 8, "log_every": 1}
    return with_overrides(preset("published"), **{**plain, **small, **values})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=2))


def episodes(dataset: Dataset, **values: object) -> SuperpixelEpisodes:
    return SuperpixelEpisodes(
        dataset, config(**values), cases=dataset.cases, hold_out=["kidney"], progress=False
    )


def quarters(side: int = 128) -> np.ndarray:
    """A body of four grey values off the centre, on black, with a small bright spot beside it."""
    image = np.zeros((side, side), np.float32)
    edge = side // 8
    image[edge : side // 2, edge : side // 2] = 0.2
    image[edge : side // 2, side // 2 : -edge] = 0.5
    image[side // 2 : -edge, edge : side // 2] = 0.7
    image[side // 2 : -edge, side // 2 : -edge] = 0.9
    image[2:4, 2:4] = 1
    return image


def test_regions_are_the_grey_values_within_the_body() -> None:
    image = quarters()
    found = superpixels(image)
    # Smoothing blurs the edges: compare inside them.
    inner = ndimage.grey_erosion(image, 9) == ndimage.grey_dilation(image, 9)
    for value in (0.2, 0.5, 0.7, 0.9):
        there = np.unique(found[inner & np.isclose(image, value)])
        assert len(there) == 1
        assert there[0] > 0
        others = inner & ~np.isclose(image, value)
        assert there[0] not in np.unique(found[others])
    assert (found[image == 0] == 0).all()
    assert (found[:8, :8] == 0).all()  # the bright spot is not part of the body
    assert sorted(np.unique(found)) == list(range(found.max() + 1))


def test_an_empty_slice_has_no_region_and_a_full_one_only_regions() -> None:
    assert superpixels(np.zeros((64, 64), np.float32)).max() == 0
    full = quarters(64) * 0.5 + 0.25
    assert superpixels(full).min() == 1


def test_image_and_mask_share_a_deformation_that_changes_each_time() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((256, 256), np.float32)
    image[90:170, 70:150] = 1
    mask = image > 0.5
    before = mask.copy()
    areas, centres = [], []
    for _ in range(40):
        grey, there = deformed(image, mask, rng)
        assert grey.dtype == np.float32
        assert there.dtype == np.bool_
        assert 0 <= grey.min() <= grey.max() <= 1
        # Gamma moves the 0.5 contour of an edge, by less than a pixel.
        assert (ndimage.binary_erosion(there, iterations=2) & (grey < 0.99)).sum() == 0
        assert (~ndimage.binary_dilation(there, iterations=2) & (grey > 0.01)).sum() == 0
        areas.append(there.sum() / mask.sum())
        centres.append(ndimage.center_of_mass(there))
    assert (mask == before).all()
    assert 0.79 < min(areas) < 0.9
    assert 1.2 < max(areas) < 1.47
    # Displaced by a shift of up to 5, and by rotation and zoom.
    spread = np.std(centres, axis=0)
    assert (spread > 1.5).all()
    assert (spread < 6).all()


def test_gamma_changes_grey_values_and_keeps_the_ends() -> None:
    image = np.full((64, 64), 0.5, np.float32)
    middle = [
        float(deformed(image, image > 1, np.random.default_rng(seed))[0][32, 32])
        for seed in range(60)
    ]
    assert 0.5**1.5 <= min(middle) < 0.5**1.35
    assert 0.5**0.65 < max(middle) <= 0.5**0.5


def test_an_episode_is_several_views_of_one_region(dataset: Dataset) -> None:
    source = episodes(dataset, shots=2, queries=3, batch=4)
    batch = source.batch(7)
    assert batch.support_images.shape == (4, 2, 64, 64)
    assert batch.support_masks.shape == (4, 2, 1, 64, 64)
    assert batch.query_images.shape == (4, 3, 64, 64)
    assert batch.query_labels.shape == (4, 3, 64, 64)
    assert batch.query_labels.dtype == torch.int64
    assert set(batch.query_labels.unique().tolist()) == {0, 1}
    for b in range(4):
        support = batch.support_masks[b, :, 0].float().mean((1, 2))
        query = batch.query_labels[b].float().mean((1, 2))
        assert support.min() > 0
        # Zooms of 0.9 to 1.2 change the area by at most 1.8, apart from what leaves the image.
        assert max(support.max(), query.max()) / min(support.min(), query.min()) < 2.5
        assert not torch.equal(batch.support_images[b, 0], batch.support_images[b, 1])
    again = episodes(dataset, shots=2, queries=3, batch=4)
    again.batch(3)  # a batch does not depend on those before it
    for one, other in zip(batch, again.batch(7), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(batch.query_images, source.batch(8).query_images)


def test_labels_are_read_in_setting_two_only(dataset: Dataset, tmp_path: Path) -> None:
    import nibabel as nib

    root = write_synthetic_dataset(tmp_path / "blind", cases=2)
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    seen, blind = episodes(dataset), episodes(Dataset.open(root))
    assert seen.fingerprint() == blind.fingerprint()
    assert seen.slice_count == 14 + 15
    shown = sum(
        (dataset.load_labels(case).data == dataset.label_of("kidney")).any(axis=(1, 2)).sum()
        for case in dataset.cases
    )
    strict = episodes(dataset, drop_test_slices=True)
    assert strict.slice_count == 14 + 15 - shown
    assert 0 < shown < 14 + 15


def test_alpnet_trains_on_superpixels_and_resumes(dataset: Dataset, tmp_path: Path) -> None:
    options: dict[str, object] = {"hold_out": ["kidney"], "cases": dataset.cases}
    options["progress"] = False
    train(config(), dataset, out=tmp_path / "run", **options)  # type: ignore[arg-type]
    kept = load_checkpoint(tmp_path / "run")
    assert kept.data["organs"] == []
    assert kept.config.train.supervision == "superpixels"
    train(config(), dataset, out=tmp_path / "run", resume=True, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="supervision was 'superpixels', now 'labels'"):
        train(
            config(supervision="labels"),
            dataset,
            out=tmp_path / "run",
            resume=True,
            **options,  # type: ignore[arg-type]
        )


def test_a_folder_of_scans_trains_like_a_data_set(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for case in dataset.cases:
        shutil.copy(dataset.image_path(case), folder / f"{case}.nii.gz")
    settings = ["--set=supervision=superpixels", "--set=size=64", "--set=batch=1", "--set=steps=1"]
    settings += ["--set=weights=random", "--set=channels=8"]
    weights = []
    for number, root in enumerate((folder, dataset.root)):
        out = tmp_path / str(number)
        words = ["train", f"--data={root}", f"--out={out}", *settings, "--device=cpu", "-q"]
        assert main(words) == 0, capsys.readouterr().err
        kept = load_checkpoint(out)
        assert kept.data["cases"] == list(dataset.cases)
        weights.append(kept.model)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    capsys.readouterr()
    words = ["train", f"--data={folder}", f"--out={tmp_path / 'x'}", *settings, "-q"]
    for more, said in (
        (["--hold-out=liver"], "scans without labels"),
        (["--set=drop_test_slices=true"], "scans without labels"),
        (["--set=supervision=labels"], "dataset.json: there is no such file"),
    ):
        given = [w for w in words if "supervision" not in w] if "labels" in more[0] else words
        assert main([*given, *more]) == 2
        assert said in capsys.readouterr().err


def test_unusable_scans_are_an_input_error(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="ways must be 1 with superpixels"):
        config(ways=2)
    with pytest.raises(InputError, match=r"supervision.*'labels' or 'superpixels'"):
        config(supervision="none")
    with pytest.raises(InputError, match="case 'x'"):
        SuperpixelEpisodes(dataset, config(), cases=["x"])
    with pytest.raises(InputError, match="given twice"):
        SuperpixelEpisodes(dataset, config(), cases=["syn_00", "syn_00"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "skimage.segmentation", None)
        with pytest.raises(InputError, match=r'pip install "lslpn\[superpixels\]"'):
            episodes(dataset)
