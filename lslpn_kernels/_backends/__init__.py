"""Where the head can run, and why it cannot run elsewhere.

A backend is a module of this folder. Those made of plain PyTorch (`reference`, `torch`) offer the
two operators themselves and leave the backward pass to autograd. The others offer `Kernels`:
both directions of both operators, which `lslpn_kernels._autograd` registers with PyTorch, and may
offer `LossKernels` beside, for `lslpn_kernels._loss`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..geometry import GridSpec


class Kernels(Protocol):
    """What a kernel backend offers. Arguments have been checked, and are on one device.

    `features` may have any strides and any of the four floating dtypes; everything else is
    contiguous and in the accumulation dtype (float32; float64 for float64 features), except
    `masks`, which are of one of these kinds (see `mask_kind`), for C classes:

        classes     [B, K, C, H, W]      bool, uint8 or the accumulation dtype; class 0 first
        foreground  [B, K, C - 1, H, W]  the same; class 0 is what these leave of each pixel
        labels      [B, K, H, W]         uint8 or int64; other numbers than 0 .. C - 1 are no class

    All results are allocated with torch, on the features' device, and written on its current
    stream. No dimension is 0.
    """

    DEVICE_TYPES: tuple[str, ...]  # that it runs on
    DTYPES: tuple[torch.dtype, ...]  # of features that it takes

    def unavailable(self, device: torch.device) -> str | None:
        """One line on why the backend cannot be used on this device; None where it can."""

    # Optional: declines(grid, reduce) -> bool, whether "auto" should go to the next backend.

    def masked_average_pool(
        self, features: Tensor, masks: Tensor, C: int, grid: GridSpec, min_pixels: float
    ) -> tuple[Tensor, ...]:
        """Prototypes [B, C, Gy, Gx, D], and the factor [B, K, C, Gy, Gx] that the sums over
        windows were multiplied with: 1 / (K n), 0 for a window of too few pixels. What follows, if
        anything, saves the backward pass some work."""

    def masked_average_pool_backward(
        self,
        grad: Tensor,
        masks: Tensor,
        C: int,
        factor: Tensor,
        features: Tensor,
        grid: GridSpec,
        *kept: Tensor,
    ) -> Tensor:
        """Gradient of `features`, of which only shape, strides and dtype are used. `kept` is what
        followed the factor, or nothing."""

    def cosine_match(
        self,
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        winners: bool,
        *,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """Scores [B, Q, C, H, W], and the winning windows [B, Q, C, H, W] of `reduce="max"`
        (empty for "mean", or where `winners` is false: no gradient is wanted).

        A winner is written as its place among the windows over the pixel, row by row:
        ``(my - first_y) * grid.axis(W).overlap + (mx - first_x)``, in `winner_dtype`.

        A backend that has `GRAM_MAPS` (a number, 0 without it) returns a third tensor, the inner
        products of neighbouring locations [B, Q, GRAM_MAPS, h, w] (empty where `winners` is
        false), and is given it again as the last argument of `cosine_match_backward`: there it
        spares one reading of the features.

        The scores are multiplied with `logit_scale`, which is not 0 where a gradient is wanted;
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
        logit_scale: float = 1.0,
        **choice: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `features` (its dtype and layout) and `prototypes`.

        A backend that has `SELECTIVE = True` is told by ``wanted=(True, False)``, say, that only
        the first of them is needed, and returns an empty tensor in place of the other.
        """


class LossKernels(Kernels, Protocol):
    """What a kernel backend offers that has the cross-entropy of the logits in its matching.

    `labels` [B, Q, H, W] are uint8 or int64, `weight` is None or [C] in the accumulation dtype;
    both are contiguous. `ignore_index` fits into 32 bits, and `logit_scale` is not 0. `wanted`
    tells which of features and prototypes want a gradient, the backward pass as the forward pass.
    Where labels are wrong, a backend of the CPU raises ValueError; one of a GPU, which must not
    wait for the host, returns NaN.
    """

    # Optional: declines_loss(grid, reduce) -> bool, whether a call is left to `cosine_match`.

    def cosine_match_loss(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        grid: GridSpec,
        reduce: str,
        wanted: tuple[bool, bool],
        *,
        ignore_index: int,
        logit_scale: float,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, a scalar, and what `cosine_match_loss_backward` needs."""

    def loss_kept(
        self,
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        wanted: tuple[bool, bool],
    ) -> list[Tensor]:
        """What is kept, as empty tensors; sizes may be symbols of a trace."""

    def cosine_match_loss_backward(
        self,
        grad: Tensor,
        kept: list[Tensor],
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        wanted: tuple[bool, bool],
        *,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `features` and `prototypes`; in place of one that is not wanted, any tensor.
        `grad` is a scalar on the device. A tensor of `kept` may be a result itself."""


@dataclass(frozen=True)
class BackendStatus:
    """One entry of `lslpn_kernels.backends()`.

    Attributes:
        usable: whether it runs on this machine, now; of several GPUs, on the current one.
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


def winner_dtype(grid: GridSpec) -> torch.dtype:
    """uint8 if it can count the windows over a pixel of any image, otherwise int32.

    Independent of the image's size, so that graphs remain valid for other sizes: windows of k
    pixels and step s overlap at most ``ceil(k / s) + 1 <= 2 / spacing + 1`` times along an axis,
    where the 1 is the last window, which may be closer.
    """
    return torch.uint8 if 2 / grid.spacing + 1 <= 16 else torch.int32


def mask_kind(masks: Sequence[int], C: int) -> str:
    """ "labels", "foreground" or "classes": how masks of that shape describe C classes; see
    `Kernels`."""
    if len(masks) == 4:
        return "labels"
    return "classes" if masks[2] == C else "foreground"


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """The device as torch's current one: kernels are launched on that."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _import(name: str) -> tuple[Any, str]:
    """The module of a backend, or None and one line on why there is none."""
    try:
        return importlib.import_module(f".{_MODULES[name]}", __name__), ""
    except ImportError as error:
        return None, f"cannot be imported: {error}"


@cache
def load(name: str, device: torch.device) -> tuple[Kernels | None, str]:
    """The module of a kernel backend, or None and one line on why it does not run on a device.

    The device's type is compared first, so that CUDA is not started for a tensor of the CPU: in a
    forked worker process it could not be.
    """
    module, reason = _import(name)
    if module is None:
        return None, f"is not usable: {reason}"
    if device.type not in module.DEVICE_TYPES:
        wanted = " or ".join(module.DEVICE_TYPES)
        return None, f"runs on {wanted} tensors, got tensors on {device}"
    reason = module.unavailable(device)
    return (None, f"is not usable: {reason}") if reason else (module, "")


def status() -> dict[str, BackendStatus]:
    """See `lslpn_kernels.backends`."""
    found = {}
    for name in NAMES:
        if name in PLAIN:
            found[name] = BackendStatus(True, _ANY)
            continue
        module, reason = _import(name)
        if module is not None:
            kind = module.DEVICE_TYPES[0]
            on_gpu = kind == "cuda" and _has_gpu()
            device = torch.device(kind, torch.cuda.current_device()) if on_gpu else kind
            module, reason = load(name, torch.device(device))
        devices = module.DEVICE_TYPES if module else ()
        found[name] = BackendStatus(module is not None, devices, reason.removeprefix(_UNUSABLE))
    return found


_UNUSABLE = "is not usable: "


def _has_gpu() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def check_name(name: object) -> None:
    """
    Raises:
        TypeError, ValueError: no backend has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")


def choose(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    grid: GridSpec,
    reduce: str,
) -> str:
    """The backend that a call goes to: `name` itself, or for "auto" the fastest that can run, and
    does not decline a call like this.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot be used here, or not on this device or dtype.
    """
    if name == "auto":
        able = [n for n in _AUTO if _obstacle(n, device, dtype) is None]
        for candidate in able:
            declines = getattr(load(candidate, device)[0], "declines", None)
            if declines is None or not declines(grid, reduce):
                return candidate
        return able[0] if able else "torch"
    check_name(name)
    obstacle = _obstacle(name, device, dtype)
    if obstacle:
        raise RuntimeError(f'backend="{name}" {obstacle}; backend="auto" takes one that can run')
    return name


def has_loss(name: str, device: torch.device, grid: GridSpec, reduce: str) -> bool:
    """Whether a backend has `LossKernels` for such a call."""
    if name in PLAIN:
        return False
    module = load(name, device)[0]
    declines = getattr(module, "declines_loss", None)
    return hasattr(module, "cosine_match_loss") and not (declines and declines(grid, reduce))


@lru_cache(maxsize=256)
def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name in PLAIN:
        return None
    module, reason = load(name, device)
    if module is None:
        return reason
    return None if dtype in module.DTYPES else f"does not run in {dtype}"
