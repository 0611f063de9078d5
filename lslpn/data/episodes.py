"""Episodes: which slices the network is trained on, and how support and query are sampled.

The paper samples episodes of n classes with k support slices each, but does not say how support
slices are chosen for a query slice. At test time, slices at the same relative position in the
organ's range are paired (12 chunks). Training does the same: a support slice comes from another
scan, shows the same organ, and is within `max_position_gap` of the query's relative position.

A batch depends only on the seed and the step, so that a resumed run equals an uninterrupted one.
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

from ..config import Config
from ..errors import InputError, several
from .augment import augment
from .dataset import Dataset
from .slices import Prepared, Treatment, prepare, warn_unlike
from .volumes import Volume

_REFERENCE_SIDE = 512  # the side at which min_organ_pixels is counted
# Each use of random numbers has its own stream.
_SUBSAMPLE, _EPISODE = 1, 2


class Batch(NamedTuple):
    """B episodes of N ways, K shots and Q queries.

    Attributes:
        support_images: float32 [B, N K, S, S] in [0, 1]; image n K + k is shot k of way n.
        support_masks: uint8 [B, N K, N, S, S]; each image has a mask only for its own way, those
            of the other ways are empty.
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
        """The same batch in page-locked memory, for copies to a GPU that do not block."""
        return Batch(*(tensor.pin_memory() for tensor in self))

    def split(self, parts: int) -> list[Batch]:
        """Split into `parts` batches of the same number of episodes."""
        return [Batch(*part) for part in zip(*(t.chunk(parts) for t in self), strict=True)]


class TrainingScans(ABC):
    """The scans to train on, held in memory, and the batches drawn from them.

    Organs in `hold_out` are never a class.

    Raises:
        InputError: no case, an unknown or repeated one, an unknown organ, or an unreadable scan.
    """

    organs: tuple[str, ...] = ()  # the classes
    slice_count: int  # slices in memory

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
        self.cases, self.hold_out = several("cases", cases), several("hold_out", hold_out)
        if not self.cases:
            raise InputError("cases: none given; name the scans to train on")
        for case in self.cases:
            dataset.check_case(case)
            if self.cases.count(case) > 1:
                raise InputError(f"cases: {case!r} is given twice; name each scan once")
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
        """Check what can be checked before any scan is read."""

    @abstractmethod
    def _read(self, dataset: Dataset, case: str) -> Any:
        """Read what training needs of a scan."""

    @abstractmethod
    def _keep(self, scans: list[Any]) -> None:
        """Store what `_read` returned for all scans, or raise InputError."""

    @abstractmethod
    def _episode(self, step: int, index: int) -> tuple[np.ndarray, ...]:
        """One episode: the arrays of a `Batch` without their first axis."""

    def batch(self, step: int, share: Sequence[int] | None = None) -> Batch:
        """The batch of training step `step`, counted from 0.

        `share` selects some of its episodes by index; default: all.
        """
        share = range(self.config.train.batch) if share is None else share
        episodes = [self._episode(step, index) for index in share]
        return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*episodes, strict=True)))

    def _prepared(self, image: Volume, labels: Volume | None = None) -> Prepared:
        """Prepare a scan and record its treatment, to warn if scans were treated differently."""
        ready = prepare(self.config.model, image, labels)
        self._treatments.append(ready.treatment)
        return ready

    def _shows_held_out(self, labels: Volume) -> np.ndarray:
        """Bool [Z], slices of the original file that show a held-out organ; resizing or cropping
        might hide a small one."""
        return np.asarray(np.isin(labels.data, self._held_out).any(axis=(1, 2)))

    def _add_to_sum(self, *arrays: np.ndarray) -> None:
        # Of the original voxels: values computed from them differ in the last bit from one
        # processor to another.
        for array in arrays:
            self._sum = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), self._sum)

    def fingerprint(self) -> int:
        """A checksum of all that was read: the same data results in the same batches."""
        return self._sum


