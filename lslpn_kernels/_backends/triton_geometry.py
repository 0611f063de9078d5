"""What the Triton kernels know of the geometry: one table, made on the host.

An axis is cut at every edge of a window into `pieces` of at most 32 pixels, so that all pixels of a
piece lie in the same windows. The crossing of a piece of rows and a piece of columns is a tile. The
pixels of a piece with the same lower location are a `run`; a `strip` is 8 of them at most.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..geometry import Axis, GridSpec

PIECE, STRIP = 32, 8  # pixels of a piece and of a strip, at most


class Row:
    """Rows of the table, by what they are indexed with."""

    # a pixel
    LOWER = 0  # lower location that it is interpolated from
    WEIGHT = 1  # weight of the upper one, the bits of a float32
    FIRST = 2  # first and last window over it
    LAST = 3
    # a feature location
    NEAR_FIRST = 4  # first and last window near it; where none is: many, -1
    NEAR_LAST = 5
    # the n-th piece near location i, at i * near_pieces + n
    RUN = 6  # the location's run in it
    RUN_FIRST = 7  # first and last window over the piece; where there is no such piece: 0, -1
    RUN_LAST = 8
    # a piece
    PIECE_BEGIN = 9  # its pixels
    PIECE_END = 10
    PIECE_LOWER = 11  # its first and last location
    PIECE_UPPER = 12
    PIECE_FIRST = 13  # its first and last window
    PIECE_LAST = 14
    # the r-th location of piece p, at p * cells + r
    RUN_BEGIN = 15  # pixels of the piece that have it as their lower location
    RUN_END = 16
    # a strip of rows, pixels of one run
    STRIP_BEGIN = 17
    STRIP_END = 18
    # a window
    WINDOW_CELL_BEGIN = 19  # locations near it
    WINDOW_CELL_END = 20
    WINDOW_PIECE_FIRST = 21  # first and last piece in it
    WINDOW_PIECE_LAST = 22
    COUNT = 23


@dataclass(frozen=True)
class AxisFacts:
    """What the kernels are compiled for.

    Attributes:
        pixels, cells, windows: as of `Axis`.
        near: windows near a feature location, at most.
        overlap: windows over a pixel, at most.
        pieces, piece_pixels, piece_cells: number of pieces, pixels and locations of the longest.
        strips, strip_pixels: number of strips, and the pixels of the longest.
        near_pieces, window_pieces: pieces near a feature location and in a window, at most.
        between: whether any pixel lies between two locations.
        rows: the rows of the table. Kernels read them at run time and are not compiled for them.
    """

    pixels: int
    cells: int
    windows: int
    near: int
    overlap: int
    pieces: int
    piece_pixels: int
    piece_cells: int
    strips: int
    strip_pixels: int
    near_pieces: int
    window_pieces: int
    between: bool
    rows: tuple[tuple[int, ...], ...] = field(repr=False, compare=False)

    @property
    def runs(self) -> int:
        """Of all pieces, as many of each as the longest has."""
        return self.pieces * self.piece_cells


@cache
def axis_facts(axis: Axis) -> AxisFacts:
    taps = [axis.taps(x) for x in range(axis.pixels)]
    covering = [axis.covering(x) for x in range(axis.pixels)]
    lower = [i for i, _ in taps]
    upper = [i + (weight > 0) for i, weight in taps]
    pieces = [
        piece
        for segment in axis.segments
        for piece in cut(segment.begin, segment.end, -(-(segment.end - segment.begin) // PIECE))
    ]
    cells = max(upper[end - 1] - lower[begin] + 1 for begin, end in pieces)
    runs = [
        (begin + bisect_left(lower[begin:end], i), begin + bisect_right(lower[begin:end], i))
        for begin, end in pieces
        for i in range(lower[begin], lower[begin] + cells)
    ]
    strips = [
        strip
        for begin, end in runs
        if begin < end
        for strip in cut(begin, end, -(-(end - begin) // STRIP))
    ]

    # First and last of something near each location, or in each window.
    near = _Spans(axis.cells, missing=1 << 30)
    near_runs: list[list[tuple[int, int, int]]] = [[] for _ in range(axis.cells)]
    window_cells, window_pieces = _Spans(axis.windows), _Spans(axis.windows)
    for number, (begin, end) in enumerate(pieces):
        first, last = covering[begin]
        # Every location from the first tap to the last, though of locations that lie closer than
        # pixels some are needed by none.
        for i in range(lower[begin], upper[end - 1] + 1):
            near_runs[i].append((number * cells + i - lower[begin], first, last))
            near.add(i, first, last)
        for m in range(first, last + 1):
            window_cells.add(m, lower[begin], upper[end - 1])
            window_pieces.add(m, number, number)

    near_pieces = max(map(len, near_runs))
    flat = [run for of in near_runs for run in (*of, *[(0, 0, -1)] * (near_pieces - len(of)))]
    rows: dict[int, Iterable[int]] = {
        Row.LOWER: lower,
        Row.WEIGHT: [struct.unpack("<i", struct.pack("<f", weight))[0] for _, weight in taps],
        Row.FIRST: [first for first, _ in covering],
        Row.LAST: [last for _, last in covering],
        Row.NEAR_FIRST: near.first,
        Row.NEAR_LAST: near.last,
        Row.RUN: [run for run, _, _ in flat],
        Row.RUN_FIRST: [first for _, first, _ in flat],
        Row.RUN_LAST: [last for _, _, last in flat],
        Row.PIECE_BEGIN: [begin for begin, _ in pieces],
        Row.PIECE_END: [end for _, end in pieces],
        Row.PIECE_LOWER: [lower[begin] for begin, _ in pieces],
        Row.PIECE_UPPER: [upper[end - 1] for _, end in pieces],
        Row.PIECE_FIRST: [covering[begin][0] for begin, _ in pieces],
        Row.PIECE_LAST: [covering[begin][1] for begin, _ in pieces],
        Row.RUN_BEGIN: [begin for begin, _ in runs],
        Row.RUN_END: [end for _, end in runs],
        Row.STRIP_BEGIN: [begin for begin, _ in strips],
        Row.STRIP_END: [end for _, end in strips],
        Row.WINDOW_CELL_BEGIN: window_cells.first,
        Row.WINDOW_CELL_END: [last + 1 for last in window_cells.last],
        Row.WINDOW_PIECE_FIRST: window_pieces.first,
        Row.WINDOW_PIECE_LAST: window_pieces.last,
    }
    return AxisFacts(
        axis.pixels,
        axis.cells,
        axis.windows,
        near=near.longest,
        overlap=axis.overlap,
        pieces=len(pieces),
        piece_pixels=max(end - begin for begin, end in pieces),
        piece_cells=cells,
        strips=len(strips),
        strip_pixels=max(end - begin for begin, end in strips),
        near_pieces=near_pieces,
        window_pieces=window_pieces.longest,
        between=any(weight > 0 for _, weight in taps),
        rows=tuple(tuple(rows[n]) for n in range(Row.COUNT)),
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


def cut(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    """begin .. end in parts that differ by 1 at most."""
    size = end - begin
    marks = [begin + part * size // parts for part in range(parts + 1)]
    return list(pairwise(marks))


class Geometry(str):
    """Both axes. Kernels take it as a constant, and are compiled for it.

    A string of all that it holds: it is part of the key by which Triton finds a compiled kernel
    again, also on disk and in a later version of this module.

    Attributes:
        length: of a row of the table.
        BI, BJ: locations of a block, along y and x.
        across, blocks: blocks of locations along x, and of an image.
        tiles, windows, cells, pixels: of an image.
        runs: of rows times those of columns: numbers kept of an image for one class and place.
        near: windows near a feature location, at most.
    """

    y: AxisFacts
    x: AxisFacts
    length: int
    BI: int
    BJ: int
    across: int
    blocks: int
    tiles: int
    windows: int
    cells: int
    pixels: int
    runs: int
    near: int
    row: ClassVar[type[Row]] = Row

    def __new__(cls, y: AxisFacts, x: AxisFacts, length: int) -> Geometry:
        BI, BJ = 4, 8  # with those around them, the locations of a block are 60
        across = -(-x.cells // BJ)
        facts = {
            "y": y,
            "x": x,
            "length": length,
            "BI": BI,
            "BJ": BJ,
            "across": across,
            "blocks": -(-y.cells // BI) * across,
            "tiles": y.pieces * x.pieces,
            "windows": y.windows * x.windows,
            "cells": y.cells * x.cells,
            "pixels": y.pixels * x.pixels,
            "runs": y.runs * x.runs,
            "near": y.near * x.near,
        }
        rows = {name: n for name, n in vars(Row).items() if name.isupper()}
        self = super().__new__(cls, f"{facts} {y.runs} {x.runs} {rows}")
        self.__dict__.update(facts)
        return self

    def places(self, reduce: str) -> int:
        """Places that a window can have over a tile; one where all windows get the same."""
        return self.y.overlap * self.x.overlap if reduce == "max" else 1


@cache
def geometry(grid: GridSpec, H: int, W: int, h: int, w: int) -> Geometry:
    y, x = axis_facts(grid.axis(H, h)), axis_facts(grid.axis(W, w))
    return Geometry(y, x, max(map(len, (*y.rows, *x.rows))))


@cache
def table(grid: GridSpec, H: int, W: int, h: int, w: int, device: torch.device) -> Tensor:
    """The tables of both axes on the device, [2, rows, length] int32.

    They are kept for good, some 50 kB each: a captured CUDA graph holds their addresses.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call for a geometry cannot be captured in a CUDA graph: call the "
            "operator once with these shapes before capturing"
        )
    G = geometry(grid, H, W, h, w)
    rows = [[(*row, *([0] * (G.length - len(row)))) for row in axis.rows] for axis in (G.y, G.x)]
    found = torch.tensor(rows, dtype=torch.int32, device="cpu").to(device)
    if device.type == "cuda":
        # Once only: other streams may be the next to read it.
        torch.cuda.current_stream(device).synchronize()
    return found
