"""`cosine_match_loss` and `LocalPrototypeHead.loss`: cross-entropy in a pass that writes no logits.

The oracle is F.cross_entropy of the reference's logits in float64. What every backend can do with
the loss is a row of test_backends.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SITUATIONS, Case
from torch import Tensor

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    backends,
    cosine_match,
    cosine_match_loss,
    masked_average_pool,
)
from lslpn_kernels._backends import cpu

_usable = backends()["cpu"].usable
SETS = cpu._native.cpu_instruction_sets() if _usable else []
pytestmark = pytest.mark.skipif(not _usable, reason=backends()["cpu"].reason)
LARGE = Case(K=1, D=40, h=17, w=19, H=130, W=147, grid=GridSpec(1 / 8, 1 / 2))
CASES = {
    **SITUATIONS,
    "three_classes": Case(C=3),
    "no_weights": Case(C=3, seed=1),
    "several_tiles": LARGE,
    "more_windows_than_registers": Case(H=40, W=40, C=3, grid=GridSpec(1 / 2, 1 / 6)),
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if SETS:
        cpu._native.cpu_use_instruction_set(SETS[-1])


def drawn(
    case: Case, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query features, prototypes, labels with some that are ignored, and weights."""
    support, masks, query, _ = case.draw(dtype, rounded)
    generator = torch.Generator().manual_seed(case.seed + 1)
    prototypes = masked_average_pool(support.double(), masks, case.grid, case.min_pixels, "torch")
    # No two windows are equal, or rounding would choose between them.
    prototypes *= 1 + 0.1 * torch.randn(prototypes.shape, generator=generator, dtype=torch.float64)
    prototypes = prototypes.to(torch.float64 if dtype == torch.float64 else torch.float32)
    labels = torch.randint(0, case.C, (case.B, case.Q, case.H, case.W), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    labels[0, 0, 0, 0] = 0  # one counts, at least
    weight = 0.5 + torch.rand(case.C, generator=generator, dtype=torch.float64)
    return query.requires_grad_(), prototypes.requires_grad_(), labels, weight


def results(case: Case, backend: str, inputs: Any, factor: float = 1.0, **options: Any) -> Any:
    """The loss, and its gradients of features and prototypes."""
    query, prototypes, labels, weight = inputs
    loss = cosine_match_loss(
        *(query, prototypes, labels, case.grid, case.reduce, backend, 20.0),
        weight=weight,
        **options,
    )
    return loss.detach(), *torch.autograd.grad(factor * loss, (query, prototypes))


def in_two(case: Case, inputs: Any) -> Any:
    """As `results`, by the scores of the same kernels: where the scores of two windows agree to
    rounding, the same one wins."""
    query, prototypes, labels, weight = inputs
    size = (case.H, case.W)
    logits = cosine_match(query, prototypes, case.grid, size, case.reduce, "cpu", 20.0)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), weight, ignore_index=255)
    return loss.detach(), *torch.autograd.grad(loss, (query, prototypes))


def expected(case: Case, inputs: Any, **options: Any) -> Any:
    """As `results`, in float64 by the equations, or for many windows by what was compared with them
    elsewhere."""
    oracle = "torch" if case.H >= LARGE.H else "reference"
    query, prototypes = (t.detach().double().requires_grad_() for t in inputs[:2])
    logits = cosine_match(
        query, prototypes, case.grid, inputs[2].shape[2:], case.reduce, oracle, 20.0
    )
    weight = None if inputs[3] is None else inputs[3].double()
    options = {"ignore_index": 255, **options}
    loss = F.cross_entropy(logits.flatten(0, 1), inputs[2].flatten(0, 1).long(), weight, **options)
    return loss.detach(), *torch.autograd.grad(loss, (query, prototypes))


def close(actual: Any, wanted: Any, tolerance: float) -> None:
    for a, w in zip(actual, wanted, strict=True):
        rounding = torch.finfo(a.dtype).eps if a.dtype in (torch.float16, torch.bfloat16) else 0
        most = (tolerance + rounding) * w.abs().max().clamp_min(1e-12)
        difference = (a.double() - w).abs().max()
        assert difference <= most, f"{difference:.2e} of at most {most:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_cross_entropy_of_the_equations(name: str) -> None:
    case = CASES[name]
    inputs = drawn(case)
    if case.seed % 2:
        inputs = *inputs[:3], None
    wanted = expected(case, inputs)
    for isa in SETS:
        cpu._native.cpu_use_instruction_set(isa)
        close(results(case, "cpu", inputs), wanted, 1e-10)
    close(results(case, "torch", inputs), wanted, 1e-10)


