"""Compiles the Triton kernels for a GPU that is not here, into a cache that is carried to it.

    python -m benchmarks.compile_ahead --arch 90 --out DIR [--key-of PYTHON]

`DIR` gets every kernel that the benchmark of the head and the tests of a GPU launch there, for
`python -m benchmarks.gpu --triton-cache DIR`. Without `--out` it is Triton's own cache: a machine
with many cores compiles there at the same time what one process would compile one by one. What DIR
has is not compiled again. Triton writes whole paths into it, so that a folder that was moved must
be given to this command before it is good as TRITON_CACHE_DIR; `benchmarks.gpu` does that.

Triton finds a kernel again by a hash over its own version and files, the kernel's source and
constants, the types of its arguments and which of them are 1 or divisible by 16, the options of the
launch, the version of ptxas, the architecture, and those variables of the environment that change
what it compiles. Everything but the first is the same here, since the launches are those that the
backend makes by itself for the same shapes: Triton is told of a GPU that is not there, and only the
launch is left out. Among Triton's files is a library that differs between Python versions. So both
machines need one version of Triton, and of Python too; or else `--key-of` names a Python
interpreter with the Triton of the other machine (it needs no torch), which is asked for its part of
the hash.

    python -m benchmarks.compile_ahead --arch 90 --usage float32 bfloat16,channels_last

prints what the machine code of each kernel takes, one JSON object a line, for the variants named: a
dtype, and what differs from one contiguous batch of the paper's episodes with `reduce="max"`
(`channels_last`, `mean`, `many` episodes, `loss` in place of scores).
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
    """As much of Triton's driver as compiling asks for."""

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
    """From now on `backend="triton"` of this process takes tensors of the CPU and compiles for that
    architecture, but launches nothing: results are not written. `see` is told the name of each
    kernel and its machine code, or None where `jit_cache_hook` has left that out."""
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
    """Both directions of both operators at the paper's size; see the module."""
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
    """Compiles one of `of` equal parts of all kernels. Every part goes through all launches, which
    takes little time, and leaves out what belongs to others. How many kernels were compiled, and
    how many were in the cache already."""
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
    """Where Triton asks for the hash of its own files: it moved between versions."""
    from triton.compiler import compiler
    from triton.runtime import cache

    return cache if hasattr(cache, "triton_key") else compiler


def key_of(python: str) -> str:
    """That hash of another interpreter's Triton.

    Raises:
        ValueError: it has none, or one of another version.
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
        raise ValueError(f"{python} has Triton {version}; here it is {triton.__version__}")
    return key


def tidy(cache: Path) -> None:
    """Sets the paths in a cache to where the folder is now, since Triton writes whole ones, and
    takes out half of its bytes: the source in Triton's own words, which nothing asks for."""
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
    """Of one program: registers of a thread, bytes of its stack (where registers spill to, the
    local memory), shared memory and warps."""
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
    # The cubin knows of static shared memory only; Triton asks for its own at the launch.
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
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_ahead",
        description="Compile the Triton kernels for a GPU that need not be here.",
    )
    parser.add_argument("--arch", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--out", type=Path, help="the cache (default: Triton's own)")
    parser.add_argument("--key-of", metavar="PYTHON", help="interpreter with the same Triton")
    parser.add_argument("--sizes", nargs="*", metavar="SIZE", help="default: all of a GPU")
    parser.add_argument("--dtypes", nargs="*", metavar="DTYPE", help="default: as of a GPU")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmark's kernels")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--usage", nargs="+", metavar="VARIANT", help="print resources and stop")
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
