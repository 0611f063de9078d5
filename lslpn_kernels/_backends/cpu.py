"""The kernels in C++ (csrc/cpu): exact, on several threads, in the best instructions there are."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ..geometry import GridSpec
from ..reference import accumulation_dtype
from . import native, winner_dtype

# Told which gradients are wanted; see `Kernels.cosine_match_backward`.
SELECTIVE = True
GRAM_MAPS = 4

DEVICE_TYPES = ("cpu",)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_native, _reason = native.module()


def unavailable(device: torch.device) -> str | None:
    """See `Kernels`."""
    return _reason or None


@lru_cache(maxsize=64)
def _geometry(grid: GridSpec, H: int, h: int, W: int, w: int) -> tuple[Any, int, int]:
    """The compiled tables of a geometry, and the numbers of windows Gy and Gx."""
    axes = grid.axis(H, h), grid.axis(W, w)
    sizes = ((a.pixels, a.cells, a.window, a.step, a.windows) for a in axes)
    table = _call("Geometry", *sizes)
    return table, axes[0].windows, axes[1].windows


def _call(name: str, *args: Any) -> Any:
    if _native is None:
        raise RuntimeError(f'backend="cpu" is not usable: {_reason}')
    return getattr(_native, name)(*args)


# OpenMP's threads do not survive a fork, and the child that asks for them waits for ever.
_forked: list[int] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Whatever the default device is.
    return torch.empty(shape, dtype=dtype, device="cpu")


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`. What follows the factor are the masks reduced to feature locations."""
    B, K, D, h, w = features.shape
    H, W = masks.shape[-2:]
    geometry, Gy, Gx = _geometry(grid, H, h, W, w)
    dtype = accumulation_dtype(features.dtype)
    prototypes = _empty((B, C, Gy, Gx, D), dtype)
    factor = _empty((B, K, C, Gy, Gx), dtype)
    weights = _empty((B, K, C, *geometry.locations), dtype)
    _call(
        "cpu_masked_average_pool",
        geometry,
        to_dlpack(features),
        to_dlpack(masks),
        C,
        min_pixels,
        to_dlpack(prototypes),
        to_dlpack(factor),
        to_dlpack(weights),
        _threads(),
    )
    return prototypes, factor, weights


def masked_average_pool_backward(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    features: Tensor,
    grid: GridSpec,
    *kept: Tensor,
) -> Tensor:
    """See `Kernels`."""
    h, w = features.shape[3:]
    H, W = masks.shape[-2:]
    geometry = _geometry(grid, H, h, W, w)[0]
    grad_features = torch.empty_like(features)
    _call(
        "cpu_masked_average_pool_backward",
        geometry,
        to_dlpack(grad),
        to_dlpack(masks),
        C,
        to_dlpack(factor),
        to_dlpack(kept[0]) if kept else None,
        to_dlpack(grad_features),
        _threads(),
    )
    return grad_features


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    winners: bool,
    *,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`."""
    B, Q, _, h, w = features.shape
    C = prototypes.shape[1]
    H, W = size
    geometry = _geometry(grid, H, h, W, w)[0]
    shape = (B, Q, C, H, W)
    kept = winners and reduce == "max"
    scores = _empty(shape, prototypes.dtype)
    winner = _empty(shape if kept else (0,), winner_dtype(grid))
    # Products that no pixel needs are not written.
    gram = _empty((B, Q, GRAM_MAPS, h, w) if winners else (0,), prototypes.dtype).zero_()
    _call(
        "cpu_cosine_match",
        geometry,
        to_dlpack(features),
        to_dlpack(prototypes),
        reduce == "mean",
        to_dlpack(scores),
        to_dlpack(winner) if kept else None,
        to_dlpack(gram) if winners else None,
        logit_scale,
        _threads(),
    )
    return scores, winner, gram


def cosine_match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    grid: GridSpec,
    reduce: str,
    *gram: Tensor,
    wanted: tuple[bool, bool] = (True, True),
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`. A gradient that is not wanted comes back empty."""
    h, w = features.shape[3:]
    H, W = grad.shape[3:]
    geometry = _geometry(grid, H, h, W, w)[0]
    grad_features = torch.empty_like(features) if wanted[0] else _empty((0,), features.dtype)
    grad_prototypes = torch.empty_like(prototypes) if wanted[1] else _empty((0,), prototypes.dtype)
    mean = reduce == "mean"
    _call(
        "cpu_cosine_match_backward",
        geometry,
        to_dlpack(grad),
        to_dlpack(features),
        to_dlpack(prototypes),
        to_dlpack(scores),
        None if mean else to_dlpack(winners),
        mean,
        to_dlpack(grad_features) if wanted[0] else None,
        to_dlpack(grad_prototypes) if wanted[1] else None,
        to_dlpack(gram[0]) if gram else None,
        logit_scale,
        _threads(),
    )
    return grad_features, grad_prototypes


def cosine_match_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    grid: GridSpec,
    reduce: str,
    wanted: tuple[bool, bool],
    *,
    ignore_index: int,
    logit_scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """See `Kernels`. What is kept are the gradients themselves, in the accumulation dtype: all that
    they still lack is the incoming one, a number."""
    h, w = features.shape[3:]
    H, W = labels.shape[2:]
    kept = loss_kept(features, prototypes, grid, (H, W), reduce, wanted)
    first, second = _pair(kept, wanted)
    loss = _call(
        "cpu_cosine_match_loss",
        _geometry(grid, H, h, W, w)[0],
        to_dlpack(features),
        to_dlpack(prototypes),
        to_dlpack(labels),
        None if weight is None else to_dlpack(weight),
        reduce == "mean",
        None if first is None else to_dlpack(first),
        None if second is None else to_dlpack(second),
        ignore_index,
        logit_scale,
        _threads(),
    )
    return torch.tensor(loss, dtype=prototypes.dtype, device="cpu"), kept


def loss_kept(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    wanted: tuple[bool, bool],
) -> list[Tensor]:
    """See `Kernels`."""
    both = torch.empty_like(features, dtype=prototypes.dtype), torch.empty_like(prototypes)
    return [gradient for gradient, want in zip(both, wanted, strict=True) if want]


def cosine_match_loss_backward(
    grad: Tensor,
    kept: list[Tensor],
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    wanted: tuple[bool, bool],
    *,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    factor = float(grad)
    first, second = (
        _empty((0,), of.dtype)
        if gradient is None
        else (gradient if factor == 1 else gradient * factor).to(of.dtype)
        for gradient, of in zip(_pair(kept, wanted), (features, prototypes), strict=True)
    )
    return first, second


def _pair(kept: list[Tensor], wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """The gradients of features and prototypes, None for one that is not wanted."""
    gradients = iter(kept)
    return tuple(next(gradients) if want else None for want in wanted)
