"""Table 1: every method, per organ and on average, with and without added classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.overlay import colour
from ..evaluation.results import Evaluation
from . import report
from .plan import Classes, Setup, plan_runs
from .stats import by_method, compare_all, mean_of_folds, summary
from .store import Store, Task

NAME = "table1"


def run(
    store: Store,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    classes: Sequence[Classes] = ("all", "tested"),
    untrained: bool = False,
) -> list[Path]:
    """Train and evaluate everything that is not there yet, and write the table.

    `classes` are some of "all" (with added classes), "tested" (without) and "none" (no label);
    `untrained` adds a line for the first method's network before training.

    Returns:
        table1.json, .csv, .md, .html and .png in the folder.

    Raises:
        InputError: as `plan_runs` and `Store.results`.
    """
    setup = store.setup
    runs = plan_runs(setup, methods, seeds, classes=classes, untrained=untrained)
    done = store.results([Task(one, setup.align) for one in runs])
    return report.publish(
        store,
        NAME,
        done,
        {"seeds": list(seeds), **summarise(setup, by_method(done, setup.organs))},
        title=f"Table 1 on {setup.dataset.name}",
        sections=[_table, _comparisons],
        rows=lambda content: report.score_rows(done, content),
        draw=_draw,
    )


def summarise(setup: Setup, lines: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """The table and the comparisons, ready for JSON."""
    return {
        "table": [
            {
                "label": label,
                **summary(seeds),
                "mean_of_folds": mean_of_folds(seeds, setup.organ_folds),
            }
            for label, seeds in lines.items()
        ],
        "comparisons": [dataclasses.asdict(test) for test in compare_all(lines)],
    }


def _table(content: report.Content) -> str:
    organs = report.organs(content)
    text = (
        f"Three-dimensional Dice, {content['average']} over the test cases; "
        f"{report.of_seeds(content)}. A network is never trained on the organs that it is tested "
        "on, nor on their cases. All classes: trained on every label that is not held out. Tested "
        "classes: on the organs of the other folds alone. No classes: on superpixels, without any "
        "label."
    )
    means = ["mean"]
    # The paper counts a pair of kidneys as one organ in its mean, others count two.
    if len(content["organ_folds"]) < len(organs):
        text += " Mean of folds counts organs that are held out together once, as the paper does."
        means.append("mean_of_folds")
    header = ["", *organs, *(name.replace("_", " ") for name in means)]
    lines = [
        [row["label"], *row["organs"].values(), *(row[name] for name in means)]
        for row in content["table"]
    ]
    return report.table(text, header, lines)


def _comparisons(content: report.Content) -> str:
    if not content["comparisons"]:
        return ""
    forms = {"difference": "+.3f", "p": ".2g", "p_holm": ".2g"}
    lines = [
        [test["first"], test["second"], test["pairs"]]
        + ["-" if test[name] is None else format(test[name], form) for name, form in forms.items()]
        for test in content["comparisons"]
    ]
    return report.table(
        "## Paired comparisons\n\nWilcoxon's signed-rank test, two-sided, over pairs of case and "
        "organ (Dice averaged over the seeds); the last column is corrected for their number "
        "(Holm). Organs of one case are not independent, so take p as a guide.",
        ["first", "second", "pairs", "mean difference", "p", "p corrected"],
        lines,
    )


def _draw(axes: report.Axes, content: report.Content) -> None:
    organs = report.organs(content)
    rows = content["table"]
    width = 0.8 / len(rows)
    for r, row in enumerate(rows):
        values = [*(row["organs"][organ] for organ in organs), row["mean"]]
        axes.bar(
            [i + (r - (len(rows) - 1) / 2) * width for i in range(len(values))],
            [v["mean"] or 0.0 for v in values],
            width,
            yerr=[v["deviation"] or 0.0 for v in values],
            color=colour(r + 1),
            label=row["label"],
            error_kw={"linewidth": 0.8},
        )
    names = [*(organ.replace("_", " ") for organ in organs), "mean"]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("Dice")
