"""Cosine matching, backward: `match_weights_kernel`, then `match_backward_kernel`.

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
    X,
    Y,
    any_product,
    block_of,
    dot,
    interpolation,
    inverse_length,
    load_channels,
    look,
    look_weight,
    part_of,
    span,
    spoilt,
    tile_columns,
)


@triton.jit
def _inverse_lengths(prototypes, inverse_lengths, first, rows, D: tl.constexpr):
    """1 / |p| of 16 prototypes."""
    row = first + tl.arange(0, 16)
    at = prototypes + row.to(tl.int64)[:, None] * D
    total = tl.zeros((16, 64), tl.float32)
    for start in range(0, D, 64):
        d = start + tl.arange(0, 64)[None, :]
        p = load_channels(at + d, d, D, 64, (row < rows)[:, None])
        total += p * p
    tl.store(inverse_lengths + row, inverse_length(tl.sum(total, 1)), mask=row < rows)


@triton.jit
def _gradients(
    grad, scores, G: tl.constexpr, pixel, inside, c, C, LOSS: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """dS of a block of pixels, [classes, rows, columns], 0 outside, and its sum times S."""
    at = (c * G.pixels)[:, None, None] + pixel[None, :, :]
    mask = inside[None, :, :] & (c < C)[:, None, None]
    zeroth = (c == 0)[:, None, None]
    if not LOSS:
        g = tl.load(grad + at, mask=mask, other=0.0)
        return g, tl.sum(g * tl.load(scores + at, mask=mask, other=0.0), 0)
    # The first class has minus the sum of the others.
    elif PAIR:
        g = tl.load(grad + pixel, mask=inside, other=0.0)[None, :, :]
        g = tl.where(zeroth, -g, g)
    else:
        g = tl.load(grad + (at - G.pixels), mask=mask & (zeroth == 0), other=0.0)
        others = tl.zeros(pixel.shape, tl.float32)
        for k in range(tl.where(tl.min(c, 0) == 0, C - 1, 0)):
            others += tl.load(grad + (k * G.pixels + pixel), mask=inside, other=0.0)
        g = tl.where(zeroth, -others[None, :, :], g)
    return g, tl.load(scores + pixel, mask=inside, other=0.0)


@triton.jit
def _dot_of_parts(a, b, DOT: tl.constexpr):
    """`dot` without the terms in which b is 0: NaN where another one has an a that is not
    finite."""
    finite = a * 0 == 0
    product = dot(tl.where(finite, a, 0.0), b, DOT)
    return tl.where(any_product(finite == 0, b != 0), float("nan"), product)


@triton.jit
def _sum_tile(
    grad, scores, winners, gram, weights, table, G: tl.constexpr, P: tl.constexpr, C, first,
    first_place, piece_y, columns, cells, interpolate, pairs, scale, factor,
    CB: tl.constexpr, PB: tl.constexpr, T_Y: tl.constexpr, MEAN: tl.constexpr,
    LOSS: tl.constexpr, PAIR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """CB classes from `first` on, PB of their places from `first_place` on."""
    x, x_in, j, wx = columns
    T_X: tl.constexpr = interpolate.shape[0]
    N: tl.constexpr = interpolate.shape[1]
    R: tl.constexpr = CB * PB
    measures = (first_place == 0) & (first == 0) if LOSS else first_place == 0
    c = first + tl.arange(0, CB)
    place = first_place + tl.arange(0, PB)
    carry = tl.zeros((CB, PB, T_X), tl.float32)
    own_carry = tl.zeros((T_X,), tl.float32)
    for row in range(cells[1] - cells[0] + 1):
        here = carry
        carry = tl.zeros((CB, PB, T_X), tl.float32)
        own = own_carry
        own_carry = tl.zeros((T_X,), tl.float32)
        across = tl.zeros((T_X,), tl.float32)
        run_begin, end = span(table, G, Y, G.row.RUN_BEGIN, piece_y * G.y.piece_cells + row)
        # Weights grow along a run: where the last is 0, the next row of locations is not near.
        above = x_in & (run_begin < end)
        below = above & (look(table, G, Y, G.row.WEIGHT, tl.maximum(end - 1, 0)) != 0)
        norms = square_norm(gram, G, cells[0] + row, j, wx, above, below)
        for begin in range(run_begin, end, T_Y):
            y = begin + tl.arange(0, T_Y)
            y_in = y < end
            wy = look_weight(table, G, Y, y, y_in)[:, None]
            square = (1 - wy) * (1 - wy) * norms[0][None, :] + wy * wy * norms[1][None, :]
            square += 2 * (1 - wy) * wy * norms[2][None, :]
            inverse = inverse_length(square)
            pixel = (y * G.x.pixels)[:, None] + x[None, :]
            inside = y_in[:, None] & x_in[None, :]
            g, radial = _gradients(grad, scores, G, pixel, inside, c, C, LOSS, PAIR)
            radial *= factor * inverse * inverse
            own += tl.sum(radial * ((1 - wy) * (1 - wy)), 0)
            g *= inverse[None, :, :]
            if MEAN:
                won = g[:, None, :, :]
            else:
                at = (c * G.pixels)[:, None, None] + pixel[None, :, :]
                mask = inside[None, :, :] & (c < C)[:, None, None]
                won = tl.load(winners + at, mask=mask, other=0).to(tl.int32)
                won = won[:, None, :, :] == place[None, :, None, None]
                won = tl.where(won, g[:, None, :, :], 0.0)
            # Where pixels lie on locations the next row has no weight, and 0 times NaN is NaN.
            if G.y.between:
                high = tl.sum(won * wy[None, None, :, :], 2)
                here += tl.sum(won, 2) - high
                carry += high
                own_carry += tl.sum(radial * (wy * wy), 0)
                across += tl.sum(radial * (2 * (1 - wy) * wy), 0)
            else:
                here += tl.sum(won, 2)
        # One product along x for all: the rows of the classes and places, then two of the maps.
        r = tl.arange(0, R)[:, None]
        maps = tl.where(r == 0, own[None, :], tl.where(r == 1, across[None, :], 0.0))
        sums = tl.join(here.reshape((R, T_X)), maps).permute(2, 0, 1).reshape((2 * R, T_X))
        classes = dot(sums, interpolate, DOT)
        maps = dot(sums, pairs, DOT)
        if spoilt(classes):
            classes = _dot_of_parts(sums, interpolate, DOT)
            maps = _dot_of_parts(sums, pairs, DOT)
        r = tl.arange(0, 2 * R)
        n = tl.arange(0, N)
        block = (first + r // PB) * P + first_place + r % PB
        used = (r < R) & (first + r // PB < C) & (first_place + r % PB < P)
        to = weights + row * G.x.runs
        to_block = to + ((block * G.runs)[:, None] + n[None, :])
        mask = used[:, None] & (n < G.x.piece_cells)[None, :]
        tl.store(to_block, scale * classes, mask=mask)
        if measures:
            n2 = tl.arange(0, 2 * N)[None, :]
            number = (r[:, None] - R) * 2 + n2 // N
            to_maps = to + ((C * P + number) * G.runs + n2 % N)
            mapped = (number >= 0) & (number < 4) & (n2 % N < G.x.piece_cells)
            maps *= tl.where(number == 3, 0.5, 1.0)
            if first > 0:
                maps += tl.load(to_maps, mask=mapped, other=0.0)
            tl.store(to_maps, maps, mask=mapped)


@triton.jit
def match_weights_kernel(
    grad,  # [B, Q, C, H, W]; LOSS: the slopes, [B, Q, C - 1, H, W]
    scores,  # [B, Q, C, H, W]; LOSS: the radial parts, [B, Q, H, W]
    winners,  # [B, Q, C, H, W]
    gram, prototypes,
    inverse_lengths,  # [B, C, Gy, Gx]: 1 / |p|
    weights, table, logit_scale,
    grad_loss,  # of the loss, and the sum of its weights: numbers
    total, C, rows, row_programs, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    T_Y: tl.constexpr, T_X: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    MEAN: tl.constexpr, LOSS: tl.constexpr, PAIR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: a tile, CB classes and PB of their P places at a time; the first `row_programs`
    take the lengths of 16 prototypes each instead.

    The blocks of the classes hold `logit_scale` times the sums of dS / |Up F| (of MEAN: of all
    windows alike, divided by their number). S = <Up F, q> / |Up F|, hence those of the Gram maps:
    d|Up F|^2 = -1/2 sum_c dS S / |Up F|^2.
    """
    tile = tl.program_id(0) - row_programs
    if tile < 0:
        _inverse_lengths(prototypes, inverse_lengths, tl.program_id(0) * 16, rows, D)
        return
    piece_x = tile % G.x.pieces
    piece_y = tile // G.x.pieces % G.y.pieces
    image = (tile // G.tiles).to(tl.int64)
    grad += image * (C - 1 if LOSS else C) * G.pixels
    scores += image * (1 if LOSS else C) * G.pixels
    winners += image * C * G.pixels
    gram += image * 4 * G.cells
    weights += image * (C * P + 4) * G.runs
    weights += piece_y * G.y.piece_cells * G.x.runs + piece_x * G.x.piece_cells
    x, x_in, j, wx = tile_columns(table, G, piece_x, T_X)
    column = j - look(table, G, X, G.row.PIECE_LOWER, piece_x)
    cells = span(table, G, Y, G.row.PIECE_LOWER, piece_y)
    scale = logit_scale
    factor = -0.5
    if LOSS:
        share = tl.load(total)
        share = tl.where(share == 0, 0.0, tl.load(grad_loss) / share)
        factor *= share
        scale *= share
    if MEAN:
        first_y, last_y = span(table, G, Y, G.row.PIECE_FIRST, piece_y)
        first_x, last_x = span(table, G, X, G.row.PIECE_FIRST, piece_x)
        scale /= ((last_y - first_y + 1) * (last_x - first_x + 1)).to(tl.float32)
    interpolate = interpolation(column, 1 - wx, wx, N)
    # Of the Gram maps: |F|^2 or the lower neighbour, then the right neighbour or the diagonals.
    cross = interpolation(column, 2 * (1 - wx) * wx, tl.zeros_like(wx), N)
    pairs = interpolation(column, (1 - wx) * (1 - wx), wx * wx, N)
    pairs = tl.join(pairs, cross).permute(0, 2, 1).reshape((T_X, 2 * N))
    for first in range(0, C, CB):
        for first_place in range(0, P, PB):
            _sum_tile(
                grad, scores, winners, gram, weights, table, G, P, C, first, first_place, piece_y,
                (x, x_in, j, wx), cells, interpolate, pairs, scale, factor, CB, PB, T_Y,
                MEAN, LOSS, PAIR, DOT,
            )  # fmt: skip
        tl.debug_barrier()  # the next classes add to the Gram maps


@triton.jit
def match_backward_kernel(
    weights,
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    inverse_lengths,  # [B, C, Gy, Gx]
    to,  # gradient of the features, any strides
    to_prototypes,  # gradient of the prototypes, or a part of it for each of `splits` parts of Q
    table, B, Q, C, stride_b, stride_q, to_stride_b, to_stride_q, groups, splits,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, STRIDES: tl.constexpr,
    TO_STRIDES: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, GATHER_BN: tl.constexpr,
    M: tl.constexpr, GATHER_BD: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of each episode, first the programs for its prototypes, a group of windows each; then those
    for its features, BI x BJ locations each. All channels, BD or GATHER_BD at a time."""
    pid = tl.program_id(0)
    size = (C * P + 4) * G.runs
    programs = groups * splits + Q * G.blocks
    b = (pid // programs).to(tl.int64)
    pid = pid % programs
    prototypes += b * C * G.windows * D
    inverse_lengths += b * C * G.windows
    features += b * stride_b
    weights += b * Q * size
    if pid >= groups * splits:
        q, corner = block_of(pid - groups * splits, G)
        scatter(
            weights + q * size, table, G, P, prototypes, inverse_lengths, C, corner,
            features + q * stride_q, to + b * to_stride_b + q * to_stride_q, D, STRIDES,
            TO_STRIDES, BN, BD, True, DOT,
        )  # fmt: skip
    else:
        split = pid // groups
        c, window, number, used, region = group_of(table, G, pid % groups, C, GY, GX, GATHER_BN)
        inverse = tl.load(inverse_lengths + number, mask=used, other=0.0)
        first, last = part_of(split, splits, Q)
        to_prototypes += (split * B + b) * C * G.windows * D
        # dp = (dq - <q, dq> q) / |p| asks for all channels before any can be written: where a
        # block does not have them, a first turn takes <q, dq> alone.
        along = tl.zeros((GATHER_BN,), tl.float32)
        for turn in range(1 if GATHER_BD >= D else 0, 2):
            for start in range(0, D, GATHER_BD):
                acc = tl.zeros((GATHER_BN, GATHER_BD), tl.float32)
                for q in range(first, last):
                    acc += gather(
                        weights + tl.cast(q, tl.int64) * size, table, G, P, c, window, region,
                        features + tl.cast(q, tl.int64) * stride_q, start, D, STRIDES,
                        (GATHER_BN, M, GATHER_BD), DOT,
                    )  # fmt: skip
                d = start + tl.arange(0, GATHER_BD)[None, :]
                at = (number * D)[:, None] + d
                p = load_channels(prototypes + at, d, D, GATHER_BD, used[:, None])
                direction = p * inverse[:, None]
                if GATHER_BD >= D or turn == 0:
                    along += tl.sum(acc * direction, 1)
                if turn == 1:
                    value = (acc - along[:, None] * direction) * inverse[:, None]
                    tl.store(to_prototypes + at, value, mask=used[:, None] & (d < D))
