"""The two products between locations and windows, a matrix product each: `gather` sums locations
into windows, `scatter` windows into locations.

Both take `weights` from what the pixels left of each tile, the crossing of a piece of rows and a
piece of columns: [image, blocks, runs of rows, runs of columns] float32, a run being a location of
a piece; one block for each class and each of the P places that a window can have among those over
the tile (P = 1 where all windows get the same); see `pooling` and `matching`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import shared
from .shared import X, Y, load_channels, load_features, locations_of, look, product, span, spoilt


class Weights(NamedTuple):
    """An image's weights, for P places, and the table by which they are found."""

    at: tl.tensor
    table: tl.tensor
    G: tl.constexpr
    P: tl.constexpr


@triton.jit
def _run_near(w, axis: tl.constexpr, i, number, PIECES: tl.constexpr, m):
    """Of the pieces near locations i the one of this number: the location's run, the first window
    over it, and whether it is in windows m, [windows, locations] (m None: whether there is one)."""
    n = i * PIECES + number
    first, last = span(w.table, w.G, axis, w.G.row.RUN_FIRST, n)
    if m is None:
        inside = (last >= 0)[None, :]
    else:
        inside = (m[:, None] >= first[None, :]) & (m[:, None] <= last[None, :])
    return look(w.table, w.G, axis, w.G.row.RUN, n), first, inside


@triton.jit
def _weights(w, c, my, mx, location):
    """Weights of locations for windows (my, mx) of classes c, [windows, locations], summed over the
    tiles that are near the one and in the other, and whether there are any. my is -1 where there is
    no window; without my and mx (None), all tiles near a location are summed."""
    G: tl.constexpr = w.G
    NEAR_Y: tl.constexpr = G.y.near_pieces
    NEAR_X: tl.constexpr = G.x.near_pieces
    total = tl.zeros((c.shape[0], location[0].shape[0]), tl.float32)
    near = tl.zeros(total.shape, tl.int1)
    block = c * w.P
    if w.P > 1:
        block += my * G.x.overlap + mx
    for a in range(NEAR_Y):
        row, first_y, in_y = _run_near(w, Y, location[0], a, NEAR_Y, my)
        for b in tl.range(0, NEAR_X, loop_unroll_factor=NEAR_X if NEAR_X <= 2 else 1):
            column, first_x, in_x = _run_near(w, X, location[1], b, NEAR_X, mx)
            at = row * G.x.runs + column
            if w.P > 1:
                at -= (first_y * G.x.overlap + first_x) * G.runs
            at = (w.at + block * G.runs)[:, None] + at[None, :]
            total += tl.load(at, mask=in_y & in_x, other=0.0)
            near |= in_y & in_x
    return total, near


@triton.jit
def group_of(table, G: tl.constexpr, pid, C, GROUP: tl.constexpr):
    """A group of so many rows and columns of windows and classes: class, window (-1 where there is
    none), their numbers among all, which are real, and the region of locations near them."""
    GY: tl.constexpr = GROUP[0]
    GX: tl.constexpr = GROUP[1]
    DOWN: tl.constexpr = (G.y.windows + GY - 1) // GY
    ACROSS: tl.constexpr = (G.x.windows + GX - 1) // GX
    n = tl.arange(0, GY * GX * GROUP[2])
    top = pid // ACROSS % DOWN * GY
    left = pid % ACROSS * GX
    c = pid // (ACROSS * DOWN) * GROUP[2] + n // (GY * GX)
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
def gather(w, group, f, start, BD: tl.constexpr):
    """Sums over the locations near a group of windows, of weight times F, for BD channels from
    `start` on: [windows, BD]."""
    acc = _gather(w, group, f, start, BD, False)
    if spoilt(acc):
        acc = _gather(w, group, f, start, BD, True)
    return acc


