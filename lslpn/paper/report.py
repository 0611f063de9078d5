"""The files of an experiment: NAME.json, NAME.csv, NAME.md, NAME.html and pictures.

All are written from the record in the JSON, so that they agree, and all name folds, support,
preset, settings, commit and versions.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import preset
from ..evaluation.overlay import write_figure
from ..evaluation.results import fraction, render_table
from ..files import write_json, write_text
from ..info import commit, versions
from ..viewer.evaluation import write_experiment
from .plan import Run, TrainedOn, common_settings
from .stats import Spread
from .store import Done, Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The JSON: the circumstances of an experiment and its results.
Content = Mapping[str, Any]
# Lines of the CSV, all with the same columns, and the run that each belongs to.
Rows = Sequence[tuple[Run, Mapping[str, Any]]]


def publish(
    store: Store,
    name: str,
    done: Sequence[Done],
    results: Mapping[str, Any],
    *,
    title: str,
    sections: Sequence[Callable[[Content], str]],
    rows: Rows,
    pictures: Callable[[Content], list[Path]] | None = None,
    draw: Callable[[Axes, Content], None] | None = None,
    size: tuple[float, float] = (8, 4),
) -> list[Path]:
    """Write NAME.json, NAME.csv, NAME.md, NAME.html and, with `draw`, NAME.png.

    `results`, ready for JSON, and the circumstances are the content from which `sections` write
    the Markdown, `draw` a plot of `size` inches, and `pictures` PNG files in the folder. The page
    has a section for each evaluation in `done`.
    """
    content = {**_circumstances(store, name, done), **results}
    record, lines, markdown, page, plot = (
        store.folder / f"{name}.{ending}" for ending in ("json", "csv", "md", "html", "png")
    )
    write_json(record, content)
    write_text(lines, _csv([{**row, **_origin(content, run)} for run, row in rows]))
    drawn = [] if pictures is None else pictures(content)
    links = [f"![{picture.stem}]({picture.name})" for picture in drawn]
    text = [text for section in (*sections, _provenance) if (text := section(content).strip())]
    write_text(markdown, "\n\n".join([f"# {title}", *links, *text]) + "\n")
    if draw is not None:
        drawn.append(_plot(plot, content, draw, size))
    named = []
    for one in done:
        for evaluation in one.evaluations:
            grid = f", windows of {evaluation.windows}" if one.task.grids else ""
            heading = f"{one.task.run.in_full}, align {evaluation.align}{grid}"
            # Without pictures of cases, which an evaluation that is read back does not have.
            named.append((heading, replace(evaluation, examples=())))
    write_experiment(page, title, "\n\n".join(text), drawn, named)
    return [record, lines, markdown, page, *drawn]


def _circumstances(store: Store, name: str, done: Sequence[Done]) -> dict[str, Any]:
    setup = store.setup
    changed = common_settings(setup.config)
    plain = common_settings(preset(setup.config.preset))
    return {
        "experiment": name,
        **setup.settings(),
        "organ_folds": [list(fold) for fold in setup.organ_folds],
        "changed_from_preset": {
            option: value
            for group in ("model", "train")
            for option, value in changed[group].items()
            if plain[group].get(option) != value
        },
        "average": setup.rule.average,
        "versions": versions(),
        "commit": commit(),
        "runs": [{"evaluation": store.name(one.task), **_run(one)} for one in done],
    }


def _run(done: Done) -> dict[str, Any]:
    run = done.task.run
    return {
        "run": run.key,
        "method": run.method,
        "classes": run.classes if run.trained else None,
        "trained": run.trained,
        "organs": list(run.organs),
        "subject_fold": run.subjects.name,
        "seed": run.seed,
        "align": done.task.align,
        "training_seconds": done.training_seconds,
        "evaluating_seconds": done.evaluations[0].seconds,
        "evaluated_by_commit": done.commit,
        "mean": [one.to_dict()["mean"] for one in done.evaluations],
        "skipped": [vars(skip) for skip in done.evaluations[0].skipped],
    }


def organs(content: Content) -> list[str]:
    """All tested organs, in the order of the folds."""
    return [organ for fold in content["organ_folds"] for organ in fold]


def suffix(classes: TrainedOn) -> str:
    """The end of the names of files about networks that were not trained on all classes."""
    return "" if classes == "all" else f"-{classes}"


def of_seeds(content: Content, average: str = "mean ± deviation") -> str:
    """ "mean ± deviation over 2 seeds (1, 2)", or "one seed (1)"."""
    seeds = content["seeds"]
    what = f"{average} over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return f"{what} ({', '.join(map(str, seeds))})"


def score_rows(done: Sequence[Done]) -> Rows:
    """A line of CSV for every Dice."""
    return [
        (
            one.task.run,
            {
                "method": one.task.run.method,
                "classes": one.task.run.classes,
                "held_out": "+".join(one.task.run.organs),
                "subject_fold": one.task.run.subjects.name,
                "seed": one.task.run.seed,
                **vars(row),
                "dice": f"{row.dice:.6f}",
                "scale": fraction(evaluation.scale),
                "spacing": fraction(evaluation.spacing),
                "align": evaluation.align,
            },
        )
        for one in done
        for evaluation in one.evaluations
        for row in evaluation.rows
    ]


def _origin(content: Content, run: Run) -> dict[str, Any]:
    """The columns of a CSV that say which data and settings a line comes from."""
    return {
        "dataset": content["dataset"],
        "support": run.subjects.support,
        "trained_on": " ".join(run.subjects.train) if run.trained else "",
        **{name: content[name] for name in ("protocol", "chunks", "setting", "preset")},
        "changed_from_preset": _changes(content),
        "commit": content["commit"] or "",
        "versions": " ".join(f"{k}={v}" for k, v in content["versions"].items()),
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _changes(content: Content) -> str:
    own = {f"{m}.{k}": v for m, changes in content["own"].items() for k, v in changes.items()}
    return " ".join(f"{k}={v}" for k, v in {**content["changed_from_preset"], **own}.items())


# --- Markdown -------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table below a title; cells are text, numbers, or spreads as dicts."""
    plain = [
        [str(Spread(**one)) if isinstance(one, dict) else one for one in line] for line in lines
    ]
    return render_table(title, header, plain, True).strip()


