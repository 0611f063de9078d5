"""What the recipes share: reading with every fault listed, merging, writing, resuming.

A recipe looks at names alone and returns a `Survey`: for each case a function that reads it, and
what is wrong with the names. `prepare_corpus` then goes through the cases once. A case is read and
checked whole before anything of it is written, its image is written before its labels, and it is
entered into `prepared.json` after both; dataset.json comes last. So a folder without dataset.json
is not finished, and whatever is entered is whole.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..data.volumes import Volume, check_same_grid, read_image, read_labels, write_labels
from ..errors import InputError, meant
from ..files import check_writable, write_bytes, write_text

NAMES = ("visceral", "btcv", "chaos", "totalsegmentator")

REPORT = "prepared.json"

# What browsers, curl wrappers and download managers call a file that is not there whole yet.
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".aria2", ".tmp")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a corpus.

    Attributes:
        what: a sentence that begins with the file or folder, and says how to mend it.
        case: the case that cannot be used because of it; None if it belongs to no case.
        file: the file or folder, relative to the corpus where it lies inside.
    """

    what: str
    case: str | None
    file: str


class FaultsError(Exception):
    """A case cannot be used; what is wrong with it is in the `Faults` it was read with."""


class LeftOutError(Exception):
    """The case is sound but has nothing to offer; the message says why."""


