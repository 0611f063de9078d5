"""The head as Triton kernels, for NVIDIA GPUs without the CUDA extension.

Two launches for each direction of each operator, nothing allocated but results and workspaces
(a third, a plain sum, joins the parts where many images share one set of prototypes, see
`_splits`). All kernels run on the current stream of the features' device, never wait for the
device, and may be captured in a CUDA graph after one call of the same shapes outside of it, which
compiles them and sends the tables of the geometry to the device.

Block sizes come from the few functions under "Block sizes" below and depend on shape, dtype and
layout alone; nothing is tuned at run time, so that the same call gives the same bits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import GridSpec
from . import current_device, gpu_loss, mask_kind, through_torch, torch_, winner_dtype
from .triton_geometry import STRIP, Geometry
from .triton_geometry import geometry as _geometry
from .triton_launch import Launch

# With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on tensors of the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_OLDEST = (3, 5)  # 3.4 has no products of fewer than 16 rows

DEVICE_TYPES = ("cpu", "cuda") if _INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Maps that the forward pass of matching keeps for the backward pass; see `Kernels`.
GRAM_MAPS = gpu_loss.GRAM_MAPS
loss_kept = gpu_loss.loss_kept

# Bytes of workspace that one launch may take. A call that needs more is done in parts; where a
# single image needs more (thousands of windows over a pixel), the `torch` backend takes over.
WORKSPACE = 1 << 31


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
    if _INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU is sm_{capability[0]}{capability[1]}: sm_80 or newer is needed"
    return None


# Block sizes


def _power(n: int, least: int, most: int) -> int:
    """The power of two that holds n, within limits."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


_BI, _BJ = 4, 8  # locations of a block of `scatter`, which with those around them are 60


