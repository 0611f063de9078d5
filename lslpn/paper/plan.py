"""The plan of an experiment: which networks are trained on what, and how they are tested.

There are two kinds of folds. An *organ fold* is a group of organs that are held out of training and
tested together (a left and a right kidney, say). A *subject fold* divides the cases into training
and test cases. Every run, method x classes x organ fold x subject fold x seed, has one network.
Without labels there is nothing to hold out, and the runs of all organ folds share one.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import Align, Classes, Config, with_overrides
from ..data.dataset import Dataset
from ..errors import InputError
from ..evaluation.protocols import PROTOCOLS, Protocol
from ..runs import fixed

DEFAULT_SEEDS = (1234, 1235, 1236)
# The organs of the paper's Table 1, by what their names begin with.
_TABLE1 = ("liver", "spleen", "kidney", "psoas")
_LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True)
class SubjectFold:
    """Cases to train on, cases to test on, and the one whose labels are given at the test."""

    name: str  # empty where there is only one, else "1", "2", ...
    train: tuple[str, ...]
    test: tuple[str, ...]  # neither trained on nor the support
    support: str


@dataclass(frozen=True)
class Setup:
    """What all runs and evaluations of an experiment have in common."""

    dataset: Dataset
    config: Config  # the preset with its changes; a run replaces `method`, `seed` and `organs`
    organ_folds: tuple[tuple[str, ...], ...]
    subject_folds: tuple[SubjectFold, ...]
    rule: Protocol = PROTOCOLS["published"]
    align: Align = "none"  # of the evaluation
    batch: int = 8  # query slices encoded at once
    # By method: changes of the configuration for that one alone.
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def config_of(self, method: str, seed: int) -> Config:
        """The configuration of a method's run; InputError where there is no such method."""
        config = with_overrides(self.config, method=method, seed=seed)
        return with_overrides(config, **self.own.get(method, {}))

    @property
    def organs(self) -> tuple[str, ...]:
        """All organs that are tested, in the order of the folds."""
        return tuple(organ for fold in self.organ_folds for organ in fold)

    def settings(self) -> dict[str, Any]:
        """What two calls for one folder must agree on, ready for JSON."""
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
    """One network: how it is trained, and which organs of which cases it then segments.

    With `classes` "all" it is trained on every label that is not held out (the paper's "added
    classes"), with "tested" on the organs of the other organ folds only, and with "none" on
    superpixels, without any label.
    """

    method: str
    classes: Classes
    organs: tuple[str, ...]  # the organ fold
    subjects: SubjectFold
    seed: int  # of training, and of the untrained layers
    config: Config
    trained: bool = True  # False for the network before training

    @property
    def hold_out(self) -> tuple[str, ...]:
        """Organs that training must not see: the organ fold, where training reads labels at all."""
        reads = self.classes != "none" or self.config.train.drop_test_slices
        return self.organs if reads else ()

    @property
    def variant(self) -> str:
        """Method and classes, as folders and `--run` have it."""
        if not self.trained:
            return f"{self.method}-untrained"
        return self.method if self.classes == "all" else f"{self.method}-{self.classes}"

    @property
    def label(self) -> str:
        """Method and classes for people: a row of the table."""
        if not self.trained:
            return f"{self.method}, untrained"
        return f"{self.method}, {in_words(self.classes)}"

    @property
    def in_full(self) -> str:
        """The run for people: `label`, folds and seed."""
        where = f"subject fold {self.subjects.name}, " if self.subjects.name else ""
        return f"{self.label}; {', '.join(self.organs)} held out, {where}seed {self.seed}"

    @property
    def path(self) -> Path:
        """Where its evaluations lie, below the folder of evaluations."""
        return Path(self.variant, self._fold(self.organs), f"seed{self.seed}")

    @property
    def training_path(self) -> Path:
        """Where its network lies, below the folder of the runs."""
        return Path(self.variant, self._fold(self.hold_out), f"seed{self.seed}")

    @property
    def key(self) -> str:
        """METHOD:FOLD:SEED of its network, as `--run` has it."""
        return f"{self.variant}:{self._fold(self.hold_out)}:{self.seed}"

    def _fold(self, organs: tuple[str, ...]) -> str:
        """The folds' name: "liver", "kidney_a+kidney_b@2", "any"."""
        subjects = f"@{self.subjects.name}" if self.subjects.name else ""
        return _file_name(("+".join(organs) or "any") + subjects)


