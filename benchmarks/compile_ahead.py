"""Compile the Triton kernels for a GPU on another machine, into a cache that is copied to it.

    python -m benchmarks.compile_ahead --arch 90 --out DIR [--key-of PYTHON]

`DIR` gets every kernel that the benchmark of the head and the GPU tests launch, for
`python -m benchmarks.gpu --triton-cache DIR`. Without `--out` it is Triton's own cache: a machine
with many cores then compiles in parallel what one process would compile one after the other.
Kernels that are already in DIR are not compiled again. Triton writes absolute paths into DIR, so a
folder that was moved must be given to this command before it can be used as TRITON_CACHE_DIR;
`benchmarks.gpu` does that.

Triton's cache key is a hash of its own version and files, the kernel's source and constants, the
types of its arguments and which of them are 1 or divisible by 16, the options of the launch, the
version of ptxas, the architecture, and the environment variables that affect compilation.
Everything but Triton's files is the same here, because the backend itself makes the launches for
the same shapes: Triton is told of a GPU that does not exist, and only the launch is skipped. One of
Triton's files is a library that differs between Python versions. So both machines need the same
versions of Triton and of Python; otherwise, `--key-of` names a Python interpreter with the Triton
of the other machine (it needs no torch), which computes its part of the hash.

    python -m benchmarks.compile_ahead --arch 90 --usage float32 bfloat16,channels_last

prints the resources that the machine code of each kernel uses, one JSON object per line. A variant
is a dtype, followed by what differs from a contiguous batch of the paper's episodes with
`reduce="max"` (`channels_last`, `mean`, `many` episodes, `loss` instead of scores).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lslpn_kernels import GridSpec
from lslpn_kernels._backends import triton_

from . import machine
from .formulations import build
from .sizes import PARTS, Size, blank, chosen
from .timing import Work

Launches = Callable[[], object]
OPTIONS = {"channels_last", "mean", "many", "loss"}
_KEY = "import sys, triton, {0}; print(triton.__version__); print({0}.triton_key())"


class _Absent:
    """The part of Triton's driver that compilation needs."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(arch: int, see: Callable[[str, Any], object] = lambda name, kernel: None) -> None:
    """Make `backend="triton"` of this process accept CPU tensors and compile for an architecture.

    Nothing is launched, so results are not written. `see` is called with the name of each kernel
    and its machine code, or None if `jit_cache_hook` skipped it.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        see(self.fn.__name__, run(self, *args, **{**kwargs, "warmup": True}))

    driver.set_active(_Absent(arch))
    JITFunction.run = only_compile
    triton_.DEVICE_TYPES, triton_.unavailable = ("cpu",), lambda device: None


# What is launched


def of_benchmark(sizes: Sequence[Size]) -> Iterator[Launches]:
    """All launches of `benchmarks.head`."""
    for size in sizes:
        for part in PARTS:
            yield partial(_passes, size, part)


def _passes(size: Size, part: str) -> None:
    work = Work(build("triton", part, size, "cpu"), *blank(size).of(part))
    work.inference()
    work.clear()
    work.both()


def of_tests() -> Iterator[Launches]:
    """The launches of tests/kernels/test_gpu.py."""
    sys.path.insert(0, str(machine.ROOT / "tests" / "kernels"))
    launches: Iterator[Launches] = importlib.import_module("test_gpu").triton_launches()
    return launches


def launch_variant(variant: str) -> None:
    """Launch both directions of both operators at the paper's size; for variants see the module."""
    name, *options = variant.split(",")
    if not set(options) <= OPTIONS:
        raise ValueError(f"{variant}: the options are {', '.join(sorted(OPTIONS))}")
    K, C, D, h, H = 1, 2, 256, 65, 512
    dtype, grid = getattr(torch, name), GridSpec()
    B = 32 if "many" in options else 4
    reduce = "mean" if "mean" in options else "max"
    features = torch.empty(B, K, D, h, h, dtype=dtype)
    if "channels_last" in options:
        features = torch.empty(B, K, h, h, D, dtype=dtype).movedim(-1, 2)
    masks = torch.empty(B, K, C - 1, H, H, dtype=torch.bool)  # the background is derived

    prototypes, factor, *kept = triton_.masked_average_pool(features, masks, C, grid, 0.0)
    triton_.masked_average_pool_backward(prototypes, masks, C, factor, features, grid, *kept)
    if "loss" in options:
        labels = torch.empty(B, K, H, H, dtype=torch.uint8)
        choice = (grid, reduce, (True, True))
        numbers: Any = {"logit_scale": 20.0}
        loss, kept = triton_.cosine_match_loss(
            features, prototypes, labels, None, *choice, ignore_index=255, **numbers
        )
        size = ((H, H), reduce, (True, True))
        triton_.cosine_match_loss_backward(loss, kept, features, prototypes, grid, *size, **numbers)
        return
    scores, winners, gram = triton_.cosine_match(features, prototypes, grid, (H, H), reduce, True)
    triton_.cosine_match_backward(scores, features, prototypes, scores, winners, grid, reduce, gram)


