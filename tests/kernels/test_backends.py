"""What each backend supports in training loops: one test for each row of docs/backends.md.

Every test runs on the CPU: `cuda` as ptx/ executes it, `triton` in its interpreter, for which
test_triton.py runs this file in a process of its own. What a backend cannot do is in `NO`, and the
same test checks that it refuses clearly.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx.fixtures import kernels, module  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    backends,
    cosine_match,
    masked_average_pool,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COLUMNS = ("reference", "torch", "cpu", "triton", "cuda")
HERE = ("triton",) if INTERPRETED else ("reference", "torch", "cpu", "cuda")
KERNELS = ("cpu", "triton", "cuda")
# The interpreter takes a second for a handful of programs.
H, W, h, w, D = (3, 2, 2, 2, 2) if INTERPRETED else (6, 5, 3, 2, 4)
SHOTS = 1 if INTERPRETED else 2
GRID = GridSpec(1.0) if INTERPRETED else GridSpec(1 / 2, 1 / 2)
HALF = (torch.bfloat16, torch.float16)

# What a backend does not do, by test: why, and what its error says (if there is one).
FORWARD = "no: the kernels have no forward-mode derivative"
SECOND = "no: the kernels have no second derivative"
DOUBLE = "no: Triton's products are of 32 bits at most"
BACKWARD = "no: PyTorch runs the backward pass of its own operators in the lower precision"
NO: dict[tuple[str, str], str] = {
    **{("test_forward_mode_derivatives", name): FORWARD for name in KERNELS},
    **{("test_second_derivatives", name): SECOND for name in KERNELS},
    ("test_double_precision", "triton"): DOUBLE,
    ("test_backward_inside_autocast", "reference"): BACKWARD,
    ("test_backward_inside_autocast", "torch"): BACKWARD,
    ("test_fullgraph", "reference"): "yes, but compiling takes seconds for each window",
}
ROWS = {
    "test_dtypes": "float32, float16 and bfloat16 features",
    "test_double_precision": "float64, and `gradcheck`",
    "test_masks_of_every_kind": "bool, uint8 and soft masks, label maps of any integer dtype",
    "test_layouts": "channels_last, expanded, sliced and transposed features, without a copy",
    "test_gradients_of_any_layout": "incoming gradients that are expanded or not contiguous",
    "test_autocast": "`torch.autocast`, bfloat16 or float16, whatever the features' dtype",
    "test_backward_inside_autocast": "the backward pass inside `torch.autocast`",
    "test_loss": "`LocalPrototypeHead.loss`, in one graph and under `torch.func` too",
    "test_inference_first": "`inference_mode` first and training after, and the reverse",
    "test_fullgraph": "`torch.compile(fullgraph=True)`, default and reduce-overhead",
    "test_checkpointing": "activation checkpointing",
    "test_distributed": "`DistributedDataParallel`",
    "test_copies": "`deepcopy`, `pickle` and `state_dict` of the head",
    "test_worker_process": "forked and spawned worker processes",
    "test_transforms": "`torch.func`: `vmap`, `grad`",
    "test_forward_mode_derivatives": "`torch.func.jvp`, forward-mode derivatives",
    "test_second_derivatives": "second derivatives",
    "test_traced": "`torch.jit.trace`",
    "test_empty_batches": "no episodes or no queries: an empty result; no support: an error",
    "test_masks_with_a_gradient": "masks that carry a gradient: an error",
    "test_not_finite": "a NaN or infinity stays in the pixels interpolated from it",
    "test_same_bits": "the same bits on every run",
}


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        request.getfixturevalue("kernels")
    elif not backends()[name].usable:
        pytest.skip(f"{name}: {backends()[name].reason}")
    return name


@pytest.fixture
def declined(request: pytest.FixtureRequest, backend: str) -> bool:
    return (request.node.originalname, backend) in NO


def episode(
    dtype: torch.dtype = torch.float32, *, B: int = 1, K: int = SHOTS, Q: int = 1, N: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Support features, foreground masks, query features."""
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(B, n, D, h, w, generator=generator).to(dtype) for n in (K, Q))
    owner = torch.randint(0, N + 1, (B, K, 1, H, W), generator=generator)
    owner.view(-1)[: N + 1] = torch.arange(N + 1)[: owner.numel()]  # no class is missing
    masks = owner == torch.arange(1, N + 1)[:, None, None]
    return support.requires_grad_(), masks, query.requires_grad_()


