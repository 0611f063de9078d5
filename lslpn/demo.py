"""The demo: segments a CT scan from another one, both of which ship with the package.

They differ in orientation, spacing and field of view, and one covers a fifth of the other's height.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .assets import LABELS_NOTE, demo_image, demo_labels, demo_organs
from .checkpoint import pretrained
from .data.slices import ABDOMEN_WINDOW, body_boxes
from .data.volumes import Volume, read_image, read_labels, write_labels
from .evaluation.overlay import Panel, overlay
from .evaluation.results import dice
from .files import check_writable, write_json
from .info import versions
from .segmentation.segment import segment_matched
from .segmentation.slice_matching import BEYOND
from .viewer import Support, view

_SHOWN = (0.15, 0.5, 0.85)  # slices in the figure, as shares of the query's height


def run_demo(
    out: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Segment demo scan B from demo scan A and write the result.

    Writes atomically into the folder `out`: prediction.nii.gz, the labels in B's own grid;
    overlay.png, support, ground truth and prediction side by side; report.json, the returned dict;
    result.html, a page that shows the result, see `lslpn.viewer`.

    Returns:
        dice: the 3-D Dice of each organ in B's labels, the largest organ first;
        volumes_ml: "prediction" and "truth" of each organ of A;
        seconds, versions, settings, matched_slices (the slice of A for each slice of B, or -1), and
        note: that the labels are TotalSegmentator's predictions.

    Raises:
        InputError: `out` cannot be written to, or a file is missing from the installation.
    """
    start = time.perf_counter()
    names = ("prediction.nii.gz", "overlay.png", "report.json", "result.html")
    prediction, picture, record, page = files = [Path(out) / name for name in names]
    for file in files:
        check_writable(file)
    organs = demo_organs()
    image, labels = read_image(demo_image("a")), read_labels(demo_labels("a"))
    query, truth = read_image(demo_image("b")), read_labels(demo_labels("b"))

    model = pretrained().to(device)
    found = segment_matched(model, [(image, labels)], query, progress=progress, explain=True)
    match = found.matches[0]

    write_labels(prediction, found.labels, query)
    _draw(picture, (image, labels), (query, truth), found.labels, match, organs)
    view(
        query,
        found.labels,
        truth=truth,
        names={v: o.replace("_", " ") for o, v in organs.items()},
        confidence=found.confidence,
        supports=[Support(image, labels.data, match, "A")],
        why=found.why,
        title="CT B, segmented by the labels of CT A",
        notes=[LABELS_NOTE],
    ).save(page)
    masks = {o: (found.labels == v, truth.data == v) for o, v in organs.items()}
    largest_first = sorted(masks, key=lambda o: -np.count_nonzero(masks[o][1]))
    report: dict[str, Any] = {
        "dice": {o: round(dice(*masks[o]), 4) for o in largest_first if masks[o][1].any()},
        "volumes_ml": {
            o: {"prediction": _millilitres(mask, query), "truth": _millilitres(drawn, query)}
            for o, (mask, drawn) in masks.items()
        },
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {
            "weights": "ct",
            "size": model.config.size,
            "align": found.alignments[0],
            "support": image.path.name,
            "query": query.path.name,
        },
        "matched_slices": match.tolist(),
        "versions": versions(),
        "note": LABELS_NOTE,
    }
    write_json(record, report)
    return report


def _millilitres(mask: np.ndarray, volume: Volume) -> float:
    return round(float(np.count_nonzero(mask) * volume.voxel_ml), 1)


def _draw(
    path: Path,
    support: tuple[Volume, Volume],
    query: tuple[Volume, Volume],
    prediction: np.ndarray,
    match: np.ndarray,
    organs: dict[str, int],
) -> None:
    """Draw rows of support, ground truth and prediction, cropped to the patient's trunk."""
    boxes_a, boxes_b = body_boxes(support[0]), body_boxes(query[0])
    rows = []
    for part in _SHOWN:
        z = round(part * (len(match) - 1))
        truth = _panel(query[0], query[1].data, z, boxes_b, f"query, slice {z}: given labels")
        result = _panel(query[0], prediction, z, boxes_b, f"query, slice {z}: found")
        rows.append([truth, result])
        if (s := int(match[z])) != BEYOND:
            given = _panel(support[0], support[1].data, s, boxes_a, f"support, slice {s}")
            rows[-1].insert(0, given)
    overlay(
        path,
        rows,
        {value: organ for organ, value in organs.items()},
        title="All given labels are TotalSegmentator's predictions",
        panel_size=3.2,
    )


def _panel(scan: Volume, labels: np.ndarray, z: int, boxes: np.ndarray, title: str) -> Panel:
    y0, y1, x0, x1 = boxes[z].tolist()
    _, height, width = scan.spacing
    return Panel(
        scan.data[z, y0:y1, x0:x1],
        labels[z, y0:y1, x0:x1],
        title=title,
        aspect=height / width,
        limits=ABDOMEN_WINDOW,
    )
