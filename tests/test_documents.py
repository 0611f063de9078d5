"""The README and the pages of docs/ agree with the code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import lslpn
import lslpn_kernels
from lslpn_kernels import GridSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    p.name: p.read_text("utf-8") for p in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def test_the_tree_of_contributing_names_every_folder_once() -> None:
    tree = re.findall(
        r"```\n(csrc/.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL
    )
    named = re.findall(r"^ *(\w+)/", *tree, re.MULTILINE)
    for package in ("lslpn", "lslpn_kernels"):
        for folder in (package, *(p.parent.name for p in (ROOT / package).glob("*/__init__.py"))):
            assert named.count(folder) == (1 if folder != "lslpn" else 2), folder  # and its tests


def test_the_two_commands_that_do_all_the_set_up() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert blocks[0] == "pip install -e . && lslpn demo\n"
    assert blocks[1] == 'pip install -e ".[test]" && pytest\n'


def test_the_kernels_are_equivalent_to_the_code_shown() -> None:
    shown: dict[str, Any] = {}
    exec(next(block for block in python_of("kernels.md") if "def up" in block), shown)
    torch.manual_seed(0)
    B, K, Q, C, D, h, w, H, W = 2, 2, 3, 2, 5, 7, 6, 41, 37
    grid = GridSpec(scale=1 / 4, spacing=1 / 2)
    ys, xs = grid.axis(H), grid.axis(W)
    windows = [
        (slice(y, y + ys.window), slice(x, x + xs.window)) for y in ys.starts for x in xs.starts
    ]
    support, query = torch.randn(B, K, D, h, w).double(), torch.randn(B, Q, D, h, w).double()
    masks = torch.rand(B, K, C, H, W) > 0.7
    masks[:, :, 1, :, :20] = False  # windows without a pixel

    prototypes = lslpn_kernels.masked_average_pool(support, masks, grid, min_pixels=3)
    by_hand = shown["masked_average_pool"](support, masks, windows, min_pixels=3)
    torch.testing.assert_close(prototypes.flatten(2, 3), by_hand)
    assert (by_hand == 0).all(-1).any()

    scores = lslpn_kernels.cosine_match(query, prototypes, grid, size=(H, W))
    torch.testing.assert_close(scores, shown["cosine_match"](query, by_hand, windows, (H, W)))


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that pages name; a small network replaces the shipped one."""
    monkeypatch.chdir(tmp_path)
    affine = np.diag([-6.0, -6.0, 2.0, 1.0])  # too flat to be registered, which takes longer
    z, y, x = np.indices((18, 32, 32))
    cases = tmp_path / "DATASET"
    for folder in ("imagesTr", "labelsTr"):
        (cases / folder).mkdir(parents=True)
    for i, name in enumerate("AB"):
        body = ((y - 16) / 12) ** 2 + ((x - 16) / 14) ** 2 < 1
        organ = ((z - 8) / 6) ** 2 + ((y - 15) / 7) ** 2 + ((x - 11 - i) / 6) ** 2 < 1
        image = np.where(organ, 120.0, np.where(body, 30.0, -1000.0)) + x  # no equal columns
        files = (f"{name}.nii.gz", image.T), (f"{name}_mask.nii.gz", organ.T.astype(np.uint8))
        for file, data in files:
            nib.save(nib.Nifti1Image(data, affine), file)
        shutil.copy(files[0][0], cases / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copy(files[1][0], cases / "labelsTr" / f"{name}.nii.gz")
    meta = {"labels": {"background": 0, "spleen": 1, "liver": 2}, "file_ending": ".nii.gz"}
    (cases / "dataset.json").write_text(json.dumps(meta))
    small = lslpn.preset("published", size=32, channels=8, weights="random")
    monkeypatch.setattr(lslpn, "pretrained", lambda: lslpn.untrained(small), raising=False)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of an untrained network
def test_the_python_of_a_page_runs(page: str, scans: None) -> None:
    """Each block by itself, with a head and tensors of the names and shapes that the pages give."""
    torch.manual_seed(0)
    B, K, Q, N, D, h, w, H, W = 1, 2, 2, 2, 8, 5, 5, 24, 24
    names: dict[str, Any] = {
        "support_features": torch.randn(B, K, D, h, w),
        "support_masks": torch.zeros(B, K, N, H, W, dtype=torch.bool),
        "query_features": torch.randn(B, Q, D, h, w, requires_grad=True),
        "labels": torch.randint(N + 1, (B, Q, H, W)),
        "features": torch.randn(B, K, D, h, w),
        "masks": torch.rand(B, K, N + 1, H, W) > 0.5,
        "grid": GridSpec(scale=1 / 2),
        "head": lslpn_kernels.LocalPrototypeHead(GridSpec(scale=1 / 2)),
        "H": H,
        "W": W,
    }
    names["support_masks"][:, :, 0, :12] = names["support_masks"][:, :, 1, 12:] = True
    for block in python_of(page):
        exec(compile(block, page, "exec"), dict(names))


COMMANDS = (
    *("demo", "segment", "view", "train", "evaluate", "info"),
    *(f"experiment {name}" for name in ("table1", "grid-scale", "misalignment", "figures")),
    *(f"prepare {name}" for name in ("visceral", "btcv", "chaos", "totalsegmentator")),
)
OF_OTHERS = {"--nproc"}  # of torchrun


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def test_the_options_that_the_pages_name_exist(capsys: Any) -> None:
    from lslpn.cli import main

    known: set[str] = set()
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0
        known |= options_in(capsys.readouterr().out)
    for page, text in PAGES.items():
        assert options_in(text) - known <= OF_OTHERS, page