def head(backend: str, **settings: Any) -> LocalPrototypeHead:
    return LocalPrototypeHead(GRID, 2.0, backend=backend, **settings)


def results(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Logits and the gradients of both features."""
    logits = call(*inputs)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    leaves = [t for t in inputs if t.requires_grad]
    return logits.detach(), *torch.autograd.grad((logits * weight).sum(), leaves)


def oracle(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    exact = tuple(t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs)
    return results(head("reference"), exact)


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Largest difference over the largest magnitude; gradients in their dtype's own precision."""
    for a, e in zip(actual, expected, strict=True):
        rounding = 0.0 if a.dtype in (torch.float32, torch.float64) else torch.finfo(a.dtype).eps
        error = (a.double() - e.double()).abs().max() / e.double().abs().max()
        assert error <= tolerance + rounding, f"{error:.1e}"


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    inputs = episode(dtype)
    close(results(head(backend), inputs), oracle(inputs), 2e-6 if dtype == torch.float32 else 2e-5)


def test_double_precision(backend: str, declined: bool) -> None:
    support, masks, query = episode(torch.float64, K=1)
    call = head(backend)
    if declined:
        with pytest.raises(RuntimeError, match=r"does not run in torch\.float64"):
            call(support, masks, query)
        return
    assert torch.autograd.gradcheck(lambda s, q: call(s, masks, q), (support, query))


@pytest.mark.parametrize("N", [2] if INTERPRETED else [1, 3])
def test_masks_of_every_kind(backend: str, N: int) -> None:
    support, masks, query = episode(N=N)
    expected = oracle((support, masks, query))
    call = head(backend)

    def found(masks: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return results(lambda s, q: call(s, masks, q, **options), (support, query))

    # Others are converted to these, before any backend sees them.
    taken = (torch.bool, torch.uint8, torch.float32)
    for kind in taken if INTERPRETED else (*taken, torch.float16):
        close(found(masks.to(kind)), expected, 2e-6)
    number = torch.arange(1, N + 1)[:, None, None]
    labels = (masks * number).sum(2)
    others = (torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32)
    for dtype in (torch.uint8, torch.int64, *(() if INTERPRETED else others)):
        close(found(labels.to(dtype)), expected, 2e-6)
    same(found(labels), found(labels, num_classes=N + 1))

    # Pixels of no class at all, of foreground and background.
    labels[..., 1:3, W // 2 : W // 2 + 2] = 255
    whole = (labels[:, :, None] == torch.arange(N + 1)[:, None, None]).double()
    wanted = results(
        lambda s, q: 2 * cosine_match(
            q, masked_average_pool(s, whole, GRID, backend="reference"), GRID, (H, W),
            backend="reference",
        ),
        tuple(t.detach().double().requires_grad_() for t in (support, query)),
    )  # fmt: skip
    close(found(labels, num_classes=N + 1), wanted, 2e-6)
    soft = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1))
    close(found(soft), oracle((support, soft.double(), query)), 3e-6)


def test_layouts(backend: str) -> None:
    support, masks, query = (t.detach() for t in episode())
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
        "sliced": lambda t: t.repeat(1, 2, 2, 2, 2)[:, : t.shape[1], D:, :h, w:],
        "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "expanded": lambda t: t[..., :1].expand(-1, -1, -1, -1, w),
    }
    for name, view in views.items():
        inputs = view(support).requires_grad_(), masks, view(query).requires_grad_()
        assert not inputs[0].is_contiguous(), name
        dense = tuple(t.detach().contiguous().requires_grad_(t.requires_grad) for t in inputs)
        actual = results(head(backend), inputs)
        close(actual, results(head(backend), dense), 1e-6)
    # A view that PyTorch negates on reading, as features and as masks.
    negated = torch.complex(torch.zeros_like(query), -query).conj().imag
    seen = torch.complex(torch.zeros(masks.shape), -masks.float()).conj().imag
    assert negated.is_neg()
    assert seen.is_neg()
    call = head(backend)
    close((call(support, seen, negated),), (call(support, masks, query),), 1e-6)


