"""Segment a scan slice by slice, without registration.

The protocols of the literature are given the range of slices that an organ covers in the query.
Here every slice of the query is matched with a slice of each support, in order along z, or is
beyond their range (see `slice_matching`). A slice is segmented with the organs that its matches
show.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.intensities import interpret
from ..data.slices import (
    Prepared,
    prepare,
    resized,
    shared_window,
    warn_not_cropped,
    warn_unlike,
)
from ..data.volumes import Volume
from ..models import LSLPN, FewShotNetwork, check_features, device_of
from .descriptors import centres
from .frames import Frame, frames_of, labels_in_source, probabilities_in_source, values_of
from .refinement import refined_logits
from .result import Segmentation
from .slice_matching import BEYOND, match_slices, slice_similarity
from .why import Recorder

Shot = tuple[int, int]  # index of the support, slice

# Slices are matched at this size, which takes a quarter of the time of 256 and matches as well.
# Only slices that may show an organ are encoded in full.
_MATCH_SIZE = 128
_CELLS = 4  # features are averaged over 4 x 4 cells of a slice, to allow for differences in anatomy
# Shots are the matched slice and those this far below and above it, since matches are off by a
# slice or two, and organs are higher in one patient than in another. Mean Dice of liver, spleen and
# kidneys over the pairs of four cases: 0.553 with only the matched slice, 0.582 with these. With
# slices out to 18 mm it is 0.605, but the demo's spleen falls from 0.73 to 0.69.
_SHOTS_MM = (-9.0, -3.0, 0.0, 3.0, 9.0)
# Matching has collapsed if the matched slices span less than this share of the shorter scan's
# height, and that is at least so many mm. When matching works the share is at least 0.5.
_COLLAPSED, _COLLAPSED_MM = 0.25, 30.0


def segment_slicewise(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    align: Literal["none", "body"],
    batch: int,
    progress: bool,
    explain: bool,
    probabilities: bool,
    warned: bool = False,
) -> Segmentation:
    """`segment.segment_matched` for checked arguments and a model in evaluation mode.

    With `warned`, does not warn about scans that were not processed in the same way.
    """
    ready, target = _prepare(model, supports, query, align, warned)
    matches = _match(model, ready, target, batch, progress)
    collapsed = _collapsed(matches, ready, target)
    if collapsed and target.treatment.body_found:
        plain, whole = _prepare(model, supports, query, "none", warned=True)
        others = _match(model, plain, whole, batch, progress)
        if len(left := _collapsed(others, plain, whole)) < len(collapsed):
            warnings.warn(
                f"{query.path.name}: cropped to the body, its slices all match the same few "
                f"of {collapsed[0]}; whole slices are used instead",
                stacklevel=3,
            )
            ready, target, matches, collapsed = plain, whole, others, left
    if collapsed:
        warnings.warn(
            f"{query.path.name}: its slices all match the same few of {collapsed[0]}, so the "
            "result is doubtful; check that both show the same part of the body, in the same "
            "modality",
            stacklevel=3,
        )
    recorder = None
    if explain and isinstance(model, LSLPN) and model.config.reduce == "max":
        depth, height, width = target.slices.shape
        recorder = Recorder(
            depth, model.head.grid, (height, width), target.boxes, [scan.boxes for scan in ready]
        )
    drawn = [scan.labels for scan in ready if scan.labels is not None]
    groups = list(_groups(drawn, matches, batch))
    labels = target.restore(_segment(model, ready, drawn, target, groups, progress, recorder))
    if not labels.any():
        reason = (
            "the background is everywhere more similar than any organ; the scans may differ in "
            "modality, contrast agent or range of grey values"
            if groups
            else "none of its slices matches one that shows an organ; the scans may show "
            "different parts of the body"
        )
        warnings.warn(
            f"{query.path.name}: nothing was found, every voxel is 0: {reason}", stacklevel=3
        )
    frames, frame = frames_of(model.config, supports, query, warned=True)
    values = values_of(frames)
    logits = _refined(frame, labels, values)
    labels = labels_in_source(frame, logits, values)
    shares = probabilities_in_source(frame, logits) if probabilities else None
    beyond = (matches == BEYOND).all(0)  # refinement must not extend an organ to these slices
    labels[beyond] = 0
    if shares is not None:
        shares[:, beyond] = 0
    why = None if recorder is None else recorder.result()
    return Segmentation(labels, matches, why, probabilities=shares)


def _prepare(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    align: Literal["none", "body"],
    warned: bool = False,
) -> tuple[list[Prepared], Prepared]:
    """Supports and query, with one window for all, and either all cropped or none."""
    scans: list[tuple[Volume, Volume | None]] = [*supports, (query, None)]
    window = shared_window(model.config.window, [interpret(image.data) for image, _ in scans])
    out = [prepare(model.config, *scan, align=align, window=window) for scan in scans]
    without = [scan.treatment.name for scan in out if scan.treatment.body_found is False]
    if without:
        out = [prepare(model.config, *scan, align="none", window=window) for scan in scans]
    if not warned:
        warn_not_cropped(without, len(out))
        warn_unlike([scan.treatment for scan in out])
    return out[:-1], out[-1]


def _refined(frame: Frame, labels: np.ndarray, values: Sequence[int]) -> Tensor:
    """Logits with refined boundaries, see `refined_logits`, of labels [Z, Y, X] of the source."""
    at = replace(frame, labels=labels).labels_at(centres(frame.half[0].shape, frame.size))
    found = torch.stack([at == value for value in (0, *values)]).byte().argmax(0)
    # The supports' histograms are not used: with them, labels found slice by slice lose too much.
    return refined_logits(frame, (), found, values)


# --- matching slices -----------------------------------------------------------------------------


def _match(
    model: FewShotNetwork, supports: Sequence[Prepared], query: Prepared, batch: int, progress: bool
) -> np.ndarray:
    """The slice of each support that matches each slice of the query: int [supports, Z]."""
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
    """Features averaged over cells of each slice: [Z, D, cells, cells], on the CPU."""
    device = device_of(model)
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
    """Names of the supports of which all query slices match the same few slices."""
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


# --- segmentation --------------------------------------------------------------------------------


def _segment(
    model: FewShotNetwork,
    supports: Sequence[Prepared],
    drawn: Sequence[np.ndarray],
    query: Prepared,
    groups: Sequence[tuple[list[int], list[Shot]]],
    progress: bool,
    recorder: Recorder | None,
) -> np.ndarray:
    """Labels [Z, S, S] of the query's prepared slices, by `drawn`, those of the supports."""
    device = device_of(model)
    out = np.zeros(query.slices.shape, np.result_type(*(labels.dtype for labels in drawn)))
    _, height, width = query.slices.shape
    parts = _parts(drawn, apart=model.one_shot)
    total = sum(len(queries) for queries, _ in groups)
    cache: dict[Shot, Tensor] = {}  # features of support slices
    with tqdm(total=total, desc="Segmenting", unit="slice", disable=not progress) as bar:
        for queries, matched in groups:
            shots = (
                matched
                if model.one_shot
                else [shot for match in matched for shot in _neighbours(supports, match)]
            )
            # Matches never decrease, so shots below the lowest of each support are done with.
            lowest = dict(reversed(shots))
            cache = {s: f for s, f in cache.items() if s[1] >= lowest.get(s[0], s[1] + 1)}
            new = [shot for shot in shots if shot not in cache]
            images = [supports[i].slices[z] for i, z in new] + [query.slices[z] for z in queries]
            features = model.encode(torch.from_numpy(np.stack(images)).to(device))
            cache.update(zip(new, features, strict=False))
            best = torch.zeros((len(queries), height, width), device=device)
            found = torch.zeros(best.shape, dtype=torch.int64, device=device)
            for labelled, values in parts:
                own = [shot for shot in shots if shot[0] in labelled]
                in_match = [drawn[i][z] for i, z in matched if i in labelled]
                shown = [v for v in values if any((labels == v).any() for labels in in_match)]
                if not shown:
                    continue
                masks = np.stack([[drawn[i][z] == v for v in shown] for i, z in own])
                support = model.describe(
                    torch.stack([cache[shot] for shot in own])[None],
                    torch.from_numpy(masks)[None].to(device),
                )
                logits = model.match(features[None, len(new) :], support, (height, width))[0]
                if recorder is not None:
                    recorder.add(
                        queries, [0, *shown], features[len(new) :], support.values, [own], matched
                    )
                organ, winner = logits[:, 1:].max(1)
                logit = organ - logits[:, 0]
                better = logit > best
                best = torch.where(better, logit, best)
                found = torch.where(better, torch.tensor(shown, device=device)[winner], found)
            out[queries] = found.cpu().numpy()
            bar.update(len(queries))
    return out


