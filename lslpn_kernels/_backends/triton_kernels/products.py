"""The two products between locations and windows, a matrix product each: `gather` sums locations
into windows, `scatter` windows into locations.

Both take `weights` from what the pixels left of each tile, the crossing of a piece of rows and a
piece of columns: [image, piece of rows, piece of columns, blocks, RY, RX] float32, one number for
each of the tile's RY x RX locations, in one block for each class and each of the P places that a
window can have among those over the tile (P = 1 where all windows get the same); see `pooling` and
`matching_back`.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    NEAR_FIRST,
    NEAR_LAST,
    NEAR_PIECE_FIRST,
    NEAR_PIECE_LAST,
    PIECE_FIRST,
    PIECE_LAST,
    PIECE_LOWER,
    WINDOW_CELL_BEGIN,
    WINDOW_CELL_END,
    X,
    Y,
    dot,
    load_features,
    look,
    one,
    wide,
    window_of,
    windows_near,
)


@triton.jit
def _piece_near(axes, axis: tl.constexpr, i, number, inside):
    """Of the pieces near a location the one of this number: which it is, the location's place in
    it, its first and last window (-1 where there is no such piece)."""
    piece = look(axes, axis, NEAR_PIECE_FIRST, i, inside) + number
    there = inside & (piece <= look(axes, axis, NEAR_PIECE_LAST, i, inside, -1))
    row = i - look(axes, axis, PIECE_LOWER, piece, there)
    first = look(axes, axis, PIECE_FIRST, piece, there)
    return piece, row, first, look(axes, axis, PIECE_LAST, piece, there, -1)


@triton.jit
def region_weights(
    axes,
    tiles,
    block,
    window,
    cell,
    SHAPE: tl.constexpr,
    REACH: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
):
    """Weights of locations for windows, [windows, locations], summed over the tiles that are near
    the one and in the other.

    `tiles` is (those of an image, pieces of columns, blocks of a tile, RY, RX); `block` the first
    block of each window's class; `window` (my, mx), -1 where there is none, `cell` (i, j, which are
    real). A location is near no more than REACH pieces of either axis.
    """
    my, mx = window[0], window[1]
    size = tiles[3] * tiles[4]
    total = tl.zeros(SHAPE, tl.float32)
    from_window = wide(block, LONG) * size
    if PLACES:
        from_window += (my * OX + mx) * size
    for a in range(REACH[0]):
        piece_y, row, first_y, last_y = _piece_near(axes, Y, cell[0], a, cell[2])
        over_y = (my[:, None] >= first_y[None, :]) & (my[:, None] <= last_y[None, :])
        for b in tl.range(0, REACH[1], loop_unroll_factor=REACH[1] if REACH[1] <= 2 else 1):
            piece_x, column, first_x, last_x = _piece_near(axes, X, cell[1], b, cell[2])
            over_x = (mx[:, None] >= first_x[None, :]) & (mx[:, None] <= last_x[None, :])
            at = wide((piece_y * tiles[1] + piece_x) * tiles[2], LONG) * size
            at += row * tiles[4] + column
            if PLACES:
                at -= (first_y * OX + first_x) * size
            at = tiles[0] + (from_window[:, None] + at[None, :])
            total += tl.load(at, mask=over_y & over_x, other=0.0)
    return total


@triton.jit
def _near(axes, window, cell):
    """Whether windows are near locations, [windows, locations]; each `(rows, columns)`."""
    first_y, last_y = one(axes, Y, NEAR_FIRST, cell[0]), one(axes, Y, NEAR_LAST, cell[0])
    first_x, last_x = one(axes, X, NEAR_FIRST, cell[1]), one(axes, X, NEAR_LAST, cell[1])
    near = (window[0][:, None] >= first_y[None, :]) & (window[0][:, None] <= last_y[None, :])
    near &= window[1][:, None] >= first_x[None, :]
    return near & (window[1][:, None] <= last_x[None, :])


@triton.jit
def _spoilt(x):
    """Whether there is a NaN or an infinity: 0 times these would spoil what has no part in them, so
    that the sum is then taken term by term."""
    return tl.sum(x * 0) != 0


@triton.jit
def group_of(
    axes, pid, groups_x, groups_y, C, Gy, Gx, GY: tl.constexpr, GX: tl.constexpr, BN: tl.constexpr
):
    """A group of GY x GX windows and BN / (GY GX) classes: class, window (-1 where there is none),
    which are real, and the region of locations near them."""
    n = tl.arange(0, BN)
    top = pid // groups_x % groups_y * GY
    left = pid % groups_x * GX
    c = pid // (groups_x * groups_y) * (BN // (GY * GX)) + n // (GY * GX)
    my = top + n // GX % GY
    mx = left + n % GX
    used = (c < C) & (my < Gy) & (mx < Gx)
    region = (
        one(axes, Y, WINDOW_CELL_BEGIN, top),
        one(axes, Y, WINDOW_CELL_END, tl.minimum(top + GY, Gy) - 1),
        one(axes, X, WINDOW_CELL_BEGIN, left),
        one(axes, X, WINDOW_CELL_END, tl.minimum(left + GX, Gx) - 1),
    )
    return c, (tl.where(used, my, -1), mx), used, region


@triton.jit
def gather(
    axes,
    tiles,
    block,
    window,
    region,
    features,
    d_begin,
    D,
    STRIDES: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums over the locations of a region, of weight times F: [BN, BD]. Row by row, M at a time."""
    width = tl.maximum(region[3] - region[2], 1)
    count = (region[1] - region[0]) * width
    acc = tl.zeros((BN, BD), tl.float32)
    for start in range(0, count, M):
        n = start + tl.arange(0, M)
        inside = n < count
        n = tl.minimum(n, count - 1)  # the last one again, without weight
        i = region[0] + n // width
        j = region[2] + n % width
        cell = (i, j, inside)
        at = wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2]
        f = load_features(features + at, d_begin, D, STRIDES, EVEN, BD, LONG)
        weight = region_weights(axes, tiles, block, window, cell, (BN, M), REACH, OX, PLACES, LONG)
        acc += dot(weight, f, DOT)
    if _spoilt(acc):
        acc = tl.zeros((BN, BD), tl.float32)
        for n in range(count):
            i = region[0] + n // width + tl.zeros((1,), tl.int32)
            j = region[2] + n % width + tl.zeros((1,), tl.int32)
            at = wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2]
            f = load_features(features + at, d_begin, D, STRIDES, EVEN, BD, LONG).to(tl.float32)
            weight = region_weights(
                axes, tiles, block, window, (i, j, i >= 0), (BN, 1), REACH, OX, PLACES, LONG
            )
            acc += tl.where(_near(axes, window, (i, j)), weight * f, 0.0)
    return acc