def test_gradients_of_any_layout(backend: str) -> None:
    support, masks, query = episode()
    call = head(backend)
    weight = torch.randn(2, 1, 1, W, H).transpose(0, 2).transpose(-1, -2)
    for grad in (weight, torch.ones(()).expand(1, 1, 2, H, W), weight[..., :1].expand_as(weight)):
        assert not grad.is_contiguous() or grad.stride()[-1] == 0
        found = torch.autograd.grad(call(support, masks, query), (support, query), grad)
        dense = torch.autograd.grad(
            call(support, masks, query), (support, query), grad.contiguous()
        )
        close(found, dense, 1e-6)
    call(support, masks, query).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("cast", HALF, ids=str)
def test_autocast(backend: str, cast: torch.dtype, dtype: torch.dtype) -> None:
    """In the precision of the features: the head's own arithmetic is not lowered."""
    inputs = episode(dtype)
    weight = torch.linspace(-1, 1, 2 * H * W).reshape(1, 1, 2, H, W)
    with torch.autocast("cpu", cast):
        logits = head(backend)(*inputs)
        loss = (logits * weight).sum()
    assert logits.dtype == torch.float32
    grads = torch.autograd.grad(loss, (inputs[0], inputs[2]))
    close((logits, *grads), oracle(inputs), 2e-6 if dtype == torch.float32 else 2e-5)


def test_backward_inside_autocast(backend: str, declined: bool) -> None:
    inputs = episode()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(head(backend), inputs)
    close(found, oracle(inputs), 2e-2 if declined else 2e-6)


