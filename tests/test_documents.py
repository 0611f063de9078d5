"""What the README shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import lslpn_kernels
from lslpn_kernels import GridSpec

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_two_commands_that_do_all_the_set_up() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert blocks[0] == "pip install -e . && lslpn demo\n"
    assert blocks[1] == 'pip install -e ".[test]" && pytest\n'


def test_the_kernels_are_equivalent_to_the_code_shown() -> None:
    shown: dict[str, Any] = {}
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def up" in b)
    exec(code, shown)
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


def test_the_options_that_the_readme_names_exist(capsys: Any) -> None:
    from lslpn.cli import main

    known = ""
    commands = ("demo", "segment", "train", "evaluate", "info", "experiment table1")
    for command in commands:
        assert main([*command.split(), "--help"]) == 0
        known += capsys.readouterr().out
    known = re.sub(r"\s+", " ", known)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(options) > 10
    assert {o for o in options if o not in known} == set()
