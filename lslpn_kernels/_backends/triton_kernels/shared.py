"""What all kernels share: the table of the geometry, and exact products on tensor cores."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Axes.
Y = tl.constexpr(0)
X = tl.constexpr(1)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
EPS_SQUARE = tl.constexpr(1e-16)  # of `reference.EPS`


class Features(NamedTuple):
    """An image's, or their gradient."""

    at: tl.tensor  # location (0, 0), channel 0
    D: tl.constexpr
    STRIDES: tl.constexpr  # of channels, rows, columns


@triton.jit
def look(table, G: tl.constexpr, axis: tl.constexpr, row: tl.constexpr, index, mask=True, other=0):
    """Entries of the table."""
    return tl.load(table + ((axis * G.row.COUNT + row) * G.length + index), mask=mask, other=other)


@triton.jit
def span(table, G: tl.constexpr, axis: tl.constexpr, row: tl.constexpr, index, mask=True):
    """First and last entries, or begins and ends, from two rows of which this is the first; none
    (0, -1) where the mask is not set."""
    first = look(table, G, axis, row, index, mask)
    return first, look(table, G, axis, row + 1, index, mask, -1)


@triton.jit
def look_weight(table, G: tl.constexpr, axis: tl.constexpr, index, mask):
    return look(table, G, axis, G.row.WEIGHT, index, mask).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b):
    """``a @ b`` in float32, a is float32. Both are cut into parts that the tensor cores multiply
    exactly: two TF32 (22 bits) if b is float32, else two bfloat16 (16 bits; a bfloat16 is its own
    only part). The product of the low parts is below rounding.

    Whoever sums several such products adds them up outside of the tensor cores: these cut off what
    does not fit when they add, which over a long sum would become an error of many units in the
    last place.
    """
    if b.dtype == tl.float32:
        a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        part = tl.dot(a - a_high, b_high, input_precision="tf32")
        part = tl.dot(a_high, b - b_high, part, input_precision="tf32")
        part = tl.dot(a_high, b_high, part, input_precision="tf32")
    elif INTERPRETED:  # the interpreter's products of bfloat16 are wrong
        part = tl.dot(a, b.to(tl.float32), input_precision="ieee")
    else:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        # In another order it takes more registers than there are.
        part = tl.dot(a_high, b_high)
        if b.dtype != tl.bfloat16:
            part = tl.dot(a_high, (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16), part)
        part = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, part)
    return part


@triton.jit
def spoilt(x):
    """Whether there is a NaN or an infinity: 0 times these may have spoilt what has no part in
    them, so that the sums are taken again, by EXACT products."""
    return tl.sum(x * 0) != 0


@triton.jit
def product(a, b, part, EXACT: tl.constexpr):
    """`dot`; EXACT: of those terms only that have a `part` in it, [rows, terms, columns]."""
    if EXACT:
        terms = a[:, :, None] * b.to(tl.float32)[None, :, :]
        return tl.sum(tl.where(part, terms, 0.0), 1)
    else:
        return dot(a, b)


