"""Fig. 3, right: how well an organ is found, against how well support and query are aligned.

Both coordinates of a point are Dice. The alignment Dice is that between the organ's masks in
support and query, resized to the network's square, on the slices that the protocol pairs: the score
of copying the support's labels. The segmentation Dice is the network's. Both are measured without
cropping, and with both scans cropped to the body's bounding box.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from ..config import ModelConfig
from ..data.dataset import Dataset
from ..data.slices import prepare
from ..evaluation.overlay import colour
from ..evaluation.protocols import Protocol, areas
from ..evaluation.results import dice
from . import report
from .plan import Align, TrainedOn, in_words, plan_runs
from .stats import correlate, spread
from .store import Done, Store, Task

NAME = "misalignment"
_ALIGNS: tuple[Align, ...] = get_args(Align)
# The paper's words: "an alignment Dice of less than 40%", "often higher than 60%".
_POORLY_ALIGNED, _WELL_FOUND = 0.4, 0.6
# Of a point: align, subject fold, organ and case.
_Key = tuple[str, str, str, str]


def run(store: Store, method: str, seeds: Sequence[int], classes: TrainedOn) -> list[Path]:
    """Train what is not trained yet, evaluate with and without body boxes, and write points and
    plot; raises as `table1.run`. The segmentation Dice of a point is the mean over the seeds."""
    setup = store.setup
    runs = plan_runs(setup, [method], seeds, [classes])
    done = store.results([Task(one, align) for one in runs for align in _ALIGNS])
    found = _points(done, _alignments(store, runs[0].config.model))
    run_of = {one.subjects.name: one for one in runs}
    shared = {"method": method, "classes": classes, "seeds": " ".join(map(str, seeds))}
    return report.publish(
        store,
        NAME + report.suffix(classes),
        done,
        {
            "method": method,
            "seeds": list(seeds),
            "classes": None if classes == "untrained" else classes,
            "summary": _summary(found, setup.organs),
            "points": found,
        },
        title=f"Misalignment on {setup.dataset.name}",
        sections=[_table],
        rows=[(run_of[point["subject_fold"]], {**shared, **point}) for point in found],
        draw=_draw,
        size=(7, 5),
    )


def alignment(
    rule: Protocol,
    support: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    label: int,
    ignore: int | None = None,
) -> float | None:
    """The Dice of an organ's masks in support and query, over all pairs of slices of a protocol.

    Support and query are labels in the file's own slices [Z, Y, X], from which the protocol
    chooses, and in the network's square [Z, S, S], where they are compared. Query pixels of the
    value `ignore` do not count. Returns None if no pair of slices shows the organ.
    """
    drawn, copied = [], []
    for pair in rule.pairs(areas(support[0], label), areas(query[0], label)):
        slices = query[1][list(pair.queries)]
        drawn.append(slices == label)
        copied.append((support[1][pair.support] == label) & (slices != ignore))
    if not any(mask.any() for mask in (*drawn, *copied)):
        return None
    return dice(np.concatenate(copied), np.concatenate(drawn))


def _alignments(store: Store, model: ModelConfig) -> dict[_Key, float]:
    """The alignment Dice of every test case and organ, where there is one."""
    setup, dataset = store.setup, store.setup.dataset
    found: dict[_Key, float] = {}
    for fold, align in itertools.product(setup.subject_folds, _ALIGNS):
        store.say(f"overlaying support {fold.support} and {len(fold.test)} queries, align {align}")
        support = _labels(dataset, fold.support, model, align)
        for case in tqdm(fold.test, unit="case", disable=not store.progress):
            query = _labels(dataset, case, model, align)
            for organ in setup.organs:
                label = dataset.label_of(organ)
                value = alignment(setup.rule, support, query, label, dataset.ignore)
                if value is not None:
                    found[align, fold.name, organ, case] = value
    return found


def _labels(
    dataset: Dataset, case: str, config: ModelConfig, align: Align
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a case in its own slices and in the network's square."""
    image, labels = dataset.load(case)
    ready = prepare(config, image, labels, align=align)
    assert ready.labels is not None
    return labels.data, ready.labels


