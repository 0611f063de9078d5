"""ALPNet: prototypes of small cells, of which each pixel is compared with the most similar.

Ouyang et al., "Self-Supervision with Superpixels: Training Few-Shot Medical Image Segmentation
without Annotation", ECCV 2020; here on the encoder that all prototype methods of this package
share, instead of its ResNet-101.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn_kernels.reference import class_masks

from .alignment import AlignedNetwork

_LOGIT_SCALE = 20.0
_TRAINING_CELL, _TEST_CELL = 4, 2  # side of a cell in features
_INSIDE = 0.95  # a cell with more of the mask than this is a prototype of its class
_EPS = 1e-4  # shorter features than this have no direction

# Prototypes [P, D] of unit length (or zero), for each episode and class.
Prototypes = list[list[Tensor]]


class ALPNet(AlignedNetwork):
    """Adaptive local prototypes: the means of cells of the support's features.

    Masks are brought to the size of the features. Features and masks are averaged over cells of
    4 x 4 in training and 2 x 2 otherwise; a cell of which a class holds over 0.95 is one of its
    prototypes. So is, for the foreground classes, the mean over all of the mask; the background
    has that one only where no cell passes. With d_p = 20 cos(feature, prototype p), the score of
    a class is sum_p softmax(d)_p d_p, interpolated to the image.

    Published for one class and one support image; with more, the cells and the masks' means of
    all support images are prototypes together. Args and errors: those of `EncoderNetwork`; of
    the configuration the grid, `logit_scale` and `min_pixels` are LSLPN's alone.
    """

    name = "alpnet"
    class_weights = (0.05, 1.0)
    # As its authors have it, against the ease of predicting nothing.
    needs_prediction = False

    def describe(self, features: Tensor, masks: Tensor) -> Prototypes:
        """The prototypes, normalised, for each episode and class; the background's come first."""
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
                    prototypes = torch.cat(
                        (prototypes, self._shown(means[b, :, c], total[b, :, c]))
                    )
                of_classes.append(_directions(prototypes, -1))
            found.append(of_classes)
        return found

    @staticmethod
    def _shown(means: Tensor, total: Tensor) -> Tensor:
        """Means [K, D] of the images that show the class; a zero where none does."""
        shown = total[:, 0] > 0
        return means[shown] if bool(shown.any()) else means[:1]

    def scores(self, features: Tensor, support: Prototypes) -> Tensor:
        size = features.shape[-2:]
        pixels = _directions(features, 2).flatten(3)  # [B, Q, D, h w]
        scores = [
            torch.stack([_matched(prototypes, query) for prototypes in classes], 1)
            for query, classes in zip(pixels, support, strict=True)
        ]
        return torch.stack(scores).unflatten(-1, size)


def _matched(prototypes: Tensor, pixels: Tensor) -> Tensor:
    """sum_p softmax(d)_p d_p of prototypes [P, D] and pixels [Q, D, n]: [Q, n]."""
    # One query at a time: [P, n] is large where a scan's background is the support.
    found = []
    for query in pixels:
        d = _LOGIT_SCALE * (prototypes @ query)
        found.append((d.softmax(0) * d).sum(0))
    return torch.stack(found)


def _directions(features: Tensor, dim: int) -> Tensor:
    return F.normalize(features, dim=dim, eps=_EPS)
