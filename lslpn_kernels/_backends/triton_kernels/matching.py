"""Cosine matching: dots and scores; backward, weights and the two products.

Nothing is ever interpolated to image resolution but classes. Between dots and scores lie

    dots  [image, C, NY, NX, h, w]: <F(i, j), q_{c,m}> for the windows m near a location, those over
          a pixel that is interpolated from it. NY x NX of them are near a location at most; the
          window (my, mx) is at (my % NY, mx % NX).
    gram  [image, 4, h, w]: |F|^2; products with the right and with the lower neighbour; the mean of
          those of both diagonals of the cell to the lower right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import shared
from .products import Weights, gather, group_of, scatter
from .shared import Features, X, Y, inverse_length, load_channels, load_features, look, span


@triton.jit
def _store_gram(f, gram, G: tl.constexpr, corner):
    """The Gram maps of a block. Beyond the edges, where no pixel asks for them, a location is its
    own neighbour."""
    BK: tl.constexpr = 8 if f.STRIDES[0] > 1 else 16  # with more channels, registers spill
    i, j, inside, location = shared.locations_of(G, corner)
    below, right = tl.minimum(i + 1, G.y.cells - 1), tl.minimum(j + 1, G.x.cells - 1)
    square = tl.zeros((BK, i.shape[0]), tl.float32)
    along, down, across = square, square, square
    for start in range(0, f.D, BK):
        own = load_features(f, location, start, BK, True).to(tl.float32)
        to_right = load_features(f, (location[0], right), start, BK, True).to(tl.float32)
        lower = load_features(f, (below, location[1]), start, BK, True).to(tl.float32)
        diagonal = load_features(f, (below, right), start, BK, True).to(tl.float32)
        square += own * own
        along += own * to_right
        down += own * lower
        across += own * diagonal + to_right * lower
    to = gram + (i * G.x.cells + j)
    tl.store(to, tl.sum(square, 0), mask=inside)
    tl.store(to + G.cells, tl.sum(along, 0), mask=inside)
    tl.store(to + 2 * G.cells, tl.sum(down, 0), mask=inside)
    tl.store(to + 3 * G.cells, 0.5 * tl.sum(across, 0), mask=inside)


@triton.jit
def dots_kernel(
    features, prototypes, dots, gram, table, Q, C, stride_b, stride_q, G: tl.constexpr,
    D: tl.constexpr, STRIDES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BI x BJ locations and all windows near them."""
    image, corner = shared.block_of(tl.program_id(0), G)
    features += image // Q * stride_b + image % Q * stride_q
    prototypes += image // Q * C * G.windows * D
    dots += image * C * G.near * G.cells
    gram += image * 4 * G.cells
    _store_gram(Features(features, D, STRIDES), gram, G, corner)

    i, j, inside, location = shared.locations_of(G, corner)
    near = shared.windows_near(table, G, corner)
    y_near, y_last = span(table, G, Y, G.row.NEAR_FIRST, i, inside)
    x_near, x_last = span(table, G, X, G.row.NEAR_FIRST, j, inside)
    y_near, y_last, x_near, x_last = y_near[None], y_last[None], x_near[None], x_last[None]
    count = C * near[2] * near[3]
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        used = (n < count)[:, None]
        # Beyond the end the last one again.
        c, my, mx = shared.window_of(tl.minimum(n, count - 1), near)
        row = prototypes + ((c * G.y.windows + my) * G.x.windows + mx) * D
        acc = tl.zeros((BN, G.BI * G.BJ), tl.float32)
        squares = tl.zeros((BN, BK), tl.float32)
        for start in range(0, D, BK):
            f = load_features(Features(features, D, STRIDES), location, start, BK, True)
            d = tl.arange(0, BK)[None, :]
            p = load_channels((row + start)[:, None] + d, start + d, D, BK)
            acc += shared.dot(p, f)
            squares += p * p
        acc *= inverse_length(tl.sum(squares, 1))[:, None]
        c, my, mx = c[:, None], my[:, None], mx[:, None]
        used &= (my >= y_near) & (my <= y_last) & (mx >= x_near) & (mx <= x_last)
        slot = (c * G.y.near + my % G.y.near) * G.x.near + mx % G.x.near
        tl.store(dots + (slot * G.cells + (i * G.x.cells + j)[None, :]), acc, mask=used)


