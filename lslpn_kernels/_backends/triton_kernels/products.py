"""The two products between locations and windows, a matrix product each: `gather` sums locations
into windows, `scatter` windows into locations.

Both take `weights` from what the pixels left of each tile, the crossing of a piece of rows and a
piece of columns: [image, blocks, runs of rows, runs of columns] float32, a run being a location of
a piece; one block for each class and each of the P places that a window can have among those over
the tile (P = 1 where all windows get the same); see `pooling` and `matching_back`.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    NEAR_FIRST,
    NEAR_LAST,
    RUN,
    RUN_FIRST,
    RUN_LAST,
    WINDOW_CELL_BEGIN,
    WINDOW_CELL_END,
    X,
    Y,
    dot,
    load_features,
    look,
    one,
    spoilt,
    wide,
    window_of,
    windows_near,
)


@triton.jit
def _run_near(axes, axis: tl.constexpr, i, number, REACH: tl.constexpr):
    """Of the pieces near locations the one of this number: the location's run, its first and last
    window (-1 where there is no such piece)."""
    n = i * REACH[axis] + number
    first = look(axes, axis, RUN_FIRST, n, None, None)
    last = look(axes, axis, RUN_LAST, n, None, None)
    return look(axes, axis, RUN, n, None, None), first, last


@triton.jit
def region_weights(
    axes, tiles, block, window, cell, SHAPE: tl.constexpr, REACH: tl.constexpr, OX: tl.constexpr,
    PLACES: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Weights of locations for windows, [windows, locations], summed over the tiles that are near
    the one and in the other.

    `tiles` is (weights of an image, runs of rows, runs of columns); `block` the first block of each
    window's class; `window` (my, mx), -1 where there is none; `cell` (i, j). A location is near no
    more than REACH pieces of either axis.
    """
    my, mx = window[0], window[1]
    size = tiles[1] * tiles[2]
    total = tl.zeros(SHAPE, tl.float32)
    place = block + my * OX + mx if PLACES else block
    from_window = tiles[0] + wide(place, LONG) * size
    for a in range(REACH[0]):
        row, first_y, last_y = _run_near(axes, Y, cell[0], a, REACH)
        over_y = (my[:, None] >= first_y[None, :]) & (my[:, None] <= last_y[None, :])
        for b in tl.range(0, REACH[1], loop_unroll_factor=REACH[1] if REACH[1] <= 2 else 1):
            column, first_x, last_x = _run_near(axes, X, cell[1], b, REACH)
            over_x = (mx[:, None] >= first_x[None, :]) & (mx[:, None] <= last_x[None, :])
            at = row * tiles[2] + column
            if PLACES:
                at -= wide(first_y * OX + first_x, LONG) * size
            at = from_window[:, None] + at[None, :]
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
    axes, tiles, block, window, region, features, d_begin, D, STRIDES: tl.constexpr,
    EVEN: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REACH: tl.constexpr,
    OX: tl.constexpr, PLACES: tl.constexpr, LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
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
        at = wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2]
        f = load_features(features + at, d_begin, D, STRIDES, EVEN, BD, LONG)
        weight = region_weights(
            axes, tiles, block, window, (i, j), (BN, M), REACH, OX, PLACES, LONG
        )
        acc += dot(tl.where(inside[None, :], weight, 0.0), f, DOT)
    if spoilt(acc):
        acc = tl.zeros((BN, BD), tl.float32)
        for n in range(count):
            i = region[0] + n // width + tl.zeros((1,), tl.int32)
            j = region[2] + n % width + tl.zeros((1,), tl.int32)
            at = wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2]
            f = load_features(features + at, d_begin, D, STRIDES, EVEN, BD, LONG).to(tl.float32)
            weight = region_weights(
                axes, tiles, block, window, (i, j), (BN, 1), REACH, OX, PLACES, LONG
            )
            acc += tl.where(_near(axes, window, (i, j)), weight * f, 0.0)
    return acc


