"""The head in plain PyTorch: exact at image resolution, without features of that size.

Interpolation is linear, so it can be applied to what the features are multiplied with (C masks or
scores) in place of the features (D channels). The image is cut into tiles, one for each pair of a
row segment and a column segment of `Axis.segments`. All pixels of a tile are in the same windows
and are interpolated from a small block of feature locations, so that a few batched matrix products
process all tiles. Autograd derives the backward pass.

Letters in addition to the usual ones, each for rows (y) and columns (x):
    S segments;  T pixels of a segment;  R feature locations under it;  L windows over it
(the largest of each; shorter segments are padded, with weights of zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .._torch_internals import in_dispatch_mode
from ..geometry import GridSpec
from ..reference import EPS, accumulation_dtype, unit, without_autocast

# Rows of tiles are processed in groups with at most this many scores.
_GROUP = 1 << 23


@dataclass(frozen=True)
class _Tables:
    """The geometry of an axis, as tensors."""

    pixel: Tensor  # [S, T] image pixel; padding repeats the last
    inside: Tensor  # [S, T] 1, or 0 for padding
    cell: Tensor  # [S, R] feature location; padding repeats the last
    window: Tensor  # [S, L] window; padding repeats the last
    covers: Tensor  # [S, L] 1, or 0 for padding
    weight: Tensor  # [S, T, R] interpolation weight of a feature location for a pixel
    member: Tensor  # [G, S] 1 if the segment is in the window
    place: Tensor  # [n] index of a pixel in the flattened [S, T]
    lower: Tensor  # [n] lower tap of a pixel
    upper: Tensor  # [n] upper tap
    lower_square: Tensor  # [n] squared weight of the lower tap
    upper_square: Tensor  # [n] squared weight of the upper tap
    cross: Tensor  # [n] product of the two weights
    touched: Tensor | None  # [cells] whether any pixel is interpolated from it; None: all may be


def _constant(pixels: int, cells: int) -> tuple[int, int]:
    """Both as plain numbers: for torch.compile, which may hold symbols, the length of a range is a
    constant on which it specialises."""
    return len(range(pixels)), len(range(cells))


@torch.compiler.assume_constant_result
def _tables(
    written: str, pixels: int, cells: int, dtype: torch.dtype, device: torch.device
) -> _Tables:
    """The tables of an axis under the grid with this `GridSpec.written`; torch.compile takes text
    and numbers for constants, but not objects.

    Tables are kept for later calls, so they must be ordinary tensors, neither inference tensors nor
    fake ones, whatever the mode of the first call.
    """
    make = _make_tables if in_dispatch_mode() else _kept_tables
    return make(written, pixels, cells, dtype, device)


@lru_cache(maxsize=64)
def _kept_tables(
    written: str, pixels: int, cells: int, dtype: torch.dtype, device: torch.device
) -> _Tables:
    with torch.inference_mode(False), torch.device("cpu"):
        return _make_tables(written, pixels, cells, dtype, device)


def _make_tables(
    written: str, pixels: int, cells: int, dtype: torch.dtype, device: torch.device
) -> _Tables:
    axis = GridSpec(*map(float, written.split())).axis(pixels, cells)
    segments = axis.segments
    T = max(s.end - s.begin for s in segments)
    R = max(s.upper - s.lower + 1 for s in segments)
    L = max(s.last - s.first + 1 for s in segments)
    S = len(segments)
    begin, end, first, last, lower, upper = (
        torch.tensor([getattr(s, name) for s in segments])[:, None]
        for name in ("begin", "end", "first", "last", "lower", "upper")
    )
    pixel = begin + torch.arange(T)
    inside = pixel < end
    pixel = torch.minimum(pixel, end - 1)
    cell = torch.minimum(lower + torch.arange(R), upper)
    window = first + torch.arange(L)
    covers = window <= last
    window = torch.minimum(window, last)

    taps = [axis.taps(x) for x in range(axis.pixels)]
    low = torch.tensor([i for i, _ in taps])
    up = torch.tensor([t for _, t in taps], dtype=torch.float64)
    weight = torch.zeros(S, T, R, dtype=torch.float64)
    offset = low[pixel] - lower
    weight.scatter_(2, offset[..., None], (1 - up)[pixel][..., None])
    weight.scatter_add_(2, (offset + 1).clamp(max=R - 1)[..., None], up[pixel][..., None])
    weight *= inside[..., None]

    member = (first <= torch.arange(axis.windows)) & (torch.arange(axis.windows) <= last)
    place = torch.empty(axis.pixels, dtype=torch.long)
    place[pixel.flatten()[inside.flatten()]] = torch.arange(S * T)[inside.flatten()]
    touched = None
    if axis.pixels < axis.cells:
        touched = torch.zeros(axis.cells, dtype=torch.bool)
        touched[torch.cat((low, low[up > 0] + 1))] = True
    return _Tables(
        pixel=pixel.to(device),
        inside=inside.to(device, dtype),
        cell=cell.to(device),
        window=window.to(device),
        covers=covers.to(device, dtype),
        weight=weight.to(device, dtype),
        member=member.T.to(device, dtype).contiguous(),
        place=place.to(device),
        lower=low.to(device),
        upper=(low + 1).clamp(max=axis.cells - 1).to(device),
        lower_square=((1 - up) ** 2).to(device, dtype),
        upper_square=(up**2).to(device, dtype),
        cross=(up * (1 - up)).to(device, dtype),
        touched=None if touched is None else touched.to(device),
    )


def _touched(features: Tensor, y: _Tables, x: _Tables) -> Tensor:
    """Features with 0 at the locations that no pixel is interpolated from, even if NaN."""
    if y.touched is not None:
        features = torch.where(y.touched[:, None], features, 0)
    return features if x.touched is None else torch.where(x.touched, features, 0)


def masked_average_pool(
    features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float = 0
) -> Tensor:
    """See `lslpn_kernels.masked_average_pool`."""
    return pool_with_factor(features, masks, grid, min_pixels)[0]


@without_autocast
def pool_with_factor(
    features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, Tensor]:
    """Prototypes, and the factor as `Kernels` has it."""
    B, K, D, h, w = features.shape
    C, H, W = masks.shape[2:]
    dtype = accumulation_dtype(features.dtype)
    y = _tables(grid.written, *_constant(H, h), dtype, features.device)
    x = _tables(grid.written, *_constant(W, w), dtype, features.device)
    (Sy, _, Ry), (Sx, _, Rx) = y.weight.shape, x.weight.shape

    # The masks cut into tiles, then mapped to feature resolution: Up^T (M in the tile).
    tiles = masks.to(dtype)[..., y.pixel, :][..., x.pixel]  # [B, K, C, Sy, Ty, Sx, Tx]
    n = torch.einsum("bkcytxu,yt,xu->bkcyx", tiles, y.inside, x.inside)
    weights = torch.einsum("bkcytxu,ytr->bkcyxur", tiles, y.weight)
    weights = torch.einsum("bkcyxur,xuq->bkcyxrq", weights, x.weight)
    # Columns are scattered to the full width w, so that all tiles of a row share one product.
    spread = weights.new_zeros(B, K, C, Sy, Sx, Ry, w)
    spread.scatter_add_(-1, x.cell[:, None].expand(B, K, C, Sy, Sx, Ry, Rx), weights)
    features = _touched(features.to(dtype), y, x)
    rows = features.permute(0, 1, 3, 4, 2)[:, :, y.cell]  # [B, K, Sy, Ry, w, D]
    total = torch.matmul(
        spread.transpose(2, 3).reshape(B, K, Sy, C * Sx, Ry * w),
        rows.reshape(B, K, Sy, Ry * w, D),
    ).reshape(B, K, Sy, C, Sx, D)

    # Windows are unions of tiles.
    n = torch.einsum("bkcyx,gy,jx->bkcgj", n, y.member, x.member)
    total = torch.einsum("bkycxd,gy->bkgcxd", total, y.member)
    total = torch.einsum("bkgcxd,jx->bkcgjd", total, x.member)
    enough = n > min_pixels
    factor = torch.where(enough, 1 / torch.where(enough, n, 1), 0) / K
    return torch.where(enough[..., None], total * factor[..., None], 0).sum(1), factor


@without_autocast
def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str = "max",
) -> Tensor:
    """See `lslpn_kernels.cosine_match`."""
    B, Q, D, h, w = features.shape
    C, Gx = prototypes.shape[1], prototypes.shape[3]
    H, W = size
    dtype = accumulation_dtype(features.dtype)
    y = _tables(grid.written, *_constant(H, h), dtype, features.device)
    x = _tables(grid.written, *_constant(W, w), dtype, features.device)
    (Sy, Ly), (Sx, Lx) = y.window.shape, x.window.shape
    Ty, Ry = y.weight.shape[1:]
    Tx = x.weight.shape[1]
    features = _touched(features.to(dtype), y, x)
    directions = unit(prototypes.to(dtype), -1).transpose(1, 2)  # [B, Gy, C, Gx, D]
    located = features.permute(0, 1, 3, 4, 2)  # [B, Q, h, w, D]

    group = max(1, _GROUP // max(1, B * Q * C * Ly * Lx * Ty * Sx * Tx))
    scores = []
    for first in range(0, Sy, group):
        of = slice(first, first + group)
        S = y.cell[of].shape[0]
        # Inner products of every location of these rows with every prototype of their windows.
        rows = located[:, :, y.cell[of]].reshape(B, Q, S, Ry * w, D)
        near = directions[:, y.window[of]].reshape(B, 1, S, Ly * C * Gx, D)
        dots = torch.matmul(near, rows.transpose(-1, -2))
        # Of those, the products with the windows over these columns.
        dots = dots.reshape(B, Q, S, Ly, C, Gx, Ry, w).transpose(5, 6)
        dots = dots[..., x.window[:, :, None], x.cell[:, None]]  # [B, Q, S, Ly, C, Ry, Sx, Lx, Rx]
        # Interpolated over the pixels of a tile.
        dots = torch.einsum("bqslcrxmp,xup->bqslcrxmu", dots, x.weight)
        tiles = torch.einsum("bqslcrxmu,str->bqcstxulm", dots, y.weight[of])
        if reduce == "max":
            # Of equal maxima the first, hence the lowest window; padding only repeats the last.
            best = tiles.flatten(-2).max(-1).values
        else:
            covers = y.covers[of][:, None, None, None, :, None] * x.covers[:, None, None, :]
            best = (tiles * covers).sum((-2, -1)) / covers.sum((-2, -1))
        scores.append(best)  # [B, Q, C, S, Ty, Sx, Tx]
    image = torch.cat(scores, 3).reshape(B, Q, C, Sy * Ty, Sx * Tx)
    image = image.index_select(3, y.place).index_select(4, x.place)

    square = _square_norm(features, y, x)
    gone = square < EPS**2
    return image * torch.where(gone, 0, torch.where(gone, 1, square).rsqrt())[:, :, None]


def _square_norm(features: Tensor, y: _Tables, x: _Tables) -> Tensor:
    """|Up F|^2, [B, Q, D, h, w] -> [B, Q, H, W], from inner products of neighbouring locations:
    ``w^T G w`` with the Gram matrix G of the four taps and their weights w."""
    own = (features * features).sum(2)
    if features.shape[-2:] == (y.lower.shape[0], x.lower.shape[0]):
        return own

    def product(a: Tensor, b: Tensor) -> Tensor:
        down, right = own.shape[-2] - a.shape[-2], own.shape[-1] - a.shape[-1]
        return torch.nn.functional.pad((a * b).sum(2), (0, right, 0, down))

    def along_row(own: Tensor, cross: Tensor) -> Tensor:
        ends = own[..., x.lower] * x.lower_square + own[..., x.upper] * x.upper_square
        return ends + cross[..., x.lower] * x.cross

    right = product(features[..., :-1], features[..., 1:])
    below = product(features[..., :-1, :], features[..., 1:, :])
    diagonals = product(features[..., :-1, :-1], features[..., 1:, 1:]) + product(
        features[..., :-1, 1:], features[..., 1:, :-1]
    )
    same_row = along_row(own, 2 * right)
    next_row = along_row(below, diagonals)
    square = same_row[..., y.lower, :] * y.lower_square[:, None]
    square = square + same_row[..., y.upper, :] * y.upper_square[:, None]
    square = square + next_row[..., y.lower, :] * (2 * y.cross[:, None])
    return square.clamp_min(0)
