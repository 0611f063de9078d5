"""Evaluation on volumes: 3-D Dice per organ and case.

Each organ is segmented on its own (1-way 1-shot) from one support case. Predictions are mapped back
to the query's own grid and compared with its labels there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from lslpn_kernels import GridSpec

from ..config import Align
from ..data.dataset import Dataset
from ..data.slices import warn_unlike
from ..errors import InputError, several
from ..models import LSLPN, FewShotNetwork
from ..torch_defaults import torch_defaults
from .protocols import protocol_of
from .results import Evaluation
from .runner import Observer, Runner, View, slices_of


def evaluate(
    model: FewShotNetwork,
    dataset: Dataset,
    *,
    support: str,
    queries: Sequence[str],
    organs: Sequence[str],
    **options: Any,
) -> Evaluation:
    """Segment organs of query cases from one support case, and score them in 3-D.

    As `evaluate_grids`, but with the model's own grid of windows, if it has one. `options` may be
    `protocol`, `align`, `chunks`, `batch`, `progress`, `name` and `observe`.
    """
    [found] = evaluate_grids(
        model, dataset, grids=None, support=support, queries=queries, organs=organs, **options
    )
    return found


@torch_defaults()
def evaluate_grids(
    model: FewShotNetwork,
    dataset: Dataset,
    *,
    grids: Sequence[GridSpec] | None,
    support: str,
    queries: Sequence[str],
    organs: Sequence[str],
    protocol: str = "published",
    align: Align | None = None,
    chunks: int | None = None,
    batch: int = 8,
    progress: bool = True,
    name: str | None = None,
    observe: Observer | None = None,
) -> list[Evaluation]:
    """Segment organs of query cases from one support case, with each of several grids of windows.

    Voxels with the data set's "ignore" label are not scored. An organ is skipped if it is too small
    for the network on all support slices. If it is too small on some of them, a warning names
    these, and the query slices that they segment are left empty.

    Args:
        model: the network; its own device and input settings are used.
        dataset: where the cases are.
        grids: grids of windows for LSLPN, for which each slice is encoded only once; None for the
            model's own, and for other methods.
        support: the case whose labels are given.
        queries: the cases to segment. Their labels are used to score and, in most protocols, to
            get the organ's range.
        organs: names of labels, each segmented on its own (1-way 1-shot).
        protocol: `published`, `senet`, `alpnet` or `adnet`; see `PROTOCOLS`.
        align: "body" crops support and queries to the body before resizing; default: as the model
            was trained, `model.config.align`.
        chunks: number of parts of the organ's range; default: the protocol's own.
        batch: how many query slices to encode at once.
        progress: show a progress bar on stderr.
        name: the model's name in the result; default: its method.
        observe: called after each query case with its name, image, ground truth, and a list of
            predicted labels [Z, Y, X], one for each grid.

    Returns:
        one result per grid; ``seconds`` is their total time.

    Raises:
        InputError: an unknown case, organ, protocol or align; the support is among the queries; an
            organ is not in the support; no grid, or one for a method without grids; a file cannot
            be used.
    """
    if grids is None:
        views = [View(model.describe, model.head.grid if isinstance(model, LSLPN) else None)]
    elif not isinstance(model, LSLPN):
        raise InputError(f"grids: {model.name} has no grid of windows; give None")
    else:
        views = [View(partial(model.describe, grid=grid), grid) for grid in grids]
    organs = tuple(dict.fromkeys(several("organs", organs)))
    queries = tuple(dict.fromkeys(several("queries", queries)))
    for argument, values in (("grids", views), ("organs", organs), ("queries", queries)):
        if not values:
            raise InputError(f"{argument}: expected at least one, got none")
    rule = protocol_of(protocol, chunks)
    config = dataclasses.replace(
        model.config,
        align=model.config.align if align is None else align,
        normalise=rule.normalise or model.config.normalise,
    )
    for case in (support, *queries):
        dataset.check_case(case)
    if support in queries:
        raise InputError(
            f"queries: {support} is the support, whose labels are given; remove it from the queries"
        )
    labels = {organ: dataset.label_of(organ) for organ in organs}

    started = time.perf_counter()
    runner = Runner(model, config, dataset, rule, views, labels, max(1, batch))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            runner.load_support(support)
            # Read all ground truths first, to report problems early and to know the bar's total.
            plans = {case: runner.plan(case) for case in queries}
            total = sum(len(slices_of(plan)) for plan in plans.values())
            with tqdm(total=total, unit="slice", disable=not progress, dynamic_ncols=True) as bar:
                for case, plan in plans.items():
                    bar.set_description(case)
                    runner.run(case, plan, bar, observe)
        warn_unlike(runner.treatments)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started

    return [
        Evaluation(
            dataset=dataset.name,
            model=name or model.name,
            support=support,
            queries=queries,
            organs=organs,
            protocol=rule.name,
            average=rule.average,
            chunks=rule.chunks,
            align=config.align,
            size=config.size,
            method=model.name,
            scale=None if view.grid is None else view.grid.scale,
            spacing=None if view.grid is None else view.grid.spacing,
            seconds=round(seconds, 2),
            rows=tuple(view.rows),
            skipped=(*runner.skipped, *view.skipped),
            examples=tuple(view.examples),
        )
        for view in views
    ]
