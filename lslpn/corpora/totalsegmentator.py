"""TotalSegmentator's CT data set, versions 1 and 2: a folder for each case, a file for each organ.

    s0001/ct.nii.gz
    s0001/segmentations/liver.nii.gz
    meta.csv

Organs have the names of their files. A case that shows none of the chosen organs (such as a scan of
a leg) is skipped, which is not a problem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from . import btcv
from .survey import Survey, check_organs, merge_case

CORPUS = {
    "name": "TotalSegmentator",
    "description": "CT of all body regions; labels drawn by an iteratively trained nnU-Net and "
    "corrected by hand.",
    "reference": "Wasserthal et al., Radiology: Artificial Intelligence 2023",
    "licence": "CC BY 4.0",
    "channel_names": {"0": "CT"},
}

# The 13 organs of BTCV, which both versions have, in TotalSegmentator's names.
_OTHER_NAMES = {
    "portal_and_splenic_vein": "portal_vein_and_splenic_vein",
    "adrenal_right": "adrenal_gland_right",
    "adrenal_left": "adrenal_gland_left",
}
ABDOMEN = tuple(_OTHER_NAMES.get(organ, organ) for organ in btcv.ORGANS)

_CASE = re.compile(r"s\d{4,}")


def survey(source: Path, organs: Sequence[str] = (), allow_missing: bool = False) -> Survey:
    """Find the cases in `source` or one of its folders.

    `organs`, by default `ABDOMEN`, are in the order of their label values.

    Raises:
        InputError: there is no case, or an organ has no mask in any case.
    """
    chosen = tuple(dict.fromkeys(organs)) or ABDOMEN
    root = _root(source)
    result = Survey(source, {organ: value for value, organ in enumerate(chosen, 1)})
    known: set[str] = set()
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if not result.finished(entry, None):
            continue
        if not entry.is_dir():
            result.ignored["beside the cases (meta.csv and the like)"] += 1
        elif _CASE.fullmatch(entry.name):
            known |= _case(entry, chosen, allow_missing, result)
        elif (entry / "segmentations").is_dir() or any(entry.glob("ct*")):
            result.problems.misnamed(entry, "s0001 for a case's folder")
        else:
            result.ignored["folders that are no case"] += 1
    check_organs(chosen, known or chosen)
    return result


def _root(source: Path) -> Path:
    for folder in (source, *sorted(p for p in source.iterdir() if p.is_dir())):
        if any(_CASE.fullmatch(p.name) for p in folder.iterdir() if p.is_dir()):
            return folder
    raise InputError(
        f"{source}: has no case, expected folders such as s0001 that contain ct.nii.gz and "
        "segmentations; unpack the data set and give its folder"
    )


def _case(folder: Path, chosen: Sequence[str], allow_missing: bool, result: Survey) -> set[str]:
    """Add a case to the survey and return the organs that have a mask."""
    case, problems = folder.name, result.problems
    images: list[Path] = []
    masks: dict[str, list[Path]] = {}
    for path, name in result.nifti_files(folder, lambda _: case):
        inside = path.parent.name == "segmentations"
        if inside and re.fullmatch(r"\w+", name):
            masks.setdefault(name, []).append(path)
        elif not inside and name == "ct":
            images.append(path)
        else:
            problems.misnamed(path, "liver.nii.gz" if inside else "ct.nii.gz", case)
    again = "unpack or download this case again"
    image = problems.needed(images, folder / "ct.nii.gz", f"the image of {case}", case, again)
    absent = [organ for organ in chosen if organ not in masks]
    for organ in () if allow_missing else absent:
        path = folder / "segmentations" / f"{organ}.nii.gz"
        remedy = f"{again}, or use the case without this organ with `allow_missing=True`"
        problems.missing(path, f"the mask of {organ}", case, remedy)
    taken: dict[str, Path] = {}
    for organ in chosen:
        if mask := problems.one_of(masks.get(organ, []), f"{organ} of {case}", case):
            taken[organ] = mask
    record = {"missing": absent} if absent else {}
    result.cases[case] = lambda faults: merge_case(
        faults, case, image, taken, result.labels, record, empty_is_fault=False
    )
    return set(masks)
