"""Means, deviations and tests over runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.results import Evaluation, Row, average_of

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


def by_method(
    done: Sequence[Done], organs: Sequence[str], grid: int = 0
) -> dict[str, list[Evaluation]]:
    """By method and classes an evaluation of all folds for each seed, with one of the grids."""
    found: dict[str, dict[int, list[Row]]] = {}
    for one in done:
        run = one.task.run
        rows = found.setdefault(run.label, {}).setdefault(run.seed, [])
        rows += one.evaluations[grid].rows
    whole = replace(done[0].evaluations[grid], organs=tuple(organs))
    return {
        label: [replace(whole, rows=tuple(rows)) for rows in seeds.values()]
        for label, seeds in found.items()
    }


def summary(seeds: Sequence[Evaluation]) -> dict[str, Any]:
    """The spread over the seeds of each organ's average, and of the mean over the organs, ready
    for JSON."""

    def over_seeds(organ: str | None) -> dict[str, Any]:
        return asdict(spread([one.headline(organ) for one in seeds]))

    return {
        "organs": {organ: over_seeds(organ) for organ in seeds[0].organs},
        "mean": over_seeds(None),
    }


def mean_of_folds(seeds: Sequence[Evaluation], folds: Sequence[Sequence[str]]) -> dict[str, Any]:
    """As "mean" of `summary`, where organs that are held out together count once."""
    means = [
        average_of(average_of(one.headline(organ) for organ in fold) for fold in folds)
        for one in seeds
    ]
    return asdict(spread(means))


@dataclass(frozen=True)
class Comparison:
    """Wilcoxon's signed-rank test, two-sided, of paired scores; numbers are None without a pair."""

    first: str
    second: str
    pairs: int
    difference: float | None  # mean of first minus second
    p: float | None  # probability of ranks as uneven as these if neither were better
    p_holm: float | None = None  # after Holm's correction for the comparisons made together


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


def compare_all(lines: Mapping[str, Sequence[Evaluation]]) -> list[Comparison]:
    """Every two of the methods, with Holm's correction for the number of comparisons.

    Compared in pairs is the mean over the seeds, per organ and case.
    """
    means: dict[str, dict[tuple[str, str], float]] = {}
    for label, seeds in lines.items():
        dice = [one.dice for one in seeds]
        keys = dict.fromkeys(key for scores in dice for key in scores)
        means[label] = {key: average_of(s[key] for s in dice if key in s) for key in keys}
    tests = [compare(a, b, means[a], means[b]) for a, b in itertools.combinations(means, 2)]
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
