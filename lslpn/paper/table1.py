"""Table 1: every method, per organ and on average, with and without added classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..evaluation.overlay import colour
from ..evaluation.results import average_of
from . import report
from .plan import TrainedOn, plan_runs
from .stats import by_method, compare_all, spread, summary
from .store import Store, Task

NAME = "table1"


def run(
    store: Store, methods: Sequence[str], seeds: Sequence[int], classes: Sequence[TrainedOn]
) -> list[Path]:
    """Train and evaluate what is not done yet, and write the table; raises as `plan_runs` and
    `Store.results`."""
    setup = store.setup
    runs = plan_runs(setup, methods, seeds, classes)
    done = store.results([Task(one, setup.align) for one in runs])
    lines = by_method(done, setup.organs)
    table = []
    for label, of_seeds in lines.items():
        means = [
            average_of(
                average_of(one.headline(organ) for organ in fold) for fold in setup.organ_folds
            )
            for one in of_seeds
        ]
        table.append({"label": label, **summary(of_seeds), "mean_of_folds": asdict(spread(means))})
    return report.publish(
        store,
        NAME,
        done,
        {"seeds": list(seeds), "table": table, "comparisons": compare_all(lines)},
        title=f"Table 1 on {setup.dataset.name}",
        sections=[_table, _comparisons],
        rows=report.score_rows(done),
        draw=_draw,
    )


def _table(content: report.Content) -> str:
    organs = report.organs(content)
    text = (
        f"Three-dimensional Dice, {content['average']} over the test cases; "
        f"{report.of_seeds(content)}. A network is never trained on the organs that it is tested "
        "on, nor on their cases. All classes: trained on every label that is not held out. Tested "
        "classes: only on the organs of the other folds. No classes: on superpixels, without any "
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
        "organ (Dice averaged over the seeds); the last column is corrected for the number of "
        "tests (Holm). Organs of one case are not independent, so take p as a guide.",
        ["first", "second", "pairs", "mean difference", "p", "p corrected"],
        lines,
    )


def _draw(axes: report.Axes, content: report.Content) -> None:
    organs = report.organs(content)
    rows = content["table"]
    width = 0.8 / len(rows)
    for r, row in enumerate(rows):
        values = [*row["organs"].values(), row["mean"]]
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
