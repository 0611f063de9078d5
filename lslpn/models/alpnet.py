"""ALPNet: prototypes of small cells, with which each pixel is compared by a softmax.

Ouyang et al., "Self-Supervision with Superpixels: Training Few-Shot Medical Image Segmentation
without Annotation", ECCV 2020; here with the encoder that the prototype methods of this package
share, instead of a ResNet-101.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn_kernels.reference import class_masks

from .alignment import AlignedNetwork

_LOGIT_SCALE = 20.0
_TRAINING_CELL, _TEST_CELL = 4, 2  # side of a cell in feature locations
_INSIDE = 0.95  # a cell with more of the mask than this is a prototype of its class
_EPS = 1e-4  # least length by which features are divided

# Prototypes [P, D] of unit length (or zero), by episode and class.
Prototypes = list[list[Tensor]]


class ALPNet(AlignedNetwork):
    """Adaptive local prototypes: the means of cells of the support's features.

    Masks are resized to the features. Features and masks are averaged over cells of 4 x 4 in
    training and 2 x 2 otherwise; a cell that is more than 0.95 of one class is a prototype of it.
    The mean over the whole mask is another prototype of a foreground class, and of the background
    if no cell is. With d_p = 20 cos(feature, prototype p), the score of a class is
    sum_p softmax(d)_p d_p, interpolated to the image.

    Published for one class and one support image; with more, the cells and means of all support
    images are prototypes. Args and errors are those of `EncoderNetwork`; grid, `logit_scale` and
    `min_pixels` of the configuration are not used.
    """

    name = "alpnet"
    class_weights = (0.05, 1.0)
    # As in the authors' code; penalises predicting nothing.
    needs_prediction = False

    def describe(self, features: Tensor, masks: Tensor) -> Prototypes:
        """The normalised prototypes by episode and class, of which the background is the first."""
        size = features.shape[-2:]
        classes = class_masks(masks, masks.shape[2] + 1).to(features.dtype)
        small = F.interpolate(classes.flatten(0, 1), size, mode="bilinear", align_corners=False)
        small = small.unflatten(0, masks.shape[:2])
        cell = min(_TRAINING_CELL if self.training else _TEST_CELL, *size)
        cells = F.avg_pool2d(features.flatten(0, 1), cell).unflatten(0, masks.shape[:2])
        held = F.avg_pool2d(small.flatten(0, 1), cell).unflatten(0, masks.shape[:2])
        total = small.sum((-2, -1))[..., None]
        means = torch.einsum("bkcyx,bkdyx->bkcd", small, features) / total.clamp_min(1e-5)

        cells = cells.flatten(3).transpose(2, 3)  # [B, K, P, D]
        passed = held.flatten(3) > _INSIDE  # [B, K, C, P]
        found = []
        for b in range(len(features)):
            of_classes = []
            for c in range(small.shape[2]):
                prototypes = cells[b][passed[b, :, c]]
                if c > 0 or len(prototypes) == 0:
                    shown = total[b, :, c, 0] > 0
                    shown[0] |= ~shown.any()  # one zero if no image shows the class
                    prototypes = torch.cat((prototypes, means[b, :, c][shown]))
                of_classes.append(F.normalize(prototypes, dim=-1, eps=_EPS))
            found.append(of_classes)
        return found

    def scores(self, features: Tensor, support: Prototypes) -> Tensor:
        size = features.shape[-2:]
        pixels = F.normalize(features, dim=2, eps=_EPS).flatten(3)  # [B, Q, D, h w]
        scores = [
            torch.stack([_matched(prototypes, query) for prototypes in classes], 1)
            for query, classes in zip(pixels, support, strict=True)
        ]
        return torch.stack(scores).unflatten(-1, size)


def _matched(prototypes: Tensor, pixels: Tensor) -> Tensor:
    """sum_p softmax(d)_p d_p of prototypes [P, D] and pixels [Q, D, n]: [Q, n]."""
    # One query at a time: [P, n] is large for the background of whole scans.
    found = []
    for query in pixels:
        d = _LOGIT_SCALE * (prototypes @ query)
        found.append((d.softmax(0) * d).sum(0))
    return torch.stack(found)
