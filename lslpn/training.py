"""The trainer: SGD over episodes, without access to test cases.

All random numbers are functions of the seed and the step (see episodes.py; dropout is seeded in
each step), so that a resumed run ends with bitwise the same weights as an uninterrupted one, on the
same machine, with the same torch, kernels, and numbers of threads and processes.

Several processes (see distributed.py) share the episodes of a batch, which does not depend on their
number. The resulting weights are equal up to rounding, with two exceptions: dropout differs between
processes, and on the CPU live batch norm uses the statistics of each process's own images, just as
it uses those of each part of an accumulated batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .checkpoint import FILE_NAME, Checkpoint, save_checkpoint
from .config import Config, TrainConfig
from .data.dataset import Dataset
from .data.episodes import Batch, Episodes
from .data.superpixels import SuperpixelEpisodes
from .distributed import World, world
from .errors import InputError
from .files import check_state, is_file, write_json
from .info import versions
from .models import FewShotNetwork, untrained
from .runs import Log, check_same_data, held, load_optimizer
from .torch_defaults import torch_defaults


@torch_defaults()
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
    model: FewShotNetwork | None = None,
    callback: Callable[[int, float, float], None] | None = None,
) -> FewShotNetwork:
    """Train a network, save it in `out`, and return it in evaluation mode.

    Args:
        config: a preset, or one changed by `with_overrides`.
        dataset: the scans.
        hold_out: organs that are never a class of an episode.
        cases: the scans to train on, without those to test on.
        out: the folder of the run; created if it does not exist.
        resume: continue from the checkpoint in `out`.
        device: where to compute.
        progress: show bars with rate and time left.
        model: a network of your own, which is trained in place; default: the untrained one of
            `config`. Its `config` must equal `config.model`; to resume, pass a network built the
            same way. `load_model` builds only the networks of this package; load the weights of
            another one with `load_checkpoint(out).model`.
        callback: called as callback(step, loss, lr) whenever a line of the log is written, with the
            number of steps so far, the mean loss since the last call, and the learning rate. With
            several processes it is called only in the first.

    Raises:
        InputError: the configurations of `model` and `config` differ; another process is at work
            in `out`; `out` holds a run and `resume` is False, or none and `resume` is True, or a
            run with another configuration or other data; `out` cannot be written; the loss is no
            longer finite (the last good checkpoint is kept); and all that `Episodes` and the
            network raise.
    """
    folder, processes, options = Path(out), world(), config.train
    file, device = folder / FILE_NAME, torch.device(device)
    _check(config, model, processes)
    progress = progress and processes.first
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(held(folder, config, resume)) if processes.first else None
        before = processes.from_first(before)
        source = SuperpixelEpisodes if options.supervision == "superpixels" else Episodes
        episodes = source(dataset, config, cases=cases, hold_out=hold_out, progress=progress)
        data = {
            "dataset": dataset.name,
            "cases": list(episodes.cases),
            "organs": list(episodes.organs),
            "hold_out": list(episodes.hold_out),
            "checksum": episodes.fingerprint(),
        }
        processes.agree((config.to_dict(), data), "data and options")

        model = untrained(config, seed=options.seed) if model is None else model
        if before is not None:
            check_same_data(file, before.data, data)
            check_state(before.model, model.state_dict(), file)
            model.load_state_dict(before.model)
        model.amp = options.amp
        if not options.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model = _synchronised(model, device, processes).to(device).train()
        optimizer = make_optimizer(model, options)
        if before is not None:
            load_optimizer(optimizer, before, file)
        if options.compile:
            for module in model.convolutions():
                module.compile()
        parallel = None
        if processes.size > 1:
            learner = _Learner(model, options)
            parallel = DistributedDataParallel(learner, [device] if device.type == "cuda" else None)

        first = 0 if before is None else before.step
        log = None
        if processes.first:
            log = Log(folder / "log.csv", first)
            record = {"config": config.to_dict(), "data": data, "processes": processes.size}
            write_json(folder / "config.json", {**record, "versions": versions()})

        def make(step: int) -> Batch:
            batch = episodes.batch(step, processes.share(options.batch))
            return batch.pinned() if device.type == "cuda" else batch

        # Training on the CPU needs the cores itself.
        workers = 1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) // 2))
        batches = _prefetched(make, first, options.steps, workers)
        stack.enter_context(contextlib.closing(batches))
        # Dropout draws from torch's global generator; restore its state afterwards.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        shown = {"total": options.steps, "initial": first, "disable": not progress}
        bar = stack.enter_context(tqdm(desc="training", unit="step", **shown))
        pending: list[Tensor] = []
        since, waited = time.perf_counter(), 0.0
        for step in range(first, options.steps):
            asked = time.perf_counter()
            batch = next(batches).to(device)
            waited += time.perf_counter() - asked
            lr = set_learning_rate(optimizer, options, step)
            torch.manual_seed(_mixed(options.seed, step, processes.rank))
            with _compiling():
                pending.append(train_step(model, optimizer, batch, options, parallel))
            done = step + 1
            bar.update()
            saving = done == options.steps or done % options.checkpoint_every == 0
            logging = saving or done % options.log_every == 0
            # Reading the loss waits for a GPU; on the CPU it costs nothing.
            if logging or device.type == "cpu":
                loss = _finite(pending, done, file, processes)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.0e}", refresh=False)
            if logging:
                now, count = time.perf_counter(), len(pending)
                if log is not None:
                    log.write(done, loss, lr, (now - since) / count, waited / count)
                    if callback is not None:
                        callback(done, loss, lr)
                pending, since, waited = [], now, 0.0
            if saving and processes.first:
                _check_finite(model, done)
                state = model.state_dict(), optimizer.state_dict()
                save_checkpoint(file, Checkpoint(config, done, *state, data, versions()))
            if saving:
                since = time.perf_counter()
    return model.eval()


def _check(config: Config, model: FewShotNetwork | None, processes: World) -> None:
    """Refuse a network with another configuration, and a batch that cannot be divided."""
    if model is not None and model.config != config.model:
        raise InputError(
            "model: its configuration differs from `config.model`; build the network with "
            "config.model, or give the configuration of the network"
        )
    each = processes.size * config.train.accumulate
    if config.train.batch % each:
        raise InputError(
            f"batch: expected a multiple of {each} ({processes.size} processes x accumulate "
            f"{config.train.accumulate}), got {config.train.batch}; change batch or accumulate"
        )


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Report an error of torch.compile, which compiles in the first step."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        # Two lines: what failed, and why. The rest is advice on debugging torch.
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        raise InputError(
            f"compile: torch.compile fails here ({reason}); run with compile=false"
        ) from error


class _Learner(nn.Module):
    """A network whose forward returns its loss, as DistributedDataParallel needs it."""

    def __init__(self, model: FewShotNetwork, options: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch, self.options)


def _synchronised(model: FewShotNetwork, device: torch.device, processes: World) -> FewShotNetwork:
    """Let live batch norm take its statistics over the images of all processes, on GPUs."""
    live = any(isinstance(m, _BatchNorm) and m.training for m in model.train().modules())
    if processes.size == 1 or not live:
        return model
    if device.type == "cuda":
        converted: FewShotNetwork = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    warnings.warn(
        "on the CPU each process computes batch-norm statistics over its own share of a batch, "
        "and those of the first are kept; with batch_norm=frozen the number of processes makes no "
        "difference",
        stacklevel=2,
    )
    return model


def train_step(
    model: FewShotNetwork,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    options: TrainConfig,
    parallel: DistributedDataParallel | None = None,
) -> Tensor:
    """One gradient step over this process's part of a batch, on the network's device.

    The loss is the mean over the labelled pixels of the whole batch, in however many parts and
    processes it is computed. A method whose loss is another mean is weighted by these pixels as
    well. `parallel` wraps the network if there are several processes.

    Returns:
        the loss, a scalar on the device; with several processes, this one's part of the sum.
    """
    optimizer.zero_grad(set_to_none=True)
    processes = World() if parallel is None else world()
    compute = _Learner(model, options) if parallel is None else parallel
    labelled = (batch.query_labels != options.ignore_index).sum()
    whole = processes.sum(labelled).clamp_min(1)
    total = batch.query_images.new_zeros(())
    parts = batch.split(options.accumulate)
    for number, part in enumerate(parts, 1):
        weight = (part.query_labels != options.ignore_index).sum() / whole
        # Gradients are accumulated, and exchanged once, with the last part.
        last = number == len(parts)
        with contextlib.nullcontext() if parallel is None or last else parallel.no_sync():
            loss = compute(part) * weight
            # DistributedDataParallel averages over the processes.
            (loss * processes.size).backward()
        total += loss.detach()
    optimizer.step()
    return total


def make_optimizer(model: FewShotNetwork, options: TrainConfig) -> torch.optim.SGD:
    """SGD over all trainable parameters; the reduction layer has its own learning rate."""
    fresh = model.fresh_parameters()
    mine = {id(p) for p in fresh}
    trunk = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    groups = [
        {"params": trunk, "factor": 1.0},
        {"params": fresh, "factor": options.reduction_lr_factor},
    ]
    return torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )


def learning_rate(options: TrainConfig, step: int) -> float:
    """The learning rate of `step`, counted from 0: multiplied by lr_decay at every milestone."""
    return options.lr * options.lr_decay ** sum(m <= step for m in options.milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, options: TrainConfig, step: int) -> float:
    """Set every group's learning rate for `step` and return the trunk's."""
    lr = learning_rate(options, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


def _prefetched(
    make: Callable[[int], Batch], first: int, steps: int, workers: int
) -> Generator[Batch, None, None]:
    """The batches of steps first .. steps - 1, prepared in threads ahead of their use."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="episodes")
    try:
        ahead = deque(pool.submit(make, step) for step in range(first, min(steps, first + workers)))
        for step in range(first, steps):
            batch = ahead.popleft().result()
            if step + workers < steps:
                ahead.append(pool.submit(make, step + workers))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _mixed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one step of one process, unrelated to those of neighbouring steps and seeds."""
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _finite(pending: list[Tensor], step: int, file: Path, processes: World) -> float:
    """The mean of the losses since the last line of the log, which must be finite."""
    loss = float(processes.sum(torch.stack(pending)).mean())
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged: the loss is {loss} at step {step}; lower lr, or run without amp. "
            + (f"The last good checkpoint is {file}" if is_file(file) else "Nothing was saved")
        )
    return loss


def _check_finite(model: FewShotNetwork, step: int) -> None:
    """Refuse weights that became infinite in an update after a finite loss."""
    if not all(bool(t.isfinite().all()) for t in model.state_dict().values()):
        raise InputError(
            f"training diverged: the weights are no longer finite after step {step}; lower lr. "
            "The previous checkpoint, if any, is kept"
        )
