"""The trainer: it lowers the loss, resumes bit for bit, and reports errors."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from synthetic import write_synthetic_dataset

from lslpn import training as train_module
from lslpn.checkpoint import (
    FILE_NAME,
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_weights,
)
from lslpn.cli import main
from lslpn.config import Config, preset, with_overrides
from lslpn.data.dataset import Dataset
from lslpn.data.episodes import Episodes
from lslpn.errors import InputError
from lslpn.files import append_text
from lslpn.models import LSLPN, segmentation_loss, untrained
from lslpn.runs import time_spent
from lslpn.training import (
    learning_rate,
    make_optimizer,
    set_learning_rate,
    train,
    train_step,
)


def small(**values: object) -> Config:
    plain = {"size": 48, "channels": 32, "batch": 2, "steps": 6, "log_every": 1}
    return with_overrides(preset("published"), **{"milestones": (4,), **plain, **values})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=3))


def run(dataset: Dataset, out: Path, config: Config, **arguments: object) -> LSLPN:
    plain = {"hold_out": ["kidney"], "cases": dataset.cases, "progress": False}
    return train(config, dataset, out=out, **{**plain, **arguments})  # type: ignore[arg-type]


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dicts and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return {k: t for key, v in items for k, t in tensors(v, f"{path}/{key}").items()}


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    for a, b in ((one.model, other.model), (one.optimizer, other.optimizer)):
        first, second = tensors(a), tensors(b)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), key


class StopError(Exception):
    """A kill, in tests that run in this process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt `train` after `steps` steps."""
    done = 0
    real = train_module.train_step

    def dying(*arguments: object) -> torch.Tensor:
        nonlocal done
        if done == steps:
            raise StopError
        done += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "train_step", dying)


def test_a_custom_network_is_trained_and_its_weights_exported(
    dataset: Dataset, tmp_path: Path
) -> None:
    config = small(steps=2)
    encoder = torch.nn.Conv2d(3, 8, 8, stride=8)
    model, before = LSLPN(config.model, encoder=encoder), encoder.weight.clone()
    told: list[tuple[int, float, float]] = []
    with pytest.raises(InputError, match=r"model: its configuration differs"):
        run(dataset, tmp_path / "run", small(size=64), model=model)
    trained = run(
        dataset, tmp_path / "run", config, model=model, callback=lambda *line: told.append(line)
    )
    assert trained is model
    assert not torch.equal(encoder.weight, before)
    assert [(step, lr) for step, _, lr in told] == [(1, 1e-3), (2, 1e-3)]
    save_weights(tmp_path / "weights.safetensors", model)
    weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["encoder.weight"], encoder.weight)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        save_weights(tmp_path / "weights.pt", model)


def test_exported_weights_load_as_a_network(tmp_path: Path) -> None:
    model, file = untrained(small(size=64).model, seed=3), tmp_path / "weights.safetensors"
    save_weights(file, model)
    again = load_model(file)
    assert again.config == model.config
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights\.safetensors: cannot be read"):
            load_model(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="no 'model' in its metadata"):
        load_model(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, {"model": "{}"})
    with pytest.raises(InputError, match="another architecture"):
        load_model(file)


def test_training_continues_from_exported_weights(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(steps=1, lr=1e-9, size=64)
    model, file = untrained(config.model, seed=3), tmp_path / "weights.safetensors"
    save_weights(file, model)
    words = ["train", "--data", str(dataset.root), "--out", str(tmp_path / "run"), "--quiet"]
    words += ["--weights", str(file), "--set", "steps=1", "--set", "lr=1e-9", "--set", "batch=1"]
    assert main([*words, "--set", "channels=9"]) == 2
    assert "whose settings cannot be changed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(words) == 0
    trained = load_checkpoint(tmp_path / "run")
    assert trained.config.model == model.config
    for name, value in model.named_parameters():
        torch.testing.assert_close(trained.model[name], value.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"batch_norm": "frozen", "amp": True, "accumulate": 2, "reduction_lr_factor": 5},
    ],
    ids=["published", "every option"],
)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object]
) -> None:
    config = small(checkpoint_every=3, **values)
    run(dataset, tmp_path / "straight", config)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # two steps past the checkpoint: these must be undone
        with pytest.raises(StopError):
            run(dataset, tmp_path / "stopped", config)
    halfway = load_checkpoint(tmp_path / "stopped")
    assert halfway.step == 3
    torch.manual_seed(999)  # the state of torch's own generator must not matter
    run(dataset, tmp_path / "stopped", config, resume=True)

    straight, resumed = (load_checkpoint(tmp_path / name) for name in ("straight", "stopped"))
    assert straight.step == resumed.step == 6
    assert_same_state(straight, resumed)
    assert any("momentum_buffer" in key for key in tensors(straight.optimizer))
    assert any("running_mean" in key for key in tensors(straight.model))
    # The comparison is sensitive: three more steps changed every kind of tensor.
    for key in ("encoder.conv1.weight", "encoder.reduction.bias", "encoder.bn1.running_mean"):
        moved = not torch.equal(halfway.model[key], straight.model[key])
        assert moved is not ("running" in key and values.get("batch_norm") == "frozen"), key
    logs = [
        [row[:3] for row in csv.reader((tmp_path / name / "log.csv").open())]
        for name in ("straight", "stopped")
    ]
    assert logs[0] == logs[1]
    assert [row[0] for row in logs[0]] == ["step", "1", "2", "3", "4", "5", "6"]


def test_resuming_a_finished_run_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    config = small(steps=2)
    run(dataset, tmp_path / "run", config)
    before = load_checkpoint(tmp_path / "run")
    run(dataset, tmp_path / "run", config, resume=True)
    assert_same_state(before, load_checkpoint(tmp_path / "run"))


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StopError):
            run(dataset, tmp_path / "run", small(steps=2))
    assert not (tmp_path / "run" / FILE_NAME).exists()
    run(dataset, tmp_path / "run", small(steps=2), resume=True)
    run(dataset, tmp_path / "other", small(steps=2))
    assert_same_state(load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "other"))


def test_training_lowers_the_loss_on_a_fixed_batch(dataset: Dataset) -> None:
    still = {"batch_norm": "frozen", "dropout": 0.0, "augment_probability": 0.0}
    config = small(channels=256, lr=2e-2, **still)
    batch = Episodes(dataset, config, cases=dataset.cases, progress=False).batch(0)
    model = untrained(config).train()
    optimizer = make_optimizer(model, config.train)
    losses = [float(train_step(model, optimizer, batch, config.train)) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_run_folder_and_the_model_in_it(dataset: Dataset, tmp_path: Path) -> None:
    config = small(steps=2, weights="random", imagenet_normalisation=True)
    model = run(dataset, tmp_path / "run", config)
    assert not model.training
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        FILE_NAME,
        "config.json",
        "log.csv",
    ]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Config.from_dict(record["config"]) == config
    assert record["data"]["cases"] == list(dataset.cases)
    assert record["data"]["hold_out"] == ["kidney"]
    assert record["data"]["organs"] == ["liver", "spleen"]
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    assert all(float(row["lr"]) == 1e-3 for row in rows)
    assert all(float(row["seconds_per_step"]) > 0 for row in rows)

    images = torch.rand(1, 2, 48, 48, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 1, 1, 48, 48, dtype=torch.uint8)
    masks[..., 10:30, 10:30] = 1
    for path in (tmp_path / "run", tmp_path / "run" / FILE_NAME):
        loaded = load_model(path)
        assert not loaded.training
        assert loaded.config == config.model
        with torch.no_grad():
            ours, theirs = (m(images[:, :1], masks, images[:, 1:]) for m in (model, loaded))
        assert torch.equal(ours, theirs)


def test_training_leaves_torchs_generator_unchanged(dataset: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(dataset, tmp_path / "run", small(steps=1))
    assert torch.equal(torch.rand(2), expected)


def test_held_out_organs_do_not_affect_the_weights(dataset: Dataset, tmp_path: Path) -> None:
    """The run is the same if held-out organs are labelled as background."""
    import nibabel as nib
    import numpy as np

    root = write_synthetic_dataset(tmp_path / "blind", cases=3)
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        assert (data == 3).any()
        data[data == 3] = 0
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    run(dataset, tmp_path / "seen", small(steps=2))
    run(Dataset.open(root), tmp_path / "unseen", small(steps=2))
    assert_same_state(load_checkpoint(tmp_path / "seen"), load_checkpoint(tmp_path / "unseen"))


def test_learning_rate_falls_at_the_milestones() -> None:
    options = preset("published").train
    rates = [learning_rate(options, step) for step in (0, 799, 800, 1599, 1600, 2399, 2400)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


def test_optimizer_is_the_published_one_with_a_separate_rate_for_the_reduction_layer() -> None:
    config = small(reduction_lr_factor=10, weights="random")
    model = untrained(config)
    optimizer = make_optimizer(model, config.train)
    assert set_learning_rate(optimizer, config.train, 4) == pytest.approx(1e-4)
    trunk, reduction = optimizer.param_groups
    assert (trunk["lr"], reduction["lr"]) == pytest.approx((1e-4, 1e-3))
    assert {(g["momentum"], g["weight_decay"]) for g in (trunk, reduction)} == {(0.9, 5e-4)}
    given_parameters = {id(p) for g in (trunk, reduction) for p in g["params"]}
    assert given_parameters == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in reduction["params"]} == {
        id(model.encoder.reduction.weight),
        id(model.encoder.reduction.bias),
    }


def test_loss_ignores_255_and_is_zero_without_any_label() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 3, 5, 4, generator=g)
    labels = torch.randint(0, 3, (2, 1, 5, 4), generator=g)
    labels[0, 0, :2] = 255
    expected = F.cross_entropy(logits[:, 0], labels[:, 0], ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, labels), expected)
    assert segmentation_loss(logits, torch.full_like(labels, 255)) == 0


def test_loss_of_lslpn_is_that_of_its_logits(dataset: Dataset) -> None:
    config = small(batch=2, batch_norm="frozen", dropout=0.0)
    batch = Episodes(dataset, config, cases=dataset.cases, progress=False).batch(0)
    model = untrained(config)
    batch.query_labels[0, 0, ::2] = 255
    logits = model(batch.support_images, batch.support_masks, batch.query_images)
    loss = model.loss(batch, config.train)
    torch.testing.assert_close(loss, segmentation_loss(logits, batch.query_labels))
    batch.query_labels.fill_(255)
    nothing = model.loss(batch, config.train)
    nothing.backward()
    assert nothing == 0
    assert not model.encoder.reduction.weight.grad.any()


def test_accumulated_gradients_are_those_of_the_whole_batch(dataset: Dataset) -> None:
    config = small(batch=4, batch_norm="frozen", dropout=0.0, lr=1.0, momentum=0.0)
    batch = Episodes(dataset, config, cases=dataset.cases, progress=False).batch(0)
    results = []
    for parts in (1, 2, 4):
        model = untrained(config).double().train()
        options = with_overrides(config, accumulate=parts).train
        double = type(batch)(
            batch.support_images.double(),
            batch.support_masks,
            batch.query_images.double(),
            batch.query_labels,
        )
        train_step(model, make_optimizer(model, options), double, options)
        results.append(model.encoder.reduction.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-8, atol=1e-10)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.train_step
    steps = 0

    def diverging(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        loss = real(*arguments)  # type: ignore[arg-type]
        return loss * float("nan") if steps == 4 else loss

    monkeypatch.setattr(train_module, "train_step", diverging)
    with pytest.raises(InputError, match=r"diverged.*step 4.*lower lr.*checkpoint\.pt"):
        run(dataset, tmp_path / "run", small(checkpoint_every=2))
    kept = load_checkpoint(tmp_path / "run")
    assert kept.step == 2
    assert all(t.isfinite().all() for t in kept.model.values())


def test_weights_that_are_not_finite_are_not_saved(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step is computed before its update."""
    real = train_module.train_step
    steps = 0

    def poisoning(model: LSLPN, *arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        loss = real(model, *arguments)  # type: ignore[arg-type]
        if steps == 4:
            with torch.no_grad():
                model.encoder.reduction.weight[0, 0, 0, 0] = float("inf")
        return loss

    monkeypatch.setattr(train_module, "train_step", poisoning)
    with pytest.raises(InputError, match="weights are no longer finite after step 4"):
        run(dataset, tmp_path / "run", small(checkpoint_every=2))
    assert load_checkpoint(tmp_path / "run").step == 2


def test_an_existing_run_is_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run", small(steps=1))
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    with pytest.raises(InputError, match=r"already holds a training run.*`resume=True`"):
        run(dataset, tmp_path / "run", small(steps=1))
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


def test_resuming_without_a_run_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        run(dataset, tmp_path / "nothing", small(), resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run(dataset, out, small(steps=1))
    return out


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"lr": 1e-2}, {}, "lr was 0.001, now 0.01"),
        ({"grid_scale": 0.25}, {}, "grid_scale was 0.125, now 0.25"),
        ({"steps": 9}, {}, "steps was 1, now 9"),
        ({}, {"hold_out": ["liver"]}, "hold_out was|organs was"),
        ({}, {"cases": ["syn_00", "syn_01"]}, "cases was"),
    ],
)
def test_resuming_with_other_options_or_data_is_refused(
    dataset: Dataset,
    finished: Path,
    values: dict[str, object],
    arguments: dict[str, object],
    message: str,
) -> None:
    config = small(**{"steps": 1, **values})
    with pytest.raises(InputError, match=message):
        run(dataset, finished, config, resume=True, **arguments)


