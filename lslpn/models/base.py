"""The interface of few-shot networks for trainer, evaluation and segmentation.

A network has three steps, so that a scan is encoded once and matched many times:

    features = model.encode(images)                         # of slices, independent of classes
    support = model.describe(support_features, masks)       # prototypes, for instance
    logits = model.match(query_features, support, size)     # of query slices

`forward` does all three for a batch of episodes, `loss` is minimised in training.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, TrainConfig
from ..data.episodes import Batch
from ..errors import InputError
from .encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder

_INFERENCE_CHUNK = 16  # images encoded at once outside training, to limit the memory


class FewShotNetwork(nn.Module, ABC):
    """A network that segments query slices from labelled support slices.

    forward:
        support_images [B, K, S, S]: grey, float, in [0, 1]
        support_masks  [B, K, N, S, S]: bool, uint8 or float; one mask per foreground class
        query_images   [B, Q, S, S]: grey, float, in [0, 1]
        -> logits      [B, Q, N + 1, S, S], float32; class 0 is the background

    The side S may be any size; the rest of the package resizes slices to `config.size`. For N ways
    with K support images each, as in the authors' code, give all N K images, with masks that are
    empty except for their own way.

    Attributes:
        name: the method's name in `ModelConfig.method` and on the command line.
        one_shot: whether the method is only for one class and one support image (1 way, 1 shot).
        config: settings of the network.
        amp: run the convolutions in bfloat16 (autocast), in training and inference; outputs are
            float32. False by default. Processors with matrix units gain a factor of 3.
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
        """Summarise the support, for any number of calls of `match`.

        Args:
            features: of the support images, [B, K, D, h, w].
            masks: [B, K, N, S, S], bool, uint8 or float; one per foreground class.

        Returns:
            the argument `support` of the method's `match`.
        """

    @abstractmethod
    def match(self, features: Tensor, support: Any, size: tuple[int, int]) -> Tensor:
        """Logits of query slices.

        Args:
            features: of the query images, [B, Q, D, h, w].
            support: the result of `describe`.
            size: (H, W) of the logits.

        Returns:
            [B, Q, N + 1, H, W], float32 (float64 for float64 features); class 0 is the background.
        """

    def match_volume(
        self, query: Tensor, support: Tensor, masks: Tensor, size: tuple[int, int], reach: int
    ) -> Tensor:
        """Logits of the slices of a query scan, from a support scan in the same frame.

        Slice z of the query is segmented from slices z - reach .. z + reach of the support, which
        are its support images here.

        Args:
            query: features of the query's slices, [Z, D, h, w].
            support: features of the support's slices, [Z, D, h, w].
            masks: of the support, bool [Z, N, H, W], one per foreground class.
            size: (H, W) of the logits.
            reach: number of slices.

        Returns:
            float32 [Z, N + 1, H, W]; class 0 is the background.
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
        """The loss of a batch, a scalar: by default the cross-entropy of the logits."""
        logits = self(batch.support_images, batch.support_masks, batch.query_images)
        return segmentation_loss(logits, batch.query_labels, options.ignore_index)

    def convolutions(self) -> list[nn.Module]:
        """The modules that take most of the time, which `TrainConfig.compile` compiles."""
        return [self]

    def fresh_parameters(self) -> list[nn.Parameter]:
        """The parameters to which `TrainConfig.reduction_lr_factor` applies; none by default."""
        return []

    def _halves(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> tuple[Tensor, Any]:
        """The query features and the described support, for `match`."""
        features = self._features(support_images, support_masks, query_images)
        shots = support_images.shape[1]
        return features[:, shots:], self.describe(features[:, :shots], support_masks)

    def _features(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> Tensor:
        """The features of support and query images, [B, K + Q, D, h, w]."""
        given = [tuple(one.shape) for one in (support_images, support_masks, query_images)]
        if [len(shape) for shape in given] != [4, 5, 4]:
            raise InputError(
                f"{type(self).__name__}: expected support_images [B, K, S, S], support_masks "
                f"[B, K, N, S, S] and query_images [B, Q, S, S], got {', '.join(map(str, given))}"
            )
        # One batch for both has fewer, larger convolutions, and live batch norm normalises support
        # and query equally.
        return self.encode(torch.cat((support_images, query_images), dim=1))


class EncoderNetwork(FewShotNetwork):
    """A few-shot network with the shared encoder, `encoder.Encoder`, or one of your own.

    Args:
        config: settings of the network.
        encoder: replaces the shared one: any module that maps colour images [n, 3, S, S], the grey
            value repeated, to features [n, D, h, w]; the settings of the shared encoder are then
            not used.
        generator: for the reduction layer; None uses torch's default generator.

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
        # Convolutions are up to twice as fast in this memory layout.
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Constants, so not in the state dict.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Grey images [..., S, S], float in [0, 1], to features [..., D, s, s].

        Without gradients, images are encoded a few at a time, so a whole scan can be given.
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
        """Those of the reduction layer; none with an encoder of your own."""
        own = self.encoder
        return list(own.reduction.parameters()) if isinstance(own, Encoder) else []

    def _encode(self, grey: Tensor) -> Tensor:
        colour = grey.expand(-1, 3, -1, -1)
        if self.config.imagenet_normalisation:
            colour = (colour - self.mean) / self.std
        if not self.amp:
            return _checked(self.encoder(colour), grey.shape[0])
        with torch.autocast(grey.device.type, torch.bfloat16):
            features = _checked(self.encoder(colour), grey.shape[0])
        return features.float()


def _checked(features: Any, images: int) -> Tensor:
    """Refuse what is not one feature map for each image."""
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(features, Tensor) or len(shape) != 4 or shape[0] != images:
        raise InputError(
            f"encoder: expected features [{images}, D, h, w] of {images} images, got {shape}"
        )
    return features


def segmentation_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, weight: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the labelled pixels, or zero if there are none.

    Args:
        logits: [B, Q, C, H, W].
        labels: int64 [B, Q, H, W]; `ignore_index` marks pixels without loss.
        weight: class weights [C], for a weighted mean as in `F.cross_entropy`.
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


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's parameters or, if it has none, of its buffers; else the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def check_features(features: Tensor) -> None:
    """Refuse features that are NaN or infinite."""
    if not features.isfinite().all():
        raise InputError(
            "model: its features have NaN or infinite values; its weights are damaged or its "
            "training diverged: use another checkpoint"
        )