def _parts(drawn: Sequence[np.ndarray], *, apart: bool) -> list[tuple[frozenset[int], list[int]]]:
    """Label values grouped by the supports that have them: (supports, values).

    Values of the same supports are segmented together, n-way, rather than each against the rest: on
    four pairs of SABS and eight organs the mean Dice is the same (0.373), no organ differs by more
    than 0.005, and it takes one pass. An organ that only some supports have would be background in
    the others, so it is segmented with only those. With `apart`, for one-way one-shot networks,
    every value of every support is a group of its own, and the highest logit wins.
    """
    pairs = sorted(
        (value, i) for i, labels in enumerate(drawn) for value in np.unique(labels[labels > 0])
    )
    if apart:
        return [(frozenset({i}), [int(value)]) for value, i in pairs]
    parts: dict[frozenset[int], list[int]] = {}
    for value, same in itertools.groupby(pairs, lambda pair: pair[0]):
        parts.setdefault(frozenset(i for _, i in same), []).append(int(value))
    return list(parts.items())


def _groups(
    drawn: Sequence[np.ndarray], matches: np.ndarray, batch: int
) -> Iterator[tuple[list[int], list[Shot]]]:
    """Up to `batch` consecutive query slices with the same matches: (query slices, matches).

    Slices whose matches show no organ are left out, since they are background.
    """
    for match, run in itertools.groupby(range(matches.shape[1]), lambda z: matches[:, z].tolist()):
        matched = [(i, z) for i, z in enumerate(match) if z != BEYOND]
        if any(drawn[i][z].any() for i, z in matched):
            queries = list(run)
            for start in range(0, len(queries), batch):
                yield queries[start : start + batch], matched


def _neighbours(supports: Sequence[Prepared], match: Shot) -> list[Shot]:
    """The shots of a match, from the lowest to the highest."""
    i, centre = match
    step = supports[i].source.spacing[0]
    last = len(supports[i].slices) - 1
    return [
        (i, z) for z in sorted({min(max(centre + round(d / step), 0), last) for d in _SHOTS_MM})
    ]
