"""Shared by the corpora: a survey of file names, a list of problems, and reading a case.

A corpus is surveyed by its file names alone, which gives a `Survey`: for each case a function that
reads it, and the problems with names. A case is read to the end, even if some of its files have
problems.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np

from ..data.volumes import Volume, check_same_grid, read_image, read_labels
from ..errors import InputError, unknown

_T = TypeVar("_T")
# What browsers, curl wrappers and download managers call a file that is not there whole yet.
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".aria2", ".tmp")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a corpus."""

    what: str  # a sentence that begins with the file or folder, and says how to correct it
    case: str | None  # the case that cannot be used because of it; None if it belongs to none
    file: str  # relative to the corpus where it lies inside


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

    def read(self, path: Path, case: str, reader: Callable[[Path], _T]) -> _T | None:
        """What `reader` makes of a file; None, and a fault, where it raises InputError."""
        try:
            return reader(path)
        except InputError as error:  # which names the path
            self.append(Problem(str(error), case, self.shown(path)))
            return None

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
        what = "no organ is drawn in its labels, expected at least one labelled voxel"
        self.add(path, f"{what}; download the labels of this case again", case)


@dataclass(frozen=True)
class Loaded:
    """A case that was read and found sound."""

    image: Path | nib.Nifti1Image  # a file to copy (.nii.gz) or compress (.nii), or an image
    labels: nib.Nifti1Image | tuple[np.ndarray, Volume]  # or uint8 [Z, Y, X] and its volume
    record: dict[str, Any]  # for prepared.json


@dataclass
class Survey:
    """What is known of a corpus from the names of its files.

    A function of `cases` reads a case, of which files may be missing, enters what is wrong with it
    into the given `Faults`, and raises `FaultsError` or `LeftOutError`. A case that is named in
    `problems` is read, for what else is wrong with it, but not written.
    """

    source: Path
    labels: dict[str, int]  # organ to value, from 1
    cases: dict[str, Callable[[Faults], Loaded]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)  # files that are not used, by reason
    # The choices that decide what is written of a case; a resumed run must have the same.
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problems = Faults(self.source)

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
                    self.ignored["not NIfTI"] += 1


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
            raise unknown("organ", organ, "this corpus", names)


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
    The rule does not depend on the order of the files. `record` is extended by organs, overlaps
    and empty masks.

    Raises:
        FaultsError: something was entered into `faults`, or the image is missing (None).
        LeftOutError: no mask holds a voxel, if that is no fault.
    """
    before = len(faults)
    image = None if image_path is None else faults.read(image_path, case, read_image)

    def read_mask(path: Path) -> Volume:
        mask = read_labels(path)
        if image is not None:
            check_same_grid(image, mask)
        values = [int(value) for value in np.unique(mask.data) if value]
        if len(values) > 1:
            raise InputError(
                f"{path}: holds the values {', '.join(map(str, values[:6]))}, expected one "
                "organ (0 and one other value); check that it is the mask of this organ alone"
            )
        return mask

    merged: np.ndarray | None = None
    sizes: dict[int, int] = {0: 0}
    names = {value: organ for organ, value in labels.items()}
    overlaps: dict[tuple[int, int], int] = {}
    organs, empty = [], []
    for organ, path in sorted(masks.items(), key=lambda item: labels[item[0]]):
        mask = faults.read(path, case, read_mask)
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
    """Read an image and its label map, with values from 0 to `known`; None is a missing file."""
    volume = None if image is None else faults.read(image, case, read_image)

    def read_drawn(path: Path) -> Volume:
        drawn = read_labels(path, require_foreground=True)
        if drawn.data.max() > known:
            raise InputError(
                f"{path}: holds the value {drawn.data.max()}, expected labels from 0 to "
                f"{known}; check that it is the label map of this corpus"
            )
        if volume is not None:
            check_same_grid(volume, drawn)
        return drawn

    drawn = None if labels is None else faults.read(labels, case, read_drawn)
    if image is None or labels is None or volume is None or drawn is None:
        raise FaultsError
    record = {"image": faults.shown(image), "labels": faults.shown(labels)}
    return Loaded(image, (drawn.data.astype(np.uint8), volume), record)
