"""Episodes without labels, for which the class is a superpixel, as in ALPNet's training.

A slice is partitioned into regions of similar grey values. One region is the episode's class, and
two views of the slice, deformed independently, are support and query: the network learns to find a
region again. Organ labels are not used, so they cannot leak into training.

Ouyang et al., "Self-Supervision with Superpixels", ECCV 2020. Needs scikit-image:
`pip install "lslpn[superpixels]"`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from ..errors import InputError
from .augment import deformed
from .dataset import Dataset
from .episodes import TrainingScans
from .volumes import check_same_grid

_SUPERPIXEL = 3  # a random stream other than those of episodes.py
_ATTEMPTS = 100  # slices to try until one is not empty


def superpixels(image: np.ndarray, air: float = 0.0) -> np.ndarray:
    """Felzenszwalb's regions of a slice, within the body.

    The body is the largest connected piece above `air`, with its holes filled. As in ALPNet, a
    region has at least 400 pixels of a 256 x 256 image (scaled by area) before it is cut to the
    body.

    Args:
        image: float32 [S, S] in [0, 1].
        air: the value up to which a pixel is air or background, see `Prepared.air`.

    Returns:
        int32 [S, S]: 0 outside the body, then 1, 2, ...
    """
    felzenszwalb = _felzenszwalb()
    pieces, count = ndimage.label(image > air)
    if count == 0:
        return np.zeros(image.shape, np.int32)
    body = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    body = ndimage.binary_fill_holes(body)
    least = max(1, round(400 * image.size / 256**2))
    # ALPNet's settings, for grey values up to 255.
    regions = felzenszwalb(image * 255.0, scale=1, sigma=1.0, min_size=least) + 1
    _, numbers = np.unique(np.where(body, regions, 0), return_inverse=True)
    numbers = numbers.reshape(image.shape).astype(np.int32)
    # If the body covers the whole slice, no region is the background.
    return numbers + 1 if body.all() else numbers


class SuperpixelEpisodes(TrainingScans):
    """The training slices in memory, and episodes of superpixels drawn from them.

    All slices are used, except that `drop_test_slices` (Setting II) leaves out those that show a
    held-out organ. They are kept as float16, 2 bytes per pixel; the superpixels of a slice are
    computed when it is first drawn.

    An episode is one superpixel of one slice: K + Q views of the slice by `augment.deformed`, the
    first K the support. The settings for augmentation, organs and slices per organ are not used.

    Args: as for `TrainingScans`; `hold_out` has an effect only with `drop_test_slices`.

    Raises:
        InputError: as `TrainingScans`; scikit-image is not installed, or no slice is left.
    """

    def _begin(self, dataset: Dataset) -> None:
        _felzenszwalb()

    def _read(self, dataset: Dataset, case: str) -> tuple[np.ndarray, np.ndarray]:
        """Slices, float16 [n, S, S], and the threshold of air in each, [n]; labels are read only
        to leave out slices of held-out organs."""
        image = dataset.image(case)
        prepared = self._prepared(image)
        shown = np.zeros(len(prepared.slices), dtype=bool)
        if self.config.train.drop_test_slices:
            labels = dataset.load_labels(case)
            check_same_grid(image, labels)
            shown |= self._shows_held_out(labels)
        self._add_to_sum(image.data, shown)
        return prepared.slices[~shown].astype(np.float16), prepared.air[~shown]

    def _keep(self, scans: list[tuple[np.ndarray, np.ndarray]]) -> None:
        slices, air = zip(*scans, strict=True)
        self._slices, self._air = np.concatenate(slices), np.concatenate(air)
        self._found: dict[int, np.ndarray] = {}
        self.slice_count = len(self._slices)
        if not self.slice_count:
            raise InputError(
                "cases: every slice shows a held-out organ (drop_test_slices); train on other scans"
            )

    def _episode(self, step: int, index: int) -> tuple[np.ndarray, ...]:
        train = self.config.train
        rng = np.random.default_rng([train.seed, _SUPERPIXEL, step, index])
        for _ in range(_ATTEMPTS):
            which = int(rng.integers(len(self._slices)))
            regions = self._regions(which)
            if regions.max() > 0:
                break
        else:
            raise InputError(
                "cases: no superpixel was found, the slices seem to be empty; train on other scans"
            )
        image = self._slices[which].astype(np.float32)
        mask = (regions == rng.integers(1, regions.max() + 1)).astype(np.uint8)
        views = [deformed(image, mask, rng) for _ in range(train.shots + train.queries)]
        images, masks = (np.stack(part) for part in zip(*views, strict=True))
        K = train.shots
        return images[:K], masks[:K, None], images[K:], masks[K:].astype(np.int64)

    def _regions(self, which: int) -> np.ndarray:
        if which not in self._found:
            regions = superpixels(self._slices[which].astype(np.float32), self._air[which])
            self._found[which] = regions.astype(np.uint16)
        return self._found[which]


def _felzenszwalb() -> Any:
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise InputError(
            "supervision: superpixels need scikit-image, which is not installed; "
            'pip install "lslpn[superpixels]"'
        ) from error
    return felzenszwalb
