"""Compiles every Triton kernel for one architecture, ahead of time and without a GPU, and prints
what the machine code takes: one JSON object a line. See test_triton.py, which runs this.

    python tests/triton_compile.py 90 float32 bfloat16,channels_last bfloat16,mean,many

each after the architecture a variant: a dtype, and what differs from one contiguous episode batch
of the paper's size with `reduce="max"`.

The launches are those that the backend makes itself at the paper's size. Triton is told of a GPU
that is not there, and specialises the kernels as it would for it; only the launch is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lslpn_kernels import GridSpec
from lslpn_kernels._backends import triton_

GRID = GridSpec()
K, Q, C, D, h, H = 1, 1, 2, 256, 65, 512


class _Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(variant: str) -> dict[str, Any]:
    """The compiled kernels by name, in both directions of both operators."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled[self.fn.__name__] = kernel
        return kernel

    name, *options = variant.split(",")
    assert set(options) <= {"channels_last", "mean", "many"}, variant
    dtype = getattr(torch, name)
    B = 32 if "many" in options else 4
    reduce = "mean" if "mean" in options else "max"
    features = torch.empty(B, K, D, h, h, dtype=dtype)
    if "channels_last" in options:
        features = torch.empty(B, K, h, h, D, dtype=dtype).movedim(-1, 2)
    masks = torch.empty(B, K, C - 1, H, H, dtype=torch.bool)  # the background is derived
    JITFunction.run = only_compile
    try:
        prototypes, factor = triton_.masked_average_pool(features, masks, C, GRID, 0.0)
        triton_.masked_average_pool_backward(prototypes, masks, C, factor, features, GRID)
        scores, winners, gram = triton_.cosine_match(
            features, prototypes, GRID, (H, H), reduce, True
        )
        triton_.cosine_match_backward(
            scores, features, prototypes, scores, winners, GRID, reduce, gram
        )
    finally:
        JITFunction.run = run
    return compiled


def usage(kernel: Any) -> dict[str, int]:
    """Of one program: registers of a thread, bytes of its stack (where registers spill to, the
    local memory), shared memory and warps."""
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
    # The cubin knows of static shared memory alone; Triton asks for its own at the launch.
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": shared + kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


if __name__ == "__main__":
    driver.set_active(_Absent(int(sys.argv[1])))
    for variant in sys.argv[2:]:
        for name, kernel in compile_all(variant).items():
            record = {"arch": int(sys.argv[1]), "variant": variant, "kernel": name}
            print(json.dumps({**record, **usage(kernel)}), flush=True)
