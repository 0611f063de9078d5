"""One support and one query case at a time: described, segmented, and scored.

Features of a slice do not depend on the organ, nor on LSLPN's grid of windows. So a query slice is
encoded once, for all organs and all grids, in a stream: no more than a batch of features is held.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lslpn_kernels import GridSpec

from ..config import Align
from ..data.slices import Prepared, Treatment, prepare_for
from ..errors import InputError
from ..models import FewShotNetwork
from ..models.lslpn import LocalPrototypes
from .protocols import Protocol, areas
from .results import Example, Row, Skipped, dice, fraction

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.volumes import Volume

    # Called after each query case: its name, image and ground truth, and the labels found with
    # each grid of windows. Organs are segmented one by one; where two overlap, the first stays.
    Observer = Callable[[str, Volume, Volume, list[np.ndarray]], None]


@dataclass
class View:
    """One way to read the support, the model's own or LSLPN's with another grid of windows, and
    what came of it.

    Attributes:
        described: organ and support slice to what the model's `describe` made of it.
        too_small: organs of which no support slice says anything.
    """

    describe: Callable[[Tensor, Tensor], Any]
    grid: GridSpec | None
    described: dict[tuple[str, int], Any] = field(default_factory=dict)
    too_small: set[str] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def __str__(self) -> str:
        return "" if self.grid is None else f" with windows of {fraction(self.grid.scale)}"


@dataclass(frozen=True)
class Plan:
    """What is to be done with one query case.

    Attributes:
        supports: organ to query slice to the support slice that segments it.
    """

    case: str
    supports: dict[str, dict[int, int]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def slices(self) -> list[int]:
        """All slices that some organ needs."""
        return sorted({z for supports in self.supports.values() for z in supports})


def plan_of(
    dataset: Dataset,
    case: str,
    labels: dict[str, int],
    rule: Protocol,
    support_areas: dict[str, np.ndarray],
) -> Plan:
    truth = dataset.load_labels(case).data
    plan = Plan(case)
    for organ, label in labels.items():
        shown = areas(truth, label)
        pairs = rule.pairs(support_areas[organ], shown)
        if not shown.any():
            plan.skipped.append(Skipped(organ, case, "its labels do not show the organ"))
        elif not pairs:
            plan.skipped.append(
                Skipped(organ, case, f"no slice shows enough of it for protocol {rule.name}")
            )
        else:
            plan.supports[organ] = {z: pair.support for pair in pairs for z in pair.queries}
    return plan


@dataclass
class Runner:
    """What the support's slices say, and the loop over query slices.

    Attributes:
        support_areas: organ to pixels on each slice of the support.
        support_pictures: organ and support slice to image, mask, aspect.
    """

    model: FewShotNetwork
    rule: Protocol
    align: Align
    views: list[View]
    batch: int
    treatments: list[Treatment] = field(default_factory=list)
    support_areas: dict[str, np.ndarray] = field(default_factory=dict)
    support_pictures: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, float]] = field(
        default_factory=dict
    )

    def prepare(self, image: Volume, truth: Volume) -> Prepared:
        other = {"normalise": self.rule.normalise} if self.rule.normalise else {}
        ready = prepare_for(self.model.config, image, truth, align=self.align, **other)
        self.treatments.append(ready.treatment)
        return ready

    def encode(self, ready: Prepared, slices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """As many slices as are encoded at once, and their features [n, D, h, w]."""
        device = next(self.model.parameters()).device
        for begin in range(0, len(slices), self.batch):
            part = slices[begin : begin + self.batch]
            yield part, self.model.encode(torch.from_numpy(ready.slices[part]).to(device))

    def load_support(self, dataset: Dataset, case: str, labels: dict[str, int]) -> None:
        """Describe every slice that may be a support slice."""
        image, truth = dataset.load(case)
        ready = self.prepare(image, truth)
        assert ready.labels is not None
        wanted: dict[str, list[int]] = {}
        for organ, label in labels.items():
            shown = areas(truth.data, label)
            slices = self.rule.support_slices(shown)
            if not slices:
                found = f"at most {shown.max():.0f} pixels of 512 x 512 on a slice"
                raise InputError(
                    f"{truth.path}: the support {case} does not show enough of {organ} for "
                    f"protocol {self.rule.name} (found {found}); "
                    "choose another support case or leave the organ out"
                )
            self.support_areas[organ] = shown
            wanted[organ] = sorted(set(slices))
        union = sorted({z for slices in wanted.values() for z in slices})
        features: dict[int, Tensor] = {}
        for part, several in self.encode(ready, union):
            features.update(zip(part, several, strict=True))
        for organ, slices in wanted.items():
            for z in slices:
                mask = ready.labels[z] == labels[organ]
                picture = (ready.slices[z], mask.astype(np.uint8), _aspect(ready, z))
                self.support_pictures[organ, z] = picture
                masks = torch.from_numpy(mask).to(features[z].device)[None, None, None]
                for view in self.views:
                    view.described[organ, z] = view.describe(features[z][None, None], masks)
            for view in self.views:
                lost = [z for z in slices if self._says_nothing(view.described[organ, z], organ, z)]
                if lost == slices:
                    view.too_small.add(organ)
                elif lost:
                    warnings.warn(
                        f"the support {case} shows too little of {organ} for {self._input()}{view} "
                        f"on slice{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}: what they "
                        "are to segment comes out empty; a larger size may do",
                        stacklevel=4,
                    )

    def _says_nothing(self, described: Any, organ: str, z: int) -> bool:
        """Whether nothing of the organ is left of a support slice at the network's size."""
        if isinstance(described, LocalPrototypes):  # windows with too few pixels are zero
            return not bool(described.values[:, 1:].any())
        return not self.support_pictures[organ, z][1].any()

    def _input(self) -> str:
        return f"{self.model.config.size} x {self.model.config.size} pixels"

    def run(
        self,
        dataset: Dataset,
        plan: Plan,
        labels: dict[str, int],
        bar: Any,
        observe: Observer | None,
    ) -> None:
        """Segment and score one query case."""
        if not plan.supports:
            return
        image, truth = dataset.load(plan.case)
        ready = self.prepare(image, truth)
        assert ready.labels is not None
        predicted = self._segment(ready, plan, bar)
        ignored = ready.labels == dataset.ignore
        maps = [np.zeros_like(truth.data) for _ in self.views] if observe else []
        for organ, supports in plan.supports.items():
            zs = sorted(supports)
            wanted = truth.data[zs] == labels[organ]
            shown = _shown_slice(ready.labels == labels[organ], zs)
            for v, view in enumerate(self.views):
                if organ in view.too_small:
                    reason = f"the support shows too little of it for {self._input()}{view}"
                    view.skipped.append(Skipped(organ, plan.case, reason))
                    continue
                full = np.zeros(ready.slices.shape, dtype=np.uint8)
                for z, inside in predicted[organ, v].items():
                    full[z] = inside
                found = (ready.restore(full)[zs] > 0) & (truth.data[zs] != dataset.ignore)
                full[ignored] = 0
                if observe:
                    drawn = maps[v][zs]
                    drawn[found & (drawn == 0)] = labels[organ]
                    maps[v][zs] = drawn
                view.rows.append(
                    Row(
                        organ=organ,
                        case=plan.case,
                        dice=dice(found, wanted),
                        slices=len(zs),
                        truth_voxels=int(wanted.sum()),
                        predicted_voxels=int(found.sum()),
                    )
                )
                picture, mask, aspect = self.support_pictures[organ, supports[shown]]
                view.examples.append(
                    Example(
                        organ=organ,
                        case=plan.case,
                        support_slice=supports[shown],
                        query_slice=shown,
                        support_image=picture,
                        support_mask=mask,
                        query_image=ready.slices[shown],
                        truth=(ready.labels[shown] == labels[organ]).astype(np.uint8),
                        prediction=full[shown],
                        support_aspect=aspect,
                        query_aspect=_aspect(ready, shown),
                    )
                )
        if observe:
            observe(plan.case, image, truth, maps)

    def _segment(
        self, ready: Prepared, plan: Plan, bar: Any
    ) -> dict[tuple[str, int], dict[int, np.ndarray]]:
        """Organ and number of the view to slice to bool [S, S]."""
        size = (self.model.config.size, self.model.config.size)
        found: dict[tuple[str, int], dict[int, np.ndarray]] = defaultdict(dict)
        for part, features in self.encode(ready, plan.slices):
            for organ, supports in plan.supports.items():
                # Slices of one support slice go through the head together.
                for support in sorted({supports[z] for z in part if z in supports}):
                    zs = [z for z in part if supports.get(z) == support]
                    chosen = features[[part.index(z) for z in zs]][None]
                    for v, view in enumerate(self.views):
                        logits = self.model.match(chosen, view.described[organ, support], size)[0]
                        inside = logits[:, 1] > logits[:, 0]  # ties are background
                        found[organ, v].update(zip(zs, inside.cpu().numpy(), strict=True))
            bar.update(len(part))
        return found


def _aspect(ready: Prepared, z: int) -> float:
    """Height over width, in millimetres, of a pixel of a slice in the network's square."""
    _, height, width = ready.source.spacing
    y0, y1, x0, x1 = (int(v) for v in ready.boxes[z])
    return ((y1 - y0) * height) / ((x1 - x0) * width)


def _shown_slice(mask: np.ndarray, zs: Sequence[int]) -> int:
    """The slice a figure shows: the middle one of those that show the organ.

    Not the one with the best result: figures are not to flatter.
    """
    showing = [z for z in zs if mask[z].any()] or list(zs)
    return showing[len(showing) // 2]
