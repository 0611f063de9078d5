"""The whole head as a module: support features and masks in, logits out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .geometry import GridSpec
from .ops import cosine_match, masked_average_pool


def add_background(masks: Tensor) -> Tensor:
    """Put class 0, every pixel that no foreground class holds, before the N foreground classes.

    Args:
        masks: [..., N, H, W]; bool or uint8 (0 and 1), or floating in [0, 1] (soft masks leave
            ``1 - sum`` to the background, not below 0).

    Returns:
        [..., N + 1, H, W] in the dtype of `masks`.
    """
    shape = (*masks.shape[:-3], masks.shape[-3] + 1, *masks.shape[-2:])
    every = masks.new_empty(shape)
    background, classes = every[..., :1, :, :], every[..., 1:, :, :]
    classes.copy_(masks)
    one = masks.shape[-3] == 1  # the usual case, and half the work
    if masks.is_floating_point():
        held = masks if one else masks.sum(-3, keepdim=True)
        background.copy_((1 - held).clamp_(min=0))
    else:
        held = masks if one else masks.any(-3, keepdim=True)
        background.copy_(torch.logical_not(held))
    return every


class LocalPrototypeHead(nn.Module):
    """Few-shot segmentation by local prototypes, for the features of any encoder.

    Equivalent to::

        masks = torch.cat((1 - support_masks.sum(2, keepdim=True), support_masks), 2)
        prototypes = masked_average_pool(support_features, masks, grid, min_pixels)
        logits = scale * cosine_match(query_features, prototypes, grid, (H, W))

    It has no parameters. Train it with cross-entropy on the logits, at image resolution.

    Args:
        grid: the windows; the paper's 1/8 of the image, half overlapping, by default.
        scale: factor on the cosines. The published code has 20, the paper's formula 1.
        min_pixels: a window with no more than this many pixels of a class has a zero prototype
            for it. The paper has 0, the published code 10.
        reduce: "max" or "mean" over the windows of a pixel.
        backend: see `masked_average_pool`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        grid: GridSpec | None = None,
        scale: float = 20.0,
        min_pixels: float = 0,
        reduce: str = "max",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale}")
        self.grid = grid if grid is not None else GridSpec()
        self.scale = float(scale)
        self.min_pixels = min_pixels
        self.reduce = reduce
        self.backend = backend

    def forward(
        self, support_features: Tensor, support_masks: Tensor, query_features: Tensor
    ) -> Tensor:
        """
        Args:
            support_features: [B, K, D, h, w].
            support_masks: [B, K, N, H, W], the N foreground classes; see `add_background`.
            query_features: [B, Q, D, h, w].

        Returns:
            logits [B, Q, N + 1, H, W], class 0 the background; float32 (float64 for float64).
        """
        prototypes = self.prototypes(support_features, support_masks)
        H, W = support_masks.shape[-2:]
        return self.match(query_features, prototypes, (H, W))

    def prototypes(self, support_features: Tensor, support_masks: Tensor) -> Tensor:
        """The support half: [B, N + 1, Gy, Gx, D], to be used with many queries."""
        if support_masks.dim() != 5:
            raise ValueError(
                f"support_masks must have 5 dimensions [B, K, N, H, W], got "
                f"{support_masks.dim()}: {tuple(support_masks.shape)}"
            )
        masks = add_background(support_masks)
        return masked_average_pool(
            support_features, masks, self.grid, self.min_pixels, self.backend
        )

    def match(self, query_features: Tensor, prototypes: Tensor, size: tuple[int, int]) -> Tensor:
        """The query half: logits [B, Q, N + 1, H, W]."""
        return cosine_match(
            query_features, prototypes, self.grid, size, self.reduce, self.backend, self.scale
        )

    def extra_repr(self) -> str:
        return (
            f"{self.grid}, scale={self.scale}, min_pixels={self.min_pixels}, "
            f"reduce={self.reduce!r}, backend={self.backend!r}"
        )
