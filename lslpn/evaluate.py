"""Volumetric evaluation: 3-D Dice per organ and case, with the protocols of the literature.

A protocol says which slices of a query are segmented, and with which slice of the support each
of them is: see `PROTOCOLS`. Everything else is shared: one support case, 1-way 1-shot per organ,
predictions brought back into the query's own grid and compared there with its labels.

Features of a slice do not depend on the organ, nor on the grid of windows. So a query slice is
encoded once, for all organs and all grids, in a stream: no more than a batch of features is held.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lslpn_kernels import GridSpec, cosine_match, masked_average_pool

from .atomic import write_text
from .errors import InputError
from .figures import Panel, overlay
from .prepare import Prepared, prepare

if TYPE_CHECKING:
    from .dataset import Dataset
    from .model import LSLPN
    from .volumes import Volume

# The published thresholds count pixels of 512 x 512 slices.
_REFERENCE_PIXELS = 512 * 512


# --- protocols ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Query slices that one support slice segments.

    Attributes:
        support: index of the support slice.
        queries: indices of the query slices, rising, at least one.
    """

    support: int
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Protocol(ABC):
    """Which support slice segments which query slices.

    Attributes:
        chunks: parts into which the organ's range is cut.
        name: what the command line calls it.
        average: how its authors average over the query cases.
        normalise: how its authors bring grey values to [0, 1], where it is not up to the model.
        needs_query_range: whether the query's own ground truth says where the organ is.
    """

    chunks: int
    name: ClassVar[str]
    average: ClassVar[Literal["mean", "median"]] = "mean"
    normalise: ClassVar[Literal["slice", "volume", "window"] | None] = None
    needs_query_range: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise InputError(f"chunks: expected 1 or more, got {self.chunks}")

    def pairs(self, support_areas: np.ndarray, query_areas: np.ndarray) -> list[Pair]:
        """The pairs of support and query slices for one organ.

        Areas are in pixels of a slice of 512 x 512, as the protocols' thresholds are; see `areas`.

        Args:
            support_areas: [Zs] area of the organ on each slice of the support.
            query_areas: [Zq] area of the organ on each slice of the query.

        Returns:
            pairs whose query slices do not overlap, in rising order; empty where the protocol
            finds the organ in the support or in the query on no slice.
        """
        supports = self.support_slices(np.asarray(support_areas))
        groups = self.query_groups(np.asarray(query_areas))
        if not supports:
            return []
        return [
            Pair(support, group) for support, group in zip(supports, groups, strict=True) if group
        ]

    @abstractmethod
    def support_slices(self, areas: np.ndarray) -> list[int]:
        """The support slice of each chunk; empty where the organ is on no slice."""

    @abstractmethod
    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        """The query slices of each chunk; chunks of a short organ may be empty."""


