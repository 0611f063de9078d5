"""Checks of the arguments, before any kernel runs.

Shapes may be symbolic (`torch.SymInt`) while a graph is traced: they are compared, never converted
to plain numbers, so that the graph remains valid for other sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .geometry import GridSpec
from .reference import accumulation_dtype

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LONGEST = 1 << 30  # pixels or feature locations along an axis


def windows(grid: GridSpec, pixels: Any) -> Any:
    """The number of windows along an axis of `pixels`, an int or a symbol for one."""
    largest = max if isinstance(pixels, int) else torch.sym_max
    scale, spacing = _fractions(grid.written)
    window = largest(1, _part(grid.scale, scale, pixels))
    step = largest(1, _part(grid.spacing, spacing, window))
    # max(0, .) changes nothing, but lets a symbolic solver see that there is at least one.
    return 1 + largest(0, pixels - window + step - 1) // step


def _part(factor: float, fraction: tuple[int, int], n: Any) -> Any:
    """``floor(factor * n)`` with the slack of geometry.py. In integers if the factor is a simple
    fraction, because compilers reason better about them; the result is the same, since the slack is
    smaller than the distance to the next integer and far larger than rounding errors."""
    numerator, denominator = fraction
    return n * numerator // denominator if denominator else math.floor(factor * n + 1e-6)


@torch.compiler.assume_constant_result
def _fractions(written: str) -> tuple[tuple[int, int], tuple[int, int]]:
    scale, spacing = map(float, written.split())
    return _fraction(scale), _fraction(spacing)


@lru_cache(maxsize=64)
def _fraction(factor: float) -> tuple[int, int]:
    """Numerator and denominator of a factor, or (0, 0) if it has no denominator up to 1000."""
    fraction = Fraction(factor).limit_denominator(1000)
    near = abs(float(fraction) - factor) < 1e-14
    return (fraction.numerator, fraction.denominator) if near else (0, 0)


def _tensor(name: str, value: object, axes: str, empty: str = "") -> None:
    """Check that `value` is a dense tensor with these axes; those in `empty` may have length 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {axes}, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    wanted = axes.count(",") + 1
    if value.dim() != wanted:
        raise ValueError(
            f"{name} must have {wanted} dimensions {axes}, got {value.dim()}: {tuple(value.shape)}"
        )
    for letter, length in zip(axes.strip("[]").split(", "), value.shape, strict=True):
        if length < 1 and letter not in empty.split():
            raise ValueError(
                f"{name} {axes} must not be empty, got {letter} = {length}: {tuple(value.shape)}"
            )
        if length > LONGEST:
            raise ValueError(f"{name} {axes} is too large, got {letter} = {length}")


def _floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}")


def _together(name: str, value: Tensor, features: Tensor) -> None:
    if value.device != features.device:
        raise ValueError(
            f"{name} must be on the device of features, {features.device}, got {value.device}"
        )
    if value.shape[0] != features.shape[0]:
        raise ValueError(
            f"{name} must hold as many episodes B as features, {features.shape[0]}, "
            f"got {value.shape[0]}"
        )


def check_grid(grid: object) -> None:
    if not isinstance(grid, GridSpec):
        raise TypeError(f"grid must be a GridSpec, got {type(grid).__name__}")


INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32),
)
IGNORED = 255  # by convention, the label of pixels without a class


def masked_average_pool(
    features: Tensor,
    masks: Tensor,
    grid: GridSpec,
    min_pixels: float,
    background: bool,
    num_classes: int | None,
) -> None:
    _tensor("features", features, "[B, K, D, h, w]", empty="B")
    _floating("features", features)
    if isinstance(masks, Tensor) and masks.dim() == 4:
        _labels(masks, background, num_classes)
    else:
        _tensor("masks", masks, "[B, K, N, H, W]" if background else "[B, K, C, H, W]", empty="B")
        if masks.dtype not in (torch.bool, torch.uint8, *FLOATING):
            raise TypeError(
                f"masks {tuple(masks.shape)} must be bool, uint8 or floating, or a label map "
                f"[B, K, H, W] of integers, got {masks.dtype}"
            )
        if num_classes is not None:
            raise ValueError("num_classes is for label maps [B, K, H, W]: masks show their classes")
    if masks.requires_grad:
        raise ValueError("masks get no gradient: pass masks.detach()")
    _together("masks", masks, features)
    if masks.shape[1] != features.shape[1]:
        raise ValueError(
            f"masks must hold as many support images K as features, {features.shape[1]}, "
            f"got {masks.shape[1]}"
        )
    check_grid(grid)
    check_min_pixels(min_pixels)


