"""The head as Triton kernels, for NVIDIA GPUs without the CUDA extension.

Two launches for each direction of each operator, nothing allocated but results and workspaces
(a third, a plain sum, joins the parts where many images share one set of prototypes, see
`_splits`). All kernels run on the current stream of the features' device, never wait for the
device, and may be captured in a CUDA graph after one call of the same shapes outside of it, which
compiles them and sends the tables of the geometry to the device.

Block sizes come from the few functions under "Block sizes" below and depend on shape, dtype and
layout alone; nothing is tuned at run time, so that the same call gives the same bits.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ..geometry import Axis, GridSpec
from . import current_device, mask_kind, torch_, winner_dtype

# With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on tensors of the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_OLDEST = (3, 4)

DEVICE_TYPES = ("cpu", "cuda") if _INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Maps that the forward pass of matching keeps for the backward pass; see `Kernels`.
GRAM_MAPS = 4

# Bytes of workspace that one launch may take. A call that needs more is done in parts; where a
# single image needs more (thousands of windows over a pixel), the `torch` backend takes over.
WORKSPACE = 1 << 31

# Pixels of a piece and of a strip, at most; see `triton_kernels`.
_PIECE, _STRIP = 32, 8
_NEAR_FIRST, _NEAR_LAST = 4, 5  # rows of the table, as in `triton_kernels`


def unavailable(device: torch.device) -> str | None:
    """See `Kernels`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from importlib.metadata import PackageNotFoundError, version

    try:
        numbers = tuple(int(part) for part in version("triton").split("+")[0].split(".")[:2])
    except (PackageNotFoundError, ValueError):
        numbers = _OLDEST  # built from source, or under another name
    if numbers < _OLDEST:
        return f"Triton {'.'.join(map(str, numbers))} is too old: {'.'.join(map(str, _OLDEST))}"
    if _INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU is sm_{capability[0]}{capability[1]}: sm_80 or newer is needed"
    return None


# Geometry


@dataclass(frozen=True)
class _AxisFacts:
    """What the kernels have to know of an axis before they are compiled.

    Attributes:
        rows: the rows of the axis table, named in `triton_kernels`.
        near: windows near a feature location, at most.
        overlap: windows over a pixel, at most.
        strips, strip: number of strips, and the pixels of the longest.
        pieces, cells: number of pieces, and the locations of the longest.
        near_pieces, near_strips: pieces and strips near a feature location, at most.
        window_pieces, window_strips: pieces and strips in a window, at most.
        between: whether any pixel lies between two locations.
    """

    rows: tuple[tuple[int, ...], ...]
    near: int
    overlap: int
    strips: int
    strip: int
    pieces: int
    cells: int
    near_pieces: int
    near_strips: int
    window_pieces: int
    window_strips: int
    between: bool