def test_loss(backend: str) -> None:
    """Cross-entropy of the logits, whatever the backend has for it."""
    support, masks, query = episode(Q=2, N=2)
    labels = torch.arange(2 * H * W).reshape(1, 2, H, W) % 4
    labels[labels == 3] = 255
    weight = torch.tensor([0.5, 1.0, 2.0])
    call = LocalPrototypeHead(GridSpec(1.0), 2.0, backend=backend)

    def loss(s: Tensor, q: Tensor) -> Tensor:
        return call.loss(s, masks, q, labels, weight=weight)

    exact = tuple(t.detach().double().requires_grad_() for t in (support, query))
    logits = LocalPrototypeHead(GridSpec(1.0), 2.0, backend="reference")(exact[0], masks, exact[1])
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(0, 1), weight.double(), ignore_index=255
    )
    grads = torch.autograd.grad(wanted, exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(support, query)
    close((found, *torch.autograd.grad(found, (support, query))), (wanted, *grads), 2e-6)
    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(support, query)
    close((found, *torch.autograd.grad(found, (support, query))), (wanted, *grads), 2e-6)
    support, query = support.detach(), query.detach()
    close(torch.func.grad(loss, (0, 1))(support, query), grads, 2e-6)
    mapped = torch.func.vmap(loss)(torch.stack((support, -support)), torch.stack((query, query)))
    close((mapped,), (torch.stack((loss(support, query), loss(-support, query))),), 2e-6)


def test_inference_first(backend: str) -> None:
    """In a process that has not used this geometry before, in either order."""
    for grid, first in ((GridSpec(0.61, 0.5), True), (GridSpec(0.67, 0.5), False)):
        call = LocalPrototypeHead(grid, 2.0, backend=backend)
        inputs = episode()
        if first:
            with torch.inference_mode():
                before = call(*(t.detach() for t in inputs))
        trained = results(call, inputs)
        if not first:
            with torch.inference_mode():
                before = call(*(t.detach() for t in inputs))
        close((before,), trained[:1], 1e-6)
        with torch.no_grad():
            same((call(*inputs),), (before,))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"][INTERPRETED:])
def test_fullgraph(backend: str, mode: str) -> None:
    """In one graph, with two results kept, as those of two batches of one step are."""
    torch.compiler.reset()
    call = LocalPrototypeHead(GridSpec(1.0), 2.0, backend=backend)
    # Variable sizes suit the operators; for the plain PyTorch of `reference`, Inductor takes
    # minutes to work out the bounds of each window.
    dynamic = False if backend == "reference" else None
    compiled = torch.compile(call, fullgraph=True, mode=mode, dynamic=dynamic)
    first, second = episode(), episode(Q=1)
    second[2].data.neg_()
    kept = compiled(*first), compiled(*second)
    close(kept, (call(*first), call(*second)), 1e-6)
    for logits, inputs in zip(kept, (first, second), strict=True):
        leaves = inputs[0], inputs[2]
        wanted = torch.autograd.grad(call(*inputs).square().sum(), leaves)
        close(torch.autograd.grad(logits.square().sum(), leaves), wanted, 1e-5)
    labels = first[1][:, :, 0].long()
    with torch.autocast("cpu", torch.bfloat16):
        again = compiled(first[0], labels, first[2], num_classes=2)
    close((again,), kept[:1], 1e-6)


def test_checkpointing(backend: str) -> None:
    call = head(backend)
    support, masks, query = episode()
    call(support, masks, query).square().sum().backward()
    for reentrant in (False, True):
        other, _, another = episode()
        saved = checkpoint(call, other, masks, another, use_reentrant=reentrant)
        saved.square().sum().backward()
        assert support.grad is not None
        assert query.grad is not None
        close((other.grad, another.grad), (support.grad, query.grad), 1e-6)


class _Network(torch.nn.Module):
    """The head on the features of an encoder of its own, with live batch norm."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = head(backend)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        features = self.encoder(images)[None, :, :, ::2, ::2]
        return self.head(features[:, :1], masks, features[:, 1:])


def test_distributed(backend: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 8, 7, generator=generator)
    masks = torch.rand(1, 1, 1, 8, 7, generator=generator) < 0.5
    torch.manual_seed(0)
    network = _Network(backend)
    twin = copy.deepcopy(network)
    twin(images, masks).square().mean().backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(network)
        parallel(images, masks).square().mean().backward()
        # Were it the last to hold the group, it would wait for gloo's threads, which may wait for
        # Python's lock, which it holds.
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_copies(backend: str) -> None:
    call = head(backend, min_pixels=1, reduce="mean")
    assert call.state_dict() == {}
    inputs = episode()
    expected = call(*inputs)
    file = io.BytesIO()
    torch.save(call, file)
    file.seek(0)
    for other in (
        copy.deepcopy(call),
        pickle.loads(pickle.dumps(call)),
        torch.load(file, weights_only=False),
    ):
        assert str(other) == str(call)
        same((other(*inputs),), (expected,))


_WORKER = """
import multiprocessing, os, sys, torch
from lslpn_kernels import GridSpec, LocalPrototypeHead

def work(names, threads):
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, 1, 1, 32, 17, 17, generator=generator, requires_grad=True)
    masks = torch.rand(1, 1, 1, 128, 128, generator=generator) < 0.5
    for name in names:
        # PyTorch's own operators hang in a forked process that asks for threads; those of
        # DataLoader have one each.
        torch.set_num_threads(threads if name == "cpu" else 1)
        logits = LocalPrototypeHead(GridSpec(1 / 4), backend=name)(support, masks, query)
        logits.sum().backward()
        assert logits.isfinite().all()

