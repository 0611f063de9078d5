"""LSLPN: local prototypes, matched where they were pooled. The paper's own method.

Yu et al., "A Location-Sensitive Local Prototype Network for Few-Shot Medical Image Segmentation",
ISBI 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lslpn_kernels import GridSpec, LocalPrototypeHead

from ..presets import ModelConfig, TrainConfig
from .base import EncoderNetwork

if TYPE_CHECKING:
    from ..episodes import Batch


class LocalPrototypes(NamedTuple):
    """What LSLPN knows of the support: `values` [B, N + 1, Gy, Gx, D] of the windows of `grid`."""

    grid: GridSpec
    values: Tensor


class LSLPN(EncoderNetwork):
    """The location-sensitive local prototype network.

    ```python
    model = untrained()                                     # or load_model("RUN")
    logits = model(support_images, support_masks, query_images)
    labels = logits.argmax(2)                               # 0 background, 1..N the organs
    ```

    Shapes and the convention for N ways and K shots are those of `FewShotNetwork`. The cosine does
    not see the prototypes' length, so with masks that are empty but for their own way the
    prototypes are the mean over that way's shots, and the background's the mean over ways and
    shots.

    Args and errors: those of `EncoderNetwork`.

    Attributes:
        head: the part behind the encoder; `encode` and `head` are the two halves, for whoever
            wants to encode a scan once and match it often.
    """

    name = "lslpn"

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator=generator)
        self.head = _head(config, GridSpec(config.grid_scale, config.grid_spacing))

    def describe(
        self, features: Tensor, masks: Tensor, grid: GridSpec | None = None
    ) -> LocalPrototypes:
        """Local prototypes, equation (1); `grid` takes the place of the model's own."""
        head = self._head(grid)
        return LocalPrototypes(head.grid, head.prototypes(features, masks))

    def match(self, features: Tensor, support: LocalPrototypes, size: tuple[int, int]) -> Tensor:
        """Cosines with the best of the windows over each pixel, equation (3), times the scale."""
        return self._head(support.grid).match(features, support.values, size)

    def loss(self, batch: Batch, options: TrainConfig) -> Tensor:
        """Cross-entropy, zero where no pixel has a label; in one pass that writes no logits."""
        features, support = self._halves(
            batch.support_images, batch.support_masks, batch.query_images
        )
        labels, ignored = batch.query_labels, options.ignore_index
        loss = self._head(support.grid).match_loss(features, support.values, labels, ignored)
        return loss.where((labels != ignored).any(), 0)

    def _head(self, grid: GridSpec | None) -> LocalPrototypeHead:
        head: LocalPrototypeHead = self.head
        return head if grid is None or grid == head.grid else _head(self.config, grid)


def _head(config: ModelConfig, grid: GridSpec) -> LocalPrototypeHead:
    return LocalPrototypeHead(
        grid, logit_scale=config.logit_scale, min_pixels=config.min_pixels, reduce=config.reduce
    )
