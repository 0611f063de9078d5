"""Training in several processes: the weights equal those of one, an error has one message."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import CHECKOUT, write_synthetic_dataset
from torch import nn

from lslpn.checkpoint import Checkpoint, load_checkpoint
from lslpn.cli import main
from lslpn.config import Config, preset, with_overrides
from lslpn.data.dataset import Dataset
from lslpn.data.episodes import Batch, Episodes
from lslpn.distributed import World, joined
from lslpn.errors import InputError
from lslpn.models import untrained
from lslpn.runs import time_spent
from lslpn.training import make_optimizer, train, train_step

# Nothing that differs between processes: no dropout, stored batch-norm statistics.
SMALL = {
    "size": 32, "channels": 8, "weights": "random", "batch": 4, "steps": 3,
    "batch_norm": "frozen", "dropout": 0, "log_every": 1, "lr": 0.01,
}  # fmt: skip
LAST = "encoder.reduction.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=3)


def words(data: Path, out: Path, *more: str, **changes: object) -> list[str]:
    settings = [f"--set={k}={v}" for k, v in {**SMALL, **changes}.items()]
    where = ["--data", str(data), "--out", str(out), "--hold-out", "liver", "--device", "cpu"]
    return ["train", *where, *settings, *more, "--quiet"]


def two_processes(
    command: list[str], program: tuple[str, ...] = ("-m", "lslpn")
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node=2", *program, *command],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def moved(run: Checkpoint, config: Config) -> dict[str, torch.Tensor]:
    """How much training changed the weights."""
    start = untrained(config, seed=config.train.seed).state_dict()
    return {k: v - start[k] for k, v in run.model.items() if v.is_floating_point()}


def test_two_processes_give_the_weights_of_one_process_on_the_whole_batch(
    data: Path, tmp_path: Path
) -> None:
    done = two_processes(words(data, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert main(words(data, tmp_path / "one")) == 0
    assert main(words(data, tmp_path / "half", batch=2)) == 0
    one, two, half = (load_checkpoint(tmp_path / name) for name in ("one", "two", "half"))
    assert one.data == two.data
    assert two.step == 3
    steps, others, fewer = moved(one, one.config), moved(two, two.config), moved(half, half.config)
    for name, step in steps.items():
        torch.testing.assert_close(others[name], step, rtol=1e-3, atol=1e-7, msg=name)
    # The comparison is sensitive: half of the batch gives other weights.
    name = "encoder.reduction.weight"
    assert (steps[name] - fewer[name]).norm() > 0.05 * steps[name].norm() > 0
    logs = [list(csv.DictReader((tmp_path / n / "log.csv").open())) for n in ("one", "two")]
    for first, second in zip(*logs, strict=True):
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), abs=2e-6)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference of two steps. Live batch norm over a few small images is
    ill-conditioned: rounding in the last layer's gradient grows a hundredfold up to the first."""
    return float((one - other).norm() / one.norm())


def test_live_batch_norm_on_cpus_equals_that_of_an_accumulated_batch(
    data: Path, tmp_path: Path
) -> None:
    """SyncBatchNorm needs GPUs; on CPUs each process has its own statistics, and says so."""
    done = two_processes(words(data, tmp_path / "two", batch_norm="live", steps=1))
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("note: on the CPU each process computes batch-norm statistics over") == 1
    )
    for name, accumulate in (("parts", 2), ("whole", 1)):
        live = words(data, tmp_path / name, batch_norm="live", steps=1, accumulate=accumulate)
        assert main(live) == 0
    two, parts, whole = (load_checkpoint(tmp_path / name) for name in ("two", "parts", "whole"))
    steps, others = moved(two, two.config), moved(parts, parts.config)
    elsewhere = moved(whole, whole.config)
    torch.testing.assert_close(steps[LAST], others[LAST], rtol=1e-3, atol=1e-6)
    for name, step in steps.items():
        if "running" in name:  # those of the first process only
            assert step.isfinite().all()
            assert step.norm() > 0
        elif step.any():
            assert apart(step, others[name]) < 0.1, name
            # The comparison is sensitive: statistics over the whole batch give other weights.
            assert apart(step, elsewhere[name]) > 0.5, name


# Trains with an implementation of SyncBatchNorm for CPUs in place of torch's.
_SYNCHRONISED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce
from lslpn import training
from lslpn.cli import main

class OnCpus(torch.nn.modules.batchnorm._BatchNorm):
    convert_sync_batchnorm = torch.nn.SyncBatchNorm.convert_sync_batchnorm  # makes nn.SyncBatchNorm

    def __init__(self, features, eps, momentum, affine, track, process_group, **options):
        super().__init__(features, eps, momentum, affine, track, **options)

    def forward(self, x):
        assert self.training
        count = x.numel() / x.shape[1] * dist.get_world_size()
        centred = x - all_reduce(x.sum((0, 2, 3)) / count)[:, None, None]
        variance = all_reduce((centred**2).sum((0, 2, 3)) / count)
        with torch.no_grad():
            mean = (x - centred).mean((0, 2, 3))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        unit = centred * (variance + self.eps).rsqrt()[:, None, None]
        return unit * self.weight[:, None, None] + self.bias[:, None, None]

