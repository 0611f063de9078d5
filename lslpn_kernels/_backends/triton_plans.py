"""What is launched for calls of one set of shapes: two Triton kernels, one after the other.

Block sizes depend on shape, dtype and layout alone; nothing is tuned at run time, so that the same
call gives the same bits. The functions keep what they return: a second call of the same shapes
costs a look-up.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import GridSpec
from . import mask_kind
from .triton_geometry import STRIP, Geometry, geometry, table
from .triton_launch import Launch

# With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on tensors of the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_MANY = 1024  # plans kept of each kind


class Layout(NamedTuple):
    """Of a tensor, what a plan is made for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def aligned(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Kernels are specialised on the alignment of their tensors."""
    return tuple(t is not None and t.data_ptr() % 16 == 0 for t in tensors)


class Plan(NamedTuple):
    """Two launches, and the shapes of what they need beside what is given: the `Kernels`' results
    or workspace, float32."""

    first: Launch
    second: Launch
    table: Tensor
    shapes: tuple[tuple[int, ...], ...]
    splits: int = 1  # parts that the gradient of the prototypes, or these, are summed in

    def allocate(self, like: Tensor) -> list[Tensor]:
        return [like.new_empty(shape, dtype=torch.float32) for shape in self.shapes]


def fits(G: Geometry, C: int, features: Layout) -> bool:
    """Whether the kernels can reach everything in an image by offsets of 32 bits."""
    _, _, *shape = features.shape
    span = sum((n - 1) * s for n, s in zip(shape, features.strides[2:], strict=True))
    D = shape[0]
    return max(span, D * G.cells, C * G.windows * D, C * G.pixels, C * G.runs) < 1 << 31


@lru_cache(_MANY)
def episodes(
    features: Layout, C: int, grid: GridSpec, size: tuple[int, int], workspace: int
) -> int:
    """Episodes that are pooled at once in so many bytes; 0 where the kernels do not take them."""
    K, _, h, w = features.shape[1:]
    G = geometry(grid, *size, h, w)
    return max(1, workspace // (4 * K * C * G.runs)) if fits(G, C, features) else 0


@lru_cache(_MANY)
def images(
    features: Layout, C: int, grid: GridSpec, size: tuple[int, int], reduce: str, workspace: int
) -> int:
    """Images that are matched at once in so many bytes, in either direction; 0 where the kernels do
    not take them."""
    h, w = features.shape[3:]
    G = geometry(grid, *size, h, w)
    most = max(C * G.near * G.cells, (C * G.places(reduce) + 4) * G.runs)
    return workspace // (4 * most) if fits(G, C, features) else 0


def _power(n: int, least: int, most: int) -> int:
    """The power of two that holds n, within limits."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def _group(C: int, G: Geometry, episodes: int) -> tuple[int, int, int]:
    """Rows, columns and classes of the programs that sum over windows: 2 x 2 to get many programs
    out of few episodes, 4 x 2, which read each location less often, from four on."""
    GX = min(2, _power(G.x.windows, 1, 2))
    GY = min(_power(G.y.windows, 1, 4), 4 if episodes >= 4 else 2)
    classes = _power(C, max(1, 16 // (GY * GX)), max(16, 64 // (GY * GX)))
    return GY, GX, classes


def _groups(C: int, G: Geometry, group: tuple[int, int, int]) -> int:
    return math.prod(
        -(-n // size) for n, size in zip((G.y.windows, G.x.windows, C), group, strict=True)
    )


def _splits(programs: int, images: int) -> int:
    """Parts that the K or Q images of an episode are summed in: more than one where their windows
    alone would keep but few multiprocessors busy."""
    return min(images, -(-256 // programs)) if programs < 128 else 1


def _tile(G: Geometry) -> dict[str, Any]:
    """Pixels and locations of a tile at a time."""
    return {
        "T_Y": _power(G.y.strip_pixels, 1, STRIP),
        "T_X": _power(G.x.piece_pixels, 16, 32),
        "N": _power(G.x.piece_cells, 8, 1 << 20),
    }


def _mask_weights(masks: Layout, G: Geometry, C: int) -> tuple[Launch, tuple[tuple[int], ...]]:
    """With the shapes of weights and counts."""
    images = masks.shape[0] * masks.shape[1]
    CB = _power(C, 1, 8)
    chunks = -(-C // CB)
    launch = Launch(
        "pooling.mask_weights_kernel",
        images * G.tiles * chunks,
        (C, chunks),
        {"G": G, "CB": CB, "KIND": mask_kind(masks.shape, C), **_tile(G)},
        warps=1,
    )
    return launch, ((images * C * G.runs,), (images * C * G.tiles,))


@lru_cache(_MANY)
def pool(
    features: Layout, masks: Layout, C: int, grid: GridSpec, min_pixels: float, _: Any
) -> Plan:
    """Weights, counts and prototypes are allocated."""
    B, K, D, h, w = features.shape
    size = (*masks.shape[-2:], h, w)
    G = geometry(grid, *size)
    weights, shapes = _mask_weights(masks, G, C)
    group = _group(C, G, B)
    groups = _groups(C, G, group)
    BD = _power(D, 16, 256)
    programs = B * groups * -(-D // BD)
    splits = _splits(programs, K)
    launch = Launch(
        "pooling.pool_kernel",
        splits * programs,
        (float(min_pixels), B, K, C, *features.strides[:2], groups, splits),
        {"G": G, "D": D, "STRIDES": features.strides[2:], "GROUP": group, "BD": BD},
    )
    shape = (splits, B, C, G.y.windows, G.x.windows, D)
    return Plan(weights, launch, table(grid, *size, features.device), (*shapes, shape), splits)


@lru_cache(_MANY)
def pool_backward(features: Layout, masks: Layout, C: int, grid: GridSpec, _: Any) -> Plan:
    """Weights and counts are allocated. `features`: their gradient."""
    B, K, D, h, w = features.shape
    size = (*masks.shape[-2:], h, w)
    G = geometry(grid, *size)
    weights, shapes = _mask_weights(masks, G, C)
    # Channels last, with more of them, registers spill.
    BD = _power(D, 16, 128 if features.strides[2] == 1 else 256)
    launch = Launch(
        "pooling.pool_backward_kernel",
        B * K * G.blocks,
        (K, C, *features.strides[:2]),
        {"G": G, "D": D, "STRIDES": features.strides[2:], "BD": BD},
    )
    return Plan(weights, launch, table(grid, *size, features.device), shapes)


@lru_cache(_MANY)
def match(
    features: Layout,
    C: int,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    winners: bool,
    ignore_index: int | None,
    _: Any,
) -> Plan:
    """The dots are allocated, and the sums of a loss. `ignore_index`: of the loss, None for
    scores."""
    B, Q, D, h, w = features.shape
    G = geometry(grid, *size, h, w)
    loss = ignore_index is not None
    BK = _power(D, 16, 32)
    dots = Launch(
        "matching.dots_kernel",
        B * Q * G.blocks,
        (Q, C, *features.strides[:2]),
        {"G": G, "D": D, "STRIDES": features.strides[2:], "BN": 16, "BK": BK},
        warps=1,
    )
    # With more columns, the loss of many classes spills registers.
    BX = _power(size[1], 16, 128 if loss and C > 2 else 256)
    programs = B * Q * G.y.strips * -(-size[1] // BX)
    scores = Launch(
        "matching.scores_kernel",
        programs,
        (ignore_index or 0, C),
        {
            **{"G": G, "T": _power(G.y.strip_pixels, 1, STRIP), "BX": BX},
            **{"MEAN": reduce == "mean", "WINNERS": winners, "LOSS": loss},
        },
    )
    shapes = ((B * Q * C * G.near * G.cells,), (2 * programs if loss else 0,))
    return Plan(dots, scores, table(grid, *size, h, w, features.device), shapes)


@lru_cache(_MANY)
def match_backward(
    features: Layout,
    result: Layout,
    C: int,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    loss: bool,
    _: Any,
) -> Plan:
    """Weights and lengths of the prototypes are allocated."""
    B, Q, D, h, w = features.shape
    G = geometry(grid, *size, h, w)
    P = G.places(reduce)
    rows = B * C * G.windows
    row_programs = -(-rows // 16)
    weights = Launch(
        "matching.match_weights_kernel",
        B * Q * G.tiles + row_programs,
        (C, rows, row_programs),
        {
            **{"G": G, "D": D, "P": P, "CB": 2, "PB": _power(P, 1, 4)},
            **{"MEAN": reduce == "mean", "LOSS": loss, **_tile(G)},
        },
        warps=1,
    )
    group = _group(C, G, B)
    groups = _groups(C, G, group)
    splits = _splits(B * groups, Q)
    # With more channels, registers spill.
    BD = _power(D, 16, 128 if features.dtype == torch.bfloat16 else 64)
    back = Launch(
        "matching.match_backward_kernel",
        B * (groups * splits + Q * G.blocks),
        (B, Q, C, *features.strides[:2], *result.strides[:2], groups, splits),
        {
            **{"G": G, "D": D, "P": P, "STRIDES": features.strides[2:]},
            **{"TO_STRIDES": result.strides[2:], "GROUP": group},
            **{"GATHER_BD": _power(D, 16, 256), "BD": BD},
        },
    )
    shapes = ((B * Q * (C * P + 4) * G.runs,), (rows,))
    return Plan(weights, back, table(grid, *size, h, w, features.device), shapes, splits)


KEPT = (pool, pool_backward, match, match_backward)  # what may be forgotten
