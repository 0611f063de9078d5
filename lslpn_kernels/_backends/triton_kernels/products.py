"""The two products between locations and windows, a matrix product each: `gather` sums locations
into windows, `scatter` windows into locations.

Both take `weights` from what the pixels left of each tile, the crossing of a piece of rows and a
piece of columns: [image, blocks, runs of rows, runs of columns] float32, a run being a location of
a piece; one block for each class and each of the P places that a window can have among those over
the tile (P = 1 where all windows get the same); see `pooling` and `matching_backward`.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    X,
    Y,
    dot,
    dot_of_parts,
    load_channels,
    load_features,
    look,
    span,
    spoilt,
    window_of,
    windows_near,
)


@triton.jit
def _run_near(table, G: tl.constexpr, axis: tl.constexpr, i, number, PIECES: tl.constexpr):
    """Of the pieces near locations the one of this number: the location's run, its first and last
    window (-1 where there is no such piece)."""
    n = i * PIECES + number
    first, last = span(table, G, axis, G.row.RUN_FIRST, n)
    return look(table, G, axis, G.row.RUN, n), first, last


@triton.jit
def _region_weights(
    weights, table, G: tl.constexpr, P: tl.constexpr, c, window, cell, SHAPE: tl.constexpr
):  # fmt: skip
    """Weights of locations for windows, SHAPE [windows, locations], summed over the tiles that are
    near the one and in the other. `weights` are of an image, `c` are the windows' classes; `window`
    (my, mx), -1 where there is none; `cell` (i, j)."""
    my, mx = window[0], window[1]
    NEAR_X: tl.constexpr = G.x.near_pieces
    total = tl.zeros(SHAPE, tl.float32)
    from_window = weights + (c * P + (my * G.x.overlap + mx if P > 1 else 0)) * G.runs
    for a in range(G.y.near_pieces):
        row, first_y, last_y = _run_near(table, G, Y, cell[0], a, G.y.near_pieces)
        over_y = (my[:, None] >= first_y[None, :]) & (my[:, None] <= last_y[None, :])
        for b in tl.range(0, NEAR_X, loop_unroll_factor=NEAR_X if NEAR_X <= 2 else 1):
            column, first_x, last_x = _run_near(table, G, X, cell[1], b, NEAR_X)
            over_x = (mx[:, None] >= first_x[None, :]) & (mx[:, None] <= last_x[None, :])
            at = row * G.x.runs + column
            if P > 1:
                at -= (first_y * G.x.overlap + first_x) * G.runs
            at = from_window[:, None] + at[None, :]
            total += tl.load(at, mask=over_y & over_x, other=0.0)
    return total


@triton.jit
def _near(table, G: tl.constexpr, window, cell):
    """Whether windows are near locations, [windows, locations]; each `(rows, columns)`."""
    my, mx = window[0][:, None], window[1][:, None]
    first_y, last_y = span(table, G, Y, G.row.NEAR_FIRST, cell[0])
    first_x, last_x = span(table, G, X, G.row.NEAR_FIRST, cell[1])
    near = (my >= first_y[None, :]) & (my <= last_y[None, :])
    return near & (mx >= first_x[None, :]) & (mx <= last_x[None, :])


@triton.jit
def group_of(
    table, G: tl.constexpr, pid, C, GY: tl.constexpr, GX: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A group of GY x GX windows and BN / (GY GX) classes: class, window (-1 where there is none),
    their numbers among all, which are real, and the region of locations near them."""
    DOWN: tl.constexpr = (G.y.windows + GY - 1) // GY
    ACROSS: tl.constexpr = (G.x.windows + GX - 1) // GX
    n = tl.arange(0, BN)
    top = pid // ACROSS % DOWN * GY
    left = pid % ACROSS * GX
    c = pid // (ACROSS * DOWN) * (BN // (GY * GX)) + n // (GY * GX)
    my = top + n // GX % GY
    mx = left + n % GX
    used = (c < C) & (my < G.y.windows) & (mx < G.x.windows)
    my = tl.where(used, my, -1)
    region = (
        look(table, G, Y, G.row.WINDOW_CELL_BEGIN, top),
        look(table, G, Y, G.row.WINDOW_CELL_END, tl.minimum(top + GY, G.y.windows) - 1),
        look(table, G, X, G.row.WINDOW_CELL_BEGIN, left),
        look(table, G, X, G.row.WINDOW_CELL_END, tl.minimum(left + GX, G.x.windows) - 1),
    )
    return c, (my, mx), (c * G.y.windows + my) * G.x.windows + mx, used, region