@pytest.mark.parametrize("C", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype, C: int) -> None:
    case = replace(LARGE, C=C, B=2, Q=2, kind="positive")
    inputs = drawn(case, dtype)
    loss = expected(case, inputs)[:1]
    for isa in SETS:
        cpu._native.cpu_use_instruction_set(isa)
        found = results(case, "cpu", inputs)
        assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
        close(found[:1], loss, 2e-6)
        close(found, [t.double() for t in in_two(case, inputs)], 1e-5)


def test_logits_far_from_and_near_the_right_class() -> None:
    """Logits of +-2000: the loss stays exact where every probability rounds to 0 or 1."""
    case = Case(D=8, kind="positive")
    query, prototypes, labels, weight = drawn(case, torch.float32)
    for scale in (100.0, 2000.0, -30.0, 1e-3):

        def loss(backend: str, dtype: torch.dtype, scale: float = scale) -> Any:
            leaves = [t.detach().to(dtype).requires_grad_() for t in (query, prototypes)]
            found = cosine_match_loss(
                *(*leaves, labels, case.grid, "max", backend, scale), weight=weight
            )
            return found.detach(), *torch.autograd.grad(found, leaves)

        close(loss("cpu", torch.float32), loss("reference", torch.float64), 2e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16], ids=str)
def test_labels_of_any_integer_dtype_give_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(C=3)
    query, prototypes, labels, weight = drawn(case, torch.float32)
    labels = labels.where(labels != 255, 7)
    wanted = results(case, "cpu", (query, prototypes, labels, weight), ignore_index=7)
    turned = labels.to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    found = results(case, "cpu", (query, prototypes, turned, weight), ignore_index=7)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("ignore_index", [-100, 0, 255, 1000])
def test_ignore_index_anywhere(ignore_index: int) -> None:
    case = Case(C=3)
    query, prototypes, labels, weight = drawn(case)
    labels = labels.where(labels != 255, ignore_index)
    inputs = query, prototypes, labels, weight
    wanted = expected(case, inputs, ignore_index=ignore_index)
    close(results(case, "cpu", inputs, ignore_index=ignore_index), wanted, 1e-10)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_nothing_counts(backend: str) -> None:
    """NaN, as F.cross_entropy has it, and gradients of zero: nothing is learnt from no pixel."""
    case = Case(C=3)
    query, prototypes, labels, weight = drawn(case, torch.float32)
    for inputs in ((labels.fill_(255), weight.float()), (labels, None)):
        loss, *grads = results(case, backend, (query, prototypes, *inputs))
        assert loss.isnan()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_label_out_of_range(backend: str) -> None:
    case = Case(C=3)
    query, prototypes, labels, _ = drawn(case, torch.float32)
    for stray in (3, -1, 1 << 40, -(1 << 32)):
        labels[0, 0, -1, -1] = stray
        with pytest.raises(
            ValueError, match=rf"labels must lie in 0 \.\. 2, .*\(255\), got {stray}$"
        ):
            cosine_match_loss(query, prototypes, labels, case.grid, backend=backend)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("C", [2, 3])
