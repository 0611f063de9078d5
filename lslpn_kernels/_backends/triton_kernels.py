"""The Triton kernels of the head; `triton_` launches them.

Nothing is ever interpolated to image resolution but classes. Two things are exchanged between
feature locations (D channels, read in matrix products) and pixels (C classes):

    dots   [image, C, NY, NX, h, w]: <F(i, j), q_{c,m}> for the windows m near a location, those
           over a pixel that is interpolated from it. Window (my, mx) is at (my % NY, mx % NX).
    tiles  what the pixels add to the locations that they are interpolated from. A tile is the
           crossing of a `piece` of the rows, pixels in the same windows, and a `strip` of the
           columns, pixels in the same windows with the same lower location; all that a tile
           knows is its sums for the left and right location (2) of each of the R rows of
           locations under its piece. [image, piece, block, 2, R, strip], with one block for
             each class and each of the P places that a window can have among those over a pixel
             (P = 1 where all windows get the same): weights
             and for matching three more, the derivatives by the Gram maps: |F|^2; products with
             the right neighbour and of the diagonals; products with the lower neighbour

    dots_kernel         F, p      -> dots, Gram maps       matching, forward
    scores_kernel       dots      -> scores, winners
    match_tiles_kernel  dS        -> tiles                 matching, backward
    match_back_kernel   tiles, F  -> dF, dp
    mask_tiles_kernel   masks     -> tiles                 pooling, forward and backward
    pool_kernel         tiles, F  -> prototypes
    pool_back_kernel    tiles, dp -> dF

Every sum is taken by one program in a fixed order; there are no atomics. Letters beyond the
usual ones: M locations of a block, N windows (times classes) of a block, P places, S strips of a
block with up to T pixels each. `LONG` says that offsets within an image need 64 bits.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

# Both axes are described by one table, int32 [2, ROWS, length]: y, then x. Its rows, by what they
# are indexed with. A pixel:
LOWER = tl.constexpr(0)  # lower location that it is interpolated from
WEIGHT = tl.constexpr(1)  # weight of the upper one, the bits of a float32
FIRST = tl.constexpr(2)  # first and last window over it
LAST = tl.constexpr(3)
# A feature location:
NEAR_FIRST = tl.constexpr(4)  # first and last window near it; where none is: many, -1
NEAR_LAST = tl.constexpr(5)
CELL_PIECE_FIRST = tl.constexpr(6)  # first and last piece near it; where none is: 0, -1
CELL_PIECE_LAST = tl.constexpr(7)
CELL_STRIP_FIRST = tl.constexpr(8)  # first and last strip near it; where none is: 0, -1
CELL_STRIP_BEGIN = tl.constexpr(9)  # strips that have it as their lower location
CELL_STRIP_END = tl.constexpr(10)
# A strip, pixels with the same lower location and the same windows:
STRIP_BEGIN = tl.constexpr(11)
STRIP_END = tl.constexpr(12)
STRIP_FIRST = tl.constexpr(13)  # its first and last window
STRIP_LAST = tl.constexpr(14)
# A piece, pixels with the same windows:
PIECE_LOWER = tl.constexpr(15)  # its first and last location
PIECE_UPPER = tl.constexpr(16)
PIECE_FIRST = tl.constexpr(17)  # its first and last window
PIECE_LAST = tl.constexpr(18)
PIECE_STRIP_BEGIN = tl.constexpr(19)  # its strips
PIECE_STRIP_END = tl.constexpr(20)
# A window:
WINDOW_CELL_BEGIN = tl.constexpr(21)  # locations near it
WINDOW_CELL_END = tl.constexpr(22)
WINDOW_PIECE_FIRST = tl.constexpr(23)  # first and last piece in it
WINDOW_PIECE_LAST = tl.constexpr(24)
WINDOW_STRIP_FIRST = tl.constexpr(25)  # first and last strip in it
WINDOW_STRIP_LAST = tl.constexpr(26)
ROWS = tl.constexpr(27)

Y = tl.constexpr(0)
X = tl.constexpr(1)

NONE_NEAR = tl.constexpr(1 << 30)
EPS_SQUARE = tl.constexpr(1e-16)  # of `reference.EPS`


@triton.jit
def _look(axes, axis: tl.constexpr, row: tl.constexpr, index, mask, other=0):
    """An entry of the table; `axes` is (table, length)."""
    return tl.load(axes[0] + (axis * ROWS + row) * axes[1] + index, mask=mask, other=other)


@triton.jit
def _one(axes, axis: tl.constexpr, row: tl.constexpr, index):
    return tl.load(axes[0] + (axis * ROWS + row) * axes[1] + index)


@triton.jit
def _look_weight(axes, axis: tl.constexpr, index, mask):
    return _look(axes, axis, WEIGHT, index, mask).to(tl.float32, bitcast=True)


@triton.jit
def _wide(index, LONG: tl.constexpr):
    return index.to(tl.int64) if LONG else index


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
def _dot(a, b, acc, DOT: tl.constexpr):
    """``acc + a @ b`` in float32. Both are cut into parts that the tensor cores multiply exactly:
    float32 into two TF32 (22 bits), half types into two bfloat16 (16 bits; a bfloat16 is its own
    only part). The product of the low parts is below rounding.

    The products of one call are summed from zero. The tensor cores cut off what does not fit when
    they add, which over a long sum in them would become an error of many units in the last place.
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
    return acc + part


@triton.jit
def _inverse_length(square):
    """1 / sqrt(square), 0 below EPS. NaN stays NaN."""
    gone = square < EPS_SQUARE
    return tl.where(gone, 0.0, tl.rsqrt(tl.where(gone, 1.0, square)))


@triton.jit
def _block(block, blocks, length):
    """Begin and end of a block, where `length` is cut into `blocks` that differ by 1 at most."""
    return block * length // blocks, (block + 1) * length // blocks


@triton.jit
def _near(axes, axis: tl.constexpr, begin, end, SIZE: tl.constexpr):
    """First window near the locations begin <= i < end, and the number of windows."""
    i = begin + tl.arange(0, SIZE)
    first = tl.min(_look(axes, axis, NEAR_FIRST, i, i < end, NONE_NEAR), 0)
    last = tl.max(_look(axes, axis, NEAR_LAST, i, i < end, -1), 0)
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
def _window(n, first_y, first_x, windows_y, windows_x):
    """The n-th of the windows near a block: class, row and column."""
    nx = tl.maximum(windows_x, 1)
    ny = tl.maximum(windows_y, 1)
    return n // (ny * nx), first_y + n // nx % ny, first_x + n % nx


