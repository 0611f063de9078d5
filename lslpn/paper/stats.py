"""Means, deviations and tests over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
        if self.deviation is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


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

    def over_cases(self, average: str, organ: str, seed: int) -> float:
        """The average of an organ over its test cases, for one seed; NaN without a score."""
        found = [v for (name, _), v in self.dice[seed].items() if name == organ]
        if not found:
            return math.nan
        return statistics.median(found) if average == "median" else statistics.fmean(found)

    def organ(self, average: str, organ: str) -> Spread:
        """Mean and deviation over the seeds of an organ's average."""
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


def scores(done: Sequence[Done], grid: int = 0) -> list[Scores]:
    """Dice by method and classes, with one of the grids; folds are put together."""
    found: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    for one in done:
        run = one.task.run
        into = found.setdefault(run.label, {}).setdefault(run.seed, {})
        for row in one.evaluations[grid].rows:
            into[row.organ, row.case] = row.dice
    return [Scores(label, by_seed) for label, by_seed in found.items()]


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return statistics.fmean(kept) if kept else math.nan


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

    keys = [key for key in a if key in b]
    differences = np.array([a[key] - b[key] for key in keys])
    if not len(keys):
        return Comparison(first, second, 0, None, None)
    # The test has nothing to rank where all pairs are equal; then nothing speaks for either.
    p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    return Comparison(first, second, len(keys), float(differences.mean()), p)


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities after Holm's correction (1979) for making len(p) tests at once."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


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
