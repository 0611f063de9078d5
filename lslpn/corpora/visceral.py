"""VISCERAL's contrast CT: the gold corpus (20 cases, by hand) and the silver one (65, fused).

    Anatomy3-trainingset/Volumes/10000100_1_CTce_ThAb.nii.gz
    Anatomy3-trainingset/Segmentations/10000100_1_CTce_ThAb_58_6.nii.gz   RadLex id, annotator
    SilverCorpus/Volumes/10000101_1_CTce_ThAb.nii.gz
    SilverCorpus/Segmentations/10000101_1_58_FUSION.nii.gz                RadLex id, fusion

The annotator may be empty (10000100_1_CTce_ThAb_480_.nii.gz). Both folders also have other
modalities and volumes of the same patients, and landmarks, which are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .survey import Survey, check_organs, merge_case, natural

CORPUS = {
    "name": "VISCERAL",
    "description": "Contrast-enhanced CT of thorax and abdomen, Anatomy3: gold corpus drawn by "
    "hand, silver corpus fused from the participants' results.",
    "reference": "Jimenez-del-Toro et al., IEEE Transactions on Medical Imaging 2016",
    "licence": "VISCERAL's participation agreement; not to be redistributed",
    "channel_names": {"0": "CT"},
}

# The organisers' own table. Several repositories have the sides of these pairs swapped.
RADLEX = {
    58: "liver",
    86: "spleen",
    29662: "kidney_right",
    29663: "kidney_left",
    32248: "psoas_right",
    32249: "psoas_left",
    170: "pancreas",
    187: "gallbladder",
    237: "urinary_bladder",
    480: "aorta",
    1247: "trachea",
    1302: "lung_right",
    1326: "lung_left",
    2473: "sternum",
    7578: "thyroid",
    29193: "first_lumbar_vertebra",
    30324: "adrenal_right",
    30325: "adrenal_left",
    40357: "rectus_abdominis_right",
    40358: "rectus_abdominis_left",
}
GOLD = tuple(str(10000000 + n) for n in (100, 104, 105, 106, *range(108, 114), *range(127, 137)))
SILVER = tuple(
    str(10000000 + n)
    for n in (
        *(101, 107, *range(114, 123), *range(124, 127), *range(150, 176), *range(177, 182)),
        *(*range(183, 195), 196, *range(198, 202), *range(203, 206)),
    )
)
CORPORA = {"gold": ("Anatomy3-trainingset", GOLD), "silver": ("SilverCorpus", SILVER)}

_PATIENT = r"(?P<patient>\d{8})_(?P<volume>\d+)"
_KIND = r"_(?P<modality>[A-Za-z][A-Za-z0-9]*)_(?P<region>[A-Za-z][A-Za-z0-9]*)"
_VOLUME = re.compile(_PATIENT + _KIND)
_MASK = re.compile(rf"{_PATIENT}(?:{_KIND})?_(?P<radlex>\d+)(?:_(?P<by>[\w.+-]*))?")


def survey(
    source: Path,
    corpus: str = "both",
    organs: Sequence[str] = (),
    annotator: str | None = None,
    allow_missing: bool = False,
) -> Survey:
    """Find the cases of a `corpus`: gold, silver or both.

    `organs`, by default all 20, are in the order of their label values. If an organ has several
    drawings (gold) or fusions (silver), that of `annotator` is used, or else the first one in the
    order of numbers, names, and the one without either.

    Raises:
        InputError: a corpus is not in `source`, or an organ is not one of the 20.
    """
    if corpus not in (*CORPORA, "both"):
        raise InputError(f"corpus: expected gold, silver or both, got {corpus!r}")
    check_organs(organs, RADLEX.values())
    chosen = tuple(dict.fromkeys(organs)) or tuple(RADLEX.values())
    result = Survey(source, {organ: value for value, organ in enumerate(chosen, 1)})
    result.settings = {"corpus": corpus, "annotator": annotator}
    for name in CORPORA if corpus == "both" else (corpus,):
        _corpus(name, corpus == "both", annotator, allow_missing, result)
    return result


def _corpus(
    name: str, both: bool, annotator: str | None, allow_missing: bool, result: Survey
) -> None:
    title, cases = CORPORA[name]
    source = result.source
    folders = [source / title, source / "visceral-dataset" / title, source][: 2 if both else 3]
    for folder in folders:
        if (folder / "Volumes").is_dir() and (folder / "Segmentations").is_dir():
            break
    else:
        raise InputError(
            f"{source}: has no {title} with Volumes and Segmentations, expected the {name} corpus; "
            "check the path, or choose one with `corpus`"
        )
    volumes: dict[str, list[Path]] = {}
    expected = "10000100_1_CTce_ThAb.nii.gz"
    for case, _, path in _files(folder / "Volumes", _VOLUME, expected, cases, result):
        volumes.setdefault(case, []).append(path)
    # Files by case, organ, and annotator or fusion.
    masks: dict[str, dict[str, dict[str, list[Path]]]] = {}
    expected = "10000100_1_CTce_ThAb_58_6.nii.gz or 10000101_1_58_FUSION.nii.gz"
    for case, match, path in _files(folder / "Segmentations", _MASK, expected, cases, result):
        organ = RADLEX.get(int(match["radlex"]))
        if organ is None or organ not in result.labels:
            result.ignored["masks of organs that were not chosen"] += 1
        else:
            by = masks.setdefault(case, {}).setdefault(organ, {})
            by.setdefault(match["by"] or "", []).append(path)
    for case in cases:
        found = volumes.get(case, []), masks.get(case, {})
        _case(case, name, folder, *found, annotator, allow_missing, result)


def _files(
    folder: Path, pattern: re.Pattern[str], expected: str, cases: Sequence[str], result: Survey
) -> Iterator[tuple[str, re.Match[str], Path]]:
    """The files of the cases, for volume 1, contrast CT of thorax and abdomen."""

    def case_of(name: str) -> str | None:
        return next((case for case in cases if name.startswith(f"{case}_")), None)

    for path, name in result.nifti_files(folder, case_of):
        match, case = pattern.fullmatch(name), case_of(name)
        if match is None:
            case = next((case for case in cases if case in name), None)
            result.problems.misnamed(path, expected, case)
        elif (
            case is None
            or match["volume"] != "1"
            or (match["modality"], match["region"]) not in ((None, None), ("CTce", "ThAb"))
        ):
            what = "volumes" if pattern is _VOLUME else "masks"
            result.ignored[f"{what} of another patient, modality or region"] += 1
        else:
            yield case, match, path


def _case(
    case: str,
    corpus: str,
    folder: Path,
    volumes: list[Path],
    masks: dict[str, dict[str, list[Path]]],
    annotator: str | None,
    allow_missing: bool,
    result: Survey,
) -> None:
    problems, again = result.problems, "download it again"
    path = folder / "Volumes" / f"{case}_1_CTce_ThAb.nii.gz"
    image = problems.needed(volumes, path, f"the image of {case}", case, again)

    middle = "1_CTce_ThAb" if corpus == "gold" else "1"
    absent = [organ for organ in result.labels if organ not in masks]
    ids = {organ: number for number, organ in RADLEX.items()}
    if not masks:
        path = folder / "Segmentations" / f"{case}_{middle}_*.nii.gz"
        problems.missing(path, f"every mask of {case}", case, again)
    elif not allow_missing:
        for organ in absent:
            path = folder / "Segmentations" / f"{case}_{middle}_{ids[organ]}_*.nii.gz"
            remedy = f"{again}, or use the case without this organ with `allow_missing=True`"
            problems.missing(path, f"the mask of {organ}", case, remedy)

    taken: dict[str, Path] = {}
    whose: dict[str, str] = {}
    rest: list[dict[str, Any]] = []
    for organ, by in masks.items():
        order = sorted(by, key=lambda name: (name != annotator, natural(name)))
        for name in order:
            problems.one_of(by[name], f"{organ} of {case} by one annotator", case)
        taken[organ], whose[organ] = by[order[0]][0], order[0]
        rest += [{"organ": organ, "file": problems.shown(by[n][0])} for n in order[1:]]
    record: dict[str, Any] = {"corpus": corpus, "annotators": whose, "not_taken": rest}
    if absent:
        record["missing"] = absent
    result.cases[case] = lambda faults: merge_case(
        faults, case, image, taken, result.labels, record, empty_is_fault=True
    )
