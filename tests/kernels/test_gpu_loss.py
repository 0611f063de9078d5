"""The loss of the GPU backends without a GPU: what nvcc and Triton compile, executed on the host.

The oracle is F.cross_entropy of the reference's logits in float64; tensor cores cut off sums. Calls
are drawn and compared as in test_loss.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from ptx import hooks, machine, triton_driver
from ptx.fixtures import module  # noqa: F401
from test_loss import close, drawn, expected, results
from test_ptx import _one_thread  # noqa: F401

from lslpn_kernels import GridSpec, cosine_match_loss
from lslpn_kernels._backends import gpu_match, triton_

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py")
PAPER = Case(D=64, h=9, w=9, H=64, W=64, grid=GridSpec(), kind="positive")
THREE = Case(C=3, D=16, Q=2)
CASES = {
    "two_classes": PAPER,
    "three_classes_no_weights": replace(THREE, B=2, seed=1),
    "one_class": replace(THREE, C=1),
    "more_classes_than_a_pass": Case(C=5, D=16, channels_last=True),
    "mean_over_windows": Case(C=3, D=16, reduce="mean"),
    "more_windows_over_a_pixel": Case(D=16, H=32, W=40, grid=GridSpec(1 / 4, 1 / 3)),
}
# Few cases for those that Triton compiles for seconds.
DTYPES = {"two_classes": (torch.float32, torch.bfloat16), "one_class": (torch.float32,)}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that is executed, with tensor cores that cut off sums."""
    name: str = request.param
    if name == "triton" and (reason := triton_driver.obstacle()):
        pytest.skip(reason)
    if name == "cuda":
        compiled = request.getfixturevalue("module")
        compiled.take(90)
    hooked = hooks.triton(90) if name == "triton" else hooks.cuda(compiled)
    machine.LAUNCHES.clear()
    with hooked, machine.settings(truncates=True):
        yield name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in DTYPES.get(name, (torch.float32,))],
)
def test_cross_entropy_of_the_equations(backend: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = drawn(case, dtype)
    if case.seed:
        inputs = *inputs[:3], None
    found = results(case, backend, inputs)
    assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
    if case.C > 1:
        assert len(machine.LAUNCHES) == 4  # forward and backward
    close(found, expected(case, inputs), 2e-6 if dtype == torch.float32 else 2e-5)


def test_labels_that_are_ignored_or_wrong(backend: str) -> None:
    query, prototypes, labels, weight = drawn(THREE, torch.float32)
    for ignore_index, dtype in ((-100, torch.int64), (0, torch.uint8), (1000, torch.uint8)):
        if ignore_index == 1000:
            given = labels.where(labels != 255, 1)  # none is
        else:
            given = labels.where(labels != 255, ignore_index)
        inputs = query, prototypes, given.to(dtype), weight
        options = {"ignore_index": ignore_index}
        found = results(THREE, backend, inputs, **options)
        close(found, expected(THREE, (query, prototypes, given, weight), **options), 2e-6)
    for stray in (3, -1, 1 << 40):
        wrong = labels.clone()
        wrong[0, 0, -1, -1] = stray
        assert results(THREE, backend, (query, prototypes, wrong, weight))[0].isnan()
    # Nothing counts: NaN, as F.cross_entropy has it, and nothing is learnt.
    for none in (labels.fill_(255), labels.to(torch.uint8)):
        loss, *grads = results(THREE, backend, (query, prototypes, none, weight))
        assert loss.isnan()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("ignored", [False, True])
def test_not_finite_as_in_cross_entropy(backend: str, ignored: bool) -> None:
    """A NaN in a pixel that counts is in the loss, one in a pixel that does not is not."""
    case = replace(THREE, h=21, w=19)
    query, prototypes, labels, _ = drawn(case, torch.float32)
    with torch.no_grad():
        query[0, 0, 1, 3, 4] = torch.nan
    labels[0, 0, 3, 4] = 255 if ignored else 1
    loss, gradient, _ = results(case, backend, (query, prototypes, labels, None))
    assert loss.isnan() == (not ignored)
    if ignored:
        close((loss,), expected(case, (query, prototypes, labels, None))[:1], 2e-6)
    assert gradient[0, 0, :, 3, 4].isnan().all()


def test_logits_far_from_and_near_the_right_class(backend: str) -> None:
    """Logits of +-2000: the loss stays exact where every probability rounds to 0 or 1."""
    query, prototypes, labels, weight = drawn(replace(THREE, kind="positive"), torch.float32)

    def loss(backend: str, dtype: torch.dtype, scale: float) -> Any:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, prototypes)]
        found = cosine_match_loss(
            *(*leaves, labels, THREE.grid, "max", backend, scale), weight=weight
        )
        return found.detach(), *torch.autograd.grad(found, leaves)

    for scale in (2000.0, -30.0, 1e-3):
        close(loss(backend, torch.float32, scale), loss("reference", torch.float64, scale), 2e-4)


def test_what_the_kernels_do_not_take(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes the long way, with the same results."""
    cases = [(replace(THREE, h=9, w=12, H=4, W=5), torch.float32), (THREE, torch.float64)]
    if backend == "triton":
        monkeypatch.setattr(triton_, "_images", lambda *_: 0)
        cases = [(THREE, torch.float32)]
    taken = []
    of_scores = gpu_match.of_scores
    monkeypatch.setattr(gpu_match, "of_scores", lambda *a: (taken.append(1), of_scores(*a))[1])
    for case, dtype in cases:
        inputs = drawn(case, dtype)
        close(results(case, backend, inputs), expected(case, inputs), 2e-6)
    assert len(taken) == len(cases)


def test_part_by_part(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few images at a time, and again: the same bits, of one gradient alone as well."""
    query, prototypes, labels, weight = inputs = drawn(THREE, torch.float32)
    whole = results(THREE, backend, inputs)
    if backend == "triton":
        monkeypatch.setattr(triton_, "_images", lambda *_: 1)
        loss, to_query, to_prototypes = results(THREE, backend, inputs)
        assert torch.equal(loss, whole[0])
        assert torch.equal(to_query, whole[1])
        close((to_prototypes,), (whole[2].double(),), 1e-6)
        monkeypatch.undo()
    again = results(THREE, backend, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    for i, leaf in ((1, query), (2, prototypes)):
        alone = [t if t is leaf else t.detach() for t in (query, prototypes)]
        loss = cosine_match_loss(*(*alone, labels, THREE.grid, "max", backend, 20.0), weight=weight)
        assert torch.equal(loss, whole[0])
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], whole[i])
        loss = cosine_match_loss(
            *(*(t.detach() for t in alone), labels, THREE.grid, "max", backend, 20.0),
            weight=weight,
        )
        assert torch.equal(loss, whole[0])