@cache
def _axis_facts(axis: Axis) -> _AxisFacts:
    taps = [axis.taps(x) for x in range(axis.pixels)]
    covering = [axis.covering(x) for x in range(axis.pixels)]
    lower = [i for i, _ in taps]
    upper = [i + (weight > 0) for i, weight in taps]
    bits = [struct.unpack("<i", struct.pack("<f", weight))[0] for _, weight in taps]

    pieces = [
        piece
        for segment in axis.segments
        for piece in _cut(segment.begin, segment.end, -(-(segment.end - segment.begin) // _PIECE))
    ]
    strips: list[tuple[int, int]] = []
    piece_strips = []
    for piece_begin, piece_end in pieces:
        before = len(strips)
        for _, run in groupby(range(piece_begin, piece_end), key=lower.__getitem__):
            x = list(run)
            strips += _cut(x[0], x[-1] + 1, -(-len(x) // _STRIP))
        piece_strips.append((before, len(strips)))

    # First and last of something near each location, or in each window.
    near = _Spans(axis.cells, missing=1 << 30)
    cell_pieces = _Spans(axis.cells)
    window_cells, window_pieces, window_strips = (_Spans(axis.windows) for _ in range(3))
    for number, (begin, end) in enumerate(pieces):
        first, last = covering[begin]
        # Every location from the first tap to the last, though of locations that lie closer than
        # pixels some are needed by none.
        for i in range(lower[begin], upper[end - 1] + 1):
            cell_pieces.add(i, number, number)
            near.add(i, first, last)
        for m in range(first, last + 1):
            window_cells.add(m, lower[begin], upper[end - 1])
            window_pieces.add(m, number, number)
            window_strips.add(m, piece_strips[number][0], piece_strips[number][1] - 1)

    lowers = [lower[begin] for begin, _ in strips]
    strip_begin = [bisect_left(lowers, i) for i in range(axis.cells)]
    strip_end = [bisect_right(lowers, i) for i in range(axis.cells)]
    # Strips of the location to the left are near where any of their pixels lies between the two.
    strip_first = list(strip_begin)
    for i in range(1, axis.cells):
        before, after = strip_begin[i - 1], strip_end[i - 1]
        if after > before and upper[strips[after - 1][1] - 1] == i:
            strip_first[i] = before

    rows = (
        lower,
        bits,
        [first for first, _ in covering],
        [last for _, last in covering],
        near.first,
        near.last,
        cell_pieces.first,
        cell_pieces.last,
        strip_first,
        strip_begin,
        strip_end,
        [begin for begin, _ in strips],
        [end for _, end in strips],
        [covering[begin][0] for begin, _ in strips],
        [covering[begin][1] for begin, _ in strips],
        [lower[begin] for begin, _ in pieces],
        [upper[end - 1] for _, end in pieces],
        [covering[begin][0] for begin, _ in pieces],
        [covering[begin][1] for begin, _ in pieces],
        [begin for begin, _ in piece_strips],
        [end for _, end in piece_strips],
        window_cells.first,
        [last + 1 for last in window_cells.last],
        window_pieces.first,
        window_pieces.last,
        window_strips.first,
        window_strips.last,
    )
    return _AxisFacts(
        rows=tuple(map(tuple, rows)),
        near=near.longest,
        overlap=axis.overlap,
        strips=len(strips),
        strip=max(end - begin for begin, end in strips),
        pieces=len(pieces),
        cells=max(upper[end - 1] - lower[begin] + 1 for begin, end in pieces),
        near_pieces=cell_pieces.longest,
        near_strips=max(b - a for a, b in zip(strip_first, strip_end, strict=True)),
        window_pieces=window_pieces.longest,
        window_strips=window_strips.longest,
        between=any(weight > 0 for _, weight in taps),
    )


class _Spans:
    """First and last numbers that were added to each of n entries."""

    def __init__(self, n: int, missing: int = 0) -> None:
        self.first = [missing] * n
        self.last = [-1] * n

    def add(self, entry: int, first: int, last: int) -> None:
        if self.last[entry] < 0:
            self.first[entry] = first
        self.first[entry] = min(self.first[entry], first)
        self.last[entry] = max(self.last[entry], last)

    @property
    def longest(self) -> int:
        return max(b - a + 1 for a, b in zip(self.first, self.last, strict=True))


def _cut(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    """begin .. end in parts that differ by 1 at most."""
    size = end - begin
    marks = [begin + part * size // parts for part in range(parts + 1)]
    return list(pairwise(marks))


@cache
def _table(y: Axis, x: Axis, device: torch.device) -> Tensor:
    """The tables of both axes on the device, [2, rows, length] int32.

    They are kept for good, some 50 kB each: a captured CUDA graph holds their addresses.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call for a geometry cannot be captured in a CUDA graph: call the operator "
            "once with these shapes before capturing"
        )
    axes = (_axis_facts(y).rows, _axis_facts(x).rows)
    length = max(len(row) for rows in axes for row in rows)
    table = torch.tensor(
        [[(*row, *([0] * (length - len(row)))) for row in rows] for rows in axes],
        dtype=torch.int32,
        device="cpu",
    ).to(device)
    if device.type == "cuda":
        # Once only: other streams may be the next to read it.
        torch.cuda.current_stream(device).synchronize()
    return table


@dataclass(frozen=True)
class _Geometry:
    """Everything about the two axes."""

    y: Axis
    x: Axis
    rows: _AxisFacts
    columns: _AxisFacts

    @property
    def block(self) -> int:
        """Numbers in a block of the tiles of a piece."""
        return 2 * self.rows.cells * self.columns.strips

    @property
    def between(self) -> bool:
        """Whether any pixel lies between two locations."""
        return self.rows.between or self.columns.between

    def places(self, reduce: str) -> int:
        """Places that a window can have over a tile; one where all windows get the same."""
        return self.rows.overlap * self.columns.overlap if reduce == "max" else 1

    def pool_tiles(self, C: int) -> int:
        """Numbers kept of an image for pooling."""
        return self.rows.pieces * C * self.block

    def match_tiles(self, C: int, reduce: str) -> int:
        """Numbers kept of an image for the backward direction of matching."""
        return self.rows.pieces * (C * self.places(reduce) + 3) * self.block

    def dots(self, C: int) -> int:
        """Inner products kept of an image."""
        return C * self.rows.near * self.columns.near * self.y.cells * self.x.cells

    def windows_near(self, BI: int, BJ: int) -> int:
        """Windows near a block of BI x BJ locations, at most."""
        result = 1
        for axis, facts, B in ((self.y, self.rows, BI), (self.x, self.columns, BJ)):
            first, last = facts.rows[_NEAR_FIRST], facts.rows[_NEAR_LAST]
            blocks = _cut(0, axis.cells, -(-axis.cells // B))
            result *= max(0, *(max(last[a:b]) - min(first[a:b]) + 1 for a, b in blocks))
        return result


@cache
def _geometry(grid: GridSpec, H: int, W: int, h: int, w: int) -> _Geometry:
    y, x = grid.axis(H, h), grid.axis(W, w)
    return _Geometry(y, x, _axis_facts(y), _axis_facts(x))


# Block sizes


def _power(n: int, least: int, most: int) -> int:
    """The power of two that holds n, within limits."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def _cell_block(strides: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a block of 32 locations: a compact one has the fewest windows near it,
    a long one reads whole sectors where locations lie next to each other in memory."""
    return (4, 8) if strides[2] == 1 else (2, 16)


def _group(C: int, geometry: _Geometry, episodes: int) -> tuple[int, int, int]:
    """GY, GX and BN of the programs that sum over windows: groups of 2 x 2 to get many programs
    out of few episodes, 4 x 2, which read each location less often, for more."""
    GX = min(2, _power(geometry.x.windows, 1, 2))
    GY = min(_power(geometry.y.windows, 1, 4), 4 if episodes >= 16 else 2)
    classes = _power(C, max(1, 16 // (GY * GX)), max(16, 64 // (GY * GX)))
    return GY, GX, classes * GY * GX


def _splits(programs: int, images: int) -> int:
    """Parts that the K or Q images of an episode are summed in: more than one where their windows
    alone would keep but few multiprocessors busy."""
    return min(images, -(-256 // programs)) if programs < 128 else 1


def _dot(dtype: torch.dtype) -> str:
    """How the kernels multiply; see `triton_kernels._dot`."""
    if _INTERPRETED:
        return "ieee"
    return "tf32" if dtype == torch.float32 else "bfloat16"


# Launching


# Left to itself, ptxas now and then takes fewer registers than there are, and spills.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255}


class _Launch:
    """A kernel with its grid and all its arguments but the first, for one set of shapes: these are
    the tensors, and numbers that change from call to call.

    The first call goes through Triton, which specialises the kernel on its arguments and compiles
    it; later ones go straight to the compiled kernel, in a third of the time.
    """

    def __init__(
        self,
        kernel: str,
        programs: int,
        numbers: Sequence[int | float],
        constants: dict[str, Any],
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = tuple(numbers)
        self.constants = constants
        self.tail = (*numbers, *constants.values())
        self.compiled: Any = None

    def __call__(self, *first: Tensor | float) -> None:
        if self.compiled is not None:
            self.compiled[self.grid](*first, *self.tail)
            return
        from . import triton_kernels

        kernel = getattr(triton_kernels, self.kernel)
        self.compiled = kernel[self.grid](*first, *self.numbers, **self.constants, **_OPTIONS)


_plans: dict[tuple[Any, ...], Any] = {}


def _plan(key: tuple[Any, ...], tensors: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """What `build` returns, kept for calls of the same shapes. Kernels are specialised on the
    alignment of their tensors as well, so that it belongs to the key."""
    key = (*key, *(tensor.data_ptr() % 16 == 0 for tensor in tensors))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 1024:
            _plans.clear()
        plan = _plans[key] = build()
    return plan


def _needs_long(features: Tensor, strides: Sequence[int], *extents: int) -> bool:
    """Whether offsets within an image need 64 bits."""
    span = sum((n - 1) * s for n, s in zip(features.shape[2:], strides[2:], strict=True))
    return max(span, *extents) >= 1 << 31


def _strides(name: str, strides: Sequence[int]) -> dict[str, int]:
    """Strides within an image. The compiler is told their values, so that it reads the neighbours
    of a location at constant distances from one address."""
    return {f"{name}_{letter}": n for letter, n in zip("DHW", strides[2:], strict=True)}


def _parts(n: int, most: int) -> list[slice]:
    return [slice(begin, begin + most) for begin in range(0, n, most)]


# Pooling


class _Pool:
    """Both directions of pooling for one set of shapes: the launches and the workspace."""

    def __init__(
        self,
        features: Tensor,
        masks: Tensor,
        C: int,
        grid: GridSpec,
        min_pixels: float | None,
    ) -> None:
        """`features`: their gradient in the backward direction, where `min_pixels` is None."""
        B, K, D, h, w = features.shape
        H, W = masks.shape[-2:]
        strides = features.stride()
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = _table(geometry.y, geometry.x, features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * K * geometry.pool_tiles(C)
        self.counts = B * K * rows.pieces * C * columns.strips
        long = _needs_long(
            features, strides, C * Gy * Gx * D, C * H * W, geometry.pool_tiles(C), h * w
        )
        tile = (rows.pieces, columns.strips, rows.cells)
        T_X = _power(columns.strip, 1, _STRIP)
        blocks = -(-columns.strips * T_X // 128)
        self.tiles = _Launch(
            "mask_tiles_kernel",
            B * K * rows.pieces * C * blocks,
            (length, C, H, W, *tile, blocks),
            {
                "T_Y": _power(rows.strip, 1, _STRIP),
                "T_X": T_X,
                "S": 128 // T_X,
                "KIND": mask_kind(masks, C),
                "LONG": long,
            },
        )
        BI, BJ = _cell_block(strides[2:])
        common = {"BI": BI, "BJ": BJ}
        reach = {"REACH_Y": rows.near_pieces, "REACH_X": columns.near_strips}
        if min_pixels is None:
            row_blocks, column_blocks = -(-h // BI), -(-w // BJ)
            self.back = _Launch(
                "pool_back_kernel",
                B * K * row_blocks * column_blocks,
                (length, K, C, D, h, w, Gy, Gx, *strides[:2], *tile, row_blocks, column_blocks),
                {
                    **_strides("STRIDE", strides),
                    "EVEN": D % _power(D, 16, 128) == 0,
                    **common,
                    "BN": 16,
                    "BD": _power(D, 16, 128),
                    **reach,
                    "LONG": long,
                    "DOT": _dot(features.dtype),
                },
            )
            return
        GY, GX, BN = _group(C, geometry, B)
        groups_y, groups_x = -(-Gy // GY), -(-Gx // GX)
        groups = groups_y * groups_x * -(-C * GY * GX // BN)
        BD = _power(D, 16, 128)
        d_blocks = -(-D // BD)
        self.splits = _splits(B * groups * d_blocks, K)
        self.shape = (self.splits, B, C, Gy, Gx, D)
        self.sums = _Launch(
            "pool_kernel",
            self.splits * B * groups * d_blocks,
            (
                *(length, float(min_pixels), B, K, C, D, Gy, Gx, *strides, *tile),
                *(groups_y, groups_x, groups, d_blocks, self.splits),
            ),
            {
                "GY": GY,
                "GX": GX,
                **common,
                "BN": BN,
                "BD": BD,
                **reach,
                "PIECES": rows.window_pieces,
                "STRIPS": _power(columns.window_strips, 1, 1 << 20),
                "LONG": long,
                "DOT": _dot(features.dtype),
            },
        )


def masked_average_pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    B, K, _, h, w = features.shape
    H, W = masks.shape[-2:]
    geometry = _geometry(grid, H, W, h, w)
    Gy, Gx = geometry.y.windows, geometry.x.windows
    factor = features.new_empty((B, K, C, Gy, Gx), dtype=torch.float32)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    episodes = max(1, WORKSPACE // (4 * K * geometry.pool_tiles(C)))
    if episodes >= B:
        return _pool(features, masks, C, grid, min_pixels, factor), factor
    prototypes = [
        _pool(features[part], masks[part], C, grid, min_pixels, factor[part])
        for part in _parts(B, episodes)
    ]
    return torch.cat(prototypes), factor


def _pool(
    features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float, factor: Tensor
) -> Tensor:
    with current_device(features.device):
        plan = _plan(
            (
                *("pool", C, grid, min_pixels, features.dtype, features.shape, features.stride()),
                *(masks.dtype, masks.shape, features.device),
            ),
            (features, masks, factor),
            lambda: _Pool(features, masks, C, grid, min_pixels),
        )
        prototypes = features.new_empty(plan.shape, dtype=torch.float32)
        tiles = features.new_empty(plan.size, dtype=torch.float32)
        counts = features.new_empty(plan.counts, dtype=torch.float32)
        plan.tiles(masks, tiles, counts, plan.table)
        plan.sums(tiles, counts, features, prototypes, factor, plan.table)
        return prototypes.sum(0) if plan.splits > 1 else prototypes[0]


def masked_average_pool_backward(
    grad: Tensor, masks: Tensor, C: int, factor: Tensor, features: Tensor, grid: GridSpec
) -> Tensor:
    """See `Kernels`."""
    B, K, _, h, w = features.shape
    H, W = masks.shape[-2:]
    geometry = _geometry(grid, H, W, h, w)
    if masks.dtype == torch.bool:
        masks = masks.view(torch.uint8)
    result = torch.empty_like(features)
    episodes = max(1, WORKSPACE // (4 * K * geometry.pool_tiles(C)))
    if episodes >= B:
        _pool_back(grad, masks, C, factor, result, grid)
    else:
        for part in _parts(B, episodes):
            _pool_back(grad[part], masks[part], C, factor[part], result[part], grid)
    return result


def _pool_back(
    grad: Tensor, masks: Tensor, C: int, factor: Tensor, result: Tensor, grid: GridSpec
) -> None:
    with current_device(result.device):
        plan = _plan(
            (
                *("pool back", C, grid, result.dtype, result.shape, result.stride()),
                *(masks.dtype, masks.shape, result.device),
            ),
            (grad, masks, factor, result),
            lambda: _Pool(result, masks, C, grid, None),
        )
        tiles = result.new_empty(plan.size, dtype=torch.float32)
        counts = result.new_empty(plan.counts, dtype=torch.float32)
        plan.tiles(masks, tiles, counts, plan.table)
        plan.back(tiles, grad, factor, result, plan.table)


# Matching


class _Match:
    """The forward direction of matching for one set of shapes."""

    def __init__(
        self,
        features: Tensor,
        C: int,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        winners: bool,
    ) -> None:
        B, Q, D, h, w = features.shape
        H, W = size
        strides = features.stride()
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = _table(geometry.y, geometry.x, features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * Q * geometry.dots(C)
        long = _needs_long(features, strides, C * Gy * Gx * D, C * H * W, geometry.dots(C), h * w)
        BI, BJ = _cell_block(strides[2:])
        row_blocks, column_blocks = -(-h // BI), -(-w // BJ)
        # Blocks of a row one after the other find windows and halves of sectors in the cache, but
        # few images need all their blocks at a time to fill the device.
        run = min(column_blocks, 8) if B * Q >= 32 else 1
        runs = -(-column_blocks // run)
        common = {"NY": rows.near, "NX": columns.near}
        self.dots = _Launch(
            "dots_kernel",
            B * Q * row_blocks * runs,
            (length, Q, C, D, h, w, Gy, Gx, *strides[:2], row_blocks, column_blocks, runs),
            {
                **_strides("STRIDE", strides),
                "EVEN": D % _power(D, 16, 32) == 0,
                **common,
                "BI": BI,
                "BJ": BJ,
                "BN": _power(C * geometry.windows_near(BI, BJ), 16, 32),
                "BK": _power(D, 16, 32),
                "RUN": run,
                "BETWEEN": geometry.between,
                "LONG": long,
                "DOT": _dot(features.dtype),
            },
        )
        BX = _power(W, 16, 256)
        self.scores = _Launch(
            "scores_kernel",
            B * Q * rows.strips * -(-W // BX),
            (length, C, H, W, h, w, rows.strips, -(-W // BX)),
            {
                "OX": columns.overlap,
                **common,
                "T": _power(rows.strip, 1, _STRIP),
                "BX": BX,
                "BETWEEN": geometry.between,
                "MEAN": reduce == "mean",
                "WINNERS": winners and reduce == "max",
                "LONG": long,
            },
        )


def _images(geometry: _Geometry, C: int, reduce: str) -> int:
    """Images that fit the workspace, in either direction."""
    most = max(geometry.dots(C), geometry.match_tiles(C, reduce))
    return WORKSPACE // (4 * most)


def _image_parts(B: int, Q: int, images: int) -> list[tuple[slice, slice]]:
    """Parts of B x Q images, of no more than that many: whole episodes, or parts of one."""
    if images >= Q:
        return [(part, slice(0, Q)) for part in _parts(B, images // Q)]
    return [(slice(b, b + 1), part) for b in range(B) for part in _parts(Q, images)]


def cosine_match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    winners: bool,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`."""
    B, Q, _, h, w = features.shape
    C = prototypes.shape[1]
    H, W = size
    geometry = _geometry(grid, H, W, h, w)
    images = _images(geometry, C, reduce)
    shape = (B, Q, C, H, W)
    kept = winners and reduce == "max"
    places = features.new_empty(shape if kept else (0,), dtype=winner_dtype(grid, size))
    gram = features.new_empty((B, Q, GRAM_MAPS, h, w), dtype=torch.float32)
    if not images:
        scores = logit_scale * torch_.cosine_match(features, prototypes, grid, size, reduce)
        return scores, places.zero_(), gram.zero_() if winners else gram.new_empty(0)
    scores = features.new_empty(shape, dtype=torch.float32)
    if images >= B * Q:
        _match(features, prototypes, grid, size, reduce, scores, places, gram, logit_scale)
    else:
        for b, q in _image_parts(B, Q, images):
            won = places[b, q] if kept else places
            _match(
                *(features[b, q], prototypes[b], grid, size, reduce),
                *(scores[b, q], won, gram[b, q], logit_scale),
            )
    return scores, places, gram if winners else gram.new_empty(0)


def _match(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    scores: Tensor,
    winners: Tensor,
    gram: Tensor,
    logit_scale: float,
) -> None:
    with current_device(features.device):
        C = prototypes.shape[1]
        kept = winners.numel() > 0
        plan = _plan(
            (
                *("match", grid, size, reduce, kept, C, features.dtype, features.shape),
                *(features.stride(), features.device),
            ),
            (features, prototypes, scores, winners, gram),
            lambda: _Match(features, C, grid, size, reduce, kept),
        )
        dots = features.new_empty(plan.size, dtype=torch.float32)
        plan.dots(features, prototypes, dots, gram, plan.table)
        plan.scores(dots, gram, scores, winners, plan.table, logit_scale)


class _MatchBack:
    """The backward direction of matching for one set of shapes."""

    def __init__(
        self,
        features: Tensor,
        result: Tensor,
        C: int,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
    ) -> None:
        B, Q, D, h, w = features.shape
        H, W = size
        geometry = _geometry(grid, H, W, h, w)
        rows, columns = geometry.rows, geometry.columns
        self.table = _table(geometry.y, geometry.x, features.device)
        length = self.table.shape[2]
        Gy, Gx = geometry.y.windows, geometry.x.windows
        self.size = B * Q * geometry.match_tiles(C, reduce)
        self.lengths = B * C * Gy * Gx
        extents = (C * Gy * Gx * D, C * H * W, geometry.match_tiles(C, reduce), h * w)
        long = _needs_long(features, features.stride(), *extents)
        long = long or _needs_long(result, result.stride(), *extents)
        tile = (rows.pieces, columns.strips, rows.cells)
        row_programs = -(-self.lengths // 16)
        P = geometry.places(reduce)
        places = min(4, _power(P, 1, 4)) if reduce == "max" else 0
        roles = 1 + C * (-(-P // places) if places else 1)
        T_X = _power(columns.strip, 1, _STRIP)
        blocks = -(-columns.strips * T_X // 128)
        self.tiles = _Launch(
            "match_tiles_kernel",
            B * Q * rows.pieces * roles * blocks + row_programs,
            (length, C, D, H, W, h, w, *tile, blocks, self.lengths, row_programs, roles),
            {
                "T_Y": _power(rows.strip, 1, _STRIP),
                "T_X": T_X,
                "S": 128 // T_X,
                "PLACES": places,
                "P": P,
                "BETWEEN": geometry.between,
                "LONG": long,
            },
        )
        BI, BJ = _cell_block(features.stride()[2:])
        row_blocks, column_blocks = -(-h // BI), -(-w // BJ)
        GY, GX, BN = _group(C, geometry, B)
        groups_y, groups_x = -(-Gy // GY), -(-Gx // GX)
        groups = groups_y * groups_x * -(-C * GY * GX // BN)
        self.splits = _splits(B * groups, Q)
        self.shape = (self.splits, B, C, Gy, Gx, D)
        self.back = _Launch(
            "match_back_kernel",
            B * (groups * self.splits + Q * row_blocks * column_blocks),
            (
                *(length, B, Q, C, D, h, w, Gy, Gx, *features.stride()[:2], *result.stride()[:2]),
                *tile,
                *(groups_y, groups_x, groups, self.splits, row_blocks, column_blocks),
            ),
            {
                **_strides("STRIDE", features.stride()),
                **_strides("TO_STRIDE", result.stride()),
                "EVEN": D % _power(D, 16, 64) == 0,
                "P": P,
                "OX": columns.overlap,
                "GY": GY,
                "GX": GX,
                "GATHER_BN": BN,
                "GATHER_BD": _power(D, 16, 256),
                "BI": BI,
                "BJ": BJ,
                "BN": 16,
                "BD": _power(D, 16, 64),
                "REACH_Y": rows.near_pieces,
                "REACH_X": columns.near_strips,
                "BETWEEN": geometry.between,
                "PLACES": reduce == "max",
                "WHOLE": D <= 256,
                "LONG": long,
                "DOT": _dot(features.dtype),
            },
        )


def cosine_match_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    winners: Tensor,
    grid: GridSpec,
    reduce: str,
    *gram: Tensor,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    B, Q, _, h, w = features.shape
    C, H, W = scores.shape[2:]
    geometry = _geometry(grid, H, W, h, w)
    images = _images(geometry, C, reduce)
    if not images:
        return _match_back_torch(logit_scale * grad, features, prototypes, grid, reduce)
    (maps,) = gram
    result = torch.empty_like(features)
    if images >= B * Q:
        tensors = (grad, features, prototypes, scores, winners, maps, result)
        return result, _match_back(tensors, grid, reduce, logit_scale)
    to_prototypes = torch.zeros_like(prototypes)
    for b, q in _image_parts(B, Q, images):
        won = winners[b, q] if winners.numel() else winners
        tensors = (
            *(grad[b, q], features[b, q], prototypes[b], scores[b, q], won),
            *(maps[b, q], result[b, q]),
        )
        to_prototypes[b] += _match_back(tensors, grid, reduce, logit_scale)
    return result, to_prototypes


def _match_back(
    tensors: tuple[Tensor, ...], grid: GridSpec, reduce: str, logit_scale: float
) -> Tensor:
    """The gradient of the prototypes; that of the features is written to the last tensor."""
    grad, features, prototypes, scores, winners, gram, result = tensors
    with current_device(features.device):
        C, H, W = scores.shape[2:]
        plan = _plan(
            (
                *("match back", grid, (C, H, W), reduce, features.dtype, features.shape),
                *(features.stride(), result.stride(), features.device),
            ),
            tensors,
            lambda: _MatchBack(features, result, C, grid, (H, W), reduce),
        )
        tiles = features.new_empty(plan.size, dtype=torch.float32)
        lengths = features.new_empty(plan.lengths, dtype=torch.float32)
        to_prototypes = features.new_empty(plan.shape, dtype=torch.float32)
        plan.tiles(grad, scores, winners, gram, prototypes, lengths, tiles, plan.table, logit_scale)
        plan.back(tiles, features, prototypes, lengths, result, to_prototypes, plan.table)
        return to_prototypes.sum(0) if plan.splits > 1 else to_prototypes[0]


def _match_back_torch(
    grad: Tensor, features: Tensor, prototypes: Tensor, grid: GridSpec, reduce: str
) -> tuple[Tensor, Tensor]:
    """Where thousands of windows lie over a pixel: recomputed by the `torch` backend."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (features, prototypes)]
        H, W = grad.shape[3:]
        scores = torch_.cosine_match(inputs[0], inputs[1], grid, (H, W), reduce)
        to_features, to_prototypes = torch.autograd.grad(scores, inputs, grad)
    return to_features, to_prototypes