if __name__ == "__main__":
    names = sys.argv[2:]
    work(names, 2)  # the parent has threads by now
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(names, 2))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    sys.exit(child.exitcode != 0)
"""


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to see of Triton without a GPU")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_process(method: str, tmp_path: Path) -> None:
    """All backends of this machine and "auto" in one process, since starting it takes seconds.
    CUDA must not be started for tensors of the CPU: a forked process could not."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    names = [n for n, s in backends().items() if s.usable and n != "triton" and n in HERE]
    done = subprocess.run(
        [sys.executable, str(script), method, "auto", *names],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_transforms(backend: str) -> None:
    support, masks, query = (t.detach() for t in episode(B=2))
    call = head(backend)

    def loss(s: Tensor, q: Tensor) -> Tensor:
        return call(s, masks, q).square().sum()

    leaves = support.clone().requires_grad_(), query.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    close(torch.func.grad(loss, (0, 1))(support, query), expected, 1e-6)

    def of_one(s: Tensor, m: Tensor, q: Tensor) -> Tensor:
        return call(s[None], m[None], q[None])[0]

    mapped = torch.func.vmap(of_one)(support, masks, query)
    close((mapped,), (call(support, masks, query),), 1e-6)


def test_forward_mode_derivatives(backend: str, declined: bool) -> None:
    support, masks, query = (t.detach().double() if t.dtype != torch.bool else t for t in episode())
    if backend == "triton":
        support, query = support.float(), query.float()
    call = head(backend)

    def derivative() -> Tensor:
        one = torch.ones_like(query)
        tangent: Tensor = torch.func.jvp(lambda q: call(support, masks, q), (query,), (one,))[1]
        return tangent

    if declined:
        with pytest.raises(RuntimeError, match=r"jvp|forward"):
            derivative()
        return
    step = 1e-6
    moved = call(support, masks, query + step) - call(support, masks, query - step)
    torch.testing.assert_close(derivative(), moved / (2 * step), rtol=1e-5, atol=1e-7)


def test_second_derivatives(backend: str, declined: bool) -> None:
    support, masks, query = episode(torch.float32 if backend == "triton" else torch.float64)
    call = head(backend)
    (first,) = torch.autograd.grad(call(support, masks, query).sum(), query, create_graph=True)
    if declined:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            first.square().sum().backward()
        return
    assert torch.autograd.gradgradcheck(lambda q: call(support, masks, q), (query,))


def test_traced(backend: str) -> None:
    support, masks, query = (t.detach() for t in episode())
    call = head(backend)
    traced = torch.jit.trace(call, (support, masks, query), check_trace=False)
    others = support.flip(-1), ~masks, -query
    close((traced(*others),), (call(*others),), 1e-6)


def test_empty_batches(backend: str) -> None:
    call = head(backend)
    for sizes in ({"B": 0}, {"Q": 0}):
        support, masks, query = episode(**sizes)
        logits = call(support, masks, query)
        assert logits.shape == (support.shape[0], query.shape[1], 2, H, W)
        logits.sum().backward()
        for features in (support, query):
            assert features.grad is not None
            assert not features.grad.any()
        labels = masks[:, :, 0].long()
        assert call(support, labels, query).shape == logits.shape
    with pytest.raises(ValueError, match="must not be empty, got K = 0"):
        call(*episode(K=0))


def test_masks_with_a_gradient(backend: str) -> None:
    support, masks, query = episode()
    with pytest.raises(ValueError, match="masks get no gradient"):
        head(backend)(support, masks.float().requires_grad_(), query)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(backend: str, value: float) -> None:
    """In the pixels that are interpolated from it, and in no others; also where features are as
    large as the image, and a pixel is interpolated from a single location."""
    for size, touched in (((h, w), 1), ((H, W), None)):
        support, _, query = (t.detach() for t in episode(K=1))
        masks = torch.zeros(1, 1, 1, *size, dtype=torch.bool)
        masks[..., : size[0] // 2, :] = True
        query[0, 0, :, h - 1, 0] = value
        found = head(backend)(support, masks, query).isfinite()
        wanted = head("reference")(support, masks, query).isfinite()
        assert torch.equal(found, wanted)
        if touched:
            assert (~found[0, 0, 0]).sum() == touched


def test_same_bits(backend: str) -> None:
    inputs = episode(B=SHOTS, K=SHOTS, Q=2, N=2)
    call = head(backend)
    same(results(call, inputs), results(call, inputs))


def test_every_cell_of_the_table_has_a_test() -> None:
    """docs/backends.md has a row for each of these tests, and says no where they do."""
    text = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    lines = ["| | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |"]
    lines.append("|---|" + "---|" * len(COLUMNS))
    for test, title in ROWS.items():
        assert callable(globals()[test])
        cells = [NO.get((test, name), "yes") for name in COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    assert table in text, table
    assert {test for test, _ in NO} <= set(ROWS)