@triton.jit
def gather(
    weights, table, G: tl.constexpr, P: tl.constexpr, c, window, region, features, start,
    D: tl.constexpr, STRIDES: tl.constexpr, SHAPE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums over the locations of a region, of weight times F, for BD channels from `start` on:
    [BN, BD]. Row by row, M at a time; SHAPE is (BN, M, BD)."""
    acc = _gather(
        weights, table, G, P, c, window, region, features, start, D, STRIDES, SHAPE, False, DOT
    )
    if spoilt(acc):
        acc = _gather(
            weights, table, G, P, c, window, region, features, start, D, STRIDES,
            (SHAPE[0], 16, SHAPE[2]), True, DOT,
        )  # fmt: skip
    return acc


@triton.jit
def _gather(
    weights, table, G: tl.constexpr, P: tl.constexpr, c, window, region, features, start,
    D: tl.constexpr, STRIDES: tl.constexpr, SHAPE: tl.constexpr, PARTS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """PARTS: see `spoilt`."""
    M: tl.constexpr = SHAPE[1]
    width = tl.maximum(region[3] - region[2], 1)
    count = (region[1] - region[0]) * width
    acc = tl.zeros((SHAPE[0], SHAPE[2]), tl.float32)
    for first in range(0, count, M):
        n = first + tl.arange(0, M)
        inside = (n < count)[None, :]
        n = tl.minimum(n, count - 1)  # the last one again, without weight
        cell = (region[0] + n // width, region[2] + n % width)
        at = features + (cell[0] * STRIDES[1] + cell[1] * STRIDES[2])
        f = load_features(at, start, D, STRIDES, SHAPE[2])
        weight = _region_weights(weights, table, G, P, c, window, cell, (SHAPE[0], M))
        weight = tl.where(inside, weight, 0.0)
        if PARTS:
            acc += dot_of_parts(weight, f, inside & _near(table, G, window, cell), DOT)
        else:
            acc += dot(weight, f, DOT)
    return acc


@triton.jit
def _stencil(
    weights, table, G: tl.constexpr, first_block, corner, K: tl.constexpr
):  # fmt: skip
    """Derivatives by the four Gram maps at the K locations around a block, [4 K]. Those by |F|^2
    are doubled."""
    NEAR_Y: tl.constexpr = G.y.near_pieces
    NEAR_X: tl.constexpr = G.x.near_pieces
    n = tl.arange(0, 4 * K)
    i = corner[0] - 1 + n % K // (G.BJ + 2)
    j = corner[1] - 1 + n % K % (G.BJ + 2)
    inside = (i >= 0) & (i < G.y.cells) & (j >= 0) & (j < G.x.cells)
    i = tl.where(inside, i, 0)
    j = tl.where(inside, j, 0)
    total = tl.zeros((4 * K,), tl.float32)
    from_map = weights + (first_block + n // K) * G.runs
    for a in tl.range(0, NEAR_Y, loop_unroll_factor=NEAR_Y if NEAR_Y <= 2 else 1):
        row, _first, last_y = _run_near(table, G, Y, i, a, NEAR_Y)
        for b in tl.range(0, NEAR_X, loop_unroll_factor=NEAR_X if NEAR_X <= 2 else 1):
            column, _first, last_x = _run_near(table, G, X, j, b, NEAR_X)
            there = inside & (last_y >= 0) & (last_x >= 0)
            total += tl.load(from_map + row * G.x.runs + column, mask=there, other=0.0)
    return tl.where(n < K, 2 * total, total)


@triton.jit
def _ring(stencil, G: tl.constexpr, K: tl.constexpr):
    """What the K locations around a block of BI x BJ give to those of the block, [BI BJ, K]. Each
    product of neighbours has two sides, and is kept where its upper left one is.
    """
    cell = tl.arange(0, G.BI * G.BJ)[:, None]
    n = tl.arange(0, K)[None, :]
    own_i, own_j = cell // G.BJ + 1, cell % G.BJ + 1
    i, j = n // (G.BJ + 2), n % (G.BJ + 2)
    di, dj = i - own_i, j - own_j
    near = (di >= -1) & (di <= 1) & (dj >= -1) & (dj <= 1)
    of = tl.where(di == 0, 0, 2 * K) + tl.where(dj == 0, 0, K)
    of += tl.minimum(i, own_i) * (G.BJ + 2) + tl.minimum(j, own_j)
    of = tl.where(near, of, 0).reshape((G.BI * G.BJ * K,))
    return tl.where(near, tl.gather(stencil, of, 0).reshape((G.BI * G.BJ, K)), 0.0)


@triton.jit
def _windows(
    weights, table, G: tl.constexpr, P: tl.constexpr, coefficients, C, near, first, cell,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Of the windows near a block SHAPE[0] from the `first` on: their weights times coefficients,
    [windows, locations], their numbers among all, and (my, mx), -1 where there is none or its
    coefficient is 0: a window with too few pixels passes on no gradient, not even NaN."""
    n = first + tl.arange(0, SHAPE[0])
    used = n < C * near[2] * near[3]
    c, my, mx = window_of(n, near)
    number = (c * G.y.windows + my) * G.x.windows + mx
    coefficient = tl.load(coefficients + number, mask=used, other=0.0)
    my = tl.where(coefficient != 0, my, -1)
    weight = _region_weights(weights, table, G, P, c, (my, mx), cell, SHAPE)
    return weight * coefficient[:, None], number, (my, mx)


@triton.jit
def _from_windows(
    windows, table, G: tl.constexpr, cell, vectors, start, D: tl.constexpr, BD: tl.constexpr,
    PARTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums over those windows, of weight times vector, for BD channels: [locations, BD]."""
    weight, number, window = windows[0], windows[1], windows[2]
    d = start + tl.arange(0, BD)[None, :]
    at = (vectors + number * D)[:, None] + d
    vector = load_channels(at, d, D, BD, (window[0] >= 0)[:, None])
    if PARTS:
        near = _near(table, G, window, cell)
        weight = tl.where(near, weight, 0.0)  # without 0 times a coefficient that is not finite
        return dot_of_parts(tl.trans(weight), vector, tl.trans(near), DOT)
    else:
        return dot(tl.trans(weight), vector, DOT)


@triton.jit
def _scatter(
    first, ring, around, weights, table, G: tl.constexpr, P: tl.constexpr, vectors, coefficients,
    C, near, cell, start, D: tl.constexpr, STRIDES: tl.constexpr, SHAPE: tl.constexpr,
    GRAM: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """BD channels of `scatter`; the `first` BN windows have been weighed. PARTS: see `spoilt`."""
    VECTORS: tl.constexpr = "ieee" if DOT == "ieee" else "tf32"
    BN: tl.constexpr = SHAPE[0]
    BD: tl.constexpr = SHAPE[2]
    acc = _from_windows(first, table, G, cell, vectors, start, D, BD, PARTS, VECTORS)
    for n in range(BN, C * near[2] * near[3], BN):
        others = _windows(
            weights, table, G, P, coefficients, C, near, n, cell, (SHAPE[0], SHAPE[1])
        )
        acc += _from_windows(others, table, G, cell, vectors, start, D, BD, PARTS, VECTORS)
    if GRAM:
        f = load_features(around, start, D, STRIDES, BD)
        if PARTS:
            acc += dot_of_parts(ring, f, ring != 0, DOT)
        else:
            acc += dot(ring, f, DOT)
    return acc


@triton.jit
def scatter(
    weights, table, G: tl.constexpr, P: tl.constexpr, vectors, coefficients, C, corner, features,
    to, D: tl.constexpr, STRIDES: tl.constexpr, TO_STRIDES: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, GRAM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of BI x BJ locations: sums over the windows near it, of weight times
    coefficient times vector; with GRAM, the Gram maps' part as well.

    `corner` is the block's first location, `vectors` are [C, Gy, Gx, D] and `coefficients`
    [C, Gy, Gx].
    """
    M: tl.constexpr = G.BI * G.BJ
    n = tl.arange(0, M)
    i = corner[0] + n // G.BJ
    j = corner[1] + n % G.BJ
    inside = ((i < G.y.cells) & (j < G.x.cells))[:, None]
    to += i * TO_STRIDES[1] + j * TO_STRIDES[2]
    cell = (tl.minimum(i, G.y.cells - 1), tl.minimum(j, G.x.cells - 1))
    near = windows_near(table, G, corner)
    if GRAM:
        K: tl.constexpr = 64
        tl.static_assert((G.BI + 2) * (G.BJ + 2) <= K)
        ring = _ring(_stencil(weights, table, G, C * P, corner, K), G, K)
        # Beyond the image, where there is nothing to weigh, any other location.
        k = tl.arange(0, K)
        i = tl.minimum(tl.maximum(corner[0] - 1 + k // (G.BJ + 2), 0), G.y.cells - 1)
        j = tl.minimum(tl.maximum(corner[1] - 1 + k % (G.BJ + 2), 0), G.x.cells - 1)
        around = features + (i * STRIDES[1] + j * STRIDES[2])
    else:
        ring = 0
        around = 0
    first = _windows(weights, table, G, P, coefficients, C, near, 0, cell, (BN, M))
    mend = False
    for start in range(0, D, BD):
        acc = _scatter(
            first, ring, around, weights, table, G, P, vectors, coefficients, C, near, cell, start,
            D, STRIDES, (BN, M, BD), GRAM, False, DOT,
        )  # fmt: skip
        _store(to, acc, start, inside, D, TO_STRIDES, BD)
        mend |= spoilt(acc)
    if mend:
        tl.debug_barrier()  # other threads write here what was written above
        FEW: tl.constexpr = 8  # channels, so that no register is spilled
        # The locations and windows are found anew, from a table's 0: what the compiler knows to be
        # the same as before it would keep in registers all the time.
        zero = look(table, G, Y, G.row.LOWER, 0)
        cell = (
            tl.minimum(corner[0] + zero + n // G.BJ, G.y.cells - 1),
            tl.minimum(corner[1] + zero + n % G.BJ, G.x.cells - 1),
        )
        first = _windows(weights, table, G, P, coefficients, C, near, zero, cell, (BN, M))
        for start in range(0, D, FEW):
            acc = _scatter(
                first, ring, around, weights, table, G, P, vectors, coefficients, C, near, cell,
                start, D, STRIDES, (BN, M, FEW), GRAM, True, DOT,
            )  # fmt: skip
            _store(to, acc, start, inside, D, TO_STRIDES, FEW)


@triton.jit
def _store(
    to, value, start, inside, D: tl.constexpr, TO_STRIDES: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, BD)
    at = to + tl.cast(start, tl.int64) * TO_STRIDES[0]
    mask = inside if D % BD == 0 else inside & (start + d < D)[None, :]
    tl.store(at[:, None] + (d * TO_STRIDES[0])[None, :], value.to(to.dtype.element_ty), mask=mask)