class Faults(list[Problem]):
    """What is wrong with the corpus in `source`, as far as it is known."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.source = source

    def shown(self, path: Path) -> str:
        """A path as the report shows it: relative to the corpus where it lies inside."""
        inside = path.is_relative_to(self.source)
        return path.relative_to(self.source).as_posix() if inside else str(path)

    def add(self, path: Path, what: str, case: str | None) -> None:
        self.append(Problem(f"{path}: {what}", case, self.shown(path)))

    @contextmanager
    def of(self, path: Path, case: str) -> Iterator[None]:
        """Enter an InputError, whose message names `path`, and go on behind the `with`."""
        try:
            yield
        except InputError as error:
            self.append(Problem(str(error), case, self.shown(path)))

    def misnamed(self, path: Path, expected: str, case: str | None = None) -> None:
        what = f"expected a name such as {expected}; rename the file, or move it out of the corpus"
        self.add(path, what, case)

    def missing(self, path: Path, what: str, case: str, mend: str) -> None:
        self.add(path, f"missing, {what}; {mend}", case)

    def one_of(self, paths: Sequence[Path], what: str, case: str) -> Path | None:
        """The first of `paths`, if any; several are a fault."""
        if len(paths) > 1:
            others = ", ".join(map(self.shown, paths[1:]))
            there = f"there is more than one file of {what} (also {others}); keep the right one"
            self.add(paths[0], there, case)
        return paths[0] if paths else None

    def needed(
        self, paths: Sequence[Path], path: Path, what: str, case: str, mend: str
    ) -> Path | None:
        """`one_of`, where none is a fault as well: `path` is missing."""
        if not paths:
            self.missing(path, what, case, mend)
        return self.one_of(paths, what, case)

    def nothing_drawn(self, path: Path, case: str) -> None:
        self.add(
            path,
            "no organ is drawn in its labels, expected at least one labelled voxel; download the "
            "labels of this case again",
            case,
        )


@dataclass(frozen=True)
class Loaded:
    """A case that was read and found sound.

    Attributes:
        image: the file to copy (.nii.gz) or pack (.nii), or an image to write.
        labels: a label map to write, or uint8 [Z, Y, X] with the volume whose grid it lies in.
        record: what prepared.json says of it.
    """

    image: Path | nib.Nifti1Image
    labels: nib.Nifti1Image | tuple[np.ndarray, Volume]
    record: dict[str, Any]


@dataclass
class Survey:
    """What the names of a corpus tell.

    Attributes:
        source: its folder.
        labels: organ to value, from 1.
        cases: name of a case to the function that reads it and enters into the given `Faults` what
            is wrong with it; raises `FaultsError` or `LeftOutError`; files may be missing.
        problems: what is wrong with the names; a case named here is read, for what else is
            wrong with it, but not written.
        ignored: files that are no part of the task, by reason.
        settings: the choices that decide what is written of a case; a resumed run must have the
            same. What only lets more cases pass is none of them.
    """

    source: Path
    labels: dict[str, int]
    cases: dict[str, Callable[[Faults], Loaded]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problems = Faults(self.source)

    def ignore(self, reason: str) -> None:
        """Count a file that is no part of the task."""
        self.ignored[reason] = self.ignored.get(reason, 0) + 1

    def finished(self, path: Path, case: str | None) -> bool:
        """Whether no download manager left this behind unfinished, which is a fault."""
        if not path.name.lower().endswith(_UNFINISHED):
            return True
        what = "a download that was not finished; finish it, or delete it if the file is there"
        self.problems.add(path, what, case)
        return False

    def nifti_files(
        self, folder: Path, case_of: Callable[[str], str | None]
    ) -> Iterator[tuple[Path, str]]:
        """The NIfTI files below a folder, with their names without the ending.

        `case_of` tells the case of a file that is not finished from its whole name.
        """
        for path in files_below(folder):
            if self.finished(path, case_of(path.name)):
                if match := re.fullmatch(r"(.*)\.nii(\.gz)?", path.name):
                    yield path, match[1]
                else:
                    self.ignore("not NIfTI")


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended.

    Attributes:
        done: cases in the data set, those of an interrupted earlier run included.
        left_out: sound cases that show none of the organs, with the reason.
        problems: all that is wrong, over all files.
        complete: dataset.json was written.
        notes: overlaps, choices and absent organs, one line each.
    """

    done: tuple[str, ...]
    left_out: dict[str, str]
    problems: tuple[Problem, ...]
    complete: bool
    notes: tuple[str, ...]


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
    """Turn a corpus as it is distributed into a data set in nnU-Net's raw layout.

    All files are looked at, whatever is wrong with some. Without `skip_bad` a corpus with
    problems gets no dataset.json; its good cases are written and stay for a `resume`.

    Args:
        name: one of `NAMES`.
        source: the corpus, unpacked.
        target: a folder that is new or empty, or, with `resume`, holds an earlier run.
        cases: those to take, by the names they get; default: all that the corpus should have.
        skip_bad: make a data set of the good cases.
        resume: keep the cases that an earlier run into `target` finished.
        progress: show a bar with rate and time left, on stderr.
        options: of the recipe: `corpus`, `organs`, `annotator`, `allow_missing`
            (visceral), `organs`, `allow_missing` (totalsegmentator).

    Raises:
        InputError: no corpus of this kind in `source`, `target` holds something else or cannot be
            written, an unknown case or organ, or pydicom is missing (chaos).
    """
    if name not in NAMES:
        raise InputError(f"recipe {name!r}: not known, expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"{__package__}.{name}")
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise InputError(
            f"{source}: there is no such folder, expected the corpus, unpacked; check the path"
        )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise InputError(
            f"{target}: lies inside the corpus {source}, expected a folder outside it, so that "
            "what is written is never taken for part of the corpus; give another DST"
        )
    survey: Survey = module.survey(source, **options)
    wanted = _wanted(survey, cases)
    what = {"recipe": name, "labels": survey.labels, "settings": survey.settings}
    records = _earlier(target, what, resume)
    check_writable(target / REPORT)

    # A file that belongs to no case is no matter to whoever names the cases.
    problems = Faults(source)
    problems += [
        problem
        for problem in survey.problems
        if (not cases if problem.case is None else problem.case in wanted)
        and problem.case not in records
    ]
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
        write_text(target / REPORT, json.dumps(content, indent=1) + "\n")

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
            continue  # it was read to list what else is wrong with it
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
        write_text(target / "dataset.json", json.dumps(meta, indent=1) + "\n")
    report(complete)
    return Outcome(tuple(sorted(records)), left_out, tuple(problems), complete, _notes(records))


def _wanted(survey: Survey, cases: Sequence[str]) -> list[str]:
    known = sorted({p.case for p in survey.problems if p.case is not None}.union(survey.cases))
    for case in cases:
        if case not in known:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise InputError(
                f"case {case!r}: not in this corpus{meant(case, known)}; its {len(known)} cases: "
                f"{shown}"
            )
    return sorted(set(cases)) if cases else known


def _earlier(target: Path, what: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The cases that an earlier run finished; refuses a folder that holds anything else."""
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
        mend = "give another folder"
        if path.is_file():
            mend += ", or go on with what was begun there with `resume=True`"
        raise InputError(
            f"{target}: is not empty (it holds {held[0]}), expected a new or empty folder, "
            f"because nothing is written over; {mend}"
        )
    try:
        earlier = json.loads(path.read_text("utf-8"))
        records = dict(earlier["cases"])
        same = {key: earlier[key] for key in what}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a report of `lslpn prepare` ({error}); give another DST"
        ) from error
    for key, value in what.items():
        if same[key] != value:
            raise InputError(
                f"{target}: was begun with {key} {json.dumps(same[key])}, got "
                f"{json.dumps(value)}; resume with the same options, or give another DST"
            )
    return {
        case: record
        for case, record in records.items()
        if all(path.is_file() for path in _paths(target, case))
    }


def _paths(target: Path, case: str) -> tuple[Path, Path]:
    """Where image and labels of a case go."""
    return target / "imagesTr" / f"{case}_0000.nii.gz", target / "labelsTr" / f"{case}.nii.gz"


def _write(target: Path, case: str, loaded: Loaded) -> None:
    image, labels = _paths(target, case)
    # The bytes of a file stay as they are, header and all; read_image has found them sound.
    source = loaded.image
    data = source.read_bytes() if isinstance(source, Path) else source.to_bytes()
    write_bytes(image, data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 6, mtime=0))
    if isinstance(loaded.labels, tuple):
        write_labels(labels, *loaded.labels)
    else:
        write_bytes(labels, gzip.compress(loaded.labels.to_bytes(), 6, mtime=0))


def _notes(records: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    """What a user should know about the labels, counted over the cases."""
    notes = []
    overlaps = [o for record in records.values() for o in record.get("overlaps", ())]
    if overlaps:
        voxels = sum(o["voxels"] for o in overlaps)
        cases = sum(bool(record.get("overlaps")) for record in records.values())
        notes.append(
            f"{voxels} voxels in {cases} cases were drawn as two organs; "
            "the smaller organ of the two has them"
        )
    for key, text in (
        ("not_taken", "further drawings of an organ were not taken"),
        ("missing", "organs have no file in their case, and are background there"),
        ("empty", "organs are not in the field of view of their case (empty masks)"),
    ):
        count = sum(len(record.get(key, ())) for record in records.values())
        if count:
            notes.append(f"{count} {text}")
    return tuple(notes)


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; names with a leading dot are other tools' leavings.

    Raises:
        InputError: a folder cannot be listed.
    """
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be listed ({error.strerror or error}); "
            "check the permissions of the corpus"
        ) from error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
        found.extend(Path(root) / name for name in names if name[0] != ".")
    return sorted(found)


def natural(text: str) -> tuple[Any, ...]:
    """A key that sorts 2 before 10, and numbers before words, words before nothing."""
    parts = re.findall(r"\d+|\D+", text)
    return (not parts, [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts])


def check_organs(organs: Sequence[str], known: Iterable[str]) -> None:
    """Refuse an organ that the corpus does not have, naming those it has."""
    names = sorted(known)
    for organ in organs:
        if organ not in names:
            raise InputError(
                f"organ {organ!r}: not in this corpus{meant(organ, names)}; it has: "
                f"{', '.join(names)}"
            )


# --- reading a case -------------------------------------------------------------------------


def merge_case(
    faults: Faults,
    case: str,
    image_path: Path | None,
    masks: Mapping[str, Path],
    labels: Mapping[str, int],
    record: dict[str, Any],
    *,
    empty_is_fault: bool,
) -> Loaded:
    """Read an image and its masks, one organ a file, and merge them to one label map.

    A voxel that two masks claim goes to the organ with fewer voxels in this case (the lower value
    if they have as many): a small organ would lose more of itself to a large one than the reverse.
    The rule does not depend on the order of the files.

    Args:
        faults: takes everything that is wrong with the image and each of the masks.
        image_path: None if it is missing: the masks are checked, and no case comes out.
        masks: organ to file.
        record: extended by organs, overlaps and empty masks.
        empty_is_fault: whether it is one that no mask holds a voxel.

    Raises:
        FaultsError: something was entered into `faults`, or the image is missing.
        LeftOutError: no mask holds a voxel, if that is no fault.
    """
    before = len(faults)
    image: Volume | None = None
    if image_path is not None:
        with faults.of(image_path, case):
            image = read_image(image_path)

    merged: np.ndarray | None = None
    sizes: dict[int, int] = {0: 0}
    names = {value: organ for organ, value in labels.items()}
    overlaps: dict[tuple[int, int], int] = {}
    organs, empty = [], []
    for organ, path in sorted(masks.items(), key=lambda item: labels[item[0]]):
        mask: Volume | None = None
        with faults.of(path, case):
            found = read_labels(path)
            if image is not None:
                check_same_grid(image, found)
            values = [int(value) for value in np.unique(found.data) if value]
            if len(values) > 1:
                raise InputError(
                    f"{path}: holds the values {', '.join(map(str, values[:6]))}, expected one "
                    "organ (0 and one other value); check that it is the mask of this organ alone"
                )
            mask = found
        if mask is None:
            continue
        drawn = mask.data > 0
        value = labels[organ]
        sizes[value] = int(drawn.sum())
        organs.append({"organ": organ, "file": faults.shown(path), "voxels": sizes[value]})
        if not sizes[value]:
            empty.append(organ)
            continue
        if merged is None:
            merged = np.zeros(mask.data.shape, np.uint8)
        if len(faults) > before or merged.shape != drawn.shape:
            continue  # nothing will be written: only look at the files that are left
        holders = merged[drawn]
        for holder in map(int, np.unique(holders[holders > 0])):
            overlaps[holder, value] = int((holders == holder).sum())
            if (sizes[holder], holder) < (sizes[value], value):
                drawn &= merged != holder
        merged[drawn] = value
    if len(faults) > before or image is None or image_path is None:
        raise FaultsError
    if merged is None:
        if not empty_is_fault:
            raise LeftOutError("every mask of the chosen organs is empty")
        faults.nothing_drawn(image_path, case)
        raise FaultsError
    record.update(
        image=faults.shown(image_path),
        organs=organs,
        overlaps=[
            {"organs": [names[a], names[b]], "voxels": count}
            for (a, b), count in sorted(overlaps.items())
        ],
        empty=empty,
    )
    return Loaded(image_path, (merged, image), record)


def read_both(
    faults: Faults, case: str, image: Path | None, labels: Path | None, known: int
) -> Loaded:
    """Read an image and its label map, with values from 0 to `known`; None is a missing file.

    Raises:
        FaultsError: something is wrong with either, which is in `faults` now.
    """
    volume: Volume | None = None
    drawn: Volume | None = None
    if image is not None:
        with faults.of(image, case):
            volume = read_image(image)
    if labels is not None:
        with faults.of(labels, case):
            found = read_labels(labels, require_foreground=True)
            if found.data.max() > known:
                raise InputError(
                    f"{labels}: holds the value {found.data.max()}, expected labels from 0 to "
                    f"{known}; check that it is the label map of this corpus"
                )
            if volume is not None:
                check_same_grid(volume, found)
            drawn = found
    if image is None or labels is None or volume is None or drawn is None:
        raise FaultsError
    record = {"image": faults.shown(image), "labels": faults.shown(labels)}
    return Loaded(image, (drawn.data.astype(np.uint8), volume), record)