def test_resuming_with_changed_labels_is_refused(
    dataset: Dataset, finished: Path, tmp_path: Path
) -> None:
    root = write_synthetic_dataset(tmp_path / "data", cases=3)
    (root / "labelsTr" / "syn_00.nii.gz").write_bytes(
        (root / "labelsTr" / "syn_00.nii.gz").read_bytes()
    )
    run(Dataset.open(root), finished, small(steps=1), resume=True)  # equal data elsewhere is fine
    import nibabel as nib
    import numpy as np

    path = root / "labelsTr" / "syn_00.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[data == 2] = 1
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    with pytest.raises(InputError, match="voxels of the images or labels have changed"):
        run(Dataset.open(root), finished, small(steps=1), resume=True)


def test_a_run_of_an_earlier_version_resumes_without_a_checksum(
    dataset: Dataset, finished: Path, tmp_path: Path
) -> None:
    content = torch.load(finished / FILE_NAME, weights_only=True)
    content["data"]["fingerprint"] = content["data"].pop("checksum")
    content["config"]["train"]["align"] = content["config"]["model"].pop("align")
    torch.save(content, tmp_path / FILE_NAME)
    run(dataset, tmp_path, small(steps=1), resume=True)


def test_an_optimizer_of_another_network_is_refused(
    dataset: Dataset, finished: Path, tmp_path: Path
) -> None:
    content = torch.load(finished / FILE_NAME, weights_only=True)
    for spoil in (
        lambda state: state["param_groups"].pop(),
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(3)),
        lambda state: state.clear(),
    ):
        optimizer = copy.deepcopy(content["optimizer"])
        spoil(optimizer)
        torch.save({**content, "optimizer": optimizer}, tmp_path / FILE_NAME)
        with pytest.raises(InputError, match=r"checkpoint\.pt: its optimizer state does not fit"):
            run(dataset, tmp_path, small(steps=1), resume=True)


