"""Data sets on disk: nnU-Net's raw layout, or a plain folder of scans.

    DIR/dataset.json
    DIR/imagesTr/CASE_0000.nii.gz
    DIR/labelsTr/CASE.nii.gz

Both styles of `labels` in dataset.json are read: {"background": 0, "liver": 1} of nnU-Net v2 and
{"0": "background", "1": "liver"} of v1 and the Medical Segmentation Decathlon.

Where no labels are needed, a plain folder will do: DIR/CASE.nii.gz or DIR/CASE.nii.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown
from ..files import is_folder
from .volumes import Volume, check_same_grid, read_image, read_labels

_ENDINGS = (".nii.gz", ".nii")
_IGNORE = "ignore"  # nnU-Net's name for the label of voxels that nobody labelled


@dataclass(frozen=True)
class Dataset:
    """A data set on disk; volumes are read when asked for.

    Attributes:
        root: its folder.
        name: from dataset.json, else the folder's name.
        labels: organ name to label value, in the order of the values, without the background.
        cases: the cases that have an image and labels, sorted.
        file_ending: ".nii.gz" or ".nii".
        ignore: the value of voxels that nobody labelled, nnU-Net's label "ignore"; None: all are.
            They are neither trained on nor scored.
        incomplete: cases that lack their image or their labels, with what is missing.
    """

    root: Path
    name: str
    labels: dict[str, int]
    cases: tuple[str, ...]
    file_ending: str = ".nii.gz"
    ignore: int | None = None
    incomplete: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Dataset:
        """Read dataset.json and list the cases; no volume is read yet.

        Warns of images without labels and labels without an image, which are no cases.

        Raises:
            InputError: the folder or dataset.json is missing or broken, there is more than one
                channel or a region-based label, or there is no complete case at all.
        """
        folder = Path(root)
        if not is_folder(folder):
            raise InputError(
                f"{folder}: there is no such folder, expected a data set in nnU-Net's raw layout "
                "(dataset.json, imagesTr, labelsTr); check the path"
            )
        path = folder / "dataset.json"
        meta = _load_json(path)
        ending = _file_ending(path, meta)
        _check_channels(path, meta)
        labels, ignore = _labels(path, meta)
        cases, incomplete = _cases(folder, ending)
        if incomplete:
            one = len(incomplete) == 1
            warnings.warn(
                f"data set {folder}: {len(incomplete)} case{'s' * (not one)} left out, of which "
                f"the image or the labels are missing: {_some(list(incomplete))}",
                stacklevel=2,
            )
        name = str(meta.get("name") or folder.name)
        return cls(folder, name, labels, cases, ending, ignore, incomplete)

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs' names, in the order of their label values."""
        return tuple(self.labels)

    def label_of(self, organ: str) -> int:
        """The label value of an organ.

        Raises:
            InputError: the data set has no such organ; names those it has.
        """
        if organ not in self.labels:
            raise unknown("organ", organ, f"data set {self.name}", self.labels)
        return self.labels[organ]

    def check_case(self, case: str) -> str:
        """Return `case`, or raise an InputError that names the cases there are."""
        if case in self.cases:
            return case
        if case in self.incomplete:
            raise InputError(
                f"{self.incomplete[case]}: missing, without which case {case} cannot be used; add "
                "the file or leave the case out"
            )
        raise unknown("case", case, f"data set {self.name}", self.cases, 8)

    def image_path(self, case: str) -> Path:
        """Where the image of a case lies; InputError for an unknown case."""
        return self.root / "imagesTr" / f"{self.check_case(case)}_0000{self.file_ending}"

    def labels_path(self, case: str) -> Path:
        """Where the labels of a case lie; InputError for an unknown case."""
        return self.root / "labelsTr" / f"{self.check_case(case)}{self.file_ending}"

    def image(self, case: str) -> Volume:
        """Read the image of a case: float32 [Z, Y, X]; raises as `read_image`."""
        return read_image(self.image_path(case))

    def load_labels(self, case: str) -> Volume:
        """Read the labels of a case: uint8 or int16 [Z, Y, X]; raises as `read_labels`."""
        return read_labels(self.labels_path(case))

    def load(self, case: str) -> tuple[Volume, Volume]:
        """Read the image and the labels of a case, and check that they lie on one grid.

        Raises:
            InputError: as `read_image`, `read_labels` and `check_same_grid`.
        """
        image, labels = self.image(case), self.load_labels(case)
        check_same_grid(image, labels)
        return image, labels


