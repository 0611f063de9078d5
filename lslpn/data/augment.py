"""Augmentation of training images: the paper's, of grey values, and ALPNet's, by deformation."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..config import TrainConfig


def augment(image: np.ndarray, rng: np.random.Generator, options: TrainConfig) -> np.ndarray:
    """Change the grey values of a slice.

    Three operations are applied in this order, each with probability `augment_probability` and its
    own factor f, uniform in `augment_low` .. `augment_high`. The result is clipped to [0, 1] after
    each:

        gamma       x ** f
        contrast    mean + f (x - mean)
        brightness  f x

    Always draws six random numbers, so that the augmentation of one image does not affect the next.

    Args:
        image: float32 [S, S] in [0, 1]; not modified.
        rng: the random generator.
        options: the settings of the run.

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
    """Apply the same random deformation to a slice and its mask, and a gamma to the slice.

    As in ALPNet: rotation and shear by up to 5 degrees, zoom by 0.9 to 1.2 and a shift of up to 5
    pixels along either axis, then an elastic deformation by noise in -1 .. 1, smoothed with a
    Gaussian of 5 pixels and multiplied by 10; gamma uniform in 0.5 .. 1.5. Pixels are those of a
    256 x 256 image.

    Args:
        image: float32 [S, S] in [0, 1]; interpolated linearly, 0 outside.
        mask: bool or uint8 [S, S]; resampled by nearest neighbours.
        rng: the random generator.

    Returns:
        float32 [S, S] in [0, 1], and the mask in its own dtype.
    """
    pixel = image.shape[0] / 256
    turn, shear = np.radians(rng.uniform(-5, 5, 2))
    zoom = rng.uniform(0.9, 1.2)
    shift = rng.uniform(-5, 5, 2) * pixel
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine = zoom * rotation @ np.array([[1.0, np.tan(shear)], [0.0, 1.0]])
    noise = rng.uniform(-1, 1, (2, *image.shape))
    bend = ndimage.gaussian_filter(noise, (0, 5 * pixel, 5 * pixel)) * 10 * pixel

    centre = (np.array(image.shape).reshape(2, 1, 1) - 1) / 2
    target = np.indices(image.shape) - centre - shift.reshape(2, 1, 1) + bend
    source = np.einsum("ij,jyx->iyx", np.linalg.inv(affine), target) + centre
    bent = ndimage.map_coordinates(image, source, order=1, mode="constant", prefilter=False)
    kept = ndimage.map_coordinates(mask.view(np.uint8), source, order=0, mode="constant")
    grey = bent.clip(0, 1) ** np.float32(rng.uniform(0.5, 1.5))
    return grey.astype(np.float32), kept.view(mask.dtype)
