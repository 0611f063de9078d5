"""Prototype alignment, PANet's second loss.

The support segments the query. Then the roles are reversed: the query, with its predicted mask,
segments the support, whose mask is known.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig
from ..data.episodes import Batch
from .base import EncoderNetwork, segmentation_loss


class AlignedNetwork(EncoderNetwork):
    """A network that scores features, interpolates the logits, and is trained with alignment.

    Attributes:
        class_weights: weights of background and foreground in the cross-entropy; None if equal.
        needs_prediction: whether a class that was predicted nowhere in the query, and so has no
            prototype, is excluded from the alignment.
    """

    class_weights: ClassVar[tuple[float, float] | None] = None
    needs_prediction: ClassVar[bool] = True

    @abstractmethod
    def scores(self, features: Tensor, support: Any) -> Tensor:
        """Logits [B, Q, N + 1, h, w] at the resolution of the features [B, Q, D, h, w].

        `support` is the result of `describe`, which also accepts masks of the features' size.
        """

    def match(self, features: Tensor, support: Any, size: tuple[int, int]) -> Tensor:
        """`scores`, interpolated bilinearly to `size`."""
        return _resized(self.scores(features, support), size)

    def loss(self, batch: Batch, options: TrainConfig) -> Tensor:
        """Cross-entropy plus `options.alignment_weight` times the alignment loss."""
        masks, labels = batch.support_masks, batch.query_labels
        features = self._features(batch.support_images, masks, batch.query_images)
        support, query = features[:, : masks.shape[1]], features[:, masks.shape[1] :]
        coarse = self.scores(query, self.describe(support, masks))
        weight = None
        if self.class_weights is not None:
            background, foreground = self.class_weights
            weight = coarse.new_tensor([background, *[foreground] * masks.shape[2]])
        logits = _resized(coarse, (labels.shape[-2], labels.shape[-1]))
        loss = segmentation_loss(logits, labels, options.ignore_index, weight)
        if options.alignment_weight > 0:
            loss = loss + options.alignment_weight * self._alignment(support, masks, query, coarse)
        return loss

    def _alignment(self, support: Tensor, masks: Tensor, query: Tensor, coarse: Tensor) -> Tensor:
        """Cross-entropy of the support, segmented from the query's predicted mask.

        Every support image is segmented once for each class that it shows, as this class against
        the background; pixels of other classes have no loss. For a class that was predicted
        nowhere in the query, the loss is zero with `needs_prediction`, and otherwise that of zero
        scores. No gradient flows through the predicted mask.
        """
        classes = masks.shape[2] + 1
        predicted = F.one_hot(coarse.argmax(2), classes).movedim(-1, 2)[:, :, 1:].to(torch.uint8)
        size = (masks.shape[-2], masks.shape[-1])
        back = self.match(support, self.describe(query, predicted), size)
        given = masks > 0
        other = given.any(2, keepdim=True) & ~given
        pairs = torch.stack((back[:, :, :1].expand_as(back[:, :, 1:]), back[:, :, 1:]), 3)
        pixels = F.cross_entropy(
            pairs.flatten(0, 2), given.flatten(0, 2).long(), reduction="none"
        ).view(given.shape)
        known = (~other).sum((-2, -1)).clamp_min(1)
        losses = pixels.masked_fill(other, 0).sum((-2, -1)) / known
        shown = given.flatten(3).any(3)
        taught = shown
        if self.needs_prediction:
            taught = shown & predicted.flatten(3).any(3).any(1)[:, None]
        return (losses * taught).sum() / shown.sum().clamp_min(1)


def _resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    flat = F.interpolate(scores.flatten(0, 1), size, mode="bilinear", align_corners=False)
    return flat.unflatten(0, scores.shape[:2])
