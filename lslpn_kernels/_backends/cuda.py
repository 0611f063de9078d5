"""The head as CUDA kernels (csrc/cuda), compiled into lslpn_kernels._native.

Everything is launched on torch's current stream and allocated with torch, so the calls can be
captured in a CUDA graph. float32 is calculated in float32, whatever
`torch.backends.cuda.matmul.allow_tf32` permits.

The kernels take float32 and half precision, images of at least as many pixels as feature locations
along both axes, and at most 16 windows over a tile. What they do not take is computed by the
`torch` backend, which follows `allow_tf32`. They take multiples of 32 channels; for other numbers
the features are copied with channels of zeros, which change no inner product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ..geometry import Axis, GridSpec
from . import current_device, gpu_match, native, through_torch

# Maps that the forward pass of matching keeps for the backward pass; see `Kernels`.
GRAM_MAPS = gpu_match.GRAM_MAPS
loss_kept = gpu_match.loss_kept

DEVICE_TYPES = ("cuda",)
CHANNELS = 32  # as csrc/cuda/launch.h has it
WORKSPACE = 32 << 20  # bytes, if an episode does not take more
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unavailable(device: torch.device) -> str | None:
    """See `Kernels`."""
    module, reason = native.module()
    if module is None:
        return reason
    if not getattr(module, "with_cuda", False):
        return native.built_without("cuda") or "the module was built without it"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA (torch.version.cuda is None)"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU can be used here (torch.cuda.is_available() is False)"
    with current_device(device):
        refusal = module.cuda_probe()
        if not refusal:
            return None
        major, minor = torch.cuda.get_device_capability()
        built = ", ".join(f"sm_{arch}" for arch in module.cuda_archs.split(";"))
        return (
            f"the driver does not run the kernels on {torch.cuda.get_device_name()} "
            f"(sm_{major}{minor}; they were built for {built}): {refusal}. Update the driver, or "
            f'install again with LSLPN_CUDA_ARCHS="{major}{minor}"'
        )


def declines(grid: GridSpec, reduce: str) -> bool:
    """See `Kernels`. The kernels do not take grids of more than four windows over a pixel along an
    axis, nor axes that windows cut into more than 256 segments."""
    return grid.spacing < 1 / 3 or grid.scale * grid.spacing < 1 / 120


def _call(name: str, device: torch.device, *args: Any) -> int:
    """A function of the compiled module, with the tensors' device as the current one. Returns the
    number of episodes that it has taken, 0 where the kernels do not take the call."""
    with current_device(device):
        taken: int = getattr(native.module()[0], name)(*args)
    return taken


def _part_by_part(B: int, call: Callable[[int], int]) -> bool:
    """`call(b)` takes some episodes from episode b on, as many as a workspace of limited size
    allows, and returns how many. Returns whether all were taken."""
    done = 0
    while done < B:
        taken = call(done)
        if not taken:
            return False
        done += taken
    return True


def _capsule(tensor: Tensor | None, b: int = 0) -> Any:
    """Of a tensor from episode b on; None where there is none."""
    if tensor is None or not tensor.numel():
        return None
    return to_dlpack(tensor[b:] if b and tensor.ndim else tensor)


def _widened(tensor: Tensor, dim: int) -> Tensor:
    """The tensor, aligned in memory, with a multiple of CHANNELS channels along a dimension: zeros
    are appended to a copy."""
    missing = -tensor.shape[dim] % CHANNELS
    if not missing and (dim == 2 or tensor.data_ptr() % 16 == 0):
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing))


def _narrow(wide: Tensor, out: Tensor) -> None:
    """The inverse, where the kernels have written `wide`."""
    if wide is not out:
        out.copy_(wide[tuple(map(slice, out.shape))])


def _stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def _allocator(device: torch.device, first: list[Tensor]) -> Callable[[int], Any]:
    """Gives the kernels workspaces of sizes that they know, and notes the first one."""

    def allocate(size: int) -> Any:
        tensor = torch.empty(size, dtype=torch.uint8, device=device)
        if not first:
            first.append(tensor)
        return to_dlpack(tensor)

    return allocate


@lru_cache(maxsize=256)
def _axes(grid: GridSpec, H: int, W: int, h: int, w: int) -> tuple[tuple[int, ...], ...]:
    """Both axes as plain numbers."""

    def numbers(axis: Axis) -> tuple[int, ...]:
        return axis.pixels, axis.cells, axis.window, axis.step, axis.windows

    return numbers(grid.axis(H, h)), numbers(grid.axis(W, w))


@lru_cache(maxsize=256)
def _overlap(grid: GridSpec, W: int) -> int:
    return grid.axis(W).overlap


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, ...]:
    """See `Kernels`. Kept are the masks at feature resolution, tile by tile."""
    B, K, D, h, w = features.shape
    Gy, Gx = (axis[4] for axis in _axes(grid, *masks.shape[-2:], h, w))
    prototypes = torch.empty((B, C, Gy, Gx, D), dtype=torch.float32, device=features.device)
    factor = torch.empty((B, K, C, Gy, Gx), dtype=torch.float32, device=features.device)
    kept = _pool(features, masks, C, prototypes, factor, grid, float(min_pixels))
    if not kept:
        return through_torch.masked_average_pool(features, masks, C, grid, min_pixels)
    return prototypes, factor, *kept


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
    grad_features = torch.empty_like(features)
    if not _pool(grad_features, masks, C, grad, factor, grid, None, *kept):
        return through_torch.masked_average_pool_backward(grad, masks, C, factor, features, grid)
    return grad_features


def _pool(
    features: Tensor,
    masks: Tensor,
    C: int,
    prototypes: Tensor,
    factor: Tensor,
    grid: GridSpec,
    min_pixels: float | None,
    *kept: Tensor,
) -> Sequence[Tensor]:
    """Without `min_pixels` features and prototypes are gradients. Returns the masks at feature
    resolution, which may be given as `kept`; nothing where the kernels do not take the call."""
    if features.dtype == torch.float64:
        return ()
    weights = list(kept)
    device, axes = features.device, _axes(grid, *masks.shape[-2:], *features.shape[-2:])
    wide, vectors = _widened(features, 2), _widened(prototypes, 4)

    def call(b: int) -> int:
        known = weights[0].view(len(features), -1) if weights else None
        return _call(
            "cuda_masked_average_pool",
            device,
            *(_capsule(wide, b), _capsule(masks, b), C, _capsule(vectors, b), _capsule(factor, b)),
            *(*axes, min_pixels, _stream(device), WORKSPACE),
            *(_allocator(device, weights), _capsule(known, b)),
        )

    if not _part_by_part(len(features), call):
        return ()
    if min_pixels is None:
        _narrow(wide, features)
    else:
        _narrow(vectors, prototypes)
    return weights


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
    """Both directions; see the binding. Returns the first workspace, if there was any; None where
    the kernels do not take the call."""
    if features.dtype == torch.float64 or winners.dtype != torch.uint8:
        return None

    first: list[Tensor] = []
    device, axes = features.device, _axes(grid, size[0], size[1], *features.shape[-2:])
    wide, vectors = _widened(features, 2), _widened(prototypes, 4)
    wide_grads = [] if grads is None else [_widened(grads[2], 2), _widened(grads[3], 4)]

    def call(b: int) -> int:
        return _call(
            "cuda_cosine_match",
            device,
            *(_capsule(tensor, b) for tensor in (wide, vectors, scores, winners, gram)),
            *(*axes, _overlap(grid, size[1]), reduce == "mean", logit_scale),
            *(_stream(device), WORKSPACE, _allocator(device, first), _capsule(radial, b)),
            labels and (*map(_capsule, labels[:2]), labels[2]),
            grads and tuple(_capsule(tensor, b) for tensor in (*grads[:2], *wide_grads)),
        )

    if not _part_by_part(len(features), call):
        return None
    for wide, grad in zip(wide_grads, (grads or ())[2:], strict=True):
        _narrow(wide, grad)
    return first


_matching = gpu_match.Matching(_match, scratch=False)
cosine_match, cosine_match_backward = _matching.cosine_match, _matching.cosine_match_backward
cosine_match_loss = _matching.cosine_match_loss
cosine_match_loss_backward = _matching.cosine_match_loss_backward
