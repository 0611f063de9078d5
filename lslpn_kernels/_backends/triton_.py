"""The head as Triton kernels, for NVIDIA GPUs without the CUDA extension.

Two launches for each direction of each operator, nothing allocated but results and workspaces
(a third, a plain sum, joins the parts where many images share one set of prototypes, see
`triton_plans`). All kernels run on the current stream of the features' device, never wait for the
device, and may be captured in a CUDA graph after one call of the same shapes outside of it, which
compiles them and sends the tables of the geometry to the device.

A call that needs more workspace than `WORKSPACE` is done in parts. Where a single image needs more
(thousands of windows over a pixel), or 2^31 numbers and more, the `torch` backend takes over.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import GridSpec
from . import current_device, gpu_match, through_torch, triton_plans
from .triton_geometry import geometry
from .triton_plans import INTERPRETED, Layout, aligned

_OLDEST = (3, 5)  # 3.4 has no products of fewer than 16 rows

DEVICE_TYPES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Maps that the forward pass of matching keeps for the backward pass; see `Kernels`.
GRAM_MAPS = gpu_match.GRAM_MAPS
loss_kept = gpu_match.loss_kept

WORKSPACE = 1 << 31  # bytes of one launch


def unavailable(device: torch.device) -> str | None:
    """See `Kernels`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from importlib.metadata import PackageNotFoundError, version

    try:
        numbers = tuple(int(part) for part in version("triton").split("+")[0].split(".")[:2])
    except (PackageNotFoundError, ValueError):
        numbers = _OLDEST  # built from source, or under another name
    if numbers < _OLDEST:
        return f"Triton {'.'.join(map(str, numbers))} is too old: {'.'.join(map(str, _OLDEST))}"
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU is sm_{capability[0]}{capability[1]}: sm_80 or newer is needed"
    return None


def _parts(n: int, most: int) -> list[slice]:
    return [slice(begin, begin + most) for begin in range(0, n, most)]


# Pooling


def _episodes(features: Tensor, masks: Tensor, C: int, grid: GridSpec) -> int:
    """Episodes that are pooled at once; 0 where the kernels do not take them."""
    return triton_plans.episodes(Layout.of(features), C, grid, masks.shape[-2:], WORKSPACE)


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, ...]:
    """See `Kernels`. Kept are the masks' weights at feature locations, where they fit into one
    workspace."""
    B, K, _, h, w = features.shape
    episodes = _episodes(features, masks, C, grid)
    if not episodes:
        return through_torch.masked_average_pool(features, masks, C, grid, min_pixels)
    G = geometry(grid, *masks.shape[-2:], h, w)
    factor = features.new_empty((B, K, C, G.y.windows, G.x.windows), dtype=torch.float32)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    if episodes >= B:
        prototypes, weights = _pool(features, masks, C, grid, min_pixels, factor)
        return prototypes, factor, weights
    parts = [
        _pool(features[part], masks[part], C, grid, min_pixels, factor[part])[0]
        for part in _parts(B, episodes)
    ]
    return torch.cat(parts), factor


def _pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Prototypes, and the masks' weights."""
    with current_device(features.device):
        plan = triton_plans.pool(
            *(Layout.of(features), Layout.of(masks), C, grid, min_pixels),
            aligned(features, masks, factor),
        )
        weights, counts, parts = plan.allocate(features)
        plan.first(masks, weights, counts, plan.table)
        plan.second(weights, counts, features, parts, factor, plan.table)
        return parts.sum(0) if plan.splits > 1 else parts[0], weights


def masked_average_pool_backward(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    features: Tensor,
    grid: GridSpec,
    *kept: Tensor,
) -> Tensor:
    """See `Kernels`."""
    B = features.shape[0]
    result = torch.empty_like(features)
    episodes = _episodes(result, masks, C, grid)
    if not episodes:
        return through_torch.masked_average_pool_backward(grad, masks, C, factor, features, grid)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    if episodes >= B:
        _pool_backward(grad, masks, C, factor, result, grid, *kept)
    else:
        for part in _parts(B, episodes):
            _pool_backward(grad[part], masks[part], C, factor[part], result[part], grid)
    return result


def _pool_backward(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    result: Tensor,
    grid: GridSpec,
    weights: Tensor | None = None,
) -> None:
    with current_device(result.device):
        plan = triton_plans.pool_backward(
            *(Layout.of(result), Layout.of(masks), C, grid), aligned(grad, masks, factor, result)
        )
        if weights is None:
            weights, counts = plan.allocate(result)
            plan.first(masks, weights, counts, plan.table)
        plan.second(weights, grad, factor, result, plan.table)


# Matching


