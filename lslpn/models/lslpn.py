"""LSLPN, the paper's method: local prototypes, matched in the windows that they are pooled from.

Yu et al., "A Location-Sensitive Local Prototype Network for Few-Shot Medical Image Segmentation",
ISBI 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lslpn_kernels import GridSpec, LocalPrototypeHead, masked_average_pool

from ..config import ModelConfig, TrainConfig
from ..data.episodes import Batch
from .base import EncoderNetwork

_MOST_NUMBERS = 2**25  # of a volume's prototypes in memory: 128 MiB


class LocalPrototypes(NamedTuple):
    """Prototypes `values` [B, N + 1, Gy, Gx, D] of the windows of `grid`."""

    grid: GridSpec
    values: Tensor


class LSLPN(EncoderNetwork):
    """The location-sensitive local prototype network.

    ```python
    model = untrained()                                     # or load_model("RUN")
    logits = model(support_images, support_masks, query_images)
    labels = logits.argmax(2)                               # 0 background, 1..N the organs
    ```

    Shapes and the convention for N ways and K shots are those of `FewShotNetwork`. The cosine
    ignores the length of prototypes. So with masks that are empty except for their own way,
    foreground prototypes are the mean over that way's shots, and the background's the mean over all
    shots.

    Args and errors are those of `EncoderNetwork`.

    Attributes:
        head: the part after the encoder; use `encode` and `head` to encode a scan once and match
            it often.
    """

    name = "lslpn"

    def __init__(
        self,
        config: ModelConfig,
        *,
        encoder: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, encoder=encoder, generator=generator)
        self.head = _head(config, GridSpec(config.grid_scale, config.grid_spacing))

    def describe(
        self, features: Tensor, masks: Tensor, grid: GridSpec | None = None
    ) -> LocalPrototypes:
        """Local prototypes, equation (1); `grid` replaces the model's."""
        head = self._head(grid)
        return LocalPrototypes(head.grid, head.prototypes(features, masks))

    def match(self, features: Tensor, support: LocalPrototypes, size: tuple[int, int]) -> Tensor:
        """`logit_scale` times the best cosine of the windows over each pixel, equation (3)."""
        return self._head(support.grid).match(features, support.values, size)

    def match_volume(
        self, query: Tensor, support: Tensor, masks: Tensor, size: tuple[int, int], reach: int
    ) -> Tensor:
        """As `FewShotNetwork.match_volume`, with windows that are 2 reach + 1 slices deep.

        A window's prototype is the mean over all pixels of a class in all of its slices (equation
        (1) in three dimensions), or zero if there are no more than `config.min_pixels`.
        """
        out = [
            self.head.match(query[slices.start : slices.stop, None], prototypes, size)[:, 0]
            for slices, prototypes in self.volume_prototypes(support, masks, reach)
        ]
        return torch.cat(out)

    def volume_prototypes(
        self, support: Tensor, masks: Tensor, reach: int
    ) -> Iterator[tuple[range, Tensor]]:
        """Prototypes of windows of 2 reach + 1 slices, for some slices at a time.

        Takes features [Z, D, h, w] and bool masks [Z, N, H, W]; yields the middle slices of
        windows, and their prototypes [len(slices), N + 1, Gy, Gx, D] as in `match_volume`.
        """
        grid = self.head.grid
        gy, gx = grid.shape(*masks.shape[-2:])
        number = (masks.shape[1] + 1) * gy * gx * support.shape[1]  # of a slice's prototypes
        step = max(1, _MOST_NUMBERS // number)
        for first in range(0, len(support), step):
            slices = range(first, min(first + step, len(support)))
            begin = max(0, first - reach)
            near = slice(begin, slices.stop + reach)
            means = masked_average_pool(
                support[near, None], masks[near, None], grid, background=True
            )
            classes = torch.cat((~masks[near].any(1, keepdim=True), masks[near]), 1)
            counts = _window_sums(classes.to(means), grid)[..., None]
            middle = slice(first - begin, slices.stop - begin)
            sums = _runs(means * counts, reach)[middle]
            counts = _runs(counts, reach)[middle]
            yield (
                slices,
                torch.where(counts > self.config.min_pixels, sums / counts.clamp_min(1), 0.0),
            )

    def loss(self, batch: Batch, options: TrainConfig) -> Tensor:
        """Cross-entropy, or zero if no pixel has a label, in one pass that writes no logits."""
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


def _window_sums(planes: Tensor, grid: GridSpec) -> Tensor:
    """Sums of planes [..., H, W] over the windows: [..., Gy, Gx]."""
    y, x = (grid.axis(pixels) for pixels in planes.shape[-2:])
    # float64 holds sums of counts exactly.
    sums = F.pad(planes.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    top, left = (torch.tensor(axis.starts, device=planes.device) for axis in (y, x))
    rows = sums[..., top + y.window, :] - sums[..., top, :]
    return (rows[..., left + x.window] - rows[..., left]).to(planes.dtype)


def _runs(slices: Tensor, reach: int) -> Tensor:
    """The sum of slices z - reach .. z + reach, for each slice z."""
    depth = len(slices)
    out = slices.clone()
    for step in range(1, min(reach, depth - 1) + 1):
        out[step:] += slices[:-step]
        out[:-step] += slices[step:]
    return out