def _group(C: int, geometry: Geometry, episodes: int) -> tuple[int, int, int]:
    """GY, GX and BN of the programs that sum over windows: groups of 2 x 2 to get many programs
    out of few episodes, 4 x 2, which read each location less often, from four on."""
    GX = min(2, _power(geometry.x.windows, 1, 2))
    GY = min(_power(geometry.y.windows, 1, 4), 4 if episodes >= 4 else 2)
    classes = _power(C, max(1, 16 // (GY * GX)), max(16, 64 // (GY * GX)))
    return GY, GX, classes * GY * GX


def _splits(programs: int, images: int) -> int:
    """Parts that the K or Q images of an episode are summed in: more than one where their windows
    alone would keep but few multiprocessors busy."""
    return min(images, -(-256 // programs)) if programs < 128 else 1


def _dot(dtype: torch.dtype) -> str:
    """How the kernels multiply; see `triton_kernels.shared.dot`."""
    if _INTERPRETED:
        return "ieee"
    return "tf32" if dtype == torch.float32 else "bfloat16"


_plans: dict[tuple[Any, ...], Any] = {}


def _plan(key: tuple[Any, ...], tensors: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """What `build` returns, kept for calls of the same shapes. Kernels are specialised on the
    alignment of their tensors as well, so that it belongs to the key."""
    key = (*key, *(tensor.data_ptr() % 16 == 0 for tensor in tensors))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 1024:
            _plans.clear()
        plan = _plans[key] = build()
    return plan


def _needs_long(features: Tensor, strides: Sequence[int], *extents: int) -> bool:
    """Whether offsets within an image need 64 bits."""
    span = sum((n - 1) * s for n, s in zip(features.shape[2:], strides[2:], strict=True))
    return max(span, *extents) >= 1 << 31


def _parts(n: int, most: int) -> list[slice]:
    return [slice(begin, begin + most) for begin in range(0, n, most)]


# Pooling


class _Pool:
    """Both directions of pooling for one set of shapes: the launches and the workspace."""

    def __init__(
        self,
        features: Tensor,
        masks: Tensor,
        C: int,
        grid: GridSpec,
        min_pixels: float | None,
    ) -> None:
        """`features`: their gradient in the backward direction, where `min_pixels` is None."""
        B, K, D, h, w = features.shape
        H, W = masks.shape[-2:]
        strides = features.stride()
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = geometry.table(features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * K * geometry.pool_weights(C)
        self.counts = B * K * geometry.tiles * C
        long = _needs_long(
            features, strides, C * Gy * Gx * D, C * H * W, geometry.pool_weights(C), h * w
        )
        tile = (rows.pieces, columns.pieces, rows.cells, columns.cells)
        CB = _power(C, 1, 8)
        chunks = -(-C // CB)
        self.weights = Launch(
            "mask_weights_kernel",
            B * K * geometry.tiles * chunks,
            (length, C, H, *tile, chunks),
            {
                "W": W,
                "T_Y": _power(rows.strip, 1, STRIP),
                "T_X": _power(columns.piece, 16, 32),
                "N": _power(columns.cells, 8, 1 << 20),
                "CB": CB,
                "KIND": mask_kind(masks, C),
                "LONG": long,
                "DOT": _dot(torch.float32),
            },
            warps=1,
        )
        common = {
            "REACH": (rows.near_pieces, columns.near_pieces),
            "LONG": long,
            "DOT": _dot(features.dtype),
        }
        # Channels last, with more in the backward direction, registers spill.
        BD = _power(D, 16, 128 if min_pixels is None and strides[2] == 1 else 256)
        if min_pixels is None:
            row_blocks, column_blocks = -(-h // _BI), -(-w // _BJ)
            self.back = Launch(
                "pool_back_kernel",
                B * K * row_blocks * column_blocks,
                (length, K, C, D, h, w, Gy, Gx, *strides[:2], *tile, row_blocks, column_blocks),
                {
                    "STRIDES": strides[2:],
                    "EVEN": D % BD == 0,
                    "BI": _BI,
                    "BJ": _BJ,
                    "BN": 16,
                    "BD": BD,
                    **common,
                },
            )
            return
        GY, GX, BN = _group(C, geometry, B)
        groups_y, groups_x = -(-Gy // GY), -(-Gx // GX)
        groups = groups_y * groups_x * -(-C * GY * GX // BN)
        d_blocks = -(-D // BD)
        self.splits = _splits(B * groups * d_blocks, K)
        self.shape = (self.splits, B, C, Gy, Gx, D)
        self.sums = Launch(
            "pool_kernel",
            self.splits * B * groups * d_blocks,
            (
                *(length, float(min_pixels), B, K, C, D, Gy, Gx, *strides[:2], *tile),
                *(groups_y, groups_x, groups, d_blocks, self.splits),
            ),
            {
                "STRIDES": strides[2:],
                "EVEN": D % BD == 0,
                "GY": GY,
                "GX": GX,
                "M": 32,
                "BN": BN,
                "BD": BD,
                "PIECES_Y": rows.window_pieces,
                "PIECES_X": _power(columns.window_pieces, 1, 1 << 20),
                **common,
            },
        )


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, ...]:
    """See `Kernels`. Kept are the masks' weights at feature locations, where they fit into one
    workspace."""
    B, K, _, h, w = features.shape
    H, W = masks.shape[-2:]
    geometry = _geometry(grid, H, W, h, w)
    Gy, Gx = geometry.y.windows, geometry.x.windows
    factor = features.new_empty((B, K, C, Gy, Gx), dtype=torch.float32)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    episodes = max(1, WORKSPACE // (4 * K * geometry.pool_weights(C)))
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
        plan = _plan(
            (
                *("pool", C, grid, min_pixels, features.dtype, features.shape, features.stride()),
                *(masks.dtype, masks.shape, features.device),
            ),
            (features, masks, factor),
            lambda: _Pool(features, masks, C, grid, min_pixels),
        )
        prototypes = features.new_empty(plan.shape, dtype=torch.float32)
        weights = features.new_empty(plan.size, dtype=torch.float32)
        counts = features.new_empty(plan.counts, dtype=torch.float32)
        plan.weights(masks, weights, counts, plan.table)
        plan.sums(weights, counts, features, prototypes, factor, plan.table)
        return prototypes.sum(0) if plan.splits > 1 else prototypes[0], weights


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
    B, K, _, h, w = features.shape
    H, W = masks.shape[-2:]
    geometry = _geometry(grid, H, W, h, w)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    result = torch.empty_like(features)
    episodes = max(1, WORKSPACE // (4 * K * geometry.pool_weights(C)))
    if episodes >= B:
        _pool_back(grad, masks, C, factor, result, grid, *kept)
    else:
        for part in _parts(B, episodes):
            _pool_back(grad[part], masks[part], C, factor[part], result[part], grid)
    return result


def _pool_back(
    grad: Tensor,
    masks: Tensor,
    C: int,
    factor: Tensor,
    result: Tensor,
    grid: GridSpec,
    weights: Tensor | None = None,
) -> None:
    with current_device(result.device):
        plan = _plan(
            (
                *("pool back", C, grid, result.dtype, result.shape, result.stride()),
                *(masks.dtype, masks.shape, result.device),
            ),
            (grad, masks, factor, result),
            lambda: _Pool(result, masks, C, grid, None),
        )
        if weights is None:
            weights = result.new_empty(plan.size, dtype=torch.float32)
            counts = result.new_empty(plan.counts, dtype=torch.float32)
            plan.weights(masks, weights, counts, plan.table)
        plan.back(weights, grad, factor, result, plan.table)


# Matching


class _Match:
    """The forward direction of matching for one set of shapes."""

    def __init__(
        self,
        features: Tensor,
        C: int,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        winners: bool,
        ignore_index: int | None,
    ) -> None:
        """`ignore_index`: of the loss, None for scores."""
        B, Q, D, h, w = features.shape
        H, W = size
        strides = features.stride()
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = geometry.table(features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * Q * geometry.dots(C)
        long = _needs_long(features, strides, C * Gy * Gx * D, C * H * W, geometry.dots(C), h * w)
        row_blocks, column_blocks = -(-h // _BI), -(-w // _BJ)
        common = {"NY": rows.near, "NX": columns.near}
        BK = _power(D, 16, 32)
        self.dots = Launch(
            "dots_kernel",
            B * Q * row_blocks * column_blocks,
            (length, Q, C, D, h, w, Gy, Gx, *strides[:2], row_blocks, column_blocks),
            {
                "STRIDES": strides[2:],
                "EVEN": D % BK == 0,
                **common,
                "BI": _BI,
                "BJ": _BJ,
                "BN": 16,
                "BK": BK,
                "GRAM_BK": 8 if strides[2] > 1 else BK,
                "BETWEEN": geometry.between,
                "LONG": long,
                "DOT": _dot(features.dtype),
            },
            warps=1,
        )
        BX = _score_columns(W, C, ignore_index is not None)
        self.scores = Launch(
            "scores_kernel",
            B * Q * rows.strips * -(-W // BX),
            (length, ignore_index or 0, C, H, h, w, rows.strips, -(-W // BX)),
            {
                "W": W,
                "OX": columns.overlap,
                **common,
                "T": _power(rows.strip, 1, STRIP),
                "BX": BX,
                "BETWEEN": geometry.between,
                "MEAN": reduce == "mean",
                "WINNERS": winners and reduce == "max",
                "LOSS": ignore_index is not None,
                "PAIR": C == 2,
                "LONG": long,
            },
        )


def _score_columns(W: int, C: int, loss: bool) -> int:
    """BX of `scores_kernel`; half where the loss of many classes would spill registers."""
    return _power(W, 16, 128 if loss and C > 2 else 256)


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


def _images(geometry: Geometry, C: int, reduce: str) -> int:
    """Images that fit the workspace, in either direction."""
    most = max(geometry.dots(C), geometry.match_weights(C, reduce))
    return WORKSPACE // (4 * most)


def _images_of(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: Sequence[int], reduce: str
) -> int:
    h, w = features.shape[3:]
    return _images(_geometry(grid, size[0], size[1], h, w), prototypes.shape[1], reduce)


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
    images = _images_of(features, prototypes, grid, size, reduce)
    shape = (B, Q, prototypes.shape[1], *size)
    kept = winners and reduce == "max"
    places = features.new_empty(shape if kept else (0,), dtype=winner_dtype(grid, size))
    gram = features.new_empty((B, Q, GRAM_MAPS, h, w), dtype=torch.float32)
    if not images:
        scores = logit_scale * torch_.cosine_match(features, prototypes, grid, size, reduce)
        return scores, places.zero_(), gram.zero_() if winners else gram.new_empty(0)
    scores = features.new_empty(shape, dtype=torch.float32)
    _match_in_parts(
        images, features, prototypes, grid, size, reduce, (scores, places, gram), logit_scale
    )
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
        C = prototypes.shape[1]
        kept = winners.numel() > 0
        # Where there is no loss, the kernel looks at none of these.
        tensors = loss[:4] if loss else (gram, gram, gram, None)
        ignore_index = loss.ignore_index if loss else None
        plan = _plan(
            (
                *("match", grid, size, reduce, kept, C, features.dtype, features.shape),
                *(features.stride(), features.device, ignore_index, tensors[1].dtype),
                tensors[3] is None,
            ),
            (features, prototypes, scores, winners, gram, *(t for t in tensors if t is not None)),
            lambda: _Match(features, C, grid, size, reduce, kept, ignore_index),
        )
        dots = features.new_empty(plan.size, dtype=torch.float32)
        plan.dots(features, prototypes, dots, gram, plan.table)
        radial, labels, sums, weight = tensors
        plan.scores(
            dots, gram, scores, winners, plan.table, logit_scale, radial, labels, weight, sums
        )


class _MatchBack:
    """The backward direction of matching for one set of shapes."""

    def __init__(
        self,
        features: Tensor,
        result: Tensor,
        C: int,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        loss: bool,
    ) -> None:
        B, Q, D, h, w = features.shape
        H, W = size
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = geometry.table(features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * Q * geometry.match_weights(C, reduce)
        self.lengths = B * C * Gy * Gx
        extents = (C * Gy * Gx * D, C * H * W, geometry.match_weights(C, reduce), h * w)
        long = _needs_long(features, features.stride(), *extents)
        long = long or _needs_long(result, result.stride(), *extents)
        tile = (rows.pieces, columns.pieces, rows.cells, columns.cells)
        row_programs = -(-self.lengths // 16)
        P = geometry.places(reduce)
        PB, CB = _power(P, 1, 4), 2
        chunks = (-(-C // CB), -(-P // PB))
        self.weights = Launch(
            "match_weights_kernel",
            B * Q * geometry.tiles * chunks[0] * chunks[1] + row_programs,
            (length, C, D, H, h, w, *tile, self.lengths, row_programs, *chunks),
            {
                "W": W,
                "T_Y": _power(rows.strip, 1, STRIP),
                "T_X": _power(columns.piece, 16, 32),
                "N": _power(columns.cells, 8, 1 << 20),
                "CB": CB,
                "PB": PB,
                "P": P,
                "BETWEEN": geometry.between,
                "BETWEEN_ROWS": rows.between,
                "MEAN": reduce == "mean",
                "ALL": chunks == (1, 1),
                "LOSS": loss,
                "PAIR": C == 2,
                "LONG": long,
                "DOT": _dot(torch.float32),
            },
            warps=1,
        )
        row_blocks, column_blocks = -(-h // _BI), -(-w // _BJ)
        GY, GX, BN = _group(C, geometry, B)
        groups_y, groups_x = -(-Gy // GY), -(-Gx // GX)
        groups = groups_y * groups_x * -(-C * GY * GX // BN)
        BD = _power(D, 16, 256)
        few = features.dtype != torch.bfloat16
        self.splits = _splits(B * groups, Q)
        self.shape = (self.splits, B, C, Gy, Gx, D)
        self.back = Launch(
            "match_back_kernel",
            B * (groups * self.splits + Q * row_blocks * column_blocks),
            (
                *(length, B, Q, C, D, h, w, Gy, Gx, *features.stride()[:2], *result.stride()[:2]),
                *tile,
                *(groups_y, groups_x, groups, self.splits, row_blocks, column_blocks),
            ),
            {
                "STRIDES": features.stride()[2:],
                "TO_STRIDES": result.stride()[2:],
                "EVEN": D % BD == 0,
                "P": P,
                "OX": columns.overlap,
                "GY": GY,
                "GX": GX,
                "M": 32,
                "GATHER_BN": BN,
                "BI": _BI,
                "BJ": _BJ,
                "BN": 32,
                "BD": _power(D, 16, 64 if few else 128),  # with more, registers spill
                "GATHER_BD": BD,
                "REACH": (rows.near_pieces, columns.near_pieces),
                "PLACES": reduce == "max",
                "WHOLE": BD >= D,
                "LONG": long,
                "DOT": _dot(features.dtype),
            },
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
    images = _images_of(features, prototypes, grid, scores.shape[3:], reduce)
    if not images:
        return through_torch.cosine_match_backward(
            grad, features, prototypes, grid, reduce, logit_scale
        )
    kept = (grad, scores, winners, gram[0])
    return _match_back_in_parts(images, kept, features, prototypes, grid, reduce, logit_scale)


def _match_back_in_parts(
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
        return result, _match_back(kept, features, prototypes, result, *settings)
    to_prototypes = torch.zeros_like(prototypes)
    for b, q in _image_parts(B, Q, images):
        part = tuple(t[b, q] if t.numel() else t for t in kept)
        to_prototypes[b] += _match_back(
            part, features[b, q], prototypes[b], result[b, q], *settings
        )
    return result, to_prototypes


def _match_back(
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
        C, (H, W) = prototypes.shape[1], grad.shape[3:]
        tensors = (*kept, features, prototypes, result, *loss)
        plan = _plan(
            (
                *("match back", grid, (C, H, W), reduce, features.dtype, features.shape),
                *(features.stride(), result.stride(), features.device),
            ),
            tensors,
            lambda: _MatchBack(features, result, C, grid, (H, W), reduce, bool(loss)),
        )
        weights = features.new_empty(plan.size, dtype=torch.float32)
        lengths = features.new_empty(plan.lengths, dtype=torch.float32)
        to_prototypes = features.new_empty(plan.shape, dtype=torch.float32)
        plan.weights(
            *(grad, scores, winners, gram, prototypes, lengths, weights, plan.table, logit_scale),
            *(loss or (gram, gram)),
        )
        plan.back(weights, features, prototypes, lengths, result, to_prototypes, plan.table)
        return to_prototypes.sum(0) if plan.splits > 1 else to_prototypes[0]


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
    B, Q, _, h, w = features.shape
    H, W = labels.shape[2:]
    kept = gpu_loss.kept(features, prototypes, grid, (H, W), reduce)
    images = _images_of(features, prototypes, grid, (H, W), reduce)
    if images:
        _, slopes, radial, winners, gram = kept
        BX = _score_columns(W, prototypes.shape[1], True)
        programs = _geometry(grid, H, W, h, w).rows.strips * -(-W // BX)
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
    images = _images_of(features, prototypes, grid, size, reduce)
    if images:
        grads = _match_back_in_parts(
            *(images, tuple(images_of), features, prototypes, grid, reduce, logit_scale),
            (grad, total),
        )
    else:
        grads = through_torch.cosine_match_backward(
            gpu_loss.of_scores(grad, kept), features, prototypes, grid, reduce, logit_scale
        )
    first, second = (g if w else g.new_empty(0) for g, w in zip(grads, wanted, strict=True))
    return first, second
