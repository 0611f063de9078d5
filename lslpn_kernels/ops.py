"""The two operators: checks, choice of backend, and the bridge to autograd and `torch.compile`.

The plain backends are called as they are. A kernel backend is called through a pair of operators
registered with PyTorch, `lslpn_kernels::<name>` and `lslpn_kernels::<name>_backward`, under one
`torch.autograd.Function` each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import Kernels, choose, load, torch_, winner_dtype
from .geometry import GridSpec
from .reference import accumulation_dtype

_PLAIN = {"reference": reference, "torch": torch_}


def masked_average_pool(
    features: Tensor,
    masks: Tensor,
    grid: GridSpec,
    min_pixels: float = 0,
    backend: str = "auto",
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
        masks: support masks [B, K, C, H, W] at image resolution, class 0 the background; bool,
            uint8 or floating (soft masks weigh their pixels).
        grid: the windows.
        min_pixels: windows with a mask sum of no more than this give a zero prototype. The paper
            has 0, the published code 10.
        backend: "auto" (the fastest that can run on the tensors' device), "reference", "torch",
            "cpu", "triton" or "cuda".

    Returns:
        prototypes [B, C, Gy, Gx, D], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.masked_average_pool(features, masks, grid, min_pixels)
    backend = choose(backend, features.device, features.dtype)
    if backend in _PLAIN:
        return _PLAIN[backend].masked_average_pool(features, masks, grid, min_pixels)
    if masks.is_floating_point():
        masks = masks.to(accumulation_dtype(features.dtype))
    prototypes, _ = _MaskedAveragePool.apply(
        features, masks.contiguous(), grid.scale, grid.spacing, float(min_pixels), backend
    )
    return prototypes


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str = "max",
    backend: str = "auto",
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

    Args:
        features: query features [B, Q, D, h, w]; float64, float32, float16 or bfloat16, in any
            layout (channels_last is not copied).
        prototypes: [B, C, Gy, Gx, D] as `masked_average_pool` gives them for `grid` and `size`.
        grid: the windows.
        size: (H, W), the image resolution to score at.
        reduce: "max" as in the paper, or "mean" over the windows of a pixel.
        backend: as in `masked_average_pool`.

    Returns:
        cosines [B, Q, C, H, W], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.cosine_match(features, prototypes, grid, size, reduce)
    backend = choose(backend, features.device, features.dtype)
    H, W = size
    if backend in _PLAIN:
        return _PLAIN[backend].cosine_match(features, prototypes, grid, (H, W), reduce)
    prototypes = prototypes.to(accumulation_dtype(features.dtype)).contiguous()
    scores, _, _ = _CosineMatch.apply(
        features, prototypes, grid.scale, grid.spacing, H, W, reduce, backend
    )
    return scores


# The registered operators. Geometry travels as plain numbers, so that graphs can hold it.

_library = torch.library.Library("lslpn_kernels", "DEF")
_library.define(
    "masked_average_pool(Tensor features, Tensor masks, float scale, float spacing, "
    "float min_pixels, str backend) -> (Tensor prototypes, Tensor factor)"
)
_library.define(
    "masked_average_pool_backward(Tensor grad, Tensor masks, Tensor factor, Tensor features, "
    "float scale, float spacing, str backend) -> Tensor"
)
_library.define(
    "cosine_match(Tensor features, Tensor prototypes, float scale, float spacing, SymInt H, "
    "SymInt W, str reduce, bool winners, str backend) "
    "-> (Tensor scores, Tensor winners, Tensor gram)"
)
_library.define(
    "cosine_match_backward(Tensor grad, Tensor features, Tensor prototypes, Tensor scores, "
    "Tensor winners, float scale, float spacing, str reduce, str backend, Tensor? gram=None) "
    "-> (Tensor, Tensor)"
)


def _kernels(backend: str) -> Kernels:
    module, reason = load(backend)
    if module is None:
        raise RuntimeError(f'backend="{backend}" is not usable: {reason}')
    return module


def _pool(
    features: Tensor, masks: Tensor, scale: float, spacing: float, min_pixels: float, backend: str
) -> tuple[Tensor, Tensor]:
    grid = GridSpec(scale, spacing)
    return _kernels(backend).masked_average_pool(features, masks, grid, min_pixels)


def _pool_backward(
    grad: Tensor,
    masks: Tensor,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
) -> Tensor:
    grid = GridSpec(scale, spacing)
    return _kernels(backend).masked_average_pool_backward(grad, masks, factor, features, grid)


def _match(
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    winners: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = GridSpec(scale, spacing)
    scores, best, *gram = _kernels(backend).cosine_match(
        features, prototypes, grid, (H, W), reduce, winners
    )
    return scores, best, gram[0] if gram else scores.new_empty(0)


def _match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    scale: float,
    spacing: float,
    reduce: str,
    backend: str,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grid = GridSpec(scale, spacing)
    kept = () if gram is None or not gram.numel() else (gram,)
    return _kernels(backend).cosine_match_backward(
        grad, features, prototypes, scores, winners, grid, reduce, *kept
    )


_library.impl("masked_average_pool", _pool, "CompositeExplicitAutograd")
_library.impl("masked_average_pool_backward", _pool_backward, "CompositeExplicitAutograd")
_library.impl("cosine_match", _match, "CompositeExplicitAutograd")
_library.impl("cosine_match_backward", _match_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lslpn_kernels::masked_average_pool", lib=_library)
def _(
    features: Tensor, masks: Tensor, scale: float, spacing: float, min_pixels: float, backend: str
) -> tuple[Tensor, Tensor]:
    B, K, D = features.shape[:3]
    C, H, W = masks.shape[2:]
    Gy, Gx = GridSpec(scale, spacing).shape(H, W)
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(B, C, Gy, Gx, D, dtype=dtype),
        features.new_empty(B, K, C, Gy, Gx, dtype=dtype),
    )


@torch.library.register_fake("lslpn_kernels::masked_average_pool_backward", lib=_library)
def _(
    grad: Tensor,
    masks: Tensor,
    factor: Tensor,
    features: Tensor,
    scale: float,
    spacing: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(features)


@torch.library.register_fake("lslpn_kernels::cosine_match", lib=_library)
def _(
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    winners: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, Q, _, h, w = features.shape
    shape = (B, Q, prototypes.shape[1], H, W)
    saved = shape if winners and reduce == "max" else (0,)
    grid = GridSpec(scale, spacing)
    maps = getattr(_kernels(backend), "GRAM_MAPS", 0) if winners else 0
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(shape, dtype=dtype),
        features.new_empty(saved, dtype=winner_dtype(grid, (H, W))),
        features.new_empty((B, Q, maps, h, w) if maps else (0,), dtype=dtype),
    )


@torch.library.register_fake("lslpn_kernels::cosine_match_backward", lib=_library)
def _(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    scale: float,
    spacing: float,
    reduce: str,
    backend: str,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(prototypes)


class _MaskedAveragePool(torch.autograd.Function):
    @staticmethod
    def forward(
        features: Tensor,
        masks: Tensor,
        scale: float,
        spacing: float,
        min_pixels: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        call = _route(features, _pool, "masked_average_pool")
        return call(features, masks, scale, spacing, min_pixels, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, masks, scale, spacing, _, backend = inputs
        _, factor = output
        ctx.mark_non_differentiable(factor)
        ctx.set_materialize_grads(False)
        # The pooling is linear in the features: only their shape and layout are of use.
        ctx.save_for_backward(masks, factor, features)
        ctx.settings = (scale, spacing, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        masks, factor, features = ctx.saved_tensors
        call = _route(grad, _pool_backward, "masked_average_pool_backward")
        grad_features = call(grad.contiguous(), masks, factor, features, *ctx.settings)
        return grad_features, None, None, None, None, None


class _CosineMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        features: Tensor,
        prototypes: Tensor,
        scale: float,
        spacing: float,
        H: int,
        W: int,
        reduce: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        winners = features.requires_grad or prototypes.requires_grad
        call = _route(features, _match, "cosine_match")
        return call(features, prototypes, scale, spacing, H, W, reduce, winners, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, prototypes, scale, spacing, _, _, reduce, backend = inputs
        scores, winners, gram = output
        ctx.mark_non_differentiable(winners, gram)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, prototypes, scores, winners, gram)
        ctx.settings = (scale, spacing, reduce, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        call = _route(grad, _match_backward, "cosine_match_backward")
        *saved, gram = ctx.saved_tensors
        grads = call(grad.contiguous(), *saved, *ctx.settings, gram)
        return *grads, None, None, None, None, None, None


def _route(tensor: Tensor, eager: Any, name: str) -> Any:
    """The kernel itself in eager mode; while tracing, the operator that stands for it. Going
    through the dispatcher costs more than many of the kernels take."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return getattr(torch.ops.lslpn_kernels, name).default
    return eager
