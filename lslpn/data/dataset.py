"""Data sets in nnU-Net's raw layout, and plain folders of scans.

    DIR/dataset.json
    DIR/imagesTr/CASE_0000.nii.gz
    DIR/labelsTr/CASE.nii.gz

"labels" in dataset.json may have either style: {"background": 0, "liver": 1} as in nnU-Net v2, or
{"0": "background", "1": "liver"} as in v1 and the Medical Segmentation Decathlon.

A plain folder holds scans without labels: DIR/CASE.nii.gz or DIR/CASE.nii.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown
from ..files import is_folder
from .volumes import Volume, check_same_grid, read_image, read_labels

_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Dataset:
    """A data set on disk. Volumes are read on request.

    Attributes:
        root: its folder.
        name: from dataset.json; default: the folder's name.
        labels: organ name to label value, sorted by value, without the background.
        cases: the cases that have both an image and labels, sorted.
        file_ending: ".nii.gz" or ".nii".
        ignore: the value of nnU-Net's label "ignore", or None. Voxels with it are unlabelled:
            they are neither trained on nor scored.
        incomplete: cases without an image or labels, and the file that is missing.
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
        """Read dataset.json and list the cases, without reading any volume.

        Warns about images without labels and labels without an image.

        Raises:
            InputError: the folder or dataset.json is missing or invalid, there is more than one
                channel, a label is a region, or no case is complete.
        """
        folder = Path(root)
        if not is_folder(folder):
            raise InputError(
                f"{folder}: there is no such folder, expected a data set in nnU-Net's raw layout "
                "(dataset.json, imagesTr, labelsTr); check the path"
            )
        path = folder / "dataset.json"
        meta = _load_json(path)
        ending = meta.get("file_ending", ".nii.gz")
        if ending not in _ENDINGS:
            raise InputError(
                f'{path}: "file_ending" is {ending!r}, expected ".nii.gz" or ".nii"; '
                "convert the data set to NIfTI"
            )
        channels = meta.get("channel_names", meta.get("modality"))
        if isinstance(channels, (dict, list)) and len(channels) > 1:
            raise InputError(
                f"{path}: lists {len(channels)} channels, expected one; make a data set of the "
                "channel that you want to use (its files end in _0000)"
            )
        labels, ignore = _labels(path, meta)
        cases, incomplete = _cases(folder, ending)
        if count := len(incomplete):
            shown = ", ".join(list(incomplete)[:8]) + ", ..." * (count > 8)
            warnings.warn(
                f"data set {folder}: {count} case{'s' * (count > 1)} left out because the image "
                f"or the labels are missing: {shown}",
                stacklevel=2,
            )
        name = str(meta.get("name") or folder.resolve().name)
        return cls(folder, name, labels, cases, ending, ignore, incomplete)

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs' names, sorted by label value."""
        return tuple(self.labels)

    def label_of(self, organ: str) -> int:
        """The label value of an organ.

        Raises:
            InputError: the data set has no such organ; the message lists its organs.
        """
        if organ not in self.labels:
            raise unknown("organ", organ, f"data set {self.name}", self.labels)
        return self.labels[organ]

    def check_case(self, case: str) -> str:
        """Return `case`, or raise an InputError that lists the cases."""
        if case in self.cases:
            return case
        if case in self.incomplete:
            raise InputError(
                f"{self.incomplete[case]}: missing, so that case {case} cannot be used; add the "
                "file or leave the case out"
            )
        raise unknown("case", case, f"data set {self.name}", self.cases, 8)

    def image_path(self, case: str) -> Path:
        """The path of a case's image; InputError if there is no such case."""
        return self.root / "imagesTr" / f"{self.check_case(case)}_0000{self.file_ending}"

    def labels_path(self, case: str) -> Path:
        """The path of a case's labels; InputError if there is no such case."""
        return self.root / "labelsTr" / f"{self.check_case(case)}{self.file_ending}"

    def image(self, case: str) -> Volume:
        """Read the image of a case, float32 [Z, Y, X]; raises as `read_image`."""
        return read_image(self.image_path(case))

    def load_labels(self, case: str) -> Volume:
        """Read the labels of a case, whole numbers [Z, Y, X]; raises as `read_labels`."""
        return read_labels(self.labels_path(case))

    def load(self, case: str) -> tuple[Volume, Volume]:
        """Read the image and the labels of a case, and check that their grids agree.

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
        files: case to file name; a case has the name of its file, without the ending.
    """

    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> UnlabelledScans:
        """List the .nii.gz and .nii files of a folder, not of its subfolders, without reading any.

        Raises:
            InputError: the folder is missing, has no such file, or has two for the same case.
        """
        folder = Path(root)
        files: dict[str, str] = {}
        for ending in _ENDINGS:
            for name in _listing(folder, ending, "a folder of scans, .nii.gz or .nii"):
                case = name.removesuffix(ending)
                if case in files:
                    raise InputError(
                        f"{folder / name}: has the same case name as {files[case]}, expected one "
                        "file per scan; remove or rename one"
                    )
                files[case] = name
        if not files:
            raise InputError(
                f"{folder}: has no file that ends in {' or '.join(_ENDINGS)} and no dataset.json, "
                "expected scans, or a data set in nnU-Net's raw layout; check the path"
            )
        return cls(folder, folder.resolve().name, {}, tuple(sorted(files)), files=files)

    def label_of(self, organ: str) -> int:
        """Raises InputError: there are no labels."""
        raise InputError(
            f"organ {organ!r}: {self.root} holds scans without labels (it has no dataset.json); "
            "leave the organ out"
        )

    def image_path(self, case: str) -> Path:
        """The path of a scan; InputError if there is no such case."""
        return self.root / self.files[self.check_case(case)]

    def labels_path(self, case: str) -> Path:
        """Raises InputError: there are no labels."""
        raise InputError(
            f"case {case!r}: {self.root} holds scans without labels (it has no dataset.json), "
            "expected a data set in nnU-Net's raw layout"
        )


