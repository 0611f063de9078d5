"""Segment a scan by supports that are registered to it, with windows in three dimensions.

Each support's labels and features are warped to the query (see `initial_alignment` and
`registration`). Local prototypes are pooled from them in windows that extend over several slices
and matched with the query; the log-odds of the propagated labels are added to the logits.
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
from ..models import LSLPN, FewShotNetwork, check_features, device_of
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
from .registered_why import VolumeRecorder, heights_of
from .registration import Alignment, Registration, fitted
from .result import Align, Segmentation

DEPTH_MM = 60.0
_LABEL_WEIGHT = 4.0  # of propagated labels relative to features, if registration is deformable
_LABEL_SIGMA_MM = 4.0  # of the Gaussian that smooths propagated labels
_LEAST_SHARE = 0.02  # added to smoothed labels, so that none of them is impossible
_LOGIT_SIGMA_MM = (6.0, 2.0)  # along z and in the plane
_ISLAND = 0.2  # components smaller than this share of an organ's largest are removed
# Scans are reported as dissimilar if the mean cosine of corresponding slices is below this. It is
# 0.11 to 0.7 between whole scans of 12 SABS patients, with the weights that ship, and 0 to 0.1
# between the uppermost 130 mm of one and the lowest of another.
_DISSIMILAR = 0.105
_LEAST_OVERLAP = 0.25
_OFFSETS_MM = (0.0, 40.0, -40.0)  # along z, of initial maps from matched slices
_LEAST_MM, _LEAST_SLICES = 39.5, 8  # of a scan that can be registered: 7 points of the lattice
_MOST_FOLDING = 0.25
_SHARPNESS = 10.0  # weight of a support: exp(this * agreement of its features and labels)


def segment_registered(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    align: Literal["affine", "deformable"],
    depth: float,
    keep_islands: bool,
    batch: int,
    progress: bool,
    explain: bool,
    probabilities: bool,
    cache: dict[int, Scan] | None,
) -> Segmentation | None:
    """`segment.segment_matched` for checked arguments and a model in evaluation mode.

    Returns:
        None, with a warning, if slices must be matched one by one instead: a scan is too small to
        be registered, or nothing was found in a short one.
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
    query_scan, scans = _encoded(model, target, frames, batch, progress, cache)
    values = values_of(frames)
    features = query_scan.features.values.transpose(0, 1)
    reach = round(depth / 2 / (target.size[0] / len(target.slices)))
    matches, used = [], []
    by_features = by_labels = total = torch.zeros(())
    recorder = None
    if explain and isinstance(model, LSLPN) and model.config.reduce == "max":
        recorder = VolumeRecorder(model, frames, target, features, reach)
    with tqdm(total=len(supports), desc="Segmenting", unit="support", disable=not progress) as bar:
        for number, (support, scan) in enumerate(zip(frames, scans, strict=True)):
            alignment, how = _aligned(support, target, scan, query_scan, align)
            matches.append(heights_of(alignment, support, target, len(query.data)))
            used.append(how)
            warped, masks = _warped(support, target, scan, features.shape, alignment, values)
            logits = _feature_logits(model, target, features, warped, masks, reach)
            log_odds = _label_log_odds(target, masks)
            shown = values_of([support])
            labelled = torch.tensor([value in shown for value in values])
            if recorder is not None:
                recorder.add(number, alignment, warped, masks[:, labelled], shown)
            # If a support's features and labels agree on an organ, both are likely right.
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
    final = refined_logits(target, frames, _winners(final), values)
    if not keep_islands:
        _remove_islands(final)
    labels = labels_in_source(target, final, values)
    if not labels.any():
        if min(frame.size[0] for frame in (target, *frames)) < SHORT_MM:
            warnings.warn(
                f"{query.path.name}: nothing was found after registration; its slices are "
                "matched one by one instead",
                stacklevel=3,
            )
            return None
        warnings.warn(
            f"{query.path.name}: nothing was found, every voxel is 0: the background is "
            "everywhere more similar than any organ; the scans may show different parts of the "
            "body, or differ in modality, contrast agent or range of grey values",
            stacklevel=3,
        )
    agreement = _agreement(by_features, by_labels)
    confidence = ((agreement + contrast(target, _winners(final), len(values))) / 2).tolist()
    found = np.isin(values, labels)
    return Segmentation(
        labels,
        np.stack(matches),
        why=None if recorder is None else recorder.result(),
        confidence={
            v: round(c, 3) if f else 0.0 for v, c, f in zip(values, confidence, found, strict=True)
        },
        alignments=tuple(used),
        probabilities=probabilities_in_source(target, final) if probabilities else None,
    )


