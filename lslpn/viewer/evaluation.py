"""The results of an evaluation as a page: a table, a box plot, and the worst cases first."""

from __future__ import annotations

import base64
import io
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.overlay import Panel, colour
from ..evaluation.results import Evaluation, Row, cell
from ..files import write_text
from .page import document

_WORST = 24  # pairs of organ and case that have pictures
_SIDE = 192  # pixels along the longer side of a picture


def write_evaluation(
    path: str | os.PathLike[str],
    evaluations: Sequence[Evaluation],
    views: Mapping[str, str] | None = None,
) -> Path:
    """Write evaluations as an HTML page that needs neither a network nor scripts.

    Args:
        path: the file, which is replaced completely or not at all.
        evaluations: one for each grid of windows; those with `examples` get pictures.
        views: address of each case's own page, relative to this page.

    Raises:
        InputError: the file cannot be written.
    """
    name, several = evaluations[0].dataset, len(evaluations) > 1
    sections = [_section(evaluation, views or {}, several) for evaluation in evaluations]
    return _write(path, f"{name}: evaluation", f"{name}: 3-D Dice by organ", sections)


def write_experiment(
    path: str | os.PathLike[str],
    title: str,
    text: str,
    pictures: Sequence[Path],
    evaluations: Iterable[tuple[str, Evaluation]],
) -> Path:
    """Write the tables and figures of an experiment as an HTML page, like `write_evaluation`.

    Args:
        path: the file.
        title: of the page.
        text: Markdown; links and HTML in it are shown as text.
        pictures: PNG files, which follow the text.
        evaluations: those that the tables summarise, with their names; collapsed on the page.
    """
    from markdown_it import MarkdownIt

    written = MarkdownIt("js-default").disable(["link", "image"]).render(text)
    # The page's policy forbids style attributes; its style aligns numbers to the right anyway.
    body = ["<section>" + written.replace(' style="text-align:right"', "")]
    for picture in pictures:
        coded = base64.b64encode(picture.read_bytes()).decode("ascii")
        alt = f"{picture.stem}: the numbers are in the tables"
        body.append(f'<p><img alt="{escape(alt)}" src="data:image/png;base64,{coded}"></p>')
    body.append("</section>")
    for name, evaluation in evaluations:
        section = _section(evaluation, {}, False)
        body.append(f"<details><summary>{escape(name)}</summary>{section}</details>")
    return _write(path, title, title, body)


def _write(path: str | os.PathLike[str], title: str, heading: str, sections: Sequence[str]) -> Path:
    body = "\n".join(sections)
    top = f"<header><h1>{escape(heading)}</h1></header>\n<main class=report>"
    write_text(path, document(title, f"{top}\n{body}\n</main>"))
    return Path(path)


def _section(evaluation: Evaluation, views: Mapping[str, str], several: bool) -> str:
    grid = evaluation.windows or "none"
    facts = {
        "Model": evaluation.model,
        "Support": evaluation.support,
        "Protocol": f"{evaluation.protocol}, {evaluation.chunks} chunks",
        "Windows": grid,
        "Input": f"{evaluation.size} x {evaluation.size} pixels, align {evaluation.align}",
        "Query cases": str(len(evaluation.queries)),
    }
    parts = [f"<h2>Windows: {grid}</h2>"] if several else []
    listed = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    parts += [f"<dl>{listed}</dl>", _table(evaluation), _boxes(evaluation)]
    parts.append(_worst(evaluation, views))
    if evaluation.skipped:
        lines = (f"{skip.organ} in {skip.case}: {skip.reason}" for skip in evaluation.skipped)
        listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<h2>Not scored</h2><ul>{listed}</ul>")
    return "<section>" + "\n".join(parts) + "</section>"


def _table(evaluation: Evaluation) -> str:
    heads = ("organ", "cases", "mean", "median", "min", "max")
    parts = ["<table><caption>Dice over the query cases</caption><thead><tr>"]
    parts += [f'<th scope="col">{head}</th>' for head in heads]
    parts.append("</tr></thead><tbody>")
    rows: list[tuple[str, list[Any]]] = []
    for organ in evaluation.organs:
        scores = evaluation.scores(organ)
        measures = (statistics.fmean, statistics.median, min, max)
        rows.append((organ, [len(scores), *(f(scores or [math.nan]) for f in measures)]))
    if len(evaluation.organs) > 1:
        rows.append(("all", ["", evaluation.mean(), evaluation.median(), "", ""]))
    for organ, values in rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in values)
        parts.append(f'<tr><th scope="row">{escape(organ)}</th>{cells}</tr>')
    return "".join([*parts, "</tbody></table>"])