@triton.jit
def _there(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


# Matching, forward


@triton.jit
def _dots_chunk(
    features,
    cell,
    prototypes,
    row,
    D,
    masks,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GRAM: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Inner products of M locations with BN prototypes, over the prototypes' lengths; the squares
    of the locations, and their products with right, lower and diagonal neighbours.
    `masks` is (locations, with a right, with a lower neighbour, prototypes), EVEN whether BK
    divides D.
    """
    inside = masks[0]
    used = masks[3]
    acc = tl.zeros((M, BN), tl.float32)
    length = tl.zeros((BK, BN), tl.float32)
    own = tl.zeros((M, BK), tl.float32)
    across = tl.zeros((M, BK), tl.float32)
    down = tl.zeros((M, BK), tl.float32)
    diagonal = tl.zeros((M, BK), tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        there = (d < D) | EVEN
        at = features + (cell[:, None] + _wide(d, LONG)[None, :] * STRIDE_D)
        f = tl.load(at, mask=inside[:, None] & there[None, :], other=0.0)
        at_p = prototypes + (row[None, :] + d[:, None])
        p = tl.load(at_p, mask=there[:, None] & used[None, :], other=0.0)
        acc = _dot(f, p, acc, DOT)
        length += p * p
        if GRAM:
            f = f.to(tl.float32)
            own += f * f
            if BETWEEN:
                right = masks[1][:, None] & there[None, :]
                below = masks[2][:, None] & there[None, :]
                f_right = _there(at + STRIDE_W, right)
                f_below = _there(at + STRIDE_H, below)
                across += f * f_right
                down += f * f_below
                diagonal += f_right * f_below
                diagonal += f * _there(at + (STRIDE_H + STRIDE_W), right & below)
    acc *= _inverse_length(tl.sum(length, 0))[None, :]
    return acc, tl.sum(own, 1), tl.sum(across, 1), tl.sum(down, 1), tl.sum(diagonal, 1)


@triton.jit
def dots_kernel(
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    dots,
    gram,  # [B, Q, 4, h, w]: |F|^2; products with the right and the lower neighbour; diagonals
    table,
    length,
    Q,
    C,
    D,
    h,
    w,
    Gy,
    Gx,
    stride_b,
    stride_q,
    row_blocks,
    column_blocks,
    runs,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    NY: tl.constexpr,
    NX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RUN: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: up to BI x BJ locations, RUN times along a row, and all windows near them."""
    pid = tl.program_id(0)
    run = pid % runs
    row_block = pid // runs % row_blocks
    image = (pid // (runs * row_blocks)).to(tl.int64)
    axes = (table, length)
    cell = tl.arange(0, BI * BJ)

    i_begin, i_end = _block(row_block, row_blocks, h)
    y_first, y_windows = _near(axes, Y, i_begin, i_end, BI)
    i = i_begin + cell // BJ
    y_near_first = _look(axes, Y, NEAR_FIRST, i, i < i_end)
    y_near_last = _look(axes, Y, NEAR_LAST, i, i < i_end, -1)
    features += image // Q * stride_b + image % Q * stride_q
    prototypes += image // Q * (C * Gy * Gx) * D
    dots += image * (C * NY * NX) * h * w
    gram += image * 4 * h * w

    for block in range(run * RUN, tl.minimum(run * RUN + RUN, column_blocks)):
        j_begin, j_end = _block(block, column_blocks, w)
        x_first, x_windows = _near(axes, X, j_begin, j_end, BJ)
        j = j_begin + cell % BJ
        x_near_first = _look(axes, X, NEAR_FIRST, j, j < j_end)
        x_near_last = _look(axes, X, NEAR_LAST, j, j < j_end, -1)
        inside = (i < i_end) & (j < j_end)
        right = inside & (j + 1 < w)
        below = inside & (i + 1 < h)
        place = _wide(i, LONG) * STRIDE_H + _wide(j, LONG) * STRIDE_W
        at = i * w + j
        count = C * y_windows * x_windows
        for start in range(0, tl.maximum(count, 1), BN):
            n = start + tl.arange(0, BN)
            used = n < count
            c, my, mx = _window(n, y_first, x_first, y_windows, x_windows)
            row = _wide((c * Gy + my) * Gx + mx, LONG) * D
            masks = (inside, right, below, used)
            if start == 0:
                acc, own, across, down, diagonal = _dots_chunk(
                    features,
                    place,
                    prototypes,
                    row,
                    D,
                    masks,
                    STRIDE_D,
                    STRIDE_H,
                    STRIDE_W,
                    EVEN,
                    BI * BJ,
                    BN,
                    BK,
                    True,
                    BETWEEN,
                    LONG,
                    DOT,
                )
                tl.store(gram + at, own, mask=inside)
                tl.store(gram + h * w + at, across, mask=inside)
                tl.store(gram + 2 * h * w + at, down, mask=inside)
                tl.store(gram + 3 * h * w + at, diagonal, mask=inside)
            else:
                acc, own, across, down, diagonal = _dots_chunk(
                    features,
                    place,
                    prototypes,
                    row,
                    D,
                    masks,
                    STRIDE_D,
                    STRIDE_H,
                    STRIDE_W,
                    EVEN,
                    BI * BJ,
                    BN,
                    BK,
                    False,
                    False,
                    LONG,
                    DOT,
                )
            near_y = (my[None, :] >= y_near_first[:, None]) & (my[None, :] <= y_near_last[:, None])
            near_x = (mx[None, :] >= x_near_first[:, None]) & (mx[None, :] <= x_near_last[:, None])
            slot = _wide((c * NY + my % NY) * NX + mx % NX, LONG)
            tl.store(
                dots + slot[None, :] * (h * w) + at[:, None],
                acc,
                mask=near_y & near_x & inside[:, None] & used[None, :],
            )


@triton.jit
def _square_norm(gram, shape, i, j, wx, mask, below, BETWEEN: tl.constexpr):
    """|Up F|^2 between rows of locations i and i + 1: what the upper row, the lower row and the
    products between them give, each as interpolated along x from the locations j and j + 1.
    ``w^T G w`` with the four taps' weights w and Gram matrix G, from the maps of one image.
    `below` masks the lower row."""
    w = shape[1]
    size = shape[0] * w
    at = gram + i * w + j
    row = tl.load(at, mask=mask, other=0.0)
    next_row = tl.zeros_like(row)
    across = tl.zeros_like(row)
    if BETWEEN:
        right = mask & (wx > 0)
        square, up, product = (1 - wx) * (1 - wx), wx * wx, (1 - wx) * wx
        row = square * row + up * tl.load(at + 1, mask=right, other=0.0)
        row += 2 * product * tl.load(at + size, mask=right, other=0.0)
        next_row = square * tl.load(at + w, mask=below, other=0.0)
        next_row += up * tl.load(at + w + 1, mask=right & below, other=0.0)
        next_row += 2 * product * tl.load(at + size + w, mask=right & below, other=0.0)
        across = square * tl.load(at + 2 * size, mask=below, other=0.0)
        across += up * tl.load(at + 2 * size + 1, mask=right & below, other=0.0)
        across += product * tl.load(at + 3 * size, mask=right & below, other=0.0)
    return row, next_row, across


@triton.jit
def scores_kernel(
    dots,
    gram,
    scores,  # [B, Q, C, H, W]
    winners,  # the same, uint8 or int32
    table,
    logit_scale,
    length,
    C,
    H,
    W,
    h,
    w,
    strips,
    column_blocks,
    OX: tl.constexpr,
    NY: tl.constexpr,
    NX: tl.constexpr,
    T: tl.constexpr,
    BX: tl.constexpr,
    BETWEEN: tl.constexpr,
    MEAN: tl.constexpr,
    WINNERS: tl.constexpr,
    LONG: tl.constexpr,
):
    """One program: BX columns of a strip of up to T rows, all classes."""
    pid = tl.program_id(0)
    block = pid % column_blocks
    strip = pid // column_blocks % strips
    image = (pid // (column_blocks * strips)).to(tl.int64)
    axes = (table, length)

    x = block * BX + tl.arange(0, BX)
    x_in = x < W
    j = _look(axes, X, LOWER, x, x_in)
    wx = _look_weight(axes, X, x, x_in)
    x_first = _look(axes, X, FIRST, x, x_in)
    x_last = _look(axes, X, LAST, x, x_in, -1)
    begin = _one(axes, Y, STRIP_BEGIN, strip)
    end = _one(axes, Y, STRIP_END, strip)
    i = _one(axes, Y, LOWER, begin)
    y_first = _one(axes, Y, FIRST, begin)
    y_last = _one(axes, Y, LAST, begin)
    y = begin + tl.arange(0, T)
    wy = _look_weight(axes, Y, y, y < end)
    # Weights grow along a strip: where the last is 0, the next row of locations is not near.
    next_row = _one(axes, Y, WEIGHT, end - 1) != 0

    # What depends on columns alone is computed for both rows of locations, then for the T rows.
    at = gram + image * 4 * h * w
    row, row_below, across = _square_norm(at, (h, w), i, j, wx, x_in, x_in & next_row, BETWEEN)
    square = ((1 - wy) * (1 - wy))[:, None] * row[None, :]
    square += (wy * wy)[:, None] * row_below[None, :]
    square += (2 * (1 - wy) * wy)[:, None] * across[None, :]
    inverse = logit_scale * _inverse_length(square)
    if MEAN:
        inverse /= ((y_last - y_first + 1) * (x_last - x_first + 1)).to(tl.float32)[None, :]

    dots += image * (C * NY * NX) * h * w + i * w
    scores += image * C * H * W
    winners += image * C * H * W
    for c in range(C):
        best = tl.full((T, BX), 0.0 if MEAN else float("-inf"), tl.float32)
        place = tl.zeros((T, BX), tl.int32)
        for my in range(y_first, y_last + 1):
            for step in tl.range(0, OX, loop_unroll_factor=OX if OX <= 4 else 1):
                mx = x_first + step
                near = mx <= x_last
                right = near & (wx > 0)
                dot = dots + _wide((c * NY + my % NY) * NX + mx % NX, LONG) * (h * w) + j
                top = tl.load(dot, mask=near, other=0.0)
                top += wx * (tl.load(dot + 1, mask=right, other=0.0) - top)
                low = tl.load(dot + w, mask=near & next_row, other=0.0)
                low += wx * (tl.load(dot + w + 1, mask=right & next_row, other=0.0) - low)
                if MEAN:
                    best += top[None, :] + wy[:, None] * (low - top)[None, :]
                else:
                    # Strictly greater: of equal windows the lowest stays. NaN stays NaN.
                    slope = low - top
                    top = tl.where(near, top, float("-inf"))
                    value = top[None, :] + wy[:, None] * slope[None, :]
                    place = tl.where(value > best, (my - y_first) * OX + step, place)
                    best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        to = _wide(c * H + y, LONG)[:, None] * W + x[None, :]
        mask = (y < end)[:, None] & x_in[None, :]
        tl.store(scores + to, best * inverse, mask=mask)
        if WINNERS:
            tl.store(winners + to, place.to(winners.dtype.element_ty), mask=mask)


# From pixels to tiles


@triton.jit
def _columns(axes, block, strips, S: tl.constexpr, T: tl.constexpr):
    """The pixels of a block of strips, [S, T]: strips and which are real, pixels and which are
    real, their lower locations and the weights of the upper ones."""
    strip = block * S + tl.arange(0, S)
    there = strip < strips
    x = _look(axes, X, STRIP_BEGIN, strip, there)[:, None] + tl.arange(0, T)[None, :]
    mask = x < _look(axes, X, STRIP_END, strip, there)[:, None]
    return strip, there, x, mask, _look(axes, X, LOWER, x, mask), _look_weight(axes, X, x, mask)


@triton.jit
def _rows(axes, strip, T: tl.constexpr):
    """The pixels of a strip of rows, as [T, 1, 1], which of them are real, and the weights of the
    upper locations; whether any of these is not 0."""
    y = _one(axes, Y, STRIP_BEGIN, strip) + tl.arange(0, T)
    end = _one(axes, Y, STRIP_END, strip)
    mask = y < end
    weight = _look_weight(axes, Y, y, mask)
    # Weights grow along a strip: where the last is 0, the next row of locations is not near.
    next_row = _one(axes, Y, WEIGHT, end - 1) != 0
    return y[:, None, None], mask[:, None, None], weight[:, None, None], next_row


@triton.jit
def _strips_of(axes, piece, i):
    """Begin and end of the strips of a piece of rows that have location i as the lower one."""
    begin = tl.maximum(_one(axes, Y, CELL_STRIP_BEGIN, i), _one(axes, Y, PIECE_STRIP_BEGIN, piece))
    end = tl.minimum(_one(axes, Y, CELL_STRIP_END, i), _one(axes, Y, PIECE_STRIP_END, piece))
    return begin, end


@triton.jit
def _class_mask(masks, at, inside, c, C, plane, KIND: tl.constexpr):
    """Pixels of the mask of class c, 0 outside. `masks` is an image's; `plane` its pixels."""
    if KIND == "labels":
        label = tl.load(masks + at, mask=inside, other=0)
        return tl.where(inside & (label == c), 1.0, 0.0)
    elif KIND == "foreground":
        first = tl.maximum(c - 1, 0)
        last = tl.where(c == 0, C - 1, c)
        value = tl.zeros(at.shape, tl.float32)
        for k in range(first, last):
            here = masks + tl.cast(k, tl.int64) * plane
            value += tl.load(here + at, mask=inside, other=0).to(tl.float32)
        # What the foreground leaves. NaN stays NaN.
        rest = tl.where(value > 1, 0.0, 1 - value)
        return tl.where(inside, tl.where(c == 0, rest, value), 0.0)
    else:
        here = masks + tl.cast(c, tl.int64) * plane
        return tl.load(here + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def mask_tiles_kernel(
    masks,  # of one of `mask_kind`: uint8, float32 or (labels only) int64
    tiles,
    counts,  # [B, K, pieces, C, strips], the sum of the mask
    table,
    length,
    C,
    H,
    W,
    pieces,
    strips,
    R,
    blocks,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    LONG: tl.constexpr,
):
    """One program: a piece of rows and S strips of columns, one class."""
    pid = tl.program_id(0)
    c = pid // blocks % C
    piece = pid // (blocks * C) % pieces
    image = (pid // (blocks * C * pieces)).to(tl.int64)
    axes = (table, length)
    strip, there, x, x_in, _j, wx = _columns(axes, pid % blocks, strips, S, T_X)
    stored = 1 if KIND == "labels" else C - 1 if KIND == "foreground" else C
    plane = tl.cast(H, tl.int64) * W
    masks += image * stored * plane
    record = (image * pieces + piece) * C + c
    tiles += record * (2 * R * strips)
    lower = _one(axes, Y, PIECE_LOWER, piece)
    upper = _one(axes, Y, PIECE_UPPER, piece)
    carry = tl.zeros((S, T_X), tl.float32)
    count = tl.zeros((S, T_X), tl.float32)
    for i in range(lower, upper + 1):
        here = carry
        carry = tl.zeros((S, T_X), tl.float32)
        begin, end = _strips_of(axes, piece, i)
        for rows in range(begin, end):
            y, y_in, wy, _next_row = _rows(axes, rows, T_Y)
            at = _wide(y, LONG) * W + x[None, :, :]
            value = _class_mask(masks, at, y_in & x_in[None, :, :], c, C, plane, KIND)
            total = tl.sum(value, 0)
            high = tl.sum(value * wy, 0)
            count += total
            here += total - high
            carry += high
        to = tiles + (i - lower) * strips + strip
        tl.store(to, tl.sum(here * (1 - wx), 1), mask=there)
        tl.store(to + R * strips, tl.sum(here * wx, 1), mask=there)
    tl.store(counts + record * strips + strip, tl.sum(count, 1), mask=there)


@triton.jit
def _lengths(prototypes, inverse_lengths, first, rows, D):
    """1 / |p| of 16 prototypes."""
    row = first + tl.arange(0, 16)
    at = prototypes + row.to(tl.int64)[:, None] * D
    total = tl.zeros((16, 64), tl.float32)
    for start in range(0, D, 64):
        d = start + tl.arange(0, 64)
        p = tl.load(at + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
        total += p * p
    tl.store(inverse_lengths + row, _inverse_length(tl.sum(total, 1)), mask=row < rows)


@triton.jit
def _inverse_norm(gram, shape, i, j, wy, wx, x_in, next_row, BETWEEN: tl.constexpr):
    """1 / |Up F| of pixels [T_Y, S, T_X] that have row i as their lower one."""
    row, row_below, across = _square_norm(gram, shape, i, j, wx, x_in, x_in & next_row, BETWEEN)
    square = (1 - wy) * (1 - wy) * row[None, :, :] + wy * wy * row_below[None, :, :]
    square += 2 * (1 - wy) * wy * across[None, :, :]
    return _inverse_length(square)


@triton.jit
def _match_weights(
    pixels,
    tiles,
    axes,
    shape,
    gram,
    c,
    first_place,
    piece,
    columns,
    logit_scale,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    S: tl.constexpr,
    PLACES: tl.constexpr,
    P: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
):
    """`logit_scale` times the sums of dS / |Up F| of a class, for PLACES places of the winning
    window; or of all pixels alike and divided by the number of windows over them, where PLACES is 0
    (the mean)."""
    grad, winners = pixels[0], pixels[2]
    H, W, h, w, R, strips = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    strip, there, x, x_in, j, wx = columns
    N: tl.constexpr = PLACES if PLACES > 0 else 1
    place = tl.arange(0, N)
    if PLACES == 0:
        windows = _look(axes, X, LAST, x, x_in) - _look(axes, X, FIRST, x, x_in) + 1
        windows *= _one(axes, Y, PIECE_LAST, piece) - _one(axes, Y, PIECE_FIRST, piece) + 1
    lower = _one(axes, Y, PIECE_LOWER, piece)
    upper = _one(axes, Y, PIECE_UPPER, piece)
    carry = tl.zeros((N, S, T_X), tl.float32)
    for i in range(lower, upper + 1):
        here = carry
        carry = tl.zeros((N, S, T_X), tl.float32)
        begin, end = _strips_of(axes, piece, i)
        for rows in range(begin, end):
            y, y_in, wy, next_row = _rows(axes, rows, T_Y)
            at = _wide(c * H + y, LONG) * W + x[None, :, :]
            mask = y_in & x_in[None, :, :]
            g = tl.load(grad + at, mask=mask, other=0.0)
            g *= _inverse_norm(gram, (h, w), i, j, wy, wx, x_in, next_row, BETWEEN)
            if PLACES == 0:
                g /= windows.to(tl.float32)[None, :, :]
                total = tl.sum(g, 0)[None, :, :]
                high = tl.sum(g * wy, 0)[None, :, :]
            else:
                won = tl.load(winners + at, mask=mask, other=0).to(tl.int32) - first_place
                won = won[None, :, :, :] == place[:, None, None, None]
                won = tl.where(won, g[None, :, :, :], 0.0)
                total = tl.sum(won, 1)
                high = tl.sum(won * wy[None, :, :, :], 1)
            here += total - high
            carry += high
        to = tiles + (i - lower) * strips + strip[None, :]
        to += _wide(c * P + first_place + place, LONG)[:, None] * (2 * R * strips)
        mask = there[None, :] & (first_place + place < P)[:, None]
        tl.store(to, logit_scale * tl.sum(here * (1 - wx)[None, :, :], 2), mask=mask)
        tl.store(to + R * strips, logit_scale * tl.sum(here * wx[None, :, :], 2), mask=mask)


@triton.jit
def _match_gram(
    pixels,
    tiles,
    axes,
    shape,
    gram,
    C,
    piece,
    columns,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    S: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
):
    """The derivatives by the Gram maps. S = <Up F, q> / |Up F|, hence
    d|Up F|^2 = -1/2 sum_c dS S / |Up F|^2."""
    grad, scores = pixels[0], pixels[1]
    H, W, h, w, R, strips = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    strip, there, x, x_in, j, wx = columns
    lower = _one(axes, Y, PIECE_LOWER, piece)
    upper = _one(axes, Y, PIECE_UPPER, piece)
    carry = tl.zeros((S, T_X), tl.float32)
    for i in range(lower, upper + 1):
        here = carry
        carry = tl.zeros((S, T_X), tl.float32)
        across = tl.zeros((S, T_X), tl.float32)
        begin, end = _strips_of(axes, piece, i)
        for rows in range(begin, end):
            y, y_in, wy, next_row = _rows(axes, rows, T_Y)
            mask = y_in & x_in[None, :, :]
            radial = tl.zeros((T_Y, S, T_X), tl.float32)
            for c in range(C):
                at = _wide(c * H + y, LONG) * W + x[None, :, :]
                g = tl.load(grad + at, mask=mask, other=0.0)
                radial += g * tl.load(scores + at, mask=mask, other=0.0)
            inverse = _inverse_norm(gram, (h, w), i, j, wy, wx, x_in, next_row, BETWEEN)
            radial *= -0.5 * inverse * inverse
            here += tl.sum(radial * ((1 - wy) * (1 - wy)), 0)
            carry += tl.sum(radial * (wy * wy), 0)
            across += tl.sum(radial * (2 * (1 - wy) * wy), 0)
        to = tiles + (i - lower) * strips + strip
        block = 2 * R * strips
        tl.store(to, tl.sum(here * (1 - wx) * (1 - wx), 1), mask=there)
        tl.store(to + R * strips, tl.sum(here * wx * wx, 1), mask=there)
        if BETWEEN:
            cross = 2 * (1 - wx) * wx
            tl.store(to + block, tl.sum(here * cross, 1), mask=there)
            tl.store(to + block + R * strips, tl.sum(0.5 * across * cross, 1), mask=there)
            tl.store(to + 2 * block, tl.sum(across * (1 - wx) * (1 - wx), 1), mask=there)
            tl.store(to + 2 * block + R * strips, tl.sum(across * wx * wx, 1), mask=there)


@triton.jit
def match_tiles_kernel(
    grad,  # [B, Q, C, H, W]
    scores,
    winners,
    gram,
    prototypes,
    inverse_lengths,  # [B, C, Gy, Gx]: 1 / |p|
    tiles,
    table,
    logit_scale,
    length,
    C,
    D,
    H,
    W,
    h,
    w,
    pieces,
    strips,
    R,
    blocks,
    rows,
    row_programs,
    roles,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    S: tl.constexpr,
    PLACES: tl.constexpr,
    P: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
):
    """One program: a piece of rows and S strips of columns, and one of the roles: the Gram maps,
    or a class and PLACES of its P places. The first `row_programs` take the lengths of 16
    prototypes each instead."""
    pid = tl.program_id(0)
    axes = (table, length)
    if pid < row_programs:
        _lengths(prototypes, inverse_lengths, pid * 16, rows, D)
    else:
        pid -= row_programs
        role = pid // blocks % roles
        piece = pid // (blocks * roles) % pieces
        image = (pid // (blocks * roles * pieces)).to(tl.int64)
        columns = _columns(axes, pid % blocks, strips, S, T_X)
        record = (image * pieces + piece) * (C * P + 3)
        size = 2 * R * strips
        pixels = image * C * H * W
        shape = (H, W, h, w, R, strips)
        at = (grad + pixels, scores + pixels, winners + pixels)
        if role == 0:
            _match_gram(
                at,
                tiles + (record + C * P) * size,
                axes,
                shape,
                gram + image * 4 * h * w,
                C,
                piece,
                columns,
                T_Y,
                T_X,
                S,
                BETWEEN,
                LONG,
            )
        else:
            chunks = (roles - 1) // C
            _match_weights(
                at,
                tiles + record * size,
                axes,
                shape,
                gram + image * 4 * h * w,
                (role - 1) // chunks,
                (role - 1) % chunks * PLACES,
                piece,
                columns,
                logit_scale,
                T_Y,
                T_X,
                S,
                PLACES,
                P,
                BETWEEN,
                LONG,
            )


# From tiles to locations and windows


@triton.jit
def _piece_near(axes, i, number, mask):
    """Of the pieces of rows near a location the one of this number: which it is, the location's
    row in its tiles, and whether there is one."""
    piece = _look(axes, Y, CELL_PIECE_FIRST, i, mask) + number
    mask = mask & (piece <= _look(axes, Y, CELL_PIECE_LAST, i, mask, -1))
    return piece, i - _look(axes, Y, PIECE_LOWER, piece, mask), mask


@triton.jit
def _strip_near(axes, j, number, mask):
    """Of the strips of columns near a location the one of this number: which it is, whether the
    location is the right one of the two under it, and whether there is one."""
    strip = _look(axes, X, CELL_STRIP_FIRST, j, mask) + number
    mask = mask & (strip < _look(axes, X, CELL_STRIP_END, j, mask))
    return strip, strip < _look(axes, X, CELL_STRIP_BEGIN, j, mask), mask


@triton.jit
def _tile_weights(
    axes,
    tiles,
    block,
    cell,
    window,
    numbers,
    used,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
):
    """What one tile near each location adds to `_weights`."""
    my, mx = window[0], window[1]
    piece, row, in_y = _piece_near(axes, cell[0], numbers[0], cell[2])
    strip, right, in_x = _strip_near(axes, cell[1], numbers[1], cell[2])
    inside = in_y & in_x
    first_y = _look(axes, Y, PIECE_FIRST, piece, inside)
    last_y = _look(axes, Y, PIECE_LAST, piece, inside, -1)
    first_x = _look(axes, X, STRIP_FIRST, strip, inside)
    last_x = _look(axes, X, STRIP_LAST, strip, inside, -1)
    size = 2 * tiles[2] * tiles[3]
    from_cell = _wide(piece * tiles[1], LONG) * size
    from_cell += (right.to(tl.int32) * tiles[2] + row) * tiles[3] + strip
    from_window = _wide(block, LONG) * size
    if PLACES:
        from_cell -= (first_y * OX + first_x) * size
        from_window += (my * OX + mx) * size
    mask = (my[:, None] >= first_y[None, :]) & (my[:, None] <= last_y[None, :])
    mask &= (mx[:, None] >= first_x[None, :]) & (mx[:, None] <= last_x[None, :])
    mask &= inside[None, :] & used[:, None]
    at = from_cell[None, :] + from_window[:, None]
    return tl.load(tiles[0] + at, mask=mask, other=0.0)


@triton.jit
def _weights(
    axes,
    tiles,
    block,
    cell,
    window,
    used,
    M: tl.constexpr,
    BN: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
):
    """Weights of M locations for BN windows, [BN, M], summed over the tiles that are near the one
    and in the other.

    `tiles` is (those of an image, blocks of a piece, R, strips); `block` the first block of each
    window's class; `cell` (i, j, which are real), `window` (my, mx), `used` which are real.
    A location is near no more than REACH_Y pieces and REACH_X strips.
    """
    total = tl.zeros((BN, M), tl.float32)
    for a in tl.range(0, REACH_Y, loop_unroll_factor=1):
        for b in tl.range(0, REACH_X, loop_unroll_factor=REACH_X if REACH_X <= 4 else 1):
            total += _tile_weights(axes, tiles, block, cell, window, (a, b), used, OX, PLACES, LONG)
    return total


@triton.jit
def _window_counts(
    axes,
    counts,
    pieces,
    strips,
    C,
    c,
    window,
    used,
    PIECES: tl.constexpr,
    STRIPS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Sums of the mask over windows, of up to PIECES pieces and STRIPS strips each."""
    my, mx = window[0], window[1]
    first_y = _look(axes, Y, WINDOW_PIECE_FIRST, my, used)
    last_y = _look(axes, Y, WINDOW_PIECE_LAST, my, used, -1)
    first_x = _look(axes, X, WINDOW_STRIP_FIRST, mx, used)
    last_x = _look(axes, X, WINDOW_STRIP_LAST, mx, used, -1)
    strip = first_x[:, None] + tl.arange(0, STRIPS)[None, :]
    in_x = used[:, None] & (strip <= last_x[:, None])
    total = tl.zeros(strip.shape, tl.float32)
    for a in range(PIECES):
        piece = first_y + a
        in_y = piece <= last_y
        at = _wide(piece * C + c, LONG)[:, None] * strips + strip
        total += tl.load(counts + at, mask=in_x & in_y[:, None], other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _gather(
    axes,
    tiles,
    block,
    window,
    used,
    region,
    features,
    strides,
    d,
    D,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums over the locations of a region, of weight times F: [BN, BD]."""
    cell = tl.arange(0, BI * BJ)
    acc = tl.zeros((BN, BD), tl.float32)
    for i_begin in range(region[0], region[1], BI):
        i = i_begin + cell // BJ
        for j_begin in range(region[2], region[3], BJ):
            j = j_begin + cell % BJ
            inside = (i < region[1]) & (j < region[3])
            weight = _weights(
                axes,
                tiles,
                block,
                (i, j, inside),
                window,
                used,
                BI * BJ,
                BN,
                REACH_Y,
                REACH_X,
                OX,
                PLACES,
                LONG,
            )
            at = _wide(i, LONG) * strides[1] + _wide(j, LONG) * strides[2]
            f = tl.load(
                features + (at[:, None] + _wide(d, LONG)[None, :] * strides[0]),
                mask=inside[:, None] & (d < D)[None, :],
                other=0.0,
            )
            acc = _dot(weight, f, acc, DOT)
    return acc


@triton.jit
def _group(
    axes, pid, groups_x, groups_y, C, Gy, Gx, GY: tl.constexpr, GX: tl.constexpr, BN: tl.constexpr
):
    """A group of GY x GX windows and BN / (GY GX) classes: class, window, which are real, and the
    region of locations near them."""
    n = tl.arange(0, BN)
    top = pid // groups_x % groups_y * GY
    left = pid % groups_x * GX
    c = pid // (groups_x * groups_y) * (BN // (GY * GX)) + n // (GY * GX)
    my = top + n // GX % GY
    mx = left + n % GX
    used = (c < C) & (my < Gy) & (mx < Gx)
    region = (
        _one(axes, Y, WINDOW_CELL_BEGIN, top),
        _one(axes, Y, WINDOW_CELL_END, tl.minimum(top + GY, Gy) - 1),
        _one(axes, X, WINDOW_CELL_BEGIN, left),
        _one(axes, X, WINDOW_CELL_END, tl.minimum(left + GX, Gx) - 1),
    )
    return c, my, mx, used, region


@triton.jit
def pool_kernel(
    tiles,
    counts,
    features,  # [B, K, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D], or a part of it for each of `splits` parts of K
    factors,  # [B, K, C, Gy, Gx]
    table,
    length,
    min_pixels,
    B,
    K,
    C,
    D,
    Gy,
    Gx,
    stride_b,
    stride_k,
    stride_d,
    stride_h,
    stride_w,
    pieces,
    strips,
    R,
    groups_y,
    groups_x,
    group_programs,
    d_blocks,
    splits,
    GY: tl.constexpr,
    GX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    PIECES: tl.constexpr,
    STRIPS: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: a group of windows, BD channels, the support images of one split of K."""
    pid = tl.program_id(0)
    d_block = pid % d_blocks
    group = pid // d_blocks % group_programs
    b = (pid // (d_blocks * group_programs) % B).to(tl.int64)
    split = pid // (d_blocks * group_programs * B)
    axes = (table, length)
    c, my, mx, used, region = _group(axes, group, groups_x, groups_y, C, Gy, Gx, GY, GX, BN)
    row = _wide((c * Gy + my) * Gx + mx, LONG)
    d = d_block * BD + tl.arange(0, BD)
    acc = tl.zeros((BN, BD), tl.float32)
    first, last = _block(split, splits, K)
    for k in range(first, last):
        image = b * K + k
        records = (tiles + image * pieces * C * (2 * R * strips), C, R, strips)
        pixels = _window_counts(
            axes,
            counts + image * pieces * C * strips,
            pieces,
            strips,
            C,
            c,
            (my, mx),
            used,
            PIECES,
            STRIPS,
            LONG,
        )
        enough = pixels > min_pixels
        factor = tl.where(enough, 1 / (K * tl.where(enough, pixels, 1.0)), 0.0)
        if d_block == 0:
            tl.store(factors + image * C * Gy * Gx + row, factor, mask=used)
        part = _gather(
            axes,
            records,
            c,
            (my, mx),
            used,
            region,
            features + b * stride_b + (image - b * K) * stride_k,
            (stride_d, stride_h, stride_w),
            d,
            D,
            BI,
            BJ,
            BN,
            BD,
            REACH_Y,
            REACH_X,
            1,
            False,
            LONG,
            DOT,
        )
        # Not `part * factor`: where too few pixels are in a window, NaN under others must not show.
        acc += tl.where(enough[:, None], part * factor[:, None], 0.0)
    to = prototypes + (split * B + b) * (C * Gy * Gx) * D
    tl.store(to + row[:, None] * D + d[None, :], acc, mask=used[:, None] & (d < D)[None, :])


@triton.jit
def _scatter(
    axes,
    tiles,
    vectors,
    coefficients,
    shape,
    row_block,
    row_blocks,
    column_block,
    column_blocks,
    features,
    to,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TO_STRIDE_D: tl.constexpr,
    TO_STRIDE_H: tl.constexpr,
    TO_STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    GRAM: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """The gradient of a block of locations: sums over the windows near it, of weight times
    coefficient times vector; with GRAM, the Gram maps' part as well.

    `shape` is (C, D, h, w, Gy, Gx), `vectors` [C, Gy, Gx, D] and `coefficients` [C, Gy, Gx].
    """
    R, strips = tiles[2], tiles[3]
    C, D, h, w, Gy, Gx = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    cell = tl.arange(0, BI * BJ)
    i_begin, i_end = _block(row_block, row_blocks, h)
    j_begin, j_end = _block(column_block, column_blocks, w)
    y_first, y_windows = _near(axes, Y, i_begin, i_end, BI)
    x_first, x_windows = _near(axes, X, j_begin, j_end, BJ)
    i = i_begin + cell // BJ
    j = j_begin + cell % BJ
    inside = (i < i_end) & (j < j_end)
    count = C * y_windows * x_windows
    i_wide = _wide(i, LONG)
    j_wide = _wide(j, LONG)
    at = i_wide * STRIDE_H + j_wide * STRIDE_W
    to_at = i_wide * TO_STRIDE_H + j_wide * TO_STRIDE_W

    if GRAM:
        # Each product of neighbours has two sides, and the map of the diagonals holds both
        # diagonals of a cell, at its upper left corner.
        own = tl.zeros((BI * BJ,), tl.float32)
        to_right, to_left, to_below, to_above = own, own, own, own
        lower_right, lower_left, upper_right, upper_left = own, own, own, own
        size = 2 * R * strips
        for a in tl.range(0, REACH_Y, loop_unroll_factor=1):
            piece, row, in_y = _piece_near(axes, i, a, inside)
            at_piece = tiles[0] + (_wide(piece * tiles[1], LONG) + C * P) * size + row * strips
            for b in tl.range(0, REACH_X, loop_unroll_factor=REACH_X if REACH_X <= 4 else 1):
                strip, right, in_x = _strip_near(axes, j, b, inside)
                here = in_y & in_x
                tile = at_piece + strip
                side = tile + right.to(tl.int32) * (R * strips)
                own += 2 * tl.load(side, mask=here, other=0.0)
                if BETWEEN:
                    # Strips to the left stand between this location and the left one.
                    above = here & (row > 0)
                    value = tl.load(tile + size, mask=here, other=0.0)
                    to_left += tl.where(right, value, 0.0)
                    to_right += tl.where(right, 0.0, value)
                    value = tl.load(tile + size + R * strips, mask=here, other=0.0)
                    lower_left += tl.where(right, value, 0.0)
                    lower_right += tl.where(right, 0.0, value)
                    value = tl.load(tile + size + R * strips - strips, mask=above, other=0.0)
                    upper_left += tl.where(right, value, 0.0)
                    upper_right += tl.where(right, 0.0, value)
                    to_below += tl.load(side + 2 * size, mask=here, other=0.0)
                    to_above += tl.load(side + 2 * size - strips, mask=above, other=0.0)
        up = inside & (i > 0)
        left = inside & (j > 0)
        down = inside & (i + 1 < h)
        right = inside & (j + 1 < w)

    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        there = ((d < D) | EVEN)[None, :]
        acc = tl.zeros((BI * BJ, BD), tl.float32)
        for first in range(0, count, BN):
            n = first + tl.arange(0, BN)
            used = n < count
            c, my, mx = _window(n, y_first, x_first, y_windows, x_windows)
            window = _wide((c * Gy + my) * Gx + mx, LONG)
            weight = _weights(
                axes,
                tiles,
                c * P,
                (i, j, inside),
                (my, mx),
                used,
                BI * BJ,
                BN,
                REACH_Y,
                REACH_X,
                OX,
                PLACES,
                LONG,
            )
            weight *= tl.load(coefficients + window, mask=used, other=0.0)[:, None]
            vector = tl.load(
                vectors + window[:, None] * D + d[None, :], mask=used[:, None] & there, other=0.0
            )
            acc = _dot(tl.trans(weight), vector, acc, DOT)
        if GRAM:
            f = features + (at[:, None] + _wide(d, LONG)[None, :] * STRIDE_D)
            ring = own[:, None] * _there(f, inside[:, None] & there)
            if BETWEEN:
                mask = down[:, None] & there
                ring += to_right[:, None] * _there(f + STRIDE_W, right[:, None] & there)
                ring += to_left[:, None] * _there(f - STRIDE_W, left[:, None] & there)
                ring += to_below[:, None] * _there(f + STRIDE_H, mask)
                at_d = f + (STRIDE_H + STRIDE_W)
                ring += lower_right[:, None] * _there(at_d, mask & right[:, None])
                at_d = f + (STRIDE_H - STRIDE_W)
                ring += lower_left[:, None] * _there(at_d, mask & left[:, None])
                mask = up[:, None] & there
                ring += to_above[:, None] * _there(f - STRIDE_H, mask)
                at_d = f - (STRIDE_H - STRIDE_W)
                ring += upper_right[:, None] * _there(at_d, mask & right[:, None])
                at_d = f - (STRIDE_H + STRIDE_W)
                ring += upper_left[:, None] * _there(at_d, mask & left[:, None])
            acc += ring  # apart until here: acc lies in registers as the dot has it
        tl.store(
            to + (to_at[:, None] + _wide(d, LONG)[None, :] * TO_STRIDE_D),
            acc.to(to.dtype.element_ty),
            mask=inside[:, None] & there,
        )


@triton.jit
def pool_back_kernel(
    tiles,
    grad,  # [B, C, Gy, Gx, D]
    factors,  # [B, K, C, Gy, Gx]
    to,  # gradient of the features, [B, K, D, h, w], any strides
    table,
    length,
    K,
    C,
    D,
    h,
    w,
    Gy,
    Gx,
    stride_b,
    stride_k,
    pieces,
    strips,
    R,
    row_blocks,
    column_blocks,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: up to BI x BJ locations, all channels."""
    pid = tl.program_id(0)
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    windows = C * Gy * Gx
    to += image // K * stride_b + image % K * stride_k
    _scatter(
        (table, length),
        (tiles + image * pieces * C * (2 * R * strips), C, R, strips),
        grad + image // K * windows * D,
        factors + image * windows,
        (C, D, h, w, Gy, Gx),
        pid // column_blocks % row_blocks,
        row_blocks,
        pid % column_blocks,
        column_blocks,
        to,
        to,
        STRIDE_D,
        STRIDE_H,
        STRIDE_W,
        STRIDE_D,
        STRIDE_H,
        STRIDE_W,
        EVEN,
        1,
        BI,
        BJ,
        BN,
        BD,
        REACH_Y,
        REACH_X,
        1,
        False,
        False,
        False,
        LONG,
        DOT,
    )


@triton.jit
def match_back_kernel(
    tiles,
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    inverse_lengths,  # [B, C, Gy, Gx]
    to,  # gradient of the features, any strides
    to_prototypes,  # gradient of the prototypes, or a part of it for each of `splits` parts of Q
    table,
    length,
    B,
    Q,
    C,
    D,
    h,
    w,
    Gy,
    Gx,
    stride_b,
    stride_q,
    to_stride_b,
    to_stride_q,
    pieces,
    strips,
    R,
    groups_y,
    groups_x,
    group_programs,
    splits,
    row_blocks,
    column_blocks,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TO_STRIDE_D: tl.constexpr,
    TO_STRIDE_H: tl.constexpr,
    TO_STRIDE_W: tl.constexpr,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    OX: tl.constexpr,
    GY: tl.constexpr,
    GX: tl.constexpr,
    GATHER_BN: tl.constexpr,
    GATHER_BD: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    BETWEEN: tl.constexpr,
    PLACES: tl.constexpr,
    WHOLE: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of each episode, first the programs for its prototypes, a group of windows each; then those
    for its features, up to BI x BJ locations each. All channels."""
    pid = tl.program_id(0)
    axes = (table, length)
    windows = C * Gy * Gx
    records = pieces * (C * P + 3)
    size = 2 * R * strips
    gathers = group_programs * splits
    blocks = row_blocks * column_blocks
    b = (pid // (gathers + Q * blocks)).to(tl.int64)
    pid = pid % (gathers + Q * blocks)
    if pid >= gathers:
        pid -= gathers
        q = (pid // blocks).to(tl.int64)
        _scatter(
            axes,
            (tiles + (b * Q + q) * records * size, C * P + 3, R, strips),
            prototypes + b * windows * D,
            inverse_lengths + b * windows,
            (C, D, h, w, Gy, Gx),
            pid // column_blocks % row_blocks,
            row_blocks,
            pid % column_blocks,
            column_blocks,
            features + b * stride_b + q * stride_q,
            to + b * to_stride_b + q * to_stride_q,
            STRIDE_D,
            STRIDE_H,
            STRIDE_W,
            TO_STRIDE_D,
            TO_STRIDE_H,
            TO_STRIDE_W,
            EVEN,
            P,
            BI,
            BJ,
            BN,
            BD,
            REACH_Y,
            REACH_X,
            OX,
            PLACES,
            True,
            BETWEEN,
            LONG,
            DOT,
        )
    else:
        group = pid % group_programs
        split = pid // group_programs
        c, my, mx, used, region = _group(
            axes, group, groups_x, groups_y, C, Gy, Gx, GY, GX, GATHER_BN
        )
        row = _wide((c * Gy + my) * Gx + mx, LONG)
        inverse = tl.load(inverse_lengths + b * windows + row, mask=used, other=0.0)
        first, last = _block(split, splits, Q)
        prototypes += b * windows * D
        to_prototypes += (split * B + b) * windows * D
        # dp = (dq - <q, dq> q) / |p| asks for all channels before any can be written: where they
        # are not WHOLE in a block, a first turn takes <q, dq> alone.
        along = tl.zeros((GATHER_BN,), tl.float32)
        for turn in range(1 if WHOLE else 0, 2):
            for start in range(0, GATHER_BD if WHOLE else D, GATHER_BD):
                d = start + tl.arange(0, GATHER_BD)
                acc = tl.zeros((GATHER_BN, GATHER_BD), tl.float32)
                for q in range(first, last):
                    image = b * Q + q
                    acc += _gather(
                        axes,
                        (tiles + image * records * size, C * P + 3, R, strips),
                        c * P,
                        (my, mx),
                        used,
                        region,
                        features + b * stride_b + (image - b * Q) * stride_q,
                        (STRIDE_D, STRIDE_H, STRIDE_W),
                        d,
                        D,
                        BI,
                        BJ,
                        GATHER_BN,
                        GATHER_BD,
                        REACH_Y,
                        REACH_X,
                        OX,
                        PLACES,
                        LONG,
                        DOT,
                    )
                mask = used[:, None] & (d < D)[None, :]
                at = row[:, None] * D + d[None, :]
                p = tl.load(prototypes + at, mask=mask, other=0.0)
                direction = p * inverse[:, None]
                if WHOLE or turn == 0:
                    along += tl.sum(acc * direction, 1)
                if turn == 1:
                    value = (acc - along[:, None] * direction) * inverse[:, None]
                    tl.store(to_prototypes + at, value, mask=mask)
