"""The equations of the paper, written directly: slow, and the oracle of every test.

Features are interpolated to image resolution, and the windows are visited one by one. The code is
simple enough to be checked by eye against the paper. Run it in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import GridSpec

EPS = 1e-8
P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upsample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate features bilinearly: [..., D, h, w] -> [..., D, H, W]."""
    flat = features.reshape(-1, *features.shape[-3:])
    flat = flat.to(accumulation_dtype(features.dtype))
    up = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return up.reshape(*features.shape[:-2], *size)


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Normalise vectors along `dim`; zero, with zero gradient, if their length is below EPS."""
    square = (vectors * vectors).sum(dim, keepdim=True)
    gone = square < EPS**2  # false for NaN, which remains NaN
    return torch.where(gone, 0, vectors * torch.where(gone, 1, square).rsqrt())


def class_masks(masks: Tensor, C: int) -> Tensor:
    """Masks of all classes, [B, K, C, H, W], from a label map [B, K, H, W] or from the masks of the
    foreground classes [B, K, C - 1, H, W]; the rest is the background, class 0."""
    if masks.dim() == 4:
        return masks[:, :, None] == torch.arange(C, device=masks.device)[:, None, None]
    if masks.shape[2] == C:
        return masks
    if masks.is_floating_point():
        background = (1 - masks.sum(2, keepdim=True)).clamp(min=0)
    else:
        background = (~masks.bool().any(2, keepdim=True)).to(masks.dtype)
    return torch.cat((background, masks), 2)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to compute in its arguments' dtypes, even inside `torch.autocast`."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not torch.amp.is_autocast_available(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return exact


@without_autocast
def masked_average_pool(
    features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float = 0
) -> Tensor:
    """Equation (1): [B, K, D, h, w], [B, K, C, H, W] -> [B, C, Gy, Gx, D]."""
    C, H, W = masks.shape[2:]
    up = upsample(features, (H, W))
    masks = masks.to(up.dtype)
    rows, columns = grid.axis(H), grid.axis(W)
    prototypes = []
    for c in range(C):
        for y in rows.starts:
            for x in columns.starts:
                F_window = up[..., y : y + rows.window, x : x + columns.window]  # [B, K, D, ., .]
                M = masks[:, :, c, y : y + rows.window, x : x + columns.window]  # [B, K, ., .]
                n = M.sum((-2, -1))  # [B, K]
                total = (F_window * M[:, :, None]).sum((-2, -1))  # [B, K, D]
                enough = n > min_pixels
                average = total / torch.where(enough, n, 1)[..., None]
                prototypes.append(torch.where(enough[..., None], average, 0).mean(1))
    shape = (features.shape[0], C, rows.windows, columns.windows, features.shape[2])
    return torch.stack(prototypes, 1).reshape(shape)


@without_autocast
def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str = "max",
) -> Tensor:
    """Equation (3): [B, Q, D, h, w], [B, C, Gy, Gx, D] -> [B, Q, C, H, W]."""
    H, W = size
    directions = unit(upsample(features, size), 2)  # [B, Q, D, H, W]
    prototypes = unit(prototypes.to(directions.dtype), -1)
    rows, columns = grid.axis(H), grid.axis(W)
    shape = (features.shape[0], features.shape[1], prototypes.shape[1], H, W)
    scores = directions.new_full(shape, float("-inf") if reduce == "max" else 0.0)
    covers = directions.new_zeros(H, W)
    for i, y in enumerate(rows.starts):
        for j, x in enumerate(columns.starts):
            here = (..., slice(y, y + rows.window), slice(x, x + columns.window))
            cosine = torch.einsum("bqdyx,bcd->bqcyx", directions[here], prototypes[:, :, i, j])
            # Out of place, so that autograd sees each version. Strictly greater: of equal scores
            # the lowest window keeps the pixel and its gradient. NaN remains NaN.
            best, scores = scores[here], scores.clone()
            if reduce == "max":
                scores[here] = torch.where((cosine > best) | cosine.isnan(), cosine, best)
            else:
                scores[here] = best + cosine
            covers[here] += 1
    return scores if reduce == "max" else scores / covers
