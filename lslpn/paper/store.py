"""An experiment's folder: trains and evaluates what is not done yet.

    OUT/experiment.json                           settings that all calls share
    OUT/runs/METHOD/FOLD/seedN/                    a training run, as `lslpn train` writes it
    OUT/evaluations/METHOD/FOLD/seedN/NAME.json    its evaluations, and their inputs

Files are written atomically, so an experiment can be killed at any moment and started again:
finished parts are reused, and an unfinished run continues from its checkpoint.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from lslpn_kernels import GridSpec

from ..checkpoint import FILE_NAME, load_checkpoint, load_model
from ..config import Config
from ..errors import InputError
from ..evaluation.protocols import areas
from ..evaluation.results import Evaluation, Example
from ..evaluation.scoring import evaluate_grids
from ..files import check_writable, is_file, locked, replacing, write_json
from ..info import commit, versions
from ..models import FewShotNetwork, untrained
from ..runs import changes, differences, fixed, time_spent
from ..training import train
from .plan import Align, Run, Setup, common_settings

SETTINGS = "experiment.json"


@dataclass(frozen=True)
class Task:
    """An evaluation of a run."""

    run: Run
    align: Align
    grids: tuple[GridSpec, ...] = ()  # instead of the model's own windows
    organs: tuple[str, ...] | None = None  # default: the run's
    queries: tuple[str, ...] | None = None  # default: the run's test cases
    pictures: bool = False  # keep pictures of the middle slices


@dataclass(frozen=True)
class Done:
    """A finished task."""

    task: Task
    evaluations: tuple[Evaluation, ...]  # one per grid; with examples if the task has pictures
    training_seconds: float | None  # None if the network is untrained or its log is missing
    commit: str | None  # of the code that evaluated


@dataclass
class Store:
    """The folder of an experiment, to be used within `opened`."""

    folder: Path
    setup: Setup
    say: Callable[[str], None]  # for progress and notes
    runs: Path | None = None  # trained networks, default OUT/runs; experiments may share it
    given: Mapping[str, Path] = field(default_factory=dict)  # runs elsewhere, by METHOD:FOLD:SEED
    device: str | torch.device = "cpu"
    progress: bool = True
    _model: tuple[Path, FewShotNetwork] | None = None

    def results(self, tasks: Sequence[Task]) -> list[Done]:
        """Train and evaluate what is not done yet, and read back the rest.

        Raises:
            InputError: an existing run has another configuration or other data; `given` has a run
                that is not part of the experiment; and all that training and evaluation raise.
        """
        runs = {task.run.key: task.run for task in tasks if task.run.trained}
        if unknown := [key for key in self.given if key not in runs]:
            raise InputError(
                f"given: {unknown[0]} is not a run of this experiment; give one of "
                f"{', '.join(runs)}"
            )
        # Check all of them first, so that an error in the last one does not come after a day.
        to_train = [key for key, run in runs.items() if not self._trained(run)]
        to_evaluate = sum(self._read(task) is None for task in tasks)
        self.say(
            f"{len(runs)} networks to train, {len(runs) - len(to_train)} of them already trained; "
            f"{len(tasks)} evaluations, {len(tasks) - to_evaluate} of them already done"
        )
        if to_train:
            self._check_supports(tasks)
        found = []
        for number, task in enumerate(tasks, 1):
            done = self._read(task)
            if done is None:
                where = f"[{number}/{len(tasks)}] {task.run.in_full}: "
                if task.run.key in to_train:
                    to_train.remove(task.run.key)
                    self._train(task.run, where)
                self.say(f"{where}evaluating, {self.name(task)}")
                done = self._evaluate(task)
            found.append(done)
        return found

    def _check_supports(self, tasks: Sequence[Task]) -> None:
        """Refuse a support that does not show an organ, before days of training."""
        rule, dataset = self.setup.rule, self.setup.dataset
        wanted: dict[str, set[str]] = {}
        for task in tasks:
            wanted.setdefault(task.run.subjects.support, set()).update(task.run.organs)
        for case, organs in wanted.items():
            labels = dataset.load_labels(case)
            for organ in sorted(organs):
                if not rule.support_slices(areas(labels.data, dataset.label_of(organ))):
                    raise InputError(
                        f"{labels.path}: the support {case} does not show enough of {organ} for "
                        f"protocol {rule.name}; choose another `support`, or other folds"
                    )

    def run_folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self.given.get(run.key, (self.runs or self.folder / "runs") / run.training_path)

    def agree(self, name: str, settings: dict[str, Any]) -> None:
        """Record the settings of an experiment in the folder, or refuse to change them."""
        file = self.folder / SETTINGS
        settings, before = json.loads(json.dumps(settings)), {}
        if is_file(file):
            try:
                before = json.loads(file.read_text("utf-8"))["settings"]
                # Settings that an earlier version did not have take their defaults.
                common = before["all experiments"]
                parts = {group: common[group] for group in ("preset", "model", "train")}
                common.update(common_settings(Config.from_dict(parts)))
                common.setdefault("own", {})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file}: cannot be read as the settings of an experiment ({error}); give "
                    "another folder"
                ) from error
        if name in before:
            if changed := differences(before[name], settings):
                raise InputError(
                    f"{self.folder}: holds results with other settings: {'; '.join(changed)}; "
                    "give the same options as before, or another folder"
                )
            return
        content = {"settings": {**before, name: settings}, "versions": versions()}
        write_json(file, {**content, "commit": commit()})

    # --- training ---------------------------------------------------------------------------

    def _trained(self, run: Run) -> bool:
        """Whether a run is complete; refuses one with another configuration or other data."""
        folder = self.run_folder(run)
        if run.key not in self.given and not is_file(folder / FILE_NAME):
            return False
        before = load_checkpoint(folder)
        changed = changes(before.config, run.config)
        was = {**before.data, "cases": sorted(before.data["cases"])}
        now = {"dataset": self.setup.dataset.name, "cases": sorted(run.subjects.train)}
        if run.hold_out:  # without labels it makes no difference what was held out
            was["hold_out"], now["hold_out"] = sorted(was["hold_out"]), sorted(run.hold_out)
        changed += differences({name: was.get(name) for name in now}, now)
        if changed:
            raise InputError(
                f"{folder}: holds a run with another configuration: {'; '.join(changed)}; give "
                "the options it was trained with, or another folder"
            )
        complete = before.step >= run.config.train.steps
        if run.key in self.given and not complete:
            raise InputError(
                f"{folder}: stopped at step {before.step} of {run.config.train.steps}; resume its "
                "training and finish it first"
            )
        return complete

    def _train(self, run: Run, where: str) -> None:
        folder = self.run_folder(run)
        begun = is_file(folder / FILE_NAME)
        what = "continuing training" if begun else "training"
        self.say(f"{where}{what} to step {run.config.train.steps} in {folder}")
        train(
            run.config,
            self.setup.dataset,
            hold_out=run.hold_out,
            cases=run.subjects.train,
            out=folder,
            resume=begun,
            device=self.device,
            progress=self.progress,
        )

    # --- evaluation -------------------------------------------------------------------------

    def name(self, task: Task) -> str:
        """The name of an evaluation's file, without its ending."""
        kind = "grids-" if task.grids else "pictures-" if task.pictures else ""
        return f"{kind}{self.setup.rule.name}-{self.setup.rule.chunks}-{task.align}"

    def _file(self, task: Task) -> Path:
        return self.folder / "evaluations" / task.run.path / f"{self.name(task)}.json"

    def _asked(self, task: Task) -> dict[str, Any]:
        """The arguments of `evaluate_grids` that identify a task."""
        return {
            "support": task.run.subjects.support,
            "queries": task.queries or task.run.subjects.test,
            "organs": task.organs or task.run.organs,
            "protocol": self.setup.rule.name,
            "chunks": self.setup.rule.chunks,
            "align": task.align,
        }

    def _key(self, task: Task) -> dict[str, Any]:
        """Everything that an evaluation depends on except the weights, in JSON's types."""
        run = task.run
        key = {
            **self._asked(task),
            "run": run.key,
            "dataset": self.setup.dataset.name,
            "config": fixed(run.config),
            "train_cases": run.subjects.train if run.trained else (),
            "hold_out": run.hold_out if run.trained else (),
            "grids": [(grid.scale, grid.spacing) for grid in task.grids],
            "pictures": task.pictures,
        }
        plain: dict[str, Any] = json.loads(json.dumps(key))
        return plain

    def _checkpoint_sum(self, run: Run) -> int | None:
        """A checksum of a run's checkpoint, or None if it does not exist."""
        file = self.run_folder(run) / FILE_NAME
        return zlib.crc32(file.read_bytes()) if run.trained and is_file(file) else None

    def _read(self, task: Task) -> Done | None:
        """A finished evaluation that is still valid, or None."""
        file = self._file(task)
        if not is_file(file):
            return None
        try:
            content = json.loads(file.read_text("utf-8"))
            before = content["key"]
            before["config"] = fixed(Config.from_dict(before["config"]))
            if before != self._key(task):
                return None
            # Checkpoints are large; results stay valid if one was deleted.
            now = self._checkpoint_sum(task.run)
            if now is not None and content["checkpoint"] != now:
                return None
            evaluations = [Evaluation.from_dict(one) for one in content["evaluations"]]
            if task.pictures:
                [one] = evaluations
                evaluations = [replace(one, examples=_pictures(file.with_suffix(".npz")))]
            return Done(task, tuple(evaluations), content["training_seconds"], content["commit"])
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
            self.say(f"note: {file} cannot be read ({error}) and is evaluated again")
            return None

    def _evaluate(self, task: Task) -> Done:
        run, file = task.run, self._file(task)
        found = evaluate_grids(
            self._load(run),
            self.setup.dataset,
            grids=task.grids or None,
            batch=self.setup.batch,
            progress=self.progress,
            name=run.label,
            **self._asked(task),
        )
        spent = time_spent(self.run_folder(run)) if run.trained else None
        done = Done(task, tuple(found), spent and spent[0], commit())
        if task.pictures:
            _save_pictures(found[0].examples, file.with_suffix(".npz"))
        content = {
            "key": self._key(task),
            "checkpoint": self._checkpoint_sum(run),
            "training_seconds": done.training_seconds,
            "device": str(self.device),
            "commit": done.commit,
            "versions": versions(),
            "evaluations": [one.to_dict() for one in found],
        }
        write_json(file, content)
        return done

    def _load(self, run: Run) -> FewShotNetwork:
        """The network of a run; the last one is kept, since its evaluations follow each other."""
        folder = self.run_folder(run)
        if self._model is None or self._model[0] != folder:
            model = load_model(folder) if run.trained else untrained(run.config, seed=run.seed)
            self._model = folder, model.to(self.device)
        return self._model[1]


@contextmanager
def opened(store: Store) -> Iterator[None]:
    """Hold the lock of an experiment's folder.

    Raises:
        InputError: another process is at work in the folder, it cannot be written, or its results
            have other settings.
    """
    check_writable(store.folder / SETTINGS)
    with locked(store.folder):
        store.agree("all experiments", store.setup.settings())
        yield


# --- pictures -------------------------------------------------------------------------------


def _save_pictures(examples: Sequence[Example], file: Path) -> None:
    arrays = {
        f"{number}/{name}": np.asarray(value)
        for number, example in enumerate(examples)
        for name, value in vars(example).items()
    }
    with replacing(file) as aside, open(aside, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def _pictures(file: Path) -> tuple[Example, ...]:
    found: dict[int, dict[str, Any]] = {}
    with np.load(file, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            number, what = name.split("/")
            found.setdefault(int(number), {})[what] = array if array.ndim else array.item()
    return tuple(Example(**found[number]) for number in sorted(found))
