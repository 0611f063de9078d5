"""The content of pages, and how real browsers show them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import synthetic_ct, write_nifti

import lslpn
from lslpn.cli import main
from lslpn.data.nifti import Grid
from lslpn.data.volumes import Volume, read_image, read_labels
from lslpn.errors import InputError
from lslpn.evaluation.results import Evaluation, Example, Row
from lslpn.segmentation.why import NONE, Recorder, Shots, Why, winners
from lslpn.viewer import Support, View, view
from lslpn.viewer.evaluation import write_evaluation
from lslpn_kernels import GridSpec, reference

ROOT = Path(__file__).parents[2]

HOSTILE = {
    1: "<script>document.title='taken'</script></script><!--",
    2: "\"quoted\" & 'quoted' <img src=x onerror=alert(1)>",
    3: "печень 肝 " + "very long " * 30,
}


def volume(
    data: np.ndarray, spacing: tuple[float, float, float] = (4.0, 3.0, 3.0), tilt: float = 0.0
) -> Volume:
    """A volume without a file; x to the left, y to the back, rotated about x by `tilt` radians."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    affine[1:3, 1:3] = turn @ affine[1:3, 1:3]
    shape = data.shape[::-1]
    return Volume(data, spacing, Grid(shape, affine, nib.Nifti1Header(), Path("/home/me/scan.nii")))


def block(shown: View, name: str) -> nib.Nifti1Image:
    raw = gzip.decompress(base64.b64decode(shown.blocks[name]))
    return nib.Nifti1Image.from_bytes(raw)


