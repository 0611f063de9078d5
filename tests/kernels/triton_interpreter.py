"""The Triton kernels in Triton's interpreter, against the oracle. See test_triton.py, which runs
this file in a process of its own with TRITON_INTERPRET=1; it is not collected otherwise.

It tests the source of the kernels at every branch, wherever there is Triton. The compiled code,
sums over many channels and golden files are tested by test_ptx.py, which executes that code. The
cases here are as small as they can be: the interpreter takes a second for a handful of programs.
`LSLPN_INTERPRET=all` adds those that the other backends are tested on.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import GOLDEN, SITUATIONS, Case, assert_near, run

from lslpn_kernels import GridSpec, LocalPrototypeHead, backends, cosine_match
from lslpn_kernels._backends import torch_, triton_, triton_plans

if os.environ.get("TRITON_INTERPRET") != "1" or not backends()["triton"].usable:
    raise RuntimeError(f"TRITON_INTERPRET=1 and Triton are needed: {backends()['triton']}")

torch.set_num_threads(1)
ALL = os.environ.get("LSLPN_INTERPRET") == "all"

PLAIN = Case(h=3, w=2, H=7, W=6, D=3, grid=GridSpec(1 / 2, 1.0))
TINY = Case(h=2, w=2, H=4, W=3, D=3, grid=GridSpec(1 / 2, 1.0))
ONE = replace(TINY, grid=GridSpec(1.0))  # window: for what is not about windows
CASES = {
    "overlapping_windows": replace(TINY, grid=GridSpec(1 / 2, 1 / 2)),
    "mean_over_windows": Case(
        h=2, w=3, H=5, W=4, D=3, C=3, grid=GridSpec(1 / 2, 1 / 2), reduce="mean"
    ),
    "features_as_large_as_image": Case(h=5, w=4, H=5, W=4, D=3, grid=GridSpec(1 / 2, 1 / 2)),
    "features_larger_than_image": Case(h=7, w=6, H=4, W=5, D=3, grid=GridSpec(1 / 2, 1.0)),
    "one_pixel_one_location": Case(h=1, w=1, H=1, W=1, C=1),
    "one_location_under_an_image": Case(h=1, w=1, H=5, W=4, grid=GridSpec(1 / 2, 1.0)),
    "one_window_global_prototype": replace(PLAIN, grid=GridSpec(1.0)),
    "windows_of_one_pixel": Case(h=3, w=3, H=4, W=4, grid=GridSpec(1 / 4, 1 / 2)),
    "many_windows_over_a_pixel": Case(h=2, w=2, H=9, W=3, D=3, grid=GridSpec(0.5, 0.05)),
    "two_shots_three_queries_two_episodes": replace(ONE, B=2, K=2, Q=3, C=3),
    "channels_last": replace(PLAIN, channels_last=True, D=8, C=3),
    "part_of_a_larger_tensor": replace(ONE, strided=True, D=6, K=2, Q=2, B=2),
    "part_of_a_larger_channels_last_tensor": replace(TINY, strided=True, channels_last=True, K=2),
    "zero_features": replace(PLAIN, kind="with_zeros"),
    "soft_masks": replace(PLAIN, mask_kind="soft"),
    "few_pixels_are_none": replace(PLAIN, min_pixels=5, mask_kind="uint8"),
    "channels_fill_blocks": replace(TINY, D=128),
    "channels_in_several_blocks": replace(TINY, D=300, channels_last=True),
    "more_classes_than_a_block": replace(ONE, C=17),
    "locations_in_several_blocks": Case(h=5, w=18, H=6, W=20, grid=GridSpec(1.0)),
    "long_pieces_are_cut": Case(h=2, w=2, H=36, W=40, D=3, grid=GridSpec(1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    expected = run(case, "reference", rounded=torch.float32)
    assert_near(run(case, "triton", torch.float32), expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, K=2, Q=2, grid=GridSpec(1.0)),
        replace(PLAIN, channels_last=True, D=8, mask_kind="soft"),
    ],
    ids=["contiguous", "channels_last"],
)
def test_half_types(case: Case, dtype: torch.dtype) -> None:
    """Against the oracle in float64 on the same, rounded numbers."""
    low = run(case, "triton", dtype)
    assert low["scores"].dtype == low["prototypes"].dtype == torch.float32
    assert low["grad_query"].dtype == low["grad_support"].dtype == dtype
    assert_near(low, run(case, "reference", rounded=dtype), 2e-6)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_images_beyond_offsets_of_32_bits(monkeypatch: pytest.MonkeyPatch, reduce: str) -> None:
    """The `torch` backend takes over, in both directions of both operators."""
    monkeypatch.setattr(triton_plans, "episodes", lambda *_: 0)
    monkeypatch.setattr(triton_plans, "images", lambda *_: 0)
    case = replace(TINY, K=2, Q=2, D=5, reduce=reduce)
    expected = run(case, "reference", rounded=torch.float32)
    for launch in triton_plans.KEPT:
        monkeypatch.setattr(triton_plans, launch.__name__, None)
    assert_near(run(case, "triton", torch.float32), expected, 2e-6)


def test_which_images_offsets_of_32_bits_reach() -> None:
    grid, size, workspace = GridSpec(1 / 2), (1 << 10, 1 << 10), 1 << 40

    def taken(C: int, D: int, stride: int) -> list[bool]:
        shape, strides = (1, 1, D, 1 << 6, 1 << 6), (0, 0, stride, 1 << 6, 1)
        layout = triton_plans.Layout(torch.float32, shape, strides, torch.device("cpu"))
        pooled = triton_plans.episodes(layout, C, grid, size, workspace)
        matched = [
            triton_plans.images(layout, C, grid, size, r, workspace) for r in ("max", "mean")
        ]
        return [n > 0 for n in (pooled, *matched)]

    assert all(taken(2, 1 << 18, 1 << 12))
    assert not any(taken(2, 1 << 19, 1 << 12))  # features
    assert not any(taken(2, 1 << 19, 0))  # their gradient
    assert not any(taken(2, 2, 1 << 31))  # a view into something larger
    assert not any(taken(1 << 11, 2, 1 << 12))  # scores


@pytest.mark.parametrize("images", [0, 4])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_scores_times_a_factor(monkeypatch: pytest.MonkeyPatch, reduce: str, images: int) -> None:
    """In the kernels, and where they leave it to the `torch` backend."""
    monkeypatch.setattr(triton_, "_images", lambda *_: images)
    grid, size = TINY.grid, (TINY.H, TINY.W)
    _, _, query, weight = TINY.draw(torch.float32)
    prototypes = torch.randn(1, 2, *grid.shape(*size), TINY.D)
    results = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (query, prototypes)]
        scores = cosine_match(inputs[0], inputs[1], grid, size, reduce, backend, -3.0)
        grads = torch.autograd.grad(scores, inputs, weight.to(dtype))
        results[backend] = {"scores": scores.detach(), "query": grads[0], "prototypes": grads[1]}
    assert_near(results["triton"], results["reference"], 2e-6)


def test_images_summed_by_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are programs enough without one for each image of an episode."""
    monkeypatch.setattr(triton_plans, "_splits", lambda programs, images: 1)
    case = replace(ONE, K=3, Q=2, D=7)
    expected = run(case, "reference", rounded=torch.float32)
    assert_near(run(case, "triton", torch.float32), expected, 2e-6)


