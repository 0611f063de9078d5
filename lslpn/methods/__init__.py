"""The few-shot networks, one module each: a method is what `ModelConfig.method` names."""

from __future__ import annotations

import torch

from ..presets import ModelConfig
from .alpnet import ALPNet
from .base import FewShotNetwork, check_features, segmentation_loss
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
    "segmentation_loss",
]

METHODS: dict[str, type[LSLPN] | type[PANet] | type[SENet] | type[ALPNet]] = {
    method.name: method for method in (LSLPN, PANet, SENet, ALPNet)
}


def build(config: ModelConfig, *, generator: torch.Generator | None = None) -> FewShotNetwork:
    """The network of `config.method`, untrained.

    Args:
        config: of the network.
        generator: random numbers of the encoder's reduction layer; None uses torch's default one.

    Raises:
        InputError: `config.weights` cannot be loaded.
    """
    return METHODS[config.method](config, generator=generator)
