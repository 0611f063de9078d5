"""Count what the compiled GPU kernels execute, without a GPU, and bound their time from below.

    python -m benchmarks.instructions [--out FILE] [--backends cuda triton] [--sizes batch-4 large]
    python -m benchmarks.instructions --budgets    # rewrites tests/kernels/ptx/budgets.json

The PTX that nvcc and Triton generate for compute capability 9.0 is executed on the host
(tests/kernels/ptx), for the whole head forward and backward, counting warp instructions of PTX and
32-byte sectors of memory. From these follows how long a GPU takes at least if it only issues these
instructions, or only moves these bytes: a bound by counting, not a measurement. ptxas turns some
instructions into several (an integer division) and others into none (moves, loads of parameters);
the record has the number of both for each kernel's code. This takes some minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from . import machine
from .sizes import SIZES, Size, draw

TESTS = machine.ROOT / "tests" / "kernels"
BUDGETS = TESTS / "ptx" / "budgets.json"
BACKENDS = ("cuda", "triton")
DTYPES = ("float32", "bfloat16")
ARCH = 90  # compute capability whose code is counted
ARCHS = (80, 90, 100)  # compute capabilities whose resources are recorded
LOGIT_SCALE = 20.0
# The size that has budgets: small, and used in test_ptx.py, so Triton compiles it once for both.
BUDGETED = replace(SIZES["paper"], name="budgeted", cells=9, pixels=64)
# How many episodes of the large batch are executed. They are cut into blocks as in the whole batch,
# since that no longer changes from 4 episodes on in CUDA, and from 32 on in Triton.
EXECUTED = {"cuda": 8, "triton": 32}


@dataclass(frozen=True)
class Gpu:
    """A GPU's multiprocessors, highest clock (GHz) and memory bandwidth (bytes per second)."""

    multiprocessors: int
    clock: float
    memory: float

    def issue(self, instructions: int) -> float:
        """Microseconds if each of a multiprocessor's four schedulers issues one per cycle."""
        return instructions / (self.multiprocessors * 4 * self.clock * 1e3)

    def banks(self, wavefronts: int) -> float:
        """Microseconds if a multiprocessor's shared memory serves one wavefront per cycle."""
        return wavefronts / (self.multiprocessors * self.clock * 1e3)

    def move(self, size: int) -> float:
        """Microseconds to move so many bytes at full bandwidth."""
        return size / self.memory * 1e6


GPUS = {
    # NVIDIA A100 80GB SXM data sheet; boost clock of the architecture white paper.
    "A100": Gpu(108, 1.41, 2.039e12),
    # NVIDIA H100 and H200 SXM data sheets; highest clock as reported by nvidia-smi.
    "H100": Gpu(132, 1.98, 3.35e12),
    "H200": Gpu(132, 1.98, 4.8e12),
    # NVIDIA Ada GPU architecture white paper.
    "RTX 4090": Gpu(128, 2.52, 1.008e12),
    # NVIDIA HGX B200 data sheet for the memory; 148 multiprocessors, clock reported by nvidia-smi.
    "B200": Gpu(148, 1.965, 8.0e12),
}
# CUDA programming guide, "Technical Specifications per Compute Capability": registers, warps,
# blocks and bytes of shared memory of a multiprocessor. A block takes 1 KiB of it for the system.
LIMITS = {80: (65536, 64, 32, 164 << 10), 90: (65536, 64, 32, 228 << 10)}
LIMITS[100] = LIMITS[90]


@contextmanager
def _hooked(backend: str, arch: int, archs: Sequence[int] = ARCHS) -> Iterator[None]:
    """Make the backend launch in the PTX machine; `archs` are those of the CUDA module."""
    hooks = importlib.import_module("ptx.hooks")
    if backend == "triton":
        with hooks.triton(arch):
            yield
        return
    module = importlib.import_module("ptx.cuda").load(archs)
    module.take(arch)
    with hooks.cuda(module):
        yield


def _passes(backend: str, size: Size) -> Iterator[str]:
    """Run the head part by part, and yield the name of each part after it has run."""
    kernels = importlib.import_module("ptx.hooks").KERNELS[backend]
    inputs = draw(size, "cpu")
    support, query = inputs.support.detach(), inputs.query.detach()
    shape = (size.pixels, size.pixels)
    masks, C = inputs.masks[:, :, 1:].contiguous(), size.C  # the background is derived
    prototypes, factor, *kept = kernels.masked_average_pool(support, masks, C, size.grid, 0.0)
    yield "pool"
    scores, winners, *gram = kernels.cosine_match(
        query, prototypes, size.grid, shape, "max", True, LOGIT_SCALE
    )
    yield "match"
    _, to_prototypes = kernels.cosine_match_backward(
        inputs.grad_scores, query, prototypes, scores, winners, size.grid, "max", *gram,
        logit_scale=LOGIT_SCALE,
    )  # fmt: skip
    yield "match backward"
    kernels.masked_average_pool_backward(
        *(to_prototypes, masks, C, factor, support, size.grid, *kept)
    )
    yield "pool backward"


