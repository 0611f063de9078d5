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
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import GridSpec
from . import current_device, gpu_loss, through_torch, torch_, triton_plans, winner_dtype
from .triton_geometry import Geometry, geometry
from .triton_plans import INTERPRETED, Layout, aligned

_OLDEST = (3, 5)  # 3.4 has no products of fewer than 16 rows

DEVICE_TYPES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Maps that the forward pass of matching keeps for the backward pass; see `Kernels`.
GRAM_MAPS = gpu_loss.GRAM_MAPS
loss_kept = gpu_loss.loss_kept

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


def _geometry(features: Tensor, size: Sequence[int], grid: GridSpec) -> Geometry:
    h, w = features.shape[3:]
    return geometry(grid, size[0], size[1], h, w)


def _episodes(features: Tensor, masks: Tensor, C: int, grid: GridSpec) -> int:
    """Episodes that are pooled at once; 0 where the kernels do not take them."""
    G = _geometry(features, masks.shape[-2:], grid)
    if not triton_plans.fits(G, C, Layout.of(features)):
        return 0
    return max(1, WORKSPACE // (4 * features.shape[1] * C * G.runs))


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, ...]:
    """See `Kernels`. Kept are the masks' weights at feature locations, where they fit into one
    workspace."""
    B, K = features.shape[:2]
    episodes = _episodes(features, masks, C, grid)
    if not episodes:
        return through_torch.masked_average_pool(features, masks, C, grid, min_pixels)
    G = _geometry(features, masks.shape[-2:], grid)
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
        weights, counts, prototypes = plan.allocate(features)
        plan.first(masks, weights, counts, plan.table)
        plan.second(weights, counts, features, prototypes, factor, plan.table)
        return _joined(prototypes), weights