def test_not_finite_as_in_cross_entropy(ignored: bool, C: int) -> None:
    """A NaN in a pixel that counts is in the loss, one in a pixel that does not is not."""
    case = Case(C=C, h=21, w=19, D=8)
    query, prototypes, labels, _ = drawn(case, torch.float32)
    with torch.no_grad():
        query[0, 0, 1, 3, 4] = torch.nan
    labels[0, 0, 3, 4] = 255 if ignored else 1
    loss, gradient, _ = results(case, "cpu", (query, prototypes, labels, None))
    wanted = in_two(case, (query, prototypes, labels, None))[0]
    assert loss.isnan() == (not ignored)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    assert gradient[0, 0, :, 3, 4].isnan().all()


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradcheck(reduce: str) -> None:
    case = Case(C=3, D=4, H=9, W=8, h=4, w=3, kind="positive", reduce=reduce)
    query, _, labels, weight = drawn(case)
    generator = torch.Generator().manual_seed(3)
    shape = (1, 3, *case.grid.shape(case.H, case.W), 4)  # none is zero: there is no derivative
    prototypes = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        return cosine_match_loss(
            *(query, prototypes, labels, case.grid, reduce, "cpu", 3.0), weight=weight
        )

    assert torch.autograd.gradcheck(loss, (query, prototypes))
    # Of one of them alone, and of neither.
    both = torch.autograd.grad(loss(query, prototypes), (query, prototypes))
    (first,) = torch.autograd.grad(loss(query, prototypes.detach()), query)
    (second,) = torch.autograd.grad(loss(query.detach(), prototypes), prototypes)
    assert torch.equal(first, both[0])
    assert torch.equal(second, both[1])
    alone = loss(query.detach(), prototypes.detach())
    assert torch.equal(alone, loss(query, prototypes).detach())
    with pytest.raises(RuntimeError, match="cosine_match_loss has no second derivative"):
        torch.autograd.grad(loss(query, prototypes), query, create_graph=True)[0].sum().backward()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    case = replace(LARGE, C=3, B=2, Q=2, D=64)
    inputs = drawn(case, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(case, "cpu", inputs))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_loss_scaled_for_halves_keeps_small_gradients() -> None:
    """As torch.amp.GradScaler has it: what would vanish in float16 is there times 2^16."""
    case = replace(LARGE, kind="positive")
    inputs = drawn(case, torch.float16)
    inputs[0].data.mul_(64)
    query, prototypes = (t.detach().double().requires_grad_() for t in inputs[:2])
    wanted = expected(case, (query, prototypes, *inputs[2:]))
    assert wanted[1].abs().max() < 6e-5  # below the least normal number of float16
    found = results(case, "cpu", inputs, factor=2.0**16)
    close(found[1:], [2.0**16 * w for w in wanted[1:]], 1e-4)


def test_backward_again_and_accumulated() -> None:
    case = Case(C=3)
    query, prototypes, labels, _ = drawn(case, torch.float32)
    loss = cosine_match_loss(query, prototypes, labels, case.grid, backend="cpu")
    first = [g.clone() for g in torch.autograd.grad(loss, (query, prototypes), retain_graph=True)]
    loss.backward(retain_graph=True)
    loss.backward()
    assert query.grad is not None
    torch.testing.assert_close(query.grad, 2 * first[0])
    again = copy.deepcopy(query.grad)
    query.grad.zero_()  # must not be memory of the graph
    cosine_match_loss(query, prototypes, labels, case.grid, backend="cpu").backward()
    torch.testing.assert_close(query.grad, again / 2)


def test_the_head_and_its_autocast() -> None:
    case = Case(C=3, K=2)
    support, masks, query, _ = case.draw(torch.float32)
    labels = drawn(case)[2]
    weight = torch.tensor([0.5, 1.0, 2.0])
    head = LocalPrototypeHead(case.grid, 20.0, backend="cpu")
    leaves = support.requires_grad_(), query.requires_grad_()
    logits = head(support, masks[:, :, 1:], query)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), weight, ignore_index=255)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(support, masks[:, :, 1:], query, labels, weight=weight)
        grads = torch.autograd.grad(found, leaves)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, leaves))
    whole = masks.long().argmax(2)
    again = head.loss(support, whole, query, labels.to(torch.uint8), 255, weight, num_classes=3)
    torch.testing.assert_close(again, wanted)


def test_opcheck() -> None:
    case = Case(C=3, D=4)
    query, prototypes, labels, weight = drawn(case, torch.float32)
    operators = torch.ops.lslpn_kernels
    geometry = (case.grid.scale, case.grid.spacing)
    for given, wanted in ((None, [True, True]), (weight.float(), [True, False])):
        settings = (*geometry, "max", 255, 2.0, "cpu", *wanted)
        second = prototypes if wanted[1] else prototypes.detach()
        arguments = (query, second, labels, given, *settings)
        torch.library.opcheck(operators.cosine_match_loss.default, arguments)
        loss, kept = operators.cosine_match_loss.default(*arguments)
        backward = (
            *(torch.ones_like(loss), [k.detach() for k in kept], query.detach(), second.detach()),
            *(*geometry, case.H, case.W, "max", 2.0, "cpu", wanted),
        )
        torch.library.opcheck(operators.cosine_match_loss_backward.default, backward)


@pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11),
    reason="PyTorch 2.6 fails to solve for such sizes, 2.11 does; between them it was not tried",
)
def test_compiled_for_any_size() -> None:
    """One graph for all sizes."""
    torch.compiler.reset()
    grid = GridSpec(1 / 3, 1 / 2)
    head = LocalPrototypeHead(grid, 5.0, backend="cpu")
    compiled = torch.compile(head.loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in (Case(C=3), Case(C=3, B=2, Q=2, h=6, w=7, H=24, W=31)):
        support, masks, query, _ = case.draw(torch.float32)
        leaves = support.requires_grad_(), query.requires_grad_()
        arguments = (support, masks[:, :, 1:], query, drawn(case)[2])
        wanted, found = head.loss(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves)
        )


def test_traced_and_compiled_for_one_gradient() -> None:
    case = Case(C=3)
    query, prototypes, labels, _ = drawn(case, torch.float32)

    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        return cosine_match_loss(query, prototypes, labels, case.grid, backend="cpu")

    traced = torch.jit.trace(loss, (query.detach(), prototypes.detach()), check_trace=False)
    torch.testing.assert_close(traced(-query, prototypes), loss(-query, prototypes))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for inputs in ((query.detach(), prototypes), (query, prototypes.detach())):
        leaf = next(t for t in inputs if t.requires_grad)
        (found,) = torch.autograd.grad(compiled(*inputs), leaf)
        assert torch.equal(found, torch.autograd.grad(loss(*inputs), leaf)[0])
    batches = [t.detach()[None].repeat(2, 1, 1, 1, 1, 1) for t in (query, prototypes)]
    mapped = torch.compile(torch.func.vmap(loss), fullgraph=True, backend="aot_eager")(*batches)
    torch.testing.assert_close(mapped, loss(query, prototypes).detach().expand(2))


def test_empty_batches() -> None:
    case = Case()
    query, prototypes, labels, _ = drawn(case, torch.float32)
    for of in ((slice(0), slice(None)), (slice(None), slice(0))):
        few = query.detach()[of].requires_grad_()
        loss = cosine_match_loss(few, prototypes[of[0]], labels[of], case.grid, backend="cpu")
        assert loss.isnan()
        loss.backward()
        assert few.grad is not None
        assert few.grad.shape == few.shape


def _wrong() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    labels = torch.zeros(1, 1, 21, 19, dtype=torch.long)
    return {
        "floats": ({"labels": labels.float()}, TypeError, "labels must be integers"),
        "no tensor": ({"labels": [[0]]}, TypeError, r"labels must be a torch\.Tensor"),
        "three axes": ({"labels": labels[0]}, ValueError, r"\[B, Q, H, W\]"),
        "other Q": ({"labels": labels.expand(1, 2, 21, 19)}, ValueError, "as features, 1, got 2"),
        "other B": ({"labels": labels.expand(2, 1, 21, 19)}, ValueError, "as many episodes B"),
        "other size": ({"labels": labels[..., :5]}, ValueError, r"\(Gy, Gx\)"),
        "other C": ({"weight": torch.ones(3)}, ValueError, "weight must have 2 numbers"),
        "integer weight": ({"weight": torch.ones(2).int()}, TypeError, "weight must be float64"),
        "learnt weight": (
            {"weight": torch.ones(2, requires_grad=True)}, ValueError, "pass weight.detach",
        ),
        "ignore half": ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
        "ignore far": ({"ignore_index": 1 << 40}, ValueError, "ignore_index must fit into 32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _wrong())
def test_wrong_arguments(name: str) -> None:
    case = Case()
    query, prototypes, labels, _ = drawn(case, torch.float32)
    changed, error, message = _wrong()[name]
    given: dict[str, Any] = {"labels": labels, **changed}
    for _ in range(2):  # also after a valid call
        with pytest.raises(error, match=message):
            cosine_match_loss(query, prototypes, given.pop("labels"), case.grid, **given)
        given = {"labels": labels, **changed}
        cosine_match_loss(query, prototypes, labels, case.grid)
