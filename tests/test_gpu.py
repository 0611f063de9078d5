"""The GPU backends on a GPU. Needs torch, pytest and lslpn_kernels, no more:

    python -m pytest --noconftest -m gpu tests/test_gpu.py

Where there is no GPU, the bodies that need none are rehearsed with the cpu backend on small inputs,
so that a slip in them does not wait for the day when there is one.

The truth is the oracle in float64 on the CPU for small cases, and on the GPU the `torch` backend
in float64 (which the CPU's tests hold to the oracle to 1e-9) for large ones.
"""

from __future__ import annotations

import gc
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SITUATIONS, Case, assert_near, run
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
    backend: str,
    dtype: torch.dtype,
    few: bool = False,
) -> None:
    """Length of the difference over that of the truth, on the same (rounded) inputs. A tenth of a
    millionth part of all pixels have two windows whose scores agree to float32 rounding, and
    either may win; with `few` pixels there are none of these, else the gradients of the matching
    are allowed what they change. The cuda backend rounds prototypes to the half types."""
    tolerance = 2e-6 if dtype == torch.float32 else 2e-5 if backend == "triton" else 1e-2
    smooth = {name: expected[name] for name in ("prototypes", "grad_support", "scores")}
    assert_near(found, smooth, tolerance)
    loose = tolerance if few and dtype == torch.float32 else 10 * tolerance + 1e-2
    assert_near(found, expected, loose)


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


def paper(
    B: int = 1,
    K: int = 1,
    Q: int = 1,
    C: int = 2,
    D: int = 256,
    cells: int = 65,
    pixels: int = 512,
    channels_last: bool = False,
) -> Case:
    """Of the paper's size; smaller in the rehearsal."""
    if not GPU:
        D, cells, pixels = 16, 9, 64
    return Case(
        B=B, K=K, Q=Q, C=C, D=D, h=cells, w=cells, H=pixels, W=pixels, grid=PAPER,
        channels_last=channels_last,
    )  # fmt: skip


def exact(case: Case, rounded: torch.dtype) -> dict[str, Tensor]:
    """The truth, computed on the GPU."""
    return run(case, "torch", torch.float64, DEVICE, rounded)


