"""The examples run as they are, and learn what they are meant to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from lslpn.viewer import View

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize(
    ("name", "options"), [("train", {}), ("train_amp_compile", {"backend": "aot_eager"})]
)
def test_the_loss_falls(name: str, options: dict[str, str]) -> None:
    """With `aot_eager` the graph is the same, and a C++ compiler is not needed."""
    losses = importlib.import_module(name).main(20, **options)
    assert losses[-1] < losses[0] / 2


def test_an_encoder_and_arrays_of_ones_own_segment() -> None:
    torch.manual_seed(0)
    assert importlib.import_module("own_encoder").main() > 0.7


def run_notebook(name: str) -> dict[str, object]:
    """What the code cells define; Jupyter is not needed."""
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit the notebook without its outputs"
            exec("".join(cell["source"]), names)
    return names


def test_the_notebook_of_the_head_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_notebook("head.ipynb")
    printed = capsys.readouterr().out
    assert "of the equations in float64" in printed
    assert float(printed.partition("Dice ")[2].split()[0]) > 0.9


def test_the_notebook_of_the_viewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lslpn.viewer.find_spec", lambda name: None)  # with and without ipyniivue
    shown = run_notebook("view.ipynb")["shown"]
    assert isinstance(shown, View)
    assert "<iframe" in shown._repr_mimebundle_()["text/html"]
    assert shown.facts["why"]["slices"]
    assert max(organ["dice"] or 0 for organ in shown.facts["organs"]) > 0.5
