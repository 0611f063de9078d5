"""Fig. 2 and 4: support, query, ground truth and each method's result, side by side.

The slice is the middle one of those that show the organ, and the cases are the first test cases,
unless others are named: nothing is selected by its result.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import unknown
from ..evaluation.overlay import overlay
from ..evaluation.results import Evaluation, Example, dice
from . import report
from .plan import Classes, Run, plan_runs
from .store import Done, Store, Task

NAME = "figures"
DEFAULT_CASES = 2


def run(
    store: Store,
    methods: Sequence[str],
    seed: int,
    *,
    cases: Sequence[str] = (),
    organs: Sequence[str] = (),
    classes: Classes = "all",
    untrained: bool = False,
) -> list[Path]:
    """Train where needed, segment the chosen cases, and draw them; as `table1.run`.

    Shows `cases`, by default the first two of each subject fold, and `organs`, by default all that
    are tested; with `untrained` a column for the first method's network before training.

    Returns:
        figures.json, .csv, .md and .html in the folder; fig2.png with the first method's results,
        and fig4.png with those of all, where there are several.

    Raises:
        InputError: a case that is not tested, an organ that no fold holds out.
    """
    setup = store.setup
    tested = [case for fold in setup.subject_folds for case in fold.test]
    for case in cases:
        if case not in tested:
            raise unknown("case", case, "those that are tested", tested)
    for organ in organs:
        if organ not in setup.organs:
            raise unknown("organ", organ, "the folds that are held out", setup.organs)
    tasks = []
    for one in plan_runs(setup, methods, [seed], classes=[classes], untrained=untrained):
        test = one.subjects.test
        shown = tuple(c for c in test if c in cases) if cases else test[:DEFAULT_CASES]
        wanted = tuple(organ for organ in one.organs if not organs or organ in organs)
        if shown and wanted:
            tasks.append(Task(one, setup.align, organs=wanted, queries=shown, pictures=True))
    done = store.results(tasks)
    rows = list(_rows(done))
    columns = list(dict.fromkeys(one.task.run.label for one in done))

    def pictures(content: report.Content) -> list[Path]:
        drawn = [_draw(store.folder / "fig2.png", done, columns[:1], content)]
        if len(columns) > 1:
            drawn.append(_draw(store.folder / "fig4.png", done, columns, content))
        return drawn

    return report.publish(
        store,
        NAME,
        done,
        {"seed": seed, "classes": classes, "table": [row for _, row in rows]},
        title=f"Pictures of {setup.dataset.name}",
        sections=[_table],
        pictures=pictures,
        rows=lambda content: [{**row, **report.origin(content, run)} for run, row in rows],
    )


def _rows(done: Sequence[Done]) -> Iterable[tuple[Run, dict[str, Any]]]:
    """What is shown, and its Dice: of the slice, and of the whole."""
    for one in done:
        evaluation, run = one.evaluations[0], one.task.run
        for shown in evaluation.examples:
            row = {
                "label": run.label,
                "method": run.method,
                "seed": run.seed,
                "subject_fold": run.subjects.name,
                "organ": shown.organ,
                "case": shown.case,
                "support": evaluation.support,
                "support_slice": shown.support_slice,
                "query_slice": shown.query_slice,
                "dice_of_slice": dice(shown.prediction > 0, shown.truth > 0),
                "dice": evaluation.dice[shown.organ, shown.case],
            }
            yield run, row


def _draw(
    path: Path, done: Sequence[Done], columns: Sequence[str], content: report.Content
) -> Path:
    """A row for each case and organ, a column for each network."""
    organs = report.organs(content)
    found: dict[tuple[str, int], dict[str, tuple[Example, Evaluation]]] = {}
    for one in done:
        for shown in one.evaluations[0].examples:
            key = shown.case, organs.index(shown.organ) + 1
            found.setdefault(key, {})[one.task.run.label] = shown, one.evaluations[0]
    rows = []
    for (case, label), by_label in sorted(found.items()):
        first, evaluation = next(iter(by_label.values()))
        row = first.panels(evaluation.support, label)
        for column in columns:
            if column in by_label:
                shown, evaluation = by_label[column]
                title = f"{column}\n3-D Dice {evaluation.dice[shown.organ, case]:.2f}"
                row.append(shown.panel(title, shown.prediction * label))
        rows.append(row)
    small = textwrap.fill(report.small_print(content), 28 * (3 + len(columns)))
    return overlay(path, rows, dict(enumerate(organs, 1)), title=small)


def _table(content: report.Content) -> str:
    names = ("label", "organ", "case", "support_slice", "query_slice", "dice_of_slice", "dice")
    lines = [[row[name] for name in names] for row in content["table"]]
    return report.table(
        "The middle one of the slices that show the organ, not the best one. Dice of the slice is "
        "in the network's square, Dice that of the whole organ in the scan's own grid. Seed "
        f"{content['seed']}.",
        ["", "organ", "case", "support slice", "query slice", "Dice of the slice", "Dice"],
        lines,
    )