def _images(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: Sequence[int], reduce: str
) -> int:
    """Images that are matched at once, in either direction; 0 where the kernels do not take
    them."""
    C = prototypes.shape[1]
    return triton_plans.images(Layout.of(features), C, grid, tuple(size), reduce, WORKSPACE)


def _image_parts(B: int, Q: int, images: int) -> list[tuple[slice, ...]]:
    """Parts of B x Q images, of no more than that many: all, whole episodes, or parts of one."""
    if images >= B * Q:
        return [()]
    if images >= Q:
        return [(part, slice(0, Q)) for part in _parts(B, images // Q)]
    return [(slice(b, b + 1), part) for b in range(B) for part in _parts(Q, images)]


def _of(part: tuple[slice, ...], tensor: Any) -> Any:
    """A part of the images of a tensor, unless it is empty or None."""
    return tensor[part] if part and tensor is not None and tensor.numel() else tensor


def _match(
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    grid: GridSpec,
    size: Sequence[int],
    reduce: str,
    logit_scale: float,
    radial: Tensor | None = None,
    labels: tuple[Tensor, Tensor | None, int] | None = None,
    grads: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None,
) -> list[Tensor] | None:
    """Both directions, of scores or of a loss; see `gpu_match.Matching`."""
    images = _images(features, prototypes, grid, size, reduce)
    if not images:
        return None
    settings = (grid, (size[0], size[1]), reduce, logit_scale)
    sums = []
    with current_device(features.device):
        for part in _image_parts(features.shape[0], features.shape[1], images):
            query, out, won, maps, along = (
                _of(part, t) for t in (features, scores, winners, gram, radial)
            )
            tensors = (query, _of(part[:1], prototypes), out, won, maps, along)
            if grads is None:
                truth = labels and (_of(part, labels[0]), *labels[1:])
                sums.append(_forward(*tensors, truth, *settings))
                continue
            grad, total, to_features, to_vectors = grads
            if total is None:
                grad = _of(part, grad)
            more = bool(part) and part[1].start > 0
            given = (grad, total, _of(part, to_features), _of(part[:1], to_vectors))
            _backward(*tensors, given, more, *settings)
    return sums if len(sums) < 2 else [torch.cat(sums)]


def _forward(
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    radial: Tensor | None,
    labels: tuple[Tensor, Tensor | None, int] | None,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    logit_scale: float,
) -> Tensor:
    """Sums of the loss, if it is one."""
    truth, weight, ignore_index = labels or (None, None, None)
    tensors = (features, prototypes, scores, winners, gram, radial, truth, weight)
    plan = triton_plans.match(
        *(Layout.of(features), prototypes.shape[1], grid, size, reduce),
        *(winners.numel() > 0, ignore_index),
        (truth is None or truth.dtype, weight is None, *aligned(*tensors)),
    )
    dots, sums = plan.allocate(features)
    plan.first(features, prototypes, dots, gram, plan.table)
    plan.second(dots, gram, scores, winners, plan.table, logit_scale, radial, truth, weight, sums)
    return sums


def _backward(
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    radial: Tensor | None,
    grads: tuple[Tensor, Tensor | None, Tensor, Tensor],
    more: bool,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    logit_scale: float,
) -> None:
    """`more`: the prototypes have a gradient from other images of their episode, to be added to."""
    grad, total, to_features, to_prototypes = grads
    of_loss = (None, None) if total is None else (grad, total)
    of_pixels = (grad, scores) if total is None else (scores, radial)
    tensors = (*of_pixels, winners, gram, features, prototypes, *grads[2:], *of_loss)
    plan = triton_plans.match_backward(
        *(Layout.of(features), Layout.of(to_features), prototypes.shape[1], grid, size, reduce),
        *(total is not None, (more, *aligned(*tensors))),
    )
    weights, lengths = plan.allocate(features)
    plan.first(
        *(*of_pixels, winners, gram, prototypes, lengths, weights, plan.table, logit_scale),
        *of_loss,
    )
    parts = to_prototypes[None]
    if plan.splits > 1 or more:
        parts = to_prototypes.new_empty((plan.splits, *to_prototypes.shape))
    plan.second(weights, features, prototypes, lengths, to_features, parts, plan.table)
    if more:
        to_prototypes += parts.sum(0)
    elif plan.splits > 1:
        torch.sum(parts, 0, out=to_prototypes)


_matching = gpu_match.Matching(_match, scratch=True)
cosine_match, cosine_match_backward = _matching.cosine_match, _matching.cosine_match_backward
cosine_match_loss = _matching.cosine_match_loss
cosine_match_loss_backward = _matching.cosine_match_loss_backward