@triton.jit
def _square_along(at, G: tl.constexpr, wx, mask):
    """From a map of squares and the next one, of products with the right neighbour."""
    right = mask & (wx > 0)
    total = (1 - wx) * (1 - wx) * tl.load(at, mask=mask, other=0.0)
    total += wx * wx * tl.load(at + 1, mask=right, other=0.0)
    return total + 2 * (1 - wx) * wx * tl.load(at + G.cells, mask=right, other=0.0)


@triton.jit
def square_norm(gram, G: tl.constexpr, i, j, wx, mask, below):
    """|Up F|^2 between rows of locations i and i + 1: what the upper row, the lower row and the
    products between them give, each as interpolated along x from the locations j and j + 1.
    ``w^T G w`` with the four taps' weights w and Gram matrix G, from the maps of one image.
    `below` masks the lower row."""
    at = gram + i * G.x.cells + j
    row = _square_along(at, G, wx, mask)
    next_row = _square_along(at + G.x.cells, G, wx, below)
    return row, next_row, _square_along(at + 2 * G.cells, G, wx, below)


@triton.jit
def _cross_entropy(
    slopes,  # of this image: there are the logits of the classes 1 .. C - 1, less that of class 0
    radial, labels, class_weights, pixel, mask, C, size, ignore_index,
):  # fmt: skip
    """Of a block of pixels: writes what `gpu_match` says, and returns the sums of the losses and of
    the weights."""
    y = tl.load(labels + pixel, mask=mask, other=0)
    counts = mask & (y != ignore_index)
    known = (y >= 0) & (y < C)
    y = tl.where(known, y, 0).to(tl.int32)
    weight = tl.full(y.shape, 1.0, tl.float32)
    if class_weights is not None:
        weight = tl.load(class_weights + y)
    weight = tl.where(counts, tl.where(known, weight, float("nan")), 0.0)
    most = tl.zeros(y.shape, tl.float32)
    right = most
    total = most + 1.0
    for c in range(1, C):
        z = tl.load(slopes + ((c - 1) * size + pixel), mask=mask, other=0.0)
        above = tl.maximum(most, z)
        total = total * tl.exp(most - above) + tl.exp(z - above)
        most = above
        right = tl.where(y == c, z, right)
    # A sum of exponentials is positive, or NaN.
    loss = tl.where(counts, weight * (tl.log(total) + (most - right)), 0.0)
    share = weight / total
    along = tl.zeros(y.shape, tl.float32)
    for c in range(1, C):
        at = slopes + ((c - 1) * size + pixel)
        z = tl.load(at, mask=mask, other=0.0)
        slope = share * tl.exp(z - most) - tl.where(y == c, weight, 0.0)
        along += slope * z  # the slopes of all classes add up to 0
        tl.store(at, slope, mask=mask)
    tl.store(radial + pixel, along, mask=mask)
    return tl.sum(tl.sum(loss, 1), 0), tl.sum(tl.sum(weight, 1), 0)


