"""The folder of a training run, and the settings that must agree to resume it.

config.json     its settings and the data that it is trained on
log.csv         step, loss, lr, seconds per step, and seconds of these spent waiting for the batch
checkpoint.pt   the latest state, and after the last step the result
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .checkpoint import FILE_NAME, Checkpoint, load_checkpoint
from .config import Config
from .errors import InputError
from .files import append_text, check_writable, is_file, locked, look_up, write_text

_LOG_HEADER = "step,loss,lr,seconds_per_step,waiting_per_step\n"
_LOG_LINE = re.compile(r"\d+(,\d+(\.\d+)?(e[+-]?\d+)?){4}\n")
# These change neither the weights nor the batches, so a resumed run may differ in them.
_FREE_ON_RESUME = ("log_every", "checkpoint_every")


@contextmanager
def held(folder: Path, config: Config, resume: bool) -> Iterator[Checkpoint | None]:
    """Hold the lock of a run's folder; yields the checkpoint to resume from, or None.

    Raises:
        InputError: another process is at work in it, or it cannot be written; it holds a run and
            `resume` is False, or none and `resume` is True, or one with another configuration.
    """
    _check_start(folder, resume)  # before the folder is created
    file = folder / FILE_NAME
    check_writable(file)
    with locked(folder):
        _check_start(folder, resume)
        before = load_checkpoint(file) if is_file(file) else None
        changed = [] if before is None else changes(before.config, config)
        if changed:
            raise InputError(
                f"{file}: was trained with another configuration: {'; '.join(changed)}; give the "
                "same options as at the start, or another folder"
            )
        yield before


def _check_start(folder: Path, resume: bool) -> None:
    """Refuse to start in a folder that holds a run, and to resume in one that does not."""
    begun = look_up(folder / FILE_NAME) is not None
    if begun and not resume:
        raise InputError(
            f"{folder}: already holds a training run; continue it with `resume=True`, or give "
            "another folder"
        )
    # A run killed before its first checkpoint has only a config.json; it starts over.
    if resume and not begun and not is_file(folder / "config.json"):
        raise InputError(f"{folder}: holds no run to resume; check the path, or start a new run")


def fixed(config: Config) -> dict[str, Any]:
    """The settings that affect the result, ready for JSON."""
    plain = config.to_dict()
    for name in _FREE_ON_RESUME:
        del plain["train"][name]
    return plain


def changes(before: Config, now: Config) -> list[str]:
    """The differences of two configurations in the settings that affect the result, as lines such
    as "steps was 400, now 500"."""
    a, b = ({**fixed(config), "preset": None} for config in (before, now))
    return differences(a, b)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The differences of two nested structures of dicts and lists, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*before, *(k for k in now if k not in before)]:
            if before.get(key) != now.get(key):
                inner = key if name in ("", "model", "train") else f"{name} {key}"
                found += differences(before.get(key), now.get(key), inner)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
        if all(isinstance(a, dict) and isinstance(b, dict) for a, b in pairs):
            return [line for a, b in pairs for line in differences(a, b, name)]
    return [f"{name} was {before!r}, now {now!r}"]


def check_same_data(file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume a run with other cases, organs or voxels than it started with."""
    for name, value in now.items():
        # Runs of earlier versions have no checksum of the voxels.
        if before.get(name) != value and not (name == "checksum" and name not in before):
            what = f"{name} was {before.get(name)!r}, now {value!r}"
            if name == "checksum":
                what = "the voxels of the images or labels have changed"
            raise InputError(
                f"{file}: was trained on other data: {what}; give the same data as at the start, "
                "or another folder"
            )


def load_optimizer(optimizer: torch.optim.SGD, before: Checkpoint, file: Path) -> None:
    """Restore the momentum of a checkpoint; InputError if it does not fit the network."""
    try:
        optimizer.load_state_dict(before.optimizer)
        fits = all(
            buffer is None or buffer.shape == parameter.shape
            for parameter, state in optimizer.state.items()
            for buffer in [state["momentum_buffer"]]
        ) and all("factor" in group for group in optimizer.param_groups)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise InputError(
            f"{file}: its optimizer state does not fit its network, expected an unmodified file; "
            "start another run"
        )


def time_spent(folder: str | os.PathLike[str]) -> tuple[float, float] | None:
    """The seconds of all steps of a run according to its log, and how many of them were spent
    waiting for batches; None without a readable log."""
    total, waited, before = 0.0, 0.0, 0
    for line in _whole_lines(Path(folder) / "log.csv"):
        step, _, _, seconds, waiting = (float(value) for value in line.split(","))
        steps = int(step) - before
        total += steps * seconds
        waited += steps * waiting
        before += steps
    return (total, waited) if total else None


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log without its header; none if the file cannot be read.

    Lines are appended, and a kill or a full disk may truncate one. Anything but a complete line of
    five numbers is skipped.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return []
    return [line for line in text.splitlines(keepends=True) if _LOG_LINE.fullmatch(line)]


class Log:
    """log.csv; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = [line for line in _whole_lines(path) if int(line.partition(",")[0]) <= step]
        write_text(path, _LOG_HEADER + "".join(lines))

    def write(self, step: int, loss: float, lr: float, seconds: float, waiting: float) -> None:
        append_text(self.path, f"{step},{loss:.6f},{lr:.3g},{seconds:.3f},{waiting:.4f}\n")