def _loss_passes(backend: str, size: Size) -> Iterator[str]:
    """Like `_passes`, for matching that ends in a loss."""
    kernels = importlib.import_module("ptx.hooks").KERNELS[backend]
    inputs = draw(size, "cpu")
    query, prototypes = inputs.query.detach(), inputs.prototypes.detach().float()
    labels = inputs.masks[:, :1].to(torch.uint8).argmax(2).expand(-1, size.Q, -1, -1)
    choice = (size.grid, "max", (True, True))
    loss, kept = kernels.cosine_match_loss(
        query, prototypes, labels.to(torch.uint8).contiguous(), None, *choice,
        ignore_index=255, logit_scale=LOGIT_SCALE,
    )  # fmt: skip
    yield "match loss"
    shape = (size.pixels, size.pixels)
    kernels.cosine_match_loss_backward(
        torch.ones_like(loss), kept, query, prototypes, size.grid, shape, *choice[1:],
        logit_scale=LOGIT_SCALE,
    )  # fmt: skip
    yield "match loss backward"


def count(
    backend: str,
    size: Size,
    archs: Sequence[int] = ARCHS,
    passes: Callable[[str, Size], Iterator[str]] = _passes,
) -> list[dict[str, Any]]:
    """One entry for each launch of the head, forward and backward; for `archs` see `_hooked`."""
    ptx, program = importlib.import_module("ptx.machine"), importlib.import_module("ptx.program")
    found = []
    with _hooked(backend, ARCH, archs), ptx.settings(checked=False, counts=True):
        ptx.LAUNCHES.clear()
        for part in passes(backend, size):
            for launch in ptx.LAUNCHES:
                by_class = launch.by(lambda instruction: instruction.category)
                found.append({
                    "pass": part,
                    "kernel": program.readable(launch.program.name),
                    "blocks": launch.grid[0] * launch.grid[1] * launch.grid[2],
                    "warps": launch.warps,
                    "instructions": {name: by_class[name] for name in program.CLASSES},
                    "bytes_asked": 32 * sum(launch.sectors),
                    "bytes_read": launch.read,
                    "bytes_written": launch.written,
                    "shared_wavefronts": sum(launch.wavefronts),
                })  # fmt: skip
            ptx.LAUNCHES.clear()
    return found


def bounds(launches: list[dict[str, Any]], times: float = 1) -> dict[str, dict[str, float]]:
    """Microseconds on each GPU for launches that are `times` as large, one after the other.

    The time to issue, to serve shared memory, and to move every byte of a launch once; and the
    longest of the three, launch by launch.
    """
    found = {}
    for name, gpu in GPUS.items():
        parts = [
            (
                gpu.issue(sum(entry["instructions"].values())),
                gpu.banks(entry["shared_wavefronts"]),
                gpu.move(entry["bytes_read"] + entry["bytes_written"]),
            )
            for entry in launches
        ]
        sums = [times * sum(column) for column in zip(*parts, strict=True)]
        found[name] = {
            **dict(zip(("issue_us", "shared_us", "memory_us"), sums, strict=True)),
            "least_us": times * sum(map(max, parts)),
        }
    return found


def resources(backend: str, size: Size) -> list[dict[str, Any]]:
    """Registers, shared memory and occupancy of each kernel on each architecture."""
    ptx, program = importlib.import_module("ptx.machine"), importlib.import_module("ptx.program")
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for arch in ARCHS:
        shapes: dict[str, tuple[Any, int, int, int]] = {}

        def look(
            kernel: Any, grid: Any, block: Any, shared: int, _: bytes, shapes: Any = shapes
        ) -> Any:
            source = kernel.program.source
            shapes[source.name] = (
                source, sum(i.counted for i in kernel.program.instructions),
                block[0] * block[1] * block[2] // 32, kernel.program.static_shared + shared,
            )  # fmt: skip

        with _hooked(backend, arch), patch.object(ptx.Kernel, "launch", look):
            for _ in _passes(backend, size):
                pass
        for name, (source, length, warps, shared) in shapes.items():
            made = _assembled(backend, arch, source.ptx, name)
            all_registers, most_warps, most_blocks, all_shared = LIMITS[arch]
            each = (
                -(-(made["registers"] or 1) * 32 // 256) * 256
            )  # registers are allocated to warps in units of 256
            blocks = min(
                all_registers // (each * warps), most_warps // warps, most_blocks,
                all_shared // (shared + 1024),
            )  # fmt: skip
            found[arch, name] = {
                "arch": arch, "kernel": program.readable(name), **made, "ptx_instructions": length,
                "shared": shared, "warps_of_a_block": warps, "blocks": blocks,
                "occupancy": blocks * warps / most_warps,
            }  # fmt: skip
    return list(found.values())


def _assembled(backend: str, arch: int, ptx: str, name: str) -> dict[str, int | None]:
    """Registers, spilled bytes and instructions of a kernel after ptxas."""
    told, code = _assemble(backend, arch, ptx)
    match = re.search(
        rf"Compiling entry function '{re.escape(name)}'.*?(\d+) bytes spill stores, (\d+) bytes "
        r"spill loads.*?Used (\d+) registers",
        told,
        re.DOTALL,
    )
    assert match is not None, name
    stores, loads, registers = map(int, match.groups())
    text = code.partition(f".text.{name}:")[2].partition("//--------------------- ")[0]
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)", text, re.MULTILINE))
    return {
        "registers": registers,
        "spilled_bytes": stores + loads,
        "machine_instructions": instructions or None,
    }