@triton.jit
def _stencil(
    axes,
    tiles,
    first_block,
    corner,
    shape,
    K: tl.constexpr,
    HALO_X: tl.constexpr,
    REACH: tl.constexpr,
    LONG: tl.constexpr,
):
    """Derivatives by the four Gram maps at the K locations around a block, [4 K]. Those by |F|^2
    are doubled."""
    n = tl.arange(0, 4 * K)
    place = n % K
    i = corner[0] + place // HALO_X
    j = corner[1] + place % HALO_X
    inside = (i >= 0) & (i < shape[0]) & (j >= 0) & (j < shape[1])
    size = tiles[3] * tiles[4]
    total = tl.zeros((4 * K,), tl.float32)
    from_map = wide(first_block + n // K, LONG) * size
    for a in tl.range(0, REACH[0], loop_unroll_factor=REACH[0] if REACH[0] <= 2 else 1):
        piece_y, row, _first, last_y = _piece_near(axes, Y, i, a, inside)
        for b in tl.range(0, REACH[1], loop_unroll_factor=REACH[1] if REACH[1] <= 2 else 1):
            piece_x, column, _first, last_x = _piece_near(axes, X, j, b, inside)
            at = wide((piece_y * tiles[1] + piece_x) * tiles[2], LONG) * size + from_map
            at += row * tiles[4] + column
            total += tl.load(tiles[0] + at, mask=(last_y >= 0) & (last_x >= 0), other=0.0)
    return tl.where(n < K, 2 * total, total)


@triton.jit
def scatter(
    axes,
    tiles,
    vectors,
    coefficients,
    shape,
    corner,
    features,
    to,
    STRIDES: tl.constexpr,
    TO_STRIDES: tl.constexpr,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    GRAM: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """The gradient of a block of BI x BJ locations: sums over the windows near it, of weight times
    coefficient times vector; with GRAM, the Gram maps' part as well.

    `shape` is (C, D, h, w, Gy, Gx), `corner` the block's first location, `vectors` [C, Gy, Gx, D]
    and `coefficients` [C, Gy, Gx].
    """
    C, D, h, w, Gy, Gx = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    M: tl.constexpr = BI * BJ
    cell = tl.arange(0, M)
    y_first, y_windows = windows_near(axes, Y, corner[0], tl.minimum(corner[0] + BI, h), BI)
    x_first, x_windows = windows_near(axes, X, corner[1], tl.minimum(corner[1] + BJ, w), BJ)
    i = corner[0] + cell // BJ
    j = corner[1] + cell % BJ
    inside = (i < h) & (j < w)
    count = C * y_windows * x_windows
    to_at = wide(i, LONG) * TO_STRIDES[1] + wide(j, LONG) * TO_STRIDES[2]
    # The block with the locations around it, in rows of HALO_X.
    HALO_X: tl.constexpr = BJ + 2
    HALO: tl.constexpr = (BI + 2) * HALO_X
    K: tl.constexpr = 64
    if GRAM:
        tl.static_assert(HALO <= K)
        stencil = _stencil(
            axes, tiles, C * P, (corner[0] - 1, corner[1] - 1), (h, w), K, HALO_X, REACH, LONG
        )
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        there = ((d < D) | EVEN)[None, :]
        acc = tl.zeros((M, BD), tl.float32)
        for first in range(0, count, BN):
            n = first + tl.arange(0, BN)
            used = n < count
            c, my, mx = window_of(n, y_first, x_first, y_windows, x_windows)
            row = wide((c * Gy + my) * Gx + mx, LONG)
            vector = tl.load(
                vectors + (row[:, None] * D + d[None, :]), mask=used[:, None] & there, other=0.0
            )
            weight = region_weights(
                axes,
                tiles,
                c * P,
                (tl.where(used, my, -1), mx),
                (i, j, inside),
                (BN, M),
                REACH,
                OX,
                PLACES,
                LONG,
            )
            weight *= tl.load(coefficients + row, mask=used, other=0.0)[:, None]
            acc += dot(tl.trans(weight), vector, DOT)
        if GRAM:
            # Each product of neighbours has two sides, and is kept where its upper left one is.
            for first in range(0, K, BN):
                n = first + tl.arange(0, BN)
                halo_i = n // HALO_X
                halo_j = n % HALO_X
                # Beyond the edges there is nothing to weigh: any location will do.
                i_there = tl.minimum(tl.maximum(corner[0] - 1 + halo_i, 0), h - 1)
                j_there = tl.minimum(tl.maximum(corner[1] - 1 + halo_j, 0), w - 1)
                at = wide(i_there, LONG) * STRIDES[1] + wide(j_there, LONG) * STRIDES[2]
                f = load_features(features + at, start, D, STRIDES, EVEN, BD, LONG)
                own_i = (cell // BJ + 1)[:, None]
                own_j = (cell % BJ + 1)[:, None]
                di = halo_i[None, :] - own_i
                dj = halo_j[None, :] - own_j
                near = (di >= -1) & (di <= 1) & (dj >= -1) & (dj <= 1)
                of = tl.where(di == 0, 0, 2 * K) + tl.where(dj == 0, 0, K)
                of += tl.minimum(halo_i[None, :], own_i) * HALO_X
                of += tl.minimum(halo_j[None, :], own_j)
                of = tl.where(near, of, 0)
                value = tl.gather(stencil, of.reshape((M * BN,)), 0).reshape((M, BN))
                acc += dot(tl.where(near, value, 0.0), f, DOT)
        tl.store(
            to + (to_at[:, None] + wide(d, LONG)[None, :] * TO_STRIDES[0]),
            acc.to(to.dtype.element_ty),
            mask=inside[:, None] & there,
        )
