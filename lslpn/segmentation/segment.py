"""Segment a scan that nobody has looked at yet, with one or a few labelled scans.

The protocols of the literature tell the method where in the query the organ begins and ends.
Here nobody knows. Supports are registered to the query and matched there (see `volumetric`); or
every slice of the query is matched with a slice of each support, in order along z, or lies beyond
them, and an organ that its match does not show is not in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.intensities import interpret
from ..data.slices import (
    Prepared,
    prepare_for,
    resized,
    shared_window,
    warn_not_cropped,
    warn_unlike,
)
from ..data.volumes import Volume, as_volume
from ..errors import InputError
from ..models import LSLPN, FewShotNetwork, check_features
from .outlines import redrawn
from .registration import Scan
from .slice_matching import BEYOND, match_slices, slice_similarity
from .volumetric import DEPTH_MM, Segmentation, segment_registered
from .why import Recorder

Supports = Sequence[tuple[Volume | nib.Nifti1Image, Volume | nib.Nifti1Image]]
Shot = tuple[int, int]  # index of the support, slice

# Slices are compared at this size: it takes a quarter of the time of 256 and finds slices as
# well, and only slices with an organ in them are encoded in full.
_MATCH_SIZE = 128
_CELLS = 4  # features are averaged over 4 x 4 parts of the slice: coarse enough for other patients
# Shots are taken from the matched slice and from slices that lie so many mm below and above it:
# matches are off by a slice or two, and organs lie higher in one patient than in another. Mean
# Dice of liver, spleen and kidneys over the pairs of four of the cases: 0.553 without the others,
# 0.582 with them. Out to 18 mm it is 0.605, but the demo's spleen falls from 0.73 to 0.69.
_SHOTS_MM = (-9.0, -3.0, 0.0, 3.0, 9.0)
# Matches have collapsed where the support moves on by less than this part of what the query and
# it have room for, if that is long enough to tell. In pairs that work it is 0.5 and more.
_COLLAPSED, _COLLAPSED_MM = 0.25, 30.0


@overload
def segment(
    model: FewShotNetwork, supports: Supports, query: Volume, **options: Any
) -> np.ndarray: ...
@overload
def segment(
    model: FewShotNetwork, supports: Supports, query: nib.Nifti1Image, **options: Any
) -> nib.Nifti1Image: ...
def segment(  # type: ignore[misc]  # options are declared here alone
    model: FewShotNetwork,
    supports: Supports,
    query: Volume | nib.Nifti1Image,
    *,
    align: Literal["none", "body", "affine", "deformable"] = "deformable",
    depth: float = DEPTH_MM,
    keep_islands: bool = False,
    batch: int = 8,
    progress: bool = False,
) -> np.ndarray | nib.Nifti1Image:
    """Segment a scan by one or more labelled scans.

    Each support is registered to the query, and windows in three dimensions are matched; or, with
    `align` "body" and "none", every slice of the query is matched with a slice of each support (see
    `match_slices`), which says which organs it may hold; it and its neighbours are its shots.

    Args:
        model: of any method; decides the size and the window, see `lslpn.untrained`. Runs where its
            parameters are, in evaluation mode.
        supports: pairs of an image and its labels, volumes or images of nibabel. Labels mean the
            same in all of them and come out with the same values. A label that a support lacks
            altogether is taken for not drawn there: that support is no shot for it, neither for nor
            against.
        query: the scan to segment, likewise.
        align: "deformable" and "affine" register each support to the query, organ by organ or as a
            whole; where that fails, the one before is taken, with a warning, and scans too small
            for it (less than 100 mm high) are matched as by "body". "body" matches slices that are
            cut to the patient's trunk first, "none" whole slices. Where no body stands out in one
            of the scans, none is cut.
        depth: with "deformable" and "affine", mm along z that a window reaches over: slices within
            half of it, either way, make a prototype together; 0 is the slice alone. Of a patient
            less than 300 mm wide it is less in proportion, as are the 100 mm above.
        keep_islands: with these, keep pieces of an organ that are much smaller than its largest.
        batch: query slices that are encoded at once.
        progress: show bars with rate and time left on stderr.

    Returns:
        [Z, Y, X] labels in the frame of `query.data`, of the least integer type that holds those
        of the supports; of a nibabel image an image in its own grid, with its header. Warns
        (UserWarning) where the scans could not be treated alike, where the matching is doubtful,
        and where nothing was found.

    Raises:
        InputError: no support, a support's labels are empty or on another grid than its image, or
            the model's weights are damaged; of nibabel images what `read_image` and `read_labels`
            raise.
        TypeError: a scan that is neither a volume nor a nibabel image.
        ValueError: `align` or `depth` of another value than those above.
    """
    scan = as_volume(query)
    labels = segment_matched(
        model,
        [(as_volume(image), as_volume(drawn, labels=True)) for image, drawn in supports],
        scan,
        align=align,
        depth=depth,
        keep_islands=keep_islands,
        batch=batch,
        progress=progress,
    ).labels
    return labels if isinstance(query, Volume) else replace(scan, data=labels).to_nibabel()


def segment_matched(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    align: Literal["none", "body", "affine", "deformable"] = "deformable",
    depth: float = DEPTH_MM,
    keep_islands: bool = False,
    batch: int = 8,
    progress: bool = False,
    explain: bool = False,
    probabilities: bool = False,
    kept: dict[int, Scan] | None = None,
) -> Segmentation:
    """As `segment`, and tell which slices were matched.

    Args:
        explain: tell which windows decided as well.
        probabilities: work out the probability of every label as well.
        kept: an empty dict, given again for the next query with the same model and supports:
            features of the supports are kept in it, which need not be worked out anew.
    """
    if not supports:
        raise InputError("supports: expected at least one labelled scan, got none")
    for _, drawn in supports:
        if not drawn.data.any():
            raise InputError(
                f"{drawn.path}: the mask is empty (every voxel is 0), expected at least one "
                "labelled voxel; give the mask in which the organ is drawn"
            )
    if align not in ("none", "body", "affine", "deformable"):
        raise ValueError(f"align: expected none, body, affine or deformable, got {align!r}")
    if not depth >= 0:
        raise ValueError(f"depth: expected 0 mm or more, got {depth}")
    training = model.training
    if align == "affine" or align == "deformable":
        model.eval()
        try:
            found = segment_registered(
                model,
                supports,
                query,
                align=align,
                depth=depth,
                keep_islands=keep_islands,
                batch=batch,
                progress=progress,
                explain=explain,
                probabilities=probabilities,
                kept=kept,
            )
        finally:
            model.train(training)
        if found is not None:
            return found
        align = "body"
    ready, target = _prepare(model, supports, query, align)
    model.eval()
    try:
        with torch.inference_mode():
            matches = _match(model, ready, target, batch, progress)
            collapsed = _collapsed(matches, ready, target)
            if collapsed and target.treatment.body_found:
                plain, whole = _prepare(model, supports, query, "none")
                others = _match(model, plain, whole, batch, progress)
                if len(left := _collapsed(others, plain, whole)) < len(collapsed):
                    warnings.warn(
                        f"{query.path.name}: cut to the body, its slices all resemble the same few "
                        f"of {collapsed[0]}; the whole slices are used, without the crop",
                        stacklevel=2,
                    )
                    ready, target, matches, collapsed = plain, whole, others, left
            if collapsed:
                warnings.warn(
                    f"{query.path.name}: its slices all resemble the same few of {collapsed[0]}, "
                    "so that the result is doubtful; check that both show the same part of the "
                    "body, in the same modality",
                    stacklevel=2,
                )
            recorder = None
            if explain and isinstance(model, LSLPN) and model.config.reduce == "max":
                recorder = Recorder(
                    len(target.slices),
                    model.head.grid,
                    (target.slices.shape[1], target.slices.shape[2]),
                    target.boxes,
                    [support.boxes for support in ready],
                )
            labels = target.restore(
                _segment(model, ready, target, matches, batch, progress, recorder)
            )
    finally:
        model.train(training)
    if not labels.any():
        shown = any(True for _ in _groups(ready, matches, batch))
        reason = (
            "everywhere the background is more alike than an organ; the scans may differ in "
            "modality, contrast agent or range of grey values"
            if shown
            else "none of its slices resembles one that shows an organ; the scans may show "
            "different parts of the body"
        )
        warnings.warn(
            f"{query.path.name}: nothing was found, every voxel is 0: {reason}", stacklevel=2
        )
    why = None if recorder is None else recorder.result()
    labels, shares = redrawn(model.config, supports, query, labels, probabilities=probabilities)
    beyond = (matches == BEYOND).all(0)  # no organ is looked for there, none spreads to there
    labels[beyond] = 0
    if shares is not None:
        shares[:, beyond] = 0
    return Segmentation(labels, matches, why, probabilities=shares)


def _prepare(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    align: Literal["none", "body"],
) -> tuple[list[Prepared], Prepared]:
    """Supports and query, treated alike as far as can be: one window, all cropped or none."""
    scans: list[tuple[Volume, Volume | None]] = [*supports, (query, None)]
    window = shared_window(model.config.window, [interpret(image.data) for image, _ in scans])

    def prepared(align: Literal["none", "body"]) -> list[Prepared]:
        return [prepare_for(model.config, *scan, align=align, window=window) for scan in scans]

    out = prepared(align)
    without = [scan.treatment.name for scan in out if scan.treatment.body_found is False]
    warn_not_cropped(without, len(out))
    if without:
        out = prepared("none")
    warn_unlike([scan.treatment for scan in out])
    return out[:-1], out[-1]


# --- which slice goes with which ---------------------------------------------------------------


def _match(
    model: FewShotNetwork, supports: Sequence[Prepared], query: Prepared, batch: int, progress: bool
) -> np.ndarray:
    """The slice of each support for each slice of the query: int [supports, Z]."""
    total = len(query.slices) + sum(len(support.slices) for support in supports)
    with tqdm(total=total, desc="Matching slices", unit="slice", disable=not progress) as bar:
        described = [_describe(model, scan.slices, batch, bar) for scan in (query, *supports)]
    step = query.source.spacing[0]
    matches = []
    for support, descriptors in zip(supports, described[1:], strict=True):
        support_step = support.source.spacing[0]
        similarity = slice_similarity(described[0], descriptors, step, support_step)
        matches.append(match_slices(similarity, step, support_step))
    return np.stack(matches)


def _describe(model: FewShotNetwork, slices: np.ndarray, batch: int, bar: tqdm) -> Tensor:
    """Features averaged over parts of each slice: [Z, D, cells, cells], on the CPU."""
    device = next(model.parameters()).device
    out = []
    for start in range(0, len(slices), batch):
        images = torch.from_numpy(slices[start : start + batch]).to(device)
        side = min(_MATCH_SIZE, images.shape[-1])
        features = model.encode(resized(images[:, None], (side, side))[:, 0])
        out.append(F.adaptive_avg_pool2d(features, _CELLS).float().cpu())
        bar.update(len(images))
    described = torch.cat(out)
    check_features(described)
    return described


def _collapsed(matches: np.ndarray, supports: Sequence[Prepared], query: Prepared) -> list[str]:
    """Names of the supports of which only a few slices are matched, again and again."""
    out = []
    step = query.source.spacing[0]
    for match, support in zip(matches, supports, strict=True):
        support_step = support.source.spacing[0]
        inside = match[match != BEYOND]
        room = min((len(inside) - 1) * step, (len(support.slices) - 1) * support_step)
        moved = (inside[-1] - inside[0]) * support_step
        if room >= _COLLAPSED_MM and moved < _COLLAPSED * room:
            out.append(support.treatment.name)
    return out


# --- segmenting --------------------------------------------------------------------------------


def _segment(
    model: FewShotNetwork,
    supports: Sequence[Prepared],
    query: Prepared,
    matches: np.ndarray,
    batch: int,
    progress: bool,
    recorder: Recorder | None = None,
) -> np.ndarray:
    """Labels [Z, S, S] of the query's prepared slices."""
    device = next(model.parameters()).device
    kinds = [support.labels.dtype for support in supports if support.labels is not None]
    out = np.zeros(query.slices.shape, np.result_type(*kinds))
    size = (query.slices.shape[1], query.slices.shape[2])
    parts = _parts(supports, apart=model.one_shot)
    groups = list(_groups(supports, matches, batch))
    total = sum(len(queries) for queries, _ in groups)
    kept: dict[Shot, Tensor] = {}  # features of support slices
    with tqdm(total=total, desc="Segmenting", unit="slice", disable=not progress) as bar:
        for queries, matched in groups:
            shots = (
                matched
                if model.one_shot
                else [shot for match in matched for shot in _neighbours(supports, match)]
            )
            # Matches never fall: what lies below these shots is not needed again.
            lowest = dict(reversed(shots))
            kept = {s: f for s, f in kept.items() if s[1] >= lowest.get(s[0], s[1] + 1)}
            new = [shot for shot in shots if shot not in kept]
            images = [supports[i].slices[z] for i, z in new] + [query.slices[z] for z in queries]
            features = model.encode(torch.from_numpy(np.stack(images)).to(device))
            kept.update(zip(new, features, strict=False))
            best = torch.zeros((len(queries), *query.slices.shape[1:]), device=device)
            found = torch.zeros(best.shape, dtype=torch.int64, device=device)
            for drawn_in, values in parts:
                own = [shot for shot in shots if shot[0] in drawn_in]
                in_match = [_slice(supports, match) for match in matched if match[0] in drawn_in]
                shown = [v for v in values if any((labels == v).any() for labels in in_match)]
                if not shown:
                    continue
                masks = np.stack([[_slice(supports, shot) == v for v in shown] for shot in own])
                support = model.describe(
                    torch.stack([kept[shot] for shot in own])[None],
                    torch.from_numpy(masks)[None].to(device),
                )
                logits = model.match(features[None, len(new) :], support, size)[0]
                if recorder is not None:
                    recorder.add(
                        queries, [0, *shown], features[len(new) :], support.values, [own], matched
                    )
                organ, winner = logits[:, 1:].max(1)
                lead = organ - logits[:, 0]
                better = lead > best
                best = torch.where(better, lead, best)
                found = torch.where(better, torch.tensor(shown, device=device)[winner], found)
            out[queries] = found.cpu().numpy()
            bar.update(len(queries))
    return out


