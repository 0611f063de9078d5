"""PANet: one global prototype per class, and a loss that segments the support from the query.

Wang et al., "PANet: Few-Shot Image Semantic Segmentation with Prototype Alignment", ICCV 2019;
here with the encoder that the prototype methods of this package share, instead of a VGG-16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lslpn_kernels import GridSpec, LocalPrototypeHead

from ..config import ModelConfig
from .alignment import AlignedNetwork

_LOGIT_SCALE = 20.0


class PANet(AlignedNetwork):
    """Masked average over the whole image, cosine at the features' resolution.

    The prototype of a class is the mean feature under its mask, with features interpolated to the
    mask; a pixel's logits are 20 times the cosines of its feature with the prototypes,
    interpolated to the image. Args and errors are those of `EncoderNetwork`; grid, `logit_scale`
    and `min_pixels` of the configuration are not used.
    """

    name = "panet"

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator=generator)
        # With one window as large as the image, the head has global prototypes.
        self.head = LocalPrototypeHead(GridSpec(scale=1), logit_scale=_LOGIT_SCALE, min_pixels=0)

    def describe(self, features: Tensor, masks: Tensor) -> Tensor:
        """Global prototypes [B, N + 1, 1, 1, D]; support images without the class count as zero."""
        return self.head.prototypes(features, masks)

    def scores(self, features: Tensor, support: Tensor) -> Tensor:
        return self.head.match(features, support, (features.shape[-2], features.shape[-1]))
