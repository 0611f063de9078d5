"""The CPU kernels against the oracle: every instruction set, thread count, dtype and layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import SITUATIONS, Case, assert_agree, assert_near, run, shortest
from strategies import assume, cases, given, settings
from torch import Tensor

from lslpn_kernels import GridSpec, LocalPrototypeHead, backends, cosine_match, masked_average_pool
from lslpn_kernels._backends import native

_native, _ = native.module()
pytestmark = pytest.mark.skipif(_native is None, reason=f"cpu: {backends()['cpu'].reason}")

SETS: list[str] = _native.cpu_instruction_sets() if _native else ["none"]
# As in test_torch.py: the absolute part is for sums of terms of about 1 / |Up F|.
RTOL, ATOL = 1e-9, 1e-8


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native:
        _native.cpu_use_instruction_set(SETS[-1])


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    _native.cpu_use_instruction_set(request.param)
    return request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty is full of NaN, or of the largest integer: kernels must not rely on zeros."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def large(**changed: object) -> Case:
    """Several chunks of several tiles, shared rows, and enough work for more than one thread."""
    shape = {"D": 40, "h": 21, "w": 18, "H": 150, "W": 131, "C": 3, "B": 2, "K": 2, "Q": 2}
    return Case(**(shape | {"grid": GridSpec(1 / 6, 1 / 2)} | changed))  # type: ignore[arg-type]


LARGE = {
    "paper_like": large(),
    "not_overlapping": large(grid=GridSpec(1 / 8, 1.0)),
    "three_deep": large(grid=GridSpec(1 / 5, 1 / 3)),
    "one_window": large(grid=GridSpec(1.0)),
    "mean": large(reduce="mean"),
    "same_size": large(h=75, w=66, H=75, W=66),
    "shrunk": large(h=60, w=70, H=31, W=33),
    "rows_nobody_needs": large(h=90, w=100, H=8, W=7, grid=GridSpec(1 / 2)),
    "few_rows_under_many_pixels": large(h=2, w=2),
    "many_winners": Case(D=3, h=9, w=8, H=40, W=36, grid=GridSpec(0.6, 0.04), Q=2),
    "many_classes": large(C=20, B=1, D=17, K=1, Q=1),
    "many_shots_and_queries": Case(B=9, K=3, Q=9, D=4, h=4, w=5, H=12, W=13),
    "channels_last": large(channels_last=True),
    "soft_masks": large(mask_kind="soft", min_pixels=10),
    "with_zeros": large(kind="with_zeros"),
}


# ---- against the oracle -------------------------------------------------------------------------


@given(cases())
def test_any_geometry(case: Case) -> None:
    assume(shortest(case) > 0.01)
    assert_agree(run(case, "cpu"), run(case, "reference"), RTOL, ATOL)


@settings(max_examples=15)
@given(cases())
@pytest.mark.parametrize("isa", SETS[:-1])
def test_any_geometry_in_lesser_instructions(isa: str, case: Case) -> None:
    assume(shortest(case) > 0.01)
    _native.cpu_use_instruction_set(isa)
    assert_agree(run(case, "cpu"), run(case, "reference"), RTOL, ATOL)


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str, instruction_set: str, poison: None) -> None:
    case = SITUATIONS[name]
    assert_agree(run(case, "cpu"), run(case, "reference"), RTOL, ATOL)


@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, poison: None) -> None:
    assert_agree(run(LARGE[name], "cpu"), run(LARGE[name], "torch"), RTOL, ATOL)


@pytest.mark.parametrize("name", ["paper_like", "channels_last", "few_rows_under_many_pixels"])
def test_large_in_every_instruction_set(name: str, instruction_set: str) -> None:
    assert_agree(run(LARGE[name], "cpu"), run(LARGE[name], "torch"), RTOL, ATOL)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["positive", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(
    dtype: torch.dtype, kind: str, channels_last: bool, instruction_set: str
) -> None:
    """From the same rounded inputs: all arithmetic is in float32, whatever the dtype."""
    case = large(kind=kind, channels_last=channels_last, B=1, D=64)
    low = run(case, "cpu", dtype)
    assert low["scores"].dtype == low["prototypes"].dtype == torch.float32
    assert low["grad_query"].dtype == low["grad_support"].dtype == dtype
    assert_near(low, run(case, "torch", rounded=dtype), 3e-6)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradcheck_of_each_input(reduce: str) -> None:
    torch.manual_seed(0)
    grid, size = GridSpec(1 / 2, 1 / 2), (7, 6)
    support = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 2, 2, *size) > 0.4
    assert torch.autograd.gradcheck(
        lambda s: masked_average_pool(s, masks, grid, backend="cpu"), support
    )
    query = torch.randn(2, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(2, 2, *grid.shape(*size), 3, dtype=torch.float64, requires_grad=True)
    for inputs in ((query, prototypes.detach()), (query.detach(), prototypes), (query, prototypes)):
        assert torch.autograd.gradcheck(
            lambda q, p: cosine_match(q, p, grid, size, reduce, backend="cpu"), inputs
        )


def test_ties_go_to_the_lowest_window() -> None:
    """Equal prototypes in all windows: every score is a tie, and goes to the first window."""
    for dtype in (torch.float32, torch.float64):
        grid, size = GridSpec(1 / 4, 1 / 2), (64, 64)
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 1, 19, 9, 9, dtype=dtype, generator=generator)
        one = torch.randn(19, dtype=dtype, generator=generator)
        prototypes = one.expand(1, 1, *grid.shape(*size), 19).clone().requires_grad_()
        scores = cosine_match(query, prototypes, grid, size, backend="cpu")
        scores.sum().backward()
        # A window is the first of those over its pixels only where no earlier one reaches: the
        # upper left quarter of it, or more at the upper and left borders.
        assert prototypes.grad is not None
        moved = prototypes.grad[0, 0].norm(dim=-1) > 0
        assert moved.all()  # each window is the first of some pixel
        expected = cosine_match(query, prototypes.detach(), grid, size, backend="reference")
        torch.testing.assert_close(scores.detach(), expected, rtol=1e-5, atol=1e-5)


# ---- what must not matter -----------------------------------------------------------------------


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = run(LARGE[name], "cpu", dtype)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for _ in range(2):
            actual = run(LARGE[name], "cpu", dtype)
            for key, value in expected.items():
                assert torch.equal(actual[key], value), (key, threads)


def test_an_episode_does_not_depend_on_its_batch() -> None:
    case = large(B=3, K=2, Q=3)
    support, masks, query, grad = case.draw(torch.float32)

    def both(of: slice) -> list[Tensor]:
        s, q = (t[of].detach().requires_grad_() for t in (support, query))
        p = masked_average_pool(s, masks[of], case.grid, backend="cpu")
        scores = cosine_match(q, p, case.grid, (case.H, case.W), backend="cpu")
        return [p, scores, *torch.autograd.grad(scores, (s, q), grad[of].float())]

    for whole, single in zip(both(slice(None)), both(slice(1, 2)), strict=True):
        assert torch.equal(whole[1:2], single)


def layouts(features: Tensor) -> dict[str, Tensor]:
    B, N, D, h, w = features.shape
    wide = features.new_full((B + 1, N, 2 * D + 1, h + 2, w + 3), float("nan"))
    inside = wide[1:, :, 1::2, 1:-1, 2:-1]
    inside.copy_(features)
    last = features.movedim(2, -1).contiguous().movedim(-1, 2)
    return {
        "inside_something_larger": inside,
        "channels_last": last,
        "columns_first": features.transpose(3, 4).contiguous().transpose(3, 4),
        "images_last": features.permute(2, 3, 4, 0, 1).contiguous().permute(3, 4, 0, 1, 2),
        "backwards": features.flip(2, 3).contiguous().flip(2, 3),
        "odd_address": torch.cat((features.new_zeros(1), features.flatten()))[1:].view_as(features),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_layout_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = large(B=1, D=37, w=19)
    support, masks, query, _ = case.draw(dtype)
    head = LocalPrototypeHead(case.grid, backend="cpu")

    def both(support: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        support, query = support.detach().requires_grad_(), query.detach().requires_grad_()
        logits = head(support, masks[:, :, 1:], query)
        return logits, *torch.autograd.grad(logits.square().sum(), (support, query))

    expected = both(support, query)
    for (name, s), q in zip(layouts(support).items(), layouts(query).values(), strict=True):
        assert torch.equal(s, support)
        logits, grad_support, grad_query = both(s, q)
        for actual, wanted in zip((logits, grad_support, grad_query), expected, strict=True):
            assert torch.equal(actual, wanted), name
        # A gradient comes back in the layout of its features, where that is dense.
        if name in ("channels_last", "columns_first", "images_last"):
            assert grad_query.stride() == q.stride(), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_any_dtype_of_masks_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = large(B=1)
    support, masks, _, _ = case.draw(torch.float32)
    expected = masked_average_pool(support, masks, case.grid, backend="cpu")
    assert torch.equal(
        masked_average_pool(support, masks.to(dtype), case.grid, backend="cpu"), expected
    )
    strided = masks.to(dtype).transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(masked_average_pool(support, strided, case.grid, backend="cpu"), expected)


def test_uint8_masks_weigh_by_their_value() -> None:
    case = large(B=1)
    support, masks, _, _ = case.draw(torch.float64)
    weights = torch.randint(0, 256, masks.shape, generator=torch.Generator().manual_seed(0))
    heavy = (masks * weights).to(torch.uint8)
    actual = masked_average_pool(support, heavy, case.grid, backend="cpu")
    expected = masked_average_pool(support, heavy.double(), case.grid, backend="torch")
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=ATOL)


# ---- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("kind", ["positive", "with_zeros"])
def test_not_finite_features_reach_their_pixels_alone(value: float, reduce: str, kind: str) -> None:
    case = large(B=1, Q=1, K=1, D=12, kind=kind)
    _, _, query, _ = case.draw(torch.float32)
    shape = (1, case.C, *case.grid.shape(case.H, case.W), case.D)
    prototypes = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    prototypes[:, 1, 2:5] = 0
    size = (case.H, case.W)
    whole = cosine_match(query, prototypes, case.grid, size, reduce, backend="cpu")
    query[0, 0, 3, 9, 7] = value
    spoilt = cosine_match(query, prototypes, case.grid, size, reduce, backend="cpu")
    expected = cosine_match(query, prototypes, case.grid, size, reduce, backend="reference")
    assert torch.equal(spoilt.isfinite(), expected.isfinite())
    same = spoilt.isfinite()
    assert 0 < (~same).sum() < same.numel() / 10
    torch.testing.assert_close(spoilt[same], whole[same], rtol=1e-5, atol=1e-5)


def test_a_prototype_that_is_not_finite_reaches_its_window_alone() -> None:
    case = large(B=1, Q=1, K=1, D=12)
    _, _, query, _ = case.draw(torch.float32)
    shape = (1, case.C, *case.grid.shape(case.H, case.W), case.D)
    prototypes = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    prototypes[0, 1, 3, 4, 5] = float("nan")
    size = (case.H, case.W)
    scores = cosine_match(query, prototypes, case.grid, size, backend="cpu")
    expected = cosine_match(query, prototypes, case.grid, size, backend="reference")
    assert torch.equal(scores.isnan(), expected.isnan())
    assert scores.isnan().any()


def test_not_finite_support_and_gradients_spread_but_do_not_crash() -> None:
    case = large(B=1)
    for place in range(3):
        support, masks, query, grad = case.draw(torch.float32)
        for tensor in (support, query, grad)[place : place + 1]:
            tensor.view(-1)[tensor.numel() // 2] = float("nan")
        support, query = support.requires_grad_(), query.requires_grad_()
        pooled = masked_average_pool(support, masks, case.grid, backend="cpu")
        scores = cosine_match(query, pooled, case.grid, (case.H, case.W), backend="cpu")
        grads = torch.autograd.grad(scores, (support, query), grad.float())
        assert pooled.isnan().any() == (place == 0)
        assert scores.isnan().any() == (place < 2)
        assert all(g.isnan().any() for g in grads)


# ---- resources ----------------------------------------------------------------------------------


def test_memory_at_the_size_of_the_paper() -> None:
    """Beyond inputs and outputs, forward and backward of one episode take at most 32 MiB."""
    program = """
