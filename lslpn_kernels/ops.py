"""The operators: check arguments, choose a backend, call it.

The plain PyTorch backends are called directly, the kernels through `_autograd` and `_loss`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments, _autograd, _loss, reference
from ._backends import PLAIN, choose, has_loss, torch_
from ._torch_internals import in_dispatch_mode, in_transform, is_eager
from .geometry import GridSpec
from .reference import accumulation_dtype

_PLAIN = {"reference": reference, "torch": torch_}
assert tuple(_PLAIN) == PLAIN


def masked_average_pool(
    features: Tensor,
    masks: Tensor,
    grid: GridSpec,
    min_pixels: float = 0,
    backend: str = "auto",
    *,
    background: bool = False,
    num_classes: int | None = None,
) -> Tensor:
    """Local prototypes: the mean feature under each class mask in each window, equation (1).

    For class c and window m, ``1/K sum_i (sum_x M_i(x) Up F_i(x)) / (sum_x M_i(x))`` over the
    pixels x of the window, where Up interpolates the features to the size of the masks. A
    support image with ``sum_x M_i(x) <= min_pixels`` in the window counts as zero.

    Equivalent to::

        up = F.interpolate(features.flatten(0, 1), (H, W), mode="bilinear").unflatten(0, (B, K))
        for c, y, x in windows:                                  # y, x: slices
            M = masks[:, :, None, c, y, x]                       # [B, K, 1, k, k]
            n = M.sum((-2, -1))
            mean = (up[..., y, x] * M).sum((-2, -1)) / n         # 0 where n <= min_pixels
            prototypes[:, c, gy, gx] = mean.mean(1)

    Args:
        features: support features [B, K, D, h, w]; float64, float32, float16 or bfloat16, in any
            layout (channels_last is not copied).
        masks: support masks at image resolution, in one of three forms. Class masks
            [B, K, C, H, W], class 0 the background; bool, uint8 or floating (soft masks are
            weights). With `background`, masks [B, K, N, H, W] of the N = C - 1 foreground
            classes. Or a label map [B, K, H, W] of any integer dtype: the class of each pixel,
            where numbers outside 0 .. C - 1, such as 255, belong to no class.
        grid: the windows.
        min_pixels: windows with a mask sum of no more than this have a zero prototype. 0 in the
            paper, 10 in the published code.
        backend: "auto" (the fastest that can run on the tensors' device), "reference", "torch",
            "cpu", "triton" or "cuda".
        background: derive class 0 from masks of the foreground classes: the pixels in none of
            them; for soft masks ``1 - sum``, not below 0.
        num_classes: C, for a label map; by default 1 more than the largest label other than 255,
            and at least 2 (which synchronises with a GPU). Required in a traced graph.

    Returns:
        prototypes [B, C, Gy, Gx, D], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the requested backend cannot run here.
    """
    eager = is_eager(features, masks)
    settings = (grid, min_pixels, background, num_classes)
    key = _key(features, masks, *settings) if eager else None
    if key is None or key not in _passed:
        _arguments.masked_average_pool(features, masks, *settings)
        _remember(key)
    if masks.dim() == 5:
        C = masks.shape[2] + background
        if masks.dtype not in (torch.bool, torch.uint8):
            masks = masks.to(accumulation_dtype(features.dtype))
    else:
        if masks.dtype != torch.uint8:
            masks = masks.to(torch.int64)
        C = _classes(masks) if num_classes is None else num_classes
    backend = _chosen(backend, features, grid, "max")
    if backend in _PLAIN:
        masks = reference.class_masks(masks, C)
        return _PLAIN[backend].masked_average_pool(features, masks, grid, min_pixels)
    return _autograd.pool(features, masks, C, grid, min_pixels, backend)


def _classes(labels: Tensor) -> int:
    """The number of classes of a label map, where it is not given."""
    if torch.compiler.is_compiling() or in_dispatch_mode() or in_transform():
        raise ValueError("num_classes must be given for a label map while a graph is traced")
    largest = labels.masked_fill(labels == _arguments.IGNORED, 0).amax() if labels.numel() else 0
    return max(int(largest) + 1, 2)


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str = "max",
    backend: str = "auto",
    logit_scale: float = 1.0,
) -> Tensor:
    """The best cosine of each query pixel with the prototypes of the windows over it, eq. (3).

    ``S_c(x) = max over windows m that cover x of cos(Up F(x), p_{c,m})``, where Up interpolates
    the features to `size`. A zero prototype scores exactly 0, and so does a feature shorter than
    1e-8, which gets no gradient. Of equal cosines the window of lowest index wins; the winner
    alone gets the gradient.

    Equivalent to::

        up = F.interpolate(features.flatten(0, 1), size, mode="bilinear").unflatten(0, (B, Q))
        scores = torch.full((B, Q, C, H, W), -inf)
        for c, y, x in windows:                                  # y, x: slices
            p = prototypes[:, None, c, gy, gx, :, None, None]    # [B, 1, D, 1, 1]
            cosine = F.cosine_similarity(up[..., y, x], p, dim=2)
            scores[:, :, c, y, x] = torch.maximum(scores[:, :, c, y, x], cosine)
        scores = logit_scale * scores

    Args:
        features: query features [B, Q, D, h, w]; float64, float32, float16 or bfloat16, in any
            layout (channels_last is not copied).
        prototypes: [B, C, Gy, Gx, D] as from `masked_average_pool` with `grid` and `size`.
        grid: the windows.
        size: (H, W), the image resolution of the scores.
        reduce: "max" as in the paper, or "mean" over the windows of a pixel.
        backend: as in `masked_average_pool`.
        logit_scale: multiplies the cosines, for logits; free of cost in the kernels.

    Returns:
        cosines, times `logit_scale`, [B, Q, C, H, W], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the requested backend cannot run here.
    """
    eager = is_eager(features, prototypes)
    pair = type(size) in (tuple, torch.Size)
    key = _key(features, prototypes, grid, reduce, logit_scale, *size) if eager and pair else None
    if key is None or key not in _passed:
        _arguments.cosine_match(features, prototypes, grid, size, reduce, logit_scale)
        _remember(key)
    size = _arguments.plain_size(size)
    logit_scale = float(logit_scale)
    backend = _chosen(backend, features, grid, reduce)
    if backend in _PLAIN:
        scores = _PLAIN[backend].cosine_match(features, prototypes, grid, size, reduce)
        return scores if logit_scale == 1 else logit_scale * scores
    prototypes = prototypes.to(accumulation_dtype(features.dtype)).contiguous()
    return _autograd.match(features, prototypes, grid, size, reduce, logit_scale, backend)


def cosine_match_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    grid: GridSpec,
    reduce: str = "max",
    backend: str = "auto",
    logit_scale: float = 1.0,
    *,
    ignore_index: int = _arguments.IGNORED,
    weight: Tensor | None = None,
) -> Tensor:
    """The mean cross-entropy of `cosine_match` with labels, in one pass without storing logits.

    Equivalent to::

        logits = cosine_match(features, prototypes, grid, (H, W), reduce, logit_scale=logit_scale)
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(0, 1), weight, ignore_index=ignore_index
        )

    If all pixels are ignored, the loss is therefore NaN, and its gradients are zero. Backends
    without kernels for the loss (`reference` and `torch`; any under `torch.func`) compute it like
    this.

    Args:
        features: query features [B, Q, D, h, w], as in `cosine_match`.
        prototypes: [B, C, Gy, Gx, D], as in `cosine_match`.
        labels: the class of each pixel, [B, Q, H, W], of any integer dtype.
        grid: the windows.
        reduce: "max" as in the paper, or "mean" over the windows of a pixel.
        backend: as in `masked_average_pool`.
        logit_scale: multiplies the cosines, for logits.
        ignore_index: the label of pixels to ignore.
        weight: [C], floating: weights of the classes, for a weighted mean. It gets no gradient.

    Returns:
        the loss, a scalar, float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device; on the CPU
            also if a label is neither a class nor `ignore_index`. On a GPU, where that check would
            synchronise, the loss is NaN instead.
        RuntimeError: the requested backend cannot run here.
    """
    eager = is_eager(features, prototypes) and type(labels) is Tensor
    settings = (grid, reduce, logit_scale, ignore_index, *_facts(labels), *_facts(weight))
    key = _key(features, prototypes, *settings) if eager else None
    if key is None or key not in _passed:
        _arguments.check_labels(labels)
        size = (labels.shape[2], labels.shape[3])
        _arguments.cosine_match(features, prototypes, grid, size, reduce, logit_scale)
        _arguments.cosine_match_loss(features, labels, weight, ignore_index, prototypes.shape[1])
        _remember(key)
    if labels.dtype != torch.uint8:
        labels = labels.to(torch.int64)
    if weight is not None:
        weight = weight.to(accumulation_dtype(features.dtype)).contiguous()
    backend = _chosen(backend, features, grid, reduce)
    if abs(logit_scale) > 1e-6 and _has_loss(backend, features, grid, reduce):
        prototypes = prototypes.to(accumulation_dtype(features.dtype)).contiguous()
        return _loss.match_loss(
            *(features, prototypes, labels, weight, grid, reduce),
            *(int(ignore_index), float(logit_scale), backend),
        )
    size = (labels.shape[2], labels.shape[3])
    logits = cosine_match(features, prototypes, grid, size, reduce, backend, logit_scale)
    return _cross_entropy(logits, labels.to(torch.int64), weight, ignore_index)


def _cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    """`F.cross_entropy`, but safe for labels out of range, which would make a GPU unusable."""
    C = logits.shape[2]
    known: Tensor | None = None
    if labels.device.type != "cpu":
        known = ((labels >= 0) & (labels < C) | (labels == ignore_index)).all()
        labels = labels.where(labels == ignore_index, labels.clamp(0, C - 1))
    try:
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(0, 1), weight, ignore_index=ignore_index
        )
    except IndexError:
        known = (labels >= 0) & (labels < C) | (labels == ignore_index)
        stray = int(labels[~known][0])
        raise ValueError(_arguments.stray_label(stray, C, ignore_index)) from None
    return loss if known is None else loss.where(known, torch.nan)


# Calls that have passed the checks before: the checks take as long as a small kernel.
_passed: set[tuple[Any, ...]] = set()


def _facts(value: object) -> tuple[Any, ...]:
    """What the checks depend on, of an argument that may or may not be a tensor."""
    if not isinstance(value, Tensor):
        return (value,)
    return value.shape, value.dtype, value.device, value.layout, value.requires_grad


def _key(a: Tensor, b: Tensor, *settings: Any) -> tuple[Any, ...] | None:
    """What the checks depend on, of all arguments; None if an argument is not hashable."""
    key = (
        *(a.shape, a.dtype, a.device, a.layout),
        *(b.shape, b.dtype, b.device, b.layout, b.requires_grad),
        *settings,
        *map(type, settings),  # for 1 == True
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _remember(key: tuple[Any, ...] | None) -> None:
    if key is not None:
        if len(_passed) >= 1024:
            _passed.clear()
        _passed.add(key)


def _chosen(backend: str, features: Tensor, grid: GridSpec, reduce: str) -> str:
    if torch.compiler.is_compiling():
        return _choose_constant(backend, features.device, features.dtype, grid.written, reduce)
    if type(backend) is not str:
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    return _choose_once(backend, features.device, features.dtype, grid, reduce)


_choose_once = lru_cache(maxsize=64)(choose)


@torch.compiler.assume_constant_result
def _choose_constant(
    backend: str, device: torch.device, dtype: torch.dtype, grid: str, reduce: str
) -> str:
    return choose(backend, device, dtype, GridSpec(*map(float, grid.split())), reduce)


def _has_loss(backend: str, features: Tensor, grid: GridSpec, reduce: str) -> bool:
    if torch.compiler.is_compiling():
        return _has_loss_constant(backend, features.device, grid.written, reduce)
    return not in_transform() and has_loss(backend, features.device, grid, reduce)


@torch.compiler.assume_constant_result
def _has_loss_constant(backend: str, device: torch.device, grid: str, reduce: str) -> bool:
    return has_loss(backend, device, GridSpec(*map(float, grid.split())), reduce)
