"""The CUDA kernels without a GPU, executed on the host as nvcc compiles them.

See ptx/, and test_ptx.py for each situation in each type. Calls go through `backend="cuda"`
and the bindings, as they do on a GPU, but with tensors of the CPU. What needs a GPU is in
test_gpu.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SITUATIONS, SPOILT, Case, NotFinite, assert_agree, assert_near, run
from ptx import hooks, machine
from ptx.fixtures import kernels, module  # noqa: F401
from strategies import HealthCheck, cases, given, settings
from torch import Tensor

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    backends,
    cosine_match,
    masked_average_pool,
)
from lslpn_kernels._backends import choose, cuda, native

np = pytest.importorskip("numpy", reason="numpy is not installed")

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("LSLPN_EXAMPLES", "8"))
DEVICE = (132, 227 * 1024)  # multiprocessors, shared memory


@pytest.fixture
def device(kernels: Any) -> Iterator[Any]:
    """device(multiprocessors, shared_memory): another GPU, for a test."""
    yield kernels.set_device
    kernels.set_device(*DEVICE)


def close(case: Case, dtype: torch.dtype) -> None:
    """`backend="cuda"` in `dtype` against the oracle in float64, on the same numbers."""
    expected = run(case, "reference", torch.float64, rounded=dtype)
    assert_near(run(case, "cuda", dtype), expected, 1e-4)


# Gradients of |u| where few channels cancel are no matter for single precision.
def tame(case: Case) -> Case:
    return replace(case, D=max(case.D, 16))


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation_in_double_precision(kernels: Any, name: str) -> None:
    case = SITUATIONS[name]
    assert_agree(run(case, "cuda"), run(case, "reference"), rtol=1e-9, atol=1e-8)


# Grids as they are used: aligned, odd, with a last window of its own, two tiles wide, wide parts.
GRIDS = {
    "aligned": Case(h=9, w=9, H=64, W=64, grid=GridSpec(1 / 8)),
    "last_window_closer": Case(h=9, w=9, H=65, W=67, grid=GridSpec(1 / 8)),
    "odd_windows": Case(h=6, w=8, H=44, W=60, grid=GridSpec(1 / 4)),
    "as_published": Case(h=17, w=17, H=128, W=128, grid=GridSpec(1 / 8)),
    "coarse": Case(h=9, w=11, H=64, W=80, grid=GridSpec(1 / 4)),
    "fine": Case(h=9, w=9, H=64, W=64, grid=GridSpec(1 / 16)),
    "dense": Case(h=9, w=9, H=48, W=48, grid=GridSpec(1 / 4, 1 / 4)),
    "wide": Case(h=3, w=100, H=20, W=780, grid=GridSpec(1 / 8)),
    "tall": Case(h=70, w=3, H=500, W=18, grid=GridSpec(1 / 8)),
    "global": Case(h=20, w=20, H=150, W=150, grid=GridSpec(1.0)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid(kernels: Any, name: str) -> None:
    close(
        replace(GRIDS[name], D=24, C=3, channels_last=name in ("odd_windows", "fine")),
        torch.float32,
    )


@given(cases())
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_geometry(kernels: Any, case: Case) -> None:
    close(tame(case), torch.float32)


@given(cases())
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_geometry_in_double_precision(kernels: Any, case: Case) -> None:
    assert_agree(run(case, "cuda"), run(case, "reference"), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradcheck_of_the_whole_head(kernels: Any, reduce: str) -> None:
    torch.manual_seed(0)
    support = torch.randn(1, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 2, 1, 5, 6) > 0.5
    head = LocalPrototypeHead(GridSpec(1 / 2, 1 / 2), reduce=reduce, backend="cuda")
    assert torch.autograd.gradcheck(lambda s, q: head(s, masks, q), (support, query))


def test_launches(kernels: Any) -> None:
    """At the paper's geometry every operator goes through the tiled kernels, in few launches."""
    grid = GridSpec(1 / 8)
    features = torch.randn(1, 1, 8, 65, 65)
    masks = torch.rand(1, 1, 2, 512, 512) < 0.5
    prototypes = torch.randn(1, 2, 15, 15, 8)
    counts = {}

    def count(name: str, function: Any, *arguments: Any) -> Any:
        before = len(machine.LAUNCHES)
        result = function(*arguments)
        counts[name] = len(machine.LAUNCHES) - before
        return result

    _, factor, *kept = count("pool", cuda.masked_average_pool, features, masks, 2, grid, 0.0)
    pool = prototypes, masks, 2, factor, features, grid
    grads = [
        count("pool backward", cuda.masked_average_pool_backward, *pool, *kept),
        count("pool backward of nothing kept", cuda.masked_average_pool_backward, *pool),
    ]
    assert torch.equal(*grads)
    scores, winners, gram = count(
        "match", cuda.cosine_match, features, prototypes, grid, (512, 512), "max", True
    )
    count("match backward", cuda.cosine_match_backward, scores, features, prototypes, scores,
          winners, grid, "max", gram)  # fmt: skip
    assert counts == {"pool": 3, "pool backward": 2, "pool backward of nothing kept": 3,
                      "match": 1, "match backward": 3}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_and_device_gives_the_same_bits(device: Any, dtype: torch.dtype) -> None:
    """However many parts the work is cut into, and however little shared memory a block has, as
    long as it is enough for the tiled kernels."""
    case = replace(GRIDS["aligned"], B=2, K=3, Q=3, C=2, D=72, H=160, W=144, h=21, w=19)
    results = []
    for setting in (DEVICE, DEVICE, (1, 227 * 1024), (999, 99 * 1024)):
        device(*setting)
        results.append(run(case, "cuda", dtype))
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


