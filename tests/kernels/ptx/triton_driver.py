"""A driver for Triton whose GPU is the machine: kernels are compiled as for a real one, to PTX, and
launched there."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from instrumented import ROOT

from . import machine
from .machine import LAUNCHES, ExecutionError, Kernel
from .program import Program, kernels

CACHE = ROOT / "build" / "ptx-triton"
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


def obstacle() -> str:
    """Why Triton cannot compile here; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set"
    return ""


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, arch: int, name_tensor: Callable[[Any], None]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self
        self.name_tensor = name_tensor
        self.kernels: dict[str, Kernel] = {}
        self.ptx: Path | None = None  # of the kernel that is being loaded

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps kernels by device, also when it has another driver later.
        arch: int = self.target.arch
        return arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert self.ptx is not None
        text = self.ptx.read_text()
        if text not in self.kernels:
            self.kernels[text] = Kernel(Program(kernels(text)[name]))
        return None, self.kernels[text], 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, kernel: Kernel, *rest: Any) -> None:
            values = rest[4:]  # after metadata and hooks
            assert len(values) == len(types)
            places = iter(kernel.program.places)
            parameters = bytearray(kernel.program.parameters)
            try:
                for type_, value in zip(types, values, strict=True):
                    if type_ == "constexpr":
                        continue
                    _, offset, size = next(places)
                    if type_.startswith("*"):
                        self.name_tensor(value)
                        data = struct.pack("<Q", value.data_ptr())
                    elif type_ in _FORMATS:
                        data = struct.pack("<" + _FORMATS[type_], value)
                    else:
                        raise ExecutionError(f"an argument of the type {type_} is not understood")
                    parameters[offset : offset + size] = data
                block = (32 * metadata.num_warps, 1, 1)
                LAUNCHES.append(kernel.launch((x, y, z), block, metadata.shared, bytes(parameters)))
            finally:
                machine.forget_memory()

        return launch


@contextmanager
def active(arch: int, name_tensor: Callable[[Any], None]) -> Iterator[None]:
    """Triton launches in the machine.

    Args:
        arch: compute capability to compile for, 90 for 9.0.
        name_tensor: allows kernels to access a tensor.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    ours = _Driver(arch, name_tensor)

    def loading(module: Any, function: Any, name: str, group: dict[str, str], hash_: str) -> None:
        ours.ptx = Path(next(path for file, path in group.items() if file.endswith(".ptx")))

    # Machine code is not needed, and takes half of the time. The compiled kernels are of no use
    # elsewhere and have a separate folder.
    def no_machine_code(self: Any, src: Any, metadata: Any, *args: Any) -> bytes:
        return b"none"

    with (
        patch.object(CUDABackend, "make_cubin", no_machine_code),
        patch.dict(os.environ, TRITON_CACHE_DIR=str(CACHE)),
        patch.object(knobs.runtime, "kernel_load_start_hook", loading),
        patch.object(driver, "_active", ours),
    ):
        yield
