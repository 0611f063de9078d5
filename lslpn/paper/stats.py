"""Means, deviations and tests over runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import pearsonr, spearmanr, wilcoxon

from ..evaluation.results import Evaluation, Row, average_of

if TYPE_CHECKING:
    from .store import Done


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation (n - 1) of `count` values; None if they do not exist."""

    mean: float | None
    deviation: float | None
    count: int

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        deviation = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{deviation}"


def spread(values: Sequence[float]) -> Spread:
    """The spread of the values that are not NaN, which marks a missing score."""
    kept = [value for value in values if not math.isnan(value)]
    return Spread(
        mean=statistics.fmean(kept) if kept else None,
        deviation=statistics.stdev(kept) if len(kept) > 1 else None,
        count=len(kept),
    )


def by_method(
    done: Sequence[Done], organs: Sequence[str], grid: int = 0
) -> dict[str, list[Evaluation]]:
    """For each method and choice of classes, an evaluation per seed that covers all folds; `grid`
    is the number of the grid of windows."""
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
    """The spread over the seeds of each organ's average and of the mean over the organs, ready
    for JSON."""

    def over_seeds(organ: str | None) -> dict[str, Any]:
        return asdict(spread([one.headline(organ) for one in seeds]))

    return {
        "organs": {organ: over_seeds(organ) for organ in seeds[0].organs},
        "mean": over_seeds(None),
    }


def compare(
    first: str, second: str, a: Mapping[Any, float], b: Mapping[Any, float]
) -> dict[str, Any]:
    """Compare two sets of scores by Wilcoxon's signed-rank test, two-sided.

    Scores are paired by the keys (an organ of a case) that both sets have.

    Returns:
        the names `first` and `second`, the number of "pairs", the mean "difference" of first minus
        second, its "p", and "p_holm", which `compare_all` sets; None without a pair.
    """
    differences = np.array([a[key] - b[key] for key in a if key in b])
    difference = p = None
    if len(differences):
        difference = float(differences.mean())
        # wilcoxon cannot rank pairs that are all equal.
        p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    return {
        "first": first,
        "second": second,
        "pairs": len(differences),
        "difference": difference,
        "p": p,
        "p_holm": None,
    }


def compare_all(lines: Mapping[str, Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """`compare` every two methods by the means over their seeds, with Holm's correction."""
    means: dict[str, dict[tuple[str, str], float]] = {}
    for label, seeds in lines.items():
        dice = [one.dice for one in seeds]
        keys = dict.fromkeys(key for scores in dice for key in scores)
        means[label] = {key: average_of(s[key] for s in dice if key in s) for key in keys}
    tests = [compare(a, b, means[a], means[b]) for a, b in itertools.combinations(means, 2)]
    tested = [test for test in tests if test["p"] is not None]
    for test, p in zip(tested, holm([test["p"] for test in tested]), strict=True):
        test["p_holm"] = p
    return tests


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities after Holm's correction (1979) for making len(p) tests at once."""
    order = np.argsort(p)
    larger = np.sort(p) * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(larger).clip(max=1.0)
    return [float(value) for value in corrected]


def correlate(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Correlations of paired values: the number of "points", Pearson's r as "pearson", Spearman's
    rho as "spearman"; None for fewer than 3 points or constant values."""
    defined = len(x) >= 3 and min(np.ptp(x), np.ptp(y)) > 0
    return {
        "points": len(x),
        "pearson": float(pearsonr(x, y).statistic) if defined else None,
        "spearman": float(spearmanr(x, y).statistic) if defined else None,
    }