def test_unfilled_outputs_are_filled(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = torch.zeros(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    def poisoned_like(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(cuda.torch, "empty", poisoned)
    monkeypatch.setattr(cuda.torch, "empty_like", poisoned_like)
    for case in (GRIDS["last_window_closer"], SITUATIONS["features_larger_than_image"]):
        close(replace(case, D=20, C=5), torch.float32)


@pytest.mark.parametrize("loss", [False, True])
def test_a_batch_in_parts(kernels: Any, monkeypatch: pytest.MonkeyPatch, loss: bool) -> None:
    """The workspace holds one episode, or all three."""
    case = replace(GRIDS["aligned"], B=3, K=2, Q=2, D=32)
    support, masks, query, _ = case.draw(torch.float32)
    support.requires_grad_()
    query.requires_grad_()
    head = LocalPrototypeHead(case.grid, backend="cuda")
    labels = masks[:, :1].float().argmax(2).expand(-1, 2, -1, -1).contiguous()
    results, launches = [], []
    for workspace in (cuda.WORKSPACE, 1):
        monkeypatch.setattr(cuda, "WORKSPACE", workspace)
        before = len(machine.LAUNCHES)
        if loss:
            out = head.loss(support, masks[:, :, 1:], query, labels)
        else:
            out = head(support, masks[:, :, 1:], query)
        results.append((out, *torch.autograd.grad(out.square().sum(), (support, query))))
        launches.append(len(machine.LAUNCHES) - before)
    assert launches == [9, 1 + 3 * 2 + 1 + 3 * 3 + 3 * 2]
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-6 * a.norm()


def test_prototypes_at_any_address(kernels: Any) -> None:
    grid, size = GridSpec(1 / 4), (40, 44)
    features = torch.randn(1, 1, 32, 6, 7)
    memory = torch.randn(2 * 64 * 32 + 1)
    windows = grid.shape(*size)
    for off in (0, 1):
        prototypes = memory[off : off + 2 * windows[0] * windows[1] * 32]
        prototypes = prototypes.view(1, 2, *windows, 32)
        scores, winners, gram = cuda.cosine_match(features, prototypes, grid, size, "max", True)
        expected = cosine_match(features, prototypes, grid, size, backend="reference")
        torch.testing.assert_close(scores, expected, rtol=2e-6, atol=2e-6)
        cuda.cosine_match_backward(scores, features, prototypes, scores, winners, grid, "max", gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(kernels: Any, dtype: torch.dtype) -> None:
    grid = GridSpec(1 / 4)
    masks = torch.rand(2, 2, 2, 40, 44) < 0.5
    prototypes = torch.randn(2, 2, *grid.shape(40, 44), 16)
    whole = torch.randn(2, 3, 20, 8, 9).to(dtype)
    views = {
        "offset by an element": whole[:, 1:, 3:19, 1:, 1:],
        "every other": torch.randn(4, 4, 32, 14, 16).to(dtype)[::2, ::2, ::2, ::2, ::2],
        "turned": torch.randn(16, 8, 7, 2, 2).to(dtype).permute(3, 4, 0, 2, 1),
        "repeated": torch.randn(1, 1, 16, 7, 8).to(dtype).expand(2, 2, -1, -1, -1),
        "channels last, offset": torch.randn(2, 2, 7, 8, 20).to(dtype).movedim(-1, 2)[:, :, 2:18],
    }
    for name, view in views.items():
        view = view[:, :, :, :7, :8]
        dense = view.contiguous()
        pooled, factor, *_ = cuda.masked_average_pool(view, masks, 2, grid, 0.0)
        expected, *_ = cuda.masked_average_pool(dense, masks, 2, grid, 0.0)
        assert torch.equal(pooled, expected), name
        scores, winners, gram = cuda.cosine_match(view, prototypes, grid, (40, 44), "max", True)
        again, *_ = cuda.cosine_match(dense, prototypes, grid, (40, 44), "max", True)
        assert torch.equal(scores, again), name
        arguments = prototypes, scores, winners, grid, "max", gram
        grads = cuda.cosine_match_backward(scores, view, *arguments)
        others = cuda.cosine_match_backward(scores, dense, *arguments)
        for a, b in zip(grads, others, strict=True):
            assert torch.equal(a, b), name
        support = cuda.masked_average_pool_backward(pooled, masks, 2, factor, view, grid)
        other = cuda.masked_average_pool_backward(pooled, masks, 2, factor, dense, grid)
        assert torch.equal(support, other), name


@pytest.mark.parametrize("logit_scale", [20.0, -3.0])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_scores_times_a_logit_scale(kernels: Any, reduce: str, logit_scale: float) -> None:
    grid, size = GridSpec(1 / 4), (40, 44)
    query = torch.randn(1, 2, 16, 6, 7, requires_grad=True)
    prototypes = torch.randn(1, 2, *grid.shape(*size), 16, requires_grad=True)
    weight = torch.randn(1, 2, 2, *size, dtype=torch.float64)
    results = {}
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        inputs = query.to(dtype), prototypes.to(dtype)
        scores = cosine_match(*inputs, grid, size, reduce, backend, logit_scale)
        grads = torch.autograd.grad((scores * weight.to(dtype)).sum(), inputs)
        results[backend] = dict(
            zip(("scores", "query", "prototypes"), (scores.detach(), *grads), strict=True)
        )
    assert_near(results["cuda"], results["reference"], 1e-5)


def test_equal_scores_go_to_the_lowest_window(kernels: Any) -> None:
    grid = GridSpec(1 / 4)
    features = torch.rand(1, 1, 16, 5, 5)
    prototypes = torch.rand(16).expand(1, 2, *grid.shape(32, 32), 16).contiguous()
    _, winners, _ = cuda.cosine_match(features, prototypes, grid, (32, 32), "max", True)
    assert winners.eq(0).all()


def test_what_is_not_finite_stays_where_it_is(kernels: Any) -> None:
    grid = GridSpec(1 / 4)
    features = torch.rand(1, 1, 16, 9, 9)
    features[0, 0, 3, 4, 4] = float("nan")
    prototypes = torch.rand(1, 2, *grid.shape(64, 64), 16)
    scores, _, _ = cuda.cosine_match(features, prototypes, grid, (64, 64), "max", True)
    up = F.interpolate(features[0], (64, 64), mode="bilinear")[0].isnan().any(0)
    assert torch.equal(scores[0, 0].isnan(), up.expand(2, -1, -1))
    masks = torch.rand(1, 1, 2, 64, 64) < 0.5
    pooled, expected = (
        masked_average_pool(features, masks, grid, backend=name) for name in ("cuda", "reference")
    )
    assert expected.isnan().any()
    assert torch.equal(pooled.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("dtype", "reduce"),
    [(torch.float32, "max"), (torch.float32, "mean"), (torch.bfloat16, "max")],
    ids=str,
)
@pytest.mark.parametrize("where", SPOILT)
def test_not_finite_gradients_are_those_of_the_equations(
    kernels: Any, where: str, dtype: torch.dtype, reduce: str
) -> None:
    """However many locations and windows a product takes at once; and the rest is right."""
    case = NotFinite(where, dtype, reduce)
    for value in (torch.nan, torch.inf):
        case.spoil(value)
        expected = case.results("reference", torch.float64)
        found = case.results("cuda")
        for name, wanted in expected.items():
            good = wanted.isfinite()
            assert torch.equal(found[name].isfinite(), good), name
            error = (found[name] - wanted)[good].norm() / wanted[good].norm()
            assert error < (1e-5 if dtype == torch.float32 else 5e-3), name


@pytest.mark.parametrize(
    ("h", "w", "H", "W"), [(5, 7, 15, 21), (13, 11, 13, 11), (9, 9, 9, 40), (9, 12, 4, 5)]
)
def test_what_is_not_finite_and_lies_under_no_pixel_does_not_show(
    kernels: Any, h: int, w: int, H: int, W: int
) -> None:
    """Pixels on a location, whose next one has no weight, and features larger than the image."""
    grid = GridSpec(1 / 3)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 16, h, w, generator=generator)
    features[0, 0, 3, h // 2, w // 2] = torch.nan
    masks = torch.rand(1, 1, 2, H, W, generator=generator) < 0.5
    grads = torch.randn(1, 2, *grid.shape(H, W), 16, generator=generator)

    def finite(backend: str, dtype: torch.dtype) -> list[Tensor]:
        x, prototypes = (t.to(dtype).requires_grad_() for t in (features, grads))
        pooled = masked_average_pool(x, masks, grid, 0, backend=backend)
        scores = cosine_match(x, prototypes, grid, (H, W), backend=backend)
        return [
            t.isfinite()
            for t in (
                pooled, scores, *torch.autograd.grad(pooled, x, grads.to(dtype)),
                *torch.autograd.grad(scores, (x, prototypes), torch.ones_like(scores)),
            )
        ]  # fmt: skip

    for got, wanted in zip(
        finite("cuda", torch.float32), finite("reference", torch.float64), strict=True
    ):
        assert (got | ~wanted).all()


def test_weights_that_cancel_within_a_tile_have_a_gradient(kernels: Any) -> None:
    """Soft masks of both signs, whose sum over the first tile is 0."""
    masks = torch.rand(1, 1, 1, 64, 64)
    masks[..., :16, :16] = torch.eye(2).mul(2).sub(1).repeat(8, 8)
    features = torch.randn(1, 1, 32, 9, 9)

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        inputs = features.to(dtype).requires_grad_()
        pooled = masked_average_pool(inputs, masks.to(dtype), GridSpec(1 / 2), backend=backend)
        return torch.autograd.grad(pooled.square().sum(), inputs)[0]

    expected = gradient("reference", torch.float64)
    assert expected[..., 0, 0].abs().max() > 1e-4
    torch.testing.assert_close(
        gradient("cuda", torch.float32).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_a_mask_that_is_not_finite_spoils_nothing(kernels: Any) -> None:
    """Windows with it have a zero prototype and no gradient, as those with too few pixels."""
    masks = torch.rand(1, 1, 2, 64, 64)
    masks[0, 0, 1, 20, 33] = torch.nan
    features = torch.randn(1, 1, 32, 9, 9, requires_grad=True)
    pooled = masked_average_pool(features, masks, GridSpec(1 / 4), backend="cuda")
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    assert gradient.isfinite().all()
    masks[0, 0, 1, 20, 33] = 0.5
    without = masked_average_pool(features, masks, GridSpec(1 / 4), backend="cuda")
    spoilt = (pooled - without).abs().amax(-1)[0] > 1e-4
    assert spoilt[1].sum() == 4
    assert not spoilt[0].any()
    assert not pooled[0, spoilt].any()


def test_opcheck(kernels: Any) -> None:
    masks = torch.rand(1, 2, 2, 24, 20) < 0.5
    features = torch.randn(1, 2, 8, 6, 5, requires_grad=True)
    pooled = torch.ops.lslpn_kernels.masked_average_pool.default
    torch.library.opcheck(pooled, (features, masks, 2, 1 / 4, 1 / 2, 0.0, "cuda"))
    prototypes = torch.randn(1, 2, *GridSpec(1 / 4).shape(24, 20), 8, requires_grad=True)
    match = torch.ops.lslpn_kernels.cosine_match.default
    size = (24, 20)
    torch.library.opcheck(
        match, (features, prototypes, 1 / 4, 1 / 2, *size, "max", True, 1.0, "cuda")
    )


def test_bindings_refuse_what_does_not_fit(kernels: Any) -> None:
    """Whatever is passed to the bindings, nothing is read or written out of bounds."""
    axis = (24, 6, 6, 3, 7)
    good = {
        "features": torch.randn(1, 1, 32, 6, 6),
        "masks": torch.ones(1, 1, 2, 24, 24, dtype=torch.bool),
        "C": 2,
        "prototypes": torch.empty(1, 2, 7, 7, 32),
        "factor": torch.empty(1, 1, 2, 7, 7),
    }

    def call(
        y: Any = axis, x: Any = axis, allocate: Any = None, kept: Any = None, **changed: Any
    ) -> None:
        tensors = {**good, **changed}
        cuda._call(
            "cuda_masked_average_pool",
            torch.device("cpu"),
            *(cuda.to_dlpack(t) if isinstance(t, Tensor) else t for t in tensors.values()),
            y,
            x,
            0.0,
            0,
            1,
            allocate or cuda._allocator(torch.device("cpu"), []),
            cuda._capsule(kept),
        )

    call()
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"features": torch.randn(1, 1, 32, 6, 5)}),
        (ValueError, {"features": torch.randn(1, 32, 6, 6)}),
        (ValueError, {"features": torch.randn(1, 0, 32, 6, 6)}),
        (TypeError, {"features": torch.ones(1, 1, 32, 6, 6, dtype=torch.int32)}),
        (TypeError, {"features": torch.ones(1, 1, 32, 6, 6, dtype=torch.complex64)}),
        (TypeError, {"features": None}),
        (ValueError, {"masks": torch.ones(1, 1, 2, 24, 23, dtype=torch.bool)}),
        (ValueError, {"masks": torch.ones(1, 1, 2, 24, 48, dtype=torch.bool)[..., ::2]}),
        (TypeError, {"masks": torch.ones(1, 1, 2, 24, 24, dtype=torch.float64)}),
        (ValueError, {"masks": torch.ones(1, 1, 24, 23, dtype=torch.uint8)}),
        (TypeError, {"masks": torch.ones(1, 1, 24, 24, dtype=torch.bool)}),
        (ValueError, {"C": 1}),
        (ValueError, {"C": 0}),
        (ValueError, {"C": 2**62}),
        (ValueError, {"prototypes": torch.empty(1, 2, 7, 7, 31)}),
        (TypeError, {"prototypes": torch.empty(1, 2, 7, 7, 32, dtype=torch.float64)}),
        (ValueError, {"factor": torch.empty(1, 2, 2, 7, 7)}),
        (ValueError, {"y": (24, 6, 6, 3, 8)}),
        (ValueError, {"y": (24, 6, 25, 3, 1)}),
        (ValueError, {"x": (24, 6, 0, 3, 7)}),
        (ValueError, {"x": (1 << 40, 6, 6, 3, 7)}),
        (ValueError, {"allocate": lambda size: cuda.to_dlpack(
            torch.empty(size - 1, dtype=torch.uint8))}),
        (TypeError, {"allocate": lambda size: None}),
        (ValueError, {"kept": torch.empty(1, 64, dtype=torch.uint8)}),
        (ValueError, {"kept": torch.empty(2, 64, dtype=torch.uint8)}),
        (TypeError, {"kept": torch.empty(1, 64)}),
    ]  # fmt: skip
    for expected, change in wrong:
        with pytest.raises(expected):
            call(**change)


def test_bindings_do_not_crash_on_random_arguments(kernels: Any) -> None:
    """Random arguments raise, or run; they never crash."""
    generator = np.random.default_rng(0)
    dtypes = [torch.float32, torch.float16, torch.uint8, torch.bool, torch.int32, torch.float64]

    def tensor() -> Any:
        if generator.random() < 0.1:
            return None
        shape = generator.integers(0, 4, generator.integers(0, 6)).tolist()
        dtype = dtypes[generator.integers(len(dtypes))]
        return cuda.to_dlpack(torch.zeros(shape, dtype=dtype))

    def axis() -> tuple[int, ...]:
        return tuple(int(n) for n in generator.integers(-1, 4, 5))

    refused = 0
    for _ in range(500):
        allocate = cuda._allocator(torch.device("cpu"), [])
        try:
            cuda._call(
                "cuda_cosine_match", torch.device("cpu"), *(tensor() for _ in range(5)),
                axis(), axis(), int(generator.integers(-1, 3)), bool(generator.integers(2)), 1.0, 0,
                1, allocate, tensor(), (tensor(), tensor(), 255) if generator.integers(2) else None,
                tuple(tensor() for _ in range(4)) if generator.integers(2) else None,
            )  # fmt: skip
        except (TypeError, ValueError):
            refused += 1
    assert refused == 500  # hardly any random call fits together


def test_a_driver_that_refuses_the_kernels_sends_auto_to_the_next_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a driver older than the kernels; each GPU is asked separately."""
    module = SimpleNamespace(
        with_cuda=True,
        cuda_archs="80;90",
        cuda_probe=lambda: "the provided PTX was compiled with an unsupported toolchain.",
    )
    monkeypatch.setattr(native, "module", lambda: (module, ""))
    monkeypatch.setattr(cuda, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    hooks.forget()
    try:
        device = torch.device("cpu")
        reason = cuda.unavailable(device)
        assert reason is not None
        for part in ("Tesla T4", "sm_75", "sm_80, sm_90", "unsupported toolchain", '"75"'):
            assert part in reason
        assert "\n" not in reason
        assert choose("auto", device, torch.float32, GridSpec(), "max") in ("cpu", "torch")
        with pytest.raises(RuntimeError, match="Tesla T4"):
            choose("cuda", device, torch.float32, GridSpec(), "max")
    finally:
        hooks.forget()


def test_auto_leaves_to_others_what_the_kernels_do_not_take(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(grid: GridSpec, reduce: str) -> str:
        return choose("auto", torch.device("cpu"), torch.float32, grid, reduce)

    assert chosen(GridSpec(), "max") == "cuda"
    assert chosen(GridSpec(), "mean") == "cuda"
    for grid in (GridSpec(1 / 8, 1 / 5), GridSpec(1 / 100)):
        assert chosen(grid, "max") in ("cpu", "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_why() -> None:
    status = backends()["cuda"]
    assert not status.usable
    assert status.reason
    assert "\n" not in status.reason
    with pytest.raises(RuntimeError, match='backend="cuda" runs on cuda tensors'):
        masked_average_pool(
            torch.rand(1, 1, 2, 3, 3), torch.ones(1, 1, 1, 6, 6), GridSpec(), backend="cuda"
        )


# ---- what nvcc makes of it ----

# Registers a thread; three blocks of 128 threads leave so many. None may spill.
REGISTERS = 168
# Two blocks: where more than four windows lie over a pixel, and where a thread has the sums of all
# rows of a block of locations.
REGISTERS_OF_TWO = 255


@dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int


def assemble(ptx: str, arch: str, folder: Path) -> list[Usage]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        Path(own, "kernels.ptx").write_text(ptx)
        done = subprocess.run(
            ["ptxas", "-v", f"-arch=sm_{arch}", "kernels.ptx", "-o", "kernels.cubin"],
            cwd=own, check=False, capture_output=True, text=True,
        )  # fmt: skip
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-4000:]
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        told,
        re.DOTALL,
    )
    return [Usage(k, a, int(r), int(s), int(x) + int(y)) for k, a, s, x, y, r in found]


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas")
def test_registers(module: Any, tmp_path: Path) -> None:
    """No spill, no register array that went to memory, on any architecture."""
    work = [(ptx, str(arch)) for arch, modules in module.ptx.items() for ptx in modules]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda task: assemble(*task, tmp_path), work)
        usages = [usage for found in made for usage in found]
    for name in ("mask_weights", "scores", "match_weights", "match_backward", "pool_backward"):
        for arch in ("80", "90", "100"):
            assert any(name in u.kernel and u.arch == arch for u in usages), (name, arch)
    for usage in usages:
        assert usage.spills == 0, usage
        assert usage.stack == 0, usage
        two = re.search(r"scores.*Li16E|14match_backwardI|13pool_backwardI", usage.kernel)
        most = REGISTERS_OF_TWO if two else REGISTERS
        assert usage.registers <= most, usage