def _joined(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.shape[0] > 1 else parts[0]


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


class _Loss(NamedTuple):
    """What matching works on beside, where it ends in a loss; images first, but for `weight`."""

    radial: Tensor
    labels: Tensor
    sums: Tensor  # [B, Q, programs, 2]
    weight: Tensor | None
    ignore_index: int

    def of(self, b: slice, q: slice) -> _Loss:
        return self._replace(
            radial=self.radial[b, q], labels=self.labels[b, q], sums=self.sums[b, q]
        )


def _images(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: Sequence[int], reduce: str
) -> int:
    """Images that are matched at once, in either direction; 0 where the kernels do not take
    them."""
    G, C = _geometry(features, size, grid), prototypes.shape[1]
    fits = triton_plans.fits(G, C, Layout.of(features))
    return G.images(C, reduce, WORKSPACE) if fits else 0


def _image_parts(B: int, Q: int, images: int) -> list[tuple[slice, slice]]:
    """Parts of B x Q images, of no more than that many: whole episodes, or parts of one."""
    if images >= Q:
        return [(part, slice(0, Q)) for part in _parts(B, images // Q)]
    return [(slice(b, b + 1), part) for b in range(B) for part in _parts(Q, images)]


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    winners: bool,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`."""
    B, Q, _, h, w = features.shape
    shape = (B, Q, prototypes.shape[1], *size)
    kept = winners and reduce == "max"
    places = features.new_empty(shape if kept else (0,), dtype=winner_dtype(grid))
    gram = features.new_empty((B, Q, GRAM_MAPS, h, w), dtype=torch.float32)
    images = _images(features, prototypes, grid, size, reduce)
    if images:
        scores = features.new_empty(shape, dtype=torch.float32)
        _match_in_parts(
            images, features, prototypes, grid, size, reduce, (scores, places, gram), logit_scale
        )
    else:
        scores = logit_scale * torch_.cosine_match(features, prototypes, grid, size, reduce)
        places.zero_(), gram.zero_()
    return scores, places, gram if winners else gram.new_empty(0)


def _match_in_parts(
    images: int,
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    results: tuple[Tensor, Tensor, Tensor],
    logit_scale: float,
    loss: _Loss | None = None,
) -> None:
    """Of so many images at a time; `results` are scores, or slopes of a loss, winners and Gram."""
    B, Q = features.shape[:2]
    scores, winners, gram = results
    if images >= B * Q:
        _match(features, prototypes, grid, size, reduce, *results, logit_scale, loss)
        return
    for b, q in _image_parts(B, Q, images):
        won = winners[b, q] if winners.numel() else winners
        _match(
            *(features[b, q], prototypes[b], grid, size, reduce),
            *(scores[b, q], won, gram[b, q], logit_scale, loss and loss.of(b, q)),
        )


def _match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    logit_scale: float,
    loss: _Loss | None,
) -> None:
    with current_device(features.device):
        # Where there is no loss, the kernel looks at none of these.
        radial, labels, sums, weight = loss[:4] if loss else (gram, gram, gram, None)
        tensors = (features, prototypes, scores, winners, gram, radial, labels, sums, weight)
        plan = triton_plans.match(
            *(Layout.of(features), prototypes.shape[1], grid, tuple(size), reduce),
            *(winners.numel() > 0, loss.ignore_index if loss else None),
            (labels.dtype, weight is None, *aligned(*tensors)),
        )
        (dots,) = plan.allocate(features)
        plan.first(features, prototypes, dots, gram, plan.table)
        plan.second(
            dots, gram, scores, winners, plan.table, logit_scale, radial, labels, weight, sums
        )


def cosine_match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    grid: GridSpec,
    reduce: str,
    *gram: Tensor,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    images = _images(features, prototypes, grid, scores.shape[3:], reduce)
    if not images:
        return through_torch.cosine_match_backward(
            grad, features, prototypes, grid, reduce, logit_scale
        )
    kept = (grad, scores, winners, gram[0])
    return _match_backward_in_parts(images, kept, features, prototypes, grid, reduce, logit_scale)


def _match_backward_in_parts(
    images: int,
    kept: tuple[Tensor, ...],
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    reduce: str,
    logit_scale: float,
    loss: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Of so many images at a time. `kept`: gradients and scores, or slopes and radial parts of a
    loss, winners and Gram maps. `loss`: its gradient and the sum of its weights, numbers."""
    B, Q = features.shape[:2]
    result = torch.empty_like(features)
    settings = (grid, reduce, logit_scale, loss)
    if images >= B * Q:
        return result, _match_backward(kept, features, prototypes, result, *settings)
    to_prototypes = torch.zeros_like(prototypes)
    for b, q in _image_parts(B, Q, images):
        part = tuple(t[b, q] if t.numel() else t for t in kept)
        to_prototypes[b] += _match_backward(
            part, features[b, q], prototypes[b], result[b, q], *settings
        )
    return result, to_prototypes


def _match_backward(
    kept: tuple[Tensor, ...],
    features: Tensor,
    prototypes: Tensor,
    result: Tensor,
    grid: GridSpec,
    reduce: str,
    logit_scale: float,
    loss: tuple[Tensor, ...],
) -> Tensor:
    """The gradient of the prototypes; that of the features is written to `result`."""
    grad, scores, winners, gram = kept
    with current_device(features.device):
        plan = triton_plans.match_backward(
            *(Layout.of(features), Layout.of(result), prototypes.shape[1], grid),
            *(tuple(grad.shape[3:]), reduce, bool(loss)),
            aligned(*kept, features, prototypes, result, *loss),
        )
        weights, lengths, to_prototypes = plan.allocate(features)
        plan.first(
            *(grad, scores, winners, gram, prototypes, lengths, weights, plan.table, logit_scale),
            *(loss or (gram, gram)),
        )
        plan.second(weights, features, prototypes, lengths, result, to_prototypes, plan.table)
        return _joined(to_prototypes)


# The loss


def cosine_match_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    grid: GridSpec,
    reduce: str,
    wanted: tuple[bool, bool],
    *,
    ignore_index: int,
    logit_scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """See `Kernels`."""
    B, Q = features.shape[:2]
    H, W = labels.shape[2:]
    kept = gpu_loss.kept(features, prototypes, grid, (H, W), reduce)
    images = _images(features, prototypes, grid, (H, W), reduce)
    if images:
        _, slopes, radial, winners, gram = kept
        BX = triton_plans.score_columns(W, prototypes.shape[1], True)
        programs = _geometry(features, (H, W), grid).y.strips * -(-W // BX)
        sums = slopes.new_empty((B, Q, programs, 2))
        _match_in_parts(
            *(images, features, prototypes, grid, (H, W), reduce),
            *((slopes, winners, gram), logit_scale),
            _Loss(radial, labels, sums, weight, ignore_index),
        )
        loss = gpu_loss.finish(sums, kept)
    else:
        logits = logit_scale * torch_.cosine_match(features, prototypes, grid, (H, W), reduce)
        loss = gpu_loss.of_logits(logits, labels, weight, ignore_index, kept)
    return loss, kept if any(wanted) else []


def cosine_match_loss_backward(
    grad: Tensor,
    kept: list[Tensor],
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    wanted: tuple[bool, bool],
    *,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    total, *images_of = kept
    images = _images(features, prototypes, grid, size, reduce)
    if images:
        grads = _match_backward_in_parts(
            *(images, tuple(images_of), features, prototypes, grid, reduce, logit_scale),
            (grad, total),
        )
    else:
        grads = through_torch.cosine_match_backward(
            gpu_loss.of_scores(grad, kept), features, prototypes, grid, reduce, logit_scale
        )
    first, second = (g if w else g.new_empty(0) for g, w in zip(grads, wanted, strict=True))
    return first, second