# Results and gradients


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_situation(any_backend: str, dtype: torch.dtype, name: str) -> None:
    expected = run(SITUATIONS[name], "reference", rounded=dtype)
    found = run(SITUATIONS[name], any_backend, dtype, DEVICE)
    assert_right(found, expected, any_backend, dtype, few=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_paper_size(any_backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    case = paper(B=2, K=2, Q=2, channels_last=channels_last)
    assert_right(run(case, any_backend, dtype, DEVICE), exact(case, dtype), any_backend, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, C=6, D=256, h=33, w=33, H=257, W=257, grid=PAPER),
        Case(B=2, C=3, D=64, h=64, w=64, H=64, W=64, grid=PAPER),
        Case(D=256, h=65, w=65, H=512, W=512, grid=GridSpec(1.0)),
        Case(D=128, h=32, w=48, H=256, W=384, grid=GridSpec(1 / 16, 1 / 2), channels_last=True),
        Case(D=100, h=40, w=30, H=200, W=310, grid=GridSpec(1 / 4, 1 / 3), reduce="mean"),
        Case(D=1030, h=17, w=19, H=130, W=150, grid=PAPER),
        Case(B=40, D=32, h=17, w=16, H=128, W=128, grid=PAPER),
        Case(K=30, Q=30, D=32, h=17, w=16, H=128, W=128, grid=GridSpec(1 / 2, 1.0)),
        Case(D=48, h=90, w=70, H=60, W=50, grid=GridSpec(1 / 5, 1 / 2)),
    ],
    ids=lambda case: f"{case.B}x{case.D}x{case.h}x{case.w}-{case.H}x{case.W}-{case.reduce}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_sizes(any_backend: str, dtype: torch.dtype, case: Case) -> None:
    assert_right(run(case, any_backend, dtype, DEVICE), exact(case, dtype), any_backend, dtype)


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
    case, dtype = _drawn(seed)
    assert_right(run(case, any_backend, dtype, DEVICE), exact(case, dtype), any_backend, dtype)


def test_float64(any_backend: str) -> None:
    """The cuda backend has it; in place of triton "auto" takes another one."""
    case = SITUATIONS["two_shots_three_queries_two_episodes"]
    if any_backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            run(case, any_backend, torch.float64, DEVICE)
        any_backend = "auto"
    found = run(case, any_backend, torch.float64, DEVICE)
    assert_near(found, run(case, "reference"), 1e-11)


def test_nan_stays_where_it_is(any_backend: str) -> None:
    case = Case(h=6, w=6, H=12, W=12, grid=GridSpec(1 / 2, 1 / 2))
    support, masks, query, _ = (t.to(DEVICE) for t in case.draw(torch.float32))
    query[..., 0, 0] = math.nan
    prototypes = masked_average_pool(support, masks, case.grid, backend=any_backend)
    prototypes[:, :, 1, 1] = math.nan
    found = cosine_match(query, prototypes, case.grid, (12, 12), backend=any_backend)
    wanted = cosine_match(query, prototypes, case.grid, (12, 12), backend="reference")
    assert torch.equal(found.isnan(), wanted.isnan())


def test_bits_do_not_change(any_backend: str) -> None:
    case = paper(B=4, Q=2)
    first, second = (run(case, any_backend, torch.float32, DEVICE) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# What is asked of a kernel beyond its numbers


def _head(backend: str) -> LocalPrototypeHead:
    return LocalPrototypeHead(PAPER, backend=backend)


def _episode(
    B: int = 2, D: int = 32, cells: int = 17, pixels: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
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


def test_compiled_in_one_graph(backend: str) -> None:
    inputs = _episode()
    expected = _gradients(_head(backend), *inputs)
    torch.compiler.reset()
    compiled = torch.compile(_head(backend), fullgraph=True)
    for actual, wanted in zip(_gradients(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_cuda_graph(backend: str) -> None:
    """Captured once and replayed on other inputs."""
    support, masks, query = (t.detach() for t in _episode())
    support.requires_grad_()
    query.requires_grad_()
    head = _head(backend)

    def step() -> tuple[Tensor, ...]:
        return _gradients(head, support, masks, query)

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


def test_nothing_waits_for_the_device(backend: str) -> None:
    inputs = _episode()
    head = _head(backend)
    _gradients(head, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(head, *inputs)
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


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_peak_memory(backend: str, channels_last: bool) -> None:
    """Results and gradients, and workspace of a part of the features: no copy of these, and
    nothing of the size of D images."""
    case = paper(B=16, channels_last=channels_last)
    support, masks, query, grad = (t.to(DEVICE) for t in case.draw(torch.float32))
    support.requires_grad_()
    query.requires_grad_()
    head = _head(backend)

    def step() -> None:
        logits = head(support, masks[:, :, 1:], query)
        torch.autograd.grad(logits, (support, query), grad.to(logits.dtype))

    grad = grad.float()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    features = support.numel() * 4
    results = 2 * features + 2 * grad.numel() * 4 + masks.numel()
    assert peak < results + grad.numel() * 4 + 0.6 * features, f"{peak / features:.2f} features"


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Episodes and channels more than 2^31 numbers apart, and 16-bit numbers: 9 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        pytest.skip(f"needs 14 GB of GPU memory, {free >> 30} are free")
    case = Case(B=2, D=5, h=6, w=5, H=22, W=18)
    support, masks, query, _ = (t.to(DEVICE) for t in case.draw(torch.bfloat16))
    memory = torch.empty((1 << 32) + (1 << 20), dtype=torch.bfloat16, device=DEVICE)
    for strides in (
        ((1 << 32), 1 << 16, 30, 5, 1),  # episodes
        (1 << 10, 1 << 9, 1 << 30, 5, 1),  # channels: 5 of them reach 2^32
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
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="PyTorch finds no NVIDIA GPU")
def test_auto_takes_the_fastest() -> None:
    from lslpn_kernels._backends import choose

    wanted = next((n for n in ("cuda", "triton") if backends()[n].usable), "torch")
    assert choose("auto", torch.device("cuda", 0), torch.float32, GridSpec(), "max") == wanted


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