@triton.jit
def _stencil(
    axes, tiles, first_block, corner, shape, K: tl.constexpr, HALO_X: tl.constexpr,
    REACH: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Derivatives by the four Gram maps at the K locations around a block, [4 K]. Those by |F|^2
    are doubled."""
    n = tl.arange(0, 4 * K)
    place = n % K
    i = corner[0] + place // HALO_X
    j = corner[1] + place % HALO_X
    inside = (i >= 0) & (i < shape[0]) & (j >= 0) & (j < shape[1])
    i = tl.where(inside, i, 0)
    j = tl.where(inside, j, 0)
    total = tl.zeros((4 * K,), tl.float32)
    from_map = tiles[0] + wide(first_block + n // K, LONG) * (tiles[1] * tiles[2])
    for a in tl.range(0, REACH[0], loop_unroll_factor=REACH[0] if REACH[0] <= 2 else 1):
        row, _first, last_y = _run_near(axes, Y, i, a, REACH)
        for b in tl.range(0, REACH[1], loop_unroll_factor=REACH[1] if REACH[1] <= 2 else 1):
            column, _first, last_x = _run_near(axes, X, j, b, REACH)
            there = inside & (last_y >= 0) & (last_x >= 0)
            total += tl.load(from_map + row * tiles[2] + column, mask=there, other=0.0)
    return tl.where(n < K, 2 * total, total)


@triton.jit
def _ring(stencil, BI: tl.constexpr, BJ: tl.constexpr, K: tl.constexpr):
    """What the K locations around a block of BI x BJ give to those of the block, [BI BJ, K]. Each
    product of neighbours has two sides, and is kept where its upper left one is.
    """
    cell = tl.arange(0, BI * BJ)[:, None]
    n = tl.arange(0, K)[None, :]
    own_i, own_j = cell // BJ + 1, cell % BJ + 1
    i, j = n // (BJ + 2), n % (BJ + 2)
    di, dj = i - own_i, j - own_j
    near = (di >= -1) & (di <= 1) & (dj >= -1) & (dj <= 1)
    of = tl.where(di == 0, 0, 2 * K) + tl.where(dj == 0, 0, K)
    of += tl.minimum(i, own_i) * (BJ + 2) + tl.minimum(j, own_j)
    of = tl.where(near, of, 0).reshape((BI * BJ * K,))
    return tl.where(near, tl.gather(stencil, of, 0).reshape((BI * BJ, K)), 0.0)


@triton.jit
def _windows(
    axes, tiles, coefficients, shape, near, first, cell, P: tl.constexpr, SHAPE: tl.constexpr,
    REACH: tl.constexpr, OX: tl.constexpr, PLACES: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Of the windows near a block, those from the `first` on: their weights times coefficients,
    their numbers among all, and which there are; of a single one, the locations that it has a part
    in, [1, locations]."""
    n = first + tl.arange(0, SHAPE[0])
    used = n < shape[0] * near[2] * near[3]
    c, my, mx = window_of(n, near[0], near[1], near[2], near[3])
    row = wide((c * shape[4] + my) * shape[5] + mx, LONG)
    my = tl.where(used, my, -1)
    weight = region_weights(axes, tiles, c * P, (my, mx), cell, SHAPE, REACH, OX, PLACES, LONG)
    coefficient = tl.load(coefficients + row, mask=used, other=0.0)[:, None]
    if SHAPE[0] == 1:
        used = _near(axes, (my, mx), cell) & (coefficient != 0)
    return weight * coefficient, row, used


@triton.jit
def _one_by_one(
    axes, tiles, vectors, coefficients, shape, near, cell, ring, corner, features, start,
    STRIDES: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, BJ: tl.constexpr,
    SHAPE: tl.constexpr, REACH: tl.constexpr, OX: tl.constexpr, PLACES: tl.constexpr,
    GRAM: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The sums of `scatter`, SHAPE [locations, channels], without the terms that have no part in
    them."""
    d = tl.arange(0, SHAPE[1])
    acc = tl.zeros(SHAPE, tl.float32)
    for n in range(shape[0] * near[2] * near[3]):
        weight, row, has_part = _windows(
            *(axes, tiles, coefficients, shape, near, n, cell),
            *(P, (1, SHAPE[0]), REACH, OX, PLACES, LONG),
        )
        at = (vectors + row * shape[1] + start)[:, None] + d[None, :]
        vector = tl.load(at, mask=(start + d < shape[1])[None, :], other=0.0)
        acc += tl.where(tl.trans(has_part), tl.trans(weight) * vector, 0.0)
    if GRAM:
        K: tl.constexpr = ring.shape[1]
        for n in range(K):
            weight = tl.sum(tl.where(tl.arange(0, K)[None, :] == n, ring, 0.0), 1)[:, None]
            at = _around(corner, shape, n + tl.zeros((1,), tl.int32), STRIDES, BJ, LONG)
            f = load_features(features + at, start, shape[1], STRIDES, EVEN, SHAPE[1], LONG)
            acc += tl.where(weight != 0, weight * f.to(tl.float32), 0.0)
    return acc


@triton.jit
def _around(corner, shape, n, STRIDES: tl.constexpr, BJ: tl.constexpr, LONG: tl.constexpr):
    """Where the n-th location around a block lies in memory; beyond the image, where there is
    nothing to weigh, any other."""
    i = tl.minimum(tl.maximum(corner[0] - 1 + n // (BJ + 2), 0), shape[2] - 1)
    j = tl.minimum(tl.maximum(corner[1] - 1 + n % (BJ + 2), 0), shape[3] - 1)
    return wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2]


@triton.jit
def _store(
    to, value, start, D, inside, TO_STRIDES: tl.constexpr, EVEN: tl.constexpr, BD: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    at = to + tl.cast(start, tl.int64) * TO_STRIDES[0]
    at = at[:, None] + (wide(d, LONG) * TO_STRIDES[0])[None, :]
    mask = inside[:, None] & ((start + d < D) | EVEN)[None, :]
    tl.store(at, value.to(to.dtype.element_ty), mask=mask)


@triton.jit
def scatter(
    axes, tiles, vectors, coefficients, shape, corner, features, to, STRIDES: tl.constexpr,
    TO_STRIDES: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REACH: tl.constexpr, OX: tl.constexpr,
    PLACES: tl.constexpr, GRAM: tl.constexpr, LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of BI x BJ locations: sums over the windows near it, of weight times
    coefficient times vector; with GRAM, the Gram maps' part as well.

    `shape` is (C, D, h, w, Gy, Gx), `corner` the block's first location, `vectors` [C, Gy, Gx, D]
    and `coefficients` [C, Gy, Gx].
    """
    C, D, h, w = shape[0], shape[1], shape[2], shape[3]
    M: tl.constexpr = BI * BJ
    cell = tl.arange(0, M)
    y_first, y_windows = windows_near(axes, Y, corner[0], tl.minimum(corner[0] + BI, h), BI)
    x_first, x_windows = windows_near(axes, X, corner[1], tl.minimum(corner[1] + BJ, w), BJ)
    i = corner[0] + cell // BJ
    j = corner[1] + cell % BJ
    inside = (i < h) & (j < w)
    to += wide(i, LONG) * TO_STRIDES[1] + wide(j, LONG) * TO_STRIDES[2]
    i = tl.minimum(i, h - 1)
    j = tl.minimum(j, w - 1)
    count = C * y_windows * x_windows
    VECTORS: tl.constexpr = "ieee" if DOT == "ieee" else "tf32"
    K: tl.constexpr = 64
    if GRAM:
        tl.static_assert((BI + 2) * (BJ + 2) <= K)
        stencil = _stencil(
            axes, tiles, C * P, (corner[0] - 1, corner[1] - 1), (h, w), K, BJ + 2, REACH, LONG
        )
        ring = _ring(stencil, BI, BJ, K)
        around = features + _around(corner, shape, tl.arange(0, K), STRIDES, BJ, LONG)
    else:
        ring = 0
    near = (y_first, x_first, y_windows, x_windows)
    weight, row, used = _windows(
        axes, tiles, coefficients, shape, near, 0, (i, j), P, (BN, M), REACH, OX, PLACES, LONG
    )
    mend = False
    for start in range(0, D, BD):
        d = tl.arange(0, BD)
        there = ((start + d < D) | EVEN)[None, :]
        at = (vectors + row * D + start)[:, None] + d[None, :]
        vector = tl.load(at, mask=used[:, None] & there, other=0.0)
        acc = dot(tl.trans(weight), vector, VECTORS)
        for first in range(BN, count, BN):
            others, at, here = _windows(
                *(axes, tiles, coefficients, shape, near, first, (i, j)),
                *(P, (BN, M), REACH, OX, PLACES, LONG),
            )
            at = (vectors + at * D + start)[:, None] + d[None, :]
            vector = tl.load(at, mask=here[:, None] & there, other=0.0)
            acc += dot(tl.trans(others), vector, VECTORS)
        if GRAM:
            f = load_features(around, start, D, STRIDES, EVEN, BD, LONG)
            acc += dot(ring, f, DOT)
        _store(to, acc, start, D, inside, TO_STRIDES, EVEN, BD, LONG)
        mend |= spoilt(acc)
    if mend:
        tl.debug_barrier()  # other threads write here what was written above
        FEW: tl.constexpr = 16  # channels, so that no register is spilled
        for start in range(0, D, FEW):
            exact = _one_by_one(
                axes, tiles, vectors, coefficients, shape, near, (i, j), ring, corner, features,
                start, STRIDES, EVEN, P, BJ, (M, FEW), REACH, OX, PLACES, GRAM, LONG,
            )  # fmt: skip
            _store(to, exact, start, D, inside, TO_STRIDES, EVEN, FEW, LONG)
