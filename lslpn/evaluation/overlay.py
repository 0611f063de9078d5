"""Figures of slices: support, query, ground truth and prediction side by side.

Uses matplotlib's object interface with Agg, so that figures need no display and no global state and
can be drawn in several threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without black, which is invisible on CT, with the two that stand out most
# on grey first; then four of Paul Tol's, for data sets with many organs. People with any of the
# common colour vision deficiencies can distinguish the first seven.
PALETTE: tuple[str, ...] = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#CC79A7",
    "#D55E00",
    "#0072B2",
    "#88CCEE",
    "#DDCC77",
    "#AA4499",
    "#44AA99",
)


def colour(label: int) -> str:
    """The colour of a label (1 or more), the same in every figure, as ``#RRGGBB``."""
    if label < 1:
        raise ValueError(f"label: expected 1 or more, got {label}")
    return PALETTE[(label - 1) % len(PALETTE)]


@dataclass(frozen=True)
class Panel:
    """A picture in a figure."""

    image: np.ndarray  # [H, W] grey values of any range
    labels: np.ndarray | None = None  # [H, W] whole numbers, 0 background, drawn over the image
    title: str = ""
    aspect: float = 1.0  # height of a pixel over its width
    limits: tuple[float, float] | None = None  # of black and white; default: minimum and maximum


def overlay(
    path: str | os.PathLike[str],
    rows: Sequence[Sequence[Panel]],
    names: Mapping[int, str] | None = None,
    *,
    title: str = "",
    panel_size: float = 2.6,
) -> Path:
    """Draw rows of panels with their labels and write a PNG file.

    Each organ is a translucent area with an outline. A legend has its name from `names`, or
    ``label 3`` if it has none. Rows may have different lengths; `panel_size` is the width of a
    panel in inches of 110 pixels.

    Returns:
        the path of the file.

    Raises:
        ValueError: there is no panel, an image is not 2-D, or its labels have another shape.
        InputError: the file cannot be written.
    """
    # Imported here because it takes a second, which `lslpn --help` can do without.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not rows or not any(len(row) for row in rows):
        raise ValueError("rows: expected at least one panel, got none")
    for panel in (panel for row in rows for panel in row):
        if np.ndim(panel.image) != 2:
            raise ValueError(
                f"panel {panel.title!r}: image: expected [H, W], got shape {np.shape(panel.image)}"
            )
        if panel.labels is not None and np.shape(panel.labels) != np.shape(panel.image):
            raise ValueError(
                f"panel {panel.title!r}: labels: expected the image's shape "
                f"{np.shape(panel.image)}, got {np.shape(panel.labels)}"
            )

    columns = max(len(row) for row in rows)
    # Rows have the heights of their panels, so that there is no white space around flat slices.
    heights = [
        max((p.image.shape[0] * p.aspect / p.image.shape[1] for p in row), default=1.0) + 0.12
        for row in rows
    ]
    margin = 0.45 + (0.3 if title else 0.0)
    figure = Figure(
        figsize=(panel_size * columns, panel_size * sum(heights) + margin),
        dpi=110,
        layout="constrained",
    )
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    shown: set[int] = set()
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            axes = figure.add_subplot(grid[i, j])
            axes.set_axis_off()
            low, high = panel.limits or (float(np.min(panel.image)), float(np.max(panel.image)))
            axes.imshow(
                panel.image,
                cmap="gray",
                vmin=low,
                vmax=high if high > low else low + 1.0,
                aspect=panel.aspect,
                interpolation="nearest",
            )
            if panel.title:
                axes.set_title(panel.title, fontsize=8)
            if panel.labels is None:
                continue
            for label in np.unique(panel.labels[panel.labels > 0]).astype(int).tolist():
                shown.add(label)
                _draw(axes, panel.labels == label, colour(label))
    if title:
        figure.suptitle(title, fontsize=10)
    if shown:
        named = {v: (names or {}).get(v, f"label {v}").replace("_", " ") for v in sorted(shown)}
        patches = [Patch(color=colour(v), label=name) for v, name in named.items()]
        figure.legend(
            handles=patches,
            loc="outside lower center",
            ncols=min(len(patches), max(1, 2 * columns)),
            fontsize=8,
            frameon=False,
        )
    return write_figure(Path(path), figure)


def _draw(axes: Axes, mask: np.ndarray, hue: str) -> None:
    """Draw an organ over a picture, as a translucent area with an outline."""
    from matplotlib.colors import to_rgba

    area = np.zeros((*mask.shape, 4), dtype=np.float32)
    area[mask] = to_rgba(hue, 0.35)
    axes.imshow(area, aspect=axes.get_aspect(), interpolation="nearest")
    # Contours need at least 2 x 2 pixels, and a mask of the whole picture has no outline.
    if min(mask.shape) >= 2 and not mask.all():
        axes.contour(mask.astype(np.float32), levels=[0.5], colors=[hue], linewidths=0.9)


def write_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as PNG, as a whole or not at all; the same picture has the same bytes.

    Names in it are plain text: "$" begins no formula, and bytes that are not UTF-8 are "?".
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "replace").decode())
    # The layout's last bits differ between processes, which antialiasing makes visible.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 6).tolist())
    with replacing(path) as aside:
        # Leave out matplotlib's version.
        figure.savefig(aside, format="png", metadata={"Software": None})
    return path
