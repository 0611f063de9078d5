"""Segments and scores query cases, one at a time, from one support case.

The features of a slice depend neither on the organ nor on LSLPN's grid of windows, so that a query
slice is encoded once for all of them. Only one batch of features is held in memory.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lslpn_kernels import GridSpec

from ..config import ModelConfig
from ..data.dataset import Dataset
from ..data.slices import Prepared, Treatment, prepare
from ..data.volumes import Volume
from ..errors import InputError
from ..models import FewShotNetwork, device_of
from ..models.lslpn import LocalPrototypes
from .protocols import Protocol, areas
from .results import Example, Row, Skipped, dice, fraction

# Called after each query case with its name, image, ground truth, and an array of predicted labels
# for each grid of windows. Where two organs overlap, the first one is kept.
Observer = Callable[[str, Volume, Volume, list[np.ndarray]], None]

Plan = dict[str, dict[int, int]]  # by organ and query slice, the support slice that segments it


@dataclass
class View:
    """One way to describe the support, the model's own or with another grid of windows, and its
    results."""

    describe: Callable[[Tensor, Tensor], Any]
    grid: GridSpec | None
    described: dict[tuple[str, int], Any] = field(default_factory=dict)  # by organ, support slice
    too_small: set[str] = field(default_factory=set)  # organs without any prototype
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def __str__(self) -> str:
        return "" if self.grid is None else f" with windows of {fraction(self.grid.scale)}"


@dataclass
class Runner:
    """Describes the support's slices, and segments query cases by them."""

    model: FewShotNetwork
    config: ModelConfig  # the model's, with the settings of the evaluation
    dataset: Dataset
    rule: Protocol
    views: list[View]
    labels: dict[str, int]  # the organs to segment, and their values
    batch: int
    treatments: list[Treatment] = field(default_factory=list)
    support_areas: dict[str, np.ndarray] = field(default_factory=dict)  # by organ, [Z]
    skipped: list[Skipped] = field(default_factory=list)  # in all views
    support: Prepared = field(init=False)  # set by `load_support`

    def _prepare(self, image: Volume, truth: Volume) -> Prepared:
        ready = prepare(self.config, image, truth)
        self.treatments.append(ready.treatment)
        return ready

    def _encode(self, ready: Prepared, slices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of n slices, and their features [n, D, h, w]."""
        device = device_of(self.model)
        for begin in range(0, len(slices), self.batch):
            part = slices[begin : begin + self.batch]
            yield part, self.model.encode(torch.from_numpy(ready.slices[part]).to(device))

    def _shows(self, ready: Prepared, organ: str, z: int) -> np.ndarray:
        """The mask of an organ on a slice, bool [S, S]."""
        assert ready.labels is not None
        return np.asarray(ready.labels[z] == self.labels[organ])

    def load_support(self, case: str) -> None:
        """Describe the support slices of every organ."""
        image, truth = self.dataset.load(case)
        self.support = self._prepare(image, truth)
        wanted: dict[str, list[int]] = {}
        for organ, label in self.labels.items():
            shown = areas(truth.data, label)
            wanted[organ] = sorted(set(self.rule.support_slices(shown)))
            self.support_areas[organ] = shown
            if not wanted[organ]:
                raise InputError(
                    f"{truth.path}: the support {case} does not show enough of {organ} for "
                    f"protocol {self.rule.name} (found at most {shown.max():.0f} pixels of "
                    "512 x 512 on a slice); choose another support case or leave the organ out"
                )
        union = sorted({z for slices in wanted.values() for z in slices})
        features: dict[int, Tensor] = {}
        for part, several in self._encode(self.support, union):
            features.update(zip(part, several, strict=True))
        for organ, slices in wanted.items():
            for view in self.views:
                lost = []
                for z in slices:
                    mask = self._shows(self.support, organ, z)
                    masks = torch.from_numpy(mask).to(features[z].device)[None, None, None]
                    described = view.describe(features[z][None, None], masks)
                    view.described[organ, z] = described
                    if _vanished(described, mask):
                        lost.append(z)
                if lost == slices:
                    view.too_small.add(organ)
                elif lost:
                    warnings.warn(
                        f"the support {case} shows too little of {organ} for {self._input()}{view} "
                        f"on slice{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}: the query "
                        "slices that they segment are left empty; a larger size may help",
                        stacklevel=4,
                    )

    def _input(self) -> str:
        return f"{self.config.size} x {self.config.size} pixels"

    def plan(self, case: str) -> Plan:
        """Pair query slices with support slices; organs that cannot be scored are skipped."""
        truth = self.dataset.load_labels(case).data
        plan: Plan = {}
        for organ, label in self.labels.items():
            shown = areas(truth, label)
            pairs = self.rule.pairs(self.support_areas[organ], shown)
            if not shown.any():
                self.skipped.append(Skipped(organ, case, "its labels do not show the organ"))
            elif not pairs:
                reason = f"no slice shows enough of it for protocol {self.rule.name}"
                self.skipped.append(Skipped(organ, case, reason))
            else:
                plan[organ] = {z: pair.support for pair in pairs for z in pair.queries}
        return plan

    def run(self, case: str, plan: Plan, bar: tqdm, observe: Observer | None) -> None:
        """Segment and score one query case."""
        if not plan:
            return
        image, truth = self.dataset.load(case)
        ready = self._prepare(image, truth)
        predicted = self._segment(ready, plan, bar)
        ignore = self.dataset.ignore
        maps = [np.zeros_like(truth.data) for _ in self.views] if observe else []
        for organ, supports in plan.items():
            label, zs = self.labels[organ], sorted(supports)
            wanted = truth.data[zs] == label
            for v, view in enumerate(self.views):
                if organ in view.too_small:
                    reason = f"the support shows too little of it for {self._input()}{view}"
                    view.skipped.append(Skipped(organ, case, reason))
                    continue
                full = np.zeros(ready.slices.shape, dtype=np.uint8)
                for z, inside in predicted[organ, v].items():
                    full[z] = inside
                found = (ready.restore(full)[zs] > 0) & (truth.data[zs] != ignore)
                full[ready.labels == ignore] = 0
                if observe:
                    drawn = maps[v][zs]
                    drawn[found & (drawn == 0)] = label
                    maps[v][zs] = drawn
                score, voxels = dice(found, wanted), (int(wanted.sum()), int(found.sum()))
                view.rows.append(Row(organ, case, score, len(zs), *voxels))
                view.examples.append(self._example(organ, case, supports, ready, full))
        if observe:
            observe(case, image, truth, maps)

    def _example(
        self, organ: str, case: str, supports: dict[int, int], ready: Prepared, found: np.ndarray
    ) -> Example:
        """The middle slice that shows the organ, rather than one with a good result.

        Copies the slices, because a view would keep its whole volume in memory.
        """
        zs = sorted(supports)
        showing = [z for z in zs if self._shows(ready, organ, z).any()] or zs
        z = showing[len(showing) // 2]
        return Example(
            organ=organ,
            case=case,
            support_slice=supports[z],
            query_slice=z,
            support_image=self.support.slices[supports[z]].copy(),
            support_mask=self._shows(self.support, organ, supports[z]).astype(np.uint8),
            query_image=ready.slices[z].copy(),
            truth=self._shows(ready, organ, z).astype(np.uint8),
            prediction=found[z].copy(),
            support_aspect=_aspect(self.support, supports[z]),
            query_aspect=_aspect(ready, z),
        )

    def _segment(
        self, ready: Prepared, plan: Plan, bar: tqdm
    ) -> dict[tuple[str, int], dict[int, np.ndarray]]:
        """By organ and index of the view, then by slice, the prediction, bool [S, S]."""
        size = (self.config.size, self.config.size)
        found: dict[tuple[str, int], dict[int, np.ndarray]] = defaultdict(dict)
        for part, features in self._encode(ready, slices_of(plan)):
            for organ, supports in plan.items():
                # Query slices with the same support slice go through the head together.
                for support in sorted({supports[z] for z in part if z in supports}):
                    zs = [z for z in part if supports.get(z) == support]
                    chosen = features[[part.index(z) for z in zs]][None]
                    for v, view in enumerate(self.views):
                        logits = self.model.match(chosen, view.described[organ, support], size)[0]
                        inside = logits[:, 1] > logits[:, 0]  # ties are background
                        found[organ, v].update(zip(zs, inside.cpu().numpy(), strict=True))
            bar.update(len(part))
        return found


def slices_of(plan: Plan) -> list[int]:
    """All slices that some organ needs."""
    return sorted({z for supports in plan.values() for z in supports})


def _vanished(described: Any, mask: np.ndarray) -> bool:
    """Whether the organ has vanished from a support slice at the network's size."""
    if isinstance(described, LocalPrototypes):  # zero in windows with too few pixels
        return not bool(described.values[:, 1:].any())
    return not mask.any()


def _aspect(ready: Prepared, z: int) -> float:
    """Height over width, in millimetres, of a pixel of the network's square slice."""
    _, height, width = ready.source.spacing
    y0, y1, x0, x1 = ready.boxes[z].tolist()
    return ((y1 - y0) * height) / ((x1 - x0) * width)