@dataclass(frozen=True)
class UnlabelledScans(Dataset):
    """A folder with a NIfTI file per scan and no labels.

    Attributes:
        files: case to file name; a case is named as its file, without the ending.
    """

    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> UnlabelledScans:
        """List the .nii.gz and .nii files of a folder, not of those below it; none is read yet.

        Raises:
            InputError: the folder is missing, has no such file, or two of the same case.
        """
        folder = Path(root)
        files: dict[str, str] = {}
        for ending in _ENDINGS:
            for name in _listing(folder, ending, "a folder of scans, .nii.gz or .nii"):
                case = name[: -len(ending)]
                if case in files:
                    raise InputError(
                        f"{folder / name}: {files[case]} lies beside it, expected one file per "
                        "scan; remove or rename one"
                    )
                files[case] = name
        if not files:
            raise InputError(
                f"{folder}: holds no file that ends in {' or '.join(_ENDINGS)} and no "
                "dataset.json, expected scans, or a data set in nnU-Net's raw layout; "
                "check the path"
            )
        return cls(folder, folder.resolve().name, {}, tuple(sorted(files)), files=files)

    def label_of(self, organ: str) -> int:
        """Always an InputError: there are no labels."""
        raise InputError(
            f"organ {organ!r}: {self.root} holds scans without labels (it has no dataset.json); "
            "name no organ"
        )

    def image_path(self, case: str) -> Path:
        """Where a scan lies; InputError for an unknown case."""
        return self.root / self.files[self.check_case(case)]

    def labels_path(self, case: str) -> Path:
        """Always an InputError: there are no labels."""
        raise InputError(
            f"case {case!r}: {self.root} holds scans without labels (it has no dataset.json), "
            "expected a data set in nnU-Net's raw layout"
        )


def read_names(path: Path) -> dict[int, str]:
    """Label value to organ, from the "labels" of a data set's dataset.json or a file like it.

    Raises:
        InputError: the file cannot be read, or its labels are not as a data set has them.
    """
    labels, _ = _labels(path, _load_json(path))
    return {value: organ for organ, value in labels.items()}


def _load_json(path: Path) -> dict[str, Any]:
    try:
        # From bytes: JSON is UTF-8, -16 or -32, and Windows puts a byte order mark before it.
        meta = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: there is no such file; a data set in nnU-Net's raw layout has one, with "
            '"labels" and "file_ending": write it, or give the folder that holds it'
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    # JSONDecodeError and UnicodeDecodeError; and brackets in brackets without end.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}); correct it there") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: expected a JSON object with labels, got {type(meta).__name__}")
    return meta


def _file_ending(path: Path, meta: dict[str, Any]) -> str:
    ending = meta.get("file_ending", ".nii.gz")
    if ending not in _ENDINGS:
        raise InputError(
            f'{path}: "file_ending" is {ending!r}, expected ".nii.gz" or ".nii"; '
            "convert the data set to NIfTI"
        )
    return str(ending)


def _check_channels(path: Path, meta: dict[str, Any]) -> None:
    channels = meta.get("channel_names", meta.get("modality", {"0": "image"}))
    count = len(channels) if isinstance(channels, (dict, list)) else 1
    if count > 1:
        raise InputError(
            f"{path}: names {count} channels, expected one; make a data set of the channel "
            "that you want to use (its files end in _0000)"
        )


