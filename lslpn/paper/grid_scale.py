"""Fig. 3, left: the size of the windows, with and without overlap.

The network is trained once, with its own windows, and evaluated with every grid in one pass over
the scans, since features do not depend on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lslpn_kernels import GridSpec

from ..evaluation.overlay import colour
from ..evaluation.results import fraction
from . import report
from .plan import TrainedOn, in_words, plan_runs
from .stats import by_method, summary
from .store import Store, Task

NAME = "grid-scale"
OVERLAP = 1 / 2
DEFAULT_GRIDS = (
    *(GridSpec(scale, OVERLAP) for scale in (1 / 16, 1 / 8, 1 / 4, 1)),
    *(GridSpec(scale, 1) for scale in (1 / 16, 1 / 8, 1 / 4)),
)


def run(
    store: Store, seeds: Sequence[int], grids: Sequence[GridSpec], classes: TrainedOn
) -> list[Path]:
    """Train LSLPN if it is not trained yet, evaluate every grid, and write the comparison; raises
    as `table1.run`, and an InputError if the folder has results of other grids."""
    setup = store.setup
    store.agree(NAME, {"grids": [[grid.scale, grid.spacing] for grid in grids]})
    runs = plan_runs(setup, ["lslpn"], seeds, [classes])
    done = store.results([Task(one, setup.align, grids=tuple(grids)) for one in runs])
    table = []
    for g, grid in enumerate(grids):
        [of_seeds] = by_method(done, setup.organs, g).values()  # of one network, LSLPN
        table.append({"scale": grid.scale, "spacing": grid.spacing, **summary(of_seeds)})
    return report.publish(
        store,
        NAME + report.suffix(classes),
        done,
        {
            "seeds": list(seeds),
            "classes": None if classes == "untrained" else classes,
            "table": table,
        },
        title=f"Size of the windows on {setup.dataset.name}",
        sections=[_table],
        rows=report.score_rows(done),
        draw=_draw,
        size=(6, 4),
    )


def _table(content: report.Content) -> str:
    lines = [
        [
            fraction(row["scale"]),
            "one window" if row["scale"] == 1 else fraction(row["spacing"]),
            *row["organs"].values(),
            row["mean"],
        ]
        for row in content["table"]
    ]
    network = (
        "the network before training"
        if content["classes"] is None
        else "networks trained with windows of "
        f"{fraction(content['model']['grid_scale'])} on {in_words(content['classes'])}, "
        "the same for every line"
    )
    return report.table(
        f"Three-dimensional Dice, {content['average']} over the test cases; "
        f"{report.of_seeds(content)}; {network}. Scale is a window's side over "
        "the image's, spacing the distance of windows over their side: 1 is no overlap.",
        ["scale", "spacing", *report.organs(content), "mean"],
        lines,
    )


def _draw(axes: report.Axes, content: report.Content) -> None:
    rows = sorted(content["table"], key=lambda row: float(row["scale"]))
    scales = sorted({row["scale"] for row in rows})
    # One window covers the image at scale 1, so that point belongs to both lines.
    for label, chosen, marker, line, hue in (
        ("overlapping", [r for r in rows if r["spacing"] < 1 or r["scale"] == 1], "o", "-", 2),
        ("no overlap", [r for r in rows if r["spacing"] == 1 or r["scale"] == 1], "s", "--", 1),
    ):
        if not chosen:
            continue
        axes.errorbar(
            [scales.index(r["scale"]) for r in chosen],
            [math.nan if r["mean"]["mean"] is None else r["mean"]["mean"] for r in chosen],
            yerr=[r["mean"]["deviation"] or 0.0 for r in chosen],
            marker=marker,
            linestyle=line,
            color=colour(hue),
            capsize=2,
            label=label,
        )
    axes.set_xticks(range(len(scales)), [fraction(scale) for scale in scales])
    axes.set_xlabel("scale of the windows")
    axes.set_ylabel("mean Dice over the organs")
