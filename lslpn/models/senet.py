"""SENet: one network encodes the support and gates another, which segments the query.

Roy et al., "'Squeeze & Excite' Guided Few-Shot Segmentation of Volumetric Images", Medical Image
Analysis 2020. It has no prototypes and no pretrained weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, TrainConfig
from ..data.episodes import Batch
from ..errors import InputError
from .base import FewShotNetwork

_CONDITIONER, _SEGMENTER = 16, 64  # channels of the arms
_LEVELS = 4
_KERNEL = 5

Gates = list[Tensor]  # one for each of the 9 blocks, [B, 1, y, x]


class SENet(FewShotNetwork):
    """Squeeze and excite: the conditioner's gates multiply the segmenter's features.

    Both arms are encoder-decoders of four levels, with blocks of a 5 x 5 convolution, PReLU and
    batch norm, 2 x 2 max-pooling, and unpooling to the positions of the maxima. The conditioner
    reads the support image and its mask; after each of its nine blocks, a 1 x 1 convolution and a
    sigmoid compute a spatial gate for the same block of the segmenter, which reads the query. Only
    the segmenter's deepest level has a skip connection: more would copy the support's mask.

    Features are the images themselves. For 1 way and 1 shot.

    Args:
        config: settings of the network; those of the encoder are not used.
        generator: not used; the arms are initialised from torch's default generator.
    """

    name = "senet"
    one_shot = True

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.amp = False
        self.conditioner = _Arm(2, _CONDITIONER, skip=False)
        self.squeeze = nn.ModuleList(nn.Conv2d(_CONDITIONER, 1, 1) for _ in range(2 * _LEVELS + 1))
        self.segmenter = _Arm(1, _SEGMENTER, skip=True)
        self.classifier = nn.Conv2d(_SEGMENTER, 2, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves, [..., 1, S, S]."""
        return images.unsqueeze(-3)

    def describe(self, features: Tensor, masks: Tensor) -> Gates:
        """The nine gates; features [B, 1, 1, S, S], masks [B, 1, 1, S, S].

        Raises:
            InputError: more than one class or support image.
        """
        _, shots, ways = masks.shape[:3]
        if (ways, shots) != (1, 1):
            raise InputError(
                f"SENet: is for 1 way and 1 shot, got {ways} ways and {shots} support images; set "
                "ways and shots to 1, or choose another method"
            )
        given = torch.cat((features[:, 0], masks[:, 0].to(features.dtype)), 1)
        with self._autocast(given):
            found = self.conditioner(given)
            return [squeeze(x).sigmoid() for squeeze, x in zip(self.squeeze, found, strict=True)]

    def match(self, features: Tensor, support: Gates, size: tuple[int, int]) -> Tensor:
        """The segmenter's output [B, Q, 2, H, W], interpolated to `size` if necessary."""
        queries = features.shape[1]
        images = features.flatten(0, 1)
        with self._autocast(images):
            gates = [gate.repeat_interleave(queries, 0) for gate in support]
            logits: Tensor = self.classifier(self.segmenter(images, gates)[-1])
        logits = logits.to(features.dtype)
        if tuple(logits.shape[-2:]) != tuple(size):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.unflatten(0, features.shape[:2])

    def match_volume(
        self, query: Tensor, support: Tensor, masks: Tensor, size: tuple[int, int], reach: int
    ) -> Tensor:
        """As `FewShotNetwork.match_volume`, from slice z only, one way at a time.

        A foreground logit is its difference to that way's background, and the background is 0.
        """
        leads = []
        for way in masks.split(1, dim=1):
            logits = self.match(query[:, None], self.describe(support[:, None], way[:, None]), size)
            leads.append(logits[:, 0, 1:] - logits[:, 0, :1])
        return F.pad(torch.cat(leads, 1), (0, 0, 0, 0, 1, 0))

    def convolutions(self) -> list[nn.Module]:
        """Both arms."""
        return [self.conditioner, self.segmenter]

    def loss(self, batch: Batch, options: TrainConfig) -> Tensor:
        """Dice loss; see `dice_loss`."""
        logits = self(batch.support_images, batch.support_masks, batch.query_images)
        return dice_loss(logits, batch.query_labels, options.ignore_index)

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.amp)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """1 - 2 sum(p g) / (sum(p) + sum(g)), the mean over images and classes, background included.

    Args:
        logits: [B, Q, C, H, W]; p is their softmax.
        labels: int64 [B, Q, H, W]; pixels of `ignore_index` are left out of every sum.
    """
    known = (labels != ignore_index)[:, :, None]
    p = logits.softmax(2) * known
    g = F.one_hot(labels.where(known[:, :, 0], 0), logits.shape[2]).movedim(-1, 2) * known
    total = p.sum((-2, -1)) + g.sum((-2, -1))
    return (1 - 2 * (p * g).sum((-2, -1)) / total.clamp_min(1e-6)).mean()


class _Arm(nn.Module):
    """Encoder, bottleneck and decoder; forward returns the outputs of the nine blocks."""

    def __init__(self, channels: int, width: int, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.down = nn.ModuleList(
            _block(channels if level == 0 else width, width) for level in range(_LEVELS)
        )
        self.bottom = _block(width, width)
        self.up = nn.ModuleList(
            _block(2 * width if skip and level == 0 else width, width) for level in range(_LEVELS)
        )

    def forward(self, x: Tensor, gates: Sequence[Tensor] | None = None) -> list[Tensor]:
        found: list[Tensor] = []

        def gated(x: Tensor) -> Tensor:
            found.append(x if gates is None else x * gates[len(found)])
            return found[-1]

        pooled: list[tuple[Tensor, Tensor]] = []  # by level: input, and positions of the maxima
        for block in self.down:
            before = block(x)
            x, places = F.max_pool2d(before, 2, return_indices=True)
            x = gated(x)
            pooled.append((before, places))
        x = gated(self.bottom(x))
        for level, block in enumerate(self.up):
            before, places = pooled.pop()
            x = F.max_unpool2d(x, places, [2, 2], output_size=before.shape[-2:])
            if self.skip and level == 0:
                x = torch.cat((x, before), 1)
            x = gated(block(x))
        return found


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, _KERNEL, padding=_KERNEL // 2),
        nn.PReLU(),
        nn.BatchNorm2d(width),
    )
