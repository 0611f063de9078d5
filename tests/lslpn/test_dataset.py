"""nnU-Net's raw layout: both styles of labels, and errors of invalid data sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import SYNTHETIC_ORGANS, write_nifti

from lslpn.data.dataset import Dataset, UnlabelledScans
from lslpn.errors import InputError


def _edit(root: Path, **changes: Any) -> Path:
    path = root / "dataset.json"
    meta = json.loads(path.read_text())
    meta.update(changes)
    path.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    return root


def _refused(root: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Dataset.open(root)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_open_and_load(synthetic_dataset: Path) -> None:
    data = Dataset.open(synthetic_dataset)
    assert data.name == "synthetic"
    assert data.labels == SYNTHETIC_ORGANS
    assert data.organs == ("liver", "spleen", "kidney")
    assert data.cases == ("syn_00", "syn_01", "syn_02", "syn_03")
    for case in data.cases:
        image, labels = data.load(case)
        assert image.data.shape == labels.data.shape
        assert set(np.unique(labels.data)) == {0, 1, 2, 3}
        # Whatever the orientation of the file, the liver is on the patient's right, shown left.
        liver, spleen = (np.argwhere(labels.data == v).mean(axis=0) for v in (1, 2))
        assert liver[2] < spleen[2]
        assert image.path.name == f"{case}_0000.nii.gz"


def test_labels_of_both_styles_and_in_any_order(synthetic_dataset: Path) -> None:
    style1 = {"0": "background", "10": "kidney", "2": "spleen"}
    assert Dataset.open(_edit(synthetic_dataset, labels=style1)).labels == {
        "spleen": 2,
        "kidney": 10,
    }
    style2 = {"kidney": 3, "background": 0, "liver": 1}
    data = Dataset.open(_edit(synthetic_dataset, labels=style2))
    assert list(data.labels.items()) == [("liver", 1), ("kidney", 3)]


def test_labels_whose_numbers_are_text(synthetic_dataset: Path) -> None:
    text = {"background": "0", "kidney": "3", "liver": "1"}
    assert Dataset.open(_edit(synthetic_dataset, labels=text)).labels == {"liver": 1, "kidney": 3}


def test_the_ignore_label_is_not_an_organ(synthetic_dataset: Path) -> None:
    labels = {"background": 0, "liver": 1, "ignore": 3}
    data = Dataset.open(_edit(synthetic_dataset, labels=labels))
    assert (data.organs, data.ignore) == (("liver",), 3)
    assert Dataset.open(_edit(synthetic_dataset, labels=SYNTHETIC_ORGANS)).ignore is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_dataset_json_with_a_byte_order_mark(synthetic_dataset: Path, encoding: str) -> None:
    path = synthetic_dataset / "dataset.json"
    path.write_text(path.read_text(), encoding)
    assert Dataset.open(synthetic_dataset).labels == SYNTHETIC_ORGANS


def test_name_and_ending_may_be_left_out(synthetic_dataset: Path) -> None:
    data = Dataset.open(_edit(synthetic_dataset, name=None, file_ending=None, channel_names=None))
    assert data.name == synthetic_dataset.name
    assert len(data.cases) == 4


def test_a_data_set_in_the_current_folder_has_its_name(
    synthetic_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit(synthetic_dataset, name=None)
    monkeypatch.chdir(synthetic_dataset)
    for path in (".", "../" + synthetic_dataset.name, "imagesTr/.."):
        assert Dataset.open(path).name == synthetic_dataset.name


def test_plain_nii(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    write_nifti(tmp_path / "imagesTr" / "a_b_0000.nii", data)
    write_nifti(tmp_path / "labelsTr" / "a_b.nii", data % 2)
    meta = {"labels": {"background": 0, "odd": 1}, "file_ending": ".nii"}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    opened = Dataset.open(tmp_path)
    assert opened.cases == ("a_b",)
    np.testing.assert_array_equal(opened.load("a_b")[1].data, data % 2)


def test_unknown_organ_and_case(synthetic_dataset: Path) -> None:
    data = Dataset.open(synthetic_dataset)
    assert data.label_of("spleen") == 2
    with pytest.raises(InputError, match=r"'splen'.*did you mean 'spleen'.*liver, spleen, kidney"):
        data.label_of("splen")
    with pytest.raises(InputError, match=r"'background': not in"):
        data.label_of("background")
    with pytest.raises(InputError, match=r"'syn_9'.*its 4 cases: syn_00, syn_01"):
        data.load("syn_9")


def test_no_folder_no_json_broken_json(tmp_path: Path, synthetic_dataset: Path) -> None:
    _refused(tmp_path / "none", "no such folder", "nnU-Net")
    _refused(tmp_path / ("n" * 300), "cannot be accessed", "File name too long")
    path = synthetic_dataset / "dataset.json"
    path.write_text('{"labels": ')
    _refused(synthetic_dataset, "dataset.json", "not valid JSON")
    path.write_text("[1]")
    _refused(synthetic_dataset, "expected a JSON object")
    path.unlink()
    _refused(synthetic_dataset, str(path), "no such file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, ["labels", "missing"]),
        ({"labels": {}}, ["labels"]),
        ({"labels": {"background": 0}}, ["only the background"]),
        ({"labels": {"background": 0, "all": [1, 2]}}, ["'all'", "region", "not supported"]),
        ({"labels": {"background": 0, "liver": -1}}, ["'liver'", "whole number"]),
        ({"labels": {"background": 0, "liver": 1.5}}, ["1.5", "whole number"]),
        ({"labels": {"0": "background", "one": "liver"}}, ["'one'", "whole number"]),
        ({"labels": {"background": "0", "liver": "one"}}, ["'liver'", "'one'", "whole number"]),
        ({"labels": {"background": 0, "liver": "1.0"}}, ["'1.0'", "whole number"]),
        ({"labels": {"background": 0, "liver": True}}, ["True", "whole number"]),
        ({"labels": {"background": 1, "liver": 2}}, ["'background'", "0 is the background"]),
        ({"labels": {"1": "Background", "2": "liver"}}, ["'Background'", "0 is the background"]),
        ({"labels": {"liver": 0, "spleen": 1}}, ["'liver'", "0 is the background"]),
        ({"labels": {"background": 0, "ignore": 4}}, ["only the background"]),
        ({"labels": {"background": 0, "liver": 1, "spleen": 1}}, ["'spleen'", "twice"]),
        ({"labels": {"1": "liver", "2": "liver"}}, ["'liver'", "twice"]),
        ({"file_ending": ".png"}, [".png", "convert"]),
        ({"channel_names": {"0": "T1", "1": "T2"}}, ["2 channels", "_0000"]),
    ],
)
def test_broken_dataset_json(
    synthetic_dataset: Path, changes: dict[str, Any], words: list[str]
) -> None:
    _refused(_edit(synthetic_dataset, **changes), "dataset.json", *words)


@pytest.mark.parametrize("missing", ["labelsTr/syn_02.nii.gz", "imagesTr/syn_02_0000.nii.gz"])
def test_a_case_without_image_or_labels_is_left_out_with_a_warning(
    synthetic_dataset: Path, missing: str
) -> None:
    (synthetic_dataset / missing).unlink()
    with pytest.warns(UserWarning, match="1 case left out.*missing: syn_02$"):
        data = Dataset.open(synthetic_dataset)
    assert data.cases == ("syn_00", "syn_01", "syn_03")
    with pytest.raises(InputError, match=f"{missing}: missing, so that case syn_02 cannot be used"):
        data.load("syn_02")


def test_a_data_set_without_a_complete_case(synthetic_dataset: Path) -> None:
    for path in (synthetic_dataset / "labelsTr").iterdir():
        path.unlink()
    _refused(synthetic_dataset, "labelsTr/syn_00.nii.gz: missing", "every other case")


def test_stray_files(synthetic_dataset: Path) -> None:
    images = synthetic_dataset / "imagesTr"
    (images / "._syn_00_0000.nii.gz").touch()
    (images / "notes.txt").touch()
    assert len(Dataset.open(synthetic_dataset).cases) == 4
    (images / "syn_00.nii.gz").touch()
    _refused(synthetic_dataset, "syn_00.nii.gz", "CASE_0000")
    (images / "syn_00.nii.gz").rename(images / "syn_00_0001.nii.gz")
    _refused(synthetic_dataset, "syn_00_0001", "channel")


def test_empty_and_missing_folders(synthetic_dataset: Path) -> None:
    shutil.rmtree(synthetic_dataset / "imagesTr")
    _refused(synthetic_dataset, "imagesTr", "cannot be listed")
    (synthetic_dataset / "imagesTr").mkdir()
    _refused(synthetic_dataset, "imagesTr", "has no file")


def test_image_and_labels_of_different_grids(synthetic_dataset: Path) -> None:
    write_nifti(synthetic_dataset / "labelsTr" / "syn_00.nii.gz", np.ones((3, 4, 5)))
    with pytest.raises(InputError, match=r"syn_00\.nii\.gz: its shape"):
        Dataset.open(synthetic_dataset).load("syn_00")


def test_sabs(shared_path: Callable[[str], Path]) -> None:
    data = Dataset.open(shared_path("data/Dataset101_SABS"))
    assert len(data.cases) == 18
    assert data.label_of("liver") == 6
    image, labels = data.load(data.cases[0])
    assert image.data.shape == (147, 257, 257)
    liver, spleen = (np.argwhere(labels.data == v).mean(axis=0) for v in (6, 1))
    assert liver[2] < spleen[2]


def test_a_folder_of_scans_without_labels(synthetic_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    image = synthetic_dataset / "imagesTr" / "syn_00_0000.nii.gz"
    shutil.copy(image, folder / "b.x.nii.gz")
    write_nifti(folder / "a.nii", np.arange(24.0).reshape(2, 3, 4))
    (folder / "._a.nii").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("hello")
    scans = UnlabelledScans.open(folder)
    assert (scans.name, scans.cases, scans.organs) == ("mine", ("a", "b.x"), ())
    np.testing.assert_array_equal(
        scans.image("b.x").data, Dataset.open(synthetic_dataset).image("syn_00").data
    )
    for ask, said in (
        (lambda: scans.label_of("liver"), "organ 'liver': .*without labels"),
        (lambda: scans.load("a"), "case 'a': .*without labels"),
        (lambda: scans.image("c"), "case 'c'"),
    ):
        with pytest.raises(InputError, match=said):
            ask()
    shutil.copy(image, folder / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii: has the same case name as a\.nii\.gz"):
        UnlabelledScans.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no file that ends in"):
        UnlabelledScans.open(tmp_path / "empty")
    with pytest.raises(InputError, match="cannot be listed"):
        UnlabelledScans.open(tmp_path / "nowhere")