def _boxes(evaluation: Evaluation) -> str:
    """A box plot as SVG: quartiles, median, and every case as a point."""
    left, width, line = 150, 560, 34
    organs = [organ for organ in evaluation.organs if evaluation.scores(organ)]
    if not organs:
        return "<p>Nothing was scored.</p>"
    height = line * len(organs) + 30
    parts = [
        f'<svg class="boxes" role="img" aria-label="Box plot of Dice by organ; the table above has '
        f'the numbers" viewBox="0 0 {left + width + 30} {height}">'
    ]
    for tick in range(6):
        x = left + width * tick / 5
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height - 8}">{tick / 5:.1f}</text>')
    for i, organ in enumerate(organs):
        rows = [row for row in evaluation.rows if row.organ == organ]
        y = line * i + line / 2
        low, q1, median, q3, high = (
            left + width * float(q)
            for q in np.quantile([row.dice for row in rows], (0, 0.25, 0.5, 0.75, 1))
        )
        shown = organ if len(organ) <= 20 else organ[:19] + "…"
        parts.append(f'<text class="organ" x="{left - 10}" y="{y + 4}">{escape(shown)}</text>')
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<rect class="box" x="{q1:.1f}" y="{y - 9}" width="{max(q3 - q1, 1):.1f}" '
            'height="18"/>'
        )
        parts.append(
            f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{y - 9}" y2="{y + 9}"/>'
        )
        parts += [
            f'<circle cx="{left + width * row.dice:.1f}" cy="{y}" r="3.2">'
            f"<title>{escape(row.case)}: {row.dice:.3f}</title></circle>"
            for row in rows
        ]
    return "".join(parts) + "</svg>"


def _worst(evaluation: Evaluation, views: Mapping[str, str]) -> str:
    rows = sorted(evaluation.rows, key=lambda row: row.dice)
    if not rows:
        return ""
    examples = evaluation.shown
    label = {organ: i for i, organ in enumerate(evaluation.organs, 1)}
    parts = ["<h2>Cases, worst first</h2>"]
    if examples and len(rows) > _WORST:
        parts.append(
            f"<p class=quiet>The {_WORST} worst of {len(rows)} pairs of organ and case have "
            "pictures.</p>"
        )
    parts.append("<ol>")
    for i, row in enumerate(rows):
        where = escape(row.case)
        if row.case in views:
            where = f'<a href="{escape(views[row.case])}">{where}</a>'
        text = (
            f"<p><b>{escape(row.organ)}</b> in {where}: Dice {row.dice:.3f} "
            f"<span class=quiet>({row.predicted_voxels} voxels predicted, {row.truth_voxels} in "
            "the ground truth)</span></p>"
        )
        example = examples.get((row.organ, row.case))
        pictures = ""
        if example is not None and i < _WORST:
            support, _, truth = example.panels(evaluation.support, 1)
            found = example.panel("prediction", example.prediction)
            hue = colour(label[row.organ])
            figures = "".join(_figure(panel, row, hue) for panel in (support, truth, found))
            pictures = f'<div class="pictures">{figures}</div>'
        parts.append(f"<li>{text}{pictures}</li>")
    return "\n".join([*parts, "</ol>"])


def _figure(panel: Panel, row: Row, hue: str) -> str:
    alt = escape(f"{row.organ} in {row.case}, {panel.title}")
    return (
        f'<figure><img alt="{alt}" src="{_picture(panel, hue)}">'
        f"<figcaption>{escape(panel.title)}</figcaption></figure>"
    )


def _picture(panel: Panel, hue: str) -> str:
    """A slice with the outline of its labels, as a data URI."""
    from PIL import Image
    from scipy import ndimage

    assert panel.labels is not None
    image, mask = panel.image, panel.labels.astype(np.uint8)
    scale = min(_SIDE, _SIDE / panel.aspect)
    size = (max(1, round(scale)), max(1, round(scale * panel.aspect)))
    low, high = float(image.min()), float(image.max())
    grey = ((image - low) * (255 / (high - low or 1))).astype(np.uint8)
    pixels = np.array(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB"))
    inside = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    edge = (inside > 0) & ~ndimage.binary_erosion(inside > 0, iterations=2)
    pixels[edge] = [int(hue[i : i + 2], 16) for i in (1, 3, 5)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
