"""What all kernels share: the table of the geometry, and exact products on tensor cores."""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

# Axes.
Y = tl.constexpr(0)
X = tl.constexpr(1)

NONE_NEAR = tl.constexpr(1 << 30)
EPS_SQUARE = tl.constexpr(1e-16)  # of `reference.EPS`


@triton.jit
def look(
    table, G: tl.constexpr, axis: tl.constexpr, row: tl.constexpr, index, mask=None, other=0
):  # fmt: skip
    """Entries of the table."""
    at = table + ((axis * G.row.COUNT + row) * G.length + index)
    if mask is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=other)


@triton.jit
def span(
    table, G: tl.constexpr, axis: tl.constexpr, row: tl.constexpr, index, mask=None, first=0
):  # fmt: skip
    """First and last entries, or begins and ends, from two rows of which this is the first; none
    where the mask is not set."""
    begin = look(table, G, axis, row, index, mask, first)
    return begin, look(table, G, axis, row + 1, index, mask, -1)


@triton.jit
def look_weight(table, G: tl.constexpr, axis: tl.constexpr, index, mask):
    return look(table, G, axis, G.row.WEIGHT, index, mask).to(tl.float32, bitcast=True)


@triton.jit
def _high(x):
    """x rounded to a bfloat16 (by hand: the conversion is a slow instruction). A NaN may get lost
    here, but not in `_low`."""
    if x.dtype == tl.bfloat16:
        return x
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) + 0x8000
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _low(x, high):
    """What `_high` left of x, cut off to a bfloat16."""
    bits = (x.to(tl.float32) - high.to(tl.float32)).to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """``a @ b`` in float32. Both are cut into parts that the tensor cores multiply exactly:
    float32 into two TF32 (22 bits), half types into two bfloat16 (16 bits; a bfloat16 is its own
    only part). The product of the low parts is below rounding.

    Whoever sums several such products adds them up outside of the tensor cores: these cut off what
    does not fit when they add, which over a long sum would become an error of many units in the
    last place.
    """
    if DOT == "ieee":  # for the interpreter, whose bfloat16 products are wrong
        part = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif DOT == "tf32":
        a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        part = tl.dot(a - a_high, b_high, input_precision="tf32")
        part = tl.dot(a_high, b - b_high, part, input_precision="tf32")
        part = tl.dot(a_high, b_high, part, input_precision="tf32")
    else:
        a_high = _high(a)
        b_high = _high(b)
        # In another order it takes more registers than there are.
        part = tl.dot(a_high, b_high)
        if b.dtype != tl.bfloat16:
            part = tl.dot(a_high, _low(b, b_high), part)
        if a.dtype != tl.bfloat16:
            part = tl.dot(_low(a, a_high), b_high, part)
    return part


@triton.jit
def spoilt(x):
    """Whether there is a NaN or an infinity: 0 times these would spoil what has no part in them, so
    that the sum is then taken by `dot_of_parts`."""
    return tl.sum(x * 0) != 0


@triton.jit
def any_product(a, b):
    """Whether there is a term in which both are set, of a product of matrices of flags."""
    a, b = tl.where(a, 1.0, 0.0), tl.where(b, 1.0, 0.0)
    return tl.dot(a.to(tl.float16), b.to(tl.float16)) > 0


@triton.jit
def dot_of_parts(a, b, part, DOT: tl.constexpr):
    """`dot` without the terms that have no `part` in it, in the shape of a: NaN where another one
    has a b that is not finite."""
    b = b.to(tl.float32)
    finite = b * 0 == 0
    product = dot(a, tl.where(finite, b, 0.0), DOT)
    return tl.where(any_product(part, finite == 0), float("nan"), product)


