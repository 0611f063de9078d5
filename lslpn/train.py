"""The trainer: SGD over episodes, and nothing that looks at a test case.

A run is a folder:

    config.json     every number of it, and the data it was trained on
    log.csv         step, loss, lr, seconds per step
    checkpoint.pt   the latest state; also the result, once the last step is done

Every random number is a function of the seed and the step (see episodes.py; dropout is seeded
anew each step), so that a run that was stopped and resumed ends with the same weights, bit for
bit, as one that was not: on the same machine, with the same torch, kernels and threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .atomic import check_writable, write_text
from .checkpoint import FILE_NAME, Checkpoint, load_checkpoint, load_weights, save_checkpoint
from .dataset import Dataset
from .episodes import Batch, Episodes
from .errors import InputError
from .info import versions
from .lock import locked
from .methods import FewShotNetwork
from .model import untrained
from .presets import Config, TrainConfig
from .superpixels import SuperpixelEpisodes

_LOG_HEADER = "step,loss,lr,seconds_per_step\n"
# These change neither the weights nor the batches, so a resumed run may differ in them.
FREE_ON_RESUME = ("log_every", "checkpoint_every")


def train(
    config: Config,
    dataset: Dataset,
    *,
    hold_out: Sequence[str],
    cases: Sequence[str],
    out: str | os.PathLike[str],
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FewShotNetwork:
    """Trains the network and leaves it in `out`; returns it in evaluation mode.

    Args:
        config: a preset, or one changed by `with_overrides`.
        dataset: the scans.
        hold_out: organs that are never a class of an episode.
        cases: the scans to train on. Keep the ones you test on out of here.
        out: the folder of the run; made if it is not there.
        resume: go on from the checkpoint in `out`.
        device: where to compute.
        progress: show bars with rate and time left.

    Raises:
        InputError: another process is at work in `out`; it holds a run already and `resume` is
            False, or it holds none and `resume` is True, or the run in it had another
            configuration or other data; `out` cannot be written; the loss is no longer finite
            (the last good checkpoint stays); and everything that `Episodes` and the network raise.
    """
    folder = Path(out)
    _previous(folder, config, resume)  # refuse before a folder is made
    check_writable(folder / FILE_NAME)
    with locked(folder):
        return _train(
            config, dataset, hold_out, cases, folder, resume, torch.device(device), progress
        )


def _train(
    config: Config,
    dataset: Dataset,
    hold_out: Sequence[str],
    cases: Sequence[str],
    folder: Path,
    resume: bool,
    device: torch.device,
    progress: bool,
) -> FewShotNetwork:
    """`train`, with the folder held."""
    file = folder / FILE_NAME
    before = _previous(folder, config, resume)
    source = SuperpixelEpisodes if config.train.supervision == "superpixels" else Episodes
    episodes = source(dataset, config, cases=cases, hold_out=hold_out, progress=progress)
    data = {
        "dataset": dataset.name,
        "cases": list(episodes.cases),
        "organs": list(episodes.organs),
        "hold_out": list(episodes.hold_out),
        "fingerprint": episodes.fingerprint(),
    }
    options = config.train
    model = untrained(config, seed=options.seed)
    if before is not None:
        _same_data(file, before.data, data)
        load_weights(model, before, file)
    model.amp = options.amp
    if not options.channels_last:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.to(device).train()
    optimizer = make_optimizer(model, options)
    first = 0
    if before is not None:
        optimizer.load_state_dict(before.optimizer)
        first = before.step
    log = _Log(folder / "log.csv", first)
    record = {"config": config.to_dict(), "data": data, "versions": versions()}
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")

    def save(step: int) -> None:
        _check_weights(model, step)
        save_checkpoint(
            file,
            Checkpoint(config, step, model.state_dict(), optimizer.state_dict(), data, versions()),
        )

    bar = tqdm(
        total=options.steps, initial=first, desc="training", unit="step", disable=not progress
    )
    pending: list[Tensor] = []
    since = time.perf_counter()
    # Dropout draws from torch's own generator; leave the caller's as it was.
    devices = [device] if device.type == "cuda" else []
    with bar, torch.random.fork_rng(devices=devices):
        for step, batch in _prefetched(episodes, first, options.steps):
            lr = set_learning_rate(optimizer, options, step)
            torch.manual_seed(_mixed(options.seed, step))
            pending.append(train_step(model, optimizer, batch.to(device), options))
            done = step + 1
            bar.update()
            last = done == options.steps
            saving = last or done % options.checkpoint_every == 0
            # Reading the loss waits for the device; on the CPU there is nothing to wait for.
            if saving or done % options.log_every == 0 or device.type == "cpu":
                loss = _finite(pending, done, file)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.0e}", refresh=False)
            if saving or done % options.log_every == 0:
                now = time.perf_counter()
                log.write(done, loss, lr, (now - since) / len(pending))
                pending, since = [], now
            if saving:
                save(done)
                since = time.perf_counter()
    return model.eval()


def train_step(
    model: FewShotNetwork, optimizer: torch.optim.Optimizer, batch: Batch, options: TrainConfig
) -> Tensor:
    """One gradient step over a batch; returns its loss, a scalar that is still on the device."""
    optimizer.zero_grad(set_to_none=True)
    total = batch.query_images.new_zeros(())
    for part in batch.split(options.accumulate):
        loss = model.loss(part, options) / options.accumulate
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total


def make_optimizer(model: FewShotNetwork, options: TrainConfig) -> torch.optim.SGD:
    """SGD over everything that learns; the reduction layer has a learning rate of its own."""
    fresh = model.fresh_parameters()
    mine = {id(p) for p in fresh}
    trunk = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    return torch.optim.SGD(
        [
            {"params": trunk, "factor": 1.0},
            {"params": fresh, "factor": options.reduction_lr_factor},
        ],
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )


def learning_rate(options: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0: times lr_decay at every milestone."""
    return options.lr * options.lr_decay ** sum(m <= step for m in options.milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, options: TrainConfig, step: int) -> float:
    """Sets every group's learning rate for `step` and returns the trunk's."""
    lr = learning_rate(options, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


def _prefetched(
    episodes: Episodes | SuperpixelEpisodes, first: int, steps: int
) -> Iterator[tuple[int, Batch]]:
    """The batches of steps first .. steps - 1, each made while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="episodes") as pool:
        following = pool.submit(episodes.batch, first)
        for step in range(first, steps):
            batch = following.result()
            if step + 1 < steps:
                following = pool.submit(episodes.batch, step + 1)
            yield step, batch


def _mixed(seed: int, step: int) -> int:
    """A seed for one step: neighbouring steps and seeds give unrelated ones."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _finite(pending: list[Tensor], step: int, file: Path) -> float:
    """Mean of the losses since the last line of the log, which must be a number."""
    loss = float(torch.stack(pending).mean())
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged: the loss is {loss} at step {step}; lower lr, or run without amp. "
            + (f"The last good checkpoint is in {file}" if file.is_file() else "Nothing was saved")
        )
    return loss


