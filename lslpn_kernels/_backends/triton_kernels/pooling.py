"""Masked average pooling: `mask_weights_kernel`, then `pool_kernel` or `pool_backward_kernel`.

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
    X,
    Y,
    block_of,
    dot,
    interpolation,
    look,
    look_weight,
    part_of,
    span,
    tile_columns,
)


@triton.jit
def _class_masks(
    masks, G: tl.constexpr, at, inside, first, C, CB: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Pixels of the masks of the CB classes from `first` on, 0 outside. `masks` is an image's."""
    c = first + tl.arange(0, CB)[:, None, None]
    if KIND == "labels":
        label = tl.load(masks + at, mask=inside, other=-1)
        return tl.where(label == c, 1.0, 0.0)
    elif KIND == "foreground":
        here = masks + (c - 1) * G.pixels
        value = tl.load(here + at, mask=inside & (c > 0) & (c < C), other=0).to(tl.float32)
        # Class 0 is what the foreground leaves. NaN stays NaN.
        total = tl.sum(value, 0)[None, :, :]
        for k in range(CB - 1, tl.where(first == 0, C - 1, 0)):
            total += tl.load(masks + k * G.pixels + at, mask=inside, other=0).to(tl.float32)
        rest = tl.where(inside, tl.where(total > 1, 0.0, 1 - total), 0.0)
        return tl.where(c == 0, rest, value)
    else:
        return tl.load(masks + c * G.pixels + at, mask=inside & (c < C), other=0).to(tl.float32)


