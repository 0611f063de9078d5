"""Match the slices of two scans, in order along z."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

BEYOND = -1  # in a match: the query slice is outside the range that the support covers

# Chosen on the 72 ordered pairs of nine SABS cases, supports whole and truncated at either end.
# Cost of 1 mm by which the support advances more or less than the query, in cosine over 1 mm.
_STRETCH_COST = 0.1
BEYOND_COSINE = -0.1  # a slice less similar than this is beyond the support
_LEAST_MATCHED = 7  # slices needed to fit a line
_SCALES = (0.75, 1.33)


def slice_similarity(
    query: Tensor, support: Tensor, query_step: float, support_step: float
) -> np.ndarray:
    """Cosine of the descriptors of every pair of slices of two scans: float32 [Zq, Zs].

    The mean over all slices is subtracted first, so that only what distinguishes a slice from the
    others counts.

    Args:
        query: [Zq, D, cells, cells] features averaged over cells.
        support: [Zs, D, cells, cells].
        query_step: mm between the query's slices.
        support_step: mm between the support's.
    """
    length = len(query) * query_step + len(support) * support_step
    common = (query.sum(0) * query_step + support.sum(0) * support_step) / length
    # One cosine over all cells, not one per cell: uninformative cells (air, skin) have short
    # vectors and so little weight.
    a, b = (F.normalize((scan - common).flatten(1), dim=1) for scan in (query, support))
    return np.asarray((a @ b.T).numpy())


def match_slices(similarity: np.ndarray, query_step: float, support_step: float) -> np.ndarray:
    """Match every query slice with a support slice, in order along z.

    Maximises the sum of similarities, less a cost for every millimetre by which the support
    advances more or less than the query. Query slices below or above the support are not matched.
    If this leaves no match at all, every query slice is matched.

    Args:
        similarity: [Zq, Zs], see `slice_similarity`, also for the steps.

    Returns:
        int [Zq]: support slices that never decrease, with BEYOND at the lower end, the upper end or
        both.
    """
    match = _best_path(similarity, query_step, support_step, BEYOND_COSINE)
    if (match == BEYOND).all():
        match = _best_path(similarity, query_step, support_step, -np.inf)
    return match


def _best_path(
    similarity: np.ndarray, query_step: float, support_step: float, beyond: float
) -> np.ndarray:
    """`match_slices` by dynamic programming, with the score of a slice beyond the support."""
    count, slices = similarity.shape
    gain = similarity.astype(np.float64) * query_step
    beyond *= query_step
    # Cost of advancing from support slice i (row) to j (column) within one step of the query.
    ahead = (np.arange(slices)[None, :] - np.arange(slices)[:, None]) * support_step
    price = np.where(ahead >= 0, _STRETCH_COST * np.abs(ahead - query_step), np.inf)
    # Entering the support at slice j skips all slices before it; leaving it, all after.
    skipped = _STRETCH_COST * support_step * np.arange(slices)
    entry, leave = skipped, skipped[::-1]

    below_state, above_state = slices, slices + 1
    score = np.concatenate([gain[0], [beyond, beyond]])
    came_from = np.empty((count, slices + 2), np.int64)
    for z in range(1, count):
        steps = score[:slices, None] - price
        origin = steps.argmax(axis=0)
        best = steps[origin, np.arange(slices)]
        enter = score[below_state] - entry
        origin = np.where(enter > best, below_state, origin)
        best = np.maximum(best, enter) + gain[z]
        last = int((score[:slices] - leave).argmax())
        leaving = score[last] - leave[last]
        stays = score[above_state] >= leaving
        came_from[z, :slices] = origin
        came_from[z, below_state] = below_state
        came_from[z, above_state] = above_state if stays else last
        above = max(score[above_state], leaving) + beyond
        score = np.concatenate([best, [score[below_state] + beyond, above]])

    path = np.empty(count, np.int64)
    path[-1] = int(score.argmax())
    for z in range(count - 1, 0, -1):
        path[z - 1] = came_from[z, path[z]]
    return np.where(path < slices, path, BEYOND)


def line_through(
    match: np.ndarray, query_step: float, support_step: float
) -> tuple[float, float] | None:
    """A line through the slices of a match, by the Theil-Sen estimator.

    Arguments as for `match_slices`, which returns the match.

    Returns:
        mm of the support per mm of the query, 0.75 to 1.33, and the height in the support of the
        query's lowest point in mm; None if too few slices are matched.
    """
    (inside,) = np.nonzero(match != BEYOND)
    if len(inside) < _LEAST_MATCHED:
        return None
    query, support = (inside + 0.5) * query_step, (match[inside] + 0.5) * support_step
    apart = np.triu_indices(len(inside), len(inside) // 3)
    rises = (support[apart[1]] - support[apart[0]]) / (query[apart[1]] - query[apart[0]])
    scale = float(np.clip(np.median(rises), *_SCALES))
    return scale, float(np.median(support - scale * query))
