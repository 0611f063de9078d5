"""The examples run as they are, and learn what they are meant to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

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


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "head.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit the notebook without its outputs"
            exec("".join(cell["source"]), names)  # Jupyter is not needed
    printed = capsys.readouterr().out
    assert "of the equations in float64" in printed
    assert float(printed.partition("Dice ")[2].split()[0]) > 0.9
