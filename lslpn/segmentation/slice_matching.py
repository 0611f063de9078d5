"""Match the slices of two scans, in order along z."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

BEYOND = -1  # in a match: the query slice lies outside of what the support covers

# Settled on the 72 ordered pairs of nine SABS cases, supports whole and cut short at either end.
# 1 mm that the support goes on more or less than the query costs as much as ...
_STRETCH_COST = 0.1  # ... so much cosine over 1 mm of the query
BEYOND_COSINE = -0.1  # what lies beyond the support fits less well than this
_LEAST_MATCHED = 7  # slices, for a line through them
_STRETCHES = (0.75, 1.33)


def slice_similarity(
    query: Tensor, support: Tensor, query_step: float, support_step: float
) -> np.ndarray:
    """How alike the slices of two scans are, from -1 to 1.

    What all slices have in common is taken off first, so that two slices are alike for what sets
    them apart from the others.

    Args:
        query: [Zq, D, cells, cells] averaged features.
        support: [Zs, D, cells, cells].
        query_step: mm between the query's slices.
        support_step: mm between the support's.

    Returns:
        float32 [Zq, Zs], the cosine of the descriptors, all cells together.
    """
    length = len(query) * query_step + len(support) * support_step
    common = (query.sum(0) * query_step + support.sum(0) * support_step) / length
    # All cells in one vector, not a cosine for each: cells of air and of skin tell little, and so
    # count little.
    a, b = (F.normalize((scan - common).flatten(1), dim=1) for scan in (query, support))
    return np.asarray((a @ b.T).numpy())


def match_slices(similarity: np.ndarray, query_step: float, support_step: float) -> np.ndarray:
    """Match every query slice with a support slice, in order along z.

    The match with the greatest sum of similarities, less a price on every millimetre by which the
    support moves on more or less than the query does. A query that reaches beyond the
    support runs off its end, above or below: slices there are matched with none. All of it can
    not: where nothing is alike, the best of the bad matches is taken.

    Args:
        similarity: [Zq, Zs], see `slice_similarity`.
        query_step: mm between the query's slices.
        support_step: mm between the support's.

    Returns:
        int [Zq]: support slices that never fall, with BEYOND before, behind, or on both sides.
    """
    match = _best_path(similarity, query_step, support_step, BEYOND_COSINE)
    if (match == BEYOND).all():
        match = _best_path(similarity, query_step, support_step, -np.inf)
    return match


def _best_path(
    similarity: np.ndarray, query_step: float, support_step: float, beyond: float
) -> np.ndarray:
    """`match_slices` by dynamic programming, with what a slice beyond the support earns."""
    count, slices = similarity.shape
    earned = similarity.astype(np.float64) * query_step
    beyond *= query_step
    # Cost of going from support slice i (row) to j (column) within one step of the query.
    ahead = (np.arange(slices)[None, :] - np.arange(slices)[:, None]) * support_step
    price = np.where(ahead >= 0, _STRETCH_COST * np.abs(ahead - query_step), np.inf)
    # Coming from below the support at slice j leaves out all before it; going above likewise.
    left_out = _STRETCH_COST * support_step * np.arange(slices)
    entry, leave = left_out, left_out[::-1]

    below_state, above_state = slices, slices + 1
    score = np.concatenate([earned[0], [beyond, beyond]])
    came_from = np.empty((count, slices + 2), np.int64)
    for z in range(1, count):
        steps = score[:slices, None] - price
        origin = steps.argmax(axis=0)
        best = steps[origin, np.arange(slices)]
        enter = score[below_state] - entry
        origin = np.where(enter > best, below_state, origin)
        best = np.maximum(best, enter) + earned[z]
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
    """The line that most matched slices lie near: Theil and Sen's, of medians.

    Args:
        match: int [Zq], see `match_slices`.
        query_step: mm between the query's slices.
        support_step: mm between the support's.

    Returns:
        mm of the support for each of the query, 0.75 to 1.33, and the height in the support of
        the query's lowest point in mm; None where too few slices are matched to tell.
    """
    (inside,) = np.nonzero(match != BEYOND)
    if len(inside) < _LEAST_MATCHED:
        return None
    query, support = (inside + 0.5) * query_step, (match[inside] + 0.5) * support_step
    apart = np.triu_indices(len(inside), len(inside) // 3)
    rises = (support[apart[1]] - support[apart[0]]) / (query[apart[1]] - query[apart[0]])
    stretch = float(np.clip(np.median(rises), *_STRETCHES))
    return stretch, float(np.median(support - stretch * query))
