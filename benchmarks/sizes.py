"""The sizes that are measured, their inputs, and the least work that they require."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lslpn_kernels import GridSpec, masked_average_pool
from lslpn_kernels.geometry import Axis

PARTS = ("head", "pool", "match")
PASSES = ("inference", "forward", "backward", "both")


@dataclass(frozen=True)
class Size:
    """One batch of episodes.

    Attributes:
        name: used by `--sizes` and in the record.
        B, K, Q, C: episodes, support images, query images, classes including the background.
        D, cells, pixels: channels, and feature locations and image pixels along either axis.
        scale: of a window; windows overlap by half.
        compiled: the devices on which torch.compile is measured; it takes half a minute per size.
        windows: whether `torch-windows` is measured.
        reference: whether `reference` is measured.
        replayed: whether calls are also replayed from CUDA graphs.
    """

    name: str
    B: int = 1
    K: int = 1
    Q: int = 1
    C: int = 2
    D: int = 256
    cells: int = 65
    pixels: int = 512
    scale: float = 1 / 8
    dtype: torch.dtype = torch.float32
    compiled: tuple[str, ...] = ()
    windows: bool = False
    reference: bool = False
    replayed: bool = False

    @property
    def grid(self) -> GridSpec:
        return GridSpec(self.scale, 1 / 2)

    @property
    def key(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def axis(self) -> Axis:
        return self.grid.axis(self.pixels, self.cells)

    def describe(self) -> str:
        shots = f"B={self.B} K={self.K} Q={self.Q} C={self.C} D={self.D}"
        return f"{shots}, {self.cells}x{self.cells} -> {self.pixels}x{self.pixels}, " + (
            f"scale 1/{1 / self.scale:g}, {self.axis.windows**2} windows"
        )

    def with_dtype(self, dtype: torch.dtype) -> Size:
        return replace(self, dtype=dtype)


_ALL = (
    Size("tiny", D=8, cells=5, pixels=24, scale=1 / 4, windows=True, reference=True, replayed=True),
    Size("small", D=64, cells=17, pixels=128, windows=True, reference=True),
    Size("paper", compiled=("cpu", "cuda"), windows=True, replayed=True),
    Size("px257", cells=33, pixels=257, compiled=("cpu",), windows=True, replayed=True),
    Size("five-way", C=6),
    Size("five-shot", K=5),
    Size("batch-4", B=4, compiled=("cpu", "cuda"), replayed=True),
    Size("same-size", cells=128, pixels=128),
    Size("scale-16", scale=1 / 16),
    Size("scale-4", scale=1 / 4),
    Size("scale-1", scale=1),
    # 1 GiB of support features and as much of query features.
    Size("large", B=256, compiled=("cuda",)),
)
SIZES = {size.name: size for size in _ALL}
QUICK = ("paper", "px257")
_OF_CPU = ("small", *(s.name for s in _ALL if s.name not in ("tiny", "small", "large")))


def chosen(
    names: list[str] | None, dtypes: list[str] | None, device: str, quick: bool
) -> list[Size]:
    """The sizes of a run, each in its dtypes.

    On a GPU bfloat16 is added for the sizes of training: the paper's episode, four of them, and the
    large batch (which then is twice as large).
    """
    if names is None:
        names = list(QUICK if quick else _OF_CPU)
        if device == "cuda":  # the most important ones first, in case the run is cut short
            first = ("batch-4", "large", "paper")
            names = [*first, *(name for name in names if name not in first)]
    found = []
    for name in names:
        both = device == "cuda" and name in ("paper", "batch-4", "large")
        of_size = dtypes or (["float32", "bfloat16"] if both else ["float32"])
        for dtype in of_size:
            size = SIZES[name].with_dtype(getattr(torch, dtype))
            if name == "large" and size.dtype.itemsize == 2:
                size = replace(size, B=2 * size.B)
            found.append(size)
    return found


@dataclass(frozen=True)
class Inputs:
    """Support features, foreground masks, all masks, query features, prototypes, and incoming
    gradients; see `lslpn_kernels.LocalPrototypeHead` for the shapes."""

    support: Tensor
    foreground: Tensor
    masks: Tensor
    query: Tensor
    prototypes: Tensor
    grad_scores: Tensor
    grad_prototypes: Tensor

    def of(self, part: str) -> tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]:
        """A part's arguments, the indices of those that need gradients, and the gradient of its
        result."""
        if part == "pool":
            return (self.support, self.masks), (0,), self.grad_prototypes
        if part == "match":
            return (self.query, self.prototypes), (0, 1), self.grad_scores
        return (self.support, self.foreground, self.query), (0, 2), self.grad_scores

    def episodes(self, of: slice, dtype: torch.dtype) -> Inputs:
        """Some of the episodes, with everything except the masks in `dtype`."""
        values = (getattr(self, name)[of].detach() for name in self.__dataclass_fields__)
        return Inputs(*(v if v.dtype == torch.bool else v.to(dtype) for v in values)).leaves()

    def leaves(self) -> Inputs:
        for tensor in (self.support, self.query, self.prototypes):
            tensor.requires_grad_()
        return self


def draw(size: Size, device: str) -> Inputs:
    """Random features, and masks of one ellipse per foreground class (an organ covers about a
    twentieth of the image, so most windows do not show it, as in the paper's data)."""
    generator = torch.Generator(device).manual_seed(0)
    accumulated = torch.float64 if size.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = accumulated) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    B, K, Q, C, D = size.B, size.K, size.Q, size.C, size.D
    place = (torch.arange(size.pixels, device=device) + 0.5) / size.pixels
    organs = []
    for c in range(C - 1):
        turn = 2 * math.pi * c / (C - 1) + 0.3
        y, x = 0.5 + 0.27 * math.sin(turn), 0.5 + 0.27 * math.cos(turn)
        organs.append(((place - y) / 0.11)[:, None] ** 2 + ((place - x) / 0.14) ** 2 <= 1)
    foreground = torch.stack(organs).expand(B, K, -1, -1, -1).contiguous()
    masks = torch.cat((~foreground.any(2, keepdim=True), foreground), 2)
    support = normal(B, K, D, size.cells, size.cells, dtype=size.dtype)
    query = normal(B, Q, D, size.cells, size.cells, dtype=size.dtype)
    prototypes = masked_average_pool(support, masks, size.grid, backend="torch")
    return Inputs(
        support=support,
        foreground=foreground,
        masks=masks,
        query=query,
        prototypes=prototypes.detach(),
        grad_scores=normal(B, Q, C, size.pixels, size.pixels),
        grad_prototypes=normal(*prototypes.shape),
    ).leaves()


