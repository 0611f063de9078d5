"""Means, deviations and tests over runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.results import average_of

if TYPE_CHECKING:
    from .store import Done


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation (n - 1) of `count` values; None where they do not exist."""

    mean: float | None
    deviation: float | None
    count: int

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        deviation = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{deviation}"


def spread(values: Sequence[float]) -> Spread:
    """Of the values that are numbers; NaN, a score that is missing, is left out."""
    kept = [value for value in values if not math.isnan(value)]
    return Spread(
        mean=statistics.fmean(kept) if kept else None,
        deviation=statistics.stdev(kept) if len(kept) > 1 else None,
        count=len(kept),
    )


@dataclass(frozen=True)
class Scores:
    """Every Dice of a method: by seed, organ and case."""

    label: str
    dice: Mapping[int, Mapping[tuple[str, str], float]]

    def overall(self, average: str, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
        """A `Spread` over the seeds, as a dict: of the mean over the groups of the mean over a
        group's organs of an organ's average over its cases."""

        def of_organ(organ: str, dice: Mapping[tuple[str, str], float]) -> float:
            return average_of([v for (name, _), v in dice.items() if name == organ], average)

        return asdict(
            spread(
                [
                    average_of(average_of(of_organ(organ, dice) for organ in g) for g in groups)
                    for dice in self.dice.values()
                ]
            )
        )

    def summary(self, average: str, organs: Sequence[str]) -> dict[str, Any]:
        """`overall` of each organ, and of all of them, ready for JSON."""
        return {
            "organs": {organ: self.overall(average, [[organ]]) for organ in organs},
            "mean": self.overall(average, [[organ] for organ in organs]),
        }

    def pairs(self) -> dict[tuple[str, str], float]:
        """Per organ and case, the mean over the seeds: what is compared in pairs."""
        keys = dict.fromkeys(key for scores in self.dice.values() for key in scores)
        return {
            key: statistics.fmean(s[key] for s in self.dice.values() if key in s) for key in keys
        }


def scores(done: Sequence[Done], grid: int = 0) -> list[Scores]:
    """Dice by method and classes, with one of the grids; folds are put together."""
    found: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    for one in done:
        run = one.task.run
        into = found.setdefault(run.label, {}).setdefault(run.seed, {})
        for row in one.evaluations[grid].rows:
            into[row.organ, row.case] = row.dice
    return [Scores(label, by_seed) for label, by_seed in found.items()]


@dataclass(frozen=True)
class Comparison:
    """Wilcoxon's signed-rank test, two-sided, of paired scores.

    Attributes:
        first, second: what is compared.
        pairs: how many pairs there are.
        difference: mean of first minus second; None without a pair.
        p: probability of ranks as uneven as these if neither were better; None without a pair.
        p_holm: p after Holm's correction for the comparisons made together.
    """

    first: str
    second: str
    pairs: int
    difference: float | None
    p: float | None
    p_holm: float | None = None


def compare(first: str, second: str, a: Mapping[Any, float], b: Mapping[Any, float]) -> Comparison:
    """Compare two sets of scores over the keys (an organ of a case) that both have."""
    # scipy.stats takes most of a second to import, which `lslpn --help` need not pay.
    from scipy.stats import wilcoxon

    differences = np.array([a[key] - b[key] for key in a if key in b])
    if not len(differences):
        return Comparison(first, second, 0, None, None)
    # The test has nothing to rank where all pairs are equal; then nothing speaks for either.
    p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    return Comparison(first, second, len(differences), float(differences.mean()), p)


def compare_all(lines: Sequence[Scores]) -> list[Comparison]:
    """Every two of the methods, with Holm's correction for the number of comparisons."""
    tests = [
        compare(a.label, b.label, a.pairs(), b.pairs()) for a, b in itertools.combinations(lines, 2)
    ]
    corrected = iter(holm([test.p for test in tests if test.p is not None]))
    return [test if test.p is None else replace(test, p_holm=next(corrected)) for test in tests]


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities after Holm's correction (1979) for making len(p) tests at once."""
    order = np.argsort(p)
    larger = np.sort(p) * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(larger).clip(max=1.0)
    return [float(value) for value in corrected]


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's rho; None for fewer than 3 points or without any variation."""

    points: int
    pearson: float | None
    spearman: float | None


def correlate(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Of paired values."""
    from scipy.stats import pearsonr, spearmanr

    if len(x) < 3 or min(np.ptp(x), np.ptp(y)) == 0:
        return Correlation(len(x), None, None)
    return Correlation(len(x), float(pearsonr(x, y).statistic), float(spearmanr(x, y).statistic))
