"""Volumetric evaluation: 3-D Dice per organ and case, by the protocols of `protocols`.

One support case, 1-way 1-shot per organ; predictions are mapped back to the query's own grid and
compared with its labels there.
"""

from __future__ import annotations

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
from ..errors import InputError
from ..models import LSLPN, FewShotNetwork
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
    """`evaluate_grids` with the model's own windows, or with a method that has none.

    Segments `organs` of the cases `queries` from the one case `support`, and scores them in 3-D;
    `options` are `protocol`, `align`, `chunks`, `batch`, `progress`, `name` and `observe`.

    Raises:
        InputError: as `evaluate_grids`.
    """
    wanted = {"support": support, "queries": queries, "organs": organs, **options}
    return evaluate_grids(model, dataset, grids=None, **wanted)[0]


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
    """Segment organs of query cases from one support case, and score them in 3-D.

    Voxels of the data set's "ignore" label enter no score. An organ that is too small for the
    network in all of its support slices is skipped; in some of them, a warning names them, and
    the query slices that they segment come out empty.

    Args:
        model: the network; its own device and input settings are used.
        dataset: where the cases are.
        grids: windows in the place of LSLPN's own, which share the encoder's work; None: its own.
            The other methods have none.
        support: the case whose labels are given.
        queries: the cases to segment; their labels score, and bound the organ's range where
            the protocol says so.
        organs: names of labels, each segmented on its own (1-way 1-shot).
        protocol: `published`, `senet`, `alpnet` or `adnet`; see `PROTOCOLS`.
        align: "body" crops support and queries to the body's box before resizing; default: as the
            model was trained, `model.config.align`.
        chunks: parts of the organ's range; default: the protocol's own.
        batch: query slices encoded at once.
        progress: show a bar on stderr.
        name: what the model is called in the result; default: its method.
        observe: called after each query case with its name, image and ground truth, and a list of
            the labels that were found, [Z, Y, X] in the frame of the image, one for each grid.

    Returns:
        a result per grid; ``seconds`` is the time of all of them together.

    Raises:
        InputError: an unknown case, organ, protocol or align; the support among the queries; an
            organ that the support does not show; no grid, or one for a method without; files that
            cannot be used.
    """
    if grids is None:
        views = [View(model.describe, model.head.grid if isinstance(model, LSLPN) else None)]
    elif not isinstance(model, LSLPN):
        raise InputError(f"grids: {model.name} has no grid of windows; give None")
    elif not grids:
        raise InputError("grids: expected at least one, got none")
    else:
        views = [View(partial(model.describe, grid=grid), grid) for grid in grids]
    rule = protocol_of(protocol, chunks)
    if align is None:
        align = model.config.align
    if align not in ("none", "body"):
        raise InputError(f"align: expected none or body, got {align!r}")
    organs = tuple(dict.fromkeys(organs))
    queries = tuple(dict.fromkeys(queries))
    if not organs or not queries:
        missing = "organs" if not organs else "queries"
        raise InputError(f"{missing}: expected at least one, got none")
    for case in (support, *queries):
        dataset.check_case(case)
    if support in queries:
        raise InputError(
            f"queries: {support} is the support, whose labels are given; take it out of the queries"
        )
    labels = {organ: dataset.label_of(organ) for organ in organs}

    started = time.perf_counter()
    runner = Runner(model, dataset, rule, align, views, labels, max(1, batch))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            runner.load_support(support)
            # All ground truths first: what is wrong with them shows before the long part begins,
            # and the bar knows its end.
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
            align=align,
            size=model.config.size,
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
