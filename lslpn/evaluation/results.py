"""Results of an evaluation: Dice per organ and case, as tables, JSON and figures."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import write_json
from ..info import versions
from .overlay import Panel, overlay


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |P n T| / (|P| + |T|) of two boolean arrays of the same shape; 1.0 if both are empty."""
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: expected the shape of truth {truth.shape}, got {prediction.shape}"
        )
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(prediction & truth) / total if total else 1.0


def average_of(values: Iterable[float], average: str = "mean") -> float:
    """Mean or median of the values, without NaN, which stands for a missing score."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return math.nan
    return statistics.median(kept) if average == "median" else statistics.fmean(kept)


@dataclass(frozen=True)
class Row:
    """One organ in one query case."""

    organ: str
    case: str
    dice: float  # 2 |P n T| / (|P| + |T|) over the voxels of the protocol's slices
    slices: int
    truth_voxels: int  # |T|
    predicted_voxels: int  # |P|


@dataclass(frozen=True)
class Skipped:
    """An organ that could not be scored in a query case, and why."""

    organ: str
    case: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A query slice and its support slice as the network sees them, for figures.

    Arrays are [S, S]; an aspect is a pixel's height over its width in millimetres.
    """

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

    def panels(self, support: str, label: int) -> list[Panel]:
        """Support with its mask, query, and ground truth; `label` determines the colour."""
        title = f"support {support}, slice {self.support_slice}"
        return [
            Panel(self.support_image, self.support_mask * label, title, self.support_aspect),
            self.panel(f"query {self.case}, slice {self.query_slice}", None),
            self.panel("ground truth", self.truth * label),
        ]

    def panel(self, title: str, labels: np.ndarray | None) -> Panel:
        """The query slice with labels drawn over it."""
        return Panel(self.query_image, labels, title, self.query_aspect)


