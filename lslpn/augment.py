"""Gamma, contrast and brightness: what the paper augments the training images with."""

from __future__ import annotations

import numpy as np


def augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float = 0.5,
    low: float = 0.5,
    high: float = 2.0,
) -> np.ndarray:
    """One slice with its grey values changed; the anatomy stays where it is.

    Each of the three happens with `probability`, in this order, with a factor f of its own,
    uniform in low .. high; after each the image is limited to [0, 1]:

        gamma       x ** f
        contrast    mean + f (x - mean)
        brightness  f x

    Six numbers are drawn whatever happens, so that one image's augmentation does not shift the
    next one's.

    Args:
        image: float32 [S, S] in [0, 1]; it is not written to.
        rng: source of the randomness.

    Returns:
        float32 [S, S] in [0, 1].
    """
    happens = rng.random(3) < probability
    gamma, contrast, brightness = rng.uniform(low, high, 3).astype(np.float32)
    if happens[0]:
        image = image**gamma
    if happens[1]:
        mean = image.mean()
        image = (mean + contrast * (image - mean)).clip(0, 1)
    if happens[2]:
        image = (image * brightness).clip(0, 1)
    return image
