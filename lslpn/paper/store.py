"""An experiment's folder: what is to be done in it, what is done already, and the doing of it.

    OUT/experiment.json                           what all calls for this folder must agree on
    OUT/runs/METHOD/FOLD/seedN/                    a training run, as `lslpn train` leaves it
    OUT/evaluations/METHOD/FOLD/seedN/NAME.json    its evaluations, with what they were made from

A run is trained by `lslpn.train` and evaluated by `lslpn.evaluate`; here is only remembered that
it was. Every file is whole or not there, so an experiment can be killed at any moment and started
again: what is complete is taken as it is, a run that was begun goes on from its checkpoint.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lslpn_kernels import GridSpec

from ..checkpoint import FILE_NAME, load_checkpoint, load_model
from ..config import Config
from ..errors import InputError
from ..evaluation.protocols import areas
from ..evaluation.results import Evaluation, Example
from ..evaluation.scoring import evaluate_grids
from ..files import check_writable, is_file, locked, replacing, write_text
from ..info import commit, versions
from ..models import untrained
from ..runs import changes, differences, fixed, time_spent
from ..training import train
from .plan import Align, Run, Setup, common_settings

if TYPE_CHECKING:
    from ..models import FewShotNetwork

SETTINGS = "experiment.json"


@dataclass(frozen=True)
class Task:
    """An evaluation of a run.

    Attributes:
        run: of which network.
        name: the file's name.
        align: how the scans are aligned.
        grids: windows in the place of the model's own; empty: those.
        organs, queries: what is asked for; None: the run's own organs and test cases.
        pictures: keep the pictures of the middle slices as well.
    """

    run: Run
    name: str
    align: Align
    grids: tuple[GridSpec, ...] = ()
    organs: tuple[str, ...] | None = None
    queries: tuple[str, ...] | None = None
    pictures: bool = False


@dataclass(frozen=True)
class Done:
    """A task that is done.

    Attributes:
        task: which.
        evaluations: one, or one per grid; with examples where the task asked for pictures.
        training_seconds: what the log of the run adds up to; None for an untrained network or
            a run whose log is gone.
        commit: of the code that evaluated.
    """

    task: Task
    evaluations: tuple[Evaluation, ...]
    training_seconds: float | None
    commit: str | None


@dataclass
class Store:
    """The folder of an experiment, to be used within `opened`.

    Attributes:
        folder: made if need be.
        setup: what all runs have in common.
        runs: where the trained runs lie, default OUT/runs; several experiments may share it.
        given: runs that lie elsewhere, by METHOD:FOLD:SEED.
        device: where to compute.
        progress: show bars.
        say: takes lines on what is being done.
    """

    folder: Path
    setup: Setup
    runs: Path | None = None
    given: Mapping[str, Path] = field(default_factory=dict)
    device: str | torch.device = "cpu"
    progress: bool = True
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
    _model: tuple[Path | Run, FewShotNetwork] | None = None

    def results(self, tasks: Sequence[Task]) -> list[Done]:
        """Train and evaluate whatever is not there yet, and read back the rest.

        Raises:
            InputError: a run that is there was made with another configuration or other data;
                `--run` names one that is not among them; and all that training and evaluation
                raise.
        """
        runs = {task.run.key: task.run for task in tasks if task.run.trained}
        if unknown := [key for key in self.given if key not in runs]:
            raise InputError(
                f"given: {unknown[0]} is no run of this experiment; they are {', '.join(runs)}"
            )
        # All of them first: what is wrong with the last is not to be found after a day's work.
        to_train = [key for key, run in runs.items() if not self._trained(run)]
        to_evaluate = sum(self._read(task) is None for task in tasks)
        self.say(
            f"{len(runs)} networks to train, {len(runs) - len(to_train)} of them trained already; "
            f"{len(tasks)} evaluations, {len(tasks) - to_evaluate} of them done already"
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
                self.say(f"{where}evaluating, {task.name}")
                done = self._evaluate(task)
            found.append(done)
        return found

    def _check_supports(self, tasks: Sequence[Task]) -> None:
        """Refuse a support that does not show an organ, before days of training and not after."""
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
        """Where a run lies."""
        return self.given.get(run.key, (self.runs or self.folder / "runs") / run.training_path)

    # --- training ---------------------------------------------------------------------------

    def _trained(self, run: Run) -> bool:
        """Whether a run is complete; refuses one of another configuration or of other data."""
        folder = self.run_folder(run)
        file, record = folder / FILE_NAME, folder / "config.json"
        if run.key in self.given or is_file(file):
            before = load_checkpoint(folder)
            config, data, step = before.config, before.data, before.step
        elif is_file(record):
            try:
                content = json.loads(record.read_text("utf-8"))
                config = Config.from_dict(content["config"])
                data, step = dict(content["data"]), 0
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{record}: cannot be read as the record of a run ({error}); remove the folder"
                ) from error
        else:
            return False
        changed = changes(config, run.config)
        wanted = {"cases": run.subjects.train}
        if run.hold_out:  # where no label is read, it makes no difference what was held out
            wanted["hold_out"] = run.hold_out
        for name, now in wanted.items():
            if sorted(data.get(name, ())) != sorted(now):
                changed.append(f"{name} was {list(data.get(name, ()))!r}, now {list(now)!r}")
        if data.get("dataset") != self.setup.dataset.name:
            changed.append(f"dataset was {data.get('dataset')!r}, now {self.setup.dataset.name!r}")
        if changed:
            raise InputError(
                f"{folder}: holds a run of another configuration: {'; '.join(changed)}; give the "
                "same options as then, or another folder"
            )
        complete = step >= run.config.train.steps
        if run.key in self.given and not complete:
            raise InputError(
                f"{folder}: stopped at step {step} of {run.config.train.steps}; resume its "
                "training and finish it first"
            )
        return complete

    def _train(self, run: Run, where: str) -> None:
        folder = self.run_folder(run)
        begun = is_file(folder / FILE_NAME) or is_file(folder / "config.json")
        what = "training on" if begun else "training"
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

    def _file(self, task: Task) -> Path:
        return self.folder / "evaluations" / task.run.path / f"{task.name}.json"

    def _key(self, task: Task) -> dict[str, Any]:
        """Everything that an evaluation depends on, except the weights, as JSON has it."""
        run, setup = task.run, self.setup
        key = {
            "run": run.key,
            "dataset": setup.dataset.name,
            "config": fixed(run.config),
            "train_cases": run.subjects.train if run.trained else (),
            "hold_out": run.hold_out if run.trained else (),
            "support": run.subjects.support,
            "queries": task.queries or run.subjects.test,
            "organs": task.organs or run.organs,
            "protocol": setup.protocol,
            "chunks": setup.rule.chunks,
            "align": task.align,
            "grids": [(grid.scale, grid.spacing) for grid in task.grids],
            "pictures": task.pictures,
        }
        plain: dict[str, Any] = json.loads(json.dumps(key))
        return plain

    def _checkpoint_sum(self, run: Run) -> int | None:
        """A checksum of a run's checkpoint; None where there is none."""
        if not run.trained:
            return None
        try:
            return zlib.crc32((self.run_folder(run) / FILE_NAME).read_bytes())
        except OSError:
            return None

    def _read(self, task: Task) -> Done | None:
        """An evaluation that was made before, or None."""
        file = self._file(task)
        if not is_file(file):
            return None
        try:
            content = json.loads(file.read_text("utf-8"))
            before = content["key"]
            before["config"] = fixed(Config.from_dict(before["config"]))
            if before != self._key(task):
                return None
            # Checkpoints are large, and one that was cleared away takes nothing from its results.
            now = self._checkpoint_sum(task.run)
            if now is not None and content["checkpoint"] != now:
                return None
            evaluations = [Evaluation.from_dict(one) for one in content["evaluations"]]
            if task.pictures:
                evaluations = _with_pictures(evaluations, file.with_suffix(".npz"))
            return Done(task, tuple(evaluations), content["training_seconds"], content["commit"])
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            self.say(f"note: {file} cannot be read ({error}) and is made again")
            return None

    def _evaluate(self, task: Task) -> Done:
        run, setup = task.run, self.setup
        model = self._load(run)
        arguments: dict[str, Any] = {
            "support": run.subjects.support,
            "queries": task.queries or run.subjects.test,
            "organs": task.organs or run.organs,
            "protocol": setup.protocol,
            "align": task.align,
            "chunks": setup.chunks,
            "batch": setup.batch,
            "progress": self.progress,
            "name": run.label,
        }
        found = evaluate_grids(model, setup.dataset, grids=task.grids or None, **arguments)
        spent = time_spent(self.run_folder(run)) if run.trained else None
        done = Done(task, tuple(found), spent and spent[0], commit())
        file = self._file(task)
        if task.pictures:
            _save_pictures(found, file.with_suffix(".npz"))
        content = {
            "key": self._key(task),
            "checkpoint": self._checkpoint_sum(run),
            "training_seconds": done.training_seconds,
            "device": str(self.device),
            "commit": done.commit,
            "versions": versions(),
            "evaluations": [one.to_dict() for one in found],
        }
        write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return done

    def _load(self, run: Run) -> FewShotNetwork:
        """The network; the last one is kept, since its evaluations follow each other."""
        which = self.run_folder(run) if run.trained else run
        if self._model is None or self._model[0] != which:
            model = (
                load_model(which)
                if isinstance(which, Path)
                else untrained(run.config, seed=run.seed)
            )
            self._model = which, model.to(self.device).eval()
        return self._model[1]


