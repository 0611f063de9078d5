"""The kernel backends as differentiable operators.

In eager mode `pool` and `match` call a kernel directly, in a `torch.autograd.Function`, because
PyTorch's dispatcher takes longer than many of the kernels. While a graph is traced, under
`torch.func` and for tensor subclasses they call operators registered with PyTorch,
`lslpn_kernels::<name>`, with the same backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import windows
from ._backends import winner_dtype
from ._operators import (
    Final,
    grid_of,
    kernels_of,
    library,
    may_differentiate,
    only,
    register,
    register_fake,
    register_vmap,
)
from ._torch_internals import in_transform, is_eager, refuse_tangents
from .geometry import GridSpec
from .reference import accumulation_dtype


def pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float, backend: str
) -> Tensor:
    """Prototypes by the kernels of `backend`; `masks` as in `_backends.Kernels`."""
    refuse_tangents(features)
    call: Any = _pool
    if not is_eager(features, masks):
        call = _outside_eager(torch.ops.lslpn_kernels.masked_average_pool, _TransformedPool)
    elif features.requires_grad and torch.is_grad_enabled():
        call = _MaskedAveragePool.apply
    prototypes: Tensor = call(
        features, masks, C, grid.scale, grid.spacing, float(min_pixels), backend
    )[0]
    return prototypes


def match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """Cosines times `logit_scale`, by the kernels of `backend`."""
    refuse_tangents(features, prototypes)
    call: Any = _match
    trained = torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad)
    if not is_eager(features, prototypes):
        call = _outside_eager(torch.ops.lslpn_kernels.cosine_match, _TransformedMatch)
        trained = True  # under torch.func, requires_grad does not tell
    elif trained:
        call = _CosineMatch.apply
    # The backward kernels divide the saved scores by the scale to recover the cosines.
    inside = logit_scale if abs(logit_scale) > 1e-6 else 1.0
    geometry = (grid.scale, grid.spacing, *size)
    scores: Tensor = call(features, prototypes, *geometry, reduce, trained, inside, backend)[0]
    return scores if inside == logit_scale else logit_scale * scores


def _outside_eager(operator: Any, transformed: type[torch.autograd.Function]) -> Any:
    """The operator, or its equivalent under `torch.func`."""
    if torch.compiler.is_compiling() or not in_transform():
        return operator.default
    return transformed.apply


# ---- registered operators: geometry is passed as plain numbers, so that graphs can hold it ----


@register(
    "masked_average_pool(Tensor features, Tensor masks, SymInt C, float scale, float spacing, "
    "float min_pixels, str backend) -> (Tensor prototypes, Tensor factor)"
)
def _pool(*args: Any) -> tuple[Tensor, Tensor]:
    prototypes, factor, *_ = _pool_and_keep(*args)
    return prototypes, factor


def _pool_and_keep(
    features: Tensor,
    masks: Tensor,
    C: int,
    scale: float,
    spacing: float,
    min_pixels: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """The kernel's results, including the tensors that it saves only for the eager backward pass,
    whose shapes a graph could not know."""
    if features.numel() == 0:
        return _empty_pool(features, masks, C, scale, spacing, min_pixels, backend)
    kernels = kernels_of(backend, features.device)
    grid = grid_of(scale, spacing)
    return kernels.masked_average_pool(features, masks.contiguous(), C, grid, min_pixels)


@register_fake("masked_average_pool")
def _empty_pool(
    features: Tensor,
    masks: Tensor,
    C: int,
    scale: float,
    spacing: float,
    min_pixels: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, K, D = features.shape[:3]
    H, W = masks.shape[-2:]
    grid = GridSpec(scale, spacing)
    Gy, Gx = windows(grid, H), windows(grid, W)
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty((B, C, Gy, Gx, D), dtype=dtype),
        features.new_empty((B, K, C, Gy, Gx), dtype=dtype),
    )


@register(
    "masked_average_pool_backward(Tensor grad, Tensor masks, SymInt C, Tensor factor, "
    "Tensor features, float scale, float spacing, str backend) -> Tensor"
)
def _pool_backward(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
    *kept: Tensor,
) -> Tensor:
    if features.numel() == 0:
        return torch.empty_like(features)
    kernels, grid = kernels_of(backend, features.device), grid_of(scale, spacing)
    return kernels.masked_average_pool_backward(
        grad.contiguous(), masks.contiguous(), C, factor.contiguous(), features, grid, *kept
    )


@register_fake("masked_average_pool_backward")
def _(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(features)


@register(
    "cosine_match(Tensor features, Tensor prototypes, float scale, float spacing, SymInt H, "
    "SymInt W, str reduce, bool winners, float logit_scale, str backend) "
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
    logit_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if features.numel() == 0:
        return _empty_match(
            *(features, prototypes, scale, spacing, H, W, reduce, winners, logit_scale, backend)
        )
    scores, best, *gram = kernels_of(backend, features.device).cosine_match(
        *(features, prototypes.contiguous(), grid_of(scale, spacing), (H, W), reduce, winners),
        logit_scale=logit_scale,
    )
    return scores, best, gram[0] if gram else scores.new_empty(0)


@register_fake("cosine_match")
def _empty_match(
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
    maps = getattr(kernels_of(backend, features.device), "GRAM_MAPS", 0) if winners else 0
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(shape, dtype=dtype),
        features.new_empty(kept, dtype=winner_dtype(GridSpec(scale, spacing))),
        features.new_empty((B, Q, maps, h, w) if maps else (0,), dtype=dtype),
    )


@register(
    "cosine_match_backward(Tensor grad, Tensor features, Tensor prototypes, Tensor scores, "
    "Tensor winners, Tensor gram, float scale, float spacing, str reduce, float logit_scale, "
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
    logit_scale: float,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if features.numel() == 0:
        return only(wanted, (torch.empty_like(features), torch.zeros_like(prototypes)))
    kernels = kernels_of(backend, features.device)
    kept = (gram.contiguous(),) if gram.numel() else ()
    choice = {"wanted": (wanted[0], wanted[1])} if getattr(kernels, "SELECTIVE", False) else {}
    grads = kernels.cosine_match_backward(
        grad.contiguous(),
        features,
        prototypes.contiguous(),
        scores.contiguous(),
        winners.contiguous(),
        grid_of(scale, spacing),
        reduce,
        *kept,
        logit_scale=logit_scale,
        **choice,
    )
    return only(wanted, grads)


@register_fake("cosine_match_backward")
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


register_vmap("masked_average_pool")
register_vmap("masked_average_pool_backward")
register_vmap("cosine_match")
register_vmap("cosine_match_backward")


# ---- autograd: for the operators and, around the kernels themselves, for eager mode --------------


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, masks, C, scale, spacing, _, backend = inputs
    _, factor, *kept = output
    ctx.mark_non_differentiable(factor)
    ctx.set_materialize_grads(False)
    # Pooling is linear in the features: only their shape and layout are used.
    ctx.save_for_backward(masks, factor, features, *kept)
    ctx.classes = C
    ctx.settings = (scale, spacing, backend)


def _pool_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    masks, factor, features, *kept = ctx.saved_tensors
    call = _pool_backward
    if not is_eager(grad, features):
        call, kept = torch.ops.lslpn_kernels.masked_average_pool_backward.default, []
    grad_features = call(grad, masks, ctx.classes, factor, features, *ctx.settings, *kept)
    if may_differentiate():
        grad_features, _ = Final.apply("masked_average_pool", grad_features, None, grad)
    return grad_features, *(None,) * 6


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
    saved = ctx.saved_tensors  # once: activation checkpointing permits no second access
    features, prototypes = saved[:2]
    wanted = ctx.needs_input_grad[:2]
    call = _match_backward
    if not is_eager(grad, features):
        call = torch.ops.lslpn_kernels.cosine_match_backward.default
    grads = call(grad, *saved, *ctx.settings, wanted)
    if may_differentiate():
        grads = Final.apply("cosine_match", *grads, grad, features, prototypes)
    first, second = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return first, second, *(None,) * 8


torch.library.register_autograd(
    "lslpn_kernels::masked_average_pool", _pool_gradients, setup_context=_keep_pool, lib=library
)
torch.library.register_autograd(
    "lslpn_kernels::cosine_match", _match_gradients, setup_context=_keep_match, lib=library
)


class _MaskedAveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        args = (features, masks.contiguous(), *args)  # saves the copy, if one is made
        output = _pool_and_keep(*args)
        _keep_pool(ctx, args, output)
        return output[0], output[1]

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
