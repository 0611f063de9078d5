"""The few-shot networks: a module for each value of `ModelConfig.method`."""

from __future__ import annotations

import dataclasses

import torch

from ..config import Config, ModelConfig, preset
from ..errors import InputError
from ..torch_defaults import torch_defaults
from .alpnet import ALPNet
from .base import FewShotNetwork, check_features, device_of, segmentation_loss
from .lslpn import LSLPN
from .panet import PANet
from .senet import SENet

__all__ = [
    "LSLPN",
    "METHODS",
    "ALPNet",
    "FewShotNetwork",
    "PANet",
    "SENet",
    "build",
    "check_features",
    "device_of",
    "segmentation_loss",
    "untrained",
]

METHODS: dict[str, type[LSLPN] | type[PANet] | type[SENet] | type[ALPNet]] = {
    method.name: method for method in (LSLPN, PANet, SENet, ALPNet)
}


def build(config: ModelConfig, *, generator: torch.Generator | None = None) -> FewShotNetwork:
    """The untrained network of `config.method`; raises InputError if `config.weights` cannot be
    loaded. `generator` is for the reduction layer; None uses torch's default generator."""
    return METHODS[config.method](config, generator=generator)


@torch_defaults()
def untrained(
    config: str | Config | ModelConfig = "published", *, seed: int = 1234
) -> FewShotNetwork:
    """A network before training, in evaluation mode: ImageNet trunk, random reduction layer.

    LSLPN can already segment: its authors report a liver Dice of 0.73 at step 0.

    Args:
        config: a configuration, or the name of a preset. With a name, scans are cropped to the body
            (`ModelConfig.align`), which suits a network that was not trained on whole slices.
        seed: for the reduction layer and everything else without ImageNet weights.

    Raises:
        InputError: an unknown preset, weights that cannot be loaded, or a seed below 0 or above
            2^63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected a whole number from 0 to 2^63 - 1, got {seed}")
    if isinstance(config, str):
        config = dataclasses.replace(preset(config).model, align="body")
    if isinstance(config, Config):
        config = config.model
    # Modules draw from torch's global generator; restore its state afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config, generator=torch.Generator().manual_seed(seed)).eval()
