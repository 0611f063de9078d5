"""Segment a scan by one or a few labelled scans, without being told where its organs are.

Supports are registered to the query and matched in three dimensions (see `registered`), or every
slice of the query is matched with a slice of each support (see `slicewise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args, overload

import nibabel as nib
import numpy as np
import torch

from ..data.volumes import Volume, as_volume
from ..errors import InputError
from ..models import FewShotNetwork, device_of
from ..torch_defaults import torch_defaults
from .descriptors import Scan
from .registered import DEPTH_MM, segment_registered
from .result import Align, Segmentation
from .slicewise import segment_slicewise

Supports = Sequence[tuple[Volume | nib.Nifti1Image, Volume | nib.Nifti1Image]]


@overload
def segment(
    model: FewShotNetwork, supports: Supports, query: Volume, **options: Any
) -> np.ndarray: ...
@overload
def segment(
    model: FewShotNetwork, supports: Supports, query: nib.Nifti1Image, **options: Any
) -> nib.Nifti1Image: ...
def segment(  # type: ignore[misc]  # only the implementation declares the options
    model: FewShotNetwork,
    supports: Supports,
    query: Volume | nib.Nifti1Image,
    *,
    align: Align = "deformable",
    depth: float = DEPTH_MM,
    keep_islands: bool = False,
    batch: int = 8,
    progress: bool = False,
) -> np.ndarray | nib.Nifti1Image:
    """Segment a scan by one or more labelled scans.

    With `align` "deformable" or "affine", each support is registered to the query, and windows are
    matched in three dimensions. With "body" or "none", every slice of the query is matched with a
    slice of each support and segmented by that slice and its neighbours.

    Args:
        model: a network of any method; it determines the input size and the grey-value window, see
            `lslpn.untrained`. Runs on the device of its parameters, in evaluation mode.
        supports: pairs of an image and its labels, volumes or nibabel images. A label means the
            same organ in all of them; the result uses the same values. A support without a label
            counts as not annotated for it and is ignored for that label.
        query: the scan to segment, a volume or a nibabel image.
        align: "deformable" and "affine" register each support to the query. If a deformable
            registration fails, the affine one is used, and if that fails, bounding boxes are
            aligned, with a warning; scans too small to be registered (less than 40 mm high) are
            matched as for "body". "body" matches slices that are cropped to the patient's trunk,
            "none" whole slices. If no body is found in one of the scans, none is cropped.
        depth: with "deformable" and "affine", the extent of a window along z in mm: a prototype is
            pooled from the slices within half of it on either side; 0 means a single slice. For a
            patient less than 300 mm wide it is reduced in proportion, as are the 40 mm above.
        keep_islands: with "deformable" and "affine", keep connected components of an organ that
            are much smaller than its largest.
        batch: number of slices that are encoded at once.
        progress: show progress bars on stderr.

    Returns:
        [Z, Y, X] labels in the frame of `query.data`, of the smallest integer type that holds the
        supports' labels; for a nibabel image, an image in its own grid, with its header. Warns
        (UserWarning) if the scans could not be processed in the same way, if the alignment is
        doubtful, and if nothing was found.

    Raises:
        InputError: there is no support, a support's labels are empty or on another grid than its
            image, or the model's weights are damaged; for nibabel images, as `read_image` and
            `read_labels`.
        TypeError: a scan is neither a volume nor a nibabel image, or a support is not a pair.
        ValueError: `align`, `depth` or `batch` is not one of the values above.
    """
    scan, pairs = as_volume(query), []
    for pair in supports:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                "supports: expected pairs, [(image, labels), ...], got one of type "
                f"{type(pair).__name__}"
            )
        pairs.append((as_volume(pair[0]), as_volume(pair[1], labels=True)))
    labels = segment_matched(
        model,
        pairs,
        scan,
        align=align,
        depth=depth,
        keep_islands=keep_islands,
        batch=batch,
        progress=progress,
    ).labels
    return labels if isinstance(query, Volume) else replace(scan, data=labels).to_nibabel()


@torch_defaults()
def segment_matched(
    model: FewShotNetwork,
    supports: Sequence[tuple[Volume, Volume]],
    query: Volume,
    *,
    align: Align = "deformable",
    depth: float = DEPTH_MM,
    keep_islands: bool = False,
    batch: int = 8,
    progress: bool = False,
    explain: bool = False,
    probabilities: bool = False,
    cache: dict[int, Scan] | None = None,
) -> Segmentation:
    """Like `segment`, for volumes only, but returns more than the labels.

    Args:
        explain: also return the windows that decided.
        probabilities: also return the probability of every label.
        cache: an empty dict in which the supports' features are kept; pass it again with the next
            query, the same model and the same supports.
    """
    if not supports:
        raise InputError("supports: expected at least one labelled scan, got none")
    for _, drawn in supports:
        if not drawn.data.any():
            raise InputError(
                f"{drawn.path}: the mask is empty (every voxel is 0), expected at least one "
                "labelled voxel; give the mask in which the organ is drawn"
            )
    if align not in get_args(Align):
        raise ValueError(f"align: expected none, body, affine or deformable, got {align!r}")
    if not 0 <= depth < math.inf:  # false for NaN too
        raise InputError(f"depth: expected 0 mm or more, got {depth}")
    if batch < 1:
        raise ValueError(f"batch: expected 1 slice or more, got {batch}")
    common: dict[str, Any] = {
        "batch": batch,
        "progress": progress,
        "explain": explain,
        "probabilities": probabilities,
    }
    training, amp = model.training, model.amp
    model.eval()
    try:
        with torch.inference_mode():
            if align == "none" or align == "body":
                return segment_slicewise(model, supports, query, align=align, **common)
            # On a CPU with instructions for bfloat16 it is faster; on a GPU the caller decides.
            on_cpu = device_of(model).type == "cpu"
            model.amp = amp or (on_cpu and bool(torch.cpu._is_avx512_bf16_supported()))
            found = segment_registered(
                model,
                supports,
                query,
                align=align,
                depth=depth,
                keep_islands=keep_islands,
                cache=cache,
                **common,
            )
            if found is not None:
                return found
            model.amp = amp
            return segment_slicewise(model, supports, query, align="body", warned=True, **common)
    finally:
        model.train(training)
        model.amp = amp
