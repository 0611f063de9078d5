"""The two operators: checks, choice of backend, and the bridge to autograd and `torch.compile`.

The plain backends are called as they are. A kernel backend is called through operators registered
with PyTorch, `lslpn_kernels::<name>` and `lslpn_kernels::<name>_backward`: while a graph is traced,
under `torch.func`, with tensor subclasses. In eager mode the kernel is called directly, under a
`torch.autograd.Function` with the same backward pass: going through PyTorch's dispatcher takes
longer than many of the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, reference
from .backends import PLAIN, Kernels, choose, load, torch_, winner_dtype
from .checks import windows
from .geometry import GridSpec
from .reference import accumulation_dtype

_PLAIN = {"reference": reference, "torch": torch_}
assert tuple(_PLAIN) == PLAIN


def masked_average_pool(
    features: Tensor,
    masks: Tensor,
    grid: GridSpec,
    min_pixels: float = 0,
    backend: str = "auto",
) -> Tensor:
    """Local prototypes: the mean feature under each class mask in each window, equation (1).

    For class c and window m, ``1/K sum_i (sum_x M_i(x) Up F_i(x)) / (sum_x M_i(x))`` over the
    pixels x of the window, where Up interpolates the features to the size of the masks. A
    support image with ``sum_x M_i(x) <= min_pixels`` in the window counts as zero.

    Equivalent to::

        up = F.interpolate(features.flatten(0, 1), (H, W), mode="bilinear").unflatten(0, (B, K))
        for c, y, x in windows:                                  # y, x: slices
            M = masks[:, :, None, c, y, x]                       # [B, K, 1, k, k]
            n = M.sum((-2, -1))
            mean = (up[..., y, x] * M).sum((-2, -1)) / n         # 0 where n <= min_pixels
            prototypes[:, c, gy, gx] = mean.mean(1)

    Args:
        features: support features [B, K, D, h, w]; float64, float32, float16 or bfloat16, in any
            layout (channels_last is not copied).
        masks: support masks [B, K, C, H, W] at image resolution, class 0 the background; bool,
            uint8 or floating (soft masks weigh their pixels).
        grid: the windows.
        min_pixels: windows with a mask sum of no more than this give a zero prototype. The paper
            has 0, the published code 10.
        backend: "auto" (the fastest that can run on the tensors' device), "reference", "torch",
            "cpu", "triton" or "cuda".

    Returns:
        prototypes [B, C, Gy, Gx, D], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for cannot run here.
    """
    eager = _is_eager(features, masks)
    key = _key(features, masks, grid, min_pixels) if eager else None
    if key is None or key not in _passed:
        checks.masked_average_pool(features, masks, grid, min_pixels)
        _remember(key)
    backend = _chosen(backend, features)
    if backend in _PLAIN:
        return _PLAIN[backend].masked_average_pool(features, masks, grid, min_pixels)
    if masks.dtype not in (torch.bool, torch.uint8):
        masks = masks.to(accumulation_dtype(features.dtype))
    call: Any = _pool
    if not eager:
        call = _outside_eager(torch.ops.lslpn_kernels.masked_average_pool, _TransformedPool)
    elif features.requires_grad and torch.is_grad_enabled():
        call = _MaskedAveragePool.apply
    return call(features, masks, grid.scale, grid.spacing, float(min_pixels), backend)[0]


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str = "max",
    backend: str = "auto",
    factor: float = 1.0,
) -> Tensor:
    """The best cosine of each query pixel with the prototypes of the windows over it, eq. (3).

    ``S_c(x) = max over windows m that cover x of cos(Up F(x), p_{c,m})``, where Up interpolates
    the features to `size`. A zero prototype scores exactly 0, and so does a feature shorter than
    1e-8, which gets no gradient. Of equal cosines the window of lowest index wins; the winner
    alone gets the gradient.

    Equivalent to::

        up = F.interpolate(features.flatten(0, 1), size, mode="bilinear").unflatten(0, (B, Q))
        scores = torch.full((B, Q, C, H, W), -inf)
        for c, y, x in windows:                                  # y, x: slices
            p = prototypes[:, None, c, gy, gx, :, None, None]    # [B, 1, D, 1, 1]
            cosine = F.cosine_similarity(up[..., y, x], p, dim=2)
            scores[:, :, c, y, x] = torch.maximum(scores[:, :, c, y, x], cosine)
        scores = factor * scores

    Args:
        features: query features [B, Q, D, h, w]; float64, float32, float16 or bfloat16, in any
            layout (channels_last is not copied).
        prototypes: [B, C, Gy, Gx, D] as `masked_average_pool` gives them for `grid` and `size`.
        grid: the windows.
        size: (H, W), the image resolution to score at.
        reduce: "max" as in the paper, or "mean" over the windows of a pixel.
        backend: as in `masked_average_pool`.
        factor: on the cosines, for logits; at no cost in kernels.

    Returns:
        cosines, times `factor`, [B, Q, C, H, W], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for cannot run here.
    """
    eager = _is_eager(features, prototypes)
    pair = type(size) in (tuple, torch.Size)
    key = _key(features, prototypes, grid, reduce, factor, *size) if eager and pair else None
    if key is None or key not in _passed:
        checks.cosine_match(features, prototypes, grid, size, reduce, factor)
        _remember(key)
    backend = _chosen(backend, features)
    H, W = size
    factor = float(factor)
    if backend in _PLAIN:
        scores = _PLAIN[backend].cosine_match(features, prototypes, grid, (H, W), reduce)
        return scores if factor == 1 else factor * scores
    prototypes = prototypes.to(accumulation_dtype(features.dtype)).contiguous()
    eager = _is_eager(features, prototypes)
    trained = torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad)
    call: Any = _match
    if not eager:
        call = _outside_eager(torch.ops.lslpn_kernels.cosine_match, _TransformedMatch)
        trained = True  # torch.func may know what the tensors do not
    elif trained:
        call = _CosineMatch.apply
    # A kernel finds the cosines in what it has written, which takes a factor to divide by.
    inside = factor if abs(factor) > 1e-6 else 1.0
    geometry = (grid.scale, grid.spacing, H, W)
    scores = call(features, prototypes, *geometry, reduce, trained, inside, backend)[0]
    return scores if inside == factor else factor * scores


_ORDINARY = (Tensor, torch.nn.Parameter)


def _is_eager(a: Any, b: Any) -> bool:
    """Whether these are ordinary tensors with memory of their own, and nobody is watching: no
    trace, no `torch.func` transform, no dispatch mode.

    Raises:
        RuntimeError: one carries a forward-mode derivative, which would be lost in a kernel.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(a, b)
    return (
        type(a) in _ORDINARY
        and type(b) in _ORDINARY
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not (a.is_nested or b.is_nested)
        and not (a.is_neg() or b.is_neg())
    )


def _refuse_tangents(*values: Any) -> None:
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "the kernels of lslpn_kernels have no forward-mode derivative (jvp); "
                'backend="torch" and backend="reference" have one'
            )


