"""Masked average pooling: `mask_weights_kernel`, then `pool_kernel` or `pool_backward_kernel`.

Between them lie the sums of each class's mask over each tile, times the weights with which its
locations enter the pixels (one block a class, see `products`), and without these weights `counts`
[B, K, pieces of rows, pieces of columns, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import shared
from .products import Weights, gather, group_of, scatter
from .shared import Features, X, Y, block_of, dot, interpolation, look_weight, span


@triton.jit
def _class_masks(masks, G: tl.constexpr, at, inside, classes, C, KIND: tl.constexpr):
    """Pixels of the masks of successive classes, 0 outside. `masks` is an image's."""
    c = classes[:, None, None]
    if KIND == "labels":
        label = tl.load(masks + at, mask=inside, other=-1)
        return tl.where(label == c, 1.0, 0.0)
    elif KIND == "foreground":
        here = masks + (c - 1) * G.pixels
        value = tl.load(here + at, mask=inside & (c > 0) & (c < C), other=0).to(tl.float32)
        # Class 0 is what the foreground leaves. NaN stays NaN.
        total = tl.sum(value, 0)[None, :, :]
        for k in range(classes.shape[0] - 1, tl.where(tl.min(classes, 0) == 0, C - 1, 0)):
            total += tl.load(masks + k * G.pixels + at, mask=inside, other=0).to(tl.float32)
        rest = tl.where(inside, tl.where(total > 1, 0.0, 1 - total), 0.0)
        return tl.where(c == 0, rest, value)
    else:
        return tl.load(masks + c * G.pixels + at, mask=inside & (c < C), other=0).to(tl.float32)


@triton.jit
def mask_weights_kernel(
    masks, weights, counts, table, C, chunks, G: tl.constexpr, T_Y: tl.constexpr,
    T_X: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: a tile, CB classes. Rows of pixels are summed into rows of locations one after
    the other, then columns in a product with the matrix of their interpolation."""
    tile = tl.program_id(0) // chunks
    image, piece_y, piece_x, runs = shared.tile_of(tile, G)
    masks += image * (1 if KIND == "labels" else C - 1 if KIND == "foreground" else C) * G.pixels
    weights += image * C * G.runs + runs
    c = tl.program_id(0) % chunks * CB + tl.arange(0, CB)
    x, x_in, _j, column, wx = shared.tile_columns(table, G, piece_x, T_X)
    columns = interpolation(column, 1 - wx, wx, N)
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
            value = _class_masks(masks, G, at[None, :, :], inside, c, C, KIND)
            total = tl.sum(value, 1)
            high = tl.sum(value * wy, 1)
            count += total
            here += total - high
            carry += high
        mask = (c < C)[:, None] & (n < G.x.piece_cells)[None, :]
        to = weights + row * G.x.runs + (c * G.runs)[:, None] + n[None, :]
        tl.store(to, dot(here, columns), mask=mask)
    tl.store(counts + tile.to(tl.int64) * C + c, tl.sum(count, 1), mask=c < C)


@triton.jit
def _window_counts(counts, table, G: tl.constexpr, C, c, window, used):
    """Sums of the mask over windows."""
    first_y, last_y = span(table, G, Y, G.row.WINDOW_PIECE_FIRST, window[0], used)
    first_x, last_x = span(table, G, X, G.row.WINDOW_PIECE_FIRST, window[1], used)
    total = tl.zeros(c.shape, tl.float32)
    for n in range(G.y.window_pieces * G.x.window_pieces):
        y, x = first_y + n // G.x.window_pieces, first_x + n % G.x.window_pieces
        at = counts + (y * G.x.pieces + x) * C + c
        total += tl.load(at, mask=(y <= last_y) & (x <= last_x), other=0.0)
    return total


@triton.jit
def pool_kernel(
    weights, counts, features, to_prototypes, factors, table, min_pixels, B, K, C, stride_b,
    stride_k, groups, splits, G: tl.constexpr, D: tl.constexpr, STRIDES: tl.constexpr,
    GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: a group of windows, BD channels, the support images of one split of K."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    start = pid % BLOCKS * BD
    b = (pid // (BLOCKS * groups) % B).to(tl.int64)
    split = pid // (BLOCKS * groups * B)
    group = group_of(table, G, pid // BLOCKS % groups, C, GROUP)
    c, window, number, used, _region = group
    acc = tl.zeros((number.shape[0], BD), tl.float32)
    for k in range(split * K // splits, (split + 1) * K // splits):
        image = b * K + k
        pixels = _window_counts(counts + image * G.tiles * C, table, G, C, c, window, used)
        enough = pixels > min_pixels
        factor = tl.where(enough, 1 / (K * tl.where(enough, pixels, 1.0)), 0.0)
        if start == 0:
            tl.store(factors + image * C * G.windows + number, factor, mask=used)
        part = gather(
            Weights(weights + image * C * G.runs, table, G, 1), group,
            Features(features + b * stride_b + (image - b * K) * stride_k, D, STRIDES), start, BD,
        )  # fmt: skip
        # Not `part * factor`: where too few pixels are in a window, NaN under others must not show.
        acc += tl.where(enough[:, None], part * factor[:, None], 0.0)
    d = start + tl.arange(0, BD)[None, :]
    to = to_prototypes + (split * B + b) * C * G.windows * D + (number * D)[:, None]
    tl.store(to + d, acc, mask=used[:, None] & (d < D))


@triton.jit
def pool_backward_kernel(
    weights, prototypes, factors, to, table, K, C, stride_b, stride_k, G: tl.constexpr,
    D: tl.constexpr, STRIDES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: BI x BJ locations, all channels. `prototypes`: their gradient."""
    image, corner = block_of(tl.program_id(0), G)
    to += image // K * stride_b + image % K * stride_k
    scatter(
        Weights(weights + image * C * G.runs, table, G, 1),
        prototypes + image // K * C * G.windows * D, factors + image * C * G.windows, C, corner,
        Features(None, D, STRIDES), Features(to, D, STRIDES), BD,
    )  # fmt: skip
