"""Cosine matching: `dots_kernel` and `scores_kernel` forward, `match_weights_kernel` and
`match_back_kernel` backward.

Nothing is ever interpolated to image resolution but classes. Between the first two lie

    dots  [image, C, NY, NX, h, w]: <F(i, j), q_{c,m}> for the windows m near a location, those over
          a pixel that is interpolated from it, from the first of these on.
    gram  [image, 4, h, w]: |F|^2; products with the right and with the lower neighbour; the sum of
          those of both diagonals of the cell to the lower right.

and between the last two the derivatives of the loss by them, tile by tile: a block for each class
and place of the winning window (see `products`), and four for the Gram maps.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .products import gather, group_of, scatter
from .shared import (
    FIRST,
    LAST,
    LOWER,
    NEAR_FIRST,
    NEAR_LAST,
    PIECE_FIRST,
    PIECE_LAST,
    PIECE_LOWER,
    PIECE_UPPER,
    RUN_BEGIN,
    RUN_END,
    STRIP_BEGIN,
    STRIP_END,
    WEIGHT,
    X,
    Y,
    dot,
    interpolation,
    inverse_length,
    load_features,
    look,
    look_weight,
    one,
    part_of,
    tile_columns,
    wide,
    window_of,
    windows_near,
)


@triton.jit
def _store_gram(
    features,
    gram,
    i,
    j,
    h,
    w,
    D,
    STRIDES: tl.constexpr,
    EVEN: tl.constexpr,
    BK: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
):
    """The Gram maps of M locations, [M]. Beyond the edges, where no pixel asks for them, a location
    is its own neighbour."""
    inside = (i < h) & (j < w)
    i = tl.minimum(i, h - 1)
    j = tl.minimum(j, w - 1)
    at = features + (wide(i, LONG) * STRIDES[1] + wide(j, LONG) * STRIDES[2])
    gram += i * w + j
    square = tl.zeros((i.shape[0], BK), tl.float32)
    if BETWEEN:
        to_right = tl.where(j + 1 < w, STRIDES[2], 0)
        below = at + tl.where(i + 1 < h, STRIDES[1], 0)
        right = tl.zeros_like(square)
        lower = tl.zeros_like(square)
        diagonals = tl.zeros_like(square)
        for start in range(0, D, BK):
            f = load_features(at, start, D, STRIDES, EVEN, BK, LONG).to(tl.float32)
            fr = load_features(at + to_right, start, D, STRIDES, EVEN, BK, LONG).to(tl.float32)
            fb = load_features(below, start, D, STRIDES, EVEN, BK, LONG).to(tl.float32)
            fd = load_features(below + to_right, start, D, STRIDES, EVEN, BK, LONG).to(tl.float32)
            square += f * f
            right += f * fr
            lower += f * fb
            diagonals += f * fd
            diagonals += fr * fb
        tl.store(gram + h * w, tl.sum(right, 1), mask=inside)
        tl.store(gram + 2 * h * w, tl.sum(lower, 1), mask=inside)
        tl.store(gram + 3 * h * w, tl.sum(diagonals, 1), mask=inside)
    else:
        for start in range(0, D, BK):
            f = load_features(at, start, D, STRIDES, EVEN, BK, LONG).to(tl.float32)
            square += f * f
    tl.store(gram, tl.sum(square, 1), mask=inside)


@triton.jit
def dots_kernel(
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    dots,
    gram,
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
    STRIDES: tl.constexpr,
    EVEN: tl.constexpr,
    NY: tl.constexpr,
    NX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GRAM_BK: tl.constexpr,
    BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: BI x BJ locations and all windows near them."""
    pid = tl.program_id(0)
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    axes = (table, length)
    cell = tl.arange(0, BI * BJ)
    i_begin = pid // column_blocks % row_blocks * BI
    j_begin = pid % column_blocks * BJ
    i = i_begin + cell // BJ
    j = j_begin + cell % BJ
    features += image // Q * stride_b + image % Q * stride_q
    prototypes += image // Q * (C * Gy * Gx) * D
    dots += image * (C * NY * NX) * h * w
    gram += image * 4 * h * w
    _store_gram(features, gram, i, j, h, w, D, STRIDES, EVEN, GRAM_BK, BETWEEN, LONG)

    y_first, y_windows = windows_near(axes, Y, i_begin, tl.minimum(i_begin + BI, h), BI)
    x_first, x_windows = windows_near(axes, X, j_begin, tl.minimum(j_begin + BJ, w), BJ)
    inside = (i < h) & (j < w)
    y_near = look(axes, Y, NEAR_FIRST, i, inside)[None, :]
    y_near_last = look(axes, Y, NEAR_LAST, i, inside, -1)[None, :]
    x_near = look(axes, X, NEAR_FIRST, j, inside)[None, :]
    x_near_last = look(axes, X, NEAR_LAST, j, inside, -1)[None, :]
    at = features + wide(tl.minimum(i, h - 1), LONG) * STRIDES[1]
    at += wide(tl.minimum(j, w - 1), LONG) * STRIDES[2]
    count = C * y_windows * x_windows
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        used = (n < count)[:, None]
        n = tl.minimum(n, count - 1)  # the last one again
        c, my, mx = window_of(n, y_first, x_first, y_windows, x_windows)
        row = prototypes + wide((c * Gy + my) * Gx + mx, LONG) * D
        acc = tl.zeros((BI * BJ, BN), tl.float32)
        squares = tl.zeros((BK, BN), tl.float32)
        for start in range(0, D, BK):
            d = start + tl.arange(0, BK)[:, None]
            f = load_features(at, start, D, STRIDES, EVEN, BK, LONG)
            if EVEN:
                p = tl.load(row[None, :] + d)
            else:
                p = tl.load(row[None, :] + d, mask=d < D, other=0.0)
            acc += dot(f, p, DOT)
            squares += p * p
        acc *= inverse_length(tl.sum(squares, 0))[None, :]
        my, mx = my[:, None], mx[:, None]
        near = (my >= y_near) & (my <= y_near_last) & (mx >= x_near) & (mx <= x_near_last)
        slot = ((c[:, None] * NY + my) * NX + mx) - (y_near * NX + x_near)
        to = dots + (wide(slot, LONG) * (h * w) + (i * w + j)[None, :])
        tl.store(to, tl.trans(acc), mask=near & used)


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
    h,
    w,
    strips,
    column_blocks,
    W: tl.constexpr,
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
    j = look(axes, X, LOWER, x, x_in)
    wx = look_weight(axes, X, x, x_in)
    x_first = look(axes, X, FIRST, x, x_in)
    x_last = look(axes, X, LAST, x, x_in, -1)
    begin = one(axes, Y, STRIP_BEGIN, strip)
    end = one(axes, Y, STRIP_END, strip)
    i = one(axes, Y, LOWER, begin)
    y_first = one(axes, Y, FIRST, begin)
    y_last = one(axes, Y, LAST, begin)
    y = begin + tl.arange(0, T)
    wy = look_weight(axes, Y, y, y < end)
    # Weights grow along a strip: where the last is 0, the next row of locations is not near.
    next_row = one(axes, Y, WEIGHT, end - 1) != 0

    # What depends on columns alone is computed for both rows of locations, then for the T rows.
    at = gram + image * 4 * h * w
    row, row_below, across = _square_norm(at, (h, w), i, j, wx, x_in, x_in & next_row, BETWEEN)
    square = ((1 - wy) * (1 - wy))[:, None] * row[None, :]
    square += (wy * wy)[:, None] * row_below[None, :]
    square += (2 * (1 - wy) * wy)[:, None] * across[None, :]
    inverse = logit_scale * inverse_length(square)
    if MEAN:
        inverse /= ((y_last - y_first + 1) * (x_last - x_first + 1)).to(tl.float32)[None, :]

    # The dots of the first window of class 0, and from there to the next location of either axis:
    # its windows may begin with another one.
    to_right = x_in & (wx > 0)
    y_near = one(axes, Y, NEAR_FIRST, i)
    x_near = look(axes, X, NEAR_FIRST, j, x_in)
    at = (y_first - y_near) * NX + x_first - x_near
    at = dots + image * (C * NY * NX) * h * w + (wide(at, LONG) * (h * w) + i * w + j)
    right = 1 + wide(x_near - look(axes, X, NEAR_FIRST, j + 1, to_right), LONG) * (h * w)
    y_near -= look(axes, Y, NEAR_FIRST, i + 1, next_row)
    below = w + wide(y_near, LONG) * (NX * h * w)

    scores += image * C * H * W
    winners += image * C * H * W
    mask = (y < end)[:, None] & x_in[None, :]
    for c in range(C):
        best = tl.full((T, BX), 0.0 if MEAN else float("-inf"), tl.float32)
        place = tl.zeros((T, BX), tl.int32)
        for number in range(y_last - y_first + 1):
            dot = at + wide((c * NY + number) * NX, LONG) * (h * w)
            for step in tl.range(0, OX, loop_unroll_factor=OX if OX <= 4 else 1):
                near = x_first + step <= x_last
                both = near & to_right
                top = tl.load(dot, mask=near, other=0.0)
                top += wx * (tl.load(dot + right, mask=both, other=0.0) - top)
                low = tl.load(dot + below, mask=near & next_row, other=0.0)
                low += wx * (tl.load(dot + below + right, mask=both & next_row, other=0.0) - low)
                dot += h * w
                if MEAN:
                    best += top[None, :] + wy[:, None] * (low - top)[None, :]
                else:
                    # Strictly greater: of equal windows the lowest stays. NaN stays NaN.
                    slope = low - top
                    top = tl.where(near, top, float("-inf"))
                    value = top[None, :] + wy[:, None] * slope[None, :]
                    place = tl.where(value > best, number * OX + step, place)
                    best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        to = wide(c * H + y, LONG)[:, None] * W + x[None, :]
        tl.store(scores + to, best * inverse, mask=mask)
        if WINNERS:
            tl.store(winners + to, place.to(winners.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_lengths(prototypes, inverse_lengths, first, rows, D):
    """1 / |p| of 16 prototypes."""
    row = first + tl.arange(0, 16)
    at = prototypes + row.to(tl.int64)[:, None] * D
    total = tl.zeros((16, 64), tl.float32)
    for start in range(0, D, 64):
        d = start + tl.arange(0, 64)
        p = tl.load(at + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
        total += p * p
    tl.store(inverse_lengths + row, inverse_length(tl.sum(total, 1)), mask=row < rows)


@triton.jit
def match_weights_kernel(
    grad,  # [B, Q, C, H, W]
    scores,
    winners,
    gram,
    prototypes,
    inverse_lengths,  # [B, C, Gy, Gx]: 1 / |p|
    weights,
    table,
    logit_scale,
    length,
    C,
    D,
    H,
    h,
    w,
    pieces_y,
    pieces_x,
    RY,
    RX,
    rows,
    row_programs,
    class_chunks,
    place_chunks,
    W: tl.constexpr,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    N: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    P: tl.constexpr,
    BETWEEN: tl.constexpr,
    MEAN: tl.constexpr,
    ALL: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: a tile, CB classes and PB of their P places; the first of a tile the Gram maps
    as well (ALL says that there are no others). The first `row_programs` take the lengths of 16
    prototypes each instead.

    The blocks of the classes hold `logit_scale` times the sums of dS / |Up F| (of MEAN: of all
    windows alike, divided by their number). S = <Up F, q> / |Up F|, hence those of the Gram maps:
    d|Up F|^2 = -1/2 sum_c dS S / |Up F|^2.
    """
    pid = tl.program_id(0)
    axes = (table, length)
    if pid < row_programs:
        _inverse_lengths(prototypes, inverse_lengths, pid * 16, rows, D)
        return
    pid -= row_programs
    chunks = class_chunks * place_chunks
    first = pid % chunks // place_chunks * CB
    first_place = pid % place_chunks * PB
    tile = pid // chunks
    piece_x = tile % pieces_x
    piece_y = tile // pieces_x % pieces_y
    image = (tile // (pieces_x * pieces_y)).to(tl.int64)
    grad += image * C * H * W
    scores += image * C * H * W
    winners += image * C * H * W
    gram += image * 4 * h * w
    weights += tile.to(tl.int64) * (C * P + 4) * (RY * RX)
    c = first + tl.arange(0, CB)
    plane = wide(c, LONG)[:, None, None] * (H * W)
    place = first_place + tl.arange(0, PB)
    x, x_in, j, wx = tile_columns(axes, piece_x, T_X)
    column = j - one(axes, X, PIECE_LOWER, piece_x)
    n = tl.arange(0, N)
    lower = one(axes, Y, PIECE_LOWER, piece_y)
    scale = logit_scale
    if MEAN:
        windows = one(axes, Y, PIECE_LAST, piece_y) - one(axes, Y, PIECE_FIRST, piece_y) + 1
        windows *= one(axes, X, PIECE_LAST, piece_x) - one(axes, X, PIECE_FIRST, piece_x) + 1
        scale /= windows.to(tl.float32)
    interpolate = interpolation(column, 1 - wx, wx, N)
    # Of the Gram maps: |F|^2 or the lower neighbour, then the right neighbour or the diagonals.
    cross = interpolation(column, 2 * (1 - wx) * wx, tl.zeros_like(wx), N)
    pairs = interpolation(column, (1 - wx) * (1 - wx), wx * wx, N)
    pairs = tl.join(pairs, cross).permute(0, 2, 1).reshape((T_X, 2 * N))
    R: tl.constexpr = CB * PB
    carry = tl.zeros((CB, PB, T_X), tl.float32)
    own_carry = tl.zeros((T_X,), tl.float32)
    for row in range(one(axes, Y, PIECE_UPPER, piece_y) - lower + 1):
        here = carry
        carry = tl.zeros((CB, PB, T_X), tl.float32)
        own = own_carry
        own_carry = tl.zeros((T_X,), tl.float32)
        across = tl.zeros((T_X,), tl.float32)
        run_begin = one(axes, Y, RUN_BEGIN, piece_y * RY + row)
        end = one(axes, Y, RUN_END, piece_y * RY + row)
        # Weights grow along a run: where the last is 0, the next row of locations is not near.
        above = x_in & (run_begin < end)
        below = above & (one(axes, Y, WEIGHT, tl.maximum(end - 1, 0)) != 0)
        norms = _square_norm(gram, (h, w), lower + row, j, wx, above, below, BETWEEN)
        for begin in range(run_begin, end, T_Y):
            y = begin + tl.arange(0, T_Y)
            y_in = y < end
            wy = look_weight(axes, Y, y, y_in)[:, None]
            square = (1 - wy) * (1 - wy) * norms[0][None, :] + wy * wy * norms[1][None, :]
            square += 2 * (1 - wy) * wy * norms[2][None, :]
            inverse = inverse_length(square)
            pixel = (y * W)[:, None] + x[None, :]
            inside = y_in[:, None] & x_in[None, :]
            at = plane + pixel[None, :, :]
            mask = inside[None, :, :] & (c < C)[:, None, None]
            g = tl.load(grad + at, mask=mask, other=0.0)
            if ALL or (first == 0) & (first_place == 0):
                radial = tl.sum(g * tl.load(scores + at, mask=mask, other=0.0), 0)
                if not ALL:
                    for k in range(CB, C):
                        there = wide(k, LONG) * (H * W) + pixel
                        more = tl.load(grad + there, mask=inside, other=0.0)
                        radial += more * tl.load(scores + there, mask=inside, other=0.0)
                radial *= -0.5 * inverse * inverse
                own += tl.sum(radial * ((1 - wy) * (1 - wy)), 0)
                own_carry += tl.sum(radial * (wy * wy), 0)
                across += tl.sum(radial * (2 * (1 - wy) * wy), 0)
            g *= inverse[None, :, :]
            if MEAN:
                won = g[:, None, :, :]
            else:
                won = tl.load(winners + at, mask=mask, other=0).to(tl.int32)
                won = won[:, None, :, :] == place[None, :, None, None]
                won = tl.where(won, g[:, None, :, :], 0.0)
            high = tl.sum(won * wy[None, None, :, :], 2)
            here += tl.sum(won, 2) - high
            carry += high
        # One product along x for all: the rows of the classes and places, then two of the maps.
        r = tl.arange(0, R)[:, None]
        maps = tl.where(r == 0, own[None, :], tl.where(r == 1, across[None, :], 0.0))
        sums = tl.join(here.reshape((R, T_X)), maps).permute(2, 0, 1).reshape((2 * R, T_X))
        classes = dot(sums, interpolate, DOT)
        maps = dot(sums, pairs, DOT)
        r = tl.arange(0, 2 * R)
        block = (first + r // PB) * P + first_place + r % PB
        used = (r < R) & (first + r // PB < C) & (first_place + r % PB < P)
        to = weights + row * RX
        at = block[:, None] * (RY * RX) + n[None, :]
        tl.store(to + at, scale * classes, mask=used[:, None] & (n < RX)[None, :])
        if ALL or (first == 0) & (first_place == 0):
            n2 = tl.arange(0, 2 * N)[None, :]
            number = (r[:, None] - R) * 2 + n2 // N
            to_maps = to + (C * P + number) * (RY * RX) + n2 % N
            half = tl.where(number == 3, 0.5, 1.0)
            mask = (number >= 0) & (number < 4) & (n2 % N < RX)
            tl.store(to_maps, half * maps, mask=mask)


@triton.jit
def match_back_kernel(
    weights,
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
    pieces_y,
    pieces_x,
    RY,
    RX,
    groups_y,
    groups_x,
    group_programs,
    splits,
    row_blocks,
    column_blocks,
    STRIDES: tl.constexpr,
    TO_STRIDES: tl.constexpr,
    EVEN: tl.constexpr,
    P: tl.constexpr,
    OX: tl.constexpr,
    GY: tl.constexpr,
    GX: tl.constexpr,
    M: tl.constexpr,
    GATHER_BN: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GATHER_BD: tl.constexpr,
    REACH: tl.constexpr,
    PLACES: tl.constexpr,
    WHOLE: tl.constexpr,
    LONG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of each episode, first the programs for its prototypes, a group of windows each; then those
    for its features, BI x BJ locations each. All channels, BD or GATHER_BD at a time."""
    pid = tl.program_id(0)
    axes = (table, length)
    windows = C * Gy * Gx
    size = pieces_y * pieces_x * (C * P + 4) * (RY * RX)
    gathers = group_programs * splits
    blocks = row_blocks * column_blocks
    b = (pid // (gathers + Q * blocks)).to(tl.int64)
    pid = pid % (gathers + Q * blocks)
    if pid >= gathers:
        pid -= gathers
        q = (pid // blocks).to(tl.int64)
        scatter(
            axes,
            (weights + (b * Q + q) * size, pieces_x, C * P + 4, RY, RX),
            prototypes + b * windows * D,
            inverse_lengths + b * windows,
            (C, D, h, w, Gy, Gx),
            (pid // column_blocks % row_blocks * BI, pid % column_blocks * BJ),
            features + b * stride_b + q * stride_q,
            to + b * to_stride_b + q * to_stride_q,
            STRIDES,
            TO_STRIDES,
            EVEN,
            P,
            BI,
            BJ,
            BN,
            BD,
            REACH,
            OX,
            PLACES,
            True,
            LONG,
            DOT,
        )
    else:
        group = pid % group_programs
        split = pid // group_programs
        c, window, used, region = group_of(
            axes, group, groups_x, groups_y, C, Gy, Gx, GY, GX, GATHER_BN
        )
        row = wide((c * Gy + window[0]) * Gx + window[1], LONG)
        inverse = tl.load(inverse_lengths + b * windows + row, mask=used, other=0.0)
        first, last = part_of(split, splits, Q)
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
                    acc += gather(
                        axes,
                        (weights + image * size, pieces_x, C * P + 4, RY, RX),
                        c * P,
                        window,
                        region,
                        features + b * stride_b + (image - b * Q) * stride_q,
                        start,
                        D,
                        STRIDES,
                        EVEN,
                        M,
                        GATHER_BN,
                        GATHER_BD,
                        REACH,
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
