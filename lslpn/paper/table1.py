"""Table 1: every method, per organ and on average, with and without added classes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.overlay import colour
from . import report
from .plan import Classes, Setup, plan_runs
from .stats import Spread, compare, holm, spread
from .store import Done, Store, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "table1"


@dataclass(frozen=True)
class Scores:
    """Every Dice of one line of the table: by seed, organ and case."""

    label: str
    dice: Mapping[int, Mapping[tuple[str, str], float]]

    def over_cases(self, average: str, organ: str, seed: int) -> float:
        """The average of an organ over its test cases, for one seed; NaN without a score."""
        found = [v for (name, _), v in self.dice[seed].items() if name == organ]
        if not found:
            return math.nan
        return statistics.median(found) if average == "median" else statistics.fmean(found)

    def organ(self, average: str, organ: str) -> Spread:
        """Mean and deviation over the seeds."""
        return spread([self.over_cases(average, organ, seed) for seed in self.dice])

    def overall(self, average: str, groups: Sequence[Sequence[str]]) -> Spread:
        """Mean over the groups of the mean over a group's organs; deviation over the seeds."""
        return spread(
            [
                _mean([_mean([self.over_cases(average, o, s) for o in group]) for group in groups])
                for s in self.dice
            ]
        )

    def pairs(self) -> dict[tuple[str, str], float]:
        """Per organ and case, the mean over the seeds: what is compared in pairs."""
        keys = dict.fromkeys(key for scores in self.dice.values() for key in scores)
        return {
            key: statistics.fmean(s[key] for s in self.dice.values() if key in s) for key in keys
        }


def run(
    store: Store,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    classes: Sequence[Classes] = ("all", "tested"),
    untrained: bool = False,
) -> list[Path]:
    """Train and evaluate everything that is not there yet, and write the table.

    Args:
        store: the experiment's folder.
        methods: the networks to compare.
        seeds: of their runs.
        classes: some of "all" (with added classes), "tested" (without) and "none" (no label).
        untrained: a line for the first method's network before training.

    Returns:
        table1.json, table1.csv, table1.md and table1.png in the folder.

    Raises:
        InputError: as `plan_runs` and `Store.results`.
    """
    setup = store.setup
    runs = plan_runs(setup, methods, seeds, classes=classes, untrained=untrained)
    name = f"{setup.protocol}-{setup.rule.chunks}-{setup.align}"
    done = store.results([Task(one, name, setup.align) for one in runs])
    lines = scores(done)
    content = report.record(NAME, setup, done, {"seeds": list(seeds), **summarise(setup, lines)})
    return report.write(
        store.folder,
        NAME,
        content,
        title=f"Table 1 on {setup.dataset.name}",
        sections=[_table(content), _comparisons(content)],
        rows=report.score_rows(done, content),
        draw=_draw,
    )


def scores(done: Sequence[Done]) -> list[Scores]:
    """The lines of the table: Dice by method and classes; folds are put together."""
    found: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    for one in done:
        run = one.task.run
        into = found.setdefault(run.label, {}).setdefault(run.seed, {})
        for row in one.evaluations[0].rows:
            into[row.organ, row.case] = row.dice
    return [Scores(label, by_seed) for label, by_seed in found.items()]


def summarise(setup: Setup, lines: Sequence[Scores]) -> dict[str, Any]:
    """The table and the comparisons, ready for JSON."""
    average = setup.rule.average
    singles = [(organ,) for organ in setup.organs]
    rows = [
        {
            "label": line.label,
            "organs": {o: dataclasses.asdict(line.organ(average, o)) for o in setup.organs},
            "mean": dataclasses.asdict(line.overall(average, singles)),
            "mean_of_folds": dataclasses.asdict(line.overall(average, setup.organ_folds)),
        }
        for line in lines
    ]
    tests = [
        compare(a.label, b.label, a.pairs(), b.pairs()) for a, b in itertools.combinations(lines, 2)
    ]
    known = [i for i, test in enumerate(tests) if test.p is not None]
    corrected = dict(zip(known, holm([tests[i].p or 0.0 for i in known]), strict=True))
    return {
        "table": rows,
        "comparisons": [
            dataclasses.asdict(dataclasses.replace(test, p_holm=corrected.get(i)))
            for i, test in enumerate(tests)
        ],
    }


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return statistics.fmean(kept) if kept else math.nan


def _table(content: Mapping[str, Any]) -> str:
    organs = [organ for fold in content["organ_folds"] for organ in fold]
    # The paper counts a pair of kidneys as one organ in its mean, others count two.
    folded = len(content["organ_folds"]) < len(organs)
    header = ["", *organs, "mean", *(["mean of folds"] if folded else [])]
    lines = [
        [
            row["label"],
            *(str(Spread(**row["organs"][organ])) for organ in organs),
            str(Spread(**row["mean"])),
            *([str(Spread(**row["mean_of_folds"]))] if folded else []),
        ]
        for row in content["table"]
    ]
    text = (
        f"Three-dimensional Dice, {content['average']} over the test cases; "
        f"{report.of_seeds(content)}. A network is never trained on the organs that it is tested "
        "on, nor on their cases. All classes: trained on every label that is not held out. Tested "
        "classes: on the organs of the other folds alone. No classes: on superpixels, without any "
        "label."
    )
    if folded:
        text += " Mean of folds counts organs that are held out together once, as the paper does."
    return report.table(text, header, lines)


def _comparisons(content: Mapping[str, Any]) -> str:
    if not content["comparisons"]:
        return ""
    lines = [
        [
            test["first"],
            test["second"],
            str(test["pairs"]),
            "-" if test["difference"] is None else f"{test['difference']:+.3f}",
            *("-" if test[p] is None else f"{test[p]:.2g}" for p in ("p", "p_holm")),
        ]
        for test in content["comparisons"]
    ]
    return report.table(
        "## Paired comparisons\n\nWilcoxon's signed-rank test, two-sided, over pairs of case and "
        "organ (Dice averaged over the seeds); the last column is corrected for their number "
        "(Holm). Organs of one case are not independent, so take p as a guide.",
        ["first", "second", "pairs", "mean difference", "p", "p corrected"],
        lines,
    )


def _draw(axes: Axes, content: Mapping[str, Any]) -> None:
    organs = [organ for fold in content["organ_folds"] for organ in fold]
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
    axes.set_ylim(0, 1)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False, ncols=2)