@triton.jit
def mask_weights_kernel(
    masks,  # of one of `mask_kind`: uint8, float32 or (labels only) int64
    weights,
    counts,  # [B, K, pieces of rows, pieces of columns, C], the sum of the mask
    table, C, chunks, G: tl.constexpr, T_Y: tl.constexpr, T_X: tl.constexpr, N: tl.constexpr,
    CB: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: a tile, CB classes. Rows of pixels are summed into rows of locations one after
    the other, then columns in a product with the matrix of their interpolation."""
    first = tl.program_id(0) % chunks * CB
    tile = tl.program_id(0) // chunks
    image = (tile // G.tiles).to(tl.int64)
    piece_y = tile // G.x.pieces % G.y.pieces
    piece_x = tile % G.x.pieces
    masks += image * (1 if KIND == "labels" else C - 1 if KIND == "foreground" else C) * G.pixels
    weights += image * C * G.runs
    weights += piece_y * G.y.piece_cells * G.x.runs + piece_x * G.x.piece_cells
    c = first + tl.arange(0, CB)
    x, x_in, j, wx = tile_columns(table, G, piece_x, T_X)
    columns = interpolation(j - look(table, G, X, G.row.PIECE_LOWER, piece_x), 1 - wx, wx, N)
    n = tl.arange(0, N)
    lower, upper = span(table, G, Y, G.row.PIECE_LOWER, piece_y)
    carry = tl.zeros((CB, T_X), tl.float32)
    count = tl.zeros((CB, T_X), tl.float32)
    for row in range(upper - lower + 1):
        here = carry
        carry = tl.zeros((CB, T_X), tl.float32)
        run_begin, end = span(table, G, Y, G.row.RUN_BEGIN, piece_y * G.y.piece_cells + row)
        for begin in range(run_begin, end, T_Y):
            y = begin + tl.arange(0, T_Y)
            wy = look_weight(table, G, Y, y, y < end)[None, :, None]
            at = (y * G.x.pixels)[:, None] + x[None, :]
            inside = ((y < end)[:, None] & x_in[None, :])[None, :, :]
            value = _class_masks(masks, G, at[None, :, :], inside, first, C, CB, KIND)
            total = tl.sum(value, 1)
            high = tl.sum(value * wy, 1)
            count += total
            here += total - high
            carry += high
        mask = (c < C)[:, None] & (n < G.x.piece_cells)[None, :]
        to = weights + row * G.x.runs + (c * G.runs)[:, None] + n[None, :]
        tl.store(to, dot(here, columns, DOT), mask=mask)
    tl.store(counts + tile.to(tl.int64) * C + c, tl.sum(count, 1), mask=c < C)


@triton.jit
def _window_counts(counts, table, G: tl.constexpr, C, c, window, PIECES_X: tl.constexpr):
    """Sums of the mask over windows, of up to PIECES_X columns of tiles each."""
    my, mx = window[0], window[1]
    used = my >= 0
    piece_y, last_y = span(table, G, Y, G.row.WINDOW_PIECE_FIRST, my, used)
    first_x, last_x = span(table, G, X, G.row.WINDOW_PIECE_FIRST, mx, used)
    piece_x = first_x[:, None] + tl.arange(0, PIECES_X)[None, :]
    in_x = piece_x <= last_x[:, None]
    total = tl.zeros(piece_x.shape, tl.float32)
    for _ in range(G.y.window_pieces):
        at = (piece_y[:, None] * G.x.pieces + piece_x) * C + c[:, None]
        total += tl.load(counts + at, mask=in_x & (piece_y <= last_y)[:, None], other=0.0)
        piece_y += 1
    return tl.sum(total, 1)


@triton.jit
def pool_kernel(
    weights, counts,
    features,  # [B, K, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D], or a part of it for each of `splits` parts of K
    factors,  # [B, K, C, Gy, Gx]
    table, min_pixels, B, K, C, stride_b, stride_k, groups, splits, G: tl.constexpr,
    D: tl.constexpr, STRIDES: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BN: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, PIECES_X: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: a group of windows, BD channels, the support images of one split of K."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    start = pid % BLOCKS * BD
    b = (pid // (BLOCKS * groups) % B).to(tl.int64)
    split = pid // (BLOCKS * groups * B)
    c, window, number, used, region = group_of(table, G, pid // BLOCKS % groups, C, GY, GX, BN)
    acc = tl.zeros((BN, BD), tl.float32)
    first, last = part_of(split, splits, K)
    for k in range(first, last):
        image = b * K + k
        pixels = _window_counts(counts + image * G.tiles * C, table, G, C, c, window, PIECES_X)
        enough = pixels > min_pixels
        factor = tl.where(enough, 1 / (K * tl.where(enough, pixels, 1.0)), 0.0)
        if start == 0:
            tl.store(factors + image * C * G.windows + number, factor, mask=used)
        part = gather(
            weights + image * C * G.runs, table, G, 1, c, window, region,
            features + b * stride_b + (image - b * K) * stride_k, start, D, STRIDES, (BN, M, BD),
            DOT,
        )  # fmt: skip
        # Not `part * factor`: where too few pixels are in a window, NaN under others must not show.
        acc += tl.where(enough[:, None], part * factor[:, None], 0.0)
    d = start + tl.arange(0, BD)[None, :]
    to = prototypes + (split * B + b) * C * G.windows * D + (number * D)[:, None]
    tl.store(to + d, acc, mask=used[:, None] & (d < D))


@triton.jit
def pool_backward_kernel(
    weights,
    grad,  # [B, C, Gy, Gx, D]
    factors,  # [B, K, C, Gy, Gx]
    to,  # gradient of the features, [B, K, D, h, w], any strides
    table, K, C, stride_b, stride_k, G: tl.constexpr, D: tl.constexpr, STRIDES: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BI x BJ locations, all channels."""
    image, corner = block_of(tl.program_id(0), G)
    to += image // K * stride_b + image % K * stride_k
    scatter(
        weights + image * C * G.runs, table, G, 1, grad + image // K * C * G.windows * D,
        factors + image * C * G.windows, C, corner, to, to, D, STRIDES, STRIDES, BN, BD,
        False, DOT,
    )  # fmt: skip
