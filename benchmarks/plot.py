"""The plot of a record: time and memory of the head, by size and backend.

python -m benchmarks.plot RECORD.json...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .report import number

_COLORS = {
    "reference": "#b8b8b8",
    "torch-windows": "#8c8c8c",
    "torch": "#e6a04c",
    "torch.compile": "#c8641e",
    "torch.compile-max": "#8c3c0a",
    "triton": "#4aa8a0",
    "cpu": "#2b6cb0",
    "cuda": "#2b6cb0",
}
_PANELS = (("inference", "forward, no gradients"), ("both", "forward + backward"))


def draw(path: Path) -> Path:
    """Plot the record PATH.json into PATH.png; returns the latter."""
    record = json.loads(path.read_text())
    sizes = list(record["sizes"])
    backends = [
        name for name in _COLORS if any(m["backend"] == name for m in record["measurements"])
    ]
    panels: list[tuple[str, str, dict[tuple[str, str], dict[str, Any]]]] = []
    for name, title in _PANELS:
        panels.append((f"{title}, ms", name, _times(record, name)))
    if record["memory"]:
        extra = {
            (m["size"], m["backend"]): {"median_ms": max(m["extra_mib"]["both"], 0.01)}
            for m in record["memory"]
        }
        panels.append(("peak memory in addition to inputs, MiB", "", extra))
    # One row for each backend of a size, and a gap between sizes.
    lines: dict[tuple[str, str], float] = {}
    spans = []
    at = 0.0
    for size in sizes:
        begin = at
        for backend in backends:
            if any((size, backend) in values for _, _, values in panels):
                lines[size, backend] = at
                at += 1
        spans.append((begin - 0.6, at - 0.4))
        at += 0.9
    figure = Figure(figsize=(4.2 * len(panels) + 1.3, 1.3 + 0.19 * at), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, name, values) in zip(axes, panels, strict=True):
        for backend in backends:
            found = [
                (lines[size, backend], values[size, backend])
                for size in sizes
                if (size, backend) in values
            ]
            y = [line for line, _ in found]
            x = [m["median_ms"] for _, m in found]
            axis.barh(y, x, 0.9, color=_COLORS[backend], label=backend)
            if name:
                low = [max(0.0, m["median_ms"] - m["q20_ms"]) for _, m in found]
                high = [max(0.0, m["q80_ms"] - m["median_ms"]) for _, m in found]
                axis.errorbar(x, y, xerr=(low, high), fmt="none", ecolor="black", elinewidth=0.7)
            for line, value in zip(y, x, strict=True):
                axis.annotate(
                    number(value), (value, line), (3, 0), textcoords="offset points", va="center",
                    fontsize=6.5,
                )  # fmt: skip
        floors = [record["sizes"][s].get("floor_ms", {}).get("head", {}).get(name) for s in sizes]
        for row, (floor, span) in enumerate(zip(floors, spans, strict=True)):
            if floor:
                label = "floor" if row == 0 else None
                axis.plot([floor] * 2, span, color="black", lw=1.2, ls=":",
                          label=label)  # fmt: skip
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", lw=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([sum(span) / 2 for span in spans], sizes)
    axes[0].set_ylim(spans[-1][1] + 0.3, -0.9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8,
                  frameon=False)  # fmt: skip
    torch_version = record["versions"]["torch"]
    figure.suptitle(
        f"The head on {record['device']['name']}, {record['date'][:10]}, torch {torch_version}",
        fontsize=11,
    )
    target = path.with_suffix(".png")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(target, dpi=130)
    return target


def _times(record: dict[str, Any], name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (m["size"], m["backend"]): m
        for m in record["measurements"]
        if (m["part"], m["how"], m["pass"]) == ("head", "called", name)
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(draw(Path(argument)))