def _points(done: Sequence[Done], alignments: Mapping[_Key, float]) -> list[dict[str, Any]]:
    """A point for each organ, query case and alignment; its Dice is the mean over the seeds."""
    scores: dict[_Key, list[float]] = {}
    for one in done:
        for row in one.evaluations[0].rows:
            key = (one.task.align, one.task.run.subjects.name, row.organ, row.case)
            scores.setdefault(key, []).append(row.dice)
    return [
        {
            "align": key[0],
            "subject_fold": key[1],
            "organ": key[2],
            "case": key[3],
            "alignment_dice": alignments[key],
            "segmentation_dice": statistics.fmean(values),
            "deviation": spread(values).deviation,
        }
        for key, values in scores.items()
        if key in alignments
    ]


def _summary(points: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> list[dict[str, Any]]:
    """For each alignment and organ, and for all organs: means, correlations, and how many of the
    poorly aligned pairs are well found."""
    lines = []
    for align, organ in itertools.product(_ALIGNS, (*organs, None)):
        chosen = [p for p in points if p["align"] == align and organ in (p["organ"], None)]
        if not chosen:
            continue
        x = [p["alignment_dice"] for p in chosen]
        y = [p["segmentation_dice"] for p in chosen]
        poor = [b for a, b in zip(x, y, strict=True) if a < _POORLY_ALIGNED]
        lines.append(
            {
                "align": align,
                "organ": organ or "all",
                "alignment_dice": statistics.fmean(x),
                "segmentation_dice": statistics.fmean(y),
                **correlate(x, y),
                "poorly_aligned": len(poor),
                "of_these_well_found": sum(value > _WELL_FOUND for value in poor),
            }
        )
    return lines


_COLUMNS = {
    "points": "points",
    "alignment_dice": "alignment Dice",
    "segmentation_dice": "segmentation Dice",
    "pearson": "Pearson's r",
    "spearman": "Spearman's rho",
}


def _table(content: report.Content) -> str:
    lines = [
        [
            row["organ"],
            row["align"],
            *(row[name] for name in _COLUMNS),
            f"{row['of_these_well_found']} of {row['poorly_aligned']}",
        ]
        for row in content["summary"]
    ]
    classes = content["classes"]
    trained = "before training" if classes is None else f"trained on {in_words(classes)}"
    return report.table(
        "A point for each support-query pair and organ. Alignment Dice: of the organ's masks in "
        "support and query, in the network's square, slice by slice as the protocol pairs them. "
        f"Segmentation Dice: of {content['method']} {trained}, "
        f"{report.of_seeds(content, 'mean')}. The last column: how many of the points with an "
        f"alignment Dice below {_POORLY_ALIGNED} have a segmentation Dice above {_WELL_FOUND}.",
        ["organ", "align", *_COLUMNS.values(), "well found"],
        lines,
    )


def _draw(axes: report.Axes, content: report.Content) -> None:
    organs = report.organs(content)
    for align, marker, filled in (("none", "o", True), ("body", "^", False)):
        for i, organ in enumerate(organs, 1):
            chosen = [p for p in content["points"] if p["align"] == align and p["organ"] == organ]
            axes.scatter(
                [p["alignment_dice"] for p in chosen],
                [p["segmentation_dice"] for p in chosen],
                s=22,
                marker=marker,
                facecolors=colour(i) if filled else "none",
                edgecolors=colour(i),
                label=organ.replace("_", " ") if filled else None,
            )
    axes.scatter([], [], marker="o", color="0.4", label="whole scans")
    axes.scatter([], [], marker="^", facecolors="none", edgecolors="0.4", label="body boxes")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("alignment Dice")
    axes.set_ylabel("segmentation Dice")
