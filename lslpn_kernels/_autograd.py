"""The kernel backends as differentiable operators.

`pool` and `match` call a kernel. In eager mode they do so directly, under a
`torch.autograd.Function`: going through PyTorch's dispatcher takes longer than many of the kernels
do. While a graph is traced, under `torch.func` and with tensor subclasses they call operators
registered with PyTorch, `lslpn_kernels::<name>`, with the same backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._arguments import windows
from ._backends import Kernels, load, winner_dtype
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
        trained = True  # torch.func may know what the tensors do not
    elif trained:
        call = _CosineMatch.apply
    # A kernel finds the cosines in what it has written, which takes a scale to divide by.
    inside = logit_scale if abs(logit_scale) > 1e-6 else 1.0
    geometry = (grid.scale, grid.spacing, *size)
    scores: Tensor = call(features, prototypes, *geometry, reduce, trained, inside, backend)[0]
    return scores if inside == logit_scale else logit_scale * scores


def _outside_eager(operator: Any, transformed: type[torch.autograd.Function]) -> Any:
    """The operator, or what stands for it under `torch.func`."""
    if torch.compiler.is_compiling() or not in_transform():
        return operator.default
    return transformed.apply


@lru_cache(maxsize=64)
def _kernels(backend: str, device: torch.device) -> Kernels:
    module, reason = load(backend, device)
    if module is None:
        raise RuntimeError(f'backend="{backend}" {reason}')
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
    "masked_average_pool(Tensor features, Tensor masks, SymInt C, float scale, float spacing, "
    "float min_pixels, str backend) -> (Tensor prototypes, Tensor factor)"
)
def _pool(
    features: Tensor,
    masks: Tensor,
    C: int,
    scale: float,
    spacing: float,
    min_pixels: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if features.numel() == 0:
        return _empty_pool(features, masks, C, scale, spacing, min_pixels, backend)
    kernels = _kernels(backend, features.device)
    grid = _grid(scale, spacing)
    return kernels.masked_average_pool(features, masks.contiguous(), C, grid, min_pixels)


@_register_fake("masked_average_pool")
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


@_register(
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
) -> Tensor:
    if features.numel() == 0:
        return torch.empty_like(features)
    return _kernels(backend, features.device).masked_average_pool_backward(
        *(grad.contiguous(), masks.contiguous(), C, factor.contiguous(), features),
        _grid(scale, spacing),
    )


@_register_fake("masked_average_pool_backward")
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


@_register(
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
    scores, best, *gram = _kernels(backend, features.device).cosine_match(
        *(features, prototypes.contiguous(), _grid(scale, spacing), (H, W), reduce, winners),
        logit_scale=logit_scale,
    )
    return scores, best, gram[0] if gram else scores.new_empty(0)


@_register_fake("cosine_match")
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
    maps = getattr(_kernels(backend, features.device), "GRAM_MAPS", 0) if winners else 0
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(shape, dtype=dtype),
        features.new_empty(kept, dtype=winner_dtype(GridSpec(scale, spacing), (H, W))),
        features.new_empty((B, Q, maps, h, w) if maps else (0,), dtype=dtype),
    )


@_register(
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
        return torch.empty_like(features), torch.zeros_like(prototypes)
    kernels = _kernels(backend, features.device)
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
        logit_scale=logit_scale,
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
    features, masks, C, scale, spacing, _, backend = inputs
    _, factor = output
    ctx.mark_non_differentiable(factor)
    ctx.set_materialize_grads(False)
    # The pooling is linear in the features: only their shape and layout are of use.
    ctx.save_for_backward(masks, factor, features)
    ctx.classes = C
    ctx.settings = (scale, spacing, backend)


def _pool_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    masks, factor, features = ctx.saved_tensors
    call = _pool_backward
    if not is_eager(grad, features):
        call = torch.ops.lslpn_kernels.masked_average_pool_backward.default
    grad_features = call(grad, masks, ctx.classes, factor, features, *ctx.settings)
    if _may_differentiate():
        grad_features, _ = _Final.apply("masked_average_pool", grad_features, None, grad)
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
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    features, prototypes = saved[:2]
    wanted = ctx.needs_input_grad[:2]
    call = _match_backward
    if not is_eager(grad, features):
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
