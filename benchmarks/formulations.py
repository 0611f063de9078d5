"""The implementations that are compared, by name.

reference           the paper's equations, written literally; small sizes only
torch               `backend="torch"`: interpolation after inner products, in eager PyTorch
torch.compile       the same under torch.compile, in one graph
torch.compile-max   the same in the mode "max-autotune" (GPU)
torch-windows       the straightforward implementation; see below
cpu, triton, cuda   the kernels
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn_kernels import GridSpec, LocalPrototypeHead, cosine_match, masked_average_pool
from lslpn_kernels.geometry import Axis
from lslpn_kernels.reference import accumulation_dtype, class_masks, unit

from .sizes import Size

Call = Callable[..., Tensor]
LOGIT_SCALE = 20.0
EAGER = ("torch", "torch-windows")
COMPILED = {"torch.compile": "default", "torch.compile-max": "max-autotune"}
KERNELS = ("cpu", "triton", "cuda")
NAMES = ("reference", "torch-windows", "torch", *COMPILED, *KERNELS)


def build(name: str, part: str, size: Size, device: str) -> Call:
    """The function by which an implementation computes a part from `Inputs.of(part)`."""
    if name in COMPILED:
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        call = build("torch", part, size, device)
        return torch.compile(call, fullgraph=True, dynamic=False, mode=COMPILED[name])
    if name == "torch-windows":
        return _assemble(part, size, pool_windows, match_windows)
    if part == "head":
        return LocalPrototypeHead(size.grid, LOGIT_SCALE, backend=name)
    return _assemble(
        part, size, partial(masked_average_pool, backend=name), partial(cosine_match, backend=name)
    )


def _assemble(part: str, size: Size, pool: Call, match: Call) -> Call:
    grid, shape = size.grid, (size.pixels, size.pixels)
    if part == "pool":
        return lambda support, masks: pool(support, masks, grid)
    if part == "match":
        return lambda query, prototypes: match(query, prototypes, grid, shape)

    def head(support: Tensor, foreground: Tensor, query: Tensor) -> Tensor:
        prototypes = pool(support, class_masks(foreground, foreground.shape[2] + 1), grid)
        return LOGIT_SCALE * match(query, prototypes, grid, shape)

    return head


# The straightforward head: features are interpolated to the size of the image, sums over windows
# are products with matrices of zeros and ones, and the best cosine is found row by row of windows.
# It is exact and vectorised, but stores features at image resolution, unlike the `torch` backend.


def pool_windows(features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float = 0) -> Tensor:
    """Like `lslpn_kernels.masked_average_pool`."""
    H, W = masks.shape[-2:]
    up = _upsample(features, (H, W))  # [B, K, D, H, W]
    rows = _membership(grid.axis(H), up.dtype, up.device)  # [Gy, H]
    columns = _membership(grid.axis(W), up.dtype, up.device).T  # [W, Gx]
    prototypes = []
    for mask in masks.to(up.dtype).unbind(2):
        n = (rows @ mask @ columns)[:, :, None]  # [B, K, 1, Gy, Gx]
        total = rows @ (up * mask[:, :, None]) @ columns  # [B, K, D, Gy, Gx]
        enough = n > min_pixels
        prototypes.append(torch.where(enough, total / torch.where(enough, n, 1), 0).mean(1))
    return torch.stack(prototypes, 1).permute(0, 1, 3, 4, 2)


def match_windows(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: tuple[int, int]
) -> Tensor:
    """Like `lslpn_kernels.cosine_match`."""
    up = unit(_upsample(features, size), 2)  # [B, Q, D, H, W]
    directions = unit(prototypes.to(up.dtype), -1)
    rows, columns = grid.axis(size[0]), grid.axis(size[1])
    inside = _membership(columns, up.dtype, up.device)[:, None] > 0  # [Gx, 1, W]
    lowest = float("-inf")
    bands = []
    for gy, y in enumerate(rows.starts):
        band = up[..., y : y + rows.window, :]
        cosines = torch.einsum("bqdyx,bcjd->bqcjyx", band, directions[:, :, gy])
        best = torch.where(inside, cosines, lowest).amax(3)  # [B, Q, C, k, W]
        below = size[0] - y - rows.window
        bands.append(F.pad(best, (0, 0, y, below), value=lowest))
    return torch.stack(bands).amax(0)


def windows_bytes(size: Size) -> int:
    """Approximate peak memory of `torch-windows`, forward and backward: the features of both sides
    at the size of the image, and a copy for every class and step that autograd keeps."""
    copies = size.K * (1 + size.C) + 3 * size.Q
    return copies * size.B * size.D * size.pixels**2 * max(4, size.dtype.itemsize)


def _upsample(features: Tensor, size: tuple[int, int]) -> Tensor:
    flat = features.flatten(0, 1).to(accumulation_dtype(features.dtype))
    up = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return up.unflatten(0, features.shape[:2])


@lru_cache(maxsize=16)
def _membership(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[G, n]: 1 if a pixel is in a window."""
    pixel, start = torch.arange(axis.pixels), torch.tensor(axis.starts)[:, None]
    return ((pixel >= start) & (pixel < start + axis.window)).to(device, dtype)
