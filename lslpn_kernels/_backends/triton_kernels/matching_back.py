"""Cosine matching, backward: `match_weights_kernel`, then `match_back_kernel`.

Between the two lie the derivatives of the loss by the dots and Gram maps of `matching`, tile by
tile: a block for each class and place of the winning window (see `products`), and four for the Gram
maps.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .matching import square_norm
from .products import gather, group_of, scatter
from .shared import (
    PIECE_FIRST,
    PIECE_LAST,
    PIECE_LOWER,
    PIECE_UPPER,
    RUN_BEGIN,
    RUN_END,
    WEIGHT,
    X,
    Y,
    dot,
    interpolation,
    inverse_length,
    look_weight,
    one,
    part_of,
    product_one_by_one,
    spoilt,
    tile_columns,
    wide,
)


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
    grad,  # [B, Q, C, H, W]; LOSS: the slopes, [B, Q, C - 1, H, W]
    scores,  # [B, Q, C, H, W]; LOSS: the radial parts, [B, Q, H, W]
    winners,  # [B, Q, C, H, W]
    gram, prototypes,
    inverse_lengths,  # [B, C, Gy, Gx]: 1 / |p|
    weights, table, logit_scale,
    grad_loss,  # of the loss, and the sum of its weights: numbers
    total, length, C, D, H, h, w, pieces_y, pieces_x, RY, RX, rows, row_programs, class_chunks,
    place_chunks, W: tl.constexpr, T_Y: tl.constexpr, T_X: tl.constexpr, N: tl.constexpr,
    CB: tl.constexpr, PB: tl.constexpr, P: tl.constexpr, BETWEEN: tl.constexpr,
    BETWEEN_ROWS: tl.constexpr, MEAN: tl.constexpr, ALL: tl.constexpr, LOSS: tl.constexpr,
    PAIR: tl.constexpr, LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
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
    grad += image * (C - 1 if LOSS else C) * H * W
    scores += image * (1 if LOSS else C) * H * W
    winners += image * C * H * W
    gram += image * 4 * h * w
    runs_x = pieces_x * RX
    size = pieces_y * RY * runs_x  # of a block
    weights += image * (C * P + 4) * size + piece_y * RY * runs_x + piece_x * RX
    c = first + tl.arange(0, CB)
    plane = wide(c, LONG)[:, None, None] * (H * W)
    place = first_place + tl.arange(0, PB)
    x, x_in, j, wx = tile_columns(axes, piece_x, T_X)
    column = j - one(axes, X, PIECE_LOWER, piece_x)
    n = tl.arange(0, N)
    lower = one(axes, Y, PIECE_LOWER, piece_y)
    scale = logit_scale
    factor = -0.5
    if LOSS:
        share = tl.load(total)
        share = tl.where(share == 0, 0.0, tl.load(grad_loss) / share)
        factor *= share
        scale *= share
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
        norms = square_norm(gram, (h, w), lower + row, j, wx, above, below, BETWEEN)
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
            if LOSS:
                # The first class has minus the sum of the others.
                if PAIR:
                    g = tl.load(grad + pixel, mask=inside, other=0.0)[None, :, :]
                    g = tl.where((c == 0)[:, None, None], -g, g)
                else:
                    g = tl.load(grad + (at - H * W), mask=mask & (c > 0)[:, None, None], other=0.0)
                    if first == 0:
                        others = tl.zeros((T_Y, T_X), tl.float32)
                        for k in range(C - 1):
                            there = wide(k, LONG) * (H * W) + pixel
                            others += tl.load(grad + there, mask=inside, other=0.0)
                        g = tl.where((c == 0)[:, None, None], -others[None, :, :], g)
            else:
                g = tl.load(grad + at, mask=mask, other=0.0)
            if ALL or (first == 0) & (first_place == 0):
                if LOSS:
                    radial = tl.load(scores + pixel, mask=inside, other=0.0)
                else:
                    radial = tl.sum(g * tl.load(scores + at, mask=mask, other=0.0), 0)
                if not ALL and not LOSS:
                    for k in range(CB, C):
                        there = wide(k, LONG) * (H * W) + pixel
                        more = tl.load(grad + there, mask=inside, other=0.0)
                        radial += more * tl.load(scores + there, mask=inside, other=0.0)
                radial *= factor * inverse * inverse
                own += tl.sum(radial * ((1 - wy) * (1 - wy)), 0)
                if BETWEEN_ROWS:
                    own_carry += tl.sum(radial * (wy * wy), 0)
                    across += tl.sum(radial * (2 * (1 - wy) * wy), 0)
            g *= inverse[None, :, :]
            if MEAN:
                won = g[:, None, :, :]
            else:
                won = tl.load(winners + at, mask=mask, other=0).to(tl.int32)
                won = won[:, None, :, :] == place[None, :, None, None]
                won = tl.where(won, g[:, None, :, :], 0.0)
            # Where pixels lie on locations the next row has no weight, and 0 times NaN is NaN.
            if BETWEEN_ROWS:
                high = tl.sum(won * wy[None, None, :, :], 2)
                here += tl.sum(won, 2) - high
                carry += high
            else:
                here += tl.sum(won, 2)
        # One product along x for all: the rows of the classes and places, then two of the maps.
        r = tl.arange(0, R)[:, None]
        maps = tl.where(r == 0, own[None, :], tl.where(r == 1, across[None, :], 0.0))
        sums = tl.join(here.reshape((R, T_X)), maps).permute(2, 0, 1).reshape((2 * R, T_X))
        classes = dot(sums, interpolate, DOT)
        maps = dot(sums, pairs, DOT)
        if spoilt(classes):
            classes = product_one_by_one(sums, interpolate)
            maps = product_one_by_one(sums, pairs)
        r = tl.arange(0, 2 * R)
        block = (first + r // PB) * P + first_place + r % PB
        used = (r < R) & (first + r // PB < C) & (first_place + r % PB < P)
        to = weights + row * runs_x
        at = wide(block, LONG)[:, None] * size + n[None, :]
        tl.store(to + at, scale * classes, mask=used[:, None] & (n < RX)[None, :])
        if ALL or (first == 0) & (first_place == 0):
            n2 = tl.arange(0, 2 * N)[None, :]
            number = (r[:, None] - R) * 2 + n2 // N
            to_maps = to + (wide(C * P + number, LONG) * size + n2 % N)
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
    table, length, B, Q, C, D, h, w, Gy, Gx, stride_b, stride_q, to_stride_b, to_stride_q,
    pieces_y, pieces_x, RY, RX, groups_y, groups_x, group_programs, splits, row_blocks,
    column_blocks, STRIDES: tl.constexpr, TO_STRIDES: tl.constexpr, EVEN: tl.constexpr,
    P: tl.constexpr, OX: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, M: tl.constexpr,
    GATHER_BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, GATHER_BD: tl.constexpr, REACH: tl.constexpr, PLACES: tl.constexpr,
    WHOLE: tl.constexpr, LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
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
            axes, (weights + (b * Q + q) * size, pieces_y * RY, pieces_x * RX),
            prototypes + b * windows * D, inverse_lengths + b * windows, (C, D, h, w, Gy, Gx),
            (pid // column_blocks % row_blocks * BI, pid % column_blocks * BJ),
            features + b * stride_b + q * stride_q, to + b * to_stride_b + q * to_stride_q,
            STRIDES, TO_STRIDES, EVEN, P, BI, BJ, BN, BD, REACH, OX, PLACES, True, LONG, DOT,
        )  # fmt: skip
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
                        axes, (weights + image * size, pieces_y * RY, pieces_x * RX), c * P,
                        window, region, features + b * stride_b + (image - b * Q) * stride_q,
                        start, D, STRIDES, EVEN, M, GATHER_BN, GATHER_BD, REACH, OX, PLACES,
                        LONG, DOT,
                    )  # fmt: skip
                mask = used[:, None] & (d < D)[None, :]
                at = row[:, None] * D + d[None, :]
                p = tl.load(prototypes + at, mask=mask, other=0.0)
                direction = p * inverse[:, None]
                if WHOLE or turn == 0:
                    along += tl.sum(acc * direction, 1)
                if turn == 1:
                    value = (acc - along[:, None] * direction) * inverse[:, None]
                    tl.store(to_prototypes + at, value, mask=mask)
