"""Episodes: which slices the network is trained on, and how support and query are sampled.

The paper samples episodes of n classes with k support slices each; it does not say how the
support slice corresponds to the query slice. Testing pairs slices of equal relative position in
the organ's range (12 chunks), so training does too: the support slice comes from another scan,
shows the same organ, and lies within `max_position_gap` of the query's relative position.

Sampling has no state: a batch is a function of the seed and the step, so that a resumed run equals
an uninterrupted one.
"""

from __future__ import annotations

import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config, TrainConfig
from ..errors import InputError
from .augment import augment
from .dataset import Dataset
from .slices import Prepared, Treatment, prepare, warn_unlike
from .volumes import Volume

_REFERENCE_SIDE = 512  # the side at which min_organ_pixels is counted
# Keep the random streams of different purposes apart.
_SUBSAMPLE, _EPISODE = 1, 2


class Batch(NamedTuple):
    """B episodes of N ways, K shots and Q queries.

    Attributes:
        support_images: float32 [B, N K, S, S] in [0, 1]; image n K + k is shot k of way n.
        support_masks: uint8 [B, N K, N, S, S]; each image has the mask of its own way alone (one
            organ per mask), the other ways' are empty.
        query_images: float32 [B, Q, S, S] in [0, 1]; query j shows way j mod N.
        query_labels: int64 [B, Q, S, S]; 0 background, n + 1 way n, `ignore_index` (255) no loss.
    """

    support_images: Tensor
    support_masks: Tensor
    query_images: Tensor
    query_labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return Batch(*(tensor.pin_memory() for tensor in self))

    def split(self, parts: int) -> list[Batch]:
        """`parts` batches of equally many episodes."""
        return [Batch(*part) for part in zip(*(t.chunk(parts) for t in self), strict=True)]


class TrainingScans(ABC):
    """The scans to train on, read once, and the batches drawn from them.

    `hold_out` are organs that are never a class.

    Raises:
        InputError: no case, an unknown or doubled one, an unknown organ, or an unreadable scan.
    """

    organs: tuple[str, ...] = ()  # the classes that there are
    slice_count: int  # in memory

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        *,
        cases: Sequence[str],
        hold_out: Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        self.config = config
        if not cases:
            raise InputError("cases: none given; name the scans to train on")
        for case in cases:
            dataset.check_case(case)
            if list(cases).count(case) > 1:
                raise InputError(f"cases: {case!r} is given twice; name each scan once")
        self.cases = tuple(cases)
        self.hold_out = tuple(hold_out)
        self._held_out = [dataset.label_of(organ) for organ in self.hold_out]
        self._treatments: list[Treatment] = []
        self._sum = 0
        self._begin(dataset)
        bar = tqdm(self.cases, desc="reading scans", unit="scan", disable=not progress)
        scans = [self._read(dataset, case) for case in bar]
        warn_unlike(self._treatments)
        self._keep(scans)

    @abstractmethod
    def _begin(self, dataset: Dataset) -> None:
        """Find out what can be wrong before a scan is read."""

    @abstractmethod
    def _read(self, dataset: Dataset, case: str) -> Any:
        """What training keeps of a scan."""

    @abstractmethod
    def _keep(self, scans: list[Any]) -> None:
        """Keep what `_read` gave, or refuse it."""

    @abstractmethod
    def _episode(self, step: int, index: int) -> tuple[np.ndarray, ...]:
        """One episode: the arrays of a `Batch` without their first axis."""

    def batch(self, step: int, share: Sequence[int] | None = None) -> Batch:
        """The batch of training step `step`, from 0; the same whenever it is asked for.

        `share` are the numbers of its episodes to make, from 0; default: all.
        """
        share = range(self.config.train.batch) if share is None else share
        episodes = [self._episode(step, index) for index in share]
        return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*episodes, strict=True)))

    def _prepared(self, image: Volume, labels: Volume | None = None) -> Prepared:
        """The squares of a scan, whose treatment is kept, to warn of scans that are unlike."""
        ready = prepare(self.config.model, image, labels)
        self._treatments.append(ready.treatment)
        return ready

    def _shows_held_out(self, labels: Volume) -> np.ndarray:
        """Bool [Z]: any held-out organ, anywhere in the file's own slice: resizing and cropping
        must not hide a small one."""
        return np.asarray(np.isin(labels.data, self._held_out).any(axis=(1, 2)))

    def _add_to_sum(self, *arrays: np.ndarray) -> None:
        # Of voxels as a file has them: what is computed from them differs in the last bit from
        # one processor to another.
        for array in arrays:
            self._sum = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), self._sum)

    def fingerprint(self) -> int:
        """A checksum of all that was read: equal data draws equal batches."""
        return self._sum


