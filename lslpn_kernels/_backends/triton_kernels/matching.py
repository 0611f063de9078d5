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
    FIRST,
    LAST,
    LOWER,
    NEAR_FIRST,
    NEAR_LAST,
    STRIP_BEGIN,
    STRIP_END,
    WEIGHT,
    X,
    Y,
    dot,
    inverse_length,
    load_features,
    look,
    look_weight,
    one,
    wide,
    window_of,
    windows_near,
)


@triton.jit
def _neighbours(sums, f, k: tl.constexpr, BETWEEN: tl.constexpr):
    """What the k-th location of 2 x 2 adds to its sums; `f` are those with their neighbours."""
    HERE: tl.constexpr = (3 if BETWEEN else 2) * (k // 2) + k % 2
    own = f[HERE]
    if BETWEEN:
        right, lower, across = f[HERE + 1], f[HERE + 3], f[HERE + 4]
        diagonals = sums[4 * k + 3] + own * across + right * lower
        added = (
            sums[4 * k] + own * own,
            sums[4 * k + 1] + own * right,
            sums[4 * k + 2] + own * lower,
            diagonals,
        )
    else:
        added = (sums[k] + own * own,)
    return added


@triton.jit
def _store_gram(
    features, gram, corner, shape, D, STRIDES: tl.constexpr, EVEN: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BETWEEN: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """The Gram maps of BI x BJ locations, 2 x 2 at a time. Beyond the edges, where no pixel asks
    for them, a location is its own neighbour."""
    h, w = shape[0], shape[1]
    n = tl.arange(0, BI * BJ // 4)
    i = corner[0] + n // (BJ // 2) * 2
    j = corner[1] + n % (BJ // 2) * 2
    SIDE: tl.constexpr = 3 if BETWEEN else 2
    MAPS: tl.constexpr = 4 if BETWEEN else 1
    at = ()
    for k in tl.static_range(SIDE * SIDE):
        row = wide(tl.minimum(i + k // SIDE, h - 1), LONG) * STRIDES[1]
        at += (features + row + wide(tl.minimum(j + k % SIDE, w - 1), LONG) * STRIDES[2],)
    sums = ()
    for _ in tl.static_range(4 * MAPS):
        sums += (tl.zeros((BK, BI * BJ // 4), tl.float32),)
    for start in range(0, D, BK):
        f = ()
        for k in tl.static_range(SIDE * SIDE):
            x = load_features(at[k], start, D, STRIDES, EVEN, BK, LONG, True)
            f += (x.to(tl.float32),)
        added = ()
        for k in tl.static_range(4):
            added += _neighbours(sums, f, k, BETWEEN)
        sums = added
    for k in tl.static_range(4):
        own = (i + k // 2) * w + j + k % 2
        inside = (i + k // 2 < h) & (j + k % 2 < w)
        for m in tl.static_range(MAPS):
            tl.store(gram + m * h * w + own, tl.sum(sums[MAPS * k + m], 0), mask=inside)


@triton.jit
def dots_kernel(
    features,  # [B, Q, D, h, w], any strides
    prototypes,  # [B, C, Gy, Gx, D]
    dots, gram, table, length, Q, C, D, h, w, Gy, Gx, stride_b, stride_q, row_blocks,
    column_blocks, STRIDES: tl.constexpr, EVEN: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GRAM_BK: tl.constexpr,
    BETWEEN: tl.constexpr, LONG: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
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
    _store_gram(
        features, gram, (i_begin, j_begin), (h, w), D, STRIDES, EVEN, BI, BJ, GRAM_BK, BETWEEN, LONG
    )

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
        acc = tl.zeros((BN, BI * BJ), tl.float32)
        squares = tl.zeros((BN, BK), tl.float32)
        for start in range(0, D, BK):
            d = tl.arange(0, BK)[None, :]
            f = load_features(at, start, D, STRIDES, EVEN, BK, LONG, True)
            if EVEN:
                p = tl.load((row + start)[:, None] + d)
            else:
                p = tl.load((row + start)[:, None] + d, mask=start + d < D, other=0.0)
            acc += dot(p, f, DOT)
            squares += p * p
        acc *= inverse_length(tl.sum(squares, 1))[:, None]
        my, mx = my[:, None], mx[:, None]
        near = (my >= y_near) & (my <= y_near_last) & (mx >= x_near) & (mx <= x_near_last)
        slot = ((c[:, None] * NY + my) * NX + mx) - (y_near * NX + x_near)
        to = dots + (wide(slot, LONG) * (h * w) + (i * w + j)[None, :])
        tl.store(to, acc, mask=near & used)


@triton.jit
def square_norm(gram, shape, i, j, wx, mask, below, BETWEEN: tl.constexpr):
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
def _cross_entropy(
    first,  # logits of class 0 and of the last one
    last,
    slopes,  # of this image, with the logits of the classes 1 .. C - 1 if there are more than two
    radial, labels, class_weights, pixel, mask, C, size, ignore_index, PAIR: tl.constexpr,
    LONG: tl.constexpr,
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
        z = last
        if not PAIR:
            z = tl.load(slopes + wide(c - 1, LONG) * size + pixel, mask=mask, other=0.0)
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
        at = slopes + wide(c - 1, LONG) * size + pixel
        z = last
        if not PAIR:
            z = tl.load(at, mask=mask, other=0.0)
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
    length, ignore_index, C, H, h, w, strips, column_blocks, W: tl.constexpr, OX: tl.constexpr,
    NY: tl.constexpr, NX: tl.constexpr, T: tl.constexpr, BX: tl.constexpr, BETWEEN: tl.constexpr,
    MEAN: tl.constexpr, WINNERS: tl.constexpr, LOSS: tl.constexpr, PAIR: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """One program: BX columns of a strip of up to T rows, all classes. LOSS: the cross-entropy of
    the scores in place of these, of which no more than a PAIR are held in registers."""
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
    row, row_below, across = square_norm(at, (h, w), i, j, wx, x_in, x_in & next_row, BETWEEN)
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

    scores += image * (C - 1 if LOSS else C) * H * W
    winners += image * C * H * W
    mask = (y < end)[:, None] & x_in[None, :]
    first = tl.zeros((T, BX), tl.float32)
    last = first
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
                    # Strictly greater: of equal windows the lowest stays. NaN stays NaN, and the
                    # gradient goes to the window that is to blame.
                    slope = low - top
                    top = tl.where(near, top, float("-inf"))
                    value = top[None, :] + wy[:, None] * slope[None, :]
                    won = (value > best) | (value != value)
                    place = tl.where(won, number * OX + step, place)
                    best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        to = wide(c * H + y, LONG)[:, None] * W + x[None, :]
        last = best * inverse
        if not LOSS:
            tl.store(scores + to, last, mask=mask)
        else:
            first = tl.where(c == 0, last, first)
            if not PAIR:
                tl.store(scores + (to - wide(H, LONG) * W), last, mask=mask & (c > 0))
        if WINNERS:
            tl.store(winners + to, place.to(winners.dtype.element_ty), mask=mask)
    if LOSS:
        if not PAIR:
            tl.debug_barrier()  # what one thread has written, another may read
        loss, total = _cross_entropy(
            first, last, scores, radial + image * H * W, labels + image * H * W, class_weights,
            wide(y, LONG)[:, None] * W + x[None, :], mask, C, wide(H, LONG) * W, ignore_index,
            PAIR, LONG,
        )  # fmt: skip
        tl.store(sums + 2 * pid, loss)
        tl.store(sums + 2 * pid + 1, total)
