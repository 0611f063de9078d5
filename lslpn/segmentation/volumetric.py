"""Segment a scan by supports that are registered to it first, with windows in three dimensions.

Labels and features of each support are brought to where the query has the same anatomy (see
`correspondence` and `registration`). There local prototypes are matched, of windows that are some
slices deep, and their scores are weighed with how near the aligned labels are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from ..data.volumes import Volume
from ..models import LSLPN, FewShotNetwork, check_features
from .correspondence import SHORT_MM, begin, describe, matched_line, trunk_to_trunk
from .frames import Frame, frames_of, restored, restored_probabilities, values_of
from .outlines import redrawn_leads
from .registered_why import heights_of, record, recorder_of
from .registration import Alignment, Field, Registration, Scan, centres, fitted
from .why import Why

Align = Literal["affine", "deformable"]
Used = Literal["none", "body", "affine", "deformable"]

DEPTH_MM = 60.0
_BENT_COUNT = 4.0  # what labels of a support that was bent count for beside its features
_PRIOR_MM = 4.0  # labels are taken to lie this much off
_PRIOR_LEAST = 0.02  # what a label's share is at least, where it was not carried to
_SMOOTH_MM = (6.0, 2.0)  # along z, and in the slice
_ISLAND = 0.2  # pieces smaller than this share of an organ's largest are taken off
# Mean cosine of slices that go together, below which scans show different things. It is 0.11 to 0.7
# between whole scans of 12 SABS patients, with the weights that ship, and 0 to 0.1 between the
# uppermost 130 mm of one and the lowest of another.
_UNLIKE = 0.105
_LEAST_OVERLAP = 0.25
_OFF_MM = (0.0, 40.0, -40.0)  # a second search begins where slices match, and so far off
_LEAST_MM, _LEAST_SLICES = 39.5, 8  # of a scan that can be aligned: 7 points of the lattice
_MOST_FOLDING = 0.25
_CERTAIN = 10.0  # agreement of a support's features and labels is sharpened by this


@dataclass(frozen=True)
class Segmentation:
    """What was found in a scan.

    Attributes:
        labels: uint8, int16 or int32 [Z, Y, X] in the frame of the query's data.
        matches: int [supports, Z], the slice of each support that each query slice was matched
            with, or -1.
        why: which windows decided, where that was asked for and the method has windows. Where the
            supports were registered, how near their labels lie counts as well.
        confidence: where they were, label to a number from 0 to 1: the Dice of what the aligned
            labels and what the features say of an organ; 0 for one that was not found.
        alignments: where they were, how each support was aligned in the end.
        probabilities: where they were asked for, uint8 [N, Z, Y, X]: 255 times the probability of
            each of the supports' N labels, from the lowest to the highest.
    """

    labels: np.ndarray
    matches: np.ndarray
    why: Why | None = None
    confidence: Mapping[int, float] | None = None
    alignments: tuple[str, ...] = ()
    probabilities: np.ndarray | None = None


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
    kept: dict[int, Scan] | None = None,
) -> Segmentation | None:
    """As `segment.segment_matched`, which checks the arguments; model in evaluation mode.

    Returns:
        None where slices are to be matched one by one, with a warning: a scan is too small to be
        aligned, or nothing was found in a short one.
    """
    frames, target = frames_of(model.config, supports, query)
    for frame in (target, *frames):
        if min(frame.size) < _LEAST_MM or len(frame.slices) < _LEAST_SLICES:
            z, y, x = frame.size
            warnings.warn(
                f"{frame.source.path.name}: too small to be aligned in three dimensions, "
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
                own = _encoded(model, target, batch, bar)
                others = []
                for number, frame in enumerate(frames):
                    scan = None if kept is None else kept.get(number)
                    if scan is None or not _same(scan, frame):
                        scan = _encoded(model, frame, batch, bar)
                    if kept is not None:
                        kept[number] = scan
                    others.append(scan)
            return _segment(
                model, frames, target, own, others, align, depth, keep_islands, progress, explain,
                probabilities,
            )  # fmt: skip
    finally:
        model.amp = amp


def _bfloat16_is_faster(model: FewShotNetwork) -> bool:
    """Where the processor computes in bfloat16; on a GPU the caller decides, by `model.amp`."""
    if next(model.parameters()).device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def _encoded(model: FewShotNetwork, frame: Frame, batch: int, bar: tqdm) -> Scan:
    """The frame with the features of all its slices, [D, Z, h, w], on the CPU."""
    device = next(model.parameters()).device
    out = []
    for images in frame.slices.split(batch):
        out.append(model.encode(images.to(device)).float().cpu())
        bar.update(len(images))
    values = torch.cat(out)
    check_features(values)
    features = Field(values.transpose(0, 1).contiguous(), frame.size)
    return Scan(Field(frame.slices[None], frame.size), features)


def _same(scan: Scan, frame: Frame) -> bool:
    """Whether a scan was encoded from this frame: another query may ask for another window."""
    return scan.image.size == frame.size and torch.equal(scan.image.values[0], frame.slices)


# --- aligning ----------------------------------------------------------------------------------


def _aligned(
    support: Frame, query: Frame, seen: Scan, own: Scan, align: Align
) -> tuple[Alignment, Used]:
    """Where the support lies, and by which alignment; warns of what failed."""
    names = f"{query.source.path.name} by {support.source.path.name}"
    described = describe(own.features, query.boxes), describe(seen.features, support.boxes)
    heights = query.size[0], support.size[0]
    start = begin(*described, *heights)
    if start.mirrored:
        sides = {"x": "left and right", "y": "front and back", "z": "head and feet"}
        swapped = " and ".join(sides[axis] for axis in start.mirrored)
        warnings.warn(
            f"{names}: the scans look alike with {swapped} of one of them swapped; check that "
            "the affines of both files are right",
            stacklevel=5,
        )
    if start.likeness < _UNLIKE:
        warnings.warn(
            f"{names}: their slices are hardly alike (mean cosine {start.likeness:.2f}), so that "
            "the result is doubtful; check that both show the same part of the body, in the same "
            "modality",
            stacklevel=5,
        )
    registration = Registration(own, seen)
    places = registration.places
    how: Used = "body" if support.treatment.body_found else "none"

    def trunks(stretch: float, shift: float) -> Tensor:
        """Trunk laid to trunk, with heights given."""
        return trunk_to_trunk(
            places, stretch, shift, query.boxes, heights[0], support.boxes, heights[1]
        )

    beginning = trunks(start.stretch, start.shift)
    matrix = registration.affine(fitted(places, beginning))
    straight = registration.aligned(places @ matrix[:3] + matrix[3])
    if straight.overlap < _LEAST_OVERLAP:
        warnings.warn(
            f"{names}: aligned, the bodies overlap by {straight.overlap:.0%} only, so that they "
            "are laid trunk to trunk instead",
            stacklevel=5,
        )
        return registration.aligned(beginning), how
    if align == "affine":
        return straight, "affine"
    starts = [matrix]
    if line := matched_line(*described, *heights):
        stretch, shift = line
        starts += [fitted(places, trunks(stretch, shift + off)) for off in _OFF_MM]
    bent = registration.deformable(starts, support.labels_at)
    if bent.folding > _MOST_FOLDING:
        warnings.warn(
            f"{names}: the deformation folds over itself in {bent.folding:.0%} of the body, so "
            "that the affine alignment is used",
            stacklevel=5,
        )
        return straight, "affine"
    return bent, "deformable"


# --- segmenting --------------------------------------------------------------------------------


def _segment(
    model: FewShotNetwork,
    supports: Sequence[Frame],
    query: Frame,
    own: Scan,
    others: Sequence[Scan],
    align: Align,
    depth: float,
    keep_islands: bool,
    progress: bool,
    explain: bool,
    probabilities: bool,
) -> Segmentation | None:
    values = values_of(supports)
    matches, used, weights = [], [], []
    by_features: Tensor | None = None
    recorder = None
    if explain and isinstance(model, LSLPN) and model.config.reduce == "max":
        recorder = recorder_of(model, supports, query)
    with tqdm(total=len(supports), desc="Segmenting", unit="support", disable=not progress) as bar:
        for support, seen in zip(supports, others, strict=True):
            found, how = _aligned(support, query, seen, own, align)
            matches.append(heights_of(found, support, query, query.source.data.shape[0]))
            used.append(how)
            brought, masks = _brought(support, query, seen.features, own.features, found, values)
            reach = round(depth / 2 / (query.size[0] / len(query.slices)))
            leads, carried, drawn = _leads(
                model, support, query, own.features, brought, masks, values, reach
            )
            if recorder is not None and isinstance(model, LSLPN):
                shown = [n for n, there in enumerate(drawn.tolist()) if there]
                record(
                    recorder, model, len(matches) - 1, found, support, query, own.features, brought,
                    masks[:, shown], [values[n] for n in shown], reach,
                )  # fmt: skip
            # Where features and labels of a support say the same of an organ, both are right.
            certain = (_CERTAIN * _agreement(leads, carried)).exp()
            weight = torch.where(drawn, certain, 0.0)[None, :, None, None]
            if how == "deformable":
                carried *= _BENT_COUNT
            if by_features is None:
                by_features, by_labels = leads * weight, carried * weight
            else:
                by_features += leads * weight
                by_labels += carried * weight
            weights.append(weight)
            bar.update()
    assert by_features is not None
    total = torch.stack(weights).sum(0)
    by_features /= total
    by_labels /= total
    final = by_features + by_labels
    if not keep_islands:
        _take_islands_off(final)
    final = redrawn_leads(query, supports, _winners(final), values)
    if not keep_islands:
        _take_islands_off(final)
    labels = restored(query, final, values)
    agreement = _agreement(by_features, by_labels).tolist()
    there = np.isin(values, labels)
    confidence = {
        value: round(share, 3) if found else 0.0
        for value, share, found in zip(values, agreement, there, strict=True)
    }
    if not labels.any():
        if min(frame.size[0] for frame in (query, *supports)) < SHORT_MM:
            warnings.warn(
                f"{query.source.path.name}: nothing was found where the supports were laid on it; "
                "its slices are matched one by one instead",
                stacklevel=4,
            )
            return None
        warnings.warn(
            f"{query.source.path.name}: nothing was found, every voxel is 0: everywhere the "
            "background is more alike than an organ; the scans may show different parts of the "
            "body, or differ in modality, contrast agent or range of grey values",
            stacklevel=4,
        )
    why = None if recorder is None else recorder.result()
    return Segmentation(
        labels,
        np.stack(matches),
        why,
        confidence,
        tuple(used),
        restored_probabilities(query, final) if probabilities else None,
    )


def _brought(
    support: Frame, query: Frame, seen: Field, own: Field, found: Alignment, values: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The support as it lies over the query: features [Z, D, h, w], masks bool [Z, N, H, W]."""
    there = found.map.at(centres(own.values.shape[1:], query.size)).movedim(0, -1)
    labels = support.labels_at(found.map.at(centres(query.slices.shape, query.size)).movedim(0, -1))
    return seen.at(there).transpose(0, 1), torch.stack([labels == value for value in values], 1)


