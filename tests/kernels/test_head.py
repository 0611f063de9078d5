"""The head as a module: its arguments, label maps, and `head.check`."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import lslpn_kernels
from lslpn_kernels import GridSpec, LocalPrototypeHead, backends, check, masked_average_pool
from lslpn_kernels._backends import choose, cuda, load, torch_

GRID = GridSpec(1 / 2)


def episode(N: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, 1, 1, 6, 4, 3, generator=generator)
    labels = torch.randint(0, N + 1, (1, 1, 12, 9), generator=generator)
    labels.view(-1)[: N + 1] = torch.arange(N + 1)
    return support, labels, query


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"grid": (1 / 8, 1 / 2)}, TypeError, "grid must be a GridSpec"),
        ({"logit_scale": "20"}, TypeError, "logit_scale must be a number"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be a finite number"),
        ({"min_pixels": None}, TypeError, "min_pixels must be a number"),
        ({"min_pixels": -1}, ValueError, "min_pixels must be 0 or more"),
        ({"reduce": "min"}, ValueError, 'reduce must be "max" or "mean"'),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": None}, TypeError, "backend must be a string"),
    ],
)
def test_arguments_are_checked_when_the_head_is_made(
    bad: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        LocalPrototypeHead(**bad)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer, got float"),
        ({"labels": torch.zeros(1, 1, 12, 9)}, TypeError, "labels .* must be integers"),
        ({"labels": torch.zeros(1, 2, 12, 9).long()}, ValueError, "as many support images K"),
        (
            {"labels": torch.ones(1, 1, 1, 12, 9).bool()},
            ValueError,
            "num_classes is for label maps",
        ),
    ],
)
def test_label_maps_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    support, labels, query = episode()
    arguments = {"labels": labels, "num_classes": 2} | change
    with pytest.raises(error, match=text):
        LocalPrototypeHead(GRID)(support, arguments["labels"], query, arguments["num_classes"])


def test_labels_of_another_size_than_the_support_masks() -> None:
    """This size has as many windows."""
    support, masks, query = episode()
    head = LocalPrototypeHead(GRID)
    labels = masks[..., :8, :6]
    assert GRID.shape(12, 9) == GRID.shape(8, 6)
    with pytest.raises(ValueError, match=r"the size \(H, W\) of support_masks, \(12, 9\), got"):
        head.loss(support, masks, query, labels)
    prototypes = head.prototypes(support, masks)
    assert head.match_loss(query, prototypes, labels).isfinite()


def test_the_number_of_classes_of_a_label_map() -> None:
    """One more than the largest label other than 255, and at least one foreground class."""
    support, labels, query = episode(N=3)
    head = LocalPrototypeHead(GRID)
    assert head(support, labels, query).shape[2] == 4
    assert head(support, labels.masked_fill(labels == 3, 255), query).shape[2] == 3
    assert head(support, torch.zeros_like(labels), query).shape[2] == 2
    assert head(support, labels, query, num_classes=6).shape[2] == 6
    with pytest.raises(ValueError, match="num_classes must be given for a label map"):
        torch.func.vmap(lambda s: head(s[None], labels, query))(support)


def test_check_compares_every_backend() -> None:
    support, labels, query = episode()
    report = LocalPrototypeHead(GRID).check(support, labels, query)
    usable = [n for n, s in backends().items() if s.usable and {"cpu", "any device"} & {*s.devices}]
    assert [line.backend for line in report.lines if not line.reason] == usable
    for line in report.lines:
        if not line.reason:
            assert 0 < line.logits < 2e-6
            assert 0 < line.query_gradient < 1e-5
            assert 0 < line.support_gradient < 1e-5
            assert line.milliseconds > 0
    assert report.chosen in usable
    assert f"this head uses {report.chosen}: within" in str(report)


def test_check_whatever_the_caller_has_set_in_torch() -> None:
    with torch.inference_mode():
        support, labels, query = episode()
        masks = labels[:, :, None] == 1
    with torch.inference_mode(), torch.device("meta"):
        report = LocalPrototypeHead(GRID).check(support, masks, query)
    assert all(line.query_gradient < 1e-5 for line in report.lines)


def test_check_finds_a_backend_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_.cosine_match
    monkeypatch.setattr(torch_, "cosine_match", lambda *args: 1.01 * right(*args))
    report = LocalPrototypeHead(GRID, backend="torch").check(*episode())
    (line,) = (line for line in report.lines if line.backend == "torch")
    assert line.logits == pytest.approx(0.01, rel=1e-3)
    assert "within 1.0e-02" in str(report)


def test_check_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "--device", "cpu", "--pixels", "16", "--locations", "3", "--channels", "4"]
    monkeypatch.setattr(sys, "argv", words)
    check.main()
    assert capsys.readouterr().out.count("of the equations in float64") == 2
    monkeypatch.setattr(sys, "argv", ["check", "--pixels", "0"])
    with pytest.raises(SystemExit):
        check.main()
    assert "--pixels must be at least 1, got 0" in capsys.readouterr().err


def test_backends_is_a_function_and_no_package() -> None:
    assert callable(lslpn_kernels.backends)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lslpn_kernels.backends")


def test_a_call_on_the_cpu_asks_nothing_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked process, asking would be an error."""

    def asked(*_: object) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    load.cache_clear()
    monkeypatch.setattr(cuda, "unavailable", asked)
    try:
        assert choose("auto", torch.device("cpu"), torch.float32, GRID, "max") in ("cpu", "torch")
    finally:
        load.cache_clear()


def test_cached_tables_do_not_depend_on_the_mode_of_the_first_call() -> None:
    """Fake tensors, another default device, inference mode: the next call is an ordinary one."""
    support, labels, _ = episode()
    for scale, first in (
        (0.71, FakeTensorMode(allow_non_fake_inputs=True)),
        (0.73, torch.device("meta")),
        (0.77, torch.inference_mode()),
    ):
        grid = GridSpec(scale)
        # Fake tensors cannot make the tables, and must not leave wrong ones in the cache.
        with first, contextlib.suppress(DynamicOutputShapeException):
            masked_average_pool(support, labels, grid, backend="torch", num_classes=2)
        features = support.clone().requires_grad_()
        pooled = masked_average_pool(features, labels, grid, backend="torch", num_classes=2)
        expected = masked_average_pool(support, labels, grid, backend="reference", num_classes=2)
        torch.testing.assert_close(pooled, expected)
        pooled.sum().backward()
