"""Cosine matching, forward: `dots_kernel`, then `scores_kernel`.

Nothing is ever interpolated to image resolution but classes. Between the two lie

    dots  [image, C, NY, NX, h, w]: <F(i, j), q_{c,m}> for the windows m near a location, those over
          a pixel that is interpolated from it, from the first of these on.
    gram  [image, 4, h, w]: |F|^2; products with the right and with the lower neighbour; the sum of
          those of both diagonals of the cell to the lower right.
"""

# mypy: ignore-errors
# (device code: Triton's own language, in Python's syntax)

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    X,
    Y,
    block_of,
    dot,
    inverse_length,
    load_channels,
    load_features,
    look,
    look_weight,
    span,
    window_of,
    windows_near,
)


@triton.jit
def _store_gram(
    features, gram, corner, G: tl.constexpr, D: tl.constexpr, STRIDES: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The Gram maps of BI x BJ locations, 2 x 2 at a time: nine are read for four. Beyond the
    edges, where no pixel asks for them, a location is its own neighbour."""
    n = tl.arange(0, G.BI * G.BJ // 4)
    i = corner[0] + n // (G.BJ // 2) * 2
    j = corner[1] + n % (G.BJ // 2) * 2
    at = ()
    for k in tl.static_range(9):
        row = tl.minimum(i + k // 3, G.y.cells - 1) * STRIDES[1]
        at += (features + (row + tl.minimum(j + k % 3, G.x.cells - 1) * STRIDES[2]),)
    sums = ()
    for _ in tl.static_range(16):
        sums += (tl.zeros((BK, G.BI * G.BJ // 4), tl.float32),)
    for start in range(0, D, BK):
        f = ()
        for k in tl.static_range(9):
            f += (load_features(at[k], start, D, STRIDES, BK, True).to(tl.float32),)
        added = ()
        for k in tl.static_range(4):
            own, right, lower = f[k + k // 2], f[k + k // 2 + 1], f[k + k // 2 + 3]
            added += (
                sums[4 * k] + own * own,
                sums[4 * k + 1] + own * right,
                sums[4 * k + 2] + own * lower,
                sums[4 * k + 3] + own * f[k + k // 2 + 4] + right * lower,
            )
        sums = added
    for k in tl.static_range(4):
        own = (i + k // 2) * G.x.cells + j + k % 2
        inside = (i + k // 2 < G.y.cells) & (j + k % 2 < G.x.cells)
        for m in tl.static_range(4):
            tl.store(gram + m * G.cells + own, tl.sum(sums[4 * k + m], 0), mask=inside)


@triton.jit
def dots_kernel(
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    dots, gram, table, Q, C, stride_b, stride_q, G: tl.constexpr, D: tl.constexpr,
    STRIDES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GRAM_BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BI x BJ locations and all windows near them."""
    image, corner = block_of(tl.program_id(0), G)
    features += image // Q * stride_b + image % Q * stride_q
    prototypes += image // Q * C * G.windows * D
    dots += image * C * G.near * G.cells
    _store_gram(features, gram + image * 4 * G.cells, corner, G, D, STRIDES, GRAM_BK)

    near = windows_near(table, G, corner)
    cell = tl.arange(0, G.BI * G.BJ)
    i = corner[0] + cell // G.BJ
    j = corner[1] + cell % G.BJ
    inside = (i < G.y.cells) & (j < G.x.cells)
    y_near, y_last = span(table, G, Y, G.row.NEAR_FIRST, i, inside)
    x_near, x_last = span(table, G, X, G.row.NEAR_FIRST, j, inside)
    y_near, y_last, x_near, x_last = y_near[None], y_last[None], x_near[None], x_last[None]
    at = features + tl.minimum(i, G.y.cells - 1) * STRIDES[1]
    at += tl.minimum(j, G.x.cells - 1) * STRIDES[2]
    count = C * near[2] * near[3]
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        used = (n < count)[:, None]
        c, my, mx = window_of(tl.minimum(n, count - 1), near)  # beyond the end the last one again
        row = prototypes + ((c * G.y.windows + my) * G.x.windows + mx) * D
        acc = tl.zeros((BN, G.BI * G.BJ), tl.float32)
        squares = tl.zeros((BN, BK), tl.float32)
        for start in range(0, D, BK):
            f = load_features(at, start, D, STRIDES, BK, True)
            d = tl.arange(0, BK)[None, :]
            p = load_channels((row + start)[:, None] + d, start + d, D, BK)
            acc += dot(p, f, DOT)
            squares += p * p
        acc *= inverse_length(tl.sum(squares, 1))[:, None]
        c, my, mx = c[:, None], my[:, None], mx[:, None]
        used &= (my >= y_near) & (my <= y_last) & (mx >= x_near) & (mx <= x_last)
        slot = ((c * G.y.near + my) * G.x.near + mx) - (y_near * G.x.near + x_near)
        tl.store(dots + (slot * G.cells + (i * G.x.cells + j)[None, :]), acc, mask=used)


@triton.jit
def square_norm(gram, G: tl.constexpr, i, j, wx, mask, below):
    """|Up F|^2 between rows of locations i and i + 1: what the upper row, the lower row and the
    products between them give, each as interpolated along x from the locations j and j + 1.
    ``w^T G w`` with the four taps' weights w and Gram matrix G, from the maps of one image.
    `below` masks the lower row."""
    at = gram + i * G.x.cells + j
    right = mask & (wx > 0)
    square, up, product = (1 - wx) * (1 - wx), wx * wx, (1 - wx) * wx
    row = square * tl.load(at, mask=mask, other=0.0)
    row += up * tl.load(at + 1, mask=right, other=0.0)
    row += 2 * product * tl.load(at + G.cells, mask=right, other=0.0)
    next_row = square * tl.load(at + G.x.cells, mask=below, other=0.0)
    next_row += up * tl.load(at + G.x.cells + 1, mask=right & below, other=0.0)
    next_row += 2 * product * tl.load(at + G.cells + G.x.cells, mask=right & below, other=0.0)
    across = square * tl.load(at + 2 * G.cells, mask=below, other=0.0)
    across += up * tl.load(at + 2 * G.cells + 1, mask=right & below, other=0.0)
    across += product * tl.load(at + 3 * G.cells, mask=right & below, other=0.0)
    return row, next_row, across


@triton.jit
def _cross_entropy(
    first,  # logits of class 0 and of the last one
    last,
    slopes,  # of this image, with the logits of the classes 1 .. C - 1 if there are more than two
    radial, labels, class_weights, pixel, mask, C, size, ignore_index, PAIR: tl.constexpr,
):  # fmt: skip
    """Of a block of pixels: writes what `gpu_loss` says, and returns the sums of the losses and of
    the weights."""
    y = tl.load(labels + pixel, mask=mask, other=0)
    counts = mask & (y != ignore_index)
    known = (y >= 0) & (y < C)
    y = tl.where(known, y, 0).to(tl.int32)
    weight = tl.full(y.shape, 1.0, tl.float32)
    if class_weights is not None:
        weight = tl.load(class_weights + y)
    weight = tl.where(counts, tl.where(known, weight, float("nan")), 0.0)
    # Logits as seen from that of class 0.
    most = tl.zeros_like(first)
    right = most
    total = most + 1.0
    for c in range(1, 2 if PAIR else C):
        z = last if PAIR else tl.load(slopes + (c - 1) * size + pixel, mask=mask, other=0.0)
        z -= first
        above = tl.maximum(most, z)
        total = total * tl.exp(most - above) + tl.exp(z - above)
        most = above
        right = tl.where(y == c, z, right)
    # A sum of exponentials is positive, or NaN.
    loss = tl.where(counts, weight * (tl.log(total) + (most - right)), 0.0)
    share = weight / total
    along = tl.zeros_like(first)
    for c in range(1, 2 if PAIR else C):
        at = slopes + (c - 1) * size + pixel
        z = last if PAIR else tl.load(at, mask=mask, other=0.0)
        z -= first
        slope = share * tl.exp(z - most) - tl.where(y == c, weight, 0.0)
        along += slope * z  # the slopes of all classes add up to 0
        tl.store(at, slope, mask=mask)
    tl.store(radial + pixel, along, mask=mask)
    return tl.sum(tl.sum(loss, 1), 0), tl.sum(tl.sum(weight, 1), 0)


@triton.jit
def scores_kernel(
    dots, gram,
    scores,  # [B, Q, C, H, W]; LOSS: the slopes, [B, Q, C - 1, H, W]
    winners,  # [B, Q, C, H, W], uint8 or int32
    table, logit_scale,
    radial,  # of the loss, see `gpu_loss`: [B, Q, H, W]
    labels,  # [B, Q, H, W]
    class_weights,  # [C], or None
    sums,  # of each program: of the losses and of the weights of its pixels
    ignore_index, C, G: tl.constexpr, T: tl.constexpr, BX: tl.constexpr, MEAN: tl.constexpr,
    WINNERS: tl.constexpr, LOSS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """One program: BX columns of a strip of up to T rows, all classes. LOSS: the cross-entropy of
    the scores in place of these, of which no more than a PAIR are held in registers."""
    BLOCKS: tl.constexpr = (G.x.pixels + BX - 1) // BX
    OX: tl.constexpr = G.x.overlap
    pid = tl.program_id(0)
    strip = pid // BLOCKS % G.y.strips
    image = (pid // (BLOCKS * G.y.strips)).to(tl.int64)

    x = pid % BLOCKS * BX + tl.arange(0, BX)
    x_in = x < G.x.pixels
    j = look(table, G, X, G.row.LOWER, x, x_in)
    wx = look_weight(table, G, X, x, x_in)
    x_first, x_last = span(table, G, X, G.row.FIRST, x, x_in)
    begin, end = span(table, G, Y, G.row.STRIP_BEGIN, strip)
    i = look(table, G, Y, G.row.LOWER, begin)
    y_first, y_last = span(table, G, Y, G.row.FIRST, begin)
    y = begin + tl.arange(0, T)
    wy = look_weight(table, G, Y, y, y < end)
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

    # The dots of the first window of class 0, and from there to the next location of either axis:
    # its windows may begin with another one.
    to_right = x_in & (wx > 0)
    y_near = look(table, G, Y, G.row.NEAR_FIRST, i)
    x_near = look(table, G, X, G.row.NEAR_FIRST, j, x_in)
    at = (y_first - y_near) * G.x.near + x_first - x_near
    at = dots + image * C * G.near * G.cells + (at * G.cells + i * G.x.cells + j)
    right = 1 + (x_near - look(table, G, X, G.row.NEAR_FIRST, j + 1, to_right)) * G.cells
    y_near -= look(table, G, Y, G.row.NEAR_FIRST, i + 1, next_row)
    below = G.x.cells + y_near * (G.x.near * G.cells)

    scores += image * (C - 1 if LOSS else C) * G.pixels
    winners += image * C * G.pixels
    pixel = (y * G.x.pixels)[:, None] + x[None, :]
    mask = (y < end)[:, None] & x_in[None, :]
    first = tl.zeros((T, BX), tl.float32)
    last = first
    for c in range(C):
        best = tl.full((T, BX), 0.0 if MEAN else float("-inf"), tl.float32)
        place = tl.zeros((T, BX), tl.int32)
        for number in range(y_last - y_first + 1):
            dot = at + (c * G.y.near + number) * (G.x.near * G.cells)
            for step in tl.range(0, OX, loop_unroll_factor=OX if OX <= 4 else 1):
                near = x_first + step <= x_last
                both = near & to_right
                top = tl.load(dot, mask=near, other=0.0)
                top += wx * (tl.load(dot + right, mask=both, other=0.0) - top)
                low = tl.load(dot + below, mask=near & next_row, other=0.0)
                low += wx * (tl.load(dot + below + right, mask=both & next_row, other=0.0) - low)
                dot += G.cells
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
        last = best * inverse
        if not LOSS:
            tl.store(scores + (c * G.pixels + pixel), last, mask=mask)
        else:
            first = tl.where(c == 0, last, first)
            if not PAIR:
                tl.store(scores + ((c - 1) * G.pixels + pixel), last, mask=mask & (c > 0))
        if WINNERS:
            won = place.to(winners.dtype.element_ty)
            tl.store(winners + (c * G.pixels + pixel), won, mask=mask)
    if LOSS:
        if not PAIR:
            tl.debug_barrier()  # what one thread has written, another may read
        loss, total = _cross_entropy(
            first, last, scores, radial + image * G.pixels, labels + image * G.pixels,
            class_weights, pixel, mask, C, G.pixels, ignore_index, PAIR,
        )  # fmt: skip
        tl.store(sums + 2 * pid, loss)
        tl.store(sums + 2 * pid + 1, total)