@dataclass(frozen=True)
class Evaluation:
    """The scores of an evaluation, and everything they depend on.

    `scale` and `spacing` describe the grid of windows, None for methods without one.
    """

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
    scale: float | None
    spacing: float | None
    seconds: float
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()
    method: str = "lslpn"
    examples: tuple[Example, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def dice(self) -> dict[tuple[str, str], float]:
        """The Dice of each organ and query case that was scored."""
        return {(row.organ, row.case): row.dice for row in self.rows}

    @property
    def shown(self) -> dict[tuple[str, str], Example]:
        """The examples by organ and query case."""
        return {(example.organ, example.case): example for example in self.examples}

    @property
    def windows(self) -> str:
        """The grid of windows, such as "scale 1/8, spacing 1/2"; empty if there is none."""
        if self.scale is None:
            return ""
        return f"scale {fraction(self.scale)}, spacing {fraction(self.spacing)}"

    def scores(self, organ: str) -> list[float]:
        """The Dice of an organ in each query case that was scored."""
        return [row.dice for row in self.rows if row.organ == organ]

    def mean(self, organ: str | None = None) -> float:
        """Mean Dice of an organ over the query cases; by default, the mean over all organs.

        NaN if nothing was scored; organs without a score do not count in the mean over organs.
        """
        return self._over(organ, "mean")

    def median(self, organ: str | None = None) -> float:
        """Median Dice of an organ over the query cases; by default, its mean over all organs."""
        return self._over(organ, "median")

    def headline(self, organ: str | None = None) -> float:
        """The average that the protocol's authors report, `mean` or `median`."""
        return self._over(organ, self.average)

    def _over(self, organ: str | None, average: str) -> float:
        if organ is not None:
            return average_of(self.scores(organ), average)
        return average_of([self._over(o, average) for o in self.organs])

    def to_dict(self) -> dict[str, Any]:
        """Everything except the pictures, ready for JSON; missing scores are None."""
        plain = dataclasses.asdict(dataclasses.replace(self, examples=()))
        del plain["examples"]
        for average in ("mean", "median"):
            values = {organ or "all": self._over(organ, average) for organ in (*self.organs, None)}
            plain[average] = {k: None if math.isnan(v) else v for k, v in values.items()}
        return plain

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`, without pictures.

        Raises:
            KeyError, TypeError: `given` does not come from `to_dict`.
        """
        values = {name: given[name] for name in given.keys() & cls.__dataclass_fields__.keys()}
        values["queries"], values["organs"] = tuple(given["queries"]), tuple(given["organs"])
        values["rows"] = tuple(Row(**row) for row in given["rows"])
        values["skipped"] = tuple(Skipped(**skip) for skip in given["skipped"])
        return cls(**values)

    def table(self, *, markdown: bool = False) -> str:
        """A table of organs by cases, with mean and median, as plain text or Markdown."""
        title = (
            f"{self.dataset}: {self.model}, protocol {self.protocol}, "
            f"{self.chunks} chunk{'s' * (self.chunks != 1)}, support {self.support}, "
            f"{self.size}x{self.size}, {self.windows}{', ' * bool(self.windows)}align {self.align}"
        )
        dice = self.dice
        # More than ten cases do not fit on a line; their scores are in the JSON.
        cases = self.queries if len(self.queries) <= 10 else ()
        header = ["organ", *cases, "mean", "median"]
        lines = [
            [organ, *(dice.get((organ, c)) for c in cases), self.mean(organ), self.median(organ)]
            for organ in self.organs
        ]
        if len(self.organs) > 1:
            lines.append(["all", *[""] * len(cases), self.mean(), self.median()])
        text = render_table(title, header, lines, markdown)
        for skip in self.skipped:
            text += f"\nskipped: {skip.organ} in {skip.case}: {skip.reason}"
        return text


def fraction(value: float | None) -> str:
    """A scale or spacing as text: 1/8 for 0.125, "-" for None."""
    if value is None:
        return "-"
    near = Fraction(value).limit_denominator(64)
    return str(near) if abs(float(near) - value) < 1e-9 else f"{value:g}"


def summary(evaluations: Sequence[Evaluation], *, markdown: bool = False) -> str:
    """A table with one line per evaluation: the grid and the average Dice of each organ."""
    first = evaluations[0]
    header = ["scale", "spacing", *first.organs, "all"]
    lines = [
        [fraction(e.scale), fraction(e.spacing), *map(e.headline, (*first.organs, None))]
        for e in evaluations
    ]
    title = f"{first.dataset}: {first.average} Dice over {len(first.queries)} cases, by grid"
    return render_table(title, header, lines, markdown)


def save(evaluations: Sequence[Evaluation], folder: str | Path) -> list[Path]:
    """Write `evaluation.json` and a figure for each query case into a folder.

    The JSON has a list "evaluations", one for each grid of windows. A figure has a row for each
    organ: the support slice with its mask, the query slice, the ground truth, and the prediction
    with each grid. Returns the paths of the files.
    """
    root = Path(folder)
    written = [root / "evaluation.json"]
    evaluated = [evaluation.to_dict() for evaluation in evaluations]
    write_json(written[0], {"versions": versions(), "evaluations": evaluated})
    first, shown = evaluations[0], [evaluation.shown for evaluation in evaluations]
    for case in first.queries:
        rows = []
        for label, organ in enumerate(first.organs, 1):
            key = organ, case
            found = [examples.get(key) for examples in shown]
            # Examples of different grids differ only in their predictions.
            example = next(filter(None, found), None)
            if example is None:
                continue
            row = example.panels(first.support, label)
            for evaluation, one in zip(evaluations, found, strict=True):
                title = evaluation.windows if len(evaluations) > 1 else "prediction"
                if one is None:
                    row.append(example.panel(f"{title}\nskipped", None))
                else:
                    score = f"3-D Dice {evaluation.dice[key]:.2f}"
                    row.append(example.panel(f"{title}\n{score}", one.prediction * label))
            rows.append(row)
        if rows:
            names = dict(enumerate(first.organs, 1))
            written.append(overlay(root / "figures" / f"{case}.png", rows, names))
    return written


def cell(value: Any) -> str:
    """The text of a table's cell: floats have three decimals, None and NaN are "-"."""
    if value is None or value != value:  # NaN
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def render_table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[Any]], markdown: bool
) -> str:
    """A table below a title, as plain text or Markdown; the first column is left-aligned."""
    # Imported here because nothing else in this module needs it.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def shown(value: Any) -> str:
        return cell(value).replace("|", r"\|") if markdown else cell(value)

    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=markdown)
    for i, name in enumerate(header):
        table.add_column(shown(name), justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(shown, line))
    # Wide enough for any table; rich would shorten the names in a wider one.
    out = io.StringIO()
    Console(file=out, width=100_000, color_system=None, markup=False, emoji=False).print(table)
    body = "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
    return f"{title}\n\n{body}\n" if markdown else f"{title}\n{body}"
