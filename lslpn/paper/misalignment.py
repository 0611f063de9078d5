"""Fig. 3, right: how well an organ is found, against how well support and query are aligned.

Both sides of a point are Dice. The alignment Dice is that of the organ's masks in support and
query, brought to the network's square and laid over each other slice by slice, as the protocol
pairs slices; it is what the labels of the support would score if they were simply copied. The
segmentation Dice is the network's. Every network is asked twice: with the scans as they lie, and
with both cropped to the body's box.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from tqdm import tqdm

from ..config import ModelConfig
from ..data.dataset import Dataset
from ..data.slices import prepare_for
from ..evaluation.overlay import colour
from ..evaluation.protocols import Protocol, areas
from . import report
from .plan import Align, Classes, SubjectFold, in_words, plan_runs
from .stats import Correlation, correlate, spread
from .store import Done, Store, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    Args:
        store: the experiment's folder.
        methods: one network; the paper's is lslpn.
        seeds: of its runs; a point's segmentation Dice is the mean over them.
        classes: which organs the network is trained on.
        untrained: the network before training, in the place of the trained one.

    Returns:
        misalignment.json, .csv, .md, .html and .png in the folder; their names end in -untrained,
        -tested or -none for these networks.

    Raises:
        InputError: as `plan_runs` and `Store.results`.
    """
    setup = store.setup
    runs = plan_runs(setup, methods, seeds, classes=[classes], untrained=untrained)
    done = store.results(
        [
            Task(one, f"{setup.protocol}-{setup.rule.chunks}-{align}", align)
            for one in runs
            if one.trained != untrained
            for align in _ALIGNS
        ]
    )
    alike: dict[tuple[str, str], dict[str, dict[str, float]]] = {
        (fold.name, align): _alignments(store, runs[0].config.model, fold, align)
        for fold in setup.subject_folds
        for align in _ALIGNS
    }
    found = points(done, alike)
    label = NAME + report.suffix(classes, untrained)
    content = report.record(
        label,
        setup,
        done,
        {
            "method": methods[0],
            "seeds": list(seeds),
            "classes": None if untrained else classes,
            "summary": summarise(found, setup.organs),
            "points": found,
        },
    )
    supports = {fold.name: fold for fold in setup.subject_folds}
    return report.write(
        store.folder,
        label,
        content,
        done,
        title=f"Misalignment on {setup.dataset.name}",
        sections=[_table(content)],
        rows=_rows(found, supports, content),
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
    """The Dice of an organ's masks in support and query, as the protocol pairs their slices.

    Args:
        rule: the protocol.
        support: labels in the file's own slices [Z, Y, X], from which the protocol chooses, and
            in the network's square [Z, S, S], where they are compared.
        query: likewise.
        label: the organ's value.
        ignore: the value of query pixels that are left out.

    Returns:
        2 |A n B| / (|A| + |B|) over all pairs of slices, or None where there is no pair.
    """
    pairs = rule.pairs(areas(support[0], label), areas(query[0], label))
    if not pairs:
        return None
    common = total = 0
    for pair in pairs:
        mask = support[1][pair.support] == label
        slices = query[1][list(pair.queries)]
        others = slices == label
        copied = mask & (slices != ignore)
        common += int((others & copied).sum())
        total += int(others.sum()) + int(copied.sum())
    return 2 * common / total if total else None


def points(
    done: Sequence[Done], alike: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """A point for each organ, query case and alignment; Dice is the mean over the seeds.

    Args:
        done: evaluations with and without body boxes.
        alike: by subject fold and align, then by case and organ: alignment Dice.
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
    setup = store.setup
    rule = setup.rule
    store.say(f"overlaying support {fold.support} and {len(fold.test)} queries, align {align}")
    support = _labels(setup.dataset, fold.support, model, align)
    found: dict[str, dict[str, float]] = {}
    for case in tqdm(fold.test, unit="case", disable=not store.progress):
        query = _labels(setup.dataset, case, model, align)
        values = {
            organ: alignment(
                rule, support, query, setup.dataset.label_of(organ), setup.dataset.ignore
            )
            for organ in setup.organs
        }
        found[case] = {organ: value for organ, value in values.items() if value is not None}
    return found


def _labels(
    dataset: Dataset, case: str, config: ModelConfig, align: Align
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a case in its own slices and in the network's square."""
    image, labels = dataset.load(case)
    ready = prepare_for(config, image, labels, align=align)
    assert ready.labels is not None
    return labels.data, ready.labels


def _rows(
    found: Sequence[Mapping[str, Any]],
    folds: Mapping[str, SubjectFold],
    content: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
    trained = content["classes"] is not None
    for point in found:
        fold = folds[point["subject_fold"]]
        yield {
            "method": content["method"],
            "classes": content["classes"] or "untrained",
            "seeds": " ".join(map(str, content["seeds"])),
            **point,
            **report.origin(content, fold.support, fold.train if trained else ()),
        }


def _table(content: Mapping[str, Any]) -> str:
    lines = [
        [
            row["organ"],
            row["align"],
            str(row["points"]),
            *(_number(row[k]) for k in ("alignment_dice", "segmentation_dice")),
            *(_number(row[field.name]) for field in dataclasses.fields(Correlation)[1:]),
            f"{row['of_these_well_found']} of {row['poorly_aligned']}",
        ]
        for row in content["summary"]
    ]
    network = (
        f"{content['method']} before training"
        if content["classes"] is None
        else f"{content['method']} trained on {in_words(content['classes'])}"
    )
    return report.table(
        "A point for each support-query pair and organ. Alignment Dice: of the organ's masks in "
        "support and query, in the network's square, slice by slice as the protocol pairs them. "
        f"Segmentation Dice: of {network}, {report.of_seeds(content, 'mean')}. The last column: "
        f"how many of the points with an alignment Dice below {_POORLY_ALIGNED} have a "
        f"segmentation Dice above {_WELL_FOUND}.",
        [
            "organ",
            "align",
            "points",
            "alignment Dice",
            "segmentation Dice",
            "Pearson's r",
            "Spearman's rho",
            "well found",
        ],
        lines,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw(axes: Axes, content: Mapping[str, Any]) -> None:
    organs = [organ for fold in content["organ_folds"] for organ in fold]
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
    axes.set_ylim(0, 1)
    axes.set_xlabel("alignment Dice")
    axes.set_ylabel("segmentation Dice")
    axes.grid(linewidth=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False, loc="lower right", ncols=2)
