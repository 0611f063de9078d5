"""The GPU backends on a GPU. Needs torch, pytest and lslpn_kernels, no more:

    python -m pytest --noconftest -m gpu tests/kernels/test_gpu.py

Where there is no GPU, the bodies that need none are rehearsed with the cpu backend on small inputs,
so that mistakes in them are found without one.

Triton compiles for some ten seconds a case. It runs a dozen, which together cover every branch of
its kernels; with LSLPN_EVERY_CASE=1 all cases of the cuda backend. Through `triton_launches` these
are compiled without a GPU, see `benchmarks.compile_ahead`.

The truth is the oracle in float64 on the CPU for small cases, and on the GPU the `torch` backend
in float64 (which the tests on the CPU compare with the oracle to 1e-9) for large ones.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SITUATIONS, Case, assert_near, run
from test_loss import close, drawn, expected, results
from torch import Tensor, nn

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    backends,
    cosine_match,
    masked_average_pool,
)
from lslpn_kernels.reference import accumulation_dtype

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="PyTorch finds no NVIDIA GPU"),
)
on_gpu = [pytest.param(name, marks=NEEDS_GPU) for name in ("triton", "cuda")]
rehearsed = pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="there is a GPU"))

PAPER = GridSpec(1 / 8, 1 / 2)
HALF = (torch.float16, torch.bfloat16)


def assert_right(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
    few: bool = False,
) -> None:
    """Length of the difference over that of the truth, on the same (rounded) inputs.

    Sums in float32 have errors of 1e-7 or so, and 5e-7 over a thousand channels: 2e-6. Half types
    are multiplied as they are, by float32 numbers in two halves. Two of 8 bits leave 2^-17 of each
    product, 4e-6 as a mean square: 2e-5, where a lost second half would make 1e-3. (What is stored
    in a half type is rounded besides, see `assert_near`.)

    The gradient goes to the window that wins. The cosines of two windows lie within e of each other
    in some 20 e of all pixels, where rounding decides; with e = 4e-6 that many gradients change
    entirely, which is sqrt(20 e), 1e-2 of all. With `few` pixels there are none of these."""
    tolerance = 2e-6 if dtype == torch.float32 else 2e-5
    smooth = {name: expected[name] for name in ("prototypes", "grad_support", "scores")}
    assert_near(found, smooth, tolerance)
    assert_near(found, expected, tolerance if few else 1e-2)


def usable(name: str) -> str:
    """The backend, or a skip that says why not; LSLPN_REQUIRE names those that must be there."""
    status = backends()[name]
    if not status.usable and name in os.environ.get("LSLPN_REQUIRE", "").split(","):
        pytest.fail(f"{name}: {status.reason}")
    if not status.usable:
        pytest.skip(f"{name}: {status.reason}")
    return name


@pytest.fixture(params=on_gpu)
def backend(request: pytest.FixtureRequest) -> str:
    """For what only a GPU can tell."""
    return usable(request.param)


@pytest.fixture(params=[*on_gpu, rehearsed])
def any_backend(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()


def paper(B: int = 1, K: int = 1, Q: int = 1, channels_last: bool = False) -> Case:
    """Of the paper's size."""
    return Case(
        B=B, K=K, Q=Q, D=256, h=65, w=65, H=512, W=512, grid=PAPER, channels_last=channels_last
    )


def fitting(case: Case) -> Case:
    """Smaller in the rehearsal."""
    return case if GPU else replace(case, D=16, h=9, w=9, H=64, W=64)


# Results and gradients