def _outside_eager(operator: Any, transformed: type[torch.autograd.Function]) -> Any:
    """The operator, or what stands for it under `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return operator.default
    return transformed.apply


# What has passed the checks before, for they take as long as a small kernel.
_passed: set[tuple[Any, ...]] = set()


def _key(a: Tensor, b: Tensor, *settings: Any) -> tuple[Any, ...] | None:
    """All that the checks look at; None where it cannot be a key."""
    key = (
        *(a.shape, a.dtype, a.device, a.layout),
        *(b.shape, b.dtype, b.device, b.layout, b.requires_grad),
        *settings,
        *map(type, settings),  # for 1 == True
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _remember(key: tuple[Any, ...] | None) -> None:
    if key is not None:
        if len(_passed) >= 1024:
            _passed.clear()
        _passed.add(key)


def _chosen(backend: str, features: Tensor) -> str:
    if torch.compiler.is_compiling():
        return _choose_constant(backend, features.device, features.dtype)
    if type(backend) is not str:
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    return _choose_once(backend, features.device, features.dtype)


_choose_once = lru_cache(maxsize=64)(choose)
_choose_constant = torch.compiler.assume_constant_result(choose)


@lru_cache(maxsize=64)
def _kernels(backend: str) -> Kernels:
    module, reason = load(backend)
    if module is None:
        raise RuntimeError(f'backend="{backend}" is not usable: {reason}')
    return module


# ---- the registered operators: geometry travels as plain numbers, so that graphs can hold it ----

_library = torch.library.Library("lslpn_kernels", "DEF")
_grid = lru_cache(maxsize=64)(GridSpec)


def _register(schema: str) -> Any:
    """Defines an operator; the function below it is its kernel on every device."""

    def register(function: Any) -> Any:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


def _register_fake(name: str) -> Any:
    return torch.library.register_fake(f"lslpn_kernels::{name}", lib=_library)


@_register(
    "masked_average_pool(Tensor features, Tensor masks, float scale, float spacing, "
    "float min_pixels, str backend) -> (Tensor prototypes, Tensor factor)"
)
def _pool(
    features: Tensor, masks: Tensor, scale: float, spacing: float, min_pixels: float, backend: str
) -> tuple[Tensor, Tensor]:
    grid = _grid(scale, spacing)
    return _kernels(backend).masked_average_pool(features, masks.contiguous(), grid, min_pixels)


@_register_fake("masked_average_pool")
def _(
    features: Tensor, masks: Tensor, scale: float, spacing: float, min_pixels: float, backend: str
) -> tuple[Tensor, Tensor]:
    B, K, D = features.shape[:3]
    C, H, W = masks.shape[2:]
    grid = GridSpec(scale, spacing)
    Gy, Gx = windows(grid, H), windows(grid, W)
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty((B, C, Gy, Gx, D), dtype=dtype),
        features.new_empty((B, K, C, Gy, Gx), dtype=dtype),
    )


@_register(
    "masked_average_pool_backward(Tensor grad, Tensor masks, Tensor factor, Tensor features, "
    "float scale, float spacing, str backend) -> Tensor"
)
def _pool_backward(
    grad: Tensor,
    masks: Tensor,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
) -> Tensor:
    grid = _grid(scale, spacing)
    return _kernels(backend).masked_average_pool_backward(
        grad.contiguous(), masks.contiguous(), factor.contiguous(), features, grid
    )


@_register_fake("masked_average_pool_backward")
def _(
    grad: Tensor,
    masks: Tensor,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(features)


@_register(
    "cosine_match(Tensor features, Tensor prototypes, float scale, float spacing, SymInt H, "
    "SymInt W, str reduce, bool winners, float factor, str backend) "
    "-> (Tensor scores, Tensor winners, Tensor gram)"
)
def _match(
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    winners: bool,
    factor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = _grid(scale, spacing)
    prototypes = prototypes.contiguous()
    scores, best, *gram = _kernels(backend).cosine_match(
        features, prototypes, grid, (H, W), reduce, winners, factor=factor
    )
    return scores, best, gram[0] if gram else scores.new_empty(0)


@_register_fake("cosine_match")
def _(
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    winners: bool,
    factor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, Q, _, h, w = features.shape
    shape = (B, Q, prototypes.shape[1], H, W)
    kept = shape if winners and reduce == "max" else (0,)
    maps = getattr(_kernels(backend), "GRAM_MAPS", 0) if winners else 0
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(shape, dtype=dtype),
        features.new_empty(kept, dtype=winner_dtype(GridSpec(scale, spacing), (H, W))),
        features.new_empty((B, Q, maps, h, w) if maps else (0,), dtype=dtype),
    )


@_register(
    "cosine_match_backward(Tensor grad, Tensor features, Tensor prototypes, Tensor scores, "
    "Tensor winners, Tensor gram, float scale, float spacing, str reduce, float factor, "
    "str backend, bool[2] wanted) -> (Tensor, Tensor)"
)
def _match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    scale: float,
    spacing: float,
    reduce: str,
    factor: float,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(backend)
    kept = (gram.contiguous(),) if gram.numel() else ()
    choice = {"wanted": (wanted[0], wanted[1])} if getattr(kernels, "SELECTIVE", False) else {}
    grads = kernels.cosine_match_backward(
        grad.contiguous(),
        features,
        prototypes.contiguous(),
        scores.contiguous(),
        winners.contiguous(),
        _grid(scale, spacing),
        reduce,
        *kept,
        factor=factor,
        **choice,
    )
    first, second = (g if w else g.new_empty(0) for g, w in zip(grads, wanted, strict=True))
    return first, second


@_register_fake("cosine_match_backward")
def _(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    scale: float,
    spacing: float,
    reduce: str,
    factor: float,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features) if wanted[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if wanted[1] else (0,)),
    )


# ---- torch.func.vmap: every tensor has the episodes B first, so a batch of calls is one call ----


def _register_vmap(name: str) -> None:
    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        n = info.batch_size

        def merge(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            moved = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
            return moved.flatten(0, 1)

        def split(value: Tensor) -> Tensor:
            # What is kept for the backward pass may be empty: [0].
            return value.unflatten(0, (n, -1)) if value.numel() else value.new_empty(n, 0)

        out = getattr(torch.ops.lslpn_kernels, name).default(*map(merge, args, in_dims))
        if isinstance(out, Tensor):
            return split(out), 0
        return tuple(map(split, out)), (0,) * len(out)

    torch.library.register_vmap(f"lslpn_kernels::{name}", rule, lib=_library)


_register_vmap("masked_average_pool")
_register_vmap("masked_average_pool_backward")
_register_vmap("cosine_match")
_register_vmap("cosine_match_backward")


# ---- autograd: for the operators and, around the kernels themselves, for eager mode --------------


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, masks, scale, spacing, _, backend = inputs
    _, factor = output
    ctx.mark_non_differentiable(factor)
    ctx.set_materialize_grads(False)
    # The pooling is linear in the features: only their shape and layout are of use.
    ctx.save_for_backward(masks, factor, features)
    ctx.settings = (scale, spacing, backend)


def _pool_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    masks, factor, features = ctx.saved_tensors
    call = _pool_backward
    if not _is_eager(grad, features):
        call = torch.ops.lslpn_kernels.masked_average_pool_backward.default
    grad_features = call(grad, masks, factor, features, *ctx.settings)
    if _may_differentiate():
        grad_features, _ = _Final.apply("masked_average_pool", grad_features, None, grad)
    return grad_features, None, None, None, None, None


def _keep_match(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, prototypes, scale, spacing, _, _, reduce, _, factor, backend = inputs
    _, winners, gram = output
    ctx.mark_non_differentiable(winners, gram)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, prototypes, *output)
    ctx.settings = (scale, spacing, reduce, factor, backend)


def _match_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    features, prototypes = saved[:2]
    wanted = ctx.needs_input_grad[:2]
    call = _match_backward
    if not _is_eager(grad, features):
        call = torch.ops.lslpn_kernels.cosine_match_backward.default
    grads = call(grad, *saved, *ctx.settings, wanted)
    if _may_differentiate():
        grads = _Final.apply("cosine_match", *grads, grad, features, prototypes)
    first, second = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return first, second, *(None,) * 8


torch.library.register_autograd(
    "lslpn_kernels::masked_average_pool", _pool_gradients, setup_context=_keep_pool, lib=_library
)
torch.library.register_autograd(
    "lslpn_kernels::cosine_match", _match_gradients, setup_context=_keep_match, lib=_library
)


class _MaskedAveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        args = (features, masks.contiguous(), *args)  # the copy, if any, is kept
        output = _pool(*args)
        _keep_pool(ctx, args, output)
        return output

    backward = staticmethod(_pool_gradients)


class _CosineMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = (features, prototypes.contiguous(), *args)
        output = _match(*args)
        _keep_match(ctx, args, output)
        return output

    backward = staticmethod(_match_gradients)


class _TransformedPool(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(torch.ops.lslpn_kernels.masked_average_pool.default)
    setup_context = staticmethod(_keep_pool)
    backward = staticmethod(_pool_gradients)


class _TransformedMatch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(torch.ops.lslpn_kernels.cosine_match.default)
    setup_context = staticmethod(_keep_match)
    backward = staticmethod(_match_gradients)


def _may_differentiate() -> bool:
    """Whether gradients are asked for that can themselves be differentiated."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


class _Final(torch.autograd.Function):
    """Hands gradients on as they are and refuses to be differentiated, so that a second derivative
    is an error rather than silently zero. `sources` are what the gradients depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str, first: Tensor, second: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return first.view_as(first), None if second is None else second.view_as(second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"lslpn_kernels.{ctx.name} has no second derivative; "
            'backend="torch" and backend="reference" have one'
        )