def _labels(labels: Tensor, background: bool, num_classes: object) -> None:
    _tensor("labels", labels, "[B, K, H, W]", empty="B")
    if labels.dtype not in INTEGERS:
        raise TypeError(
            f"labels {tuple(labels.shape)} must be integers, got {labels.dtype}: class masks are "
            f"[B, K, {'N' if background else 'C'}, H, W]"
        )
    if num_classes is None:
        return
    if isinstance(num_classes, bool) or not isinstance(num_classes, (Integral, torch.SymInt)):
        raise TypeError(f"num_classes must be an integer, got {type(num_classes).__name__}")
    if not num_classes >= 1:  # type: ignore[operator]
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def plain_size(size: Sequence[Any]) -> tuple[int, int]:
    """(H, W) as integers that a graph can hold, from NumPy integers or the zero-dimensional tensors
    of a trace, for example."""
    H, W = size
    return _whole("H", H), _whole("W", W)


def _whole(letter: str, n: Any) -> Any:
    if type(n) is int or isinstance(n, torch.SymInt):
        return n
    try:
        if not isinstance(n, bool):
            return operator.index(n)
    except TypeError:
        pass
    raise TypeError(f"size must hold integers, got {letter} = {n!r}")


def check_min_pixels(min_pixels: float) -> None:
    if isinstance(min_pixels, bool) or not isinstance(min_pixels, Real):
        raise TypeError(f"min_pixels must be a number, got {type(min_pixels).__name__}")
    if not 0 <= min_pixels < 1 << 62:  # false for NaN too
        raise ValueError(f"min_pixels must be 0 or more, got {min_pixels}")


def check_reduce(reduce: object) -> None:
    if not isinstance(reduce, str) or reduce not in ("max", "mean"):
        raise ValueError(f'reduce must be "max" or "mean", got {reduce!r}')


def check_logit_scale(logit_scale: float) -> None:
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, Real):
        raise TypeError(f"logit_scale must be a number, got {type(logit_scale).__name__}")
    if not -math.inf < logit_scale < math.inf:  # false for NaN too
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale}")


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    logit_scale: float,
) -> None:
    _tensor("features", features, "[B, Q, D, h, w]", empty="B Q")
    _floating("features", features)
    _tensor("prototypes", prototypes, "[B, C, Gy, Gx, D]", empty="B")
    _floating("prototypes", prototypes)
    if prototypes.dtype not in (features.dtype, accumulation_dtype(features.dtype)):
        raise TypeError(
            f"prototypes must be {accumulation_dtype(features.dtype)} (or of the features' "
            f"dtype) for features in {features.dtype}, got {prototypes.dtype}"
        )
    _together("prototypes", prototypes, features)
    if prototypes.shape[4] != features.shape[2]:
        raise ValueError(
            f"prototypes must have as many channels D as features, {features.shape[2]}, "
            f"got {prototypes.shape[4]}"
        )
    check_grid(grid)
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise TypeError(f"size must be (H, W), got {size!r}")
    size = plain_size(size)
    for letter, length in zip("HW", size, strict=True):
        if length < 1:
            raise ValueError(f"size must be at least 1 pixel, got {letter} = {length}")
        if length > LONGEST:
            raise ValueError(f"size is too large, got {letter} = {length}")
    Gy, Gx = windows(grid, size[0]), windows(grid, size[1])
    if prototypes.shape[2] != Gy or prototypes.shape[3] != Gx:
        raise ValueError(
            f"prototypes must have (Gy, Gx) = ({Gy}, {Gx}) windows for {grid} and size "
            f"{size}, got {tuple(prototypes.shape[2:4])}"
        )
    check_reduce(reduce)
    check_logit_scale(logit_scale)


def cosine_match_loss(
    features: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, C: Any
) -> None:
    """Checks in addition to those of `cosine_match` with the size of the labels."""
    _together("labels", labels, features)
    if labels.shape[1] != features.shape[1]:
        raise ValueError(
            f"labels must hold as many query images Q as features, {features.shape[1]}, "
            f"got {labels.shape[1]}"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    if not -(1 << 31) <= ignore_index < 1 << 31:
        raise ValueError(f"ignore_index must fit into 32 bits, got {ignore_index}")
    if weight is None:
        return
    _tensor("weight", weight, "[C]")
    _floating("weight", weight)
    if weight.shape[0] != C:
        raise ValueError(f"weight must have {C} numbers, one a class, got {weight.shape[0]}")
    if weight.device != features.device:
        raise ValueError(
            f"weight must be on the device of features, {features.device}, got {weight.device}"
        )
    if weight.requires_grad:
        raise ValueError("weight gets no gradient: pass weight.detach()")


def check_labels(labels: Tensor) -> None:
    _tensor("labels", labels, "[B, Q, H, W]", empty="B Q")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be integers [B, Q, H, W], got {labels.dtype}")


def check_label_size(labels: Tensor, masks: Tensor) -> None:
    """Labels of another size may have as many windows, and would be taken for this size."""
    check_labels(labels)
    if labels.shape[2:] != masks.shape[-2:]:
        raise ValueError(
            f"labels must have the size (H, W) of support_masks, {tuple(masks.shape[-2:])}, "
            f"got {tuple(labels.shape[2:])}"
        )


def stray_label(label: int, C: int, ignore_index: int) -> str:
    return (
        f"labels must lie in 0 .. {C - 1}, the classes of the prototypes, or be ignore_index "
        f"({ignore_index}), got {label}"
    )
