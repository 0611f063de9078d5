"""Peak memory of the head in addition to its inputs.

On a GPU, PyTorch counts it. On a CPU the operating system does (Linux): each backend runs in its
own process, whose high-water mark is reset before a pass,

    python -m benchmarks.memory BACKEND THREADS SIZE...

with an allocator that returns memory at once, so every pass starts with only the inputs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .formulations import build
from .sizes import Size, chosen, draw
from .timing import Work, one_line

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("inference", "both")
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def on_cuda(work: Work) -> dict[str, float]:
    """Peak allocated MiB by pass, in addition to what was allocated before."""
    found = {}
    for name in PASSES:
        work.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(work, name)()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    work.clear()
    return found


def of_process(work: Work) -> dict[str, float]:
    """MiB by which this process grew, by pass."""
    found = {}
    for name in PASSES:
        getattr(work, name)()  # creates threads and tables and loads libraries
        work.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _high_water()
        getattr(work, name)()
        found[name] = (_high_water() - before) / 1024
        work.clear()
    return found


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def in_a_process(backend: str, sizes: Sequence[Size], threads: int) -> dict[str, dict[str, float]]:
    """MiB by size and pass on the CPU.

    Raises:
        RuntimeError: memory could not be measured.
    """
    if not _CLEAR.exists():
        raise RuntimeError("peak memory on a CPU can only be measured on Linux")
    threshold = str(1 << 16)
    tunables = f"glibc.malloc.mmap_threshold={threshold}:glibc.malloc.trim_threshold={threshold}"
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": tunables,
        "MALLOC_MMAP_THRESHOLD_": threshold,
        "MALLOC_TRIM_THRESHOLD_": threshold,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", backend, str(threads)]
        + [size.key.replace(" ", ":") for size in sizes],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the process that measures memory failed: {last[-1]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(backend: str, threads: str, *keys: str) -> None:
    torch.set_num_threads(int(threads))
    found = {}
    for key in keys:
        name, dtype = key.split(":")
        (size,) = chosen([name], [dtype], "cpu", quick=False)
        try:
            call = build(backend, "head", size, "cpu")
            found[size.key] = of_process(Work(call, *draw(size, "cpu").of("head")))
        except Exception as error:
            print(f"{size.key}: {one_line(error)}", file=sys.stderr)
            raise SystemExit(1) from error
        torch.compiler.reset()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