def test_a_truncated_line_of_the_log_is_dropped(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(steps=4, checkpoint_every=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StopError):
            run(dataset, tmp_path, config)
    log = tmp_path / "log.csv"
    header, first, second, third = log.read_text().splitlines(keepends=True)
    for cut in (second[:-1], second[:5], second[:2], "\0" * 9, second[:5] + third):
        log.write_text(header + first + cut)
        assert time_spent(tmp_path) == pytest.approx(seconds_in(first))
    log.write_text(header + first + second[:5] + third)
    run(dataset, tmp_path, config, resume=True)
    assert [row["step"] for row in csv.DictReader(log.open())] == ["1", "3", "4"]


def seconds_in(line: str) -> tuple[float, float]:
    seconds, waiting = (float(value) for value in line.split(",")[3:])
    return seconds, waiting


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_appended_to_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"/dev/full: cannot be written \(No space left"):
        append_text("/dev/full", "1,2\n")


def test_logging_and_checkpoint_intervals_may_differ_on_resume(
    dataset: Dataset, finished: Path
) -> None:
    config = small(steps=1, log_every=7, checkpoint_every=9)
    run(dataset, finished, config, resume=True)


def test_an_output_folder_that_cannot_be_made(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        run(dataset, tmp_path / "file" / "run", small(steps=1))


# Checkpoints.


def damaged(kind: str, finished: Path, path: Path) -> None:
    whole = (finished / FILE_NAME).read_bytes()
    content = torch.load(finished / FILE_NAME, weights_only=True)
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "foreign":
        torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    elif kind == "method":
        torch.save({**content, "method": "protonet"}, path)
    elif kind == "version":
        torch.save({**content, "version": 99}, path)
    elif kind == "option":
        content["config"]["model"]["colour"] = 1
        torch.save(content, path)
    elif kind == "architecture":
        content["config"]["model"]["channels"] = 128
        torch.save(content, path)
    elif kind == "missing tensor":
        del content["model"]["encoder.layer3.0.conv1.weight"]
        torch.save(content, path)
    elif kind == "flipped bits":
        weights = content["model"]["encoder.layer3.0.conv1.weight"].numpy().tobytes()
        place = whole.index(weights) + len(weights) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    elif kind in ("not finite", "infinite"):
        weights = content["model"]["encoder.layer3.0.conv1.weight"]
        weights.view(-1)[7] = float("nan" if kind == "not finite" else "inf")
        torch.save(content, path)
    elif kind == "no tensor":
        content["model"]["encoder.layer3.0.conv1.weight"] = [1.0]
        torch.save(content, path)
    elif kind == "too large":
        content["config"]["model"]["channels"] = 10**9
        torch.save(content, path)
    elif kind == "beyond counting":
        content["config"]["model"]["channels"] = 10**30
        torch.save(content, path)
    else:
        key, value = EDITS[kind]
        place = content
        for name in key[:-1]:
            place = place[name]
        place[key[-1]] = value
        torch.save(content, path)


EDITS: dict[str, tuple[tuple[str, ...], object]] = {
    "config": (("config",), [1]),
    "model options": (("config", "model"), None),
    "method in a list": (("method",), ["lslpn"]),
    "step": (("step",), "three"),
    "weights": (("model",), [1]),
    "data": (("data",), "mine"),
    "held-out organs": (("data", "hold_out"), "liver"),
    "a case": (("data", "cases"), ["a", 3]),
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("module", "cannot be read"),
        ("foreign", "not an lslpn checkpoint"),
        ("method", "method 'protonet'.*expected one of lslpn, panet"),
        ("version", "version 99"),
        ("option", "'colour'"),
        (
            "architecture",
            r"another architecture.*\(128, 1536, 3, 3\).*\(32, 1536, 3, 3\)|"
            r"another architecture.*reduction",
        ),
        ("missing tensor", r"another architecture.*layer3\.0\.conv1\.weight"),
        ("flipped bits", r"cannot be read \(wrong checksum of .*damaged"),
        ("not finite", r"damaged: encoder\.layer3\.0\.conv1\.weight has values.*not finite"),
        ("infinite", r"damaged: encoder\.layer3\.0\.conv1\.weight has values.*not finite"),
        ("no tensor", r"encoder\.layer3\.0\.conv1\.weight is not a dense tensor"),
        ("too large", r"another architecture.*\(1000000000, 1536, 3, 3\)"),
        ("beyond counting", "no network can be built"),
        ("config", "must be a table"),
        ("model options", "must be a table"),
        ("method in a list", r"method \['lslpn'\]"),
        ("step", "step is str, not int"),
        ("weights", "model is list, not dict"),
        ("data", "data is str, not dict"),
        ("held-out organs", "hold_out is str, not list"),
        ("a case", "cases is not a list of names"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_clear_error(
    finished: Path, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "bad.pt"
    damaged(kind, finished, path)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*no such file or folder"):
        checkpoint_path(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"has no {FILE_NAME}"):
        load_model(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_failed_write_is_reported_and_keeps_the_previous_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    import resource

    path = tmp_path / FILE_NAME
    checkpoint = load_checkpoint(finished)
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as a full disk
    try:
        with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be written \(File too large"):
            save_checkpoint(path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


_KILLED = """
import sys, torch
torch.set_num_threads(1)
from lslpn.data.dataset import Dataset
from lslpn.config import preset, with_overrides
from lslpn.training import train
config = with_overrides(
    preset("published"), size=48, batch=1, steps=100000, checkpoint_every=1, log_every=1
)
dataset = Dataset.open(sys.argv[1])
train(config, dataset, hold_out=["kidney"], cases=dataset.cases, out=sys.argv[2], progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_leaves_a_complete_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    """Killed while it writes a checkpoint after every step: the checkpoint must load."""
    out = tmp_path / "run"
    root = Path(train_module.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(dataset.root), str(out)], env=environment
    )
    try:
        deadline = time.monotonic() + 120
        first = None
        while time.monotonic() < deadline and process.poll() is None:
            file = out / FILE_NAME
            if file.exists():
                first = first or file.stat().st_mtime_ns
                # Kill while the next one is being written to its temporary file.
                if file.stat().st_mtime_ns != first and list(out.glob(".*partial*")):
                    break
            time.sleep(0.002)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    checkpoint = load_checkpoint(out)
    assert checkpoint.step >= 1
    assert all(t.isfinite().all() for t in checkpoint.model.values())
    load_model(out)


def test_two_steps_on_real_ct_give_a_checkpoint(
    shared_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two steps on two real scans, from NIfTI to a checkpoint."""
    real = Dataset.open(shared_path("data/Dataset101_SABS"))
    config = with_overrides(preset("published"), size=129, steps=2, log_every=1, batch=2)
    train(
        config,
        real,
        hold_out=["kidney_left", "kidney_right"],
        cases=real.cases[:2],
        out=tmp_path / "run",
        progress=False,
    )
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert all(0 < float(row["loss"]) < 1 for row in rows)
    assert "kidney_left" not in load_checkpoint(tmp_path / "run").data["organs"]