import resource, torch
from lslpn_kernels import GridSpec, cosine_match, masked_average_pool
torch.set_num_threads(2)
features = torch.rand(1, 1, 256, 65, 65)
masks = torch.rand(1, 1, 2, 512, 512) > 0.5
grad = torch.rand(1, 1, 2, 512, 512)
def step(grid, features, masks, grad, size):
    support, query = (features.detach().requires_grad_() for _ in range(2))
    pooled = masked_average_pool(support, masks, grid, backend="cpu")
    scores = cosine_match(query, pooled, grid, size, backend="cpu")
    scores.backward(grad)
    made = (pooled, pooled, scores, scores, support.grad, query.grad)
    return sum(t.numel() * t.element_size() for t in made)
small = [t.contiguous() for t in (features[..., :9, :9], masks[..., :72, :72], grad[..., :72, :72])]
step(GridSpec(), *small, (72, 72))
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = most()
outputs = step(GridSpec(), features, masks, grad, (512, 512))
print((most() - before) / 1024 - outputs / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert float(done.stdout) < 32


def test_memory_is_bounded_with_thousands_of_windows_over_a_pixel() -> None:
    """Thousands of windows over each pixel: memory does not grow with their number."""
    grid = GridSpec(0.9, 0.001)
    size = (60, 50)
    prototypes = torch.randn(1, 1, *grid.shape(*size), 4)
    query = torch.randn(1, 1, 4, 6, 5)
    scores = cosine_match(query, prototypes, grid, size, backend="cpu")
    expected = cosine_match(query, prototypes, grid, size, backend="torch")
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    scores = cosine_match(
        query, torch.zeros(1, 1, *GridSpec(1.0, 1.0).shape(9, 9), 4), GridSpec(1.0), (9, 9)
    )
    assert torch.equal(scores, torch.zeros(1, 1, 1, 9, 9))


def test_threads_are_those_of_pytorch() -> None:
    """One OpenMP runtime in the process, and PyTorch's own threads do the work."""
    program = """
import torch
from pathlib import Path
from lslpn_kernels import GridSpec, cosine_match
def tasks():
    return len(list(Path("/proc/self/task").iterdir()))
prototypes = torch.randn(1, 4, *GridSpec().shape(256, 256), 64)
query = torch.randn(1, 2, 64, 33, 33)
def match():
    cosine_match(query, prototypes, GridSpec(), (256, 256), backend="cpu")
torch.set_num_threads(1)
before = tasks()
match()
alone = tasks() - before
torch.set_num_threads(3)
torch.ones(1 << 22).add_(1)  # wakes PyTorch's threads up
before = tasks()
match()
maps = Path("/proc/self/maps").read_text().splitlines()
runtimes = {line.split()[-1] for line in maps if "gomp" in line.split()[-1]}
print(alone, tasks() - before, len(runtimes))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    alone, more, runtimes = map(int, done.stdout.split())
    assert alone == more == 0
    assert runtimes <= 1


def test_calls_from_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = large(B=1)
    expected = run(case, "cpu", torch.float32)["scores"]
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: run(case, "cpu", torch.float32)["scores"], range(12)):
            assert torch.equal(scores, expected)


def test_after_a_fork() -> None:
    """Workers of a DataLoader are forks: they must not wait for threads of the parent."""
    program = """
import os, torch
from lslpn_kernels import GridSpec, cosine_match
torch.set_num_threads(2)
prototypes = torch.randn(1, 2, *GridSpec().shape(256, 256), 64)
query = torch.randn(1, 1, 64, 33, 33)
def match():
    return cosine_match(query, prototypes, GridSpec(), (256, 256), backend="cpu")
expected = match()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(match(), expected) else 3)
print(os.waitpid(child, 0)[1])
"""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "0"


# ---- the build ----------------------------------------------------------------------------------


def test_instruction_sets() -> None:
    assert SETS[0] == "plain"
    assert _native.cpu_instruction_set() == SETS[-1]
    with pytest.raises(ValueError, match="no instruction set mmx"):
        _native.cpu_use_instruction_set("mmx")