@cache
def _assemble(backend: str, arch: int, ptx: str) -> tuple[str, str]:
    """The messages of ptxas for a module, and the disassembled machine code."""
    tools = Path(importlib.import_module("triton").__file__ or "").parent
    tools = tools / "backends" / "nvidia" / "bin"
    command = [shutil.which("ptxas") or "ptxas", "-O3"]
    if backend == "triton":
        command = [str(tools / ("ptxas-blackwell" if arch >= 100 else "ptxas"))]
    target = re.search(rf"^\.target (sm_{arch}[af]?)$", ptx, re.MULTILINE)
    assert target is not None, "the kernels were compiled for another architecture"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernels.ptx").write_text(ptx)
        command += ["-v", f"-arch={target.group(1)}", "kernels.ptx", "-o", "kernels.cubin"]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        code = subprocess.run(
            [str(tools / "nvdisasm"), "-c", "kernels.cubin"],
            cwd=folder, check=False, capture_output=True, text=True,
        ).stdout  # fmt: skip
    return done.stderr + done.stdout, code


def run(backend: str, size: Size) -> dict[str, Any]:
    """One entry of the record."""
    executed = min(size.B, EXECUTED[backend])
    times = size.B / executed
    launches = count(backend, replace(size, B=executed))
    total = dict.fromkeys(launches[0]["instructions"], 0)
    for entry in launches:
        for name, n in entry["instructions"].items():
            total[name] += n
    sums = {
        key: round(times * sum(entry[key] for entry in launches))
        for key in ("bytes_asked", "bytes_read", "bytes_written", "shared_wavefronts")
    }
    return {
        "backend": backend,
        "size": size.key,
        "describe": size.describe(),
        "episodes_executed": executed,
        "instructions": {name: round(times * n) for name, n in total.items()},
        **sums,
        "bounds": bounds(launches, times),
        "launches": launches,
        "launches_of_loss": count(backend, replace(size, B=executed), passes=_loss_passes),
    }


def budgets(backend: str) -> dict[str, dict[str, int]]:
    """Warp instructions of each kernel by dtype, which test_ptx.py compares with the budgets."""
    found: dict[str, dict[str, int]] = {}
    for dtype in DTYPES:
        entries: dict[str, int] = {}
        size = BUDGETED.with_dtype(getattr(torch, dtype))
        archs = importlib.import_module("ptx.cuda").ARCHS
        for passes in (_passes, _loss_passes):
            for entry in count(backend, size, archs=archs, passes=passes):
                key = f"{entry['pass']}: {entry['kernel']}"
                entries[key] = entries.get(key, 0) + sum(entry["instructions"].values())
        found[dtype] = entries
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write the record or the budgets."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/...)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["batch-4", "large"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--budgets", action="store_true", help=f"rewrite {BUDGETS.name} instead")
    options = parser.parse_args(arguments)
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    if options.budgets:
        known = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        known |= {backend: budgets(backend) for backend in options.backends}
        BUDGETS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        return 0
    now = datetime.now(timezone.utc)
    record: dict[str, Any] = {
        "benchmark": "instructions",
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions() | {"nvcc": _nvcc_version()},
        "machine": platform.machine(),
        "command": " ".join(["python -m benchmarks.instructions", *(arguments or sys.argv[1:])]),
        "counted_arch": ARCH,
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "runs": [],
        "resources": [],
    }
    path = (
        options.out or machine.ROOT / "benchmarks" / "results" / f"instructions-{now:%Y-%m-%d}.json"
    )
    for backend in options.backends:
        for dtype in options.dtypes:
            for name in options.sizes:
                size = SIZES[name].with_dtype(getattr(torch, dtype))
                if name == "large" and size.dtype.itemsize == 2:
                    size = replace(size, B=2 * size.B)
                record["runs"].append(run(backend, size))
                _tell(record["runs"][-1])
                path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            small = SIZES["batch-4"].with_dtype(getattr(torch, dtype))
            for entry in resources(backend, small):
                record["resources"].append({"backend": backend, "dtype": dtype, **entry})
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(path)
    return 0


def _tell(entry: dict[str, Any]) -> None:
    total = sum(entry["instructions"].values())
    least = ", ".join(f"{name} {b['least_us']:.0f}" for name, b in entry["bounds"].items())
    print(
        f"{entry['backend']} {entry['size']}: {total / 1e6:.1f} M warp instructions; "
        f"microseconds at least: {least}",
        flush=True,
    )


def _nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d[\d.]*)", text)
    return found.group(1) if found else None


if __name__ == "__main__":
    sys.exit(main())
