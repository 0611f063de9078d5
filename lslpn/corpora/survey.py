"""What the corpora share: a survey of file names, a list of problems, and how to read a case.

A `Survey` is made from file names only. It has a function for each case that reads it, and the
problems with file names. All files of a case are read, even if some have problems.
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
# Names that browsers and download managers give to unfinished files.
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".aria2", ".tmp")


@dataclass(frozen=True)
class Problem:
    """A problem with a file or folder of a corpus."""

    what: str  # a sentence that begins with the file or folder and says how to correct it
    case: str | None  # the case that cannot be used because of it, if any
    file: str  # relative to the corpus if it is inside


class FaultsError(Exception):
    """A case cannot be used; the problems are in the `Faults` that it was read with."""


class LeftOutError(Exception):
    """A case has no problems but shows none of the organs; the message says why."""


class Faults(list[Problem]):
    """The problems found so far in the corpus in `source`."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.source = source

    def shown(self, path: Path) -> str:
        """A path as in the report: relative to the corpus if it is inside."""
        inside = path.is_relative_to(self.source)
        return path.relative_to(self.source).as_posix() if inside else str(path)

    def add(self, path: Path, what: str, case: str | None) -> None:
        self.append(Problem(f"{path}: {what}", case, self.shown(path)))

    def read(self, path: Path, case: str, reader: Callable[[Path], _T]) -> _T | None:
        """Read a file; if `reader` raises InputError, add a problem and return None."""
        try:
            return reader(path)
        except InputError as error:  # its message begins with the path
            self.append(Problem(str(error), case, self.shown(path)))
            return None

    def read_all(
        self, paths: Mapping[str, Path], case: str, reader: Callable[[Path], _T]
    ) -> dict[str, _T]:
        """Read several files, each as in `read`; leaves out those that cannot be read."""
        found = {name: self.read(path, case, reader) for name, path in paths.items()}
        return {name: one for name, one in found.items() if one is not None}

    def misnamed(self, path: Path, expected: str, case: str | None = None) -> None:
        what = f"expected a name such as {expected}; rename the file, or move it out of the corpus"
        self.add(path, what, case)

    def missing(self, path: Path, what: str, case: str, remedy: str) -> None:
        self.add(path, f"missing, {what}; {remedy}", case)

    def one_of(self, paths: Sequence[Path], what: str, case: str) -> Path | None:
        """The first of `paths`, if any; a problem if there are several."""
        if len(paths) > 1:
            others = ", ".join(map(self.shown, paths[1:]))
            several = f"there is more than one file of {what} (also {others}); keep the right one"
            self.add(paths[0], several, case)
        return paths[0] if paths else None

    def needed(
        self, paths: Sequence[Path], path: Path, what: str, case: str, remedy: str
    ) -> Path | None:
        """As `one_of`, but also a problem if there is none: `path` is missing."""
        if not paths:
            self.missing(path, what, case, remedy)
        return self.one_of(paths, what, case)

    def nothing_drawn(self, path: Path, case: str) -> None:
        what = "no organ is drawn in its labels, expected at least one labelled voxel"
        self.add(path, f"{what}; download the labels of this case again", case)


@dataclass(frozen=True)
class Loaded:
    """A case without problems."""

    image: Path | nib.Nifti1Image  # a file to copy (.nii.gz) or compress (.nii), or an image
    volume: Volume  # the same image
    labels: np.ndarray  # uint8 [Z, Y, X]
    record: dict[str, Any]  # for prepared.json