def test_groups_of_many_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are summed in larger groups where there are 16 episodes and more."""
    group = triton_plans._group
    monkeypatch.setattr(triton_plans, "_group", lambda C, G, _: group(C, G, 16))
    case = Case(h=2, w=2, H=8, W=3, D=9, grid=GridSpec(1 / 4, 1.0))
    assert case.grid.shape(case.H, case.W)[0] == 4
    expected = run(case, "reference", rounded=torch.float32)
    assert_near(run(case, "triton", torch.float32), expected, 2e-6)


@pytest.mark.parametrize("images", [0, 1, 2, 4])
def test_little_workspace(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """A batch in parts: none fits (the `torch` backend takes over), one image of an episode, an
    episode, two of three."""
    case = replace(ONE, B=3, Q=2, D=4)
    expected = run(case, "reference", rounded=torch.float32)
    monkeypatch.setattr(triton_, "_images", lambda *_: images)
    if images < 4:
        monkeypatch.setattr(triton_, "WORKSPACE", 1)  # for pooling: one episode at a time
    fallen_back = []
    match = torch_.cosine_match
    monkeypatch.setattr(
        torch_, "cosine_match", lambda *args: (fallen_back.append(1), match(*args))[1]
    )
    assert_near(run(case, "triton", torch.float32), expected, 2e-6)
    assert bool(fallen_back) == (images == 0)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_same_scores_without_winners(reduce: str) -> None:
    case = replace(TINY, Q=2, reduce=reduce, grid=GridSpec(1 / 2, 1 / 2))
    _, _, query, _ = case.draw(torch.float32)
    Gy, Gx = case.grid.shape(case.H, case.W)
    prototypes = torch.randn(1, case.C, Gy, Gx, case.D, generator=torch.Generator().manual_seed(0))
    size = (case.H, case.W)
    for features in (query, query.clone().requires_grad_()):
        scores = cosine_match(features, prototypes, case.grid, size, reduce, backend="triton")
        expected = cosine_match(query.double(), prototypes.double(), case.grid, size, reduce)
        torch.testing.assert_close(scores.detach(), expected.float(), rtol=2e-6, atol=2e-6)
    with torch.no_grad():
        off = cosine_match(query, prototypes, case.grid, size, reduce, backend="triton")
    assert torch.equal(off, scores)


@pytest.mark.skipif(not ALL, reason="LSLPN_INTERPRET=all is not set: test_ptx.py has them")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    golden = np.load(path)
    support = torch.from_numpy(golden["support_features"])[None].requires_grad_()
    query = torch.from_numpy(golden["query_features"])[None].requires_grad_()
    head = LocalPrototypeHead(
        GridSpec(1 / int(golden["n_grid"]), 0.5 if golden["overlap"] else 1),
        float(golden["scale"]),
        int(golden["min_pixels"]),
        backend="triton",
    )
    logits = head(support, torch.from_numpy(golden["foreground"])[None], query)
    label = torch.from_numpy(golden["query_label"]).long()
    loss = torch.nn.functional.cross_entropy(logits[0], label.expand(logits.shape[1], -1, -1))
    loss.backward()
    assert support.grad is not None
    assert query.grad is not None
    for actual, name, tolerance in (
        (logits, "logits", 1e-5),
        (loss, "loss", 1e-5),
        (support.grad, "grad_support", 1e-4),
        (query.grad, "grad_query", 1e-4),
    ):
        wanted = torch.from_numpy(golden[name]).double()
        error = (actual.detach().double().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        assert error < tolerance, name


@pytest.mark.skipif(not ALL, reason="LSLPN_INTERPRET=all is not set: it takes ten minutes")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    expected = run(SITUATIONS[name], "reference", rounded=torch.float32)
    assert_near(run(SITUATIONS[name], "triton", torch.float32), expected, 2e-6)
