"""Masked average pooling: `mask_weights_kernel`, then `pool_kernel` or `pool_back_kernel`.

Between them lie the sums of each class's mask over each tile, times the weights with which its
locations enter the pixels (one block a class, see `products`), and `counts`, without these weights.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .products import gather, group_of, scatter
from .shared import (
    PIECE_LOWER,
    PIECE_UPPER,
    RUN_BEGIN,
    RUN_END,
    WINDOW_PIECE_FIRST,
    WINDOW_PIECE_LAST,
    X,
    Y,
    dot,
    interpolation,
    look,
    look_weight,
    one,
    part_of,
    tile_columns,
    wide,
)


@triton.jit
def _class_masks(masks, at, inside, first, C, plane, CB: tl.constexpr, KIND: tl.constexpr):
    """Pixels of the masks of the CB classes from `first` on, 0 outside. `masks` is an image's;
    `plane` its pixels."""
    c = first + tl.arange(0, CB)[:, None, None]
    if KIND == "labels":
        label = tl.load(masks + at, mask=inside, other=-1)
        return tl.where(label == c, 1.0, 0.0)
    elif KIND == "foreground":
        here = masks + (c - 1).to(tl.int64) * plane
        value = tl.load(here + at, mask=inside & (c > 0) & (c < C), other=0).to(tl.float32)
        # Class 0 is what the foreground leaves. NaN stays NaN.
        total = tl.sum(value, 0)[None, :, :]
        for k in range(CB - 1, tl.where(first == 0, C - 1, 0)):
            there = masks + tl.cast(k, tl.int64) * plane
            total += tl.load(there + at, mask=inside, other=0).to(tl.float32)
        rest = tl.where(inside, tl.where(total > 1, 0.0, 1 - total), 0.0)
        return tl.where(c == 0, rest, value)
    else:
        here = masks + c.to(tl.int64) * plane
        return tl.load(here + at, mask=inside & (c < C), other=0).to(tl.float32)


@triton.jit
def mask_weights_kernel(
    masks,  # of one of `mask_kind`: uint8, float32 or (labels only) int64
    weights,
    counts,  # [B, K, pieces of rows, pieces of columns, C], the sum of the mask
    table, length, C, H, pieces_y, pieces_x, RY, RX, chunks, W: tl.constexpr, T_Y: tl.constexpr,
    T_X: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, KIND: tl.constexpr, LONG: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One program: a tile, CB classes. Rows of pixels are summed into rows of locations one after
    the other, then columns in a product with the matrix of their interpolation."""
    pid = tl.program_id(0)
    first = pid % chunks * CB
    piece_x = pid // chunks % pieces_x
    tile = pid // chunks
    piece_y = tile // pieces_x % pieces_y
    image = (tile // (pieces_x * pieces_y)).to(tl.int64)
    axes = (table, length)
    stored = 1 if KIND == "labels" else C - 1 if KIND == "foreground" else C
    plane = tl.cast(H, tl.int64) * W
    masks += image * stored * plane
    record = tile.to(tl.int64) * C
    runs_x = pieces_x * RX
    weights += (image * C * pieces_y + piece_y) * RY * runs_x + piece_x * RX
    c = first + tl.arange(0, CB)
    x, x_in, j, wx = tile_columns(axes, piece_x, T_X)
    j -= one(axes, X, PIECE_LOWER, piece_x)
    columns = interpolation(j, 1 - wx, wx, N)
    n = tl.arange(0, N)
    lower = one(axes, Y, PIECE_LOWER, piece_y)
    carry = tl.zeros((CB, T_X), tl.float32)
    count = tl.zeros((CB, T_X), tl.float32)
    for row in range(one(axes, Y, PIECE_UPPER, piece_y) - lower + 1):
        here = carry
        carry = tl.zeros((CB, T_X), tl.float32)
        end = one(axes, Y, RUN_END, piece_y * RY + row)
        for begin in range(one(axes, Y, RUN_BEGIN, piece_y * RY + row), end, T_Y):
            y = begin + tl.arange(0, T_Y)
            wy = look_weight(axes, Y, y, y < end)[None, :, None]
            at = wide(y, LONG)[:, None] * W + x[None, :]
            inside = ((y < end)[:, None] & x_in[None, :])[None, :, :]
            value = _class_masks(masks, at[None, :, :], inside, first, C, plane, CB, KIND)
            total = tl.sum(value, 1)
            high = tl.sum(value * wy, 1)
            count += total
            here += total - high
            carry += high
        mask = (c < C)[:, None] & (n < RX)[None, :]
        to = weights + row * runs_x + wide(c, LONG)[:, None] * (pieces_y * RY * runs_x)
        tl.store(to + n[None, :], dot(here, columns, DOT), mask=mask)
    tl.store(counts + record + c, tl.sum(count, 1), mask=c < C)


@triton.jit
def _window_counts(
    axes, counts, pieces_x, C, c, window, PIECES_Y: tl.constexpr, PIECES_X: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Sums of the mask over windows, of up to PIECES_Y x PIECES_X tiles each."""
    my, mx = window[0], window[1]
    used = my >= 0
    piece_y = look(axes, Y, WINDOW_PIECE_FIRST, my, used)
    last_y = look(axes, Y, WINDOW_PIECE_LAST, my, used, -1)
    piece_x = look(axes, X, WINDOW_PIECE_FIRST, mx, used)[:, None] + tl.arange(0, PIECES_X)[None, :]
    in_x = piece_x <= look(axes, X, WINDOW_PIECE_LAST, mx, used, -1)[:, None]
    total = tl.zeros(piece_x.shape, tl.float32)
    for _ in range(PIECES_Y):
        at = wide(piece_y[:, None] * pieces_x + piece_x, LONG) * C + c[:, None]
        total += tl.load(counts + at, mask=in_x & (piece_y <= last_y)[:, None], other=0.0)
        piece_y += 1
    return tl.sum(total, 1)


@triton.jit
def pool_kernel(
    weights, counts,
    features,  # [B, K, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D], or a part of it for each of `splits` parts of K
    factors,  # [B, K, C, Gy, Gx]
    table, length, min_pixels, B, K, C, D, Gy, Gx, stride_b, stride_k, pieces_y, pieces_x, RY, RX,
    groups_y, groups_x, group_programs, d_blocks, splits, STRIDES: tl.constexpr,
    EVEN: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, PIECES_Y: tl.constexpr, PIECES_X: tl.constexpr, REACH: tl.constexpr,
    LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: a group of windows, BD channels, the support images of one split of K."""
    pid = tl.program_id(0)
    d_block = pid % d_blocks
    group = pid // d_blocks % group_programs
    b = (pid // (d_blocks * group_programs) % B).to(tl.int64)
    split = pid // (d_blocks * group_programs * B)
    axes = (table, length)
    c, window, used, region = group_of(axes, group, groups_x, groups_y, C, Gy, Gx, GY, GX, BN)
    row = wide((c * Gy + window[0]) * Gx + window[1], LONG)
    d = d_block * BD + tl.arange(0, BD)
    acc = tl.zeros((BN, BD), tl.float32)
    tiles = pieces_y * pieces_x
    first, last = part_of(split, splits, K)
    for k in range(first, last):
        image = b * K + k
        pixels = _window_counts(
            axes, counts + image * (tiles * C), pieces_x, C, c, window, PIECES_Y, PIECES_X, LONG
        )
        enough = pixels > min_pixels
        factor = tl.where(enough, 1 / (K * tl.where(enough, pixels, 1.0)), 0.0)
        if d_block == 0:
            tl.store(factors + image * C * Gy * Gx + row, factor, mask=used)
        part = gather(
            axes, (weights + image * tiles * C * (RY * RX), pieces_y * RY, pieces_x * RX), c,
            window, region, features + b * stride_b + (image - b * K) * stride_k, d_block * BD,
            D, STRIDES, EVEN, M, BN, BD, REACH, 1, False, LONG, DOT,
        )  # fmt: skip
        # Not `part * factor`: where too few pixels are in a window, NaN under others must not show.
        acc += tl.where(enough[:, None], part * factor[:, None], 0.0)
    to = prototypes + (split * B + b) * (C * Gy * Gx) * D
    tl.store(to + row[:, None] * D + d[None, :], acc, mask=used[:, None] & (d < D)[None, :])


@triton.jit
def pool_back_kernel(
    weights,
    grad,  # [B, C, Gy, Gx, D]
    factors,  # [B, K, C, Gy, Gx]
    to,  # gradient of the features, [B, K, D, h, w], any strides
    table, length, K, C, D, h, w, Gy, Gx, stride_b, stride_k, pieces_y, pieces_x, RY, RX,
    row_blocks, column_blocks, STRIDES: tl.constexpr, EVEN: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REACH: tl.constexpr, LONG: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One program: BI x BJ locations, all channels."""
    pid = tl.program_id(0)
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    windows = C * Gy * Gx
    to += image // K * stride_b + image % K * stride_k
    scatter(
        (table, length),
        (weights + image * (pieces_y * pieces_x) * C * (RY * RX), pieces_y * RY, pieces_x * RX),
        grad + image // K * windows * D, factors + image * windows, (C, D, h, w, Gy, Gx),
        (pid // column_blocks % row_blocks * BI, pid % column_blocks * BJ), to, to, STRIDES,
        STRIDES, EVEN, 1, BI, BJ, BN, BD, REACH, 1, False, False, LONG, DOT,
    )  # fmt: skip