torch.nn.SyncBatchNorm = OnCpus
as_on_gpus = training._synchronised
training._synchronised = lambda model, device, processes: as_on_gpus(
    model, torch.device("cuda"), processes
)
sys.exit(main(sys.argv[1:]))
"""


def test_synchronised_batch_norm_in_two_processes_equals_that_of_one_on_the_whole_batch(
    data: Path, tmp_path: Path
) -> None:
    """The default on two GPUs: conversion, encoder, trainer and DistributedDataParallel. Not
    covered is torch's own SyncBatchNorm, which an implementation for CPUs replaces."""
    script = tmp_path / "synchronised.py"
    script.write_text(_SYNCHRONISED)
    done = two_processes(words(data, tmp_path / "two", batch_norm="live", steps=1), (str(script),))
    assert done.returncode == 0, done.stderr
    assert main(words(data, tmp_path / "one", batch_norm="live", steps=1)) == 0
    two, one = (load_checkpoint(tmp_path / name) for name in ("two", "one"))
    others, steps = moved(two, two.config), moved(one, one.config)
    torch.testing.assert_close(others[LAST], steps[LAST], rtol=1e-3, atol=1e-6)
    for name, step in steps.items():
        if step.any():
            assert apart(step, others[name]) < (0.01 if "running" in name else 0.1), name
    assert steps["encoder.bn1.running_mean"].any()


def test_an_error_is_reported_by_one_process(data: Path, tmp_path: Path) -> None:
    # All processes detect this.
    done = two_processes(words(data, tmp_path / "a", "--hold-out", "lung"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: organ 'lung': not in data set" in done.stderr
    # Only the first process reads the folder; the other waits for it.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    done = two_processes(words(data, tmp_path / "b", "--resume"))
    assert done.returncode != 0
    assert done.stderr.count("lslpn: error: ") == 1, done.stderr
    assert "checkpoint.pt" in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused(data: Path, tmp_path: Path) -> None:
    config = with_overrides(preset("published"), **{**SMALL, "batch": 3, "accumulate": 3})
    dataset = Dataset.open(data)
    arguments = {"hold_out": ["liver"], "cases": dataset.cases, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lslpn.training.world", lambda: World(0, 2))
        with pytest.raises(InputError, match=r"multiple of 6 \(2 processes x accumulate 3\)"):
            train(config, dataset, out=tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_shares_of_the_processes_make_up_the_batch(data: Path) -> None:
    config = with_overrides(preset("published"), **SMALL)
    episodes = Episodes(
        Dataset.open(data), config, cases=["syn_00", "syn_01"], hold_out=["liver"], progress=False
    )
    whole = episodes.batch(7)
    shares = [episodes.batch(7, World(rank, 2).share(4)) for rank in range(2)]
    for name in whole._fields:
        parts = torch.cat([getattr(share, name) for share in shares])
        assert torch.equal(getattr(whole, name), parts)
    assert not torch.equal(shares[0].query_images, shares[1].query_images)


def test_parts_with_fewer_labelled_pixels_weigh_less() -> None:
    """The loss of a batch is one mean over its pixels, in however many parts it is run."""
    config = with_overrides(preset("published"), **SMALL)
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2, 1, 32, 32))
    labels[0, :, 3:] = 255
    masks = (torch.rand(2, 1, 1, 32, 32) > 0.5).to(torch.uint8)
    batch = Batch(torch.rand(2, 1, 32, 32), masks, torch.rand(2, 1, 32, 32), labels)
    found = []
    for accumulate in (1, 2):
        options = with_overrides(config, batch=2, accumulate=accumulate).train
        model = untrained(config).train()
        loss = train_step(model, make_optimizer(model, options), batch, options)
        found.append((loss, model.state_dict()))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], msg=name)


def test_without_torchrun_nothing_is_joined() -> None:
    for environment in ({}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        with joined("cuda:3", environment) as device:
            assert device == "cuda:3"
    assert World().first
    assert list(World(1, 2).share(4)) == [2, 3]


def test_compiling_changes_nothing_but_the_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    real = nn.Module.compile

    def eager(module: nn.Module, **_: object) -> None:
        compiled.append(type(module).__name__)
        real(module, backend="eager")  # traced as with any backend, but without a compiler

    monkeypatch.setattr(nn.Module, "compile", eager)
    for name in ("plain", "compiled"):
        more = {"batch": 1, "steps": 1, "compile": name == "compiled"}
        assert main(words(data, tmp_path / name, **more)) == 0
    assert compiled == ["Encoder"]
    plain, other = (load_checkpoint(tmp_path / name).model for name in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_failing_compiler_is_an_input_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: real(module, backend=broken))
    assert main(words(data, tmp_path / "run", batch=1, compile=True)) == 2
    said = capsys.readouterr().err
    assert "compile: torch.compile fails here" in said
    assert "no compiler" in said


def test_the_log_has_the_time_spent_waiting_for_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    real = Episodes.batch

    def slow(*arguments: object, **options: object) -> Batch:
        time.sleep(0.3)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Episodes, "batch", slow)
    assert main(words(data, tmp_path / "run", batch=1)) == 0
    spent = time_spent(tmp_path / "run")
    assert spent is not None
    seconds, waited = spent
    # Three batches; each but the first is made during the step before it.
    assert 0.3 <= waited < seconds
    assert time_spent(tmp_path) is None