PAPERS = {
    "contiguous": paper(B=2, K=2, Q=2),
    "channels_last": paper(B=2, K=2, Q=2, channels_last=True),
}
OTHERS = {
    "six_classes": Case(B=2, C=6, D=256, h=33, w=33, H=257, W=257, grid=PAPER),
    "same_size": Case(B=2, C=3, D=64, h=64, w=64, H=64, W=64, grid=PAPER),
    "one_window": Case(D=256, h=65, w=65, H=512, W=512, grid=GridSpec(1.0)),
    "many_windows": Case(
        D=128, h=32, w=48, H=256, W=384, grid=GridSpec(1 / 16, 1 / 2), channels_last=True
    ),
    "mean": Case(D=100, h=40, w=30, H=200, W=310, grid=GridSpec(1 / 4, 1 / 3), reduce="mean"),
    "many_channels": Case(D=1030, h=17, w=19, H=130, W=150, grid=PAPER),
    "many_episodes": Case(B=40, D=32, h=17, w=16, H=128, W=128, grid=PAPER),
    "many_shots": Case(K=30, Q=30, D=32, h=17, w=16, H=128, W=128, grid=GridSpec(1 / 2, 1.0)),
    "larger_than_image": Case(D=48, h=90, w=70, H=60, W=50, grid=GridSpec(1 / 5, 1 / 2)),
}
# Each for branches that no case before it meets.
TRITON_CASES = (
    (PAPERS["contiguous"], torch.float32),
    (PAPERS["channels_last"], torch.bfloat16),
    (PAPERS["contiguous"], torch.float16),
    (OTHERS["one_window"], torch.float32),  # one place and one window: the longest sums
    (OTHERS["many_channels"], torch.float32),  # channels in more than one part, the last incomplete
    (OTHERS["many_episodes"], torch.float32),  # larger groups of windows, runs of blocks
    (OTHERS["many_shots"], torch.float32),  # sums over shots and queries in parts
    (SITUATIONS["features_as_large_as_image"], torch.float32),  # no pixel between locations
    (SITUATIONS["features_larger_than_image"], torch.float32),  # locations that no pixel uses
    (SITUATIONS["many_windows_over_a_pixel"], torch.float32),  # winners of 32 bits
    (SITUATIONS["part_of_a_larger_tensor"], torch.bfloat16),  # odd addresses and strides
    (SITUATIONS["soft_masks"], torch.float32),
    (SITUATIONS["few_pixels_are_none"], torch.float32),  # masks of numbers
    (SITUATIONS["mean_over_windows"], torch.bfloat16),
    (SITUATIONS["many_channels_and_classes"], torch.float16),
)
EVERY_CASE = os.environ.get("LSLPN_EVERY_CASE", "0") != "0"


def compare(
    case: Case, dtype: torch.dtype, backend: str, truth: str = "torch", few: bool = False
) -> None:
    """A case with a backend against the truth, by the oracle on the CPU or by `torch`."""
    if backend == "triton" and not EVERY_CASE and (case, dtype) not in TRITON_CASES:
        pytest.skip("compiles for long in Triton; LSLPN_EVERY_CASE=1 runs it")
    if truth == "torch":
        expected = run(case, "torch", torch.float64, DEVICE, rounded=dtype)
    else:
        expected = run(case, "reference", rounded=dtype)
    assert_right(run(case, backend, dtype, DEVICE), expected, dtype, few)


def triton_launches() -> Iterator[Callable[[], object]]:
    """All that the tests of the triton backend launch and that takes long to compile."""
    for case, dtype in TRITON_CASES:
        yield partial(run, case, "triton", dtype)
    yield partial(run, BITS, "triton", torch.float32)
    for channels_last in (False, True):
        yield lambda channels_last=channels_last: _training_step("triton", channels_last)[0]()
    yield lambda: _gradients(_head("triton"), *_episode())
    small: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = (
        (test_nan_stays_where_it_is, (12, 6)),
        (test_label_map, (torch.uint8, torch.int64)),
        (test_derived_background, ("bool", "uint8", "soft")),
        (test_autocast, HALF),
        (test_loss, tuple(LOSSES)),
    )
    for test, values in small:
        for value in values:
            yield partial(_launched, test, "triton", value)
    yield partial(test_dtype_of_the_results, "triton")


