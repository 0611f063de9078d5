"""The whole head as a module: support features and masks in, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import _arguments
from ._backends import check_name
from .geometry import GridSpec
from .ops import cosine_match, cosine_match_loss, masked_average_pool

if TYPE_CHECKING:
    from .check import Report


class LocalPrototypeHead(nn.Module):
    """Few-shot segmentation by local prototypes, for the features of any encoder.

    Equivalent to::

        masks = torch.cat((1 - support_masks.sum(2, keepdim=True), support_masks), 2)
        prototypes = masked_average_pool(support_features, masks, grid, min_pixels)
        logits = logit_scale * cosine_match(query_features, prototypes, grid, (H, W))

    It has no parameters. Train it with `loss`, the cross-entropy of the logits at image resolution.

    Args:
        grid: the windows; the paper's 1/8 of the image, half overlapping, by default.
        logit_scale: multiplies the cosines. The published code has 20, the paper's formula 1.
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
        logit_scale: float = 20.0,
        min_pixels: float = 0,
        reduce: str = "max",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        grid = GridSpec() if grid is None else grid
        _arguments.check_grid(grid)
        _arguments.check_logit_scale(logit_scale)
        _arguments.check_min_pixels(min_pixels)
        _arguments.check_reduce(reduce)
        check_name(backend)
        self.grid = grid
        self.logit_scale = float(logit_scale)
        self.min_pixels = min_pixels
        self.reduce = reduce
        self.backend = backend

    def forward(
        self,
        support_features: Tensor,
        support_masks: Tensor,
        query_features: Tensor,
        num_classes: int | None = None,
    ) -> Tensor:
        """
        Args:
            support_features: [B, K, D, h, w]; float64, float32, float16 or bfloat16.
            support_masks: [B, K, N, H, W], the N foreground classes; bool, uint8 or floating. The
                background is derived from them. Or a label map [B, K, H, W] of integers, 0 the
                background; pixels of label 255 belong to no class.
            query_features: [B, Q, D, h, w].
            num_classes: N + 1, for a label map; see `masked_average_pool`.

        Returns:
            logits [B, Q, N + 1, H, W], class 0 the background; float32 (float64 for float64).

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
            RuntimeError: the requested backend cannot run here.
        """
        prototypes = self.prototypes(support_features, support_masks, num_classes)
        H, W = support_masks.shape[-2:]
        return self.match(query_features, prototypes, (H, W))

    def loss(
        self,
        support_features: Tensor,
        support_masks: Tensor,
        query_features: Tensor,
        labels: Tensor,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        num_classes: int | None = None,
    ) -> Tensor:
        """The mean cross-entropy of the logits with `labels`, in one pass without storing logits.

        Equivalent to::

            logits = head(support_features, support_masks, query_features, num_classes)
            F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(0, 1), weight, ignore_index=ignore_index
            )

        Args:
            support_features, support_masks, query_features, num_classes: as of `forward`.
            labels: the class of each pixel of the query images, [B, Q, H, W], of any integer dtype
                and the size of the support masks.
            ignore_index: the label of pixels to ignore.
            weight: [N + 1], floating: weights of the classes, for a weighted mean.

        Returns:
            the loss, a scalar, float32 (float64 for float64); NaN where all pixels are ignored.

        Raises:
            TypeError, ValueError, RuntimeError: see `cosine_match_loss`.
        """
        prototypes = self.prototypes(support_features, support_masks, num_classes)
        _arguments.check_label_size(labels, support_masks)
        return self.match_loss(query_features, prototypes, labels, ignore_index, weight)

    def prototypes(
        self, support_features: Tensor, support_masks: Tensor, num_classes: int | None = None
    ) -> Tensor:
        """The support half: [B, N + 1, Gy, Gx, D], to be used with many queries."""
        return masked_average_pool(
            *(support_features, support_masks, self.grid, self.min_pixels, self.backend),
            background=True,
            num_classes=num_classes,
        )

    def match(self, query_features: Tensor, prototypes: Tensor, size: tuple[int, int]) -> Tensor:
        """The query half: logits [B, Q, N + 1, H, W]."""
        return cosine_match(
            *(query_features, prototypes, self.grid, size, self.reduce, self.backend),
            logit_scale=self.logit_scale,
        )

    def match_loss(
        self,
        query_features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        ignore_index: int = 255,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The query half of `loss`."""
        return cosine_match_loss(
            *(query_features, prototypes, labels, self.grid, self.reduce, self.backend),
            logit_scale=self.logit_scale,
            ignore_index=ignore_index,
            weight=weight,
        )

    def check(
        self,
        support_features: Tensor,
        support_masks: Tensor,
        query_features: Tensor,
        num_classes: int | None = None,
    ) -> Report:
        """Run every backend that supports these tensors, and compare it with the equations.

        Logits and both gradients (of the sum of the logits times fixed random numbers) are compared
        with `backend="reference"` in float64, which is slow and needs memory: use an episode of
        moderate size. Print the result: a line for each backend, with the largest differences,
        the milliseconds of a forward and backward pass, and its memory.

        Args:
            as of `forward`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        """
        from .check import check

        return check(self, support_features, support_masks, query_features, num_classes)

    def extra_repr(self) -> str:
        return (
            f"{self.grid}, logit_scale={self.logit_scale}, min_pixels={self.min_pixels}, "
            f"reduce={self.reduce!r}, backend={self.backend!r}"
        )
