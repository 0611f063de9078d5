"""Augmentation of training images: the paper's grey values, and ALPNet's deformation."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..config import TrainConfig

# ALPNet's, at its 256 x 256.
_ALPNET_SIDE = 256
_DEGREES = 5.0  # of turning and of shearing
_SHIFT = 5.0  # pixels
_ZOOM = (0.9, 1.2)
_GAMMA = (0.5, 1.5)
_ELASTIC, _SMOOTH = 10.0, 5.0  # pixels: factor on smoothed noise in -1 .. 1, and its sigma


def augment(image: np.ndarray, rng: np.random.Generator, options: TrainConfig) -> np.ndarray:
    """One slice with its grey values changed; the anatomy stays where it is.

    Each of the three happens with `augment_probability`, in this order, with a factor f of its own,
    uniform in `augment_low` .. `augment_high`; after each the image is limited to [0, 1]:

        gamma       x ** f
        contrast    mean + f (x - mean)
        brightness  f x

    Six numbers are drawn whatever happens, so that one image's augmentation does not shift the
    next one's.

    Args:
        image: float32 [S, S] in [0, 1]; it is not written to.
        rng: source of the randomness.
        options: of the run.

    Returns:
        float32 [S, S] in [0, 1].
    """
    happens = rng.random(3) < options.augment_probability
    low, high = options.augment_low, options.augment_high
    gamma, contrast, brightness = rng.uniform(low, high, 3).astype(np.float32)
    if happens[0]:
        image = image**gamma
    if happens[1]:
        mean = image.mean()
        image = (mean + contrast * (image - mean)).clip(0, 1)
    if happens[2]:
        image = (image * brightness).clip(0, 1)
    return image


def deformed(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A slice and its mask, both turned, sheared, zoomed, shifted and bent alike, and a gamma.

    ALPNet's: turned and sheared by up to 5 degrees, zoomed by 0.9 to 1.2 and shifted by up to 5
    pixels along either axis, then bent by noise in -1 .. 1 that is smoothed with a Gaussian of 5
    pixels and multiplied by 10; gamma uniform in 0.5 .. 1.5. Pixels are those of 256 x 256.

    Args:
        image: float32 [S, S] in [0, 1]; interpolated linearly, 0 beyond its edges.
        mask: bool or uint8 [S, S]; by nearest neighbours.
        rng: source of the randomness.

    Returns:
        float32 [S, S] in [0, 1], and the mask in its own dtype.
    """
    pixel = image.shape[0] / _ALPNET_SIDE
    turn, shear = np.radians(rng.uniform(-_DEGREES, _DEGREES, 2))
    zoom = rng.uniform(*_ZOOM)
    shift = rng.uniform(-_SHIFT, _SHIFT, 2) * pixel
    cos, sin = np.cos(turn), np.sin(turn)
    forth = (
        zoom * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, np.tan(shear)], [0.0, 1.0]])
    )
    noise = rng.uniform(-1, 1, (2, *image.shape))
    bend = ndimage.gaussian_filter(noise, (0, _SMOOTH * pixel, _SMOOTH * pixel)) * _ELASTIC * pixel

    centre = (np.array(image.shape).reshape(2, 1, 1) - 1) / 2
    there = np.indices(image.shape) - centre - shift.reshape(2, 1, 1) + bend
    source = np.einsum("ij,jyx->iyx", np.linalg.inv(forth), there) + centre
    bent = ndimage.map_coordinates(image, source, order=1, mode="constant", prefilter=False)
    kept = ndimage.map_coordinates(mask.view(np.uint8), source, order=0, mode="constant")
    gamma = rng.uniform(*_GAMMA)
    grey = bent.clip(0, 1) ** np.float32(gamma)
    return grey.astype(np.float32), kept.view(mask.dtype)
