"""Compare every backend with the equations.

python -m lslpn_kernels.check                                      # on random tensors
head.check(support_features, support_masks, query_features)        # on your own
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _arguments
from ._backends import NAMES, choose
from .geometry import GridSpec

if TYPE_CHECKING:
    from .head import LocalPrototypeHead

_REPEATS = 5
_NO_MEMORY = float("nan")


@dataclass(frozen=True)
class Line:
    """One backend of a `Report`.

    Attributes:
        backend: its name.
        reason: why it did not run; empty if it did.
        logits, support_gradient, query_gradient: the largest absolute difference from the reference
            in float64, relative to the largest magnitude in the reference.
        milliseconds: the median of a forward and backward pass.
        mebibytes: peak memory of a pass beyond its inputs; NaN if it cannot be measured.
    """

    backend: str
    reason: str = ""
    logits: float = 0.0
    support_gradient: float = 0.0
    query_gradient: float = 0.0
    milliseconds: float = 0.0
    mebibytes: float = 0.0

    def __str__(self) -> str:
        if self.reason:
            return f"{self.backend:10} {self.reason}"
        differences = (self.logits, self.support_gradient, self.query_gradient)
        columns = "".join(f"{d:>12.1e}" for d in differences)
        memory = "-" if self.mebibytes != self.mebibytes else f"{self.mebibytes:.1f}"
        return f"{self.backend:10}{columns}{self.milliseconds:>12.2f}{memory:>10}"


@dataclass(frozen=True)
class Report:
    """The result of `LocalPrototypeHead.check`, to be printed.

    Attributes:
        chosen: the backend that the head uses for these tensors.
        dtype: of the features, and so of their gradients.
        lines: one per backend.
    """

    chosen: str
    dtype: torch.dtype
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        titles = ("logits", "d support", "d query", "ms", "MiB")
        widths = (12, 12, 12, 12, 10)
        head = "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))
        rows = [f"{'backend':10}{head}", *map(str, self.lines)]
        used = next(line for line in self.lines if line.backend == self.chosen)
        worst = max(used.logits, used.support_gradient, used.query_gradient)
        rows.append(f"this head uses {self.chosen}: within {worst:.1e} of the equations in float64")
        if self.dtype in (torch.float16, torch.bfloat16):
            eps = torch.finfo(self.dtype).eps
            rows[-1] += f"; gradients in {self.dtype} are themselves rounded by {eps / 2:.1e}"
        return "\n".join(rows)


@torch.inference_mode(False)  # which enables gradients, too
def check(
    head: LocalPrototypeHead,
    support_features: Tensor,
    support_masks: Tensor,
    query_features: Tensor,
    num_classes: int | None = None,
) -> Report:
    """See `LocalPrototypeHead.check`."""
    # Copies, since tensors of inference mode cannot be saved for the backward pass.
    support, masks, query = (
        t.detach().clone() for t in (support_features, support_masks, query_features)
    )
    settings = (head.grid, head.min_pixels, True, num_classes)
    _arguments.masked_average_pool(support, masks, *settings)
    upstream: Tensor | None = None

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal upstream
        this = copy.copy(head)
        this.backend = backend
        inputs = [t.to(dtype).detach().requires_grad_() for t in (support, query)]
        soft = masks.to(dtype) if masks.is_floating_point() else masks
        logits = this(inputs[0], soft, inputs[1], num_classes)
        if upstream is None:
            generator = torch.Generator().manual_seed(0)
            upstream = torch.randn(
                logits.shape, generator=generator, dtype=torch.float64, device="cpu"
            ).to(logits.device)
        grads = torch.autograd.grad(logits, inputs, upstream.to(logits.dtype))
        return logits.detach(), *grads

    expected = run("reference", torch.float64)
    dtype, device = query.dtype, query.device
    lines = []
    for name in NAMES:
        try:
            choose(name, device, dtype, head.grid, head.reduce)
        except RuntimeError as error:
            reason = str(error).partition('" ')[2].partition("; backend=")[0]
            lines.append(Line(name, reason))
            continue
        found = run(name, dtype)
        logits, to_support, to_query = map(_difference, found, expected)
        del found
        lines.append(
            Line(
                name, "", logits, to_support, to_query, *_measure(partial(run, name, dtype), device)
            )
        )
    chosen = choose(head.backend, device, dtype, head.grid, head.reduce)
    return Report(chosen, dtype, tuple(lines))


def _difference(found: Tensor, expected: Tensor) -> float:
    if not found.numel():
        return 0.0
    largest = expected.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    return float(((found.double() - expected).abs().amax() / largest).item())


def _measure(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds and peak MiB of a pass."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    synchronize()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
        if sum(times) > 2:
            break
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return 1e3 * median(times), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with suppress(OSError, AttributeError, StopIteration):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark; Linux only
        before = _high_water()
        run()
        return 1e3 * median(times), (_high_water() - before) / 1024
    return 1e3 * median(times), _NO_MEMORY


def _high_water() -> int:
    """The peak memory of this process, in KiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def main() -> None:
    """The command line of this module."""
    from .head import LocalPrototypeHead

    parser = argparse.ArgumentParser("python -m lslpn_kernels.check", description=__doc__)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--device", choices=devices, help="default: every one that is available")
    parser.add_argument("--pixels", type=int, default=128, help="H and W; default: 128")
    parser.add_argument("--locations", type=int, default=17, help="h and w; default: 17")
    parser.add_argument("--channels", type=int, default=64, help="D; default: 64")
    options = parser.parse_args()
    n, size, D = options.locations, options.pixels, options.channels
    for name in ("pixels", "locations", "channels"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(1, 1, D, n, n, generator=generator)
    query = support + torch.randn(1, 1, D, n, n, generator=generator)
    masks = torch.rand(1, 1, 1, size, size, generator=generator) < 0.3
    for device in [options.device] if options.device else devices:
        for dtype in (torch.float32, torch.bfloat16):
            print(f"{device}, {dtype}: {n} x {n} locations, {D} channels, {size} x {size} pixels")
            tensors = support.to(device, dtype), masks.to(device), query.to(device, dtype)
            print(LocalPrototypeHead(GridSpec()).check(*tensors), end="\n\n")


if __name__ == "__main__":
    main()