@triton.jit
def load_features(
    at, start, D: tl.constexpr, STRIDES: tl.constexpr, BK: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr = False,
):  # fmt: skip
    """BK channels from `start` on of the locations at these addresses, [locations, channels], or
    CHANNELS_FIRST. Neighbouring lanes read what lies next to each other in memory. The start is
    added to the addresses first: what is left to add to them for a channel is then a constant,
    which costs no instruction."""
    at += tl.cast(start, tl.int64) * STRIDES[0]
    d = tl.arange(0, BK)
    if STRIDES[0] == 1:
        f = load_channels(at[:, None] + d[None, :], (start + d)[None, :], D, BK)
        f = tl.trans(f) if CHANNELS_FIRST else f
    else:
        # Each of 4 warps reads a quarter of the channels: a thread then has neighbours, and puts
        # them into shared memory at once.
        HALF: tl.constexpr = at.dtype.element_ty.primitive_bitwidth == 16
        WARPS: tl.constexpr = 4 if HALF and BK >= 64 else 1
        d = d.reshape((WARPS, BK // WARPS)).permute(1, 0)[:, :, None]
        f = load_channels(at[None, None, :] + d * STRIDES[0], start + d, D, BK)
        if CHANNELS_FIRST:
            f = f.permute(1, 0, 2).reshape((BK, f.shape[2]))
        else:
            f = f.permute(2, 1, 0).reshape((f.shape[2], BK))
    return f


@triton.jit
def load_channels(at, d, D: tl.constexpr, BK: tl.constexpr, mask=None):
    """What lies at these addresses, BK channels of D at a time; 0 beyond the last channel, and
    outside of the mask."""
    if D % BK == 0:
        return tl.load(at) if mask is None else tl.load(at, mask=mask, other=0.0)
    else:
        there = d < D if mask is None else mask & (d < D)
        return tl.load(at, mask=there, other=0.0)


@triton.jit
def inverse_length(square):
    """1 / sqrt(square), 0 below EPS. NaN stays NaN."""
    gone = square < EPS_SQUARE
    return tl.where(gone, 0.0, tl.rsqrt(tl.where(gone, 1.0, square)))


@triton.jit
def part_of(block, blocks, length):
    """Begin and end of a block, where `length` is cut into `blocks` that differ by 1 at most."""
    return block * length // blocks, (block + 1) * length // blocks


# Windows near a block of locations


@triton.jit
def block_of(pid, G: tl.constexpr):
    """Of the blocks of BI x BJ locations of all images one: the image and the first location."""
    corner = (pid % G.blocks // G.across * G.BI, pid % G.across * G.BJ)
    return (pid // G.blocks).to(tl.int64), corner


@triton.jit
def windows_near(table, G: tl.constexpr, corner):
    """The windows near a block of BI x BJ locations: first row and column, rows and columns."""
    y, ny = _windows_along(table, G, Y, corner[0], G.BI, G.y.cells)
    x, nx = _windows_along(table, G, X, corner[1], G.BJ, G.x.cells)
    return y, x, ny, nx


@triton.jit
def _windows_along(
    table, G: tl.constexpr, axis: tl.constexpr, begin, SIZE: tl.constexpr, CELLS: tl.constexpr
):  # fmt: skip
    i = begin + tl.arange(0, SIZE)
    first, last = span(table, G, axis, G.row.NEAR_FIRST, i, i < CELLS, NONE_NEAR)
    first = tl.min(first, 0)
    return first, tl.maximum(tl.max(last, 0) - first + 1, 0)


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
def tile_columns(table, G: tl.constexpr, piece, T: tl.constexpr):
    """The columns of a piece: pixels and which are real, lower locations, and the weights of the
    upper ones."""
    begin, end = span(table, G, X, G.row.PIECE_BEGIN, piece)
    x = begin + tl.arange(0, T)
    mask = x < end
    return x, mask, look(table, G, X, G.row.LOWER, x, mask), look_weight(table, G, X, x, mask)


@triton.jit
def interpolation(lower, at_lower, at_upper, N: tl.constexpr):
    """[pixels, N]: what each pixel gives to N locations of which `lower` is one."""
    n = tl.arange(0, N)[None, :]
    rest = tl.where(n == lower[:, None] + 1, at_upper[:, None], 0.0)
    return tl.where(n == lower[:, None], at_lower[:, None], rest)
