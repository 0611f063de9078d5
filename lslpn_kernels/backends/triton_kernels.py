"""The Triton kernels of the head; `triton_` launches them.

Nothing is ever interpolated to image resolution but classes. Two things are exchanged between
feature locations (D channels, read in matrix products) and pixels (C classes):

    dots   [image, C, NY, NX, h, w]: <F(i, j), q_{c,m}> for the windows m near a location, those
           over a pixel that is interpolated from it. Window (my, mx) is at (my % NY, mx % NX).
    tiles  one record for each tile of an image, the crossing of two `pieces`: pixels in the same
           windows that are interpolated from at most 16 x 16 locations. It holds what the pixels
           of the tile add to their locations, as blocks of RY x RX numbers:
             [C, P, RY, RX]  weights, for each class and each of the P places that a window can
                             have among those over the tile (P = 1 where all get the same)
             [4, RY, RX]     derivatives by the Gram maps (matching only)
             [C, P]          a sum over the pixels (see the kernels)

    dots_kernel         F, p      -> dots, Gram maps       matching, forward
    scores_kernel       dots      -> scores, winners
    match_tiles_kernel  dS        -> tiles                 matching, backward
    match_back_kernel   tiles, F  -> dF, dp
    mask_tiles_kernel   masks     -> tiles                 pooling, forward and backward
    pool_kernel         tiles, F  -> prototypes
    pool_back_kernel    tiles, dp -> dF

Every sum is taken by one program in a fixed order; there are no atomics. Letters beyond the
usual ones: M locations of a block, N windows (times classes) of a block, P places, R locations
and T pixels of a piece. `LONG` says that offsets within an image need 64 bits.
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
# A strip, pixels with the same lower location and the same windows:
STRIP_BEGIN = tl.constexpr(8)
STRIP_END = tl.constexpr(9)
# A piece, pixels with the same windows:
PIECE_BEGIN = tl.constexpr(10)
PIECE_END = tl.constexpr(11)
PIECE_LOWER = tl.constexpr(12)  # its first location
PIECE_FIRST = tl.constexpr(13)  # its first and last window
PIECE_LAST = tl.constexpr(14)
# A window:
WINDOW_CELL_BEGIN = tl.constexpr(15)  # locations near it
WINDOW_CELL_END = tl.constexpr(16)
WINDOW_PIECE_FIRST = tl.constexpr(17)  # pieces in it
WINDOW_PIECE_LAST = tl.constexpr(18)
ROWS = tl.constexpr(19)

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
def _dot(a, b, acc, DOT: tl.constexpr):
    """``acc + a @ b`` in float32. Products of float32 take three of TF32, good to 2^-21; those of
    half types take bfloat16 parts that add up to 16 bits (a bfloat16 is its own only part).
    """
    if DOT == "ieee":  # for the interpreter, whose bfloat16 products are wrong
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif DOT == "tf32x3":
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        if a.dtype != tl.bfloat16:
            a_low = (a.to(tl.float32) - a_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a_low, b_high, acc)
        if b.dtype != tl.bfloat16:
            b_low = (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    return acc


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


# Matching, forward


@triton.jit
def _dots_chunk(
    feature,
    strides,
    prototype,
    D,
    masks,
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
    `strides` is (d, h, w), `masks` (locations, with a right, with a lower neighbour, prototypes).
    """
    inside = masks[0]
    used = masks[3]
    acc = tl.zeros((M, BN), tl.float32)
    length = tl.zeros((BK, BN), tl.float32)
    own = tl.zeros((M, BK), tl.float32)
    row = tl.zeros((M, BK), tl.float32)
    column = tl.zeros((M, BK), tl.float32)
    diagonal = tl.zeros((M, BK), tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        there = d < D
        at = feature[:, None] + _wide(d, LONG)[None, :] * strides[0]
        f = tl.load(at, mask=inside[:, None] & there[None, :], other=0.0)
        p = tl.load(prototype[None, :] + d[:, None], mask=there[:, None] & used[None, :], other=0.0)
        acc = _dot(f, p, acc, DOT)
        length += p * p
        if GRAM:
            f = f.to(tl.float32)
            own += f * f
            if BETWEEN:
                right = masks[1][:, None] & there[None, :]
                below = masks[2][:, None] & there[None, :]
                f_right = tl.load(at + strides[2], mask=right, other=0.0).to(tl.float32)
                f_below = tl.load(at + strides[1], mask=below, other=0.0).to(tl.float32)
                f_both = tl.load(at + strides[1] + strides[2], mask=right & below, other=0.0)
                row += f * f_right
                column += f * f_below
                diagonal += f * f_both.to(tl.float32) + f_right * f_below
    acc *= _inverse_length(tl.sum(length, 0))[None, :]
    return acc, tl.sum(own, 1), tl.sum(row, 1), tl.sum(column, 1), tl.sum(diagonal, 1)


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
    stride_d,
    stride_h,
    stride_w,
    row_blocks,
    column_blocks,
    runs,
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
    strides = (stride_d, stride_h, stride_w)
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
        feature = features + _wide(i, LONG) * stride_h + _wide(j, LONG) * stride_w
        at = i * w + j
        count = C * y_windows * x_windows
        for start in range(0, tl.maximum(count, 1), BN):
            n = start + tl.arange(0, BN)
            used = n < count
            c, my, mx = _window(n, y_first, x_first, y_windows, x_windows)
            prototype = prototypes + _wide((c * Gy + my) * Gx + mx, LONG) * D
            masks = (inside, right, below, used)
            if start == 0:
                acc, own, across, down, diagonal = _dots_chunk(
                    feature, strides, prototype, D, masks, BI * BJ, BN, BK, True, BETWEEN, LONG, DOT
                )
                tl.store(gram + at, own, mask=inside)
                tl.store(gram + h * w + at, across, mask=inside)
                tl.store(gram + 2 * h * w + at, down, mask=inside)
                tl.store(gram + 3 * h * w + at, diagonal, mask=inside)
            else:
                acc, own, across, down, diagonal = _dots_chunk(
                    feature, strides, prototype, D, masks, BI * BJ, BN, BK, False, False, LONG, DOT
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
def _square_norm(gram, shape, i, j, wy, wx, mask, below, BETWEEN: tl.constexpr):
    """|Up F|^2 between rows of locations i and i + 1: what the upper row, the lower row and the
    products between them give, each as interpolated along x from the locations j and j + 1.
    ``w^T G w`` with the four taps' weights w and Gram matrix G, from the maps of one image."""
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
    row, row_below, across = _square_norm(at, (h, w), i, j, wy, wx, x_in, x_in & next_row, BETWEEN)
    square = ((1 - wy) * (1 - wy))[:, None] * row[None, :]
    square += (wy * wy)[:, None] * row_below[None, :]
    square += (2 * (1 - wy) * wy)[:, None] * across[None, :]
    inverse = _inverse_length(square)
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
                value = top[None, :] + wy[:, None] * (low - top)[None, :]
                if MEAN:
                    best += value
                else:
                    # Strictly greater: of equal windows the lowest stays. NaN stays NaN.
                    better = near[None, :] & ((value > best) | (value != value))
                    best = tl.where(better, value, best)
                    place = tl.where(better, (my - y_first) * OX + step, place)
        to = _wide(c * H + y, LONG)[:, None] * W + x[None, :]
        mask = (y < end)[:, None] & x_in[None, :]
        tl.store(scores + to, best * inverse, mask=mask)
        if WINNERS:
            tl.store(winners + to, place.to(winners.dtype.element_ty), mask=mask)


# From pixels to tiles


@triton.jit
def _taps(axes, axis: tl.constexpr, piece, T: tl.constexpr, R: tl.constexpr):
    """A piece of an axis: its pixels, which of them are real, their lower locations and weights of
    the upper ones. As matrices [R, T] (y) or [T, R] (x): the weight of each location for each
    pixel, and twice the product of a pixel's two weights, at the lower location."""
    first = _one(axes, axis, PIECE_LOWER, piece)
    x = _one(axes, axis, PIECE_BEGIN, piece) + tl.arange(0, T)
    mask = x < _one(axes, axis, PIECE_END, piece)
    lower = _look(axes, axis, LOWER, x, mask)
    up = _look_weight(axes, axis, x, mask)
    r = first + tl.arange(0, R)
    if axis == Y:
        at_lower = mask[None, :] & (lower[None, :] == r[:, None])
        at_upper = mask[None, :] & (lower[None, :] + 1 == r[:, None])
        weight = up[None, :]
    else:
        at_lower = mask[:, None] & (lower[:, None] == r[None, :])
        at_upper = mask[:, None] & (lower[:, None] + 1 == r[None, :])
        weight = up[:, None]
    hat = tl.where(at_lower, 1 - weight, 0.0) + tl.where(at_upper, weight, 0.0)
    return x, mask, lower, up, hat, tl.where(at_lower, 2 * weight * (1 - weight), 0.0)


@triton.jit
def _carry(left, values, right, T: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr):
    """``left @ values @ right``: [R, T] [T, T] [T, R] -> [R, R]."""
    half = _dot(left, values, tl.zeros((R, T), tl.float32), DOT)
    return _dot(half, right, tl.zeros((R, R), tl.float32), DOT)


@triton.jit
def mask_tiles_kernel(
    masks,  # [B, K, C, H, W], uint8 or float32
    tiles,
    table,
    length,
    C,
    H,
    W,
    y_pieces,
    x_pieces,
    record,
    RY,
    RX,
    T: tl.constexpr,
    R: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: a tile of an image, all classes. The sum is that of the mask."""
    pid = tl.program_id(0)
    image = (pid // (x_pieces * y_pieces)).to(tl.int64)
    axes = (table, length)
    y, y_in, _, _, hat_y, _ = _taps(axes, Y, pid // x_pieces % y_pieces, T, R)
    x, x_in, _, _, hat_x, _ = _taps(axes, X, pid % x_pieces, T, R)
    mask = y_in[:, None] & x_in[None, :]
    r = tl.arange(0, R)
    block = r[:, None] * RX + r[None, :]
    stored = (r[:, None] < RY) & (r[None, :] < RX)
    tiles += pid.to(tl.int64) * record
    masks += image * C * H * W
    for c in range(C):
        at = _wide(c * H + y, LONG)[:, None] * W + x[None, :]
        value = tl.load(masks + at, mask=mask, other=0).to(tl.float32)
        tl.store(tiles + c * RY * RX + block, _carry(hat_y, value, hat_x, T, R, DOT), mask=stored)
        tl.store(tiles + C * RY * RX + c, tl.sum(tl.sum(value, 1), 0))


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
def match_tiles_kernel(
    grad,  # [B, Q, C, H, W]
    scores,
    winners,
    gram,
    prototypes,
    inverse_lengths,  # [B, C, Gy, Gx]: 1 / |p|
    tiles,
    table,
    length,
    C,
    D,
    H,
    W,
    h,
    w,
    y_pieces,
    x_pieces,
    record,
    RY,
    RX,
    rows,
    row_programs,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    BETWEEN: tl.constexpr,
    MEAN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: a tile of an image, all classes. The weights are those of dS / |Up F|, by the
    place of the winning window; the sum is that of dS S, which is <q, dq> of that window.
    The first `row_programs` programs take the lengths of 16 prototypes each."""
    pid = tl.program_id(0)
    axes = (table, length)
    if pid < row_programs:
        _lengths(prototypes, inverse_lengths, pid * 16, rows, D)
    else:
        pid -= row_programs
        sx = pid % x_pieces
        sy = pid // x_pieces % y_pieces
        image = (pid // (x_pieces * y_pieces)).to(tl.int64)
        y, y_in, i, wy, hat_y, product_y = _taps(axes, Y, sy, T, R)
        x, x_in, j, wx, hat_x, product_x = _taps(axes, X, sx, T, R)
        mask = y_in[:, None] & x_in[None, :]
        r = tl.arange(0, R)
        block = r[:, None] * RX + r[None, :]
        stored = (r[:, None] < RY) & (r[None, :] < RX)
        tiles += pid.to(tl.int64) * record

        i, j, wy, wx = i[:, None], j[None, :], wy[:, None], wx[None, :]
        row, row_below, across = _square_norm(
            gram + image * 4 * h * w, (h, w), i, j, wy, wx, mask, mask & (wy > 0), BETWEEN
        )
        square = (1 - wy) * (1 - wy) * row + wy * wy * row_below + 2 * (1 - wy) * wy * across
        inverse = _inverse_length(square)
        weight = inverse
        if MEAN:
            y_windows = _one(axes, Y, PIECE_LAST, sy) - _one(axes, Y, PIECE_FIRST, sy) + 1
            x_windows = _one(axes, X, PIECE_LAST, sx) - _one(axes, X, PIECE_FIRST, sx) + 1
            weight = inverse / (y_windows * x_windows).to(tl.float32)

        grad += image * C * H * W
        scores += image * C * H * W
        winners += image * C * H * W
        radial = tl.zeros((T, T), tl.float32)
        for c in range(C):
            at = _wide(c * H + y, LONG)[:, None] * W + x[None, :]
            g = tl.load(grad + at, mask=mask, other=0.0)
            s = tl.load(scores + at, mask=mask, other=0.0)
            radial += g * s
            if MEAN:
                part = _carry(hat_y, g * weight, hat_x, T, R, DOT)
                tl.store(tiles + c * RY * RX + block, part, mask=stored)
            else:
                place = tl.load(winners + at, mask=mask, other=0).to(tl.int32)
                for k in tl.range(0, P, loop_unroll_factor=P if P <= 4 else 1):
                    won = place == k
                    part = _carry(hat_y, tl.where(won, g * weight, 0.0), hat_x, T, R, DOT)
                    tl.store(tiles + (c * P + k) * RY * RX + block, part, mask=stored)
                    total = tl.sum(tl.sum(tl.where(won, g * s, 0.0), 1), 0)
                    tl.store(tiles + (C * P + 4) * RY * RX + c * P + k, total)

        # S = <Up F, q> / |Up F|, so that d|Up F|^2 = -1/2 sum_c dS S / |Up F|^2.
        radial *= -0.5 * inverse * inverse
        to = tiles + C * P * RY * RX + block
        part = _carry(hat_y * hat_y, radial, hat_x * hat_x, T, R, DOT)
        tl.store(to, part, mask=stored)
        if BETWEEN:
            part = _carry(hat_y * hat_y, radial, product_x, T, R, DOT)
            tl.store(to + RY * RX, part, mask=stored)
            part = _carry(product_y, radial, hat_x * hat_x, T, R, DOT)
            tl.store(to + 2 * RY * RX, part, mask=stored)
            part = 0.5 * _carry(product_y, radial, product_x, T, R, DOT)
            tl.store(to + 3 * RY * RX, part, mask=stored)


# From tiles to locations and windows


@triton.jit
def _piece(axes, axis: tl.constexpr, i, number, mask):
    """Of the pieces near a location the one of this number, the location's place in it, and
    whether there is one."""
    piece = _look(axes, axis, CELL_PIECE_FIRST, i, mask) + number
    mask = mask & (piece <= _look(axes, axis, CELL_PIECE_LAST, i, mask, -1))
    return piece, i - _look(axes, axis, PIECE_LOWER, piece, mask), mask


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
    CELLS_FIRST: tl.constexpr,
    LONG: tl.constexpr,
):
    """What one tile near each location adds to `_weights`."""
    my, mx = window[0], window[1]
    sy, row, in_y = _piece(axes, Y, cell[0], numbers[0], cell[2])
    sx, column, in_x = _piece(axes, X, cell[1], numbers[1], cell[2])
    inside = in_y & in_x
    first_y = _look(axes, Y, PIECE_FIRST, sy, inside)
    first_x = _look(axes, X, PIECE_FIRST, sx, inside)
    last_y = _look(axes, Y, PIECE_LAST, sy, inside, -1)
    last_x = _look(axes, X, PIECE_LAST, sx, inside, -1)
    size = tiles[3] * tiles[4]
    from_cell = _wide(sy * tiles[1] + sx, LONG) * tiles[2] + row * tiles[4] + column
    from_window = block * size
    if PLACES:
        from_cell -= (first_y * OX + first_x) * size
        from_window += (my * OX + mx) * size
    if CELLS_FIRST:
        mask = (my[None, :] >= first_y[:, None]) & (my[None, :] <= last_y[:, None])
        mask &= (mx[None, :] >= first_x[:, None]) & (mx[None, :] <= last_x[:, None])
        mask &= inside[:, None] & used[None, :]
        at = from_cell[:, None] + from_window[None, :]
    else:
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
    CELLS_FIRST: tl.constexpr,
    LONG: tl.constexpr,
):
    """Weights of M locations for BN windows, summed over the tiles that are near the one and in
    the other: [M, BN] where CELLS_FIRST, else [BN, M].

    `tiles` is (records of an image, tiles in a row, record, RY, RX); `block` the first block of
    each window's class; `cell` (i, j, which are real), `window` (my, mx), `used` which are real.
    A location is near no more than REACH_Y x REACH_X tiles.
    """
    total = tl.zeros((M, BN) if CELLS_FIRST else (BN, M), tl.float32)
    for a in tl.range(0, REACH_Y, loop_unroll_factor=REACH_Y if REACH_Y <= 2 else 1):
        for b in tl.range(0, REACH_X, loop_unroll_factor=REACH_X if REACH_X <= 2 else 1):
            total += _tile_weights(
                axes, tiles, block, cell, window, (a, b), used, OX, PLACES, CELLS_FIRST, LONG
            )
    return total


@triton.jit
def _map(tiles, map, y, x, LONG: tl.constexpr):
    """Entries of a block of the tiles' records; y and x as `_piece` has them."""
    at = _wide(y[0] * tiles[1] + x[0], LONG) * tiles[2] + y[1] * tiles[4] + x[1]
    at += map * (tiles[3] * tiles[4])
    return tl.load(tiles[0] + at, mask=y[2] & x[2], other=0.0)


@triton.jit
def _window_totals(
    axes,
    tiles,
    block,
    window,
    used,
    PIECES_Y: tl.constexpr,
    PIECES_X: tl.constexpr,
    OX: tl.constexpr,
    PLACES: tl.constexpr,
    LONG: tl.constexpr,
):
    """The sums of the tiles' records over the tiles of each window; `block` says where in a record.
    A window has no more than PIECES_Y x PIECES_X tiles."""
    my, mx = window[0], window[1]
    first_y = _look(axes, Y, WINDOW_PIECE_FIRST, my, used)
    last_y = _look(axes, Y, WINDOW_PIECE_LAST, my, used, -1)
    first_x = _look(axes, X, WINDOW_PIECE_FIRST, mx, used)
    last_x = _look(axes, X, WINDOW_PIECE_LAST, mx, used, -1)
    sx = first_x[:, None] + tl.arange(0, PIECES_X)[None, :]
    x_in = used[:, None] & (sx <= last_x[:, None])
    kx = mx[:, None] - _look(axes, X, PIECE_FIRST, sx, x_in)
    total = tl.zeros(sx.shape, tl.float32)
    for a in range(PIECES_Y):
        sy = first_y + a
        y_in = used & (sy <= last_y)
        at = tiles[0] + _wide(sy[:, None] * tiles[1] + sx, LONG) * tiles[2] + block[:, None]
        if PLACES:
            at += (my - _look(axes, Y, PIECE_FIRST, sy, y_in))[:, None] * OX + kx
        total += tl.load(at, mask=x_in & y_in[:, None], other=0.0)
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
                False,
                LONG,
            )
            at = _wide(i, LONG) * strides[1] + _wide(j, LONG) * strides[2]
            f = tl.load(
                features + at[:, None] + _wide(d, LONG)[None, :] * strides[0],
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
    y_pieces,
    x_pieces,
    record,
    RY,
    RX,
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
    PIECES_Y: tl.constexpr,
    PIECES_X: tl.constexpr,
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
        records = (tiles + image * (y_pieces * x_pieces) * record, x_pieces, record, RY, RX)
        pixels = _window_totals(
            axes, records, C * RY * RX + c, (my, mx), used, PIECES_Y, PIECES_X, 1, False, LONG
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
    strides,
    to,
    to_strides,
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
    at = features + i_wide * strides[1] + j_wide * strides[2]
    to += i_wide * to_strides[1] + j_wide * to_strides[2]

    n = tl.arange(0, BN)
    used = n < count
    c, my, mx = _window(n, y_first, x_first, y_windows, x_windows)
    row = _wide((c * Gy + my) * Gx + mx, LONG)
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
        True,
        LONG,
    )
    weight *= tl.load(coefficients + row, mask=used, other=0.0)[None, :]

    if GRAM:
        # Each product of neighbours has two sides, and the map of the diagonals holds both
        # diagonals of a cell, at its upper left corner.
        own = tl.zeros((BI * BJ,), tl.float32)
        to_right, to_left, to_below, to_above = own, own, own, own
        lower_right, lower_left, upper_right, upper_left = own, own, own, own
        for a in tl.range(0, REACH_Y, loop_unroll_factor=REACH_Y if REACH_Y <= 2 else 1):
            for b in tl.range(0, REACH_X, loop_unroll_factor=REACH_X if REACH_X <= 2 else 1):
                y = _piece(axes, Y, i, a, inside)
                x = _piece(axes, X, j, b, inside)
                own += 2 * _map(tiles, C * P, y, x, LONG)
                if BETWEEN:
                    y_above = _piece(axes, Y, i - 1, a, inside & (i > 0))
                    x_left = _piece(axes, X, j - 1, b, inside & (j > 0))
                    to_right += _map(tiles, C * P + 1, y, x, LONG)
                    to_left += _map(tiles, C * P + 1, y, x_left, LONG)
                    to_below += _map(tiles, C * P + 2, y, x, LONG)
                    to_above += _map(tiles, C * P + 2, y_above, x, LONG)
                    lower_right += _map(tiles, C * P + 3, y, x, LONG)
                    lower_left += _map(tiles, C * P + 3, y, x_left, LONG)
                    upper_right += _map(tiles, C * P + 3, y_above, x, LONG)
                    upper_left += _map(tiles, C * P + 3, y_above, x_left, LONG)
        up = inside & (i > 0)
        left = inside & (j > 0)
        down = inside & (i + 1 < h)
        right = inside & (j + 1 < w)

    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        there = (d < D)[None, :]
        vector = tl.load(
            vectors + row[:, None] * D + d[None, :], mask=used[:, None] & there, other=0.0
        )
        acc = _dot(weight, vector, tl.zeros((BI * BJ, BD), tl.float32), DOT)
        for more in range(BN, count, BN):  # seldom: BN is chosen to hold all windows near a block
            n_more = more + n
            used_more = n_more < count
            c_more, my_more, mx_more = _window(n_more, y_first, x_first, y_windows, x_windows)
            row_more = _wide((c_more * Gy + my_more) * Gx + mx_more, LONG)
            weight_more = _weights(
                axes,
                tiles,
                c_more * P,
                (i, j, inside),
                (my_more, mx_more),
                used_more,
                BI * BJ,
                BN,
                REACH_Y,
                REACH_X,
                OX,
                PLACES,
                True,
                LONG,
            )
            weight_more *= tl.load(coefficients + row_more, mask=used_more, other=0.0)[None, :]
            vector = tl.load(
                vectors + row_more[:, None] * D + d[None, :],
                mask=used_more[:, None] & there,
                other=0.0,
            )
            acc = _dot(weight_more, vector, acc, DOT)
        if GRAM:
            f = at[:, None] + _wide(d, LONG)[None, :] * strides[0]
            acc += own[:, None] * _there(f, inside[:, None] & there)
            if BETWEEN:
                sh = strides[1]
                sw = strides[2]
                acc += to_right[:, None] * _there(f + sw, right[:, None] & there)
                acc += to_left[:, None] * _there(f - sw, left[:, None] & there)
                acc += to_below[:, None] * _there(f + sh, down[:, None] & there)
                acc += to_above[:, None] * _there(f - sh, up[:, None] & there)
                acc += lower_right[:, None] * _there(f + sh + sw, (down & right)[:, None] & there)
                acc += lower_left[:, None] * _there(f + sh - sw, (down & left)[:, None] & there)
                acc += upper_right[:, None] * _there(f - sh + sw, (up & right)[:, None] & there)
                acc += upper_left[:, None] * _there(f - sh - sw, (up & left)[:, None] & there)
        tl.store(
            to[:, None] + _wide(d, LONG)[None, :] * to_strides[0],
            acc.to(to.dtype.element_ty),
            mask=inside[:, None] & there,
        )


@triton.jit
def _there(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


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
    stride_d,
    stride_h,
    stride_w,
    y_pieces,
    x_pieces,
    record,
    RY,
    RX,
    row_blocks,
    column_blocks,
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
    strides = (stride_d, stride_h, stride_w)
    to += image // K * stride_b + image % K * stride_k
    _scatter(
        (table, length),
        (tiles + image * (y_pieces * x_pieces) * record, x_pieces, record, RY, RX),
        grad + image // K * windows * D,
        factors + image * windows,
        (C, D, h, w, Gy, Gx),
        pid // column_blocks % row_blocks,
        row_blocks,
        pid % column_blocks,
        column_blocks,
        to,
        strides,
        to,
        strides,
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
    stride_d,
    stride_h,
    stride_w,
    to_stride_b,
    to_stride_q,
    to_stride_d,
    to_stride_h,
    to_stride_w,
    y_pieces,
    x_pieces,
    record,
    RY,
    RX,
    groups_y,
    groups_x,
    group_programs,
    d_blocks,
    splits,
    row_blocks,
    column_blocks,
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
    PIECES_Y: tl.constexpr,
    PIECES_X: tl.constexpr,
    BETWEEN: tl.constexpr,
    MEAN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of each episode, first the programs for its prototypes, a group of windows and GATHER_BD
    channels each; then those for its features, up to BI x BJ locations and all channels each."""
    pid = tl.program_id(0)
    axes = (table, length)
    strides = (stride_d, stride_h, stride_w)
    windows = C * Gy * Gx
    size = (y_pieces * x_pieces).to(tl.int64) * record
    gathers = group_programs * d_blocks * splits
    blocks = row_blocks * column_blocks
    b = (pid // (gathers + Q * blocks)).to(tl.int64)
    pid = pid % (gathers + Q * blocks)
    if pid >= gathers:
        pid -= gathers
        q = (pid // blocks).to(tl.int64)
        _scatter(
            axes,
            (tiles + (b * Q + q) * size, x_pieces, record, RY, RX),
            prototypes + b * windows * D,
            inverse_lengths + b * windows,
            (C, D, h, w, Gy, Gx),
            pid // column_blocks % row_blocks,
            row_blocks,
            pid % column_blocks,
            column_blocks,
            features + b * stride_b + q * stride_q,
            strides,
            to + b * to_stride_b + q * to_stride_q,
            (to_stride_d, to_stride_h, to_stride_w),
            P,
            BI,
            BJ,
            BN,
            BD,
            REACH_Y,
            REACH_X,
            OX,
            not MEAN,
            True,
            BETWEEN,
            LONG,
            DOT,
        )
    else:
        d_block = pid % d_blocks
        group = pid // d_blocks % group_programs
        split = pid // (d_blocks * group_programs)
        c, my, mx, used, region = _group(
            axes, group, groups_x, groups_y, C, Gy, Gx, GY, GX, GATHER_BN
        )
        row = _wide((c * Gy + my) * Gx + mx, LONG)
        inverse = tl.load(inverse_lengths + b * windows + row, mask=used, other=0.0)
        along = tl.zeros((GATHER_BN,), tl.float32)  # <q, dq>
        first, last = _block(split, splits, Q)
        # The mean has no winners whose scores would give <q, dq>: a first pass over all channels
        # finds it, and d_blocks is 1.
        for turn in range(0 if MEAN else 1, 2):
            for start in range(
                d_block * GATHER_BD, D if MEAN else d_block * GATHER_BD + 1, GATHER_BD
            ):
                d = start + tl.arange(0, GATHER_BD)
                acc = tl.zeros((GATHER_BN, GATHER_BD), tl.float32)
                for q in range(first, last):
                    image = b * Q + q
                    records = (tiles + image * size, x_pieces, record, RY, RX)
                    acc += _gather(
                        axes,
                        records,
                        c * P,
                        (my, mx),
                        used,
                        region,
                        features + b * stride_b + (image - b * Q) * stride_q,
                        strides,
                        d,
                        D,
                        BI,
                        BJ,
                        GATHER_BN,
                        GATHER_BD,
                        REACH_Y,
                        REACH_X,
                        OX,
                        not MEAN,
                        LONG,
                        DOT,
                    )
                    if not MEAN:
                        along += _window_totals(
                            axes,
                            records,
                            (C * P + 4) * RY * RX + c * P,
                            (my, mx),
                            used,
                            PIECES_Y,
                            PIECES_X,
                            OX,
                            True,
                            LONG,
                        )
                mask = used[:, None] & (d < D)[None, :]
                at = row[:, None] * D + d[None, :]
                p = tl.load(prototypes + b * windows * D + at, mask=mask, other=0.0)
                direction = p * inverse[:, None]
                if turn == 0:
                    along += tl.sum(acc * direction, 1)
                else:
                    value = (acc - along[:, None] * direction) * inverse[:, None]
                    tl.store(to_prototypes + (split * B + b) * windows * D + at, value, mask=mask)