@dataclass(frozen=True)
class _Scan:
    """What training needs of a scan: the slices that qualify for some organ."""

    case: str
    images: np.ndarray  # float16 [n, S, S]
    labels: np.ndarray  # uint8 or int16 [n, S, S]
    z: np.ndarray  # int [n], the slices' indices in the scan
    ranges: dict[str, tuple[int, int]]  # organ -> first and last qualifying index
    rows: dict[str, np.ndarray]  # organ -> rows of `images` to draw from

    def position(self, row: int, organ: str) -> float:
        """The relative position of a slice in an organ's range, clipped to 0 .. 1."""
        first, last = self.ranges[organ]
        if first == last:
            return 0.5
        return float(np.clip((self.z[row] - first) / (last - first), 0, 1))


class Episodes(TrainingScans):
    """The training slices in memory, and the batches drawn from them.

    A slice qualifies for an organ if it shows more than `min_organ_pixels` pixels of it. If more
    than `subsample_above` slices of a scan qualify for an organ, `slices_per_organ` random ones are
    kept. Only slices that can be drawn stay in memory, as float16 with labels of one byte: 3 bytes
    per pixel, 0.2 MB per slice of 257 x 257 and 0.8 MB of 512 x 512; 12 scans of SABS take about
    120 MB.

    Query pixels with the data set's "ignore" label have no loss, nor have those with the value
    `ignore_index` unless it is an organ's. In a support they count as background.

    Held-out organs are unlabelled background (Setting I), or all slices that show them are dropped
    (`drop_test_slices`, Setting II).

    Args: as for `TrainingScans`.

    Raises:
        InputError: as `TrainingScans`; an organ is both trained on and held out, no organ is left,
            or there are fewer organs than ways.
    """

    def _begin(self, dataset: Dataset) -> None:
        self.size = self.config.model.size
        train = self.config.train
        both = [organ for organ in train.organs or () if organ in self.hold_out]
        if both:
            raise InputError(
                f"organs: {', '.join(both)} would be both trained on and held out; "
                "remove it from one of the two"
            )
        wanted = dataset.organs if train.organs is None else train.organs
        self.labels = {o: dataset.label_of(o) for o in wanted if o not in self.hold_out}
        if not self.labels:
            raise InputError(
                "hold_out: every organ of the data set is held out; leave some to train"
            )
        self._ignored = set() if dataset.ignore is None else {dataset.ignore}
        if train.ignore_index not in dataset.labels.values():
            self._ignored.add(train.ignore_index)

    def _read(self, dataset: Dataset, case: str) -> _Scan:
        train = self.config.train
        image, labels = dataset.load(case)
        self._add_to_sum(image.data, labels.data)
        prepared = self._prepared(image, labels)
        assert prepared.labels is not None
        least = train.min_organ_pixels * (self.size / _REFERENCE_SIDE) ** 2
        allowed = np.ones(len(prepared.labels), dtype=bool)
        if train.drop_test_slices:
            allowed = ~self._shows_held_out(labels)
        ranges: dict[str, tuple[int, int]] = {}
        drawn: dict[str, np.ndarray] = {}
        for organ, label in self.labels.items():
            pixels = (prepared.labels == label).sum(axis=(1, 2), dtype=np.int64)
            z = np.flatnonzero((pixels > least) & allowed)
            if len(z) == 0:
                continue
            ranges[organ] = (int(z[0]), int(z[-1]))
            if train.slices_per_organ is not None and len(z) > train.subsample_above:
                # Seeded by the case's name, so that the choice does not depend on other cases.
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
                f"ways: {train.ways} classes per episode, but only {len(self.organs)} organs have "
                f"training slices ({', '.join(self.organs)}); lower it"
            )
        alone = [organ for organ in self.organs if len(self._scans_with[organ]) == 1]
        if alone:
            warnings.warn(
                f"only one training scan shows {', '.join(alone)}: support and query for these "
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
            # The first query of a way is random; others are close to its position, because they
            # share its support slices.
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
        """A random slice of the organ, near the relative position `anchor` if given, and not in
        `taken` unless there is no other."""
        rows = scan.rows[organ]
        free = np.setdiff1d(rows, list(taken))
        rows = free if len(free) else rows
        if anchor is not None:
            gaps = np.abs(np.array([scan.position(row, organ) for row in rows]) - anchor)
            rows = rows[gaps <= max(self.config.train.max_position_gap, gaps.min())]
        return int(rows[rng.integers(len(rows))])

    def _image(self, rng: np.random.Generator, scan: _Scan, row: int) -> np.ndarray:
        return augment(scan.images[row].astype(np.float32), rng, self.config.train)