def _encoded(
    model: FewShotNetwork,
    query: Frame,
    supports: Sequence[Frame],
    batch: int,
    progress: bool,
    cache: dict[int, Scan] | None,
) -> tuple[Scan, list[Scan]]:
    """The scans of query and supports, with the features of all their slices, on the CPU."""
    device = device_of(model)
    scans = {} if cache is None else cache
    total = sum(len(frame.slices) for frame in (query, *supports))
    with tqdm(total=total, desc="Reading", unit="slice", disable=not progress) as bar:

        def encoded(frame: Frame) -> Scan:
            out = []
            for images in frame.slices.split(batch):
                out.append(model.encode(images.to(device)).float().cpu())
                bar.update(len(images))
            values = torch.cat(out)
            check_features(values)
            return Scan(
                Field(frame.slices[None], frame.size),
                Field(values.transpose(0, 1).contiguous(), frame.size),
                None if frame.tissue is None else Field(frame.tissue[None], frame.size),
            )

        query_scan = encoded(query)
        for number, frame in enumerate(supports):
            known = scans[number].image if number in scans else None
            # Another query may need another window, which changes the support's frame.
            if not (known and known.size == frame.size and known.values[0].equal(frame.slices)):
                scans[number] = encoded(frame)
    return query_scan, [scans[number] for number in range(len(supports))]


# --- registration --------------------------------------------------------------------------------


def _aligned(
    support: Frame,
    query: Frame,
    support_scan: Scan,
    query_scan: Scan,
    align: Literal["affine", "deformable"],
) -> tuple[Alignment, Align]:
    """The alignment of a support, and its kind, which is a simpler one if `align` fails."""

    def warn(text: str) -> None:
        names = f"{query.source.path.name} by {support.source.path.name}"
        warnings.warn(f"{names}: {text}", stacklevel=5)

    descriptors = (
        slice_descriptors(query_scan.features, query.boxes),
        slice_descriptors(support_scan.features, support.boxes),
    )
    heights = query.size[0], support.size[0]
    start = initial_alignment(*descriptors, *heights)
    if start.mirrored:
        sides = {"x": "left and right", "y": "front and back", "z": "head and feet"}
        swapped = " and ".join(sides[axis] for axis in start.mirrored)
        warn(
            f"the scans are most similar with {swapped} of one of them swapped; check that the "
            "affines of both files are right"
        )
    if start.similarity < _DISSIMILAR:
        warn(
            f"the scans are dissimilar (mean cosine of their slices {start.similarity:.2f}), so "
            "the result is doubtful; check that both show the same part of the body, in the same "
            "modality"
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
        warn(
            f"after affine registration the bodies overlap by only {affine.overlap:.0%}, so their "
            "bounding boxes are aligned instead"
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
        warn(
            f"the deformation folds over itself in {deformed.folding:.0%} of the body, so the "
            "affine alignment is used"
        )
        return affine, "affine"
    return deformed, "deformable"


# --- segmentation --------------------------------------------------------------------------------


def _warped(
    support: Frame,
    query: Frame,
    scan: Scan,
    shape: Sequence[int],
    alignment: Alignment,
    values: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The support warped to the query: features of `shape`, and masks bool [Z, N, H, W]."""

    def positions(shape: Sequence[int]) -> Tensor:
        return alignment.map.at(centres(shape, query.size)).movedim(0, -1)

    depth, _, height, width = shape
    features = scan.features.at(positions((depth, height, width)))
    labels = support.labels_at(positions(query.slices.shape))
    return features.transpose(0, 1), torch.stack([labels == value for value in values], 1)


def _feature_logits(
    model: FewShotNetwork, query: Frame, features: Tensor, warped: Tensor, masks: Tensor, reach: int
) -> Tensor:
    """Logits of each label less the background's, by features: [Z, N, H/2, W/2].

    Features are 8 pixels apart, so half the image's resolution is enough.
    """
    device = device_of(model)
    _, height, width = query.slices.shape
    logits = model.match_volume(
        features.to(device),
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
    """[Z, N, H, W] at half the in-plane resolution, smoothed by Gaussians (mm in z, in plane)."""
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
    """Turn small connected components of an organ into background, in place."""
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
    """Dice per organ between two kinds of logits [Z, N, h, w]: [N]; 0 if neither has the organ."""
    count = one.shape[1] + 1
    a, b = _winners(one), _winners(other)
    sizes = [w.flatten().bincount(minlength=count)[1:] for w in (a, b, torch.where(a == b, a, 0))]
    return 2 * sizes[2] / (sizes[0] + sizes[1]).clamp_min(1)