def _middles(length: int, chunks: int) -> list[int]:
    """Positions of the middles of `chunks` equal parts of `length` slices."""
    return [((2 * i + 1) * length) // (2 * chunks) for i in range(chunks)]


def _cut(slices: Sequence[int], chunks: int) -> list[tuple[int, ...]]:
    """Slices in `chunks` equal parts; a slice belongs to the part that its centre lies in."""
    parts: list[list[int]] = [[] for _ in range(chunks)]
    for position, index in enumerate(slices):
        parts[(2 * position + 1) * chunks // (2 * len(slices))].append(index)
    return [tuple(part) for part in parts]


def _above(areas: np.ndarray, threshold: float) -> list[int]:
    """Slices with an area above the threshold."""
    return [int(z) for z in np.flatnonzero(areas > threshold)]


def _nearest(slices: Sequence[int], wanted: int) -> int:
    """The slice that lies nearest to the wanted one; of two, the lower."""
    return min(slices, key=lambda z: (abs(z - wanted), z))


def _range(slices: Sequence[int], *, drop_last: bool = False) -> list[int]:
    """All slices from the first to the last of some."""
    if not slices:
        return []
    full = list(range(slices[0], slices[-1] + 1))
    return full[:-1] if drop_last and len(full) > 1 else full


@dataclass(frozen=True)
class Published(Protocol):
    """The protocol of the authors' published LSLPN code.

    The organ's range runs from the first to the last slice with more than 200 pixels of it, the
    last one dropped, in the support and (by its ground truth) in the query. Both are cut into 12
    equal chunks; the middle slice of each support chunk segments the query's chunk. Where a
    middle slice does not itself show more than 200 pixels (an organ in two pieces), the nearest
    one that does stands in. Dice on the query's range; mean over the query cases.
    """

    chunks: int = 12
    min_pixels: float = 200
    name = "published"

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = _above(areas, self.min_pixels)
        span = _range(shown, drop_last=True)
        if not span:
            return []
        middles = [span[m] for m in _middles(len(span), self.chunks)]
        return [_nearest(shown, m) for m in middles]

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        span = _range(_above(areas, self.min_pixels), drop_last=True)
        return _cut(span, self.chunks)


@dataclass(frozen=True)
class SENet(Protocol):
    """The protocol of SENet (Roy et al. 2020), as their code has it.

    Of the support slices with more than 10 pixels of the organ, K = 10 near the centres of K equal
    parts. The L query slices from the first to the last that shows the organ fall into groups
    that start at round(linspace(0, L - 1, K)): K - 1 groups and a last one of a single slice.
    Dice on that range; median over the query cases, then the mean over the organs. Grey values
    are brought to [0, 1] by the minimum and maximum of the volume.
    """

    chunks: int = 10
    min_pixels: float = 10
    name = "senet"
    average = "median"
    normalise = "volume"

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = _above(areas, self.min_pixels)
        return [shown[m] for m in _middles(len(shown), self.chunks)] if shown else []

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        span = _range(_above(areas, 0))
        if not span:
            return [()] * self.chunks
        starts = np.round(np.linspace(0, len(span) - 1, self.chunks)).astype(int)
        ends = [*starts[1:], len(span)]
        return [tuple(span[a:b]) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class ALPNet(Protocol):
    """The protocol of SSL-ALPNet (Ouyang et al. 2020), as their code has it.

    3 parts. The support slices lie at 1/6, 1/2 and 5/6 of those that show the organ; a query
    slice belongs to the part that its position in the organ's ground-truth range falls into.
    Dice on that range; mean over the query cases.
    """

    chunks: int = 3
    name = "alpnet"

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = _above(areas, 0)
        return [shown[m] for m in _middles(len(shown), self.chunks)] if shown else []

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        return _cut(_range(_above(areas, 0)), self.chunks)


@dataclass(frozen=True)
class ADNet(Protocol):
    """The second protocol of ADNet (Hansen et al. 2022), "EP2": the one a user is in.

    The middle one of the support slices that show the organ segments ALL slices of the query;
    where the organ lies in the query is not told. Dice over the whole volume, mean over cases.
    """

    chunks: int = 1
    name = "adnet"
    needs_query_range = False

    def __post_init__(self) -> None:
        if self.chunks != 1:
            raise InputError(
                f"chunks: the protocol adnet has one support slice for the whole volume, got "
                f"{self.chunks}; leave the option out or take another protocol"
            )

    def support_slices(self, areas: np.ndarray) -> list[int]:
        shown = _above(areas, 0)
        return [shown[len(shown) // 2]] if shown else []

    def query_groups(self, areas: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(range(len(areas)))]


PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (Published(), SENet(), ALPNet(), ADNet())}


def protocol_of(name: str, chunks: int | None = None) -> Protocol:
    """A protocol by its name, with another number of chunks if given.

    Raises:
        InputError: an unknown name, or chunks that it cannot have.
    """
    if name not in PROTOCOLS:
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    found = PROTOCOLS[name]
    return found if chunks is None else dataclasses.replace(found, chunks=chunks)


def areas(labels: np.ndarray, label: int) -> np.ndarray:
    """The area of a label on each slice, in pixels of a slice of 512 x 512.

    The published thresholds count pixels of such slices. Scaled so, they mean the same share of
    the image at any size: 200 pixels are 50 of a slice of 257 x 257.

    Args:
        labels: [Z, Y, X] whole numbers.

    Returns:
        float64 [Z].
    """
    counts = (labels == label).sum(axis=(1, 2))
    return np.asarray(counts * (_REFERENCE_PIXELS / (labels.shape[1] * labels.shape[2])))


# --- results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One organ in one query case.

    Attributes:
        organ: its name in the data set.
        case: the query.
        dice: 2 |P n T| / (|P| + |T|) over the voxels of the protocol's slices, 0 to 1.
        slices: how many slices that were.
        truth_voxels, predicted_voxels: |T| and |P|.
    """

    organ: str
    case: str
    dice: float
    slices: int
    truth_voxels: int
    predicted_voxels: int


@dataclass(frozen=True)
class Skipped:
    """An organ that could not be scored in a query case, and why."""

    organ: str
    case: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A query slice in the network's frame, for a figure; arrays are [S, S]."""

    organ: str
    case: str
    support_slice: int
    query_slice: int
    support_image: np.ndarray
    support_mask: np.ndarray
    query_image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    support_aspect: float
    query_aspect: float


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, and everything it depended on."""

    dataset: str
    model: str
    support: str
    queries: tuple[str, ...]
    organs: tuple[str, ...]
    protocol: str
    average: Literal["mean", "median"]
    chunks: int
    align: str
    size: int
    scale: float
    spacing: float
    seconds: float
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()
    examples: tuple[Example, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def scores(self, organ: str) -> list[float]:
        """The Dice of an organ in each query case that was scored."""
        return [row.dice for row in self.rows if row.organ == organ]

    def mean(self, organ: str | None = None) -> float:
        """Mean Dice over the query cases; without an organ, the mean of that over the organs.

        NaN where nothing was scored; organs without a score do not enter the overall mean.
        """
        return self._average(statistics.fmean, organ)

    def median(self, organ: str | None = None) -> float:
        """Median Dice over the query cases; without an organ, the mean of that over the organs."""
        return self._average(statistics.median, organ)

    def _average(self, average: Any, organ: str | None) -> float:
        if organ is not None:
            scores = self.scores(organ)
            return float(average(scores)) if scores else math.nan
        organs = [v for v in (self._average(average, o) for o in self.organs) if not math.isnan(v)]
        return statistics.fmean(organs) if organs else math.nan

    def headline(self, organ: str | None = None) -> float:
        """The average that the protocol's authors report: `mean` or `median`."""
        return self.median(organ) if self.average == "median" else self.mean(organ)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON takes it; a score that is missing is None."""
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("rows", "skipped", "examples")
        }
        names = (*self.organs, None)
        return {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
            "mean": {n or "all": _or_none(self.mean(n)) for n in names},
            "median": {n or "all": _or_none(self.median(n)) for n in names},
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "skipped": [dataclasses.asdict(skip) for skip in self.skipped],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self, *, markdown: bool = False) -> str:
        """Organs down, cases across, with mean and median; plain text or Markdown."""
        title = (
            f"{self.dataset}: {self.model}, protocol {self.protocol}, "
            f"{self.chunks} chunk{'s' * (self.chunks != 1)}, support {self.support}, "
            f"{self.size}x{self.size}, scale {fraction(self.scale)}, "
            f"spacing {fraction(self.spacing)}, align {self.align}"
        )
        by_key = {(row.organ, row.case): row.dice for row in self.rows}
        # Many cases do not fit on a line; their rows are in the JSON.
        cases = self.queries if len(self.queries) <= 10 else ()
        header = ["organ", *cases, "mean", "median"]
        lines = [
            [
                organ,
                *(_score(by_key.get((organ, case), math.nan)) for case in cases),
                _score(self.mean(organ)),
                _score(self.median(organ)),
            ]
            for organ in self.organs
        ]
        if len(self.organs) > 1:
            blank = [""] * len(cases)
            lines.append(["all", *blank, _score(self.mean()), _score(self.median())])
        text = _render(title, header, lines, markdown)
        for skip in self.skipped:
            text += f"\nskipped: {skip.organ} in {skip.case}: {skip.reason}"
        return text


def fraction(value: float) -> str:
    """A scale or spacing as people write it: 0.125 as 1/8."""
    near = Fraction(value).limit_denominator(64)
    return str(near) if abs(float(near) - value) < 1e-9 else f"{value:g}"


def summary(evaluations: Sequence[Evaluation], *, markdown: bool = False) -> str:
    """One line per evaluation: the grid and the average Dice of each organ."""
    first = evaluations[0]
    header = ["scale", "spacing", *first.organs, "all"]
    lines = [
        [
            fraction(e.scale),
            fraction(e.spacing),
            *(_score(e.headline(o)) for o in first.organs),
            _score(e.headline()),
        ]
        for e in evaluations
    ]
    title = f"{first.dataset}: {first.average} Dice over {len(first.queries)} cases, by grid"
    return _render(title, header, lines, markdown)


def save(evaluations: Sequence[Evaluation], folder: str | Path) -> list[Path]:
    """Write `evaluation.json` and a figure per query case into a folder.

    The JSON holds a list "evaluations", one for each grid of windows. A figure has a row for each
    organ: the support slice with its mask, the query slice, the ground truth, and the prediction
    of each grid.

    Returns:
        the files written.

    Raises:
        InputError: the folder cannot be written.
    """
    root = Path(folder)
    content = {"versions": versions(), "evaluations": [e.to_dict() for e in evaluations]}
    written = [root / "evaluation.json"]
    write_text(written[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
    first = evaluations[0]
    dice = [{(r.organ, r.case): r.dice for r in e.rows} for e in evaluations]
    for case in first.queries:
        rows = []
        for index, shown in enumerate(first.examples):
            if shown.case != case:
                continue
            label = first.organs.index(shown.organ) + 1
            row = [
                Panel(
                    shown.support_image,
                    shown.support_mask * label,
                    f"support {first.support}, slice {shown.support_slice}",
                    shown.support_aspect,
                ),
                Panel(
                    shown.query_image,
                    None,
                    f"query {case}, slice {shown.query_slice}",
                    shown.query_aspect,
                ),
                Panel(shown.query_image, shown.truth * label, "ground truth", shown.query_aspect),
            ]
            for evaluation, scores in zip(evaluations, dice, strict=True):
                grid = (
                    f"scale {fraction(evaluation.scale)}, spacing {fraction(evaluation.spacing)}"
                    if len(evaluations) > 1
                    else "prediction"
                )
                prediction = evaluation.examples[index].prediction
                row.append(
                    Panel(
                        shown.query_image,
                        prediction * label,
                        f"{grid}\n3-D Dice {scores[shown.organ, case]:.2f}",
                        shown.query_aspect,
                    )
                )
            rows.append(row)
        if rows:
            names = {i + 1: organ for i, organ in enumerate(first.organs)}
            written.append(overlay(root / "figures" / f"{case}.png", rows, names))
    return written


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lslpn", "numpy", "nibabel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _render(title: str, header: Sequence[str], lines: Iterable[Sequence[str]], md: bool) -> str:
    # rich comes with typer; imported here because nothing else in this module needs it.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN if md else box.SIMPLE_HEAD, title=None, pad_edge=md)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Wide enough for any table: a file or a pipe has no width to keep to.
    out = io.StringIO()
    Console(file=out, width=400, color_system=None).print(table)
    body = "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
    return f"{title}\n\n{body}\n" if md else f"{title}\n{body}"


# --- the evaluation -------------------------------------------------------------------------


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |P n T| / (|P| + |T|) of two boolean arrays of one shape; 1.0 where both are empty."""
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: expected the shape of truth {truth.shape}, got {prediction.shape}"
        )
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    if total == 0:
        return 1.0
    return 2.0 * int(np.count_nonzero(prediction & truth)) / total


def evaluate(
    model: LSLPN,
    dataset: Dataset,
    *,
    support: str,
    queries: Sequence[str],
    organs: Sequence[str],
    protocol: str = "published",
    align: Literal["none", "body"] = "none",
    chunks: int | None = None,
    batch: int = 8,
    progress: bool = True,
    name: str = "lslpn",
) -> Evaluation:
    """Segment organs of query cases from one support case, and score them in 3-D.

    Args:
        model: the network; its own device and input settings are used.
        dataset: where the cases are.
        support: the case whose labels are given.
        queries: the cases to segment; their labels score, and bound the organ's range where
            the protocol says so.
        organs: names of labels, each segmented on its own (1-way 1-shot).
        protocol: `published`, `senet`, `alpnet` or `adnet`; see `PROTOCOLS`.
        align: "body" crops support and queries to the body's box before resizing.
        chunks: parts of the organ's range; default: the protocol's own.
        batch: query slices encoded at once.
        progress: show a bar on stderr.
        name: what the model is called in the result.

    Raises:
        InputError: an unknown case, organ, protocol or align; the support among the queries; an
            organ that the support does not show; files that cannot be used.
    """
    return evaluate_grids(
        model,
        dataset,
        grids=[model.head.grid],
        support=support,
        queries=queries,
        organs=organs,
        protocol=protocol,
        align=align,
        chunks=chunks,
        batch=batch,
        progress=progress,
        name=name,
    )[0]


def evaluate_grids(
    model: LSLPN,
    dataset: Dataset,
    *,
    grids: Sequence[GridSpec],
    support: str,
    queries: Sequence[str],
    organs: Sequence[str],
    protocol: str = "published",
    align: Literal["none", "body"] = "none",
    chunks: int | None = None,
    batch: int = 8,
    progress: bool = True,
    name: str = "lslpn",
) -> list[Evaluation]:
    """`evaluate` for several grids of windows at once, which share the encoder's work.

    Args:
        grids: the grids, each in the place of the model's own; one result for each.

    Returns:
        a result per grid; ``seconds`` is the time of all of them together.

    Raises:
        InputError: as `evaluate`.
    """
    rule = protocol_of(protocol, chunks)
    if align not in ("none", "body"):
        raise InputError(f"align: expected none or body, got {align!r}")
    organs = tuple(dict.fromkeys(organs))
    queries = tuple(dict.fromkeys(queries))
    if not grids or not organs or not queries:
        missing = "grids" if not grids else "organs" if not organs else "queries"
        raise InputError(f"{missing}: expected at least one, got none")
    for case in (support, *queries):
        dataset.check_case(case)
    if support in queries:
        raise InputError(
            f"query: {support} is the support, whose labels are given; take it out of the queries"
        )
    labels = {organ: dataset.label_of(organ) for organ in organs}

    started = time.perf_counter()
    runner = _Runner(model, rule, align, list(grids), max(1, batch))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            runner.load_support(dataset, support, labels)
            # All ground truths first: what is wrong with them shows before the long part begins,
            # and the bar knows its end.
            plans = [_plan(dataset, case, labels, rule, runner.support_areas) for case in queries]
            total = sum(len(plan.slices) for plan in plans)
            with tqdm(total=total, unit="slice", disable=not progress, dynamic_ncols=True) as bar:
                for plan in plans:
                    bar.set_description(plan.case)
                    runner.run(dataset, plan, labels, bar)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started

    return [
        Evaluation(
            dataset=dataset.name,
            model=name,
            support=support,
            queries=queries,
            organs=organs,
            protocol=rule.name,
            average=rule.average,
            chunks=rule.chunks,
            align=align,
            size=model.config.size,
            scale=grid.scale,
            spacing=grid.spacing,
            seconds=round(seconds, 2),
            rows=tuple(runner.rows[g]),
            skipped=tuple(skip for plan in plans for skip in plan.skipped),
            examples=tuple(runner.examples[g]),
        )
        for g, grid in enumerate(grids)
    ]


@dataclass(frozen=True)
class _Plan:
    """What is to be done with one query case."""

    case: str
    pairs: dict[str, list[Pair]]
    skipped: list[Skipped]

    @property
    def slices(self) -> list[int]:
        """All slices that some organ needs."""
        return sorted({z for pairs in self.pairs.values() for p in pairs for z in p.queries})


def _plan(
    dataset: Dataset,
    case: str,
    labels: dict[str, int],
    rule: Protocol,
    support_areas: dict[str, np.ndarray],
) -> _Plan:
    truth = dataset.load_labels(case).data
    plan = _Plan(case, {}, [])
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
            plan.pairs[organ] = pairs
    return plan


class _Runner:
    """The support's prototypes, and the loop over query slices."""

    def __init__(
        self,
        model: LSLPN,
        rule: Protocol,
        align: Literal["none", "body"],
        grids: list[GridSpec],
        batch: int,
    ) -> None:
        self.model = model
        self.rule = rule
        self.align = align
        self.grids = grids
        self.batch = batch
        self.device = next(model.parameters()).device
        self.support_areas: dict[str, np.ndarray] = {}
        # organ, support slice, grid -> [1, 2, Gy, Gx, D]
        self.prototypes: dict[tuple[str, int, int], Tensor] = {}
        # organ, support slice -> image, mask, aspect
        self.support_pictures: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, float]] = {}
        self.rows: list[list[Row]] = [[] for _ in grids]
        self.examples: list[list[Example]] = [[] for _ in grids]

    def prepare(self, image: Volume, truth: Volume) -> Prepared:
        config = self.model.config
        return prepare(
            image,
            truth,
            size=config.size,
            align=self.align,
            window=config.window,
            normalise=self.rule.normalise or config.normalise,
        )

    def encode(self, slices: np.ndarray) -> Tensor:
        """[n, S, S] grey -> [n, D, h, w]."""
        features: Tensor = self.model.encode(torch.from_numpy(slices).to(self.device))
        return features

    def load_support(self, dataset: Dataset, case: str, labels: dict[str, int]) -> None:
        """Pool the prototypes of every slice that may be a support slice."""
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
        where = {z: i for i, z in enumerate(union)}
        features = torch.cat(
            [
                self.encode(ready.slices[union[i : i + self.batch]])
                for i in range(0, len(union), self.batch)
            ]
        )
        for organ, slices in wanted.items():
            for z in slices:
                mask = ready.labels[z] == labels[organ]
                picture = (ready.slices[z], mask.astype(np.uint8), _aspect(ready, z))
                self.support_pictures[organ, z] = picture
                masks = torch.from_numpy(np.stack([~mask, mask])).to(self.device)
                for g, grid in enumerate(self.grids):
                    self.prototypes[organ, z, g] = masked_average_pool(
                        features[where[z]][None, None],
                        masks[None, None],
                        grid,
                        min_pixels=self.model.config.min_pixels,
                    )

    def run(self, dataset: Dataset, plan: _Plan, labels: dict[str, int], bar: Any) -> None:
        """Segment and score one query case."""
        if not plan.pairs:
            return
        image, truth = dataset.load(plan.case)
        ready = self.prepare(image, truth)
        assert ready.labels is not None
        support_of = {
            organ: {z: pair.support for pair in pairs for z in pair.queries}
            for organ, pairs in plan.pairs.items()
        }
        size = self.model.config.size
        predicted = {
            (organ, g): np.zeros((len(support_of[organ]), size, size), dtype=np.uint8)
            for organ in plan.pairs
            for g in range(len(self.grids))
        }
        row_of = {
            organ: {z: i for i, z in enumerate(sorted(support_of[organ]))} for organ in support_of
        }

        slices = plan.slices
        for begin in range(0, len(slices), self.batch):
            part = slices[begin : begin + self.batch]
            features = self.encode(ready.slices[part])
            for organ, supports in support_of.items():
                # Slices of one support slice go through the head together.
                for support in sorted({supports[z] for z in part if z in supports}):
                    chosen = [i for i, z in enumerate(part) if supports.get(z) == support]
                    into = [row_of[organ][part[i]] for i in chosen]
                    for g, grid in enumerate(self.grids):
                        scores = cosine_match(
                            features[chosen][None],
                            self.prototypes[organ, support, g],
                            grid,
                            size=(size, size),
                            reduce=self.model.config.reduce,
                        )[0]
                        # The arg max of the logits: their factor is positive, ties are background.
                        inside = scores[:, 1] > scores[:, 0]
                        predicted[organ, g][into] = inside.cpu().numpy()
            bar.update(len(part))

        for organ, supports in support_of.items():
            zs = sorted(supports)
            wanted = truth.data[zs] == labels[organ]
            shown = _shown_slice(ready.labels == labels[organ], zs)
            for g in range(len(self.grids)):
                full = np.zeros(ready.slices.shape, dtype=np.uint8)
                full[zs] = predicted[organ, g]
                found = ready.restore(full)[zs] > 0
                self.rows[g].append(
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
                self.examples[g].append(
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