# --- why -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 24), (29, 35)])
def test_winners_agree_with_the_equations(size: tuple[int, int]) -> None:
    """With as many cells as pixels, cells are compared at the pixels, as by `reference`."""
    generator = torch.Generator().manual_seed(0)
    grid = GridSpec(1 / 4)
    features = torch.randn(2, 8, *size, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(3, *grid.shape(*size), 8, generator=generator, dtype=torch.float64)
    prototypes[1, :3] = 0
    cosines, windows = winners(features, prototypes[None], grid, size)
    expected = reference.cosine_match(features[None], prototypes[None], grid, size)[0]
    torch.testing.assert_close(cosines, expected)

    # The reported window has this cosine and contains the pixel.
    unit = torch.nn.functional.normalize(prototypes, dim=-1).flatten(1, 2)
    direction = torch.nn.functional.normalize(features, dim=1)
    named = torch.einsum("qdyx,cwd->qcwyx", direction, unit)
    kept = windows.clamp(min=0)[:, :, None]
    shown = windows != NONE
    torch.testing.assert_close(named.gather(2, kept)[:, :, 0][shown], cosines[shown])
    assert (cosines[~shown] == 0).all()
    assert not shown.all()
    rows = torch.tensor(grid.axis(size[0]).starts)[windows // grid.shape(*size)[1]]
    y = torch.arange(size[0])[:, None]
    assert ((rows <= y) & (y < rows + grid.axis(size[0]).window))[shown].all()


def test_windows_of_several_sources_and_parts_are_separate() -> None:
    grid, size = GridSpec(1.0), (16, 16)
    axes = torch.eye(4)
    features = torch.zeros(1, 4, 2, 2)
    features[0, 0, 0] = features[0, 1, 1] = 1.0
    boxes = np.array([[0, 16, 0, 16]])
    record = Recorder(2, grid, size, np.repeat(boxes, 2, 0), [boxes, boxes])
    # The background is the same everywhere; only the second of two sources shows the organ.
    first = torch.stack([torch.stack([axes[3], 0 * axes[0]]), torch.stack([axes[3], axes[0]])])
    shots = [[(0, 4), (0, 6)], [(1, 9)]]
    record.add([1], [0, 7], features, first[:, :, None, None], shots, [(0, 5)])
    second = torch.stack([axes[3], axes[1]])[None, :, None, None]
    record.add([1], [0, 8], features, second, [[(1, 2)]], [(1, 2)])
    why = record.result()
    assert why.labels[1, 0].tolist() == [[7, 7], [8, 8]]
    assert why.windows[1, 0].tolist() == [[1, 1], [2, 2]]
    assert why.sources == ((), ((Shots(0, 4, 5, 6),), (Shots(1, 9, 9, 9),), (Shots(1, 2, 2, 2),)))
    assert (why.labels[1, 2] == NONE).all()  # two classes, three ranks


# --- what goes into a page -----------------------------------------------------------------------


def test_measures_are_of_the_whole_scan() -> None:
    image, labels = synthetic_ct(0)
    found = np.roll(labels, 1, 2)
    shown = view(volume(image.astype(np.float32)), found, truth=labels, names={1: "liver"})
    liver, spleen, _ = shown.facts["organs"]
    assert (liver["name"], spleen["name"]) == ("liver", "label 2")
    voxels = int((labels == 1).sum())
    assert liver["ml"] == pytest.approx([voxels * 0.036] * 2, abs=0.01)
    both = int(((labels == 1) & (found == 1)).sum())
    assert liver["dice"] == pytest.approx(both / voxels, abs=1e-4)
    z, y, x = liver["at"]
    assert found[z, y, x] == 1
    assert shown.facts["image"]["windows"][0] == ["Abdomen", -150.0, 250.0]
    np.testing.assert_array_equal(block(shown, "image").get_fdata().transpose(2, 1, 0), image)


def test_large_scans_are_thinned_along_their_finest_axes() -> None:
    grey = np.arange(1000, dtype=np.float32)[:, None, None] % 7
    data = np.broadcast_to(grey, (1000, 240, 220))
    labels = np.zeros(data.shape, np.uint8)
    labels[500, 100:120, 50:60] = 1
    shown = view(volume(data, (0.9, 0.5, 0.5)), labels)
    assert shown.facts["image"]["step"] == [2, 2, 2]
    assert shown.facts["organs"][0]["ml"] == [pytest.approx(0.045, abs=0.006)]
    assert "every 2nd voxel along x and y, and every 2nd slice" in shown.facts["notes"][0]
    small = block(shown, "layer-0")
    assert small.shape == (110, 120, 500)
    # Of slices 2 and 3 the page has slice 3.
    np.testing.assert_allclose(small.affine @ [0, 0, 1, 1], [-0.5, -0.5, 2.7, 1.0])
    assert block(shown, "image").get_fdata()[0, 0, 1] == 3


def test_a_page_names_the_organs_of_low_confidence_that_were_found() -> None:
    hu, labels = synthetic_ct(0)
    image = volume(hu.astype(np.float32))
    confidence = {1: 0.49, 2: 0.5, 3: 0.3, 9: 0.0}
    notes = view(image, labels, names={1: "liver"}, confidence=confidence).facts["notes"]
    assert notes == ["Low confidence, check these organs: liver, label 3."]


def test_a_page_reports_what_it_cannot_show() -> None:
    image = volume(synthetic_ct(0)[0].astype(np.float32))
    empty = np.zeros(image.data.shape, np.int64)
    assert "No labels were given" in view(image).facts["notes"][0]
    assert "every voxel is 0" in view(image, empty).facts["notes"][0]
    support = Support(image, empty, range(len(empty)))
    given = view(image, empty, supports=[support], confidence={1: 0.0}).facts["notes"]
    alone = view(image, empty, supports=[support]).facts["notes"]
    assert [note[:14] for note in alone if note not in given] == ["No confidence:"]
    many = empty.copy()
    many.ravel()[: 7 * 300] = np.repeat(np.arange(300) * 7 + 1, 7)
    assert "Only the first 254 of 300 labels are shown." in view(image, many).facts["notes"]
    assert len(view(image, np.where(many > 1400, 0, many)).facts["organs"]) == 200


def test_labels_that_do_not_fit_the_scan_are_refused() -> None:
    image = volume(synthetic_ct(0)[0].astype(np.float32))
    labels = np.zeros(image.data.shape, np.uint8)
    with pytest.raises(InputError, match=r"labels: expected labels in the grid of the image"):
        view(image, labels[:-1])
    with pytest.raises(InputError, match=r"expected whole numbers from 0, got float32"):
        view(image, labels.astype(np.float32))
    with pytest.raises(InputError, match=r"expected whole numbers from 0, got int16 from -1"):
        view(image, labels.astype(np.int16) - 1)
    with pytest.raises(InputError, match=r"differs from that of its image"):
        view(image, volume(labels, (4.0, 3.0, 2.0)))
    with pytest.raises(InputError, match=r"support: expected labels in the grid"):
        view(image, labels, supports=[Support(image, labels[1:], [], "support")])


def test_nibabel_images_give_the_same_page_as_their_files(tmp_path: Path) -> None:
    image, labels = synthetic_ct(0)
    files = write_nifti(tmp_path / "a.nii", image), write_nifti(tmp_path / "b.nii", labels)
    sure = {1: np.float32(0.25)}
    page = view(*files, truth=files[1], confidence=sure).html()
    images = [nib.load(file) for file in files]
    assert view(images[0], images[1], truth=images[1], confidence=sure).html() == page
    with pytest.raises(TypeError, match="expected a Volume or a nibabel NIfTI image, got ndarray"):
        view(image)  # type: ignore[arg-type]


def test_no_path_and_no_address_is_in_a_page(tmp_path: Path) -> None:
    image, labels = synthetic_ct(0)
    folder = tmp_path / "patient of somebody"
    file = write_nifti(folder / "a <b>.nii.gz", image)
    mask = write_nifti(folder / "mask.nii.gz", labels, dtype=np.uint8)
    header = nib.load(file)
    header.header["descrip"] = b"patient of somebody"
    nib.save(header, folder / "a <b>.nii.gz")
    shown = lslpn.view(file, mask)
    text = shown.html()
    assert shown.title == "a <b>"
    own = text.replace((ROOT / "lslpn/viewer/assets/niivue.umd.js").read_text("utf-8"), "")
    assert "somebody" not in own
    assert str(tmp_path) not in own
    assert b"somebody" not in gzip.decompress(base64.b64decode(shown.blocks["image"]))
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", own)
    assert "<title>a &lt;b&gt;</title>" in own


def test_the_viewer_does_not_import_torch() -> None:
    code = "import sys, lslpn.viewer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_niivue_is_the_version_in_the_notice() -> None:
    script = (ROOT / "lslpn/viewer/assets/niivue.umd.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() in (ROOT / "NOTICE").read_text()
    assert b"</script" not in script


def test_a_page_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    shown = view(volume(synthetic_ct(0)[0].astype(np.float32)))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        shown.save(tmp_path / "file" / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_notebooks_show_the_page_in_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lslpn.viewer.find_spec", lambda name: None)
    image, labels = synthetic_ct(0)
    shown = view(volume(image.astype(np.float32)), labels, names=HOSTILE)
    frame = shown._repr_mimebundle_()["text/html"]
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in frame
    assert frame.count("<") == 2
    with pytest.raises(InputError, match="needs ipyniivue"):
        shown.widget()


def test_widget_of_ipyniivue() -> None:
    pytest.importorskip("ipyniivue", reason="the extra `notebook`")
    image, labels = synthetic_ct(0)
    shown = view(volume(image.astype(np.float32)), labels, names=HOSTILE)
    scan, organs = shown.widget().volumes
    assert (scan.cal_min, scan.cal_max) == (-150, 250)
    assert organs.colormap_label.labels == ["", *HOSTILE.values()]
    assert "application/vnd.jupyter.widget-view+json" in str(shown._repr_mimebundle_())


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> dict[str, Path]:
    out = {}
    for seed, name in enumerate("ab"):
        image, labels = synthetic_ct(seed)
        out[name] = write_nifti(tmp_path / f"{name}.nii.gz", image)
        out[f"{name}_mask"] = write_nifti(tmp_path / f"{name}_mask.nii.gz", labels, dtype=np.uint8)
    return out


def facts_of(page: Path) -> Any:
    found = re.search(
        r'<script type="application/json" id="facts">(.*?)</script>', page.read_text()
    )
    assert found
    return json.loads(found[1])


def test_view_writes_a_page(
    scans: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "dataset.json"
    names.write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    page = tmp_path / "made" / "page.html"
    words = ["view", scans["a"], scans["a_mask"], scans["a_mask"], "--truth", scans["a_mask"]]
    words += ["--names", names, "--out", page]
    assert main([str(word) for word in words]) == 0
    facts = facts_of(page)
    assert facts["layers"] == ["a_mask", "a_mask (another)", "ground truth"]
    assert facts["organs"][0]["name"] == "liver"
    assert facts["organs"][0]["dice"] == 1.0
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["grid", "four", "folder"])
def test_view_reports_errors_in_one_line(
    scans: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    page = tmp_path / "page.html"
    if fault == "grid":
        labels = np.zeros((3, 4, 5), np.uint8)
        write_nifti(scans["a_mask"], labels, dtype=np.uint8)
    if fault == "four":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), scans["a"])
    if fault == "folder":
        page = scans["b"] / "page.html"
    before = {p.name for p in tmp_path.iterdir()}
    assert main(["view", str(scans["a"]), str(scans["a_mask"]), "--out", str(page)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert {"grid": "differs", "four": "expected 3", "folder": "cannot be"}[fault] in err
    assert {p.name for p in tmp_path.iterdir()} == before


def test_segment_writes_a_page_that_says_why(scans: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "result.html"
    words = ["segment", "--support-image", scans["a"], "--support-mask", scans["a_mask"]]
    words += ["--query", scans["b"], "--out", tmp_path / "out.nii.gz", "--html", page]
    assert main([str(word) for word in [*words, "--size", 64, "--quiet"]]) == 0
    facts = facts_of(page)
    assert [s["name"] for s in facts["supports"]] == ["a"]
    assert len(facts["supports"][0]["match"]) == facts["image"]["shape"][0] == 14
    why = facts["why"]
    assert why["slices"]
    assert len(why["sources"]) == len(why["query_boxes"]) == why["shape"][0] == len(why["slices"])
    found = read_labels(tmp_path / "out.nii.gz").data
    image = read_image(scans["b"])
    assert facts["organs"][0]["ml"] == [
        pytest.approx((found == 1).sum() * image.voxel_ml, abs=0.01)
    ]


def test_evaluate_writes_a_page_with_views(synthetic_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["evaluate", "--data", synthetic_dataset, "--untrained", "--support", "syn_00"]
    words += ["--query", "syn_01", "--organ", "liver,spleen", "--size", 64, "--html", "--out", out]
    assert main([str(word) for word in [*words, "--quiet"]]) == 0
    scores = {
        row["organ"]: row["dice"]
        for row in json.loads((out / "evaluation.json").read_text())["evaluations"][0]["rows"]
    }
    facts = facts_of(out / "views" / "syn_01.html")
    # The page's Dice is over the whole scan, the evaluation's over the organ's range.
    assert facts["organs"][0]["dice"] == pytest.approx(scores["liver"], abs=0.05)
    page = (out / "evaluation.html").read_text()
    assert 'href="views/syn_01.html"' in page
    assert page.count("<img ") == 6
    assert f"Dice {scores['liver']:.3f}" in page


# --- a real browser ------------------------------------------------------------------------------


PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "firefox": ("firefox", "firefox-esr"),
}
OPTIONS = (
    "--no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module", params=PROGRAMS)
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    names = PROGRAMS[request.param]
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as driver:
        if request.param == "chromium":
            started = driver.chromium.launch(executable_path=program, args=OPTIONS.split())
        elif "DISPLAY" not in os.environ:
            pytest.skip("Firefox draws no WebGL without a display; try xvfb-run pytest")
        else:
            try:  # an unpatched Firefox, by WebDriver BiDi
                started = driver.firefox.launch(
                    executable_path=program, channel="moz-firefox", headless=False
                )
            except playwright.Error as error:
                if "unknown command" not in error.message:
                    raise
                pytest.skip(f"Playwright needs a newer Firefox: {error.message.splitlines()[0]}")
        yield started
        started.close()


def firefox(browser: Any) -> bool:
    return "firefox" in str(browser.browser_type.name).lower()


class Tab:
    """A page in the browser, offline, with its errors and its requests."""

    def __init__(
        self, browser: Any, file: Path, mark: str | None = "body[data-ready]", before: str = ""
    ) -> None:
        self.own = [file.as_uri()]  # its requests
        if firefox(browser):
            self.own = []  # Firefox does not report requests for files
            # The page's policy does not allow Playwright to inspect it.
            policy = r"(<|&lt;)meta http-equiv=\S*Content-Security-Policy.*"
            file.write_text(re.sub(policy, "", file.read_text("utf-8")), "utf-8")
        self.context = browser.new_context(
            viewport={"width": 1000, "height": 640}, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # so that a browser that hangs is ended
        self.faults: list[str] = []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type != "log" else None)
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("dialog", lambda d: self.faults.append(d.message))
        self.asked: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.add_init_script(before)
        self.page.goto(file.as_uri(), wait_until="commit")
        if mark:
            self.page.wait_for_selector(mark)

    def drawn(self) -> None:
        """Wait until everything has been drawn, since clicks go to what is on the screen."""
        self.page.evaluate("new Promise((go) => requestAnimationFrame(() => setTimeout(go, 50)))")

    def picture(self, pane: str = "#left") -> np.ndarray:
        """The canvas as on the screen, [H, W, 3], once everything has been drawn."""
        self.drawn()
        raw = self.page.locator(f"{pane} .stage").screenshot()
        return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())


def coloured(picture: np.ndarray) -> int:
    return int((np.ptp(picture, axis=2) > 40).sum())


@pytest.fixture(scope="module")
def scene() -> tuple[View, Why]:
    """A query with hostile names, its ground truth, a support, and winning windows."""
    image, labels = synthetic_ct(0)
    support, given = synthetic_ct(1, shape=(16, 50, 60))
    match = np.array([-1, *range(1, 14)])
    grid, size = GridSpec(1 / 2), (32, 32)
    boxes = np.tile([6, 50, 6, 60], (14, 1))
    record = Recorder(14, grid, size, boxes, [np.tile([0, 50, 0, 60], (16, 1))])
    generator = torch.Generator().manual_seed(1)
    for z in range(2, 12):
        features = torch.randn(1, 8, 4, 4, generator=generator)
        prototypes = torch.randn(1, 4, 3, 3, 8, generator=generator)
        record.add([z], [0, 1, 2, 3], features, prototypes, [[(0, z - 1), (0, z + 1)]], [(0, z)])
    why = record.result()
    shown = view(
        volume(image.astype(np.float32), tilt=0.1),
        np.roll(labels, 2, 2),
        truth=labels,
        names=HOSTILE,
        confidence={1: 0.93},
        supports=[Support(volume(support.astype(np.float32)), given, match, "<b>support</b>")],
        why=why,
        title="<i>title</i>",
    )
    return shown, why


@pytest.fixture(scope="module")
def tab(
    browser: Any, scene: tuple[View, Why], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tab]:
    opened = Tab(browser, scene[0].save(tmp_path_factory.mktemp("page") / "page.html"))
    yield opened
    assert not opened.faults
    assert [url for url in opened.asked if not url.startswith("data:")] == opened.own
    opened.context.close()


def test_a_page_draws_and_shows_names_as_text(tab: Tab) -> None:
    for pane in ("#left", "#right"):
        picture = tab.picture(pane)
        assert (picture.max(2) > 60).mean() > 0.05
        assert coloured(picture) > 500
    assert tab.text("h1") == "<i>title</i>"
    assert tab.page.title() == "<i>title</i>"
    table = tab.text("#organs")
    for name in HOSTILE.values():
        assert name.strip() in table
    assert "93 %" in table
    assert "<b>support</b>" in tab.text("#right figcaption")
    assert not tab.page.locator("#organs img, h1 i, figcaption b b").count()


def test_organs_can_be_hidden_and_shown(tab: Tab) -> None:
    tab.page.locator("input[value='1'] , #layout input").nth(1).check(force=True)
    before = coloured(tab.picture())
    boxes = tab.page.locator("#organs input")
    boxes.nth(0).uncheck()
    some = coloured(tab.picture())
    assert some < before
    tab.page.get_by_role("button", name="Hide all").click()
    assert coloured(tab.picture()) < some
    assert not any(boxes.nth(i).is_checked() for i in range(3))
    tab.page.get_by_role("button", name="Show all").click()
    assert coloured(tab.picture()) == before


def test_clicking_an_organs_name_moves_to_it(tab: Tab, scene: tuple[View, Why]) -> None:
    """The page's voxel agrees with NiiVue's, which is computed with the affine."""
    facts, image = scene[0].facts, block(scene[0], "image").get_fdata()
    for organ in facts["organs"]:
        tab.page.get_by_role("button", name=organ["name"], exact=True).click()
        z, y, x = tab.page.evaluate("lslpn.where()")
        assert [z, y, x] == organ["at"]
        said = tab.text("#here")
        assert said.startswith(f"{image[x, y, z]:g} HU")
        assert f"prediction: {organ['name'].strip()}" in said


def test_windows_change_the_grey_values(tab: Tab) -> None:
    before = tab.picture()
    tab.page.get_by_label("Lung").check(force=True)
    lung = tab.picture()
    assert lung.mean() > before.mean() + 10
    tab.page.get_by_label("Abdomen").check(force=True)
    np.testing.assert_array_equal(tab.picture(), before)


def test_slices_follow_the_key_and_the_support_follows_them(tab: Tab) -> None:
    z = tab.page.evaluate("lslpn.where()[0]")
    before = tab.picture(), tab.picture("#right")
    tab.page.locator("#left canvas").focus()
    tab.page.keyboard.press("ArrowUp")
    tab.page.keyboard.press("ArrowUp")
    assert f"slice {z + 2} of 0–13" in tab.text("#left figcaption")
    assert f"matched slice {z + 2} of 0–15" in tab.text("#right figcaption")
    for old, pane in zip(before, ("#left", "#right"), strict=True):
        assert (tab.picture(pane) != old).any()
    for _ in range(20):
        tab.page.keyboard.press("PageDown")
    assert "slice 0 of 0–13" in tab.text("#left figcaption")
    assert "is beyond the range of <b>support</b>" in tab.text("#right .stage p")
    tab.page.get_by_role("slider", name="Axial").fill(str(z))
    assert f"slice {z} of 0–13" in tab.text("#left figcaption")


def test_a_click_shows_the_winning_windows(tab: Tab, scene: tuple[View, Why]) -> None:
    why = scene[1]
    tab.drawn()
    box = tab.page.locator("#left canvas").bounding_box()
    tab.page.mouse.click(box["x"] + 0.45 * box["width"], box["y"] + 0.5 * box["height"])
    z, y, x = tab.page.evaluate("lslpn.where()")
    cell = (int((y + 0.5 - 6) / 44 * 4), int((x + 0.5 - 6) / 54 * 4))
    said = tab.text("#because")
    names = {0: "background", **HOSTILE}
    cosines = []
    for rank in range(3):
        at = (z, rank, *cell)
        window = int(why.windows[at])
        cosines.append(float(why.cosines[at]))
        assert names[int(why.labels[at])].strip() in said
        assert f"window in row {window // 3 + 1}, column {window % 3 + 1}" in said
    shown = [float(v) for v in re.findall(r"^-?\d\.\d{3}$", said, re.MULTILINE)]
    assert shown == pytest.approx(cosines, abs=6e-4)  # stored with 4 digits
    assert f"of <b>support</b>, slices {z - 1} to {z + 1}, matched {z}" in said
    # The cell, winner and runner-up on the query; winner and runner-up on the support.
    assert tab.page.locator("#left svg rect").count() == 3
    assert tab.page.locator("#right svg rect").count() == 2


def test_prediction_beside_ground_truth(tab: Tab) -> None:
    tab.page.get_by_label("Compare with").select_option(label="ground truth")
    tab.page.wait_for_selector("#right figcaption:has-text('ground truth')")
    right = tab.picture("#right")
    assert coloured(right) > 500
    assert coloured(right) != coloured(tab.picture())
    assert "ground truth: " in tab.text("#here")
    tab.page.get_by_label("Compare with").select_option(label="nothing")
    tab.page.wait_for_selector("#right", state="hidden")


def test_a_thinned_scan_in_a_notebook(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if firefox(browser):
        pytest.skip("Playwright does not click into frames of Firefox")
    monkeypatch.setattr("lslpn.viewer.find_spec", lambda name: None)
    monkeypatch.setattr("lslpn.viewer.payload._VOXELS", 10_000)
    image, labels = synthetic_ct(0)
    shown = view(volume(image.astype(np.float32)), labels)
    assert shown.facts["image"]["step"] == [2, 2, 2]
    file = tmp_path / "notebook.html"
    file.write_text(shown._repr_mimebundle_()["text/html"], "utf-8")
    opened = Tab(browser, file, None)
    frame = opened.page.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for()
    frame.get_by_role("button", name="label 1", exact=True).click()
    assert "labels: label 1" in frame.locator("#here").inner_text()
    assert not opened.faults
    opened.context.close()


def test_without_webgl_the_table_is_shown(
    browser: Any, scene: tuple[View, Why], tmp_path: Path
) -> None:
    none = "HTMLCanvasElement.prototype.getContext = () => null"
    opened = Tab(browser, scene[0].save(tmp_path / "page.html"), before=none)
    assert "no WebGL 2" in opened.text("#panes")
    assert opened.page.locator("#organs tbody tr").count() == 3
    assert not opened.faults
    opened.context.close()


@pytest.mark.parametrize("count", [None, 0, 200])
def test_pages_with_no_labels_empty_ones_and_many(
    browser: Any, tmp_path: Path, count: int | None
) -> None:
    image = synthetic_ct(0)[0]
    labels = np.zeros(image.shape, np.int16)
    if count:
        labels.ravel()[: 20 * count] = np.arange(20 * count) // 20 + 1
    file = tmp_path / "page.html"
    view(volume(image.astype(np.float32)), None if count is None else labels).save(file)
    opened = Tab(browser, file)
    opened.page.get_by_label("Axial").first.check(force=True)
    assert (opened.picture().max(2) > 60).mean() > 0.05
    assert opened.page.locator("#organs tbody tr").count() == (count or 0)
    assert opened.page.locator("#notes li").count() == (0 if count else 1)
    assert not opened.faults
    opened.context.close()


def evaluation(scores: dict[str, list[float]]) -> Evaluation:
    cases = tuple(f"case_{i}" for i in range(len(next(iter(scores.values())))))
    flat = np.tile(np.arange(32, dtype=np.float32), (32, 1)) / 32
    mask = (np.hypot(*np.mgrid[-16:16, -16:16]) < 9).astype(np.uint8)
    return Evaluation(
        dataset="<b>set</b>", model="untrained", support="case_s", queries=cases,
        organs=tuple(scores), protocol="published", average="mean", chunks=12, align="none",
        size=64, scale=1 / 8, spacing=1 / 2, seconds=1.0,
        rows=tuple(
            Row(organ, case, dice, 9, 100, 90)
            for organ, values in scores.items()
            for case, dice in zip(cases, values, strict=True)
        ),
        examples=tuple(
            Example(organ, case, 1, 2, flat, mask, flat, mask, np.roll(mask, 3), 1.0, 1.2)
            for organ in scores
            for case in cases
        ),
    )  # fmt: skip


def test_the_worst_cases_come_first_on_an_evaluation_s_page(tmp_path: Path, browser: Any) -> None:
    found = evaluation({"liver": [0.9, 0.7, 0.8], HOSTILE[1]: [0.2, 0.95, 0.5]})
    file = write_evaluation(tmp_path / "page.html", [found], {"case_0": "views/case_0.html"})
    opened = Tab(browser, file, "main")
    items = opened.page.locator("ol > li").all_inner_texts()
    assert [re.search(r"Dice (0\.\d+)", item)[1] for item in items] == [  # type: ignore[index]
        "0.200", "0.500", "0.700", "0.800", "0.900", "0.950",
    ]  # fmt: skip
    assert items[0].startswith(f"{HOSTILE[1]} in case_0")
    assert opened.page.locator("ol a").first.get_attribute("href") == "views/case_0.html"
    assert opened.page.locator("tbody tr").first.inner_text().split() == [
        "liver", "3", "0.800", "0.800", "0.700", "0.900",
    ]  # fmt: skip
    assert opened.page.locator("svg circle").count() == 6
    images = opened.page.locator("img").evaluate_all("all => all.map((i) => [i.alt, i.width])")
    assert len(images) == 18
    assert all(alt and width for alt, width in images)
    assert not opened.faults
    assert [url for url in opened.asked if not url.startswith("data:")] == opened.own
    opened.context.close()