def _provenance(content: Content) -> str:
    """The data, settings and software behind the results, as a section of Markdown."""
    facts = [
        f"Data set {content['dataset']}; held out together: "
        + "; ".join(", ".join(fold) for fold in content["organ_folds"])
        + f". Setting {content['setting']}: slices that show a held-out organ are "
        + ("left out of training." if content["setting"] == "II" else "trained on, unlabelled."),
    ]
    for fold in content["subject_folds"]:
        name = f"Subject fold {fold['name']}: t" if fold["name"] else "T"
        facts.append(
            f"{name}rained on {', '.join(fold['train'])}; tested on {', '.join(fold['test'])}; "
            f"support {fold['support']}."
        )
    changed = f" with {_changes(content)}" if _changes(content) else ""
    software = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    facts += [
        f"Protocol {content['protocol']}, {content['chunks']} chunks, "
        f"{content['average']} over the cases; align {content['align']}.",
        f"Preset {content['preset']}{changed}.",
        f"Commit {content['commit'] or 'unknown'}; {software}.",
    ]
    runs = content["runs"]
    if evaluated := {run["evaluated_by_commit"] for run in runs} - {content["commit"]}:
        facts.append(f"Some evaluations are from commit {', '.join(map(str, evaluated))}.")
    times = {run["run"]: spent for run in runs if (spent := run["training_seconds"]) is not None}
    if times:
        took = timedelta(seconds=round(sum(times.values())))
        facts.append(
            f"{len(times)} training runs took {took} (h:min:s) together, by their own logs."
        )
    skipped = [skip for run in runs for skip in run["skipped"]]
    facts += sorted({f"Not scored: {s['organ']} in {s['case']}: {s['reason']}." for s in skipped})
    settings = [
        f"{name}={value}" for group in ("model", "train") for name, value in content[group].items()
    ]
    facts.append("All settings: " + ", ".join(settings) + ".")
    return "## Data and settings\n\n" + "\n".join(f"- {fact}" for fact in facts)


# --- plots ----------------------------------------------------------------------------------


def _plot(
    path: Path,
    content: Content,
    draw: Callable[[Axes, Content], None],
    size: tuple[float, float],
) -> Path:
    """Write a plot as PNG, with `small_print` below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes: Axes = figure.add_subplot()
    draw(axes, content)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    small = textwrap.fill(small_print(content), int(size[0] * 20))
    figure.supxlabel(small, fontsize=5.5, color="0.35")
    return write_figure(path, figure)


def small_print(content: Content) -> str:
    """The data, settings and software behind the results, in a line or two."""
    subjects = "; ".join(
        f"{len(fold['train'])} cases to train, {len(fold['test'])} to test, "
        f"support {fold['support']}"
        for fold in content["subject_folds"]
    )
    return (
        f"{content['dataset']}, held out {'; '.join('+'.join(f) for f in content['organ_folds'])}; "
        f"setting {content['setting']}; {subjects}; protocol {content['protocol']}, "
        f"{content['chunks']} chunks; align {content['align']}; preset {content['preset']} "
        f"{_changes(content)}; commit {str(content['commit'])[:12]}; "
        f"torch {content['versions']['torch']}"
    )