def _labels(path: Path, meta: dict[str, Any]) -> tuple[dict[str, int], int | None]:
    """Organ to value, sorted by value, without the background; and the value of "ignore"."""
    given = meta.get("labels")
    if not isinstance(given, dict) or not given:
        raise InputError(
            f'{path}: "labels" is missing or no object, expected such as '
            '{"background": 0, "liver": 1}; write it there'
        )
    # v1 has the numbers as keys, which JSON turns into text; people write the values as text too.
    v1 = all(isinstance(value, str) for value in given.values()) and any(
        key.strip().isdecimal() for key in given
    )
    labels: dict[str, int] = {}
    for key, value in given.items():
        name, number = (value, key) if v1 else (key, value)
        if isinstance(number, list):
            raise InputError(
                f"{path}: label {name!r} is a region ({number}), which is not supported, expected "
                "one number per label; list the parts of the region as labels of their own"
            )
        text = isinstance(number, str) and number.strip().isdecimal() and len(number) <= 10
        label = int(number) if type(number) is int or text else -1
        if not 0 <= label <= 2**31 - 1:
            raise InputError(
                f"{path}: label {name!r} has the value {number!r}, expected a whole number from "
                f"0 to {2**31 - 1}; correct it there"
            )
        if name in labels or label in labels.values():
            raise InputError(
                f"{path}: label {name!r} or its value {label} appears twice; each organ needs "
                "a value of its own"
            )
        if (name.strip().lower() == "background") != (label == 0):
            raise InputError(
                f"{path}: label {name!r} has the value {label}, but 0 is the background, and the "
                'background is 0; write "background": 0 and give every organ another value'
            )
        labels[name] = label
    ignore = labels.pop(_IGNORE, None)
    organs = dict(sorted(((n, v) for n, v in labels.items() if v), key=lambda item: item[1]))
    if not organs:
        raise InputError(f'{path}: "labels" holds the background alone, expected organs; add them')
    return organs, ignore


def _cases(folder: Path, ending: str) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Sorted names of the cases, and what others lack of an image of one channel and labels."""
    images: set[str] = set()
    for name in _listing(folder / "imagesTr", ending):
        case, mark, channel = name[: -len(ending)].rpartition("_")
        if not mark or len(channel) != 4 or not channel.isdigit():
            raise InputError(
                f"{folder / 'imagesTr' / name}: expected a name such as CASE_0000{ending}, where "
                "_0000 is the channel; rename it"
            )
        if channel != "0000":
            raise InputError(
                f"{folder / 'imagesTr' / name}: is a second channel, expected one channel (_0000) "
                "per case; make a data set of the channel that you want to use"
            )
        images.add(case)
    labels = {name[: -len(ending)] for name in _listing(folder / "labelsTr", ending)}
    if not images:
        raise InputError(
            f"{folder / 'imagesTr'}: holds no file that ends in {ending}, expected "
            f'CASE_0000{ending}; check "file_ending" in dataset.json'
        )
    incomplete = {
        case: folder / "labelsTr" / f"{case}{ending}"
        if case in images
        else folder / "imagesTr" / f"{case}_0000{ending}"
        for case in sorted(images ^ labels)
    }
    if not images & labels:
        case, missing = next(iter(incomplete.items()))
        raise InputError(
            f"{missing}: missing, and so is the image or the labels of every other case; add the "
            f"files (those of case {case} are {case}_0000{ending} and {case}{ending})"
        )
    return tuple(sorted(images & labels)), incomplete


def _listing(
    folder: Path, ending: str, expected: str = "the folder of nnU-Net's raw layout"
) -> list[str]:
    try:
        # Names with a leading dot are other tools' leavings (macOS writes ._CASE_0000.nii.gz).
        return sorted(
            p.name for p in folder.iterdir() if p.name.endswith(ending) and p.name[0] != "."
        )
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror or error}), expected {expected}; "
            "check the path of the data set"
        ) from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
