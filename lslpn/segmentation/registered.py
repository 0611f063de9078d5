"""Segment a scan by supports that are registered to it, with windows in three dimensions.

Each support's labels and features are warped to the query (see `initial_alignment` and
`registration`). Local prototypes are pooled from them in windows that extend over several slices
and matched with the query, and the logits are added to log-odds of the propagated labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from ..data.volumes import Volume
from ..models import LSLPN, FewShotNetwork, check_features
from .descriptors import Field, Scan, centres
from .frames import (
    Frame,
    frames_of,
    halved,
    labels_in_source,
    probabilities_in_source,
    values_of,
)
from .initial_alignment import (
    SHORT_MM,
    initial_alignment,
    matched_line,
    slice_descriptors,
    trunk_to_trunk,
)
from .refinement import contrast, refined_logits
from .registered_why import heights_of, record, recorder_of
from .registration import Alignment, Registration, fitted
from .result import Segmentation

Align = Literal["affine", "deformable"]
Used = Literal["none", "body", "affine", "deformable"]

DEPTH_MM = 60.0
_LABEL_WEIGHT = 4.0  # of propagated labels beside features, after a deformable registration
_LABEL_SIGMA_MM = 4.0  # propagated labels are smoothed by this
_LEAST_SHARE = 0.02  # added to smoothed labels: none of them is impossible
_LOGIT_SIGMA_MM = (6.0, 2.0)  # along z, and in the slice
_ISLAND = 0.2  # components smaller than this share of an organ's largest are removed
# Mean cosine of the slices that face each other, below which scans are reported as dissimilar. It
# is 0.11 to 0.7 between whole scans of 12 SABS patients, with the weights that ship, and 0 to 0.1
# between the uppermost 130 mm of one and the lowest of another.
_DISSIMILAR = 0.105
_LEAST_OVERLAP = 0.25
_OFFSETS_MM = (0.0, 40.0, -40.0)  # along z, of initial maps from matched slices
_LEAST_MM, _LEAST_SLICES = 39.5, 8  # of a scan that can be registered: 7 points of the lattice
_MOST_FOLDING = 0.25
_SHARPNESS = (
    10.0  # a support's weight is exp of this times the agreement of its features and labels
)


def segment_registered(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    align: Align,
    depth: float = DEPTH_MM,
    keep_islands: bool = False,
    batch: int = 8,
    progress: bool = False,
    explain: bool = False,
    probabilities: bool = False,
    cache: dict[int, Scan] | None = None,
) -> Segmentation | None:
    """As `segment.segment_matched`, which checks the arguments; model in evaluation mode.

    Returns:
        None, with a warning, where slices must be matched one by one instead: a scan is too small
        to be registered, or nothing was found in a short one.
    """
    frames, target = frames_of(model.config, supports, query)
    for frame in (target, *frames):
        if min(frame.size) < _LEAST_MM or len(frame.slices) < _LEAST_SLICES:
            z, y, x = frame.size
            warnings.warn(
                f"{frame.source.path.name}: too small to be registered, "
                f"{len(frame.slices)} slices of {z:.0f} x {y:.0f} x {x:.0f} mm; its slices are "
                "matched one by one instead",
                stacklevel=3,
            )
            return None
    amp = model.amp
    model.amp = amp or _bfloat16_is_faster(model)
    try:
        with torch.inference_mode():
            total = sum(len(frame.slices) for frame in (target, *frames))
            with tqdm(total=total, desc="Reading", unit="slice", disable=not progress) as bar:
                query_scan = _encoded(model, target, batch, bar)
                scans = []
                for number, frame in enumerate(frames):
                    scan = None if cache is None else cache.get(number)
                    if scan is None or not _same(scan, frame):
                        scan = _encoded(model, frame, batch, bar)
                    if cache is not None:
                        cache[number] = scan
                    scans.append(scan)
            return _segment(
                model, frames, target, query_scan, scans, align, depth, keep_islands, progress,
                explain, probabilities,
            )  # fmt: skip
    finally:
        model.amp = amp


def _bfloat16_is_faster(model: FewShotNetwork) -> bool:
    """Whether the CPU has bfloat16 instructions; on a GPU the caller decides, by `model.amp`."""
    if next(model.parameters()).device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def _encoded(model: FewShotNetwork, frame: Frame, batch: int, bar: tqdm) -> Scan:
    """The scan of a frame, with the features of all its slices, on the CPU."""
    device = next(model.parameters()).device
    out = []
    for images in frame.slices.split(batch):
        out.append(model.encode(images.to(device)).float().cpu())
        bar.update(len(images))
    values = torch.cat(out)
    check_features(values)
    features = Field(values.transpose(0, 1).contiguous(), frame.size)
    tissue = None if frame.tissue is None else Field(frame.tissue[None], frame.size)
    return Scan(Field(frame.slices[None], frame.size), features, tissue)


def _same(scan: Scan, frame: Frame) -> bool:
    """Whether a scan was encoded from this frame: another query may need another window."""
    return scan.image.size == frame.size and torch.equal(scan.image.values[0], frame.slices)


# --- registration --------------------------------------------------------------------------------


def _aligned(
    support: Frame, query: Frame, support_scan: Scan, query_scan: Scan, align: Align
) -> tuple[Alignment, Used]:
    """The alignment of a support, and which kind it is; warns where one has failed."""
    names = f"{query.source.path.name} by {support.source.path.name}"
    descriptors = (
        slice_descriptors(query_scan.features, query.boxes),
        slice_descriptors(support_scan.features, support.boxes),
    )
    heights = query.size[0], support.size[0]
    start = initial_alignment(*descriptors, *heights)
    if start.mirrored:
        sides = {"x": "left and right", "y": "front and back", "z": "head and feet"}
        swapped = " and ".join(sides[axis] for axis in start.mirrored)
        warnings.warn(
            f"{names}: the scans are most similar with {swapped} of one of them swapped; check "
            "that the affines of both files are right",
            stacklevel=5,
        )
    if start.similarity < _DISSIMILAR:
        warnings.warn(
            f"{names}: the scans are dissimilar (mean cosine of their slices "
            f"{start.similarity:.2f}), so that the result is doubtful; check that both show the "
            "same part of the body, in the same modality",
            stacklevel=5,
        )
    registration = Registration(query_scan, support_scan)
    positions = registration.positions

    def trunks(scale: float, shift: float) -> Tensor:
        return trunk_to_trunk(
            positions, scale, shift, query.boxes, heights[0], support.boxes, heights[1]
        )

    initial = trunks(start.scale, start.shift)
    matrix = registration.affine(fitted(positions, initial))
    affine = registration.aligned(positions @ matrix[:3] + matrix[3])
    if affine.overlap < _LEAST_OVERLAP:
        warnings.warn(
            f"{names}: after affine registration the bodies overlap by {affine.overlap:.0%} only, "
            "so that their bounding boxes are aligned instead",
            stacklevel=5,
        )
        return registration.aligned(initial), "body" if support.treatment.body_found else "none"
    if align == "affine":
        return affine, "affine"
    starts = [matrix]
    if line := matched_line(*descriptors, *heights):
        scale, shift = line
        starts += [fitted(positions, trunks(scale, shift + offset)) for offset in _OFFSETS_MM]
    deformed = registration.deformable(starts, support.labels_at)
    if deformed.folding > _MOST_FOLDING:
        warnings.warn(
            f"{names}: the deformation folds over itself in {deformed.folding:.0%} of the body, so "
            "that the affine alignment is used",
            stacklevel=5,
        )
        return affine, "affine"
    return deformed, "deformable"


# --- segmentation --------------------------------------------------------------------------------


def _segment(
    model: FewShotNetwork,
    supports: Sequence[Frame],
    query: Frame,
    query_scan: Scan,
    scans: Sequence[Scan],
    align: Align,
    depth: float,
    keep_islands: bool,
    progress: bool,
    explain: bool,
    probabilities: bool,
) -> Segmentation | None:
    values = values_of(supports)
    features = query_scan.features
    reach = round(depth / 2 / (query.size[0] / len(query.slices)))
    matches, used = [], []
    by_features = by_labels = total = torch.zeros(())
    recorder = None
    if explain and isinstance(model, LSLPN) and model.config.reduce == "max":
        recorder = recorder_of(model, supports, query)
    with tqdm(total=len(supports), desc="Segmenting", unit="support", disable=not progress) as bar:
        for number, (support, scan) in enumerate(zip(supports, scans, strict=True)):
            alignment, how = _aligned(support, query, scan, query_scan, align)
            matches.append(heights_of(alignment, support, query, query.source.data.shape[0]))
            used.append(how)
            warped, masks = _warped(support, query, scan, query_scan, alignment, values)
            logits = _feature_logits(model, query, features, warped, masks, reach)
            log_odds = _label_log_odds(query, masks)
            labelled = torch.tensor([value in values_of([support]) for value in values])
            if recorder is not None and isinstance(model, LSLPN):
                shown = labelled.nonzero().flatten().tolist()
                record(
                    recorder, model, number, alignment, support, query, features, warped,
                    masks[:, shown], [values[n] for n in shown], reach,
                )  # fmt: skip
            # Where a support's features and labels agree on an organ, both are likely right.
            agreement = (_SHARPNESS * _agreement(logits, log_odds)).exp()
            weight = torch.where(labelled, agreement, 0.0)[None, :, None, None]
            if how == "deformable":
                log_odds *= _LABEL_WEIGHT
            by_features = by_features + logits * weight
            by_labels = by_labels + log_odds * weight
            total = total + weight
            bar.update()
    by_features /= total
    by_labels /= total
    final = by_features + by_labels
    if not keep_islands:
        _remove_islands(final)
    final = refined_logits(query, supports, _winners(final), values)
    if not keep_islands:
        _remove_islands(final)
    labels = labels_in_source(query, final, values)
    if not labels.any():
        if min(frame.size[0] for frame in (query, *supports)) < SHORT_MM:
            warnings.warn(
                f"{query.source.path.name}: nothing was found after registration; its slices are "
                "matched one by one instead",
                stacklevel=4,
            )
            return None
        warnings.warn(
            f"{query.source.path.name}: nothing was found, every voxel is 0: everywhere the "
            "background is more similar than an organ; the scans may show different parts of the "
            "body, or differ in modality, contrast agent or range of grey values",
            stacklevel=4,
        )
    agreement = _agreement(by_features, by_labels)
    confidence = ((agreement + contrast(query, _winners(final), len(values))) / 2).tolist()
    found = np.isin(values, labels)
    return Segmentation(
        labels,
        np.stack(matches),
        None if recorder is None else recorder.result(),
        {v: round(c, 3) if f else 0.0 for v, c, f in zip(values, confidence, found, strict=True)},
        tuple(used),
        probabilities_in_source(query, final) if probabilities else None,
    )


def _warped(
    support: Frame,
    query: Frame,
    support_scan: Scan,
    query_scan: Scan,
    alignment: Alignment,
    values: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The support warped to the query: features [Z, D, h, w], masks bool [Z, N, H, W]."""

    def positions(shape: Sequence[int]) -> Tensor:
        return alignment.map.at(centres(shape, query.size)).movedim(0, -1)

    features = support_scan.features.at(positions(query_scan.features.values.shape[1:]))
    labels = support.labels_at(positions(query.slices.shape))
    return features.transpose(0, 1), torch.stack([labels == value for value in values], 1)