@triton.jit
def load_features(f, location, start, BK: tl.constexpr, CHANNELS_FIRST: tl.constexpr = False):
    """BK channels from `start` on of locations `(rows, columns)`: [locations, channels], or
    CHANNELS_FIRST. Neighbouring lanes read what lies next to each other in memory. The start is
    added to the addresses first: what is left to add to them for a channel is then a constant,
    which costs no instruction."""
    STRIDE: tl.constexpr = f.STRIDES[0]
    at = f.at + (location[0] * f.STRIDES[1] + location[1] * f.STRIDES[2])
    at += tl.cast(start, tl.int64) * STRIDE
    d = tl.arange(0, BK)
    if STRIDE == 1:
        value = load_channels(at[:, None] + d[None, :], (start + d)[None, :], f.D, BK)
        return tl.trans(value) if CHANNELS_FIRST else value
    else:
        # Each of 4 warps reads a quarter of the channels: a thread then has neighbours, and puts
        # them into shared memory at once.
        HALF: tl.constexpr = f.at.dtype.element_ty.primitive_bitwidth == 16
        WARPS: tl.constexpr = 4 if HALF and BK >= 64 else 1
        d = d.reshape((WARPS, BK // WARPS)).permute(1, 0)[:, :, None]
        value = load_channels(at[None, None, :] + d * STRIDE, start + d, f.D, BK)
        if CHANNELS_FIRST:
            return value.permute(1, 0, 2).reshape((BK, value.shape[2]))
        else:
            return value.permute(2, 1, 0).reshape((value.shape[2], BK))


@triton.jit
def load_channels(at, d, D: tl.constexpr, BK: tl.constexpr, mask=True):
    """What lies at these addresses, BK channels of D at a time; 0 beyond the last channel, and
    outside of the mask."""
    return tl.load(at, mask=mask if D % BK == 0 else mask & (d < D), other=0.0)


@triton.jit
def inverse_length(square):
    """1 / sqrt(square), 0 below EPS. NaN stays NaN."""
    gone = square < EPS_SQUARE
    return tl.where(gone, 0.0, tl.rsqrt(tl.where(gone, 1.0, square)))


# Windows near a block of locations


@triton.jit
def block_of(pid, G: tl.constexpr):
    """Of the blocks of BI x BJ locations of all images one: the image and the first location."""
    corner = (pid % G.blocks // G.across * G.BI, pid % G.across * G.BJ)
    return (pid // G.blocks).to(tl.int64), corner


@triton.jit
def locations_of(G: tl.constexpr, corner):
    """Rows and columns of a block, which of them are in the image, and the nearest that are."""
    n = tl.arange(0, G.BI * G.BJ)
    i, j = corner[0] + n // G.BJ, corner[1] + n % G.BJ
    nearest = (tl.minimum(i, G.y.cells - 1), tl.minimum(j, G.x.cells - 1))
    return i, j, (i < G.y.cells) & (j < G.x.cells), nearest


@triton.jit
def windows_near(table, G: tl.constexpr, corner):
    """The windows near a block: first row and column, rows and columns."""
    i = tl.minimum(corner[0] + tl.arange(0, G.BI), G.y.cells - 1)
    j = tl.minimum(corner[1] + tl.arange(0, G.BJ), G.x.cells - 1)
    first_y, last_y = span(table, G, Y, G.row.NEAR_FIRST, i)
    first_x, last_x = span(table, G, X, G.row.NEAR_FIRST, j)
    y, x = tl.min(first_y, 0), tl.min(first_x, 0)
    ny, nx = tl.max(last_y, 0) - y + 1, tl.max(last_x, 0) - x + 1
    return y, x, tl.maximum(ny, 0), tl.maximum(nx, 0)


@triton.jit
def window_of(n, near):
    """The n-th of the windows near a block: class, row and column."""
    nx = tl.maximum(near[3], 1)
    ny = tl.maximum(near[2], 1)
    row = n // nx
    c = row // ny
    return c, near[0] + row - c * ny, near[1] + n - row * nx


# The pixels of a tile


@triton.jit
def tile_of(pid, G: tl.constexpr):
    """Of the tiles of all images one: the image, its pieces, and the tile's first runs."""
    piece_y, piece_x = pid // G.x.pieces % G.y.pieces, pid % G.x.pieces
    runs = piece_y * G.y.piece_cells * G.x.runs + piece_x * G.x.piece_cells
    return (pid // G.tiles).to(tl.int64), piece_y, piece_x, runs


@triton.jit
def tile_columns(table, G: tl.constexpr, piece, T: tl.constexpr):
    """The columns of a piece: pixels and which are real, lower locations, also as counted from the
    piece's first one, and the weights of the upper ones."""
    begin, end = span(table, G, X, G.row.PIECE_BEGIN, piece)
    x = begin + tl.arange(0, T)
    j = look(table, G, X, G.row.LOWER, x, x < end)
    column = j - look(table, G, X, G.row.PIECE_LOWER, piece)
    return x, x < end, j, column, look_weight(table, G, X, x, x < end)


@triton.jit
def interpolation(lower, at_lower, at_upper, N: tl.constexpr):
    """[pixels, N]: what each pixel gives to N locations of which `lower` is one."""
    n = tl.arange(0, N)[None, :]
    rest = tl.where(n == lower[:, None] + 1, at_upper[:, None], 0.0)
    return tl.where(n == lower[:, None], at_lower[:, None], rest)