@dataclass
class Survey:
    """What the file names tell about a corpus.

    A function in `cases` reads a case, of which files may be missing. It adds problems to the given
    `Faults`, and raises `FaultsError` or `LeftOutError` if the case cannot be used. Cases that are
    already in `problems` are also read, to find all their problems, but not written.
    """

    source: Path
    labels: dict[str, int]  # organ to value, from 1
    cases: dict[str, Callable[[Faults], Loaded]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)  # reason to number of unused files
    # The choices that affect what is written; they must be the same to resume a run.
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problems = Faults(self.source)

    def finished(self, path: Path, case: str | None) -> bool:
        """Whether a file was downloaded completely; a problem if not."""
        if not path.name.lower().endswith(_UNFINISHED):
            return True
        what = "a download that was not finished; finish it, or delete it if it was repeated"
        self.problems.add(path, what, case)
        return False

    def nifti_files(
        self, folder: Path, case_of: Callable[[str], str | None]
    ) -> Iterator[tuple[Path, str]]:
        """The NIfTI files in a folder and its subfolders, and their names without the ending.

        `case_of` takes the full name of an unfinished file and returns its case.
        """
        for path in files_below(folder):
            if self.finished(path, case_of(path.name)):
                if match := re.fullmatch(r"(.*)\.nii(\.gz)?", path.name):
                    yield path, match[1]
                else:
                    self.ignored["not NIfTI"] += 1


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted, except hidden ones.

    Links to folders are followed, except those to a folder on the way to the link, or around one.

    Raises:
        InputError: a folder cannot be listed.
    """
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be listed ({error.strerror or error}); "
            "check the permissions of the corpus"
        ) from error

    def circular(link: Path) -> bool:
        target, above = link.resolve(), link.relative_to(folder).parents
        return any((folder / way).resolve().is_relative_to(target) for way in above)

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(
            f
            for f in folders
            if f[0] != "." and f != "__MACOSX"
            if not (Path(root, f).is_symlink() and circular(Path(root, f)))
        )
        found.extend(Path(root) / name for name in names if name[0] != ".")
    return sorted(found)


def natural(text: str) -> tuple[Any, ...]:
    """A sort key: numbers by their value, then words, then the empty string."""
    parts = re.findall(r"\d+|\D+", text)
    return (not parts, [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts])


def check_organs(organs: Sequence[str], known: Iterable[str]) -> None:
    """Raise InputError for an organ that the corpus does not have; the message lists all."""
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
    """Read an image and its masks, one file per organ, and merge them into one label map.

    A voxel in two masks gets the organ with fewer voxels in this case (if equal, the lower value),
    because a small organ would lose a larger part of itself. This does not depend on the order of
    the files. Adds organs, overlaps and empty masks to `record`.

    Raises:
        FaultsError: a problem was added to `faults`, or the image is missing (None).
        LeftOutError: there is no mask, or all are empty, and not `empty_is_fault`.
    """
    if not masks and not empty_is_fault:
        raise LeftOutError("none of the chosen organs has a file")
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
                "organ (0 and one other value); check that it is the mask of this organ only"
            )
        return mask

    merged = np.zeros(() if image is None else image.data.shape, np.uint8)
    sizes: dict[int, int] = {}
    overlaps: dict[tuple[int, int], int] = {}
    for organ, value in labels.items():
        mask = faults.read(masks[organ], case, read_mask) if organ in masks else None
        if mask is None:
            continue
        drawn = mask.data > 0
        sizes[value] = int(drawn.sum())
        if len(faults) > before or image is None:
            continue  # nothing will be written, only check the remaining files
        holders = merged[drawn]
        for holder in np.unique(holders[holders > 0]).tolist():
            overlaps[holder, value] = int((holders == holder).sum())
            if (sizes[holder], holder) < (sizes[value], value):
                drawn &= merged != holder
        merged[drawn] = value
    if len(faults) > before or image is None or image_path is None:
        raise FaultsError
    if not merged.any():
        if not empty_is_fault:
            raise LeftOutError("every mask of the chosen organs is empty")
        faults.nothing_drawn(image_path, case)
        raise FaultsError
    names = {value: organ for organ, value in labels.items()}
    record.update(
        image=faults.shown(image_path),
        organs=[
            {"organ": names[value], "file": faults.shown(masks[names[value]]), "voxels": size}
            for value, size in sizes.items()
        ],
        overlaps=[
            {"organs": [names[a], names[b]], "voxels": count}
            for (a, b), count in sorted(overlaps.items())
        ],
        empty=[names[value] for value, size in sizes.items() if not size],
    )
    return Loaded(image_path, image, merged, record)


def read_both(
    faults: Faults, case: str, image: Path | None, labels: Path | None, known: int
) -> Loaded:
    """Read an image and its label map, with values from 0 to `known`; a path is None if missing."""
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
    return Loaded(image, volume, drawn.data.astype(np.uint8), record)