def read_names(path: Path) -> dict[int, str]:
    """Read label value to organ name from the "labels" of dataset.json or a file like it.

    Raises:
        InputError: the file cannot be read, or its labels are invalid.
    """
    labels, _ = _labels(path, _load_json(path))
    return {value: organ for organ, value in labels.items()}


def _load_json(path: Path) -> dict[str, Any]:
    try:
        # From bytes, because json detects UTF-8, -16 and -32 and skips Windows' byte order mark.
        meta = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: there is no such file; a data set in nnU-Net's raw layout has one, with "
            '"labels" and "file_ending": write it, or give the folder that holds it'
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    # ValueError: invalid JSON or text; RecursionError: brackets nested too deeply.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}); correct it there") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: expected a JSON object with labels, got {type(meta).__name__}")
    return meta


def _labels(path: Path, meta: dict[str, Any]) -> tuple[dict[str, int], int | None]:
    """Organ to value, sorted by value, without the background, and the value of "ignore"."""
    given = meta.get("labels")
    if not isinstance(given, dict) or not given:
        raise InputError(
            f'{path}: "labels" is missing or not an object; add it, for example '
            '"labels": {"background": 0, "liver": 1}'
        )
    # v1 has the numbers as keys, always text in JSON. In v2 people may write them as text, too.
    v1 = all(isinstance(value, str) for value in given.values()) and any(
        key.strip().isdecimal() for key in given
    )
    labels: dict[str, int] = {}
    for key, value in given.items():
        name, number = (value, key) if v1 else (key, value)
        if isinstance(number, list):
            raise InputError(
                f"{path}: label {name!r} is a region ({number}), which is not supported, expected "
                "one number per label; list the parts of the region as separate labels"
            )
        text = isinstance(number, str) and number.strip().isdecimal() and len(number) <= 10
        label = int(number) if type(number) is int or text else -1
        if not 0 <= label <= 2**31 - 1:
            raise InputError(
                f"{path}: label {name!r} has the value {number!r}, expected a whole number from "
                f"0 to {2**31 - 1}; correct it in the file"
            )
        if name in labels or label in labels.values():
            raise InputError(
                f"{path}: label {name!r} or its value {label} appears twice; give every organ "
                "a different name and value"
            )
        if (name.strip().lower() == "background") != (label == 0):
            raise InputError(
                f"{path}: label {name!r} has the value {label}, but 0 is the background and only "
                'the background; write "background": 0 and give every organ another value'
            )
        labels[name] = label
    ignore = labels.pop("ignore", None)
    organs = {name: labels[name] for name in sorted(labels, key=labels.__getitem__) if labels[name]}
    if not organs:
        raise InputError(f'{path}: "labels" has only the background; add the organs')
    return organs, ignore


def _cases(folder: Path, ending: str) -> tuple[tuple[str, ...], dict[str, Path]]:
    """The sorted names of the complete cases, and the file that each incomplete one lacks."""
    images_folder, labels_folder = folder / "imagesTr", folder / "labelsTr"
    images: set[str] = set()
    for name in _listing(images_folder, ending):
        match = re.fullmatch(r"(.*)_(\d{4})", name.removesuffix(ending))
        if match is None:
            raise InputError(
                f"{images_folder / name}: expected a name such as CASE_0000{ending}, where _0000 "
                "is the channel; rename it"
            )
        if match[2] != "0000":
            raise InputError(
                f"{images_folder / name}: is a second channel, expected one channel (_0000) per "
                "case; make a data set of the channel that you want to use"
            )
        images.add(match[1])
    labels = {name.removesuffix(ending) for name in _listing(labels_folder, ending)}
    if not images:
        raise InputError(
            f"{images_folder}: has no file that ends in {ending}, expected CASE_0000{ending}; "
            'check "file_ending" in dataset.json'
        )
    incomplete = {
        case: labels_folder / f"{case}{ending}"
        if case in images
        else images_folder / f"{case}_0000{ending}"
        for case in sorted(images ^ labels)
    }
    if not images & labels:
        case, missing = next(iter(incomplete.items()))
        raise InputError(
            f"{missing}: missing, and every other case lacks its image or labels, too; add the "
            f"files (those of case {case} are {case}_0000{ending} and {case}{ending})"
        )
    return tuple(sorted(images & labels)), incomplete


def _listing(
    folder: Path, ending: str, expected: str = "the folder of nnU-Net's raw layout"
) -> list[str]:
    try:
        # Skip hidden files of other tools (macOS writes ._CASE_0000.nii.gz).
        return sorted(
            p.name for p in folder.iterdir() if p.name.endswith(ending) and p.name[0] != "."
        )
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror or error}), expected {expected}; "
            "check the path of the data set"
        ) from error
