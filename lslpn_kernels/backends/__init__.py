"""Where the head can run, and why it cannot run elsewhere.

A backend is a module of this folder. Those made of plain PyTorch (`reference`, `torch`) offer the
two operators themselves and leave the backward pass to autograd. The others offer `Kernels`:
both directions of both operators, which `lslpn_kernels.ops` registers with PyTorch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ..geometry import GridSpec


class Kernels(Protocol):
    """What a kernel backend offers. Arguments have been checked, and are on one device.

    `features` may have any strides and any of the four floating dtypes; everything else is
    contiguous and in the accumulation dtype (float32; float64 for float64 features), except
    `masks`: bool, uint8 or the accumulation dtype. All results are allocated with torch, on the
    features' device, and written on its current stream.
    """

    def unavailable(self) -> str | None:
        """One line on why the backend cannot be used on this machine; None where it can."""

    def device_types(self) -> tuple[str, ...]:
        """The device types it runs on."""

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of features that it takes."""

    def masked_average_pool(
        self, features: Tensor, masks: Tensor, grid: GridSpec, min_pixels: float
    ) -> tuple[Tensor, Tensor]:
        """Prototypes [B, C, Gy, Gx, D], and the factor [B, K, C, Gy, Gx] that the sums over
        windows were multiplied with: 1 / (K n), 0 for a window of too few pixels."""

    def masked_average_pool_backward(
        self, grad: Tensor, masks: Tensor, factor: Tensor, features: Tensor, grid: GridSpec
    ) -> Tensor:
        """Gradient of `features`, of whom only shape, strides and dtype are used."""

    def cosine_match(
        self,
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        winners: bool,
        *,
        factor: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """Scores [B, Q, C, H, W], and the winning windows [B, Q, C, H, W] of `reduce="max"`
        (empty for "mean", or where `winners` is false: no gradient is wanted).

        A winner is written as its place among the windows over the pixel, row by row:
        ``(my - first_y) * grid.axis(W).overlap + (mx - first_x)``, in `winner_dtype`.

        A backend that has `GRAM_MAPS` (a number, 0 without it) returns a third tensor, the inner
        products of neighbouring locations [B, Q, GRAM_MAPS, h, w] (empty where `winners` is
        false), and is given it again as the last argument of `cosine_match_backward`: there it
        spares one reading of the features.

        The scores are multiplied with `factor`, which is not 0 where a gradient is wanted;
        `cosine_match_backward` is given it too.
        """

    def cosine_match_backward(
        self,
        grad: Tensor,
        features: Tensor,
        prototypes: Tensor,
        scores: Tensor,
        winners: Tensor,
        grid: GridSpec,
        reduce: str,
        *gram: Tensor,
        factor: float = 1.0,
        **choice: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `features` (its dtype and layout) and `prototypes`.

        A backend that has `SELECTIVE = True` is told by ``wanted=(True, False)``, say, that only
        the first of them is needed, and returns an empty tensor in place of the other.
        """


@dataclass(frozen=True)
class BackendStatus:
    """One entry of `lslpn_kernels.backends()`.

    Attributes:
        usable: whether it runs on this machine, now.
        devices: the device types it runs on.
        reason: one line on why it is not usable, empty where it is.
    """

    usable: bool
    devices: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        return "usable on " + ", ".join(self.devices) if self.usable else self.reason


NAMES = ("reference", "torch", "cpu", "triton", "cuda")
PLAIN = ("reference", "torch")
_MODULES = {"cpu": "cpu", "triton": "triton_", "cuda": "cuda"}
_AUTO = ("cuda", "triton", "cpu")  # the fastest first; then "torch", which runs anywhere
_ANY = ("any device",)


def winner_dtype(grid: GridSpec, size: tuple[int, int]) -> torch.dtype:
    """uint8 where the windows over a pixel can surely be counted with it, int32 elsewhere.

    It goes by the grid alone, whatever the `size`, so that graphs stay good for other sizes: a
    window of k pixels and step s overlaps no more than ``ceil(k / s) + 1 <= 2 / spacing + 1``
    along an axis, the 1 being the last window, which may lie closer.
    """
    return torch.uint8 if 2 / grid.spacing + 1 <= 16 else torch.int32


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The module of a backend, or None and one line on why there is none. Looked up once."""
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
        reason = module.unavailable()
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    return (None, reason) if reason else (module, "")


def status() -> dict[str, BackendStatus]:
    """See `lslpn_kernels.backends`."""
    found = {}
    for name in NAMES:
        if name in PLAIN:
            found[name] = BackendStatus(True, _ANY)
            continue
        module, reason = load(name)
        devices = module.device_types() if module else ()
        found[name] = BackendStatus(module is not None, devices, reason)
    return found


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a call goes to: `name` itself, or for "auto" the fastest that can run.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot be used here, or not on this device or dtype.
    """
    if name == "auto":
        for candidate in _AUTO:
            if _obstacle(candidate, device, dtype) is None:
                return candidate
        return "torch"
    if name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    obstacle = _obstacle(name, device, dtype)
    if obstacle:
        raise RuntimeError(f'backend="{name}" {obstacle}; backend="auto" takes one that can run')
    return name


@cache
def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name in PLAIN:
        return None
    module, reason = load(name)
    if module is None:
        return f"is not usable: {reason}"
    if device.type not in module.device_types():
        wanted = " or ".join(module.device_types())
        return f"runs on {wanted} tensors, got tensors on {device}"
    if dtype not in module.dtypes():
        return f"does not run in {dtype}"
    return None