@triton.jit
def _gather(w, group, f, start, BD: tl.constexpr, EXACT: tl.constexpr):
    M: tl.constexpr = 1 if EXACT else 32  # locations at a time
    c, window, _number, _used, region = group
    width = tl.maximum(region[3] - region[2], 1)
    count = (region[1] - region[0]) * width
    acc = tl.zeros((c.shape[0], BD), tl.float32)
    for first in range(0, count, M):
        n = first + tl.arange(0, M)
        inside = (n < count)[None, :]
        n = tl.minimum(n, count - 1)  # the last one again, without weight
        location = (region[0] + n // width, region[2] + n % width)
        weight, near = _weights(w, c, window[0], window[1], location)
        value = load_features(f, location, start, BD)
        acc += product(tl.where(inside, weight, 0.0), value, near[:, :, None], EXACT)
    return acc


@triton.jit
def _ring(w, C, corner):
    """K locations in and around a block, and what they give to those in it by the Gram maps, [BI
    BJ, K]. Each product of neighbours has two sides, and is kept where its upper left one is."""
    G: tl.constexpr = w.G
    K: tl.constexpr = 64
    tl.static_assert((G.BI + 2) * (G.BJ + 2) <= K)
    k = tl.arange(0, K)
    i, j = corner[0] - 1 + k // (G.BJ + 2), corner[1] - 1 + k % (G.BJ + 2)
    inside = (i >= 0) & (i < G.y.cells) & (j >= 0) & (j < G.x.cells)
    location = (tl.where(inside, i, 0), tl.where(inside, j, 0))
    start = w.at + C * w.P * G.runs
    maps, _near = _weights(Weights(start, w.table, G, 1), tl.arange(0, 4), None, None, location)
    maps = tl.where(inside[None, :], maps, 0.0).reshape((4 * K,))

    own = tl.arange(0, G.BI * G.BJ)[:, None]
    own_i, own_j = own // G.BJ + 1, own % G.BJ + 1
    i, j = k[None, :] // (G.BJ + 2), k[None, :] % (G.BJ + 2)
    of = tl.where(i == own_i, 0, 2 * K) + tl.where(j == own_j, 0, K)
    of += tl.minimum(i, own_i) * (G.BJ + 2) + tl.minimum(j, own_j)
    near = (tl.abs(i - own_i) <= 1) & (tl.abs(j - own_j) <= 1)
    of = tl.where(near, of, 0).reshape((G.BI * G.BJ * K,))
    return location, tl.where(near, tl.gather(maps, of, 0).reshape((G.BI * G.BJ, K)), 0.0)


@triton.jit
def _windows(w, coefficients, C, near, first, location, BN: tl.constexpr):
    """Of the windows near a block BN from the `first` on: weights times coefficients and which are
    near, [locations, windows], their numbers among all, and which are real. A coefficient of 0, of
    a window with too few pixels, passes on no gradient, not even NaN."""
    n = first + tl.arange(0, BN)
    used = n < C * near[2] * near[3]
    c, my, mx = shared.window_of(n, near)
    number = (c * w.G.y.windows + my) * w.G.x.windows + mx
    coefficient = tl.load(coefficients + number, mask=used, other=0.0)
    used = coefficient != 0
    weight, near = _weights(w, c, tl.where(used, my, -1), mx, location)
    return tl.trans(weight * coefficient[:, None]), tl.trans(near), number, used


@triton.jit
def _sum_windows(windows, vectors, start, D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """Sums over those windows, of weight times vector, for BD channels: [locations, BD]."""
    weight, near, number, used = windows[0], windows[1], windows[2], windows[3]
    d = start + tl.arange(0, BD)[None, :]
    vector = load_channels((vectors + number * D)[:, None] + d, d, D, BD, used[:, None])
    return product(weight, vector, near[:, :, None], EXACT)


@triton.jit
def scatter(w, vectors, coefficients, C, corner, f, to, BD: tl.constexpr):
    """The gradient `to` of a block of BI x BJ locations from its `corner` on: sums over the windows
    near it, of weight times coefficient [C, Gy, Gx] times vector [C, Gy, Gx, D]; and the Gram maps'
    part, unless the features f are at None."""
    if _scatter(w, vectors, coefficients, C, corner, f, to, BD, False):
        tl.debug_barrier()  # other threads write here what was written above
        # A table's 0, so that the compiler does not keep what it knows to be the same as above in
        # registers all the time. Few channels, so that none is spilled.
        zero = look(w.table, w.G, Y, w.G.row.LOWER, 0)
        corner = (corner[0] + zero, corner[1] + zero)
        _scatter(w, vectors, coefficients, C, corner, f, to, 2, True)


@triton.jit
def _scatter(w, vectors, coefficients, C, corner, f, to, BD: tl.constexpr, EXACT: tl.constexpr):
    """Returns whether a sum is spoilt."""
    G: tl.constexpr = w.G
    BN: tl.constexpr = 16 if f.at is None else 32  # windows at a time
    i, j, inside, location = locations_of(G, corner)
    near = shared.windows_near(w.table, G, corner)
    first = _windows(w, coefficients, C, near, 0, location, BN)
    if f.at is not None:
        around, ring = _ring(w, C, corner)
    d = tl.arange(0, BD)[None, :]
    at = to.at + (i * to.STRIDES[1] + j * to.STRIDES[2])
    bad = False
    for start in range(0, to.D, BD):
        acc = _sum_windows(first, vectors, start, to.D, BD, EXACT)
        for n in range(BN, C * near[2] * near[3], BN):
            others = _windows(w, coefficients, C, near, n, location, BN)
            acc += _sum_windows(others, vectors, start, to.D, BD, EXACT)
        if f.at is not None:
            value = load_features(f, around, start, BD)
            acc += product(ring, value, (ring != 0)[:, :, None], EXACT)
        here = (at + tl.cast(start, tl.int64) * to.STRIDES[0])[:, None] + d * to.STRIDES[0]
        mask = inside[:, None] if to.D % BD == 0 else inside[:, None] & (start + d < to.D)
        tl.store(here, acc.to(to.at.dtype.element_ty), mask=mask)
        bad |= spoilt(acc)
    return bad