def _leads(
    model: FewShotNetwork,
    support: Frame,
    query: Frame,
    own: Field,
    brought: Tensor,
    masks: Tensor,
    values: Sequence[int],
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far each label leads the background, by features and by the aligned labels.

    Returns:
        two [Z, N, H/2, W/2], and which labels are drawn in the support, bool [N].
    """
    device = next(model.parameters()).device
    count, height, width = query.slices.shape
    present = values_of([support])
    drawn = torch.tensor([value in present for value in values])
    size = ((height + 1) // 2, (width + 1) // 2)
    logits = model.match_volume(
        own.values.transpose(0, 1).to(device),
        brought.to(device),
        masks.to(device),
        (height, width),
        reach,
    ).cpu()
    cell = (query.size[0] / count, query.size[1] / size[0], query.size[2] / size[1])
    # Features are 8 pixels apart: half the resolution shows all there is.
    leads = F.interpolate(logits[:, 1:] - logits[:, :1], size=size, mode="area")
    leads = _smoothed(leads, cell, _SMOOTH_MM)
    shares = F.interpolate(masks.float(), size=size, mode="area")
    shares = _smoothed(shares, cell, (_PRIOR_MM, _PRIOR_MM))
    rest = 1 - shares.sum(1, keepdim=True)
    carried = (shares + _PRIOR_LEAST).log() - (rest.clamp_min(0) + _PRIOR_LEAST).log()
    return leads, carried, drawn


def _winners(leads: Tensor) -> Tensor:
    """[Z, h, w]: 0, or n where the n-th lead is the greatest and above 0."""
    lead, winner = leads.max(1)
    return torch.where(lead > 0, winner + 1, 0)


def _smoothed(planes: Tensor, cell: Sequence[float], sigmas: tuple[float, float]) -> Tensor:
    """[Z, N, H, W] smoothed by Gaussians of `sigmas` mm, along z and in the slice."""
    sigma = (sigmas[0] / cell[0], 0.0, sigmas[1] / cell[1], sigmas[1] / cell[2])
    return torch.from_numpy(
        ndimage.gaussian_filter(planes.numpy(), sigma, mode="nearest", truncate=3)
    )


def _take_islands_off(leads: Tensor) -> None:
    """Make small pieces of an organ background, in place."""
    found = _winners(leads).numpy()
    for number, box in enumerate(ndimage.find_objects(found), 1):
        if box is None:
            continue
        pieces, count = ndimage.label(found[box] == number)
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        small = (sizes < _ISLAND * sizes.max()) & (sizes > 0)
        part = leads[:, number - 1][box]
        part[torch.from_numpy(small[pieces])] = -1.0


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """Dice of what two leads [Z, N, h, w] say of each organ, [N]; 0 of one that neither shows."""
    count = one.shape[1] + 1
    a, b = _winners(one), _winners(other)
    sizes = [w.flatten().bincount(minlength=count)[1:] for w in (a, b, torch.where(a == b, a, 0))]
    return 2 * sizes[2] / (sizes[0] + sizes[1]).clamp_min(1)
