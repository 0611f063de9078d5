"""The network: one encoder for support and query, and the head of local prototypes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lslpn_kernels import GridSpec, LocalPrototypeHead

from .encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from .errors import InputError
from .presets import Config, ModelConfig, preset

_INFERENCE_CHUNK = 16  # images encoded at once outside training: bounds the memory, no more


class LSLPN(nn.Module):
    """The location-sensitive local prototype network.

    ```python
    model = untrained()                                     # or load_model("RUN")
    logits = model(support_images, support_masks, query_images)
    labels = logits.argmax(2)                               # 0 background, 1..N the organs
    ```

    forward:
        support_images [B, K, S, S]: grey, float, in [0, 1]
        support_masks  [B, K, N, S, S]: bool, uint8 or float; one mask per foreground class
        query_images   [B, Q, S, S]: grey, float, in [0, 1]
        -> logits      [B, Q, N + 1, S, S], float32; class 0 is the background

    The side S is free; `config.size` is the one the network is meant for and what the rest of the
    package resizes to. For N ways with K support images each, as the authors' code has them, give
    all N K images with masks that are empty but for their own way: the cosine does not see the
    prototypes' length, so this is the mean over that way's shots, and the background prototype is
    the mean over ways and shots.

    `encode` and `head` are the two halves, for whoever wants to encode a scan once and match it
    often.

    Args:
        config: of the network; `config.weights` names what the trunk starts from.
        generator: random numbers of the reduction layer; None uses torch's default one.

    Attributes:
        amp: run the encoder in bfloat16 (autocast), in training and inference; its features come
            out in float32. False by default. Processors with matrix units gain a factor of 3.

    Raises:
        InputError: `config.weights` cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.amp = False
        own_file = config.weights not in ("imagenet", "random")
        self.encoder = Encoder(
            config.channels,
            dropout=config.dropout,
            pretrained=config.weights == "imagenet",
            weights=Path(config.weights) if own_file else None,
            stride_on=config.stride_on,
            batch_norm=config.batch_norm,
            generator=generator,
        )
        # The same numbers in another order in memory; convolutions run up to twice as fast.
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = LocalPrototypeHead(
            GridSpec(config.grid_scale, config.grid_spacing),
            scale=config.logit_scale,
            min_pixels=config.min_pixels,
            reduce=config.reduce,
        )
        # Not in the state dict: the configuration decides, and two constants need no storing.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, support_images: Tensor, support_masks: Tensor, query_images: Tensor
    ) -> Tensor:
        if support_images.ndim != 4 or query_images.ndim != 4 or support_masks.ndim != 5:
            raise InputError(
                "LSLPN: expected support_images [B, K, S, S], support_masks [B, K, N, S, S] and "
                f"query_images [B, Q, S, S], got {tuple(support_images.shape)}, "
                f"{tuple(support_masks.shape)} and {tuple(query_images.shape)}"
            )
        shots = support_images.shape[1]
        # One batch for both: fewer, larger convolutions, and with live batch norm support and
        # query are normalised alike.
        features = self.encode(torch.cat((support_images, query_images), dim=1))
        logits: Tensor = self.head(features[:, :shots], support_masks, features[:, shots:])
        return logits

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


def untrained(config: str | Config | ModelConfig = "published", *, seed: int = 1234) -> LSLPN:
    """The network before training, in evaluation mode: ImageNet trunk, random reduction layer.

    It segments already: the authors report a liver Dice of 0.73 at step 0.

    Args:
        config: a preset's name, or a configuration.
        seed: of the reduction layer, and of the trunk where `weights` is "random".
    """
    if isinstance(config, str):
        config = preset(config)
    if isinstance(config, Config):
        config = config.model
    # Modules draw from torch's own generator as they are built; the caller's stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LSLPN(config, generator=torch.Generator().manual_seed(seed)).eval()
