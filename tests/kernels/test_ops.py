"""The operators as PyTorch sees them: registration, tracing, transforms, and bad input."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    backends,
    cosine_match,
    cosine_match_loss,
    masked_average_pool,
)
from lslpn_kernels._arguments import windows
from lslpn_kernels._backends import winner_dtype

GRID = GridSpec(1 / 3, 1 / 2)

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu: {backends()['cpu'].reason}"
)

SYMBOLIC = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11),
    reason="PyTorch 2.6 fails to solve for such sizes, 2.11 does; between them it was not tried",
)


def episode(
    dtype: torch.dtype = torch.float32,
    *,
    H: int = 20,
    W: int = 17,
    h: int = 5,
    w: int = 4,
    **n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Support features, masks of 2 classes, query features."""
    B, K, Q, D = (
        n.get(letter, default) for letter, default in zip("BKQD", (2, 2, 3, 5), strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(B, K, D, h, w, generator=generator).to(dtype)
    query = torch.randn(B, Q, D, h, w, generator=generator).to(dtype)
    owner = torch.randint(0, 2, (B, K, 1, H, W), generator=generator)
    masks = owner == torch.arange(2)[:, None, None]
    return support.requires_grad_(), masks, query.requires_grad_()


def head(support: Tensor, masks: Tensor, query: Tensor, backend: str = "cpu") -> Tensor:
    prototypes = masked_average_pool(support, masks, GRID, backend=backend)
    return cosine_match(query, prototypes, GRID, masks.shape[-2:], backend=backend)


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    out = call(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    wanted = [t for t in inputs if t.requires_grad]
    return out, *torch.autograd.grad((out * weight).sum(), wanted)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """In eager mode the scale of the logits is applied elsewhere, and rounds otherwise."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


# ---- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("logit_scale", [20.0, -3.0, 1e-3, 1e-30, 0.0])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_scores_times_a_logit_scale(logit_scale: float, reduce: str, backend: str) -> None:
    support, masks, query = episode(torch.float64)
    prototypes = masked_average_pool(support, masks, GRID).detach().requires_grad_()
    size = masks.shape[-2:]

    def match(query: Tensor, prototypes: Tensor) -> Tensor:
        return cosine_match(query, prototypes, GRID, size, reduce, backend, logit_scale)

    def plain(query: Tensor, prototypes: Tensor) -> Tensor:
        return logit_scale * cosine_match(query, prototypes, GRID, size, reduce, "reference")

    for actual, expected in zip(
        gradients(match, query, prototypes), gradients(plain, query, prototypes), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10 * abs(logit_scale))


def test_opcheck() -> None:
    ops = torch.ops.lslpn_kernels
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        support, masks, query = (t.detach() for t in episode(dtype))
        settings = (GRID.scale, GRID.spacing)
        pool = (support, masks, 2, *settings, 1.0, "cpu")
        torch.library.opcheck(ops.masked_average_pool.default, pool)
        prototypes, factor = ops.masked_average_pool(*pool)
        torch.library.opcheck(
            ops.masked_average_pool_backward.default,
            (prototypes, masks, 2, factor, support, *settings, "cpu"),
        )
        for reduce in ("max", "mean"):
            for kept in (True, False):
                match = (query, prototypes, *settings, 20, 17, reduce, kept, 3.0, "cpu")
                torch.library.opcheck(ops.cosine_match.default, match)
            scores, winners, gram = ops.cosine_match(
                query, prototypes, *settings, 20, 17, reduce, True, 3.0, "cpu"
            )
            for wanted in ((True, True), (True, False), (False, True)):
                torch.library.opcheck(
                    ops.cosine_match_backward.default,
                    (
                        scores,
                        query,
                        prototypes,
                        scores,
                        winners,
                        gram,
                        *settings,
                        reduce,
                        3.0,
                        "cpu",
                        wanted,
                    ),
                )


def test_operators_take_what_is_not_contiguous() -> None:
    """Called as they are, from a graph that has chosen other strides."""
    ops = torch.ops.lslpn_kernels
    support, masks, query = (t.detach() for t in episode())
    flipped = masks.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2).flip(-1)
    settings = (GRID.scale, GRID.spacing)
    prototypes, factor = ops.masked_average_pool(support, flipped, 2, *settings, 0.0, "cpu")
    expected = ops.masked_average_pool(support, masks, 2, *settings, 0.0, "cpu")
    assert_same((prototypes, factor), expected)
    turned = prototypes.transpose(1, 4).contiguous().transpose(1, 4)
    scores = ops.cosine_match(query, turned, *settings, 20, 17, "max", True, 2.0, "cpu")
    kept = ops.cosine_match(query, prototypes, *settings, 20, 17, "max", True, 2.0, "cpu")
    assert_same(scores, kept)
    apart = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in kept[:2]]
    assert_same(
        ops.cosine_match_backward(
            apart[0], query, turned, *apart, kept[2], *settings, "max", 2.0, "cpu", (True, True)
        ),
        ops.cosine_match_backward(
            kept[0], query, prototypes, *kept, *settings, "max", 2.0, "cpu", (True, True)
        ),
    )


def test_winners_fit_their_dtype() -> None:
    for spacing in (0.01, 0.05, 0.1, 0.13, 2 / 15, 0.14, 0.2, 1 / 3, 0.5, 0.77, 1.0):
        for scale in (0.03, 1 / 8, 1 / 3, 0.7, 1.0):
            grid = GridSpec(scale, spacing)
            if winner_dtype(grid) == torch.uint8:
                for pixels in range(1, 200):
                    assert grid.axis(pixels).overlap <= 16, (grid, pixels)
    assert winner_dtype(GridSpec()) == torch.uint8
    assert winner_dtype(GridSpec(1.0, 0.01)) == torch.int32


# ---- torch.compile and torch.export -------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_breaks(compiler: str) -> None:
    torch._dynamo.reset()
    inputs = episode()
    compiled = torch.compile(head, fullgraph=True, backend=compiler)
    assert_same(gradients(compiled, *inputs), gradients(head, *inputs))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_once_for_all_sizes(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sizes = [(20, 17, 9, 8), (32, 48, 6, 7), (19, 23, 8, 8), (64, 33, 3, 9), (257, 61, 9, 5)]
    for i, (H, W, h, w) in enumerate(sizes):
        inputs = episode(H=H, W=W, h=h, w=w, B=3 + i, K=4 + 2 * i, Q=5 + i, D=6 + 2 * i)
        # Automatic: once for the first sizes as they are, once more with all of them as symbols.
        known = i > (0 if dynamic else 1)
        with torch._dynamo.config.patch(error_on_recompile=known):
            actual = gradients(compiled, *inputs)
        assert_same(actual, gradients(head, *inputs))


def test_compile_the_module_under_autocast() -> None:
    torch._dynamo.reset()
    module = LocalPrototypeHead(GRID, min_pixels=2)
    support, masks, query = episode(torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(module, support, masks[:, :, 1:], query)
        assert_close(gradients(compiled, support, masks[:, :, 1:], query), expected)
    assert expected[0].dtype == torch.float32


def test_compile_without_gradients() -> None:
    torch._dynamo.reset()
    support, masks, query = (t.detach() for t in episode())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same((compiled(support, masks, query),), (head(support, masks, query),))


def test_compile_says_what_is_wrong() -> None:
    torch._dynamo.reset()
    support, masks, query = episode()
    compiled = torch.compile(head, backend="aot_eager")
    with pytest.raises(Exception, match="masks must hold as many episodes B"):
        compiled(support, masks[:1], query)


@pytest.mark.parametrize("strict", [pytest.param(True, marks=SYMBOLIC), False])
def test_export(strict: bool) -> None:
    module = LocalPrototypeHead(GRID).eval()
    support, masks, query = (t.detach() for t in episode())
    inputs = (support, masks[:, :, 1:], query)
    names = ("B", "H", "W", "h", "w")
    B, H, W, h, w = (torch.export.Dim(name, min=2, max=512) for name in names)
    if not strict:  # without dynamo, PyTorch asks of the number of windows whether it is 1
        B = H = W = h = w = torch.export.Dim.AUTO
    sizes = ({0: B, 3: h, 4: w}, {0: B, 3: H, 4: W}, {0: B, 3: h, 4: w})
    program = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "lslpn_kernels.cosine_match.default" in targets
    for H_, W_ in ((20, 17), (41, 30)):
        support, masks, query = (t.detach() for t in episode(H=H_, W=W_, h=7, w=6, B=3))
        inputs = (support, masks[:, :, 1:], query)
        assert_close((program.module()(*inputs),), (module(*inputs),))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        support = torch.empty(1, 1, 256, 65, 65, dtype=torch.float16, requires_grad=True)
        masks = torch.empty(1, 1, 2, 512, 512, dtype=torch.bool)
        scores = head(support, masks, support)
        (grad,) = torch.autograd.grad(scores.sum(), support)
    assert scores.shape == (1, 1, 2, 512, 512)
    assert scores.dtype == torch.float32
    assert grad.dtype == torch.float16


# ---- autocast, transforms, derivatives ----------------------------------------------------------


def test_autocast_leaves_inputs_as_they_are() -> None:
    support, masks, query = episode(torch.float32)
    expected = gradients(head, support, masks, query)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(head, support, masks, query), expected)
        half = head(support.bfloat16(), masks, query.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected[0], rtol=0, atol=0.03)


def test_vmap_is_a_loop() -> None:
    support, masks, query = (
        torch.stack((t, t.flip(0), t)) for t in (x.detach() for x in episode())
    )
    expected = torch.stack([head(*one) for one in zip(support, masks, query, strict=True)])
    assert_same((torch.func.vmap(head)(support, masks, query),), (expected,))
    moved = torch.func.vmap(head, in_dims=(1, None, 3))(
        support.movedim(0, 1), masks[0], query.movedim(0, 3)
    )
    expected = torch.stack([head(s, masks[0], q) for s, q in zip(support, query, strict=True)])
    assert_same((moved,), (expected,))


def test_vmap_of_no_episodes_and_of_no_queries() -> None:
    support, masks, query = (x.detach() for x in episode())
    for some in (query[:0], query[:, :0]):
        n = len(some)
        batch = torch.stack((some, some)).requires_grad_()
        logits = torch.func.vmap(lambda q, n=n: head(support[:n], masks[:n], q))(batch)
        assert logits.shape == (2, *head(support[:n], masks[:n], some).shape)
        logits.sum().backward()
        assert batch.grad is not None
        assert batch.grad.shape == batch.shape


def test_several_incoming_gradients_at_once() -> None:
    """`is_grads_batched`, as in `torch.autograd.functional.jacobian(vectorize=True)`."""
    support, masks, query = episode()
    logits = head(support, masks, query)
    several = torch.randn(3, *logits.shape, generator=torch.Generator().manual_seed(1))
    given = (support, query)
    found = torch.autograd.grad(logits, given, several, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(logits, given, g, retain_graph=True) for g in several]
    for together, apart in zip(found, zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_functional_gradients(reduce: str) -> None:
    support, masks, query = (t.detach() for t in episode())

    def loss(support: Tensor, query: Tensor) -> Tensor:
        prototypes = masked_average_pool(support, masks, GRID, backend="cpu")
        scores = cosine_match(query, prototypes, GRID, (20, 17), reduce, backend="cpu")
        return scores.square().sum()

    support_, query_ = support.clone().requires_grad_(), query.clone().requires_grad_()
    expected = torch.autograd.grad(loss(support_, query_), (support_, query_))
    assert_same(torch.func.grad(loss, argnums=(0, 1))(support, query), expected)
    # A gradient for each of several queries.
    queries = torch.stack((query, query.flip(0)))
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(support, queries)
    one_by_one = [torch.func.grad(loss, argnums=1)(support, q) for q in queries]
    assert_same((each,), (torch.stack(one_by_one),))


def test_second_derivatives_are_refused() -> None:
    support, masks, query = episode()
    pooled = masked_average_pool(support, masks, GRID, backend="cpu")
    weight = torch.ones_like(pooled, requires_grad=True)
    (grad,) = torch.autograd.grad(pooled, support, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_average_pool has no second derivative"):
        grad.sum().backward()
    scores = cosine_match(query, pooled.detach(), GRID, (20, 17), backend="cpu")
    (grad,) = torch.autograd.grad(scores.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="cosine_match has no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(
            lambda q: torch.func.grad(
                lambda r: cosine_match(r, pooled.detach(), GRID, (20, 17), backend="cpu").sum()
            )(q).sum()
        )(query.detach())


def test_only_the_gradients_that_are_wanted() -> None:
    support, masks, query = episode()
    prototypes = masked_average_pool(support, masks, GRID, backend="cpu").detach()
    trained = prototypes.clone().requires_grad_()

    def match(query: Tensor, prototypes: Tensor) -> Tensor:
        return cosine_match(query, prototypes, GRID, (20, 17), backend="cpu")

    _, *both = gradients(match, query, trained)
    assert_same(gradients(match, query, prototypes)[1:], both[:1])
    assert_same(gradients(match, query.detach(), trained)[1:], both[1:])
    assert not match(query.detach(), prototypes).requires_grad
    assert not masked_average_pool(support.detach(), masks, GRID, backend="cpu").requires_grad


def test_gradients_of_any_layout() -> None:
    """Gradients as autograd passes them: expanded, strided, or none."""
    support, masks, query = episode()
    scores = head(support, masks, query)
    dense = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(scores, (support, query), dense, retain_graph=True)
    strided = dense.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_same(torch.autograd.grad(scores, (support, query), strided, retain_graph=True), expected)
    ones = torch.ones_like(scores)
    expected = torch.autograd.grad(scores, (support, query), ones, retain_graph=True)
    assert_same(torch.autograd.grad(scores.sum(), (support, query)), expected)


def test_expanded_features() -> None:
    """One image expanded to several, without memory for each."""
    support, masks, query = (t.detach() for t in episode(K=1, B=1))
    support = support.expand(-1, 2, -1, -1, -1).detach().requires_grad_()
    masks = masks.expand(-1, 2, -1, -1, -1)
    copy = support.detach().clone().requires_grad_()
    assert_same(gradients(head, support, masks, query), gradients(head, copy, masks.clone(), query))


def test_default_device_does_not_matter() -> None:
    inputs = episode()
    expected = gradients(head, *inputs)
    with torch.device("meta"):
        out = head(*inputs)
    torch.testing.assert_close(out, expected[0])


def test_negative_views() -> None:
    """A view that PyTorch negates on reading: its memory holds the other sign."""
    support, masks, query = (t.detach() for t in episode())
    view = torch.complex(query, -query).conj().imag
    assert view.is_neg()
    assert_same((head(support, masks, view),), (head(support, masks, query),))


def test_saved_tensors_are_guarded() -> None:
    support, masks, query = episode()
    scores = head(support, masks, query)
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_activation_checkpointing() -> None:
    inputs = episode()
    actual = gradients(lambda *args: checkpoint(head, *args, use_reentrant=False), *inputs)
    assert_same(actual, gradients(head, *inputs))


def test_forward_mode_is_refused_rather_than_lost() -> None:
    support, masks, query = (t.detach() for t in episode())
    expected = head(support, masks, query)
    with forward_ad.dual_level():
        for inputs in (
            (forward_ad.make_dual(support, support), masks, query),
            (support, masks, forward_ad.make_dual(query, query)),
        ):
            with pytest.raises(RuntimeError, match="forward-mode"):
                head(*inputs)
        assert_same((head(support, masks, query),), (expected,))  # without a tangent


@pytest.mark.parametrize("scale", [1 / 16, 1 / 7, 1 / 5, 0.3, 0.77, 0.30000001, 1.0])
@pytest.mark.parametrize("spacing", [0.05, 1 / 3, 0.5, 0.7777777, 1.0])
def test_windows_are_counted_as_the_geometry_counts_them(scale: float, spacing: float) -> None:
    grid = GridSpec(scale, spacing)
    for pixels in (*range(1, 700), 4097, 65535, 1 << 20):
        assert windows(grid, pixels) == grid.axis(pixels).windows


@SYMBOLIC
def test_compile_small_images_with_symbolic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    for H, W in ((20, 17), (5, 4), (3, 2)):
        inputs = episode(H=H, W=W)
        for a, b in zip(gradients(compiled, *inputs), gradients(head, *inputs), strict=True):
            torch.testing.assert_close(a, b)


# ---- bad input ----------------------------------------------------------------------------------

F = torch.zeros(1, 1, 3, 4, 4)
M = torch.ones(1, 1, 2, 9, 9, dtype=torch.bool)
P = torch.zeros(1, 2, *GRID.shape(9, 9), 3)
LABELS = torch.ones(1, 1, 9, 9, dtype=torch.long)

BAD_POOL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": None}, TypeError, "features must be a torch.Tensor"),
    ({"features": F[0]}, ValueError, "features must have 5 dimensions"),
    ({"features": F[:, :, :0]}, ValueError, "features .* must not be empty, got D = 0"),
    ({"features": F.to(torch.int32)}, TypeError, "features must be float64"),
    ({"features": F.to(torch.complex64)}, TypeError, "features must be float64"),
    ({"features": F.to(torch.float8_e4m3fn)}, TypeError, "features must be float64"),
    ({"features": F.to_sparse()}, TypeError, "features must be a dense tensor"),
    ({"features": torch.nested.nested_tensor([F[0]])}, TypeError, "features must be a dense"),
    ({"features": F.to("meta")}, ValueError, "masks must be on the device of features"),
    ({"features": F.expand(2, -1, -1, -1, -1)}, ValueError, "masks must hold as many episodes"),
    ({"features": F.expand(-1, 2, -1, -1, -1)}, ValueError, "as many support images K"),
    ({"masks": M.tolist()}, TypeError, "masks must be a torch.Tensor"),
    ({"masks": M[0]}, TypeError, "labels .* must be integers, got torch.bool"),
    ({"masks": M[..., :0]}, ValueError, "masks .* must not be empty, got W = 0"),
    ({"masks": M.long()}, TypeError, "masks .* must be bool, uint8 or floating"),
    ({"masks": M.float().requires_grad_()}, ValueError, "masks get no gradient"),
    ({"grid": (1 / 3, 1 / 2)}, TypeError, "grid must be a GridSpec"),
    ({"min_pixels": "10"}, TypeError, "min_pixels must be a number"),
    ({"min_pixels": True}, TypeError, "min_pixels must be a number"),
    ({"min_pixels": -1}, ValueError, "min_pixels must be 0 or more"),
    ({"min_pixels": math.nan}, ValueError, "min_pixels must be 0 or more"),
    ({"min_pixels": math.inf}, ValueError, "min_pixels must be 0 or more"),
    ({"min_pixels": 10**400}, ValueError, "min_pixels must be 0 or more"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ({"backend": None}, TypeError, "backend must be a string"),
]
ARRAY = F.numpy() if find_spec("numpy") else F.tolist()
BAD_MATCH: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"features": ARRAY},
        TypeError,
        "features must be a torch.Tensor",
    ),
    ({"features": F[0]}, ValueError, "features must have 5 dimensions"),
    ({"prototypes": P[0]}, ValueError, "prototypes must have 5 dimensions"),
    ({"prototypes": P.double()}, TypeError, "prototypes must be torch.float32"),
    ({"features": F.double()}, TypeError, "prototypes must be torch.float64"),
    ({"prototypes": P.half()}, TypeError, "prototypes must be torch.float32"),
    ({"prototypes": P.to("meta")}, ValueError, "prototypes must be on the device of features"),
    ({"prototypes": P[..., :2]}, ValueError, "prototypes must have as many channels D"),
    ({"prototypes": P[:, :, :-1]}, ValueError, r"prototypes must have \(Gy, Gx\)"),
    ({"prototypes": P.expand(2, -1, -1, -1, -1)}, ValueError, "prototypes must hold as many"),
    ({"size": 9}, TypeError, "size must be"),
    ({"size": (9,)}, TypeError, "size must be"),
    ({"size": (9, 9, 9)}, TypeError, "size must be"),
    ({"size": (9.0, 9)}, TypeError, "size must hold integers"),
    ({"size": (True, 9)}, TypeError, "size must hold integers"),
    ({"size": (0, 9)}, ValueError, "size must be at least 1 pixel, got H = 0"),
    ({"size": (9, -3)}, ValueError, "size must be at least 1 pixel, got W = -3"),
    ({"size": (9, 10**12)}, ValueError, "size is too large, got W"),
    ({"size": (9, 90)}, ValueError, r"prototypes must have \(Gy, Gx\)"),
    ({"reduce": "min"}, ValueError, 'reduce must be "max" or "mean"'),
    ({"reduce": None}, ValueError, 'reduce must be "max" or "mean"'),
    ({"reduce": ["max"]}, ValueError, 'reduce must be "max" or "mean"'),
    ({"grid": None}, TypeError, "grid must be a GridSpec"),
    ({"backend": "triton2"}, ValueError, "backend must be one of"),
    ({"logit_scale": "20"}, TypeError, "logit_scale must be a number"),
    ({"logit_scale": math.nan}, ValueError, "logit_scale must be a finite number"),
    ({"logit_scale": -math.inf}, ValueError, "logit_scale must be a finite number"),
]


@pytest.mark.parametrize(("bad", "error", "text"), BAD_POOL)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_bad_pool_input(
    bad: dict[str, Any], error: type[Exception], text: str, backend: str
) -> None:
    good = {"features": F, "masks": M, "grid": GRID, "min_pixels": 0, "backend": backend}
    masked_average_pool(**good)
    masked_average_pool(**(good | {"min_pixels": 1}))
    with pytest.raises(error, match=text):
        masked_average_pool(**(good | bad))


@pytest.mark.parametrize(("bad", "error", "text"), BAD_MATCH)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_bad_match_input(
    bad: dict[str, Any], error: type[Exception], text: str, backend: str
) -> None:
    good = {"features": F, "prototypes": P, "grid": GRID, "size": (9, 9), "backend": backend}
    cosine_match(**good)
    with pytest.raises(error, match=text):
        cosine_match(**(good | bad))


def test_bad_device() -> None:
    with pytest.raises(RuntimeError, match='backend="cpu" runs on cpu tensors'):
        masked_average_pool(F.to("meta"), M.to("meta"), GRID, backend="cpu")


@pytest.mark.parametrize(
    ("scale", "spacing", "error"),
    [
        (0, 0.5, ValueError),
        (-0.1, 0.5, ValueError),
        (1.01, 0.5, ValueError),
        (math.nan, 0.5, ValueError),
        (math.inf, 0.5, ValueError),
        (0.5, 0, ValueError),
        (0.5, 1.5, ValueError),
        ("1/8", 0.5, TypeError),
        (0.5, None, TypeError),
        (True, 0.5, TypeError),
    ],
)
def test_bad_grid(scale: Any, spacing: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"GridSpec: (scale|spacing) must"):
        GridSpec(scale, spacing)


# ---- fuzz ---------------------------------------------------------------------------------------


def _anything(rng: random.Random, depth: int = 0) -> Any:
    """A value that some caller might pass for any argument."""
    shape = [
        rng.choice([0, 1, 1, 2, 2, 3, 5, 9])
        for _ in range(rng.choice([0, 1, 2, 3, 4, 5, 5, 5, 5, 6]))
    ]
    dtype = rng.choice(
        [
            *(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
            *(torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64),
        ]
    )
    tensor = torch.ones(shape, dtype=dtype)
    kind = rng.randrange(8)
    if kind == 0 and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif kind == 1 and shape:
        tensor = tensor.expand(*[rng.choice([n, 7]) if n == 1 else n for n in shape])
    elif kind == 2 and tensor.numel():
        tensor = tensor[..., ::2] if tensor.dim() else tensor
    elif kind == 3:
        tensor = tensor.to("meta")
    values = [tensor] * 6 + [
        None,
        True,
        rng.choice([-1, 0, 1, 3, 2**31, 2**63, 10**30]),
        rng.choice([0.0, 0.5, -1.0, math.nan, math.inf]),
        rng.choice(["max", "mean", "cpu", ""]),
        b"",
        object(),
        [tensor, tensor],
    ]
    return rng.choice(values)


def test_fuzz_the_public_functions() -> None:
    rng = random.Random(0)
    survived = 0
    for _ in range(3000):
        good: dict[str, Any] = {"features": F, "masks": M, "grid": GRID, "min_pixels": 0}
        call: Callable[..., Tensor] = masked_average_pool
        if rng.random() < 0.5:
            good = {"features": F, "prototypes": P, "grid": GRID, "size": (9, 9), "reduce": "max"}
            call = cosine_match
        if rng.random() < 0.3:
            good = {"features": F, "prototypes": P, "labels": LABELS, "grid": GRID}
            good |= {"ignore_index": 255, "weight": torch.ones(2)}
            call = cosine_match_loss
        for name in rng.sample(sorted(good), rng.choice([1, 1, 2, 3])):
            good[name] = _anything(rng)
        try:
            call(**good, backend="cpu")
            survived += 1
        except (TypeError, ValueError):
            pass
    assert survived > 10


def _cpu_loss(*args: Any) -> Any:
    from lslpn_kernels._backends import cpu

    return cpu.cosine_match_loss(*args[:7], ignore_index=args[7], logit_scale=args[8])


def test_fuzz_the_backend() -> None:
    """Called without the public checks: the binding checks again."""
    from lslpn_kernels._backends import cpu

    rng = random.Random(1)
    pooled, factor, weights = cpu.masked_average_pool(F, M, 2, GRID, 0.0)
    scores, winners, gram = cpu.cosine_match(F, pooled, GRID, (9, 9), "max", True)
    calls: list[tuple[Callable[..., Any], list[Any]]] = [
        (cpu.masked_average_pool, [F, M, 2, GRID, 0.0]),
        (cpu.masked_average_pool_backward, [pooled, M, 2, factor, F, GRID]),
        (cpu.masked_average_pool_backward, [pooled, M, 2, factor, F, GRID, weights]),
        (cpu.cosine_match, [F, pooled, GRID, (9, 9), "max", True]),
        (cpu.cosine_match_backward, [scores, F, pooled, scores, winners, GRID, "max"]),
        (cpu.cosine_match_backward, [scores, F, pooled, scores, winners, GRID, "max", gram]),
        (_cpu_loss, [F, pooled, LABELS, torch.ones(2), GRID, "max", (True, True), 255, 1.0]),
    ]
    survived = 0
    for _ in range(3000):
        call, good = rng.choice(calls)
        args = list(good)
        for i in rng.sample(range(len(args)), rng.choice([1, 1, 2])):
            args[i] = _anything(rng)
        try:
            call(*args)
            survived += 1
        except (TypeError, ValueError, RuntimeError, AttributeError, BufferError, IndexError):
            pass
    assert survived > 10


def test_fuzz_the_binding() -> None:
    """The compiled functions themselves, with capsules of any tensors in any place."""
    from torch.utils.dlpack import to_dlpack

    from lslpn_kernels._backends import native

    module, _ = native.module()
    assert module is not None
    rng = random.Random(2)

    def axes() -> tuple[int, int, int, int, int]:
        if rng.random() < 0.7:
            a = GRID.axis(9, 4)
            return a.pixels, a.cells, a.window, a.step, a.windows
        return tuple(rng.choice([-1, 0, 1, 2, 3, 4, 7, 9, 2**31, 2**62]) for _ in range(5))

    def argument() -> Any:
        value = rng.choice([F, F, M, P, torch.zeros(1, 1, 2, 9, 9), _anything(rng), _anything(rng)])
        if isinstance(value, Tensor) and rng.random() < 0.95:
            try:
                return to_dlpack(value)
            except (RuntimeError, BufferError, ValueError):
                return value
        return value

    names = [name for name in dir(module) if name.startswith("cpu_") and "instruction" not in name]
    arity = {"cpu_masked_average_pool": 9, "cpu_masked_average_pool_backward": 8}
    arity |= {"cpu_cosine_match": 9, "cpu_cosine_match_backward": 12, "cpu_cosine_match_loss": 11}
    assert sorted(names) == sorted(arity)
    built = 0
    for _ in range(6000):
        try:
            geometry = module.Geometry(axes(), axes())
            built += 1
        except (ValueError, TypeError):
            continue
        name = rng.choice(names)
        args = [argument() for _ in range(arity[name])]
        if rng.random() < 0.9:
            args[-1] = rng.choice([1, 2, -5, 10**6])
            args[0] = geometry
        flags = {
            "cpu_masked_average_pool": 4,
            "cpu_cosine_match": 3,
            "cpu_cosine_match_backward": 6,
            "cpu_cosine_match_loss": 5,
        }
        if "loss" in name and rng.random() < 0.9:
            args[3] = to_dlpack(rng.choice([LABELS, LABELS.byte(), LABELS + 1]))
            args[8] = rng.choice([255, 0, -(2**31), 2**40])
        if "match" in name and rng.random() < 0.9:
            args[-2] = rng.choice([1.0, 20.0, -3.0, 0.0, math.nan])
        if name in flags and rng.random() < 0.9:
            args[flags[name]] = rng.choice([True, False, 0.0, 3.0])
        if "pool" in name and rng.random() < 0.9:
            args[3] = rng.choice([-1, 0, 1, 2, 3, 2**62])  # C; the masks may be a label map
        with contextlib.suppress(ValueError, TypeError):
            getattr(module, name)(*args)
    assert built > 1000


def test_capsules_are_read_once_and_fully_checked() -> None:
    from torch.utils.dlpack import from_dlpack, to_dlpack

    from lslpn_kernels._backends import native

    module, _ = native.module()
    assert module is not None
    a = GRID.axis(9, 4)
    axis = (a.pixels, a.cells, a.window, a.step, a.windows)
    geometry = module.Geometry(axis, axis)
    scores = torch.zeros(1, 1, 2, 9, 9)

    def match(**changed: Tensor) -> None:
        tensors = {"features": F, "prototypes": P, "scores": scores} | changed
        f, p, s = (to_dlpack(t) for t in tensors.values())
        module.cpu_cosine_match(geometry, f, p, False, s, None, None, 1.0, 1)

    match()
    for bad, text in [
        ({"scores": torch.zeros(1, 1, 2, 9, 8)}, "scores must have length 9"),
        ({"scores": torch.zeros(1, 1, 2, 9, 18)[..., ::2]}, "scores must be contiguous"),
        ({"prototypes": P[:, :, :-1]}, "prototypes must have length"),
        ({"features": F[..., :3]}, "features must have length"),
        ({"features": F[0]}, "features must have 5 dimensions"),
    ]:
        with pytest.raises(ValueError, match=text):
            match(**bad)
    with pytest.raises(TypeError, match="scores has an unexpected dtype"):
        match(scores=scores.double())
    used = to_dlpack(F)
    from_dlpack(used)
    with pytest.raises(TypeError, match="must be a DLPack capsule that was not used before"):
        module.cpu_cosine_match(
            geometry, used, to_dlpack(P), False, to_dlpack(scores), None, None, 1.0, 1
        )
    overlapping = F[..., :1].expand(-1, -1, -1, -1, 4)
    tensors = (torch.zeros_like(P), M, torch.zeros(1, 1, 2, *GRID.shape(9, 9)), overlapping)
    capsules = [to_dlpack(t) for t in tensors]
    with pytest.raises(ValueError, match="grad_features must not overlap itself"):
        module.cpu_masked_average_pool_backward(
            geometry, *capsules[:2], 2, capsules[2], None, capsules[3], 1
        )
