"""The kernels in C++ (csrc/cpu): exact, on several threads, in the processor's best instructions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ..geometry import GridSpec
from ..reference import accumulation_dtype
from . import native, winner_dtype

_native, _reason = native.module()


def unavailable() -> str | None:
    """One line on why the backend cannot be used on this machine; None where it can."""
    return _reason or None


def device_types() -> tuple[str, ...]:
    """The device types it runs on."""
    return ("cpu",)


def dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of features that it takes."""
    return (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=64)
def _geometry(grid: GridSpec, H: int, h: int, W: int, w: int) -> tuple[Any, int, int]:
    """The compiled tables of a geometry, and the numbers of windows Gy, Gx."""
    axes = grid.axis(H, h), grid.axis(W, w)
    sizes = ((a.pixels, a.cells, a.window, a.step, a.windows) for a in axes)
    return _native.Geometry(*sizes), axes[0].windows, axes[1].windows  # type: ignore[union-attr]


def masked_average_pool(
    features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    B, K, D, h, w = features.shape
    _, _, C, H, W = masks.shape
    geometry, Gy, Gx = _geometry(grid, H, h, W, w)
    dtype = accumulation_dtype(features.dtype)
    prototypes = torch.empty((B, C, Gy, Gx, D), dtype=dtype)
    factor = torch.empty((B, K, C, Gy, Gx), dtype=dtype)
    _native.cpu_masked_average_pool(  # type: ignore[union-attr]
        geometry,
        to_dlpack(features),
        to_dlpack(masks),
        min_pixels,
        to_dlpack(prototypes),
        to_dlpack(factor),
        torch.get_num_threads(),
    )
    return prototypes, factor


def masked_average_pool_backward(
    grad: Tensor, masks: Tensor, factor: Tensor, features: Tensor, grid: GridSpec
) -> Tensor:
    """See `Kernels`."""
    h, w = features.shape[3:]
    H, W = masks.shape[3:]
    geometry, _, _ = _geometry(grid, H, h, W, w)
    grad_features = torch.empty_like(features)
    _native.cpu_masked_average_pool_backward(  # type: ignore[union-attr]
        geometry,
        to_dlpack(grad),
        to_dlpack(masks),
        to_dlpack(factor),
        to_dlpack(grad_features),
        torch.get_num_threads(),
    )
    return grad_features


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    winners: bool,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    B, Q, _, h, w = features.shape
    C = prototypes.shape[1]
    H, W = size
    geometry, _, _ = _geometry(grid, H, h, W, w)
    scores = torch.empty((B, Q, C, H, W), dtype=prototypes.dtype)
    keep = winners and reduce == "max"
    shape = (B, Q, C, H, W) if keep else (0,)
    winner = torch.empty(shape, dtype=winner_dtype(grid, (H, W)))
    _native.cpu_cosine_match(  # type: ignore[union-attr]
        geometry,
        to_dlpack(features),
        to_dlpack(prototypes),
        reduce == "mean",
        to_dlpack(scores),
        to_dlpack(winner) if keep else None,
        torch.get_num_threads(),
    )
    return scores, winner


def cosine_match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    grid: GridSpec,
    reduce: str,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    h, w = features.shape[3:]
    H, W = grad.shape[3:]
    geometry, _, _ = _geometry(grid, H, h, W, w)
    grad_features = torch.empty_like(features)
    grad_prototypes = torch.empty_like(prototypes)
    mean = reduce == "mean"
    _native.cpu_cosine_match_backward(  # type: ignore[union-attr]
        geometry,
        to_dlpack(grad),
        to_dlpack(features),
        to_dlpack(prototypes),
        to_dlpack(scores),
        None if mean else to_dlpack(winners),
        mean,
        to_dlpack(grad_features),
        to_dlpack(grad_prototypes),
        torch.get_num_threads(),
    )
    return grad_features, grad_prototypes
