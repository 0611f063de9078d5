"""The demo, end to end on the two scans that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lslpn import demo
from lslpn.assets import LABELS_NOTE, asset, demo_image, demo_labels, demo_organs, trunk_weights
from lslpn.data.volumes import check_same_grid, read_image, read_labels
from lslpn.errors import InputError


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "made" / "for it"
    return out, demo.run_demo(out, progress=False)


def test_the_organs_are_found(ran: tuple[Path, dict[str, Any]]) -> None:
    _, report = ran
    assert report["dice"]["liver"] >= 0.85
    assert report["dice"]["spleen"] >= 0.70
    assert list(report["dice"])[:2] == ["liver", "spleen"]  # the largest first
    # Kidneys and gallbladder are not in scan B: they are not scored, and almost none is found.
    assert set(report["dice"]) < set(demo_organs())
    for organ in ("kidney_right", "kidney_left", "gallbladder"):
        assert organ not in report["dice"]
        assert report["volumes_ml"][organ]["truth"] == 0
        assert report["volumes_ml"][organ]["prediction"] < 10


def test_prediction_is_in_the_grid_of_the_query(ran: tuple[Path, dict[str, Any]]) -> None:
    out, report = ran
    prediction = read_labels(out / "prediction.nii.gz")
    check_same_grid(read_image(demo_image("b")), prediction)
    assert nib.aff2axcodes(nib.load(out / "prediction.nii.gz").affine) == ("L", "P", "S")
    truth = read_labels(demo_labels("b"))
    # The file agrees with the report.
    a, b = (volume.data == demo_organs()["liver"] for volume in (prediction, truth))
    assert report["dice"]["liver"] == pytest.approx(
        2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-4
    )


def test_report_and_figure(ran: tuple[Path, dict[str, Any]]) -> None:
    out, report = ran
    assert sorted(p.name for p in out.iterdir()) == [
        "overlay.png",
        "prediction.nii.gz",
        "report.json",
        "result.html",
    ]
    assert json.loads((out / "report.json").read_text()) == report
    assert "TotalSegmentator" in report["note"]
    assert "not drawn by a human" in report["note"]
    assert report["versions"]["torch"]
    assert report["seconds"] > 0
    assert len(report["matched_slices"]) == 20
    picture = (out / "overlay.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
    page = (out / "result.html").read_text()
    assert str(out) not in page
    assert LABELS_NOTE in page


def test_an_unwritable_folder_is_reported_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(demo, "segment_matched", work)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        demo.run_demo(tmp_path / "file")


def test_an_interrupted_demo_leaves_the_earlier_files(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = ran
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "segment_matched", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_assets_exist_and_are_described() -> None:
    assert trunk_weights().stat().st_size > 10_000_000
    for scan in ("a", "b"):
        image, labels = read_image(demo_image(scan)), read_labels(demo_labels(scan))  # type: ignore[arg-type]
        check_same_grid(image, labels)
        assert set(np.unique(labels.data)) <= {0, *demo_organs().values()}
    with pytest.raises(InputError, match="install lslpn again"):
        asset("missing.nii.gz")