@triton.jit
def scores_kernel(
    dots, gram, scores, winners, table, logit_scale, radial, labels, class_weights, sums,
    ignore_index, C, G: tl.constexpr, T: tl.constexpr, BX: tl.constexpr, MEAN: tl.constexpr,
    WINNERS: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """One program: BX columns of a strip of up to T rows, all classes. LOSS: in place of scores the
    slopes of their cross-entropy, and of each program the sums of losses and of weights."""
    BLOCKS: tl.constexpr = (G.x.pixels + BX - 1) // BX
    OX: tl.constexpr = G.x.overlap
    pid = tl.program_id(0)
    strip = pid // BLOCKS % G.y.strips
    image = (pid // (BLOCKS * G.y.strips)).to(tl.int64)

    x = pid % BLOCKS * BX + tl.arange(0, BX)
    x_in = x < G.x.pixels
    j = look(table, G, X, G.row.LOWER, x, x_in)
    wx = shared.look_weight(table, G, X, x, x_in)
    x_first, x_last = span(table, G, X, G.row.FIRST, x, x_in)
    begin, end = span(table, G, Y, G.row.STRIP_BEGIN, strip)
    i = look(table, G, Y, G.row.LOWER, begin)
    y_first, y_last = span(table, G, Y, G.row.FIRST, begin)
    y = begin + tl.arange(0, T)
    wy = shared.look_weight(table, G, Y, y, y < end)
    # Weights grow along a strip: where the last is 0, the next row of locations is not near.
    next_row = look(table, G, Y, G.row.WEIGHT, end - 1) != 0

    # What depends on columns alone is computed for both rows of locations, then for the T rows.
    at = gram + image * 4 * G.cells
    row, row_below, across = square_norm(at, G, i, j, wx, x_in, x_in & next_row)
    square = ((1 - wy) * (1 - wy))[:, None] * row[None, :]
    square += (wy * wy)[:, None] * row_below[None, :]
    square += (2 * (1 - wy) * wy)[:, None] * across[None, :]
    inverse = logit_scale * inverse_length(square)
    if MEAN:
        inverse /= ((y_last - y_first + 1) * (x_last - x_first + 1)).to(tl.float32)[None, :]

    to_right = x_in & (wx > 0)
    at = dots + image * C * G.near * G.cells + (i * G.x.cells + j)
    scores += image * (C - 1 if LOSS else C) * G.pixels
    winners += image * C * G.pixels
    pixel = (y * G.x.pixels)[:, None] + x[None, :]
    mask = (y < end)[:, None] & x_in[None, :]
    first = tl.zeros((T, BX), tl.float32)
    for c in range(C):
        best = tl.full((T, BX), 0.0 if MEAN else float("-inf"), tl.float32)
        place = tl.zeros((T, BX), tl.int32)
        for number in range(y_last - y_first + 1):
            slot = (c * G.y.near + (y_first + number) % G.y.near) * G.x.near
            for step in tl.range(0, OX, loop_unroll_factor=OX if OX <= 4 else 1):
                near = x_first + step <= x_last
                both = near & to_right
                here = at + (slot + (x_first + step) % G.x.near) * G.cells
                top = tl.load(here, mask=near, other=0.0)
                top += wx * (tl.load(here + 1, mask=both, other=0.0) - top)
                here += G.x.cells
                low = tl.load(here, mask=near & next_row, other=0.0)
                low += wx * (tl.load(here + 1, mask=both & next_row, other=0.0) - low)
                if MEAN:
                    best += top[None, :] + wy[:, None] * (low - top)[None, :]
                else:
                    # Strictly greater: of equal windows the lowest stays. NaN stays NaN, and the
                    # gradient goes to the window that is to blame.
                    slope = low - top
                    top = tl.where(near, top, float("-inf"))
                    value = top[None, :] + wy[:, None] * slope[None, :]
                    won = (value > best) | (value != value)
                    place = tl.where(won, number * OX + step, place)
                    best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        score = best * inverse
        if LOSS:
            first = tl.where(c == 0, score, first)
            tl.store(scores + ((c - 1) * G.pixels + pixel), score - first, mask=mask & (c > 0))
        else:
            tl.store(scores + (c * G.pixels + pixel), score, mask=mask)
        if WINNERS:
            won = place.to(winners.dtype.element_ty)
            tl.store(winners + (c * G.pixels + pixel), won, mask=mask)
    if LOSS:
        tl.debug_barrier()  # what one thread has written, another may read
        loss, total = _cross_entropy(
            scores, radial + image * G.pixels, labels + image * G.pixels, class_weights, pixel,
            mask, C, G.pixels, ignore_index,
        )  # fmt: skip
        tl.store(sums + 2 * pid, loss)
        tl.store(sums + 2 * pid + 1, total)


# Backward


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
def _store_maps(to, sums, pairs, G: tl.constexpr, N: tl.constexpr, more):
    """Two Gram maps of a run, from sums of pixels in each column. `more`: to be added."""
    n = tl.arange(0, 2 * N)
    to += n // N * G.runs + n % N
    mask = n % N < G.x.piece_cells
    maps = tl.sum(tl.where(pairs != 0, pairs * sums[:, None], 0.0), 0)
    maps += tl.load(to, mask=mask & more, other=0.0)
    tl.store(to, maps, mask=mask)


@triton.jit
def match_weights_kernel(
    grad,  # LOSS: the slopes
    scores,  # LOSS: the radial parts
    winners, gram, prototypes, inverse_lengths, weights, table, logit_scale,
    grad_loss,  # the loss's, and the sum of its weights: numbers
    total, C, rows, row_programs, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    T_Y: tl.constexpr, T_X: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    MEAN: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """One program: a tile, CB classes and PB of their P places at a time; the first `row_programs`
    take the lengths of 16 prototypes each instead.

    The blocks of the classes hold `logit_scale` times the sums of dS / |Up F| (of MEAN: of all
    windows alike, divided by their number). S = <Up F, q> / |Up F|, hence those of the Gram maps:
    d|Up F|^2 = -1/2 sum_c dS S / |Up F|^2, twice, as F is on both sides of their products.
    """
    tile = tl.program_id(0) - row_programs
    if tile < 0:
        _inverse_lengths(prototypes, inverse_lengths, tl.program_id(0) * 16, rows, D)
        return
    image, piece_y, piece_x, runs = shared.tile_of(tile, G)
    grad += image * (C - 1 if LOSS else C) * G.pixels
    scores += image * (1 if LOSS else C) * G.pixels
    winners += image * C * G.pixels
    gram += image * 4 * G.cells
    weights += image * (C * P + 4) * G.runs + runs
    x, x_in, j, column, wx = shared.tile_columns(table, G, piece_x, T_X)
    first_row, last_row = span(table, G, Y, G.row.PIECE_LOWER, piece_y)
    share = 1.0
    if LOSS:
        share = tl.load(total)
        share = tl.where(share == 0, 0.0, tl.load(grad_loss) / share)
    scale = logit_scale * share
    if MEAN:
        first_y, last_y = span(table, G, Y, G.row.PIECE_FIRST, piece_y)
        first_x, last_x = span(table, G, X, G.row.PIECE_FIRST, piece_x)
        scale /= ((last_y - first_y + 1) * (last_x - first_x + 1)).to(tl.float32)
    interpolate = shared.interpolation(column, 1 - wx, wx, N)
    # Of the Gram maps: |F|^2 or the lower neighbour, then the right neighbour or the diagonals.
    cross = shared.interpolation(column, (1 - wx) * wx, tl.zeros_like(wx), N)
    pairs = shared.interpolation(column, (1 - wx) * (1 - wx), wx * wx, N)
    pairs = tl.join(pairs, cross).permute(0, 2, 1).reshape((T_X, 2 * N))
    PLACES: tl.constexpr = (P + PB - 1) // PB
    for number in range((C + CB - 1) // CB * PLACES):
        c = number // PLACES * CB + tl.arange(0, CB)
        place = number % PLACES * PB + tl.arange(0, PB)
        carry = tl.zeros((CB, PB, T_X), tl.float32)
        own_carry = tl.zeros((T_X,), tl.float32)
        for row in range(last_row - first_row + 1):
            here, own = carry, own_carry
            carry = tl.zeros((CB, PB, T_X), tl.float32)
            own_carry = tl.zeros((T_X,), tl.float32)
            across = own_carry
            run_begin, end = span(table, G, Y, G.row.RUN_BEGIN, piece_y * G.y.piece_cells + row)
            # Weights grow along a run: where the last is 0, the next row of locations is not near.
            above = x_in & (run_begin < end)
            below = above & (look(table, G, Y, G.row.WEIGHT, tl.maximum(end - 1, 0)) != 0)
            norms = square_norm(gram, G, first_row + row, j, wx, above, below)
            for begin in range(run_begin, end, T_Y):
                y = begin + tl.arange(0, T_Y)
                wy = shared.look_weight(table, G, Y, y, y < end)[:, None]
                square = (1 - wy) * (1 - wy) * norms[0][None, :] + wy * wy * norms[1][None, :]
                inverse = inverse_length(square + 2 * (1 - wy) * wy * norms[2][None, :])
                pixel = (y * G.x.pixels)[:, None] + x[None, :]
                inside = (y < end)[:, None] & x_in[None, :]
                at = (c * G.pixels)[:, None, None] + pixel[None, :, :]
                mask = inside[None, :, :] & (c < C)[:, None, None]
                if LOSS:
                    # The first class has minus the sum of the others.
                    zeroth = (c == 0)[:, None, None]
                    g = tl.load(grad + (at - G.pixels), mask=mask & (zeroth == 0), other=0.0)
                    others = tl.zeros(pixel.shape, tl.float32)
                    for k in range(tl.where(number < PLACES, C - 1, 0)):
                        others += tl.load(grad + (k * G.pixels + pixel), mask=inside, other=0.0)
                    g = tl.where(zeroth, -others[None, :, :], g)
                    radial = tl.load(scores + pixel, mask=inside, other=0.0)
                else:
                    g = tl.load(grad + at, mask=mask, other=0.0)
                    radial = tl.sum(g * tl.load(scores + at, mask=mask, other=0.0), 0)
                radial *= -share * inverse * inverse
                own += tl.sum(radial * ((1 - wy) * (1 - wy)), 0)
                g = (g * inverse[None, :, :])[:, None, :, :]
                if not MEAN:
                    won = tl.load(winners + at, mask=mask, other=0).to(tl.int32)
                    won = won[:, None, :, :] == place[None, :, None, None]
                    g = tl.where(won, g, 0.0)
                # Where pixels lie on locations the next row has no weight, and 0 times NaN is NaN.
                if G.y.between:
                    high = tl.sum(g * wy[None, None, :, :], 2)
                    here += tl.sum(g, 2) - high
                    carry += high
                    own_carry += tl.sum(radial * (wy * wy), 0)
                    across += tl.sum(radial * ((1 - wy) * wy), 0)
                else:
                    here += tl.sum(g, 2)
            # Products along x.
            here = here.reshape((CB * PB, T_X))
            sums = shared.dot(here, interpolate)
            if shared.spoilt(sums):
                sums = shared.product(here, interpolate, (interpolate != 0)[None, :, :], True)
            r, n = tl.arange(0, CB * PB), tl.arange(0, N)
            to = weights + row * G.x.runs
            to_r = (number // PLACES * CB + r // PB) * P + number % PLACES * PB + r % PB
            used = (number // PLACES * CB + r // PB < C) & (number % PLACES * PB + r % PB < P)
            mask = used[:, None] & (n < G.x.piece_cells)[None, :]
            tl.store(to + ((to_r * G.runs)[:, None] + n[None, :]), scale * sums, mask=mask)
            # The radial parts of a loss are those of all classes.
            if number == 0 if LOSS else number % PLACES == 0:
                _store_maps(to + C * P * G.runs, own, pairs, G, N, number > 0)
                _store_maps(to + (C * P + 2) * G.runs, across, pairs, G, N, number > 0)
        tl.debug_barrier()  # the next classes add to the Gram maps


@triton.jit
def match_backward_kernel(
    weights, features, prototypes, inverse_lengths, to, to_prototypes, table, B, Q, C, stride_b,
    stride_q, to_stride_b, to_stride_q, groups, splits, G: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, STRIDES: tl.constexpr, TO_STRIDES: tl.constexpr, GROUP: tl.constexpr,
    GATHER_BD: tl.constexpr, BD: tl.constexpr,
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
        q, corner = shared.block_of(pid - groups * splits, G)
        scatter(
            Weights(weights + q * size, table, G, P), prototypes, inverse_lengths, C, corner,
            Features(features + q * stride_q, D, STRIDES),
            Features(to + b * to_stride_b + q * to_stride_q, D, TO_STRIDES), BD,
        )  # fmt: skip
    else:
        split = pid // groups
        group = group_of(table, G, pid % groups, C, GROUP)
        _c, _window, number, used, _region = group
        inverse = tl.load(inverse_lengths + number, mask=used, other=0.0)
        to_prototypes += (split * B + b) * C * G.windows * D
        along = tl.zeros(number.shape, tl.float32)
        for start in range(0, D, GATHER_BD):
            acc = tl.zeros((number.shape[0], GATHER_BD), tl.float32)
            for n in range(split * Q // splits, (split + 1) * Q // splits):
                q = tl.cast(n, tl.int64)
                acc += gather(
                    Weights(weights + q * size, table, G, P), group,
                    Features(features + q * stride_q, D, STRIDES), start, GATHER_BD,
                )  # fmt: skip
            d = start + tl.arange(0, GATHER_BD)[None, :]
            at = (number * D)[:, None] + d
            p = load_channels(prototypes + at, d, D, GATHER_BD, used[:, None])
            along += tl.sum(acc * (p * inverse[:, None]), 1)
            tl.store(to_prototypes + at, acc, mask=used[:, None] & (d < D))
        tl.debug_barrier()
        # These were dq. dp = (dq - <q, dq> q) / |p| asks for all channels.
        for start in range(0, D, 64):
            d = start + tl.arange(0, 64)[None, :]
            at = (number * D)[:, None] + d
            p = load_channels(prototypes + at, d, D, 64, used[:, None])
            dq = load_channels(to_prototypes + at, d, D, 64, used[:, None])
            dp = (dq - along[:, None] * (p * inverse[:, None])) * inverse[:, None]
            tl.store(to_prototypes + at, dp, mask=used[:, None] & (d < D))