# Compiling


def share_of(
    arch: int, number: int, of: int, sizes: Sequence[Size], tests: bool, key: str | None
) -> tuple[int, int]:
    """Compile one of `of` equal parts of all kernels.

    Every part goes through all launches, which takes little time, and skips the kernels of others.

    Returns:
        how many kernels were compiled, and how many were already in the cache.
    """
    from triton import knobs

    torch.set_num_threads(1)
    found = {False: 0, True: 0}

    def of_others(*, key: Any, fn: Any, **_: Any) -> bool:
        return zlib.crc32(f"{fn.name} {key}".encode()) % of != number

    def compiled(*, cache_hit: bool, **_: Any) -> None:
        found[bool(cache_hit)] += 1

    knobs.runtime.jit_cache_hook = of_others
    knobs.compilation.listener = compiled
    knobs.compilation.store_binary_only = True
    if key:
        _key_module().triton_key = lambda: key
    pretend(arch)
    for launches in (*of_benchmark(sizes), *(of_tests() if tests else ())):
        launches()
    return found[False], found[True]


def _key_module() -> Any:
    """The module in which Triton looks up the hash of its own files; it differs by version."""
    from triton.compiler import compiler
    from triton.runtime import cache

    return cache if hasattr(cache, "triton_key") else compiler


def key_of(python: str) -> str:
    """The hash of the files of another interpreter's Triton.

    Raises:
        ValueError: the interpreter has no Triton, or another version.
    """
    import triton

    done = subprocess.run(
        [python, "-c", _KEY.format(_key_module().__name__)],
        capture_output=True, text=True, check=False, cwd="/",
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    version, key = done.stdout.splitlines()
    if version != triton.__version__:
        raise ValueError(f"{python} has Triton {version}, but {triton.__version__} is needed")
    return key


def tidy(cache: Path) -> None:
    """Set the absolute paths in a cache to the folder's current place, and halve its size.

    The latter by deleting the kernels' source in Triton's intermediate form, which is not needed.
    """
    for path in cache.glob("*/__grp__*.json"):
        names = json.loads(path.read_text("utf-8"))["child_paths"]
        kept = {n: str(path.parent / n) for n in names if not n.endswith(".source")}
        if kept != names:
            partial_ = path.with_suffix(".partial")
            partial_.write_text(json.dumps({"child_paths": kept}), "utf-8")
            partial_.replace(path)
        for source in path.parent.glob("*.source"):
            source.unlink()


def usage(kernel: Any) -> dict[str, int]:
    """Resources of a program: registers, stack and local memory (bytes) per thread, to which
    registers spill, shared memory (bytes) and warps."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found, text
    registers, stack, shared, local = map(int, found.groups())
    # The cubin has only static shared memory; Triton requests its own at launch.
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": shared + kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def _print_usage(arch: int, variants: Sequence[str]) -> None:
    compiled: dict[str, Any] = {}
    pretend(arch, compiled.__setitem__)
    for variant in variants:
        compiled.clear()
        launch_variant(variant)
        for name, kernel in compiled.items():
            record = {"arch": arch, "variant": variant, "kernel": name}
            print(json.dumps({**record, **usage(kernel)}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, or print resources; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_ahead",
        description="Compile the Triton kernels for a GPU on another machine.",
    )
    parser.add_argument("--arch", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--out", type=Path, help="the cache (default: Triton's own)")
    parser.add_argument("--key-of", metavar="PYTHON", help="interpreter with the same Triton")
    parser.add_argument("--sizes", nargs="*", metavar="SIZE", help="default: those for a GPU")
    parser.add_argument("--dtypes", nargs="*", metavar="DTYPE", help="default: those for a GPU")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmark's kernels")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--usage", nargs="+", metavar="VARIANT", help="print resources and exit")
    options = parser.parse_args(arguments)
    if options.usage:
        _print_usage(options.arch, options.usage)
        return 0
    if options.out:
        os.environ["TRITON_CACHE_DIR"] = str(options.out.resolve())
        tidy(options.out.resolve())
    try:
        key = key_of(options.key_of) if options.key_of else None
        sizes = chosen(options.sizes, options.dtypes, "cuda", quick=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    began = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # each process takes its tensors from the CPU
    n = options.processes
    with ProcessPoolExecutor(n, get_context("spawn")) as pool:
        parts = [
            pool.submit(share_of, options.arch, i, n, sizes, not options.no_tests, key)
            for i in range(n)
        ]
        made, there = map(sum, zip(*(part.result() for part in parts), strict=True))
    if options.out:
        tidy(options.out.resolve())
    seconds = time.monotonic() - began
    print(f"sm_{options.arch}: {made} kernels compiled, {there} found, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
