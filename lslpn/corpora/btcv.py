"""The abdomens of BTCV, "Beyond the Cranial Vault": 30 labelled CT scans, 13 organs.

As distributed in Abdomen/RawData.zip:

    RawData/Training/img/img0001.nii.gz
    RawData/Training/label/label0001.nii.gz

with the numbers 0001 to 0010 and 0021 to 0040. The same project also has the folders
averaged-training-images and averaged-training-labels with files such as DET0000101_avg.nii.gz,
which are other images with other labels: their label 1 is not the spleen. Folders with these names
are used only if their files are named like the abdomens.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ..errors import InputError
from .survey import Survey, files_below, read_both

CORPUS = {
    "name": "BTCV",
    "description": "Abdominal CT in the portal venous phase, 13 organs drawn by hand "
    "(Multi-Atlas Labeling Beyond the Cranial Vault, training cases).",
    "reference": "https://www.synapse.org/Synapse:syn3193805",
    "licence": "see the terms on Synapse",
    "channel_names": {"0": "CT"},
}

# In the order of the organisers' label values, which are kept.
ORGANS = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_vein",
    "pancreas",
    "adrenal_right",
    "adrenal_left",
)
CASES = (*range(1, 11), *range(21, 41))

_FOLDERS = (("img", "label"), ("averaged-training-images", "averaged-training-labels"))
_WITHIN = (".", "RawData/Training", "Training", "Abdomen/RawData/Training", "RawData", "Abdomen")


def survey(source: Path) -> Survey:
    """Find the 30 cases; raises InputError if the folders of the corpus are missing."""
    result = Survey(source, {organ: value for value, organ in enumerate(ORGANS, 1)})
    folders = dict(zip(("img", "label"), _folders(source), strict=True))
    found = {kind: _numbered(folder, kind, result) for kind, folder in folders.items()}
    # All 30 cases are expected, but others are used, too.
    for number in sorted({*CASES, *found["img"], *found["label"]}):
        case = f"btcv_{number:04d}"
        image, labels = (
            result.problems.needed(
                found[kind].get(number, []),
                folder / f"{kind}{number:04d}.nii.gz",
                f"the {'image' if kind == 'img' else 'labels'} of case {case}",
                case,
                "unpack RawData.zip again",
            )
            for kind, folder in folders.items()
        )
        result.cases[case] = functools.partial(
            read_both, case=case, image=image, labels=labels, known=len(ORGANS)
        )
    return result


def _folders(source: Path) -> tuple[Path, Path]:
    for within in _WITHIN:
        for images, labels in _FOLDERS:
            folder = source / within
            if not (folder / images).is_dir() or not (folder / labels).is_dir():
                continue
            files = files_below(folder / images)
            if images != "img" and any(re.match(r"DET\d+_avg", p.name) for p in files):
                continue
            return folder / images, folder / labels
    if any((source / within / "averaged-training-images").is_dir() for within in _WITHIN):
        raise InputError(
            f"{source}: averaged-training-images has DET..._avg.nii.gz, which are not the "
            "abdomens; unpack Abdomen/RawData.zip of the same project and give its folder RawData"
        )
    raise InputError(
        f"{source}: expected the folders img and label with img0001.nii.gz and "
        "label0001.nii.gz, here or in RawData/Training; unpack RawData.zip and give its folder"
    )


def _numbered(folder: Path, kind: str, result: Survey) -> dict[int, list[Path]]:
    pattern = re.compile(rf"{kind}(\d{{4}})(?!\d)")

    def case_of(name: str) -> str | None:
        match = pattern.match(name)
        return f"btcv_{match[1]}" if match else None

    found: dict[int, list[Path]] = {}
    for path, name in result.nifti_files(folder, case_of):
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[1]), []).append(path)
        else:
            result.problems.misnamed(path, f"{kind}0001.nii.gz", case_of(name))
    return found
