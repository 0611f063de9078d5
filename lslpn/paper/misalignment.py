"""Fig. 3, right: how well an organ is found, against how well support and query are aligned.

Both coordinates of a point are Dice. The alignment Dice is that between the organ's masks in
support and query, resized to the network's square, on the slices that the protocol pairs: the score
of copying the support's labels. The segmentation Dice is the network's. Both are measured without
cropping, and with both scans cropped to the body's bounding box.
"""

from __future__ import annotations

import dataclasses
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
from .plan import Align, Classes, SubjectFold, in_words, plan_runs
from .stats import correlate, spread
from .store import Done, Store, Task

NAME = "misalignment"
_ALIGNS: tuple[Align, ...] = get_args(Align)
# The paper's words: "an alignment Dice of less than 40%", "often higher than 60%".
_POORLY_ALIGNED, _WELL_FOUND = 0.4, 0.6


def run(
    store: Store,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    classes: Classes = "all",
    untrained: bool = False,
) -> list[Path]:
    """Train where needed, evaluate with and without body boxes, and write points and plot.

    As `table1.run` for one method, but `untrained` takes the network before training instead of
    the trained one. A point's segmentation Dice is the mean over the seeds.

    Returns:
        misalignment.json, .csv, .md, .html and .png in the folder; their names end in -untrained,
        -tested or -none for these networks.
    """
    setup = store.setup
    runs = plan_runs(setup, methods, seeds, classes=[classes], untrained=untrained)
    done = store.results(
        [Task(one, align) for one in runs if one.trained != untrained for align in _ALIGNS]
    )
    alike: dict[tuple[str, str], dict[str, dict[str, float]]] = {
        (fold.name, align): _alignments(store, runs[0].config.model, fold, align)
        for fold in setup.subject_folds
        for align in _ALIGNS
    }
    found = points(done, alike)
    run_of = {one.task.run.subjects.name: one.task.run for one in done}
    shared = {
        "method": methods[0],
        "classes": "untrained" if untrained else classes,
        "seeds": " ".join(map(str, seeds)),
    }
    return report.publish(
        store,
        NAME + report.suffix(classes, untrained),
        done,
        {
            "method": methods[0],
            "seeds": list(seeds),
            "classes": None if untrained else classes,
            "summary": summarise(found, setup.organs),
            "points": found,
        },
        title=f"Misalignment on {setup.dataset.name}",
        sections=[_table],
        rows=lambda content: [
            {**shared, **point, **report.origin(content, run_of[point["subject_fold"]])}
            for point in found
        ],
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
    value `ignore` are left out. None where no pair of slices shows the organ.
    """
    drawn, copied = [], []
    for pair in rule.pairs(areas(support[0], label), areas(query[0], label)):
        slices = query[1][list(pair.queries)]
        drawn.append(slices == label)
        copied.append((support[1][pair.support] == label) & (slices != ignore))
    if not any(mask.any() for mask in (*drawn, *copied)):
        return None
    return dice(np.concatenate(copied), np.concatenate(drawn))


def points(
    done: Sequence[Done], alike: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """A point for each organ, query case and alignment; Dice is the mean over the seeds.

    `alike` has the alignment Dice: by subject fold and align, then by case and organ.
    """
    scores: dict[tuple[str, str, str, str], list[float]] = {}
    for one in done:
        for row in one.evaluations[0].rows:
            key = (one.task.align, one.task.run.subjects.name, row.organ, row.case)
            scores.setdefault(key, []).append(row.dice)
    return [
        {
            "align": align,
            "subject_fold": fold,
            "organ": organ,
            "case": case,
            "alignment_dice": alike[fold, align][case][organ],
            "segmentation_dice": statistics.fmean(values),
            "deviation": spread(values).deviation,
        }
        for (align, fold, organ, case), values in scores.items()
        if organ in alike[fold, align].get(case, {})
    ]


def summarise(found: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> list[dict[str, Any]]:
    """Per way of aligning, for each organ and all of them: means, correlation, and the share of
    poorly aligned pairs that are well found."""
    lines = []
    for align in _ALIGNS:
        for organ in (*organs, None):
            chosen = [
                p for p in found if p["align"] == align and (organ is None or p["organ"] == organ)
            ]
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
                    **dataclasses.asdict(correlate(x, y)),
                    "poorly_aligned": len(poor),
                    "of_these_well_found": sum(value > _WELL_FOUND for value in poor),
                }
            )
    return lines


def _alignments(
    store: Store, model: ModelConfig, fold: SubjectFold, align: Align
) -> dict[str, dict[str, float]]:
    """Alignment Dice of every test case and organ of a fold."""
    setup, dataset = store.setup, store.setup.dataset
    store.say(f"overlaying support {fold.support} and {len(fold.test)} queries, align {align}")
    support = _labels(dataset, fold.support, model, align)
    found: dict[str, dict[str, float]] = {}
    for case in tqdm(fold.test, unit="case", disable=not store.progress):
        query = _labels(dataset, case, model, align)
        found[case] = {}
        for organ in setup.organs:
            label = dataset.label_of(organ)
            value = alignment(setup.rule, support, query, label, dataset.ignore)
            if value is not None:
                found[case][organ] = value
    return found


def _labels(
    dataset: Dataset, case: str, config: ModelConfig, align: Align
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a case in its own slices and in the network's square."""
    image, labels = dataset.load(case)
    ready = prepare(config, image, labels, align=align)
    assert ready.labels is not None
    return labels.data, ready.labels


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
    axes.scatter([], [], marker="o", color="0.4", label="as the scans lie")
    axes.scatter([], [], marker="^", facecolors="none", edgecolors="0.4", label="body boxes")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("alignment Dice")
    axes.set_ylabel("segmentation Dice")
