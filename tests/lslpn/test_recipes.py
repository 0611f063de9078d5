"""`lslpn prepare`: small files with the corpora's real names, valid and invalid."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lslpn import cli
from lslpn.corpora import NAMES, Outcome, btcv, chaos, prepare_corpus, totalsegmentator, visceral
from lslpn.corpora.survey import files_below, natural
from lslpn.data.dataset import Dataset
from lslpn.errors import InputError

Run = Callable[..., tuple[int, str, list[str]]]

SHAPE = (7, 6, 5)
# No flip or permutation leaves this one unchanged.
AFFINE = np.array([[0, 0, 4.0, -9], [-2.0, 0, 0, 30], [0, -3.0, 0, 12], [0, 0, 0, 1]])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("btcv", ...) -> exit code of `lslpn prepare`, stdout, lines of stderr."""

    def call(*words: object) -> tuple[int, str, list[str]]:
        code = cli.main(["prepare", *map(str, words), "--quiet"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return call


def scan(path: Path, seed: int = 0, affine: np.ndarray = AFFINE, shape: Any = SHAPE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(-200, 300, shape).astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.header["descrip"] = b"as distributed"
    nib.save(image, path)
    return path


def mask(path: Path, *boxes: tuple[Any, ...], affine: np.ndarray = AFFINE) -> Path:
    """A label map with value k + 1 (or boxes[k][3]) in box k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(SHAPE, np.uint8)
    for k, box in enumerate(boxes):
        data[box[:3]] = box[3] if len(box) > 3 else k + 1
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def at(k: int) -> tuple[slice, int, int]:
    """A separate row of voxels for organ k."""
    return slice(1, 4), k % SHAPE[1], k // SHAPE[1]


def said(lines: list[str], *words: str) -> str:
    """The only line that contains all of the words."""
    hits = [line for line in lines if all(word in line for word in words)]
    assert len(hits) == 1, (words, lines)
    return hits[0]


def native(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prepared.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- BTCV -----------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "RawData"
    for number in btcv.CASES:
        scan(folder / "Training" / "img" / f"img{number:04d}.nii.gz", number)
        mask(
            folder / "Training" / "label" / f"label{number:04d}.nii.gz", *(at(k) for k in range(13))
        )
    return folder


def test_btcv(raw: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("btcv", raw, tmp_path / "d")
    assert (code, err) == (0, [])
    assert "30 cases" in out
    data = Dataset.open(tmp_path / "d")
    assert data.organs == btcv.ORGANS
    assert data.labels["kidney_right"] == 2
    assert data.labels["kidney_left"] == 3
    assert len(data.cases) == 30
    for case, number in (("btcv_0001", 1), ("btcv_0040", 40)):
        image, labels = data.load(case)
        assert set(np.unique(labels.data)) == set(range(14))
        # Copied, not encoded again.
        source = raw / "Training" / "img" / f"img{number:04d}.nii.gz"
        assert image.path.read_bytes() == source.read_bytes()
        np.testing.assert_array_equal(
            native(labels.path), native(raw / "Training" / "label" / f"label{number:04d}.nii.gz")
        )
    assert report(tmp_path / "d")["complete"] is True
    assert report(tmp_path / "d")["cases"]["btcv_0001"]["image"] == "Training/img/img0001.nii.gz"


def test_plain_nifti_is_compressed_with_its_header(raw: Path, tmp_path: Path, run: Run) -> None:
    packed = raw / "Training" / "img" / "img0002.nii.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert run("btcv", raw, tmp_path / "d", "--cases", "btcv_0002")[0] == 0
    data = Dataset.open(tmp_path / "d")
    assert data.cases == ("btcv_0002",)
    assert gzip.decompress(data.image_path("btcv_0002").read_bytes()) == plain.read_bytes()


def test_everything_wrong_with_btcv_is_listed_at_once(raw: Path, tmp_path: Path, run: Run) -> None:
    images, labels = raw / "Training" / "img", raw / "Training" / "label"
    (images / "img0001.nii.gz").unlink()  # missing, and its labels cut short
    cut(labels / "label0001.nii.gz")
    cut(images / "img0002.nii.gz")
    shutil.copy(labels / "label0003.nii.gz", labels / "label0003 (1).nii.gz")  # misnamed
    (images / "img0004.nii").write_bytes(
        gzip.decompress((images / "img0004.nii.gz").read_bytes())
    )  # duplicate
    mask(labels / "label0005.nii.gz", at(0), affine=np.diag([1.0, 1, 1, 1]))
    scan(images / "img0006.nii.gz", shape=(7, 6, 4))
    (labels / "label0007.nii.gz").rename(labels / "label0007.nii.gz.crdownload")
    mask(labels / "label0008.nii.gz")
    mask(labels / "label0009.nii.gz", (*at(0), 14))
    (labels / "label0010.nii.gz").write_bytes(b"")
    (images / "liver.nii.gz").write_bytes(b"")
    code, _, err = run("btcv", raw, tmp_path / "d")
    assert code == 2
    said(err, "btcv_0001", "img0001.nii.gz", "missing")
    said(err, "btcv_0001", "label0001.nii.gz", "cut short")
    said(err, "btcv_0002", "img0002.nii.gz", "cut short")
    said(err, "btcv_0003", "label0003 (1).nii.gz", "expected a name such as label0001.nii.gz")
    said(err, "btcv_0004", "img0004.nii", "more than one file")
    said(err, "btcv_0005", "label0005.nii.gz", "affine differs")
    said(err, "btcv_0006", "label0006.nii.gz", "7 x 6 x 5", "7 x 6 x 4")
    said(err, "btcv_0007", "crdownload", "not finished")
    said(err, "btcv_0007", "label0007.nii.gz: missing")
    said(err, "btcv_0008", "label0008.nii.gz", "mask is empty")
    said(err, "btcv_0009", "holds the value 14, expected labels from 0 to 13")
    said(err, "btcv_0010", "label0010.nii.gz", "too short")
    said(err, "no case", "liver.nii.gz", "expected a name such as img0001.nii.gz")
    assert "13 problems" in err[-1]
    assert "20 good cases" in err[-1]
    # Not a data set yet, and the list is kept.
    assert not (tmp_path / "d" / "dataset.json").exists()
    assert len(report(tmp_path / "d")["skipped"]) == 13
    assert report(tmp_path / "d")["complete"] is False

    code, _, err = run("btcv", raw, tmp_path / "e", "--skip-bad")
    assert code == 0
    assert len(err) == 13
    data = Dataset.open(tmp_path / "e")
    assert data.cases == tuple(f"btcv_{n:04d}" for n in range(21, 41))
    for case in data.cases:
        data.load(case)


def test_resume_keeps_what_is_done(raw: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "d"
    labels = raw / "Training" / "label" / "label0021.nii.gz"
    sound = labels.read_bytes()
    cut(labels)
    assert run("btcv", raw, target)[0] == 2
    kept = target / "imagesTr" / "btcv_0001_0000.nii.gz"
    before = kept.stat().st_mtime_ns
    # Nothing is overwritten without --resume.
    files = tree(target)
    code, _, err = run("btcv", raw, target, "--skip-bad")
    assert code == 2
    assert "is not empty" in err[-1]
    assert "--resume" in err[-1]
    assert tree(target) == files

    labels.write_bytes(sound)
    # A killed run may leave an image without labels, which no record names.
    (target / "imagesTr" / "btcv_0021_0000.nii.gz").write_bytes(b"half")
    assert run("btcv", raw, target, "--resume")[0] == 0
    assert kept.stat().st_mtime_ns == before
    data = Dataset.open(target)
    assert len(data.cases) == 30
    data.load("btcv_0021")
    assert report(target)["skipped"] == []
    # Complete: the source is not read again, and nothing changes.
    assert run("btcv", raw, target, "--resume")[0] == 0
    code, _, err = run("totalsegmentator", _total(tmp_path), target, "--resume")
    assert code == 2
    assert 'was begun with recipe "btcv"' in err[-1]


def test_resume_with_the_good_cases_only(raw: Path, tmp_path: Path, run: Run) -> None:
    cut(raw / "Training" / "img" / "img0030.nii.gz")
    assert run("btcv", raw, tmp_path / "d")[0] == 2
    assert run("btcv", raw, tmp_path / "d", "--resume", "--skip-bad")[0] == 0
    assert len(Dataset.open(tmp_path / "d").cases) == 29


def test_a_resumed_run_with_problems_leaves_no_data_set(
    raw: Path, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "d"
    assert run("btcv", raw, target, "--cases", "btcv_0001")[0] == 0
    assert (target / "dataset.json").exists()
    cut(raw / "Training" / "img" / "img0030.nii.gz")
    assert run("btcv", raw, target, "--resume")[0] == 2
    assert not (target / "dataset.json").exists()
    assert len(report(target)["cases"]) == 29


def test_folders_with_other_files_are_not_written_to(raw: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    for more in ((), ("--resume",), ("--skip-bad",)):
        code, _, err = run("btcv", raw, target, *more)
        assert code == 2
        assert "thesis.tex" in err[-1]
    (target / "prepared.json").write_text("[]")
    assert "not a report" in run("btcv", raw, target, "--resume")[2][-1]
    assert len(tree(target)) == 2
    code, _, err = run("btcv", raw, raw / "out")
    assert code == 2
    assert "inside the corpus" in err[-1]
    assert not (raw / "out").exists()


def test_wrong_sources_and_cases(raw: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "d"
    assert "no such folder" in run("btcv", tmp_path / "nowhere", target)[2][-1]
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("visceral", "btcv", "chaos", "totalsegmentator"):
        code, _, err = run(name, empty, target)
        assert code == 2
        assert str(empty) in err[-1]
        assert "expected" in err[-1]
    code, _, err = run("btcv", raw, target, "--cases", "btcv_001")
    assert code == 2
    assert "did you mean 'btcv_00" in err[-1]
    assert not target.exists()
    with pytest.raises(InputError, match="expected one of visceral"):
        prepare_corpus("acdc", raw, target)


def test_the_averaged_folders(raw: Path, tmp_path: Path, run: Run) -> None:
    """The project's own have other organs; folders with the abdomens' file names are used."""
    other = tmp_path / "synapse"
    scan(other / "averaged-training-images" / "DET0000101_avg.nii.gz")
    mask(other / "averaged-training-labels" / "DET0000101_avg_seg.nii.gz", at(0))
    code, _, err = run("btcv", other, tmp_path / "d")
    assert code == 2
    assert "not the abdomens" in err[-1]
    renamed = tmp_path / "renamed"
    shutil.copytree(raw / "Training" / "img", renamed / "averaged-training-images")
    shutil.copytree(raw / "Training" / "label", renamed / "averaged-training-labels")
    assert run("btcv", renamed, tmp_path / "d")[0] == 0


# --- VISCERAL -------------------------------------------------------------------------------


def _visceral(root: Path, gold: Any = visceral.GOLD, silver: Any = visceral.SILVER) -> Path:
    """The folders with the names that the organisers gave; one row of voxels per organ."""
    for title, cases, middle, by in (
        ("Anatomy3-trainingset", gold, "1_CTce_ThAb", "6"),
        ("SilverCorpus", silver, "1", "2"),
    ):
        for case in cases:
            scan(root / title / "Volumes" / f"{case}_1_CTce_ThAb.nii.gz", int(case))
            for k, radlex in enumerate(visceral.RADLEX):
                name = f"{case}_{middle}_{radlex}_{by}.nii.gz"
                mask(root / title / "Segmentations" / name, at(k))
    return root


def test_visceral_has_the_cases_and_names_of_the_organisers() -> None:
    assert (len(visceral.GOLD), len(visceral.SILVER)) == (20, 65)
    assert not set(visceral.GOLD) & set(visceral.SILVER)
    assert visceral.GOLD[0] == "10000100"
    assert visceral.SILVER[-1] == "10000205"
    assert len(set(visceral.RADLEX.values())) == 20
    # The pairs whose sides are swapped in several repositories.
    assert [visceral.RADLEX[n] for n in (29662, 29663, 32248, 32249, 1302, 1326, 30324, 40357)] == [
        "kidney_right", "kidney_left", "psoas_right", "psoas_left", "lung_right", "lung_left",
        "adrenal_right", "rectus_abdominis_right",
    ]  # fmt: skip


def test_visceral_both_corpora(tmp_path: Path, run: Run) -> None:
    source = _visceral(tmp_path / "v", visceral.GOLD[:2], visceral.SILVER[:2])
    some = ",".join((*visceral.GOLD[:2], *visceral.SILVER[:2]))
    gold = source / "Anatomy3-trainingset"
    # Other files in the folders of the corpora.
    scan(gold / "Volumes" / "10000001_1_CT_wb.nii.gz")
    scan(gold / "Volumes" / "10000100_3_MRT1_wb.nii.gz")
    mask(gold / "Segmentations" / "10000001_1_CT_wb_58_1.nii.gz", at(0))
    mask(gold / "Segmentations" / "10000100_1_CTce_ThAb_2_0.nii.gz", at(0))
    (gold / "Segmentations" / "10000104_1_CTce_ThAb_landmarks_1.fcsv").write_text("")
    # An annotator without a name, as for many of the aortas.
    aorta = gold / "Segmentations" / "10000100_1_CTce_ThAb_480_6.nii.gz"
    aorta.rename(aorta.with_name("10000100_1_CTce_ThAb_480_.nii.gz"))
    code, _, err = run("visceral", source, tmp_path / "d", "--cases", some)
    assert (code, err) == (0, [])
    data = Dataset.open(tmp_path / "d")
    assert data.cases == ("10000100", "10000101", "10000104", "10000107")
    assert data.organs == tuple(visceral.RADLEX.values())
    for case in data.cases:
        labels = native(data.load(case)[1].path)
        for k, organ in enumerate(visceral.RADLEX.values()):
            assert (labels[at(k)] == data.labels[organ]).all()
        assert np.count_nonzero(labels) == 3 * 20
    record = report(tmp_path / "d")
    assert record["cases"]["10000101"]["corpus"] == "silver"
    assert record["cases"]["10000101"]["annotators"]["liver"] == "2"
    assert record["cases"]["10000100"]["annotators"]["aorta"] == ""
    assert record["ignored"] == {
        "masks of another patient, modality or region": 1,
        "masks of organs that were not chosen": 1,
        "not NIfTI": 1,
        "volumes of another patient, modality or region": 2,
    }


def test_visceral_one_corpus(tmp_path: Path, run: Run) -> None:
    source = _visceral(tmp_path / "v", visceral.GOLD[:1], ())
    for src in (source, source / "Anatomy3-trainingset"):
        target = tmp_path / f"d{len(src.parts)}"
        code, _, _ = run(
            "visceral", src, target, "--corpus", "gold", "--organ", "spleen,liver", "--skip-bad"
        )
        assert code == 0
        data = Dataset.open(target)
        assert data.cases == ("10000100",)
        assert data.labels == {"spleen": 1, "liver": 2}
        assert len(report(target)["skipped"]) == 19 * 2  # image and masks of each other case
    code, _, err = run("visceral", source, tmp_path / "e")
    assert code == 2
    assert "SilverCorpus" in err[-1]
    code, _, err = run("visceral", source, tmp_path / "e", "--corpus", "gold", "--organ", "livr")
    assert code == 2
    assert "did you mean 'liver'" in err[-1]


def _gold(tmp_path: Path) -> tuple[Path, Path]:
    """One gold case, and its masks' folder."""
    source = _visceral(tmp_path / "v", visceral.GOLD[:1], ())
    return source, source / "Anatomy3-trainingset" / "Segmentations"


def _one(source: Path, target: Path, **options: Any) -> Outcome:
    return prepare_corpus(
        "visceral",
        source,
        target,
        corpus="gold",
        cases=["10000100"],
        progress=False,
        **options,
    )


def test_visceral_annotators(tmp_path: Path) -> None:
    source, folder = _gold(tmp_path)
    for by in ("10", "", "ab"):
        mask(folder / f"10000100_1_CTce_ThAb_58_{by}.nii.gz", (5, 5, slice(0, 2)))
    first = _one(source, tmp_path / "a", organs=["liver"])
    liver = native(tmp_path / "a" / "labelsTr" / "10000100.nii.gz")
    assert (liver[at(0)] == 1).all()
    assert first.notes == ("3 more drawings of an organ were not used",)
    record = report(tmp_path / "a")["cases"]["10000100"]
    assert record["annotators"] == {"liver": "6"}
    assert [Path(r["file"]).name.split("_")[-1] for r in record["not_taken"]] == [
        "10.nii.gz", "ab.nii.gz", ".nii.gz",
    ]  # fmt: skip
    _one(source, tmp_path / "b", organs=["liver", "spleen"], annotator="10")
    chosen = native(tmp_path / "b" / "labelsTr" / "10000100.nii.gz")
    assert (chosen == 1).sum() == 2
    assert report(tmp_path / "b")["cases"]["10000100"]["annotators"] == {
        "liver": "10",
        "spleen": "6",
    }


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "scan").touch()
    inner = tmp_path / "corpus" / "case"
    inner.mkdir(parents=True)
    (inner / "linked").symlink_to(tmp_path / "elsewhere")
    for name, target in (("up", inner.parent), ("here", inner), ("top", tmp_path)):
        (inner / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    assert files_below(tmp_path / "corpus") == [inner / "linked" / "scan"]


def test_links_of_two_folders_to_each_other_are_followed_once(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan").touch()
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    found = [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)]
    assert found == ["a/link/scan", "a/scan", "b/link/scan", "b/scan"]


def test_natural_order() -> None:
    names = ["", "b", "10", "2", "a2", "²"]
    assert sorted(names, key=natural) == ["2", "10", "a2", "b", "²", ""]


def test_overlaps_go_to_the_smaller_organ(tmp_path: Path) -> None:
    source, folder = _gold(tmp_path)
    big, small = (slice(0, 7), slice(0, 6), 0), (slice(2, 4), 1, slice(0, 3))
    # Regardless of the order of the labels.
    for k, (liver, spleen) in enumerate(((big, small), (small, big))):
        mask(folder / "10000100_1_CTce_ThAb_58_6.nii.gz", liver)
        mask(folder / "10000100_1_CTce_ThAb_86_6.nii.gz", spleen)
        outcome = _one(source, tmp_path / str(k), organs=["liver", "spleen"])
        labels = native(tmp_path / str(k) / "labelsTr" / "10000100.nii.gz")
        assert (labels[small] == 2 - k).all()
        assert (labels > 0).sum() == 42 + 6 - 2
        assert (labels == 2 - k).sum() == 6
        overlaps = report(tmp_path / str(k))["cases"]["10000100"]["overlaps"]
        assert overlaps == [{"organs": ["liver", "spleen"], "voxels": 2}]
        assert "2 voxels in 1 cases" in outcome.notes[0]


def test_everything_wrong_with_a_visceral_case_is_listed_at_once(tmp_path: Path) -> None:
    source, folder = _gold(tmp_path)
    volumes = folder.parent / "Volumes"

    def name(radlex: int) -> Path:
        return folder / f"10000100_1_CTce_ThAb_{radlex}_6.nii.gz"

    cut(volumes / "10000100_1_CTce_ThAb.nii.gz")
    name(58).unlink()
    cut(name(86))
    mask(name(170), at(0), (*at(1), 7))
    mask(folder / "10000100_1_CTce_ThAb_187_6.nii", at(3))
    name(237).rename(folder / "10000100_1_CTce_ThAb-237_6.nii.gz")
    (folder / "10000100_1_CTce_ThAb_1247_6.nii.gz.part").write_bytes(b"")
    shutil.copy(name(1302), folder / "10000100_1_CTce_ThAb_1302_6 (copy).nii.gz")
    (volumes / "10000100_1_CTce.nii.gz").write_bytes(b"")
    outcome = _one(source, tmp_path / "d")
    assert not outcome.complete
    assert outcome.done == ()
    assert {problem.case for problem in outcome.problems} == {"10000100"}
    lines = [problem.what for problem in outcome.problems]
    said(lines, "Volumes/10000100_1_CTce_ThAb.nii.gz", "cut short")
    said(lines, "_58_*.nii.gz: missing, the mask of liver", "allow_missing")
    said(lines, "_86_6.nii.gz", "cut short")
    said(lines, "_170_6.nii.gz", "the values 1, 7, expected one organ")
    said(lines, "_187_6.nii", "more than one file of gallbladder")
    said(lines, "_237_*.nii.gz: missing, the mask of urinary_bladder")
    said(lines, "ThAb-237_6.nii.gz", "expected a name such as")
    said(lines, "_1247_6.nii.gz.part", "not finished")
    said(lines, "(copy)", "expected a name such as")
    said(lines, "10000100_1_CTce.nii.gz", "expected a name such as")
    assert len(lines) == 10


def test_grids_that_differ_and_organs_that_are_missing(tmp_path: Path) -> None:
    source, folder = _gold(tmp_path)
    spleen = folder / "10000100_1_CTce_ThAb_86_6.nii.gz"
    moved = AFFINE.copy()
    moved[2, 3] += 5
    mask(spleen, at(1), affine=moved)
    lines = [p.what for p in _one(source, tmp_path / "a").problems]
    assert len(lines) == 1
    said(lines, "_86_6.nii.gz", "affine differs", "5 mm apart")

    spleen.unlink()
    mask(folder / "10000100_1_CTce_ThAb_58_6.nii.gz")
    outcome = _one(source, tmp_path / "b", allow_missing=True)
    assert outcome.complete
    record = report(tmp_path / "b")["cases"]["10000100"]
    assert record["missing"] == ["spleen"]
    assert record["empty"] == ["liver"]
    assert len(outcome.notes) == 2
    data = Dataset.open(tmp_path / "b")
    present = set(np.unique(data.load("10000100")[1].data)) - {0}
    assert present == set(data.labels.values()) - {data.labels["spleen"], data.labels["liver"]}

    lines = [p.what for p in _one(source, tmp_path / "c", organs=["liver"]).problems]
    assert len(lines) == 1
    assert "no organ is drawn" in lines[0]
    # A run with another choice of annotator is not resumed.
    with pytest.raises(InputError, match="was begun with settings"):
        _one(source, tmp_path / "b", annotator="7", resume=True)


def test_a_run_may_be_resumed_with_allow_missing(tmp_path: Path) -> None:
    source, folder = _gold(tmp_path)
    thyroid = folder / "10000100_1_CTce_ThAb_7578_6.nii.gz"
    thyroid.unlink()
    assert not _one(source, tmp_path / "d").complete
    assert _one(source, tmp_path / "d", resume=True, allow_missing=True).complete


# --- TotalSegmentator -----------------------------------------------------------------------


def _total(root: Path, cases: int = 3) -> Path:
    folder = root / "Totalsegmentator_dataset_v201"
    for number in range(cases):
        case = folder / f"s{number:04d}"
        scan(case / "ct.nii.gz", number)
        for k, organ in enumerate((*totalsegmentator.ABDOMEN, "iliopsoas_left", "brain")):
            mask(case / "segmentations" / f"{organ}.nii.gz", *([at(k)] if organ != "brain" else []))
    (folder / "meta.csv").write_text("image_id;age\n")
    return folder


def test_totalsegmentator(tmp_path: Path, run: Run) -> None:
    source = _total(tmp_path)
    code, _, err = run("totalsegmentator", source, tmp_path / "d")
    assert (code, err) == (0, [])
    data = Dataset.open(tmp_path / "d")
    assert data.cases == ("s0000", "s0001", "s0002")
    assert data.organs == totalsegmentator.ABDOMEN
    labels = native(data.load("s0001")[1].path)
    for k, organ in enumerate(totalsegmentator.ABDOMEN):
        assert (labels[at(k)] == data.labels[organ]).all()
    assert np.count_nonzero(labels) == 3 * 13
    # A folder above the cases is accepted; organs get values in the order given.
    words = ("--organ", "iliopsoas_left", "--organ", "liver", "--cases", "s0002")
    assert run("totalsegmentator", tmp_path, tmp_path.parent / f"{tmp_path.name}_e", *words)[0] == 0
    data = Dataset.open(tmp_path.parent / f"{tmp_path.name}_e")
    assert data.labels == {"iliopsoas_left": 1, "liver": 2}


def test_scans_without_the_organs_are_left_out(tmp_path: Path, run: Run) -> None:
    source = _total(tmp_path)
    mask(source / "s0001" / "segmentations" / "brain.nii.gz", at(0))
    code, _, err = run("totalsegmentator", source, tmp_path / "d", "--organ", "brain")
    assert code == 0
    assert "2 cases left out" in err[-1]
    assert Dataset.open(tmp_path / "d").cases == ("s0001",)
    assert sorted(report(tmp_path / "d")["left_out"]) == ["s0000", "s0002"]
    words = ("--organ", "brain", "--cases", "s0000")
    code, _, err = run("totalsegmentator", source, tmp_path / "e", *words)
    assert code == 2
    assert "choose others with --organ" in err[-1]
    code, _, err = run("totalsegmentator", source, tmp_path / "f", "--organ", "splen")
    assert code == 2
    assert "did you mean 'spleen'" in err[-1]


def test_everything_wrong_with_totalsegmentator_is_listed_at_once(tmp_path: Path, run: Run) -> None:
    source = _total(tmp_path, 7)
    (source / "s0000" / "ct.nii.gz").unlink()
    (source / "s0001" / "segmentations" / "liver.nii.gz").unlink()
    cut(source / "s0002" / "segmentations" / "aorta.nii.gz")
    cut(source / "s0002" / "ct.nii.gz")
    (source / "s0003" / "ct.nii.gz.part").write_bytes(b"")
    shutil.copy(
        source / "s0004" / "segmentations" / "liver.nii.gz",
        source / "s0004" / "segmentations" / "liver (1).nii.gz",
    )
    shutil.rmtree(source / "s0005" / "segmentations")
    shutil.copytree(source / "s0006", source / "s0006 copy")
    code, _, err = run("totalsegmentator", source, tmp_path / "d", "--skip-bad")
    assert code == 0
    assert Dataset.open(tmp_path / "d").cases == ("s0006",)
    said(err, "s0000", "ct.nii.gz: missing")
    said(err, "s0001", "liver.nii.gz: missing, the mask of liver", "--allow-missing")
    said(err, "s0002", "aorta.nii.gz", "cut short")
    said(err, "s0002", "ct.nii.gz", "cut short")
    said(err, "s0003", "ct.nii.gz.part", "not finished")
    said(err, "s0004", "liver (1).nii.gz", "expected a name such as liver.nii.gz")
    assert len([line for line in err if "s0005: " in line]) == 13
    said(err, "no case", "s0006 copy", "expected a name such as s0001")
    assert len(err) == 7 + 13
    options = {"allow_missing": True, "cases": ["s0001"], "progress": False}
    outcome = prepare_corpus("totalsegmentator", source, tmp_path / "e", **options)
    assert outcome.complete  # problems of no case are ignored when cases are named
    assert outcome.done == ("s0001",)
    assert outcome.problems == ()


# --- CHAOS ----------------------------------------------------------------------------------

# An oblique slice's axes in LPS+, rows and columns of different sizes, and a gap between slices.
TURN = np.radians(10)
ALONG_ROW = np.array([np.cos(TURN), np.sin(TURN), 0])
DOWN_COLUMN = np.array([-np.sin(TURN), np.cos(TURN), 0])
ROWS, COLUMNS, SLICES = 6, 8, 4
BETWEEN_ROWS, BETWEEN_COLUMNS, STEP = 1.5, 1.25, 9.0


def corner(k: int) -> np.ndarray:
    """The position of the first pixel of slice k, in LPS+."""
    return np.array([-100.0, -80.0, 40.0 + STEP * k])


def dicom(path: Path, k: int, pixels: np.ndarray, **changes: Any) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    data.SeriesInstanceUID = generate_uid()  # a different one for each file, as in the corpus
    data.Modality = "MR"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.ImageOrientationPatient = [*map(float, ALONG_ROW.round(9)), *DOWN_COLUMN.round(9)]
    data.ImagePositionPatient = [*map(float, corner(k))]
    data.PixelSpacing = [BETWEEN_ROWS, BETWEEN_COLUMNS]
    data.SliceThickness = 5.5  # not the distance between slices
    data.PixelData = pixels.astype(np.uint16).tobytes()
    for key, value in changes.items():
        setattr(data, key, value)
    if pydicom.__version__ < "3":
        data.is_little_endian, data.is_implicit_VR = True, False
    data.save_as(path, enforce_file_format=True) if pydicom.__version__ >= "3" else data.save_as(
        path, write_like_original=False
    )


def png(path: Path, grey: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey.astype(np.uint8)).save(path)


def _chaos(root: Path, numbers: Any = chaos.CASES[:1]) -> Path:
    """Names in reverse order of the positions; each pixel encodes its slice, row and column."""
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    for number in numbers:
        for k in range(SLICES):
            name = f"IMG-{2 * number:04d}-{SLICES - k:05d}"
            folder = root / "Train_Sets" / "MR" / str(number) / "T2SPIR"
            dicom(folder / "DICOM_anon" / f"{name}.dcm", k, 100 * k + 10 * rows + columns)
            grey = np.zeros((ROWS, COLUMNS))
            grey[1, 2], grey[2, 3], grey[3, 4], grey[4, 5] = (63, 126, 189, 252)
            grey[5, k] = 63
            png(folder / "Ground" / f"{name}.png", grey)
    return root


def test_chaos(tmp_path: Path, run: Run) -> None:
    source = _chaos(tmp_path / "CHAOS_Train_Sets", chaos.CASES)
    code, _, err = run("chaos", source, tmp_path / "d")
    assert (code, err) == (0, [])
    data = Dataset.open(tmp_path / "d")
    assert len(data.cases) == 20
    assert data.cases[:2] == ("chaos_01", "chaos_02")
    assert data.labels == {"liver": 1, "kidney_right": 2, "kidney_left": 3, "spleen": 4}
    image, labels = data.load("chaos_39")
    written = nib.load(image.path)
    voxels = np.asanyarray(written.dataobj)
    drawn = native(labels.path)
    assert voxels.shape == (COLUMNS, ROWS, SLICES)
    assert written.header["sform_code"] == written.header["qform_code"] == 1
    for k in range(SLICES):
        for r, c, value in ((1, 2, 1), (2, 3, 2), (3, 4, 3), (4, 5, 4), (5, k, 1)):
            # The position of this voxel by the standard's formula, in LPS+, converted to RAS+.
            lps = corner(k) + c * BETWEEN_COLUMNS * ALONG_ROW + r * BETWEEN_ROWS * DOWN_COLUMN
            ras = lps * [-1, -1, 1]
            ijk = np.linalg.inv(written.affine) @ [*ras, 1]
            i, j, s = np.round(ijk[:3]).astype(int)
            np.testing.assert_allclose(ijk[:3], [i, j, s], atol=1e-4)
            assert voxels[i, j, s] == 100 * k + 10 * r + c
            assert drawn[i, j, s] == value
    assert np.count_nonzero(drawn) == 5 * SLICES
    # The patient's right is shown on the left, the head last.
    assert image.data[0].mean() < image.data[-1].mean()
    assert image.spacing == pytest.approx((STEP, BETWEEN_ROWS, BETWEEN_COLUMNS), abs=1e-4)
    assert report(tmp_path / "d")["cases"]["chaos_39"]["first_slice"] == "IMG-0078-00004"


def test_chaos_rescales_and_reverses(tmp_path: Path) -> None:
    """Slices that run from the head down, with a slope."""
    source = _chaos(tmp_path / "c")
    folder = source / "Train_Sets" / "MR" / "1" / "T2SPIR" / "DICOM_anon"
    for k in range(SLICES):
        dicom(
            folder / f"IMG-0002-{SLICES - k:05d}.dcm",
            -k,
            np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + k,
            RescaleSlope=0.5,
            RescaleIntercept=-3,
        )
    options = {"cases": ["chaos_01"], "progress": False}
    assert prepare_corpus("chaos", source, tmp_path / "d", **options).complete
    image, labels = Dataset.open(tmp_path / "d").load("chaos_01")
    assert [float(plane.min()) for plane in image.data] == [-1.5, -2.0, -2.5, -3.0]
    # The labelled row encodes the slice: k is 0 at the head.
    assert (labels.data[-1] == 1).sum() == 2


def test_everything_wrong_with_chaos_is_listed_at_once(tmp_path: Path) -> None:
    numbers = chaos.CASES[:9]
    source = _chaos(tmp_path / "c", numbers)

    def where(n: int, kind: str, slice_: int) -> Path:
        folder = source / "Train_Sets" / "MR" / str(numbers[n]) / "T2SPIR"
        sub = {"dcm": "DICOM_anon", "png": "Ground"}[kind]
        return folder / sub / f"IMG-{2 * numbers[n]:04d}-{slice_:05d}.{kind}"

    pixels = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    where(0, "png", 2).unlink()
    cut(where(0, "dcm", 1))
    cut(where(1, "png", 1))
    png(where(1, "png", 2), np.full((ROWS, COLUMNS + 1), 63))
    png(where(1, "png", 3), np.full((ROWS, COLUMNS), 30))
    dicom(where(2, "dcm", 2), 40, pixels)
    dicom(where(3, "dcm", 2), 2, pixels, PixelSpacing=[2.0, 2.0])
    where(4, "dcm", 4).rename(where(4, "dcm", 4).with_name("slice4.dcm"))
    (where(5, "dcm", 1).parent / "IMG-0016-00001.dcm.part").write_bytes(b"")
    for k in range(1, SLICES + 1):
        png(where(6, "png", k), np.zeros((ROWS, COLUMNS)))
    shutil.rmtree(where(7, "png", 1).parent)
    outcome = prepare_corpus("chaos", source, tmp_path / "d", skip_bad=True, progress=False)
    assert outcome.done == (f"chaos_{numbers[8]:02d}",)
    by = {f"chaos_{n:02d}": [] for n in chaos.CASES}
    for problem in outcome.problems:
        by[problem.case or ""].append(problem.what)
    cases = [by[f"chaos_{n:02d}"] for n in numbers]
    said(cases[0], "00002.png: missing", "an image and a drawing")
    said(cases[0], "00001.dcm", "cannot be read as a DICOM image")
    said(cases[1], "00001.png", "cut short")
    said(cases[1], "00002.png", "6 x 9 pixels, its slice 6 x 8")
    said(cases[1], "00003.png", "grey values 30")
    assert any("mm apart" in what for what in cases[2])
    assert any("its spacing differs" in what for what in cases[3])
    said(cases[4], "slice4.dcm", "expected a name such as IMG-0002-00001.dcm")
    said(cases[4], "00004.dcm: missing")
    said(cases[5], ".part", "not finished")
    said(cases[6], "no organ is drawn")
    said(cases[7], "Ground: missing, the drawings")
    assert cases[8] == []
    assert [len(c) for c in cases[:2]] == [2, 3]
    # The other cases of the 20 are missing.
    assert len(by["chaos_39"]) == 2


def test_chaos_without_pydicom(tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "c").mkdir()
    code, _, err = run("chaos", tmp_path / "c", tmp_path / "d")
    assert code == 2
    assert 'pip install "lslpn[dicom]"' in err[-1]


# --- the command line -----------------------------------------------------------------------


def test_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("visceral", "btcv", "chaos", "totalsegmentator"):
        assert name in out
        assert cli.main(["prepare", name, "--help"]) == 0
        assert "--skip-bad" in capsys.readouterr().out


def test_the_options_in_the_documentation_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    known = ""
    for command in (*(["prepare", n] for n in NAMES), ["train"], ["evaluate"]):
        assert cli.main([*command, "--help"]) == 0
        known += capsys.readouterr().out
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(options) > 5
    assert {option for option in options if option not in known} == set()
    assert all(f"lslpn prepare {name} " in text for name in NAMES)
    assert all(f"`{organ}`" in text for organ in visceral.RADLEX.values())


def test_the_bar_shows_rate_and_time_left(raw: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["prepare", "btcv", str(raw), str(tmp_path / "d")]) == 0
    bar = capsys.readouterr().err
    assert "30/30" in bar
    assert "case/s" in bar
    assert "<" in bar