@contextmanager
def opened(store: Store, own: Mapping[str, Any] | None = None) -> Iterator[Store]:
    """Hold the folder of an experiment, alone; `own` are settings of one, by its name.

    Raises:
        InputError: another process is at work in the folder, it cannot be written, or what was
            done in it was done with other settings.
    """
    file = store.folder / SETTINGS
    check_writable(file)
    with locked(store.folder):
        _agree(file, {"all experiments": store.setup.settings(), **(own or {})})
        yield store


def _agree(file: Path, settings: dict[str, Any]) -> None:
    """Write down the settings of a folder, or refuse those that differ from what is there."""
    settings = json.loads(json.dumps(settings))
    before: dict[str, Any] = {}
    if is_file(file):
        try:
            before = json.loads(file.read_text("utf-8"))["settings"]
            # Settings that this version has and the one that wrote it had not take their defaults.
            common = before["all experiments"]
            config = Config.from_dict({name: common[name] for name in ("preset", "model", "train")})
            common.update(common_settings(config))
            common.setdefault("own", {})
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(
                f"{file}: cannot be read as the settings of an experiment ({error}); give "
                "another folder"
            ) from error
        changed = [
            line
            for name, now in settings.items()
            if name in before
            for line in differences(before[name], now)
        ]
        if changed:
            differing = "; ".join(dict.fromkeys(changed))
            raise InputError(
                f"{file.parent}: holds results of other settings: {differing}; "
                "give the same options as then, or another folder"
            )
    if any(name not in before for name in settings):
        content = {"settings": {**before, **settings}, "versions": versions(), "commit": commit()}
        write_text(file, json.dumps(content, indent=2) + "\n")


# --- pictures -------------------------------------------------------------------------------


def _save_pictures(evaluations: Sequence[Evaluation], file: Path) -> None:
    arrays = {
        f"{e}/{x}/{f.name}": np.asarray(getattr(example, f.name))
        for e, one in enumerate(evaluations)
        for x, example in enumerate(one.examples)
        for f in fields(Example)
    }
    with replacing(file) as aside, open(aside, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def _with_pictures(evaluations: Sequence[Evaluation], file: Path) -> list[Evaluation]:
    found: dict[tuple[int, int], dict[str, Any]] = {}
    with np.load(file, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            e, x, what = name.split("/")
            plain = array.item() if array.ndim == 0 else array
            found.setdefault((int(e), int(x)), {})[what] = plain
    return [
        replace(one, examples=tuple(Example(**found[key]) for key in sorted(found) if key[0] == e))
        for e, one in enumerate(evaluations)
    ]