def in_words(classes: Classes) -> str:
    """What a network is trained on, for people."""
    return "no classes" if classes == "none" else f"{classes} classes"


def common_settings(config: Config) -> dict[str, Any]:
    """`fixed`, without what differs from run to run of one experiment."""
    plain = fixed(config)
    del plain["model"]["method"]
    for name in ("seed", "organs", "supervision"):
        del plain["train"][name]
    return plain


def plan_runs(
    setup: Setup,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    classes: Sequence[Classes] = ("all",),
    untrained: bool = False,
) -> list[Run]:
    """All runs, those of the first seed first, so that a table can be made early.

    A method that is set to superpixels is trained on no classes, once, whatever `classes` says.
    `untrained` adds the first method's network before training.

    Raises:
        InputError: an unknown method; "tested" with organ folds that leave nothing to train on.
    """
    for what, values in (("method", methods), ("seeds", seeds), ("classes", classes)):
        if not values:
            raise InputError(f"{what}: expected at least one, got none")
    if "tested" in classes and len(setup.organ_folds) < 2:
        raise InputError(
            "classes: without added classes a network is trained on the organs of the other "
            "folds, and there is one fold alone; add a second one to `organ_folds`, or train on "
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
        kinds: Sequence[Classes] = ("none",) if unlabelled else classes
        for kind in dict.fromkeys(kinds):
            changed = with_overrides(
                config,
                organs=others if kind == "tested" else None,
                supervision="superpixels" if kind == "none" else "labels",
            )
            runs.append(Run(method, kind, fold, subjects, seed, changed))
        if untrained and method == methods[0]:
            runs.append(Run(method, "all", fold, subjects, seed, config, trained=False))
    return runs


# --- folds ----------------------------------------------------------------------------------


def organ_folds(dataset: Dataset, given: Sequence[str] = ()) -> tuple[tuple[str, ...], ...]:
    """The organ folds: each a name, or several joined by "+"; default: those of Table 1.

    Raises:
        InputError: an unknown organ, one in two folds, or a data set without an organ of Table 1.
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
                raise InputError(f"organ_folds: {organ} is given twice; each organ has one fold")
            seen.add(organ)
        other = files.setdefault(_file_name("+".join(fold)), fold)
        if other is not fold:
            raise InputError(
                f"organ_folds: {'+'.join(other)} and {'+'.join(fold)} would share their files, "
                "whose names have _ for most signs; rename an organ in dataset.json"
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

    With `parts` the sorted cases are cut into so many equal parts, each tested by a network that
    is trained on the others; the case after a part (after the last: the first) is its support, as
    in ALPNet's folds. Otherwise `train` and `test` are names or patterns such as "silver_*", by
    default all other cases. The support, by default the first case to train on, may be one of
    those to train on, and is never tested.

    Raises:
        InputError: neither `parts` nor `train` nor `test`, or `parts` with one of the others; an
            unknown case; a case both trained and tested on; nothing to train or to test on.
    """
    cases = dataset.cases
    if parts is not None:
        if train or test or support:
            raise InputError(
                "parts: cuts the cases by itself; leave out `train`, `test` and `support`, or "
                "`parts`"
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
            "`train`, `test` or `parts`: expected one of them; say who is trained on "
            f"and who is tested, of the {len(cases)} cases {cases[0]} to {cases[-1]}"
        )
    if support is not None:
        dataset.check_case(support)
    trained, tested = _cases(dataset, train, "train"), _cases(dataset, test, "test")
    tested = tuple(case for case in tested if case != support)
    if both := [case for case in trained if case in tested]:
        raise InputError(
            f"test: {', '.join(both)} would be trained on as well; a network is not to be "
            "tested on scans that it saw"
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
        matching = fnmatch.filter(dataset.cases, text)
        if not matching:
            if any(mark in text for mark in "*?["):
                raise InputError(
                    f"{what}: no case of data set {dataset.name} is named like {text!r}; "
                    f"there are {dataset.cases[0]} to {dataset.cases[-1]}"
                )
            dataset.check_case(text)
        found.update(matching)
    return tuple(case for case in dataset.cases if case in found)


def _file_name(text: str) -> str:
    name = re.sub(r"[^\w.+@-]", "_", text)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 4]}-{zlib.crc32(text.encode()):08x}"