def _check_weights(model: FewShotNetwork, step: int) -> None:
    """A finite loss does not vouch for the update that came after it."""
    if not all(bool(t.isfinite().all()) for t in model.state_dict().values()):
        raise InputError(
            f"training diverged: the weights are no longer finite after step {step}; lower lr. "
            "The checkpoint before this one, if any, stays as it is"
        )


def _previous(folder: Path, config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, None for a fresh start."""
    file = folder / FILE_NAME
    if not resume:
        if file.exists():
            raise InputError(
                f"{folder}: holds a training run already; resume it with --resume, or give "
                "another folder"
            )
        return None
    if not file.exists():
        # A run killed before its first checkpoint left a config.json; it starts over.
        if (folder / "config.json").is_file():
            return None
        raise InputError(
            f"{folder}: holds no run to resume; check the path, or leave --resume away"
        )
    before = load_checkpoint(file)
    changed = differences(before.config.to_dict(), config.to_dict())
    if changed:
        raise InputError(
            f"{file}: was trained with another configuration: {'; '.join(changed)}; give the "
            "same options as at the start, or another folder"
        )
    return before


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two configurations (`Config.to_dict`) differ in, of all that a result hangs on.

    Returns:
        lines such as "steps was 400, now 500".
    """
    found = []
    for group in ("model", "train"):
        for name, value in now[group].items():
            if name not in FREE_ON_RESUME and before[group].get(name) != value:
                found.append(f"{name} was {before[group].get(name)!r}, now {value!r}")
    return found


def _same_data(file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            what = (
                "the images or labels themselves have changed"
                if name == "fingerprint"
                else f"{name} was {before.get(name)!r}, now {value!r}"
            )
            raise InputError(
                f"{file}: was trained on other data: {what}; give the same data as at the start, "
                "or another folder"
            )


class _Log:
    """log.csv; a resumed run drops the lines after its checkpoint and goes on."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = []
        if step and path.is_file():
            for line in path.read_text("utf-8").splitlines()[1:]:
                number = line.partition(",")[0]
                if number.isdigit() and int(number) <= step:
                    lines.append(line + "\n")
        write_text(path, _LOG_HEADER + "".join(lines))

    def write(self, step: int, loss: float, lr: float, seconds: float) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{step},{loss:.6f},{lr:.3g},{seconds:.3f}\n")
