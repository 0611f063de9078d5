"""Calls that the kernels of a GPU do not take, by the operations of the `torch` backend.

The functions are those of `Kernels`. Nothing is kept for the backward pass of matching, which
computes the scores again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import GridSpec
from ..reference import class_masks, without_autocast
from . import torch_


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    return torch_.pool_with_factor(features, class_masks(masks, C), grid, min_pixels)


@without_autocast
def masked_average_pool_backward(
    grad: Tensor, masks: Tensor, C: int, factor: Tensor, features: Tensor, grid: GridSpec
) -> Tensor:
    """See `Kernels`. Every support image is an episode of its own, so that windows that had too few
    pixels in it get no gradient from it."""
    K = features.shape[1]
    shares = torch.where(factor[..., None] != 0, grad[:, None] / K, 0)
    with torch.enable_grad():
        images = features.detach().flatten(0, 1)[:, None].requires_grad_()
        masks = class_masks(masks, C).flatten(0, 1)[:, None]
        pooled = torch_.masked_average_pool(images, masks, grid)
    (found,) = torch.autograd.grad(pooled, images, shares.flatten(0, 1))
    return torch.empty_like(features).copy_(found.view(features.shape))


@without_autocast
def cosine_match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    reduce: str,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    H, W = grad.shape[3:]
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (features, prototypes)]
        scores = torch_.cosine_match(inputs[0], inputs[1], grid, (H, W), reduce)
    to_features, to_prototypes = torch.autograd.grad(scores, inputs, logit_scale * grad)
    return to_features, to_prototypes
