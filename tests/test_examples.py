"""The examples run as they are, and their loss falls."""

from __future__ import annotations

import importlib
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lslpn.viewer import View

EXAMPLES = Path(__file__).parents[1] / "examples"
JUPYTER = all(map(find_spec, ("nbclient", "ipykernel")))


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


def test_a_custom_encoder_segments_arrays() -> None:
    torch.manual_seed(0)
    assert importlib.import_module("own_encoder").main() > 0.7


def run_notebook(name: str) -> dict[str, object]:
    """The names that the code cells define; Jupyter is not needed."""
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


def check_view(shown: View) -> None:
    assert shown.facts["why"]["slices"]
    assert max(organ["dice"] or 0 for organ in shown.facts["organs"]) > 0.5


@pytest.mark.skipif(JUPYTER, reason="it runs in Jupyter's kernel here")
def test_the_notebook_of_the_viewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lslpn.viewer.find_spec", lambda name: None)  # with and without ipyniivue
    shown = run_notebook("view.ipynb")["shown"]
    assert isinstance(shown, View)
    assert "<iframe" in shown._repr_mimebundle_()["text/html"]
    check_view(shown)


@pytest.mark.skipif(not JUPYTER, reason="nbclient and ipykernel are not installed")
def test_the_notebook_of_the_viewer_runs_in_jupyter() -> None:
    nbclient = importlib.import_module("nbclient")
    nbformat = importlib.import_module("nbformat")
    notebook = nbformat.read(EXAMPLES / "view.ipynb", as_version=4)
    # The check runs in the kernel, whose objects this process cannot inspect.
    check = f"{inspect.getsource(check_view)}\ncheck_view(shown)"
    notebook.cells.append(nbformat.v4.new_code_cell("from lslpn.viewer import View\n" + check))
    at = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=at).execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    if find_spec("ipyniivue") is None:
        assert "<iframe" in shown[-1]["text/html"]
    else:
        assert "application/vnd.jupyter.widget-view+json" in shown[-1]
