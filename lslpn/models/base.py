"""The interface of a few-shot network for trainer, evaluation and segmentation.

A network has three steps, so that a scan is encoded once and matched many times:

    features = model.encode(images)                         # of a slice, independent of classes
    support = model.describe(support_features, masks)       # prototypes, say
    logits = model.match(query_features, support, size)     # of the query

`forward` is all three for a batch of episodes, `loss` is minimised in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, TrainConfig
from ..data.episodes import Batch
from ..errors import InputError
from .encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder

_INFERENCE_CHUNK = 16  # images encoded at once outside training: bounds the memory, no more


class FewShotNetwork(nn.Module, ABC):
    """A network that segments query slices by labelled support slices.

    forward:
        support_images [B, K, S, S]: grey, float, in [0, 1]
        support_masks  [B, K, N, S, S]: bool, uint8 or float; one mask per foreground class
        query_images   [B, Q, S, S]: grey, float, in [0, 1]
        -> logits      [B, Q, N + 1, S, S], float32; class 0 is the background

    The side S is free; `config.size` is the one the network is meant for and what the rest of the
    package resizes to. For N ways with K support images each, as the authors' code has them, give
    all N K images with masks that are empty but for their own way.

    Attributes:
        name: the method's, as `ModelConfig.method` and the command line have it.
        one_shot: whether the method is for one class and one support image alone (1 way, 1 shot).
        config: of the network.
        amp: run the convolutions in bfloat16 (autocast), in training and inference; what comes
            out is float32. False by default. Processors with matrix units gain a factor of 3.
    """

    name: ClassVar[str]
    one_shot: ClassVar[bool] = False
    config: ModelConfig
    amp: bool

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Grey images [..., S, S], float in [0, 1], to features [..., D, h, w]."""

    @abstractmethod
    def describe(self, features: Tensor, masks: Tensor) -> Any:
        """What the support says of the classes, for any number of calls of `match`.

        Args:
            features: of the support images, [B, K, D, h, w].
            masks: [B, K, N, S, S], bool, uint8 or float; one per foreground class.

        Returns:
            whatever the method's `match` takes.
        """

    @abstractmethod
    def match(self, features: Tensor, support: Any, size: tuple[int, int]) -> Tensor:
        """Logits of query slices.

        Args:
            features: of the query images, [B, Q, D, h, w].
            support: what `describe` returned.
            size: (H, W) of the logits.

        Returns:
            [B, Q, N + 1, H, W], float32 (float64 for float64 features); class 0 the background.
        """

    def match_volume(
        self, query: Tensor, support: Tensor, masks: Tensor, size: tuple[int, int], reach: int
    ) -> Tensor:
        """Logits of a scan's slices by those of another that lies as it does.

        Slice z of the query is segmented by slices z - reach .. z + reach of the support. Here
        those are its shots.

        Args:
            query: features of the query's slices, [Z, D, h, w].
            support: of the support's, [Z, D, h, w].
            masks: bool [Z, N, H, W], one per foreground class.
            size: (H, W) of the logits.
            reach: slices.

        Returns:
            float32 [Z, N + 1, H, W]; class 0 the background.
        """
        out = []
        for z in range(len(query)):
            near = slice(max(0, z - reach), z + reach + 1)
            described = self.describe(support[None, near], masks[None, near])
            out.append(self.match(query[None, z : z + 1], described, size)[0])
        return torch.cat(out)

    def forward(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> Tensor:
        features, support = self._halves(support_images, support_masks, query_images)
        size = (query_images.shape[-2], query_images.shape[-1])
        return self.match(features, support, size)

    def loss(self, batch: Batch, options: TrainConfig) -> Tensor:
        """What training lowers: the cross-entropy of the logits, a scalar.

        Args:
            batch: episodes.
            options: the run's; what the method's loss takes from them is its own matter.
        """
        logits = self(batch.support_images, batch.support_masks, batch.query_images)
        return segmentation_loss(logits, batch.query_labels, options.ignore_index)

    def convolutions(self) -> list[nn.Module]:
        """The modules that take the time, which `TrainConfig.compile` compiles."""
        return [self]

    def fresh_parameters(self) -> list[nn.Parameter]:
        """Those that start from noise beside a pretrained trunk: TrainConfig.reduction_lr_factor
        is theirs. None by default."""
        return []

    def _halves(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> tuple[Tensor, Any]:
        """What `match` matches: query features, and what the support says."""
        features = self._features(support_images, support_masks, query_images)
        shots = support_images.shape[1]
        return features[:, shots:], self.describe(features[:, :shots], support_masks)

    def _features(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> Tensor:
        """Of support and query together, [B, K + Q, D, h, w]."""
        given = [tuple(one.shape) for one in (support_images, support_masks, query_images)]
        if [len(shape) for shape in given] != [4, 5, 4]:
            raise InputError(
                f"{type(self).__name__}: expected support_images [B, K, S, S], support_masks "
                f"[B, K, N, S, S] and query_images [B, Q, S, S], got {', '.join(map(str, given))}"
            )
        # One batch for both: fewer, larger convolutions, and with live batch norm support and
        # query are normalised alike.
        return self.encode(torch.cat((support_images, query_images), dim=1))


class EncoderNetwork(FewShotNetwork):
    """A few-shot network on the features of the shared encoder, `encoder.Encoder`.

    Args:
        config: of the network; `config.weights` names what the trunk starts from.
        encoder: in place of the shared one: any module that maps colour images [n, 3, S, S], the
            grey value repeated, to features [n, D, h, w]; of `config` only what concerns the
            input, the head and the training is used then.
        generator: random numbers of the reduction layer; None uses torch's default one.

    Raises:
        InputError: `config.weights` cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        encoder: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.amp = False
        self.encoder = encoder or Encoder(config, generator=generator)
        # The same numbers in another order in memory; convolutions run up to twice as fast.
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Not in the state dict: the configuration decides, and two constants need no storing.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Grey images [..., S, S], float in [0, 1], to features [..., D, s, s].

        Without gradients the images go through a few at a time, so a whole scan can be given.
        """
        size = images.shape[-2:]
        flat = images.reshape(-1, 1, *size)
        if self.training or torch.is_grad_enabled() or len(flat) <= _INFERENCE_CHUNK:
            features = self._encode(flat)
        else:
            features = torch.cat([self._encode(part) for part in flat.split(_INFERENCE_CHUNK)])
        return features.reshape(*images.shape[:-2], *features.shape[1:])

    def convolutions(self) -> list[nn.Module]:
        """The encoder."""
        return [self.encoder]

    def fresh_parameters(self) -> list[nn.Parameter]:
        """The reduction layer's; of an encoder of the caller's own none."""
        own = self.encoder
        return list(own.reduction.parameters()) if isinstance(own, Encoder) else []

    def _encode(self, grey: Tensor) -> Tensor:
        colour = grey.expand(-1, 3, -1, -1)
        if self.config.imagenet_normalisation:
            colour = (colour - self.mean) / self.std
        if not self.amp:
            features: Tensor = self.encoder(colour)
            return features
        with torch.autocast(grey.device.type, torch.bfloat16):
            features = self.encoder(colour)
        return features.float()


def segmentation_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, weight: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the pixels with a label; zero where there is none.

    Args:
        logits: [B, Q, C, H, W].
        labels: int64 [B, Q, H, W]; `ignore_index` marks pixels without loss.
        weight: [C], of the classes; the mean is weighted then, as `F.cross_entropy` has it.
    """
    labels = labels.flatten(0, 1)
    total = F.cross_entropy(
        logits.flatten(0, 1), labels, weight, ignore_index=ignore_index, reduction="sum"
    )
    known = labels != ignore_index
    if weight is None:
        return total / known.sum().clamp_min(1)
    share = (weight[labels.where(known, 0)] * known).sum()
    return total / share.where(share > 0, 1)


def check_features(features: Tensor) -> None:
    """Refuse features that are NaN or infinite."""
    if not features.isfinite().all():
        raise InputError(
            "model: its features hold NaN or infinite values, so that nothing can be segmented; "
            "its weights are damaged or its training diverged: use another checkpoint"
        )
