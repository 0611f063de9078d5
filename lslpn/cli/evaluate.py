"""`lslpn evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..config import Align, Method, Protocol
from ..errors import InputError
from .options import (
    BATCH,
    CHUNKS,
    DATA,
    FORCE,
    METHOD,
    QUIET,
    Network,
    check_new,
    fraction,
    grid_of,
    option,
    say,
    split,
)

if TYPE_CHECKING:
    import numpy as np

    from lslpn_kernels import GridSpec

    from ..checkpoint import Checkpoint
    from ..data.dataset import Dataset
    from ..data.volumes import Volume
    from ..models import FewShotNetwork


def evaluate(
    given: Network,
    *,
    data: Path = DATA,
    support: str = option("--support CASE", "The labelled case.", ...),
    untrained: bool = option(
        "--untrained", "No training: ImageNet features and a random reduction layer.", False
    ),
    method: Method | None = METHOD,
    query: list[str] | None = option(
        "--query CASE",
        "Cases to segment, repeated or with commas; default: all but the support and those that "
        "were trained on.",
    ),
    organ: list[str] | None = option(
        "--organ NAME",
        "Organs to segment, repeated or with commas; default: those that the checkpoint's "
        "training held out.",
    ),
    protocol: Protocol = option(
        "--protocol NAME",
        "Which support slice segments which query slices. [bold]published[/bold]: 12 chunks of"
        " the organ's range. [bold]senet[/bold]: 10 chunks, median over cases."
        " [bold]alpnet[/bold]: 3 chunks. [bold]adnet[/bold]: one support slice for the whole scan,"
        " without knowledge of the query's range.",
        "published",
    ),
    chunks: int | None = CHUNKS,
    align: Align | None = option(
        "--align",
        "body crops the scans to the patient's body first; default: as the checkpoint was "
        "trained, or none.",
    ),
    scale: list[str] | None = option(
        "--scale FRACTION",
        "Size of a window over the image, such as 1/8, or 1/8:1 with its own spacing; default: the "
        "model's. Repeat to evaluate several grids in one pass.",
    ),
    spacing: str | None = option(
        "--spacing FRACTION",
        "Distance of windows over their size, such as 1/2; 1 is no overlap; default: the model's.",
    ),
    out: Path = option(
        "--out DIR", "Folder for evaluation.json and the figures.", Path("evaluation")
    ),
    batch: int = BATCH,
    markdown: bool = option("--markdown", "Print the tables as Markdown.", False),
    html: bool = option(
        "--html",
        "Also write evaluation.html: the table, a box plot, the worst cases first, and a page in "
        "views/ for each case.",
        False,
    ),
    force: bool = FORCE,
    quiet: bool = QUIET,
) -> None:
    """Score a model: 3-D Dice per organ and case, with mean and median.

    Each organ is segmented in each query case from the one support case. Prints a table, and
    writes JSON and figures.

    [bold]lslpn evaluate --data DIR --checkpoint RUN --support CASE[/bold]
    """
    options = {"--checkpoint": given.checkpoint, "--weights": given.weights}
    named = [name for name, value in options.items() if value is not None]
    named += ["--untrained"] * untrained
    if len(named) != 1:
        raise InputError(
            "expected one of --checkpoint RUN, --weights NAME and --untrained, got "
            + (" and ".join(named) or "none of them")
        )
    if not untrained and method is not None:
        raise InputError("--method: a trained network has its own; only use it with --untrained")
    result = out / "evaluation.json"
    check_new(result, force)

    from ..data.dataset import Dataset
    from ..evaluation.results import save, summary
    from ..evaluation.scoring import evaluate_grids
    from ..viewer import view
    from ..viewer.evaluation import write_evaluation

    dataset = Dataset.open(data)
    wanted, asked = split(organ, dataset.organs), split(query, dataset.cases)
    model, trained = given.load(untrained=untrained, method=method)
    grids = _grids(scale, spacing, model)
    organs, queries = _choices(trained, dataset, support, wanted, asked)
    addresses: dict[str, str] = {}  # of the pages of the cases

    def show(case: str, image: Volume, truth: Volume, found: list[np.ndarray]) -> None:
        layers = {
            "prediction" if len(found) == 1 else f"prediction, grid {i}": labels
            for i, labels in enumerate(found, 1)
        }
        organ_names = {value: organ for organ, value in dataset.labels.items()}
        path = out / "views" / f"{case}.html"
        view(image, layers, truth=truth, names=organ_names, title=case).save(path)
        addresses[case] = f"views/{quote(os.fsencode(path.name))}"

    results = evaluate_grids(
        model,
        dataset,
        grids=grids,
        support=support,
        queries=queries,
        organs=organs,
        protocol=protocol,
        align=align,
        chunks=chunks,
        batch=batch,
        progress=not quiet,
        name=given.name(method),
        observe=show if html else None,
    )
    written = save(results, out)
    for one in results:
        print(one.table(markdown=markdown), end="\n\n")
    if len(results) > 1:
        print(summary(results, markdown=markdown), end="\n\n")
    figures = len(written) - 1
    print(f"written: {written[0]} and {figures} figure{'s' * (figures != 1)} beside it")
    if html:
        print(f"written: {write_evaluation(out / 'evaluation.html', results, addresses)}")


def _grids(
    scales: Sequence[str] | None, spacing: str | None, model: FewShotNetwork
) -> list[GridSpec] | None:
    """The grids to evaluate LSLPN with, or None for other methods."""
    from lslpn_kernels import GridSpec

    from ..models import LSLPN

    if not isinstance(model, LSLPN):
        if scales or spacing is not None:
            given = "--scale" if scales else "--spacing"
            raise InputError(f"{given}: {model.name} has no grid of windows; leave it out")
        return None
    own = model.head.grid
    common = own.spacing if spacing is None else fraction(spacing, "--spacing")
    grids = [grid_of(text, common) for text in split(scales)]
    return grids or [GridSpec(own.scale, common)]


def _choices(
    checkpoint: Checkpoint | None,
    dataset: Dataset,
    support: str,
    organs: list[str],
    queries: list[str],
) -> tuple[list[str], list[str]]:
    """Organs and query cases to evaluate on, with a note about those that were trained on."""
    record = {} if checkpoint is None else checkpoint.data
    held_out, learnt, trained = (record.get(k, []) for k in ("hold_out", "organs", "cases"))
    if not organs:
        organs = [name for name in held_out if name in dataset.labels]
        if not organs:
            raise InputError(
                "--organ: expected at least one, got none; known organs: "
                + ", ".join(dataset.labels)
            )
    elif seen := [organ for organ in organs if organ in learnt]:
        say(f"note: training did not hold out {', '.join(seen)}")
    if not queries:
        queries = [c for c in dataset.cases if c != support and c not in trained]
        if not queries:
            raise InputError(
                "--query: every case but the support was trained on; name cases to evaluate on"
            )
    elif seen := [c for c in queries if c in trained]:
        say(f"note: training used {', '.join(seen)} (with other organs)")
    return organs, queries
