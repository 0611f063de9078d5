"""Converts a corpus to a data set: reads, checks and writes its cases, and can be resumed.

A case is read and checked completely, then its image and labels are written, then it is added to
`prepared.json`. dataset.json is written last. So a folder without dataset.json is unfinished, and
all cases in `prepared.json` are complete.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.volumes import write_labels
from ..errors import InputError, unknown
from ..files import check_writable, write_bytes, write_json
from .survey import Faults, FaultsError, LeftOutError, Loaded, Problem, Survey

NAMES = ("visceral", "btcv", "chaos", "totalsegmentator")
REPORT = "prepared.json"


@dataclass(frozen=True)
class Outcome:
    """The result of a conversion."""

    done: tuple[str, ...]  # cases in the data set, including those of earlier runs
    left_out: dict[str, str]  # cases that show none of the organs, and the reason
    problems: tuple[Problem, ...]
    complete: bool  # whether dataset.json was written
    notes: tuple[str, ...]  # about overlaps, choices and missing organs, one line each


def prepare_corpus(
    name: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    cases: Sequence[str] = (),
    skip_bad: bool = False,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Outcome:
    """Convert a corpus, as it is distributed, to a data set in nnU-Net's raw layout.

    All files are read, even if some have problems. The good cases are written to `target`, but if
    there are problems, dataset.json is only written with `skip_bad`. With `resume`, the cases that
    an earlier run finished are kept.

    Args:
        name: one of `NAMES`.
        source: the unpacked corpus.
        target: the data set's folder, new or empty.
        cases: the cases to convert, by their names in the data set; default: all.
        skip_bad: make a data set of the cases without problems.
        resume: continue an earlier run in `target`.
        progress: show a progress bar on stderr.
        options: `corpus`, `organs`, `annotator`, `allow_missing` for visceral; `organs`,
            `allow_missing` for totalsegmentator.

    Raises:
        InputError: there is no such corpus in `source`; `target` is not empty or cannot be written;
            a case or organ is unknown; pydicom is missing (chaos).
    """
    if name not in NAMES:
        raise InputError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    module = importlib.import_module(f"{__package__}.{name}")
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise InputError(
            f"{source}: there is no such folder, expected the unpacked corpus; check the path"
        )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise InputError(
            f"{target}: is inside the corpus {source}, expected a folder outside it, so that the "
            "data set is not mistaken for a part of the corpus; give another DST"
        )
    survey: Survey = module.survey(source, **options)
    wanted = _wanted(survey, cases)
    what = {"recipe": name, "labels": survey.labels, "settings": survey.settings}
    records = _earlier(target, what, resume)
    check_writable(target / REPORT)

    # Problems that belong to no case do not matter if cases are named.
    named = wanted if cases else [None, *wanted]
    problems = Faults(source)
    problems += [p for p in survey.problems if p.case in named and p.case not in records]
    bad = {problem.case for problem in problems}
    left_out: dict[str, str] = {}

    def report(complete: bool) -> None:
        problems.sort(key=lambda p: (p.case is None, p.case or "", p.file, p.what))
        content = {
            **what,
            "source": str(source.resolve()),
            "complete": complete,
            "cases": {case: records[case] for case in sorted(records)},
            "skipped": [{"case": p.case, "file": p.file, "problem": p.what} for p in problems],
            "left_out": dict(sorted(left_out.items())),
            "ignored": dict(sorted(survey.ignored.items())),
        }
        write_json(target / REPORT, content)

    (target / "dataset.json").unlink(missing_ok=True)  # of an earlier run, with fewer cases
    report(complete=False)
    todo = [case for case in wanted if case not in records and case in survey.cases]
    for case in tqdm(todo, desc=name, unit="case", disable=not progress, dynamic_ncols=True):
        try:
            loaded = survey.cases[case](problems)
        except FaultsError:
            continue
        except LeftOutError as reason:
            if case not in bad:
                left_out[case] = str(reason)
            continue
        if case in bad:
            continue  # it was only read to find all its problems
        _write(target, case, loaded)
        records[case] = loaded.record
        report(complete=False)

    complete = bool(records) and (skip_bad or not problems)
    if complete:
        meta = {
            **module.CORPUS,
            "labels": {"background": 0, **survey.labels},
            "numTraining": len(records),
            "file_ending": ".nii.gz",
        }
        write_json(target / "dataset.json", meta)
    report(complete)
    return Outcome(tuple(sorted(records)), left_out, tuple(problems), complete, _notes(records))


def _wanted(survey: Survey, cases: Sequence[str]) -> list[str]:
    known = sorted({p.case for p in survey.problems if p.case is not None}.union(survey.cases))
    for case in cases:
        if case not in known:
            raise unknown("case", case, "this corpus", known, 8)
    return sorted(set(cases)) if cases else known


def _earlier(target: Path, what: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The cases that an earlier run finished; InputError if the folder has anything else."""
    try:
        held = sorted(entry.name for entry in target.iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(
            f"{target}: cannot be listed ({error.strerror or error}), expected a new or empty "
            "folder; give another one"
        ) from error
    if not held:
        return {}
    path = target / REPORT
    if not resume or not path.is_file():
        begun = ", or continue the run that was begun there with `resume=True`" * path.is_file()
        raise InputError(
            f"{target}: is not empty (it holds {held[0]}), expected a new or empty folder, "
            f"because nothing is overwritten; give another folder{begun}"
        )
    try:
        earlier = json.loads(path.read_text("utf-8"))
        records = dict(earlier["cases"])
        before = {key: earlier[key] for key in what}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a report of `lslpn prepare` ({error}); give another DST"
        ) from error
    for key, value in what.items():
        if before[key] != value:
            raise InputError(
                f"{target}: was begun with {key} {json.dumps(before[key])}, got "
                f"{json.dumps(value)}; resume with the same options, or give another DST"
            )
    return {c: record for c, record in records.items() if all(map(Path.is_file, _paths(target, c)))}


def _paths(target: Path, case: str) -> tuple[Path, Path]:
    """The paths of a case's image and labels in the data set."""
    return target / "imagesTr" / f"{case}_0000.nii.gz", target / "labelsTr" / f"{case}.nii.gz"


def _write(target: Path, case: str, loaded: Loaded) -> None:
    image, labels = _paths(target, case)
    # A file is copied as it is, header and all.
    source = loaded.image
    data = source.read_bytes() if isinstance(source, Path) else source.to_bytes()
    write_bytes(image, data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 6, mtime=0))
    write_labels(labels, loaded.labels, loaded.volume)


def _notes(records: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    """What a user should know about the labels, with numbers over all cases."""
    notes = []
    overlaps = [found for record in records.values() if (found := record.get("overlaps"))]
    if overlaps:
        voxels = sum(one["voxels"] for found in overlaps for one in found)
        notes.append(
            f"{voxels} voxels in {len(overlaps)} cases are in the masks of two organs; they were "
            "assigned to the smaller one"
        )
    for key, text in (
        ("not_taken", "more drawings of an organ were not used"),
        ("missing", "organs have no file in their case and are background there"),
        ("empty", "organs are not in the field of view of their case (empty masks)"),
    ):
        count = sum(len(record.get(key, ())) for record in records.values())
        if count:
            notes.append(f"{count} {text}")
    return tuple(notes)