def _parts(supports: Sequence[Prepared], *, apart: bool) -> list[tuple[frozenset[int], list[int]]]:
    """Label values by the supports that they are drawn in: (supports, values).

    Values that are drawn in the same supports are segmented at once, n-way, rather than each
    against all the rest: on four pairs of SABS and eight organs the mean Dice is the same (0.373),
    no organ differs by more than 0.005, and it takes one pass. Where an organ is drawn in some
    supports alone, the others would teach that it is background, so those values go apart.
    `apart`, for a network of one way and one shot, has every value of every support alone; the
    clearest of them wins.
    """
    drawn: dict[int, set[int]] = {}
    for i, support in enumerate(supports):
        for value in np.unique(_labels(support)).tolist():
            if value:
                drawn.setdefault(value, set()).add(i)
    if apart:
        return [(frozenset({i}), [value]) for value in sorted(drawn) for i in sorted(drawn[value])]
    parts: dict[frozenset[int], list[int]] = {}
    for value in sorted(drawn):
        parts.setdefault(frozenset(drawn[value]), []).append(value)
    return list(parts.items())


def _groups(
    supports: Sequence[Prepared], matches: np.ndarray, batch: int
) -> Iterator[tuple[list[int], list[Shot]]]:
    """Runs of query slices with the same matches: (query slices, their matches).

    Slices whose matches show no organ are left out: nothing is in them.
    """
    start = 0
    count = matches.shape[1]
    while start < count:
        stop = start + 1
        while (
            stop < count and stop - start < batch and (matches[:, stop] == matches[:, start]).all()
        ):
            stop += 1
        matched = [(i, int(z)) for i, z in enumerate(matches[:, start]) if z != BEYOND]
        if any(_slice(supports, match).any() for match in matched):
            yield list(range(start, stop)), matched
        start = stop


def _neighbours(supports: Sequence[Prepared], match: Shot) -> list[Shot]:
    """The shots that a match stands for, from below to above, each once."""
    i, centre = match
    step = supports[i].source.spacing[0]
    last = len(supports[i].slices) - 1
    return [
        (i, z) for z in sorted({min(max(centre + round(d / step), 0), last) for d in _SHOTS_MM})
    ]


def _slice(supports: Sequence[Prepared], shot: Shot) -> np.ndarray:
    """Labels [S, S] of a shot."""
    return np.asarray(_labels(supports[shot[0]])[shot[1]])


def _labels(support: Prepared) -> np.ndarray:
    assert support.labels is not None
    return support.labels
