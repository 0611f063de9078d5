"""Segment a scan by one or a few labelled scans, without being told where its organs are.

Supports are registered to the query and matched in three dimensions (see `registered`); or every
slice of the query is matched with a slice of each support (see `slicewise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import nibabel as nib
import numpy as np

from ..data.volumes import Volume, as_volume
from ..errors import InputError
from ..models import FewShotNetwork
from .descriptors import Scan
from .registered import DEPTH_MM, segment_registered
from .result import Segmentation
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
    `align` "body" and "none", every slice of the query is matched with a slice of each support,
    which then is, with its neighbours, its support.

    Args:
        model: of any method; decides the size and the window, see `lslpn.untrained`. Runs where its
            parameters are, in evaluation mode.
        supports: pairs of an image and its labels, volumes or nibabel images. Labels mean the
            same in all of them; the result has the same values. A label that a support lacks is
            taken as not annotated there: the support has no say on it.
        query: the scan to segment, likewise.
        align: "deformable" and "affine" register each support to the query. Where a deformable
            registration fails, the affine one is used, and where that fails, bounding boxes are
            aligned, with a warning; scans too small to be registered (less than 40 mm high) are
            matched as by "body". "body" matches slices that are cropped to the patient's trunk,
            "none" whole slices. Where one of the scans shows no body, none is cropped.
        depth: with "deformable" and "affine", extent of a window along z in mm: a prototype is
            pooled from the slices within half of it on either side; 0 is the slice alone. For a
            patient less than 300 mm wide it is reduced in proportion, as are the 40 mm above.
        keep_islands: with these, keep connected components of an organ that are much smaller than
            its largest.
        batch: query slices that are encoded at once.
        progress: show progress bars on stderr.

    Returns:
        [Z, Y, X] labels in the frame of `query.data`, of the smallest integer type that holds those
        of the supports; for a nibabel image an image in its own grid, with its header. Warns
        (UserWarning) where the scans could not be processed alike, where the alignment is doubtful,
        and where nothing was found.

    Raises:
        InputError: no support, a support's labels are empty or on another grid than its image, or
            the model's weights are damaged; for nibabel images what `read_image` and
            `read_labels` raise.
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
    cache: dict[int, Scan] | None = None,
) -> Segmentation:
    """As `segment`, for volumes, with more than the labels in the result.

    Args:
        explain: return the windows that decided as well.
        probabilities: return the probability of every label as well.
        cache: an empty dict, passed again with the next query, the same model and the same
            supports: it keeps the supports' features.
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
    model.eval()
    try:
        if align == "affine" or align == "deformable":
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
                cache=cache,
            )
            if found is not None:
                return found
            align = "body"
        return segment_slicewise(
            model,
            supports,
            query,
            align=align,
            batch=batch,
            progress=progress,
            explain=explain,
            probabilities=probabilities,
        )
    finally:
        model.train(training)
