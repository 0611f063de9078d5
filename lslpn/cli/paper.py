"""`lslpn experiment`: a command per experiment of the paper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..config import Align, Classes, Method, Protocol
from ..errors import InputError
from .options import (
    BATCH,
    CHUNKS,
    DATA,
    DEVICE,
    PRESET,
    QUIET,
    Preset,
    command,
    grid_of,
    group,
    option,
    pairs,
    say,
    settings_of,
    sharing,
    split,
    torch_device,
)

if TYPE_CHECKING:
    from ..paper.store import Store

experiment_app = group(
    "The paper's experiments: train what is not trained yet, evaluate it, and write the "
    "tables and figures.\n\n"
    "Repeat a command to continue an experiment that was stopped. Commands with the same --out "
    "share its trained networks."
)

_Some = list[str] | None
_METHOD = option(
    "--method NAME", "lslpn, panet, senet or alpnet, repeated or with commas; default: lslpn."
)
_UNTRAINED = option("--untrained", "Add the first method's network before training.", False)
_ONLY_UNTRAINED = option("--untrained", "Use the network before training instead.", False)
_CLASSES = option(
    "--classes",
    "Train on all labels that are not held out, only on those of the other --fold (tested), or "
    "on superpixels, without any label (none).",
    "all",
)


@dataclass(frozen=True)
class _Given:
    """The options that all experiments share, which `_experiment` adds to every command."""

    data: Path = DATA
    out: Path = option(
        "--out DIR", "Where tables, figures, evaluations and trained networks go.", ...
    )
    fold: _Some = option(
        "--fold ORGANS",
        "Organs that are held out and tested together, such as liver, or "
        "kidney_right+kidney_left; repeat for more folds. Default: those of liver, spleen, the "
        "kidneys and the psoas muscles that the data set has.",
    )
    folds: int | None = option(
        "--folds K",
        "Cut the cases into K parts: test on each, train on the others; the case after a part "
        "is its support.",
        min=2,
    )
    train_cases: _Some = option(
        "--train-cases CASE",
        "Cases to train on, repeated or with commas, or patterns such as 'silver_*'; default: "
        "all that are not tested.",
    )
    test_cases: _Some = option(
        "--test-cases CASE",
        "Cases to test on, in the same form; default: all that are not trained on.",
    )
    support: str | None = option(
        "--support CASE", "The labelled case of the test; default: the first training case."
    )
    seeds: _Some = option(
        "--seeds N", "A training run for each, repeated or with commas; default: 1234,1235,1236."
    )
    setting: Literal["I", "II"] = option(
        "--setting",
        "I: held-out organs may be visible, unlabelled, in training slices; II: such slices are "
        "excluded.",
        "I",
    )
    protocol: Protocol = option(
        "--protocol NAME", "published, senet, alpnet or adnet, as in evaluate.", "published"
    )
    chunks: int | None = CHUNKS
    align: Align = option(
        "--align", "body crops the scans to the patient's body first, in training and test.", "none"
    )
    preset: Preset = PRESET
    sets: _Some = option(
        "--set [METHOD.]NAME=VALUE",
        "Change one setting of the preset, such as --set size=257, or only for one method, such "
        "as --set alpnet.supervision=superpixels; repeat for more.",
    )
    runs: Path | None = option(
        "--runs DIR",
        "The folder of trained networks, old and new, as METHOD/FOLD/seedN; default: OUT/runs.",
    )
    run: _Some = option(
        "--run METHOD:FOLD:SEED=RUN",
        "Use a network that `lslpn train` trained with the same settings; repeat for more.",
    )
    batch: int = BATCH
    device: str = DEVICE
    quiet: bool = QUIET


def _experiment(function: Callable[..., list[Path]]) -> Callable[..., None]:
    """Make a command of a function of `_Given` and options of its own that returns files."""
    shared = sharing(_Given, function)

    @functools.wraps(shared)
    def run(**values: Any) -> None:
        files = shared(**values)
        for file in files:
            if file.suffix == ".md":
                print(file.read_text("utf-8"))
        print("written: " + ", ".join(map(str, files)))

    return command(experiment_app)(run)


# --- experiments ----------------------------------------------------------------------------


@_experiment
def table1(
    given: _Given,
    method: _Some = _METHOD,
    classes: _Some = option(
        "--classes NAME",
        "Train with added classes (all labels that are not held out: all), without them (only the "
        "organs of the other --fold: tested), or on superpixels, without any label (none); "
        "repeated or with commas; default: all,tested.",
    ),
    untrained: bool = _UNTRAINED,
) -> list[Path]:
    """Table 1: every method, per organ and mean, with and without added classes."""
    from ..paper import table1 as experiment

    kinds = _classes(classes) + ["untrained"] * untrained
    with _opened(given) as store:
        return experiment.run(store, _methods(method), _seeds(given.seeds), kinds)


@_experiment
def grid_scale(
    given: _Given,
    scale: _Some = option(
        "--scale FRACTION",
        "Size of a window over the image, or SIZE:SPACING, repeated or with commas; default: "
        "1/16, 1/8, 1/4 and 1, and without overlap 1/16:1, 1/8:1 and 1/4:1.",
    ),
    untrained: bool = _ONLY_UNTRAINED,
    classes: Classes = _CLASSES,
) -> list[Path]:
    """Fig. 3, left: the size of the windows, with and without overlap.

    The networks are those of table1; each is evaluated with every grid in one pass.
    """
    from ..paper import grid_scale as experiment

    grids = [grid_of(text, experiment.OVERLAP) for text in split(scale)]
    with _opened(given) as store:
        kind = "untrained" if untrained else classes
        return experiment.run(store, _seeds(given.seeds), grids or experiment.DEFAULT_GRIDS, kind)


@_experiment
def misalignment(
    given: _Given,
    method: Method = option("--method NAME", "lslpn, panet, senet or alpnet.", "lslpn"),
    untrained: bool = _ONLY_UNTRAINED,
    classes: Classes = _CLASSES,
) -> list[Path]:
    """Fig. 3, right: how well organs are found, against how well support and query are aligned.

    Every network is evaluated twice, with whole scans and with scans cropped to the body; --align
    says how it is trained.
    """
    from ..paper import misalignment as experiment

    with _opened(given) as store:
        kind = "untrained" if untrained else classes
        return experiment.run(store, method, _seeds(given.seeds), kind)


@_experiment
def figures(
    given: _Given,
    method: _Some = _METHOD,
    case: _Some = option(
        "--case CASE", "Test cases to show, repeated or with commas; default: the first two."
    ),
    organ: _Some = option(
        "--organ NAME", "Organs to show, repeated or with commas; default: all that are held out."
    ),
    untrained: bool = _UNTRAINED,
    classes: Classes = _CLASSES,
) -> list[Path]:
    """Fig. 2 and 4: support, query, ground truth and each method's result.

    Shows the middle slice of an organ, never the best one. Only the first of --seeds is used.
    """
    from ..paper import figures as experiment

    kinds: list[Any] = [classes, "untrained"] if untrained else [classes]
    with _opened(given) as store:
        dataset, seed = store.setup.dataset, _seeds(given.seeds)[0]
        cases, organs = split(case, dataset.cases), split(organ, dataset.organs)
        return experiment.run(store, _methods(method), seed, kinds, cases=cases, organs=organs)


# --- parts ----------------------------------------------------------------------------------

# Settings that have an option of their own.
_SET_BY = {
    "method": "--method",
    "seed": "--seeds",
    "organs": "--fold and --classes",
    "drop_test_slices": "--setting",
    "supervision": "--classes none (METHOD.supervision is for one method)",
}


@contextmanager
def _opened(given: _Given) -> Iterator[Store]:
    """The experiment's folder, locked, after all shared options have been checked."""
    from ..config import PRESETS, with_overrides
    from ..data.dataset import Dataset
    from ..distributed import launched
    from ..evaluation.protocols import protocol_of
    from ..paper.plan import Setup, organ_folds, subject_folds
    from ..paper.store import Store, opened

    if launched():
        raise InputError(
            "torchrun: an experiment runs in one process; train its networks with "
            "`torchrun -m lslpn train` and give them with --run"
        )
    dataset = Dataset.open(given.data)
    changes: dict[str, dict[str, str]] = {"": {}}  # by method, "" for all methods
    for key, value in settings_of(given.sets).items():
        method, _, name = key.rpartition(".")
        if name in _SET_BY and not (method and name == "supervision"):
            raise InputError(f"--set {name}: is set by {_SET_BY[name]}; use that instead")
        changes.setdefault(method, {})[name] = value
    common = {"align": given.align, "drop_test_slices": str(given.setting == "II")}
    common.update(changes.pop(""))  # --set align=... may differ, for training only
    # Names with commas in them are not split, nor are such names joined by +.
    known = set(dataset.organs)
    known |= {
        text for text in given.fold or () if known.issuperset(map(str.strip, text.split("+")))
    }
    setup = Setup(
        dataset=dataset,
        config=with_overrides(PRESETS[given.preset], **common),
        organ_folds=organ_folds(dataset, split(given.fold, known)),
        subject_folds=subject_folds(
            dataset,
            parts=given.folds,
            train=split(given.train_cases, dataset.cases),
            test=split(given.test_cases, dataset.cases),
            support=given.support,
        ),
        rule=protocol_of(given.protocol, given.chunks),
        align=given.align,
        batch=given.batch,
        own=changes,
    )
    for method in changes:
        setup.config_of(method, 0)  # refuses unknown methods and settings
    store = Store(
        given.out,
        setup,
        say,
        runs=given.runs,
        given=_given_runs(given.run),
        device=torch_device(given.device),
        progress=not given.quiet,
    )
    with opened(store):
        yield store


def _methods(given: _Some) -> list[str]:
    return split(given) or ["lslpn"]


def _seeds(given: _Some) -> list[int]:
    from ..paper.plan import DEFAULT_SEEDS

    texts = split(given)
    if wrong := next((text for text in texts if not text.isdecimal()), None):
        raise InputError(f"--seeds: expected whole numbers from 0, got {wrong!r}")
    return [int(text) for text in texts] or list(DEFAULT_SEEDS)


def _classes(given: _Some) -> list[Any]:
    known, texts = get_args(Classes), split(given)
    for text in texts:
        if text not in known:
            raise InputError(f"--classes: expected some of {', '.join(known)}, got {text!r}")
    return texts or ["all", "tested"]


def _given_runs(given: _Some) -> dict[str, Path]:
    """The METHOD:FOLD:SEED=RUN pairs of --run."""
    expected = "METHOD:FOLD:SEED=RUN such as lslpn:liver:1234=DIR"
    found = pairs("--run", given, expected)
    for key, path in found.items():
        if not path or key.count(":") != 2:
            raise InputError(f"--run: expected {expected}, got '{key}={path}'")
    return {key: Path(path) for key, path in found.items()}