def blank(size: Size) -> Inputs:
    """Uninitialised CPU tensors of these shapes, dtypes and layouts, which take no memory."""
    B, C, D = size.B, size.C, size.D
    accumulated = torch.float64 if size.dtype == torch.float64 else torch.float32
    G = size.axis.windows
    image = (size.pixels, size.pixels)
    return Inputs(
        support=torch.empty(B, size.K, D, size.cells, size.cells, dtype=size.dtype),
        foreground=torch.empty(B, size.K, C - 1, *image, dtype=torch.bool),
        masks=torch.empty(B, size.K, C, *image, dtype=torch.bool),
        query=torch.empty(B, size.Q, D, size.cells, size.cells, dtype=size.dtype),
        prototypes=torch.empty(B, C, G, G, D, dtype=accumulated),
        grad_scores=torch.empty(B, size.Q, C, *image, dtype=accumulated),
        grad_prototypes=torch.empty(B, C, G, G, D, dtype=accumulated),
    ).leaves()


def least_bytes(size: Size, part: str) -> dict[str, int]:
    """Bytes of a pass if every argument is read once and every result written once.

    What a backend keeps for its backward pass is not counted, nor is its workspace, nor are the
    prototypes inside the head.
    """
    B, C, G = size.B, size.C, size.axis.windows**2
    image = size.pixels**2
    features = B * size.D * size.cells**2 * size.dtype.itemsize
    support, query = size.K * features, size.Q * features
    prototypes, scores = B * C * G * size.D * 4, B * size.Q * C * image * 4
    masks = B * size.K * image * (C - 1 if part == "head" else C)
    if part == "pool":
        forward = support + masks + prototypes
        backward = prototypes + masks + support
    elif part == "match":
        forward = query + prototypes + scores
        backward = scores + query + prototypes + query + prototypes
    else:
        forward = support + masks + query + scores
        backward = scores + query + masks + query + support
    return _passes(forward, backward)


def least_flops(size: Size, part: str) -> dict[str, int]:
    """Floating point operations of a pass's products of length D.

    Matching has the products of every feature location with the prototypes of the windows that
    reach it, and those for the norm. Pooling has a weighted sum over every tile between the edges
    of windows. The backward pass of matching has as many products as the forward pass for each of
    its two arguments.
    """
    axis = size.axis
    reached = 0
    for start in axis.starts:
        lower, _ = axis.taps(start)
        upper, weight = axis.taps(start + axis.window - 1)
        reached += upper + (weight > 0) - lower + 1
    tiles = sum(s.upper - s.lower + 1 for s in axis.segments)
    norms = 1 if size.cells == size.pixels else 5
    match = size.B * size.Q * (size.C * reached**2 + norms * size.cells**2)
    pool = size.B * size.K * size.C * tiles**2
    forward = {"match": match, "pool": pool, "head": match + pool}[part]
    backward = {"match": 2 * match, "pool": pool, "head": 2 * match + pool}[part]
    return _passes(2 * size.D * forward, 2 * size.D * backward)


def _passes(forward: int, backward: int) -> dict[str, int]:
    return dict(zip(PASSES, (forward, forward, backward, forward + backward), strict=True))