@dataclass(frozen=True)
class _Scan:
    """What training keeps of one scan: the slices that qualify for some organ."""

    case: str
    images: np.ndarray  # float16 [n, S, S]
    labels: np.ndarray  # uint8 or int16 [n, S, S]
    z: np.ndarray  # int [n], the slices' places in the scan
    ranges: dict[str, tuple[int, int]]  # organ -> first and last qualifying place
    rows: dict[str, np.ndarray]  # organ -> rows of `images` to draw from

    def position(self, row: int, organ: str) -> float:
        """Relative position, 0 to 1, of a slice in the range of an organ, limited to it."""
        first, last = self.ranges[organ]
        if first == last:
            return 0.5
        return float(np.clip((self.z[row] - first) / (last - first), 0, 1))


class Episodes(TrainingScans):
    """The training slices in memory, and the batches drawn from them.

    A slice qualifies for an organ that it shows on more than `min_organ_pixels` pixels. Where
    more than `subsample_above` of a scan's slices qualify for an organ, `slices_per_organ` random
    ones are kept. Only slices that can be drawn are held, as float16 with labels of one byte: 3
    bytes a pixel, that is 0.2 MB a slice at 257 x 257 and 0.8 MB at 512 x 512; 12 scans of SABS
    take about 120 MB.

    Pixels of the data set's "ignore" label, and of the value `ignore_index` where it is no organ's,
    have no loss in queries; in a support they count as background.

    Held-out organs stay unlabelled background in the slices (Setting I), or their slices are
    dropped (`drop_test_slices`, Setting II).

    Args: those of `TrainingScans`.

    Raises:
        InputError: as `TrainingScans`; an organ both trained on and held out, no organ left, or
            fewer organs than ways.
    """

    def _begin(self, dataset: Dataset) -> None:
        self.size = self.config.model.size
        self.labels = _training_labels(dataset, self.config.train, self.hold_out)
        # Voxels of this value teach nothing. An organ may have the value of ignore_index itself.
        no_loss = self.config.train.ignore_index
        self._ignored = {dataset.ignore} if dataset.ignore is not None else set()
        if no_loss not in dataset.labels.values():
            self._ignored.add(no_loss)

    def _read(self, dataset: Dataset, case: str) -> _Scan:
        train = self.config.train
        image, labels = dataset.load(case)
        self._add_to_sum(image.data, labels.data)
        prepared = self._prepared(image, labels)
        assert prepared.labels is not None
        least = train.min_organ_pixels * (self.size / _REFERENCE_SIDE) ** 2
        shows_held_out = np.zeros(len(prepared.labels), dtype=bool)
        if train.drop_test_slices:
            shows_held_out |= self._shows_held_out(labels)
        ranges: dict[str, tuple[int, int]] = {}
        drawn: dict[str, np.ndarray] = {}
        for organ, label in self.labels.items():
            z = np.flatnonzero(
                ((prepared.labels == label).sum(axis=(1, 2), dtype=np.int64) > least)
                & ~shows_held_out
            )
            if len(z) == 0:
                continue
            ranges[organ] = (int(z[0]), int(z[-1]))
            if train.slices_per_organ is not None and len(z) > train.subsample_above:
                # By the case's name, so that the choice does not depend on which others are there.
                rng = np.random.default_rng(
                    [train.seed, _SUBSAMPLE, zlib.crc32(case.encode()), label]
                )
                z = np.sort(rng.choice(z, min(train.slices_per_organ, len(z)), replace=False))
            drawn[organ] = z
        kept = np.unique(np.concatenate([*drawn.values(), np.zeros(0, dtype=np.int64)]))
        return _Scan(
            case=case,
            images=prepared.slices[kept].astype(np.float16),
            labels=prepared.labels[kept],
            z=kept,
            ranges=ranges,
            rows={organ: np.searchsorted(kept, z) for organ, z in drawn.items()},
        )

    def _keep(self, scans: list[_Scan]) -> None:
        train = self.config.train
        self._scans = scans
        # Of each organ, the scans that have it; organs without any cannot be a class.
        self._scans_with = {organ: [s for s in scans if organ in s.rows] for organ in self.labels}
        self.organs = tuple(organ for organ, found in self._scans_with.items() if found)
        self.slice_count = sum(len(scan.z) for scan in scans)
        absent = [organ for organ in self.labels if organ not in self.organs]
        if not self.organs:
            raise InputError(
                f"cases: no slice of the {len(self.cases)} training scans "
                + ("without a held-out organ (drop_test_slices) " if train.drop_test_slices else "")
                + f"shows any of {', '.join(absent)} on more than {train.min_organ_pixels} pixels "
                f"(at {_REFERENCE_SIDE} x {_REFERENCE_SIDE}); train on other cases or organs, or "
                "lower min_organ_pixels"
            )
        if absent:
            warnings.warn(f"no training slice shows {', '.join(absent)}", stacklevel=3)
        if train.ways > len(self.organs):
            raise InputError(
                f"ways: {train.ways} classes per episode, but there are slices of "
                f"{len(self.organs)} organs alone ({', '.join(self.organs)}); lower it"
            )
        alone = [organ for organ in self.organs if len(self._scans_with[organ]) == 1]
        if alone:
            warnings.warn(
                f"only one training scan shows {', '.join(alone)}: support and query of these "
                "come from the same scan",
                stacklevel=3,
            )

    def _episode(self, step: int, index: int) -> tuple[np.ndarray, ...]:
        train = self.config.train
        N, K, Q, S = train.ways, train.shots, train.queries, self.size
        rng = np.random.default_rng([train.seed, _EPISODE, step, index])
        chosen = [self.organs[i] for i in rng.choice(len(self.organs), N, replace=False)]

        queries: list[tuple[_Scan, int]] = []
        for j in range(Q):
            organ = chosen[j % N]
            scans = self._scans_with[organ]
            scan = scans[rng.integers(len(scans))]
            # The first query of a way is free; more of them lie level with it, since they share
            # its support slices.
            anchor = queries[j % N][0].position(queries[j % N][1], organ) if j >= N else None
            queries.append((scan, self._row(rng, scan, organ, anchor)))
        query_scans = {scan.case for scan, _ in queries}

        support_images = np.empty((N * K, S, S), dtype=np.float32)
        support_masks = np.zeros((N * K, N, S, S), dtype=np.uint8)
        for n, organ in enumerate(chosen):
            level, row = queries[n % Q]
            anchor = level.position(row, organ) if organ in level.ranges else float(rng.random())
            scans = [s for s in self._scans_with[organ] if s.case not in query_scans]
            scans = scans or self._scans_with[organ]
            order = rng.choice(len(scans), K, replace=len(scans) < K)
            for k, which in enumerate(order):
                scan = scans[which]
                taken = {row for other, row in queries if other is scan}
                row = self._row(rng, scan, organ, anchor, taken)
                support_images[n * K + k] = self._image(rng, scan, row)
                support_masks[n * K + k, n] = scan.labels[row] == self.labels[organ]

        query_images = np.stack([self._image(rng, scan, row) for scan, row in queries])
        query_labels = np.zeros((Q, S, S), dtype=np.int64)
        for j, (scan, row) in enumerate(queries):
            for n, organ in enumerate(chosen):
                query_labels[j][scan.labels[row] == self.labels[organ]] = n + 1
            for value in self._ignored:
                query_labels[j][scan.labels[row] == value] = train.ignore_index
        return support_images, support_masks, query_images, query_labels

    def _row(
        self,
        rng: np.random.Generator,
        scan: _Scan,
        organ: str,
        anchor: float | None,
        taken: Collection[int] = (),
    ) -> int:
        """A random slice of the organ, near `anchor` where one is given, not among `taken` unless
        there is no other."""
        rows = scan.rows[organ]
        free = np.setdiff1d(rows, list(taken))
        rows = free if len(free) else rows
        if anchor is not None:
            gaps = np.abs(np.array([scan.position(row, organ) for row in rows]) - anchor)
            rows = rows[gaps <= max(self.config.train.max_position_gap, gaps.min())]
        return int(rows[rng.integers(len(rows))])

    def _image(self, rng: np.random.Generator, scan: _Scan, row: int) -> np.ndarray:
        return augment(scan.images[row].astype(np.float32), rng, self.config.train)


def _training_labels(
    dataset: Dataset, train: TrainConfig, hold_out: tuple[str, ...]
) -> dict[str, int]:
    """Organ to label value of the organs to train on."""
    wanted = dataset.organs if train.organs is None else train.organs
    both = [organ for organ in train.organs or () if organ in hold_out]
    if both:
        raise InputError(
            f"organs: {', '.join(both)} would be both trained on and held out; "
            "take it off one of the two lists"
        )
    labels = {organ: dataset.label_of(organ) for organ in wanted if organ not in hold_out}
    if not labels:
        raise InputError("hold_out: every organ of the data set is held out; leave some to train")
    return labels
