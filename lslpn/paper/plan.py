"""The plan of an experiment: which networks are trained on what, and how they are tested.

There are two kinds of folds. An *organ fold* is a group of organs that are held out of training and
tested together (a left and a right kidney, say). A *subject fold* divides the cases into training
and test cases. A run is one combination of method, classes, organ fold, subject fold and seed, with
a network of its own. Training without labels holds nothing out, so the runs of all organ folds then
share a network.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import Align, Classes, Config, with_overrides
from ..data.dataset import Dataset
from ..errors import InputError
from ..evaluation.protocols import PROTOCOLS, Protocol
from ..runs import fixed

DEFAULT_SEEDS = (1234, 1235, 1236)
# What a network was trained on: see `Run`.
TrainedOn = Classes | Literal["untrained"]
# The organs of the paper's Table 1, by a word of their names.
_TABLE1 = ("liver", "spleen", "kidney", "psoas")
_LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True)
class SubjectFold:
    """Cases to train on, cases to test on, and the support of the test."""

    name: str  # "1", "2", ..., or empty if there is only one
    train: tuple[str, ...]
    test: tuple[str, ...]  # without `train` and `support`
    support: str


@dataclass(frozen=True)
class Setup:
    """The settings shared by all runs and evaluations of an experiment."""

    dataset: Dataset
    config: Config  # the preset with its changes; a run replaces `method`, `seed` and `organs`
    organ_folds: tuple[tuple[str, ...], ...]
    subject_folds: tuple[SubjectFold, ...]
    rule: Protocol = PROTOCOLS["published"]
    align: Align = "none"  # of the evaluation
    batch: int = 8  # query slices encoded at once
    # Changes of the configuration for single methods, by method.
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def config_of(self, method: str, seed: int) -> Config:
        """The configuration of a run; raises InputError if the method is unknown."""
        config = with_overrides(self.config, method=method, seed=seed)
        return with_overrides(config, **self.own.get(method, {}))

    @property
    def organs(self) -> tuple[str, ...]:
        """All tested organs, in the order of the folds."""
        return tuple(organ for fold in self.organ_folds for organ in fold)

    def settings(self) -> dict[str, Any]:
        """The settings in which two calls for one folder must agree, ready for JSON."""
        return {
            "dataset": self.dataset.name,
            "labels": dict(self.dataset.labels),
            "subject_folds": [asdict(fold) for fold in self.subject_folds],
            "protocol": self.rule.name,
            "chunks": self.rule.chunks,
            "align": self.align,
            "setting": "II" if self.config.train.drop_test_slices else "I",
            **common_settings(self.config),
            "own": {method: dict(changes) for method, changes in self.own.items()},
        }


@dataclass(frozen=True)
class Run:
    """One network: how it is trained, and which organs of which cases it segments.

    With `classes` "all" it is trained on every label that is not held out (the paper's "added
    classes"), with "tested" on the organs of the other organ folds only, with "none" on
    superpixels, without any label, and with "untrained" not at all.
    """

    method: str
    classes: TrainedOn
    organs: tuple[str, ...]  # the organ fold
    subjects: SubjectFold
    seed: int  # of training, and of the layers that start from noise
    config: Config

    @property
    def trained(self) -> bool:
        return self.classes != "untrained"

    @property
    def hold_out(self) -> tuple[str, ...]:
        """The organs that training must not see: the organ fold, if training reads labels."""
        reads = self.classes != "none" or self.config.train.drop_test_slices
        return self.organs if reads else ()

    @property
    def variant(self) -> str:
        """Method and classes in the names of folders and in `--run`."""
        return self.method if self.classes == "all" else f"{self.method}-{self.classes}"

    @property
    def label(self) -> str:
        """Method and classes in tables and figures."""
        return f"{self.method}, {in_words(self.classes)}"

    @property
    def in_full(self) -> str:
        """`label`, folds and seed, for messages and headings."""
        where = f"subject fold {self.subjects.name}, " if self.subjects.name else ""
        return f"{self.label}; {', '.join(self.organs)} held out, {where}seed {self.seed}"

    @property
    def path(self) -> Path:
        """The folder of its evaluations, relative to that of all evaluations."""
        return Path(self.variant, self._fold(self.organs), f"seed{self.seed}")

    @property
    def training_path(self) -> Path:
        """The folder of its network, relative to that of all runs."""
        return Path(self.variant, self._fold(self.hold_out), f"seed{self.seed}")

    @property
    def key(self) -> str:
        """METHOD:FOLD:SEED of its network, as in `--run`."""
        return f"{self.variant}:{self._fold(self.hold_out)}:{self.seed}"

    def _fold(self, organs: tuple[str, ...]) -> str:
        """The folds in one word: "liver", "kidney_a+kidney_b@2", "any"."""
        subjects = f"@{self.subjects.name}" if self.subjects.name else ""
        return _file_name(("+".join(organs) or "any") + subjects)


def in_words(classes: TrainedOn) -> str:
    """What a network was trained on, for tables."""
    if classes == "untrained":
        return classes
    return "no classes" if classes == "none" else f"{classes} classes"


def common_settings(config: Config) -> dict[str, Any]:
    """`fixed` without the settings that differ between the runs of an experiment."""
    plain = fixed(config)
    del plain["model"]["method"]
    for name in ("seed", "organs", "supervision"):
        del plain["train"][name]
    return plain


def plan_runs(
    setup: Setup, methods: Sequence[str], seeds: Sequence[int], classes: Sequence[TrainedOn]
) -> list[Run]:
    """All runs, those of the first seed first.

    A method that is set to superpixels is trained once, on no classes, instead of on `classes`.
    Of "untrained" networks there is only that of the first method.

    Raises:
        InputError: an unknown method; "tested" with only one organ fold.
    """
    if "tested" in classes and len(setup.organ_folds) < 2:
        raise InputError(
            "classes: without added classes a network is trained on the organs of the other "
            "folds, but there is only one fold; add a second one to `organ_folds`, or train on "
            "all classes"
        )
    runs = []
    crossed = itertools.product(
        dict.fromkeys(seeds), setup.organ_folds, setup.subject_folds, dict.fromkeys(methods)
    )
    for seed, fold, subjects, method in crossed:
        config = setup.config_of(method, seed)
        others = tuple(organ for organ in setup.organs if organ not in fold)
        unlabelled = config.train.supervision == "superpixels"
        kinds = ("none" if unlabelled and kind != "untrained" else kind for kind in classes)
        for kind in dict.fromkeys(kinds):
            if kind == "untrained" and method != methods[0]:
                continue
            changed = config
            if kind != "untrained":
                changed = with_overrides(
                    config,
                    organs=others if kind == "tested" else None,
                    supervision="superpixels" if kind == "none" else "labels",
                )
            runs.append(Run(method, kind, fold, subjects, seed, changed))
    return runs


# --- folds ----------------------------------------------------------------------------------


def organ_folds(dataset: Dataset, given: Sequence[str] = ()) -> tuple[tuple[str, ...], ...]:
    """The organ folds: names of organs, joined by "+" if several; default: those of Table 1.

    Raises:
        InputError: an unknown organ, one in two folds, or no organ of Table 1 in the data set.
    """
    if given:
        folds = [tuple(part.strip() for part in text.split("+") if part.strip()) for text in given]
    else:
        named = [
            tuple(o for o in dataset.organs if start in re.split(r"[^a-z]+", o.lower()))
            for start in _TABLE1
        ]
        folds = [fold for fold in named if fold]
        if not folds:
            raise InputError(
                f"organ_folds: data set {dataset.name} has none of {', '.join(_TABLE1)}; name the "
                f"organs to hold out, of {', '.join(dataset.organs)}"
            )
    seen: set[str] = set()
    files: dict[str, tuple[str, ...]] = {}
    for fold in folds:
        if not fold:
            raise InputError("organ_folds: expected an organ, or several joined by +, got none")
        for organ in fold:
            dataset.label_of(organ)
            if organ in seen:
                raise InputError(
                    f"organ_folds: {organ} is given twice; put each organ into one fold"
                )
            seen.add(organ)
        other = files.setdefault(_file_name("+".join(fold)), fold)
        if other is not fold:
            raise InputError(
                f"organ_folds: {'+'.join(other)} and {'+'.join(fold)} would share their files, "
                "whose names have _ for special characters; rename an organ in dataset.json"
            )
    return tuple(folds)


def subject_folds(
    dataset: Dataset,
    *,
    parts: int | None = None,
    train: Sequence[str] = (),
    test: Sequence[str] = (),
    support: str | None = None,
) -> tuple[SubjectFold, ...]:
    """The cases to train on and to test on.

    With `parts` the sorted cases are cut into that many equal parts, and each part is tested with
    a network trained on the others. Its support is the case after it (for the last part the first
    case), as in ALPNet's folds. Otherwise `train` and `test` are names or patterns such as
    "silver_*"; if one of them is not given, it is all cases but the other's. The support, by
    default the first case to train on, may be a training case and is never tested.

    Raises:
        InputError: neither `parts` nor `train` nor `test`, or `parts` with one of the others; an
            unknown case; a case both trained and tested on; nothing to train or to test on.
    """
    cases = dataset.cases
    if parts is not None:
        if train or test or support:
            raise InputError(
                "parts: divides all cases; leave out `train`, `test` and `support`, or `parts`"
            )
        if not 2 <= parts <= len(cases):
            raise InputError(f"parts: expected 2 to {len(cases)} (the cases), got {parts}")
        edges = [round(i * len(cases) / parts) for i in range(parts + 1)]
        return tuple(
            SubjectFold(
                name=str(i + 1),
                train=cases[: edges[i]] + cases[edges[i + 1] :],
                test=cases[edges[i] : edges[i + 1]],
                support=cases[edges[i + 1] % len(cases)],
            )
            for i in range(parts)
        )
    if not train and not test:
        raise InputError(
            "`train`, `test` or `parts`: expected one of them; say which of the "
            f"{len(cases)} cases {cases[0]} to {cases[-1]} to train on or to test on"
        )
    if support is not None:
        dataset.check_case(support)
    trained, tested = _cases(dataset, train, "train"), _cases(dataset, test, "test")
    tested = tuple(case for case in tested if case != support)
    if both := [case for case in trained if case in tested]:
        raise InputError(
            f"test: {', '.join(both)} would be trained on as well; test on cases that are not "
            "trained on"
        )
    if not train:
        trained = tuple(c for c in cases if c not in tested and c != support)
    if not test:
        tested = tuple(c for c in cases if c not in trained and c != support)
    if not trained:
        raise InputError("train: no case is left to train on")
    if not tested:
        raise InputError(f"test: no case{' but the support' * bool(support)} is left to test on")
    return (SubjectFold("", trained, tested, support or trained[0]),)


def _cases(dataset: Dataset, given: Sequence[str], what: str) -> tuple[str, ...]:
    """Cases by name or pattern, in the data set's order."""
    found: set[str] = set()
    for text in given:
        matching = [text] if text in dataset.cases else fnmatch.filter(dataset.cases, text)
        if not matching:
            if any(mark in text for mark in "*?["):
                raise InputError(
                    f"{what}: no case of data set {dataset.name} matches {text!r}; its cases "
                    f"are {dataset.cases[0]} to {dataset.cases[-1]}"
                )
            dataset.check_case(text)
        found.update(matching)
    return tuple(case for case in dataset.cases if case in found)


def _file_name(text: str) -> str:
    name = re.sub(r"[^\w.+@-]", "_", text)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 4]}-{zlib.crc32(text.encode()):08x}"
