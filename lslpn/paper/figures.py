"""Fig. 2 and 4: support, query, ground truth and each method's result, side by side.

The slice is the middle one of those that show the organ, and the cases are the first test cases,
unless others are named: nothing is selected by its result.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, unknown
from ..evaluation.overlay import overlay
from ..evaluation.results import Evaluation, Example, dice
from . import report
from .plan import TrainedOn, plan_runs
from .store import Done, Store, Task

NAME = "figures"
DEFAULT_CASES = 2


def run(
    store: Store,
    methods: Sequence[str],
    seed: int,
    classes: Sequence[TrainedOn],
    *,
    cases: Sequence[str] = (),
    organs: Sequence[str] = (),
) -> list[Path]:
    """Train what is not trained yet, segment the chosen cases, and draw them.

    Shows `cases`, by default the first two of each subject fold, and `organs`, by default all that
    are tested. fig2.png has the results of the first method, fig4.png those of all if there are
    several.

    Raises:
        InputError: a case or organ that is not tested; nothing to show; and as `table1.run`.
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
    for one in plan_runs(setup, methods, [seed], classes):
        test = one.subjects.test
        queries = tuple(c for c in test if c in cases) if cases else test[:DEFAULT_CASES]
        shown = tuple(organ for organ in one.organs if not organs or organ in organs)
        if queries and shown:
            tasks.append(Task(one, setup.align, organs=shown, queries=queries, pictures=True))
    done = store.results(tasks)
    rows = [
        (
            one.task.run,
            {
                "label": one.task.run.label,
                "method": one.task.run.method,
                "seed": seed,
                "subject_fold": one.task.run.subjects.name,
                "organ": example.organ,
                "case": example.case,
                "support": one.evaluations[0].support,
                "support_slice": example.support_slice,
                "query_slice": example.query_slice,
                "dice_of_slice": dice(example.prediction > 0, example.truth > 0),
                "dice": one.evaluations[0].dice[example.organ, example.case],
            },
        )
        for one in done
        for example in one.evaluations[0].examples
    ]
    if not rows:
        skipped = done[0].evaluations[0].skipped[0]
        raise InputError(
            f"nothing to show: no chosen case has a score of a chosen organ ({skipped.organ} in "
            f"{skipped.case}: {skipped.reason}); choose other cases or organs"
        )
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
        {"seed": seed, "classes": classes[0], "table": [row for _, row in rows]},
        title=f"Pictures of {setup.dataset.name}",
        sections=[_table],
        rows=rows,
        pictures=pictures,
    )


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
        "computed in the network's square, Dice over the whole organ in the scan's own grid. Seed "
        f"{content['seed']}.",
        ["", "organ", "case", "support slice", "query slice", "Dice of the slice", "Dice"],
        lines,
    )