def _launched(test: Callable[..., None], *arguments: Any) -> None:
    """A test of results that nobody has written."""
    with contextlib.suppress(AssertionError):
        test(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", PAPERS)
def test_paper_size(any_backend: str, layout: str, dtype: torch.dtype) -> None:
    compare(fitting(PAPERS[layout]), dtype, any_backend)


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_situation(any_backend: str, dtype: torch.dtype, name: str) -> None:
    compare(SITUATIONS[name], dtype, any_backend, truth="reference", few=True)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_sizes(any_backend: str, dtype: torch.dtype, name: str) -> None:
    compare(OTHERS[name], dtype, any_backend)


def _drawn(seed: int) -> tuple[Case, torch.dtype]:
    choose = random.Random(seed)

    def up_to(n: int) -> int:
        return choose.randint(1, n)

    # Of fewer channels |u| may cancel to nearly nothing, and with it single precision.
    case = Case(
        B=up_to(3), K=up_to(3), Q=up_to(3), C=up_to(5), D=choose.choice([16, 17, 64, 70, 130]),
        h=up_to(40), w=up_to(40), H=up_to(120), W=up_to(120),
        grid=GridSpec(
            choose.choice([1 / 16, 1 / 8, 1 / 5, 1 / 3, 1 / 2, 0.77, 1.0]),
            choose.choice([1 / 3, 1 / 2, 0.8, 1.0]),
        ),
        min_pixels=choose.choice([0, 1, 10]),
        reduce=choose.choice(["max", "max", "mean"]),
        kind=choose.choice(["signed", "positive", "with_zeros"]),
        channels_last=choose.random() < 0.4,
        strided=choose.random() < 0.3,
        mask_kind=choose.choice(["bool", "uint8", "soft"]),
        seed=seed,
    )  # fmt: skip
    return case, choose.choice([torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize("seed", range(24))
def test_drawn_at_random(any_backend: str, seed: int) -> None:
    compare(*_drawn(seed), any_backend)


LOSSES = {
    "two_classes": Case(D=16, h=9, w=9, H=64, W=64, grid=PAPER, kind="positive"),
    "five_classes": Case(C=5, D=16, B=2, Q=2),
    "mean_over_windows": Case(C=3, D=16, reduce="mean"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(any_backend: str, name: str) -> None:
    """The cross-entropy inside the matching, as F.cross_entropy has it."""
    inputs = drawn(LOSSES[name], torch.float32)
    query, prototypes, labels, weight = (t.detach().to(DEVICE) for t in inputs)
    leaves = query.requires_grad_(), prototypes.requires_grad_()
    found = results(LOSSES[name], any_backend, (*leaves, labels, weight))
    close([t.cpu() for t in found], expected(LOSSES[name], inputs), 2e-6)


def test_float64(any_backend: str) -> None:
    """The cuda backend has it; in place of triton "auto" takes another one."""
    case = SITUATIONS["two_shots_three_queries_two_episodes"]
    if any_backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            run(case, any_backend, torch.float64, DEVICE)
        any_backend = "auto"
    found = run(case, any_backend, torch.float64, DEVICE)
    assert_near(found, run(case, "reference"), 1e-11)


@pytest.mark.parametrize("pixels", [12, 6], ids=["interpolated", "same_size"])
def test_nan_stays_where_it_is(any_backend: str, pixels: int) -> None:
    """In the pixels that are interpolated from it: of features as large as the image, in one."""
    case = Case(h=6, w=6, H=pixels, W=pixels, grid=GridSpec(1 / 2, 1 / 2))
    support, masks, query, _ = (t.to(DEVICE) for t in case.draw(torch.float32))
    query[..., 3, 2] = math.nan
    prototypes = masked_average_pool(support, masks, case.grid, backend=any_backend)

    def not_numbers(backend: str) -> Tensor:
        return cosine_match(query, prototypes, case.grid, (pixels, pixels), backend=backend).isnan()

    found = not_numbers(any_backend)
    assert torch.equal(found, not_numbers("reference"))
    if pixels == 6:
        assert found[0, 0, 0].nonzero().tolist() == [[3, 2]]
    prototypes[:, :, 1, 1] = math.nan
    assert torch.equal(not_numbers(any_backend), not_numbers("reference"))


def _as_the_oracle(head: LocalPrototypeHead, *inputs: Tensor, **classes: int) -> None:
    """Logits and gradients of a head against the equations in float64, of inputs on the CPU whose
    masks are given as a user gives them."""
    oracle = LocalPrototypeHead(head.grid, reduce=head.reduce, backend="reference")
    found = []
    for used, device, dtype in ((head, DEVICE, torch.float32), (oracle, "cpu", torch.float64)):
        support, masks, query = (t.detach().to(device) for t in inputs)
        support, query = (t.to(dtype).requires_grad_() for t in (support, query))
        found.append(_gradients(partial(used, **classes), support, masks, query))
    for actual, wanted in zip(*found, strict=True):
        error = (actual.double().cpu() - wanted).norm() / wanted.norm()
        assert error < 2e-6  # see `assert_right`; of so few pixels none is undecided


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_label_map(any_backend: str, dtype: torch.dtype) -> None:
    """255, and other numbers without a class, belong to none."""
    support, masks, query, _ = Case(C=3, K=2, Q=2, D=16).draw(torch.float32)
    labels = masks.to(torch.uint8).argmax(2).to(dtype)
    labels[..., :4, :7] = 255
    labels[..., -3:, :] = 3
    head = LocalPrototypeHead(GridSpec(1 / 3, 1 / 2), backend=any_backend)
    _as_the_oracle(head, support, labels, query, num_classes=3)


@pytest.mark.parametrize("kind", ["bool", "uint8", "soft"])
def test_derived_background(any_backend: str, kind: str) -> None:
    support, masks, query, _ = Case(C=3, K=2, Q=2, D=16, mask_kind=kind).draw(torch.float32)
    foreground = masks[:, :, 1:] / 2 if kind == "soft" else masks[:, :, 1:]
    head = LocalPrototypeHead(GridSpec(1 / 3, 1 / 2), backend=any_backend)
    _as_the_oracle(head, support, foreground, query)


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=NEEDS_GPU), rehearsed])
def test_mean_over_windows_by_auto(device: str) -> None:
    support, masks, query, _ = Case(C=3, Q=2, D=16).draw(torch.float32)
    head = LocalPrototypeHead(GridSpec(1 / 3, 1 / 2), reduce="mean")
    _as_the_oracle(head, support, masks[:, :, 1:], query)


BITS = paper(B=4, Q=2)


def test_bits_do_not_change(any_backend: str) -> None:
    first, second = (run(fitting(BITS), any_backend, torch.float32, DEVICE) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# What is asked of a kernel beyond its numbers


def _head(backend: str) -> LocalPrototypeHead:
    return LocalPrototypeHead(PAPER, backend=backend)


def _episode(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    B, D, cells, pixels = 2, 32, 17, 128
    generator = torch.Generator(DEVICE).manual_seed(seed)
    support, query = (
        torch.randn(B, 1, D, cells, cells, generator=generator, device=DEVICE) for _ in range(2)
    )
    place = torch.linspace(-1, 1, pixels, device=DEVICE)
    organ = (place[:, None] - 0.2) ** 2 + (place + 0.1) ** 2 < 0.2
    masks = organ.expand(B, 1, 1, -1, -1).contiguous()
    return support.requires_grad_(), masks, query.requires_grad_()


def _gradients(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    out = call(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    leaves = [t for t in inputs if t.requires_grad]
    return (out.detach(), *torch.autograd.grad((out * weight).sum(), leaves))


def _call(backend: str, end: str) -> Callable[..., Tensor]:
    """The head up to its logits, or to a loss."""
    head = _head(backend)
    if end == "logits":
        return head
    return lambda support, masks, query: head.loss(
        support, masks, query, masks[:, :, 0].to(torch.uint8)
    )


def test_opcheck(any_backend: str) -> None:
    case = Case(B=2, C=2, D=8, h=5, w=4, H=20, W=17)
    support, masks, query, _ = (t.to(DEVICE) for t in case.draw(torch.float32))
    settings = (case.grid.scale, case.grid.spacing)
    ops = torch.ops.lslpn_kernels
    pool = (support, masks, 2, *settings, 0.0, any_backend)
    torch.library.opcheck(ops.masked_average_pool.default, pool)
    prototypes, factor = ops.masked_average_pool(*pool)
    torch.library.opcheck(
        ops.masked_average_pool_backward.default,
        (prototypes, masks, 2, factor, support, *settings, any_backend),
    )
    for reduce in ("max", "mean"):
        match = (query, prototypes, *settings, 20, 17, reduce, True, 3.0, any_backend)
        torch.library.opcheck(ops.cosine_match.default, match)
        scores, winners, gram = ops.cosine_match(*match)
        kept = (prototypes, scores, winners, gram, *settings, reduce, 3.0, any_backend)
        for wanted in ((True, True), (False, True)):
            torch.library.opcheck(ops.cosine_match_backward.default, (scores, query, *kept, wanted))


@pytest.mark.parametrize("end", ["logits", "loss"])
def test_compiled_in_one_graph(backend: str, end: str) -> None:
    inputs = _episode()
    expected = _gradients(_call(backend, end), *inputs)
    torch.compiler.reset()
    compiled = torch.compile(_call(backend, end), fullgraph=True)
    for actual, wanted in zip(_gradients(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("end", ["logits", "loss"])
def test_cuda_graph(backend: str, end: str) -> None:
    """Captured once and replayed on other inputs."""
    support, masks, query = (t.detach() for t in _episode())
    support.requires_grad_()
    query.requires_grad_()
    call = _call(backend, end)

    def step() -> tuple[Tensor, ...]:
        return _gradients(call, support, masks, query)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = _episode(seed=1)
    with torch.no_grad():
        support.copy_(other[0])
        query.copy_(other[2])
        masks.copy_(other[1].flip(-1))
    graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(captured, step(), strict=True):
        assert torch.equal(actual, wanted)


def test_stream_of_the_caller(backend: str) -> None:
    """The inputs are written late on a stream of their own; nothing else waits for that."""
    head = _head(backend)
    inputs = _episode()
    late = tuple(t.detach().clone() for t in inputs)
    expected = _gradients(head, *inputs)
    torch.cuda.synchronize()
    with torch.no_grad():
        for tensor in (late[0], late[2]):
            tensor.fill_(1.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for tensor, source in zip(late, inputs, strict=True):
                tensor.copy_(source)
        late[0].requires_grad_()
        late[2].requires_grad_()
        found = _gradients(head, *late)
    stream.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("end", ["logits", "loss"])
def test_nothing_waits_for_the_device(backend: str, end: str) -> None:
    inputs = _episode()
    call = _call(backend, end)
    _gradients(call, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(call, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_device_of_the_tensors(backend: str) -> None:
    inputs = tuple(t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in _episode())
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(
        _gradients(_head(backend), *inputs), _gradients(_head(backend), *_episode()), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), wanted.cpu())


def test_memory_does_not_grow(backend: str) -> None:
    inputs = _episode()
    head = _head(backend)
    for _ in range(3):
        _gradients(head, *inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        _gradients(head, *inputs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def _training_step(backend: str, channels_last: bool) -> tuple[Callable[[], None], int]:
    """And the bytes that it has to hold at once: the logits, the gradients of both features and
    of the prototypes, and the masks, which are a part of a larger tensor here."""
    case = paper(B=16, channels_last=channels_last)
    support, masks, query, grad = (t.to(DEVICE) for t in case.draw(torch.float32))
    support.requires_grad_()
    query.requires_grad_()
    grad = grad.float()
    head = _head(backend)

    def step() -> None:
        logits = head(support, masks[:, :, 1:], query)
        torch.autograd.grad(logits, (support, query), grad)

    windows = math.prod(case.grid.shape(case.H, case.W))
    prototypes = case.B * case.C * windows * case.D
    numbers = grad.numel() + support.numel() + query.numel() + prototypes
    return step, 4 * numbers + masks[:, :, 1:].numel()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_peak_memory(backend: str, channels_last: bool) -> None:
    """Results and gradients, and workspace of a tenth of the features: no copy of these, and
    nothing of the size of D images. What is kept for the backward pass of the matching is gone
    before that of the pooling."""
    step, needed = _training_step(backend, channels_last)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    features = 2 * 16 * 256 * 65**2 * 4
    assert peak < needed + 0.1 * features, f"{(peak - needed) / features:.2f} features"


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Episodes and channels more than 2^31 numbers apart, and 16-bit numbers: 9 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        pytest.skip(f"needs 14 GB of GPU memory, {free >> 30} are free")
    case = Case(B=2, D=32, h=6, w=5, H=22, W=18)
    support, masks, query, _ = (t.to(DEVICE) for t in case.draw(torch.bfloat16))
    memory = torch.empty((1 << 32) + (1 << 20), dtype=torch.bfloat16, device=DEVICE)
    for strides in (
        ((1 << 32), 1 << 16, 30, 5, 1),  # episodes
        (1 << 10, 1 << 9, 1 << 27, 5, 1),  # channels: 32 of them reach 2^32
    ):
        for features in (support, query):
            far = memory.as_strided(features.shape, strides)
            far.copy_(features)
            near = features.float()
            for actual, wanted in (
                (
                    masked_average_pool(far, masks, case.grid, backend=backend),
                    masked_average_pool(near, masks, case.grid, backend="torch"),
                ),
            ):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
            prototypes = masked_average_pool(near, masks, case.grid, backend="torch")
            leaf = far.detach().requires_grad_()
            twin = near.detach().requires_grad_()
            size = (case.H, case.W)
            found = cosine_match(leaf, prototypes, case.grid, size, backend=backend)
            wanted = cosine_match(twin, prototypes, case.grid, size, backend="torch")
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            found.sum().backward()
            wanted.sum().backward()
            assert leaf.grad is not None
            assert twin.grad is not None
            torch.testing.assert_close(leaf.grad.float(), twin.grad, rtol=2e-2, atol=2e-2)


def test_many_images(any_backend: str) -> None:
    """More than 65535 of them, the limit of two of the three axes of a launch."""
    B, D = 70_000 if GPU else 70, 4
    grid, size = GridSpec(1 / 2, 1 / 2), (4, 4)
    query = torch.randn(B, 1, D, 2, 2, device=DEVICE)
    prototypes = torch.randn(B, 1, *grid.shape(*size), D, device=DEVICE)
    found = cosine_match(query, prototypes, grid, size, backend=any_backend)
    wanted = cosine_match(query, prototypes, grid, size, backend="torch")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(any_backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = nn.Conv2d(3, 32, 3, padding=1, stride=8).to(DEVICE)
    images = torch.rand(2, 2, 3, 128, 128, device=DEVICE)
    _, masks, _ = _episode()
    head = _head(any_backend)
    with torch.autocast(DEVICE, dtype):
        features = encoder(images.flatten(0, 1)).unflatten(0, (2, 2))
        assert features.dtype == dtype
        logits = head(features[:, :1], masks, features[:, 1:])
        assert logits.dtype == torch.float32
        loss = F.cross_entropy(logits.flatten(0, 1), masks.flatten(0, 2).long())
    loss.backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.isfinite().all()
    assert encoder.weight.grad.abs().sum() > 0


def test_distributed_data_parallel(any_backend: str, tmp_path: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 32, 3, padding=1, stride=8)
            self.head = _head(any_backend)

        def forward(self, images: Tensor, masks: Tensor) -> Tensor:
            features = self.encoder(images.flatten(0, 1)).unflatten(0, (2, 2))
            return self.head(features[:, :1], masks, features[:, 1:])

    torch.manual_seed(0)
    model = Model().to(DEVICE)
    images = torch.rand(2, 2, 3, 128, 128, device=DEVICE)
    _, masks, _ = _episode()
    model(images, masks).square().mean().backward()
    alone = model.encoder.weight.grad
    assert alone is not None
    model.zero_grad()
    try:
        torch.distributed.init_process_group(
            "nccl" if GPU else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"no process group here: {error}")
    try:
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=[0] if GPU else None)
        parallel(images, masks).square().mean().backward()
        torch.testing.assert_close(model.encoder.weight.grad, alone)
        del parallel  # before the group: see test_distributed in test_backends.py
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="PyTorch finds no NVIDIA GPU")
def test_auto_takes_the_fastest() -> None:
    from lslpn_kernels._backends import choose

    usable = [n for n in ("cuda", "triton") if backends()[n].usable]
    device = torch.device("cuda", 0)
    fastest = [*usable, "torch"][0]
    assert choose("auto", device, torch.float32, GridSpec(), "max") == fastest
    for_mean = "triton" if "triton" in usable else fastest
    assert choose("auto", device, torch.float32, GridSpec(), "mean") == for_mean


def test_wrong_device(backend: str) -> None:
    features = torch.rand(1, 1, 4, 3, 3)
    with pytest.raises(RuntimeError, match="cpu"):
        cosine_match(features, torch.rand(1, 1, 1, 1, 4), GridSpec(1.0), (8, 8), backend=backend)


def test_dtype_of_the_results(any_backend: str) -> None:
    for dtype in (torch.float32, *HALF):
        case = Case(D=8, h=4, w=4, H=16, W=16)
        found = run(case, any_backend, dtype, DEVICE)
        assert found["prototypes"].dtype == found["scores"].dtype == accumulation_dtype(dtype)
        assert found["grad_support"].dtype == found["grad_query"].dtype == dtype