def _feature_logits(
    model: FewShotNetwork, query: Frame, features: Field, warped: Tensor, masks: Tensor, reach: int
) -> Tensor:
    """Logits of each label less the background's, by features: [Z, N, H/2, W/2].

    Features are 8 pixels apart, so half the image's resolution is enough.
    """
    device = next(model.parameters()).device
    _, height, width = query.slices.shape
    logits = model.match_volume(
        features.values.transpose(0, 1).to(device),
        warped.to(device),
        masks.to(device),
        (height, width),
        reach,
    ).cpu()
    return _halved_and_smoothed(query, logits[:, 1:] - logits[:, :1], _LOGIT_SIGMA_MM)


def _label_log_odds(query: Frame, masks: Tensor) -> Tensor:
    """Log-odds of each propagated label against the background: [Z, N, H/2, W/2]."""
    shares = _halved_and_smoothed(query, masks.float(), (_LABEL_SIGMA_MM, _LABEL_SIGMA_MM))
    background = (1 - shares.sum(1, keepdim=True)).clamp_min(0)
    return (shares + _LEAST_SHARE).log() - (background + _LEAST_SHARE).log()


def _halved_and_smoothed(query: Frame, planes: Tensor, sigmas: tuple[float, float]) -> Tensor:
    """[Z, N, H, W] at half the resolution, smoothed by Gaussians of mm along z and in the slice."""
    planes = halved(planes)
    z, y, x = (n / mm for n, mm in zip((len(planes), *planes.shape[2:]), query.size, strict=True))
    sigma = (sigmas[0] * z, 0.0, sigmas[1] * y, sigmas[1] * x)
    return torch.from_numpy(
        ndimage.gaussian_filter(planes.numpy(), sigma, mode="nearest", truncate=3)
    )


def _winners(logits: Tensor) -> Tensor:
    """[Z, h, w]: 0, or n where the n-th logit is the greatest and above 0."""
    highest, winner = logits.max(1)
    return torch.where(highest > 0, winner + 1, 0)


def _remove_islands(logits: Tensor) -> None:
    """Make small connected components of an organ background, in place."""
    found = _winners(logits).numpy()
    for number, box in enumerate(ndimage.find_objects(found), 1):
        if box is None:
            continue
        components, count = ndimage.label(found[box] == number)
        if count < 2:
            continue
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        small = (sizes < _ISLAND * sizes.max()) & (sizes > 0)
        part = logits[:, number - 1][box]
        part[torch.from_numpy(small[components])] = -1.0


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """Dice between the organs by two kinds of logits [Z, N, h, w]: [N]; 0 where neither has one."""
    count = one.shape[1] + 1
    a, b = _winners(one), _winners(other)
    sizes = [w.flatten().bincount(minlength=count)[1:] for w in (a, b, torch.where(a == b, a, 0))]
    return 2 * sizes[2] / (sizes[0] + sizes[1]).clamp_min(1)
