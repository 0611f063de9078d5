"""CUDA sources as nvcc compiles them, with kernels that run in the machine.

The host's side is what nvcc makes of it, linked with cudart.cpp in place of NVIDIA's runtime; the
PTX is the one in the module. So nothing needs to be known about kernels or their launches.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import struct
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from instrumented import ROOT, Unit, build

from .machine import LAUNCHES, ExecutionError, Kernel
from .program import Program, Source, kernels

HERE = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = (80, 90, 100)  # as setup.py


def obstacle() -> str:
    """Why modules cannot be built here; empty where they can."""
    if shutil.which("nvcc") is None:
        return "needs nvcc"
    return ""


def build_module(
    archs: Sequence[int] = ARCHS, folder: Path = SOURCES, instrument: str = ""
) -> Path:
    """A Python module "ptx_kernels" of the .cu and .cpp files of a folder.

    Args:
        archs: compute capabilities to have PTX for, 90 for 9.0.
        instrument: sanitizers for the host's side, "address,undefined" say. The kernels are then
            compiled without optimisation, and are not meant to be executed.

    Raises:
        RuntimeError: nvcc refuses the sources.
    """
    import pybind11

    nvcc = shutil.which("nvcc") or "nvcc"
    common = ("-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-I", str(ROOT / "csrc"))
    python = ("-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include())
    device = ("-O3", "-lineinfo", "--no-compress", "-Xcompiler=-O0", "-Werror", "all-warnings")
    link = ["-shared", "-Wl,-Bsymbolic"]
    name = f"ptx-{'x'.join(map(str, archs))}-cuda"
    if instrument:
        options = [f"-fsanitize={part}" for part in instrument.split(",")]
        options.append("-fno-sanitize-recover=all")
        common += ("-Xcompiler=" + ",".join([*options, "-g1"]),)
        device = ("-Xcicc=-O0", "--no-compress", "-Xcompiler=-O0")
        link += options
        name += "-instrumented"
    device += tuple(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs)
    units = [Unit(s, (*common, *device), compiler=nvcc) for s in sorted(folder.glob("*.cu"))]
    for source in (*sorted(folder.glob("*.cpp")), HERE / "module.cpp", HERE / "cudart.cpp"):
        units.append(Unit(source, (*common, "-O0", *python), compiler=nvcc))
    module = "ptx_kernels" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    return build(name, module, units, link, [folder, ROOT / "csrc" / "core", ROOT / "csrc"])


def load(archs: Sequence[int] = ARCHS) -> Module:
    """The module of csrc/cuda."""
    return _load(build_module(archs))


@cache
def _load(path: Path) -> Module:
    """Once for each file: its runtime has one place to launch in."""
    return Module(path)


class Module:
    """A module from `build_module`, loaded. `module` is what Python sees of it."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("ptx_kernels", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._runtime = ctypes.CDLL(str(path))
        texts = [text for binary in self._binaries() for text in _ptx_of(binary)]
        self.ptx: dict[int, list[str]] = {}  # by compute capability
        for text in texts:
            arch = re.search(r"^\.target\s+sm_(\d+)", text, re.M)
            assert arch is not None
            self.ptx.setdefault(int(arch.group(1)), []).append(text)
        self._sources = {arch: _sources(texts) for arch, texts in self.ptx.items()}
        self._translated: dict[int, dict[str, Kernel]] = {arch: {} for arch in self.ptx}
        self.take(max(self.ptx))
        self.error: ExecutionError | None = None  # of the last launch
        self._callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, *(ctypes.POINTER(ctypes.c_uint32),) * 2,
            ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p),
        )(self._launch)  # fmt: skip
        self._runtime.cudart_on_launch(self._callback)

    def set_device(self, multiprocessors: int, shared_memory: int) -> None:
        """What launches are told of the GPU; an H200 (132, 227 KiB a block) by default."""
        self._runtime.cudart_device(multiprocessors, shared_memory)

    def take(self, arch: int) -> None:
        """Launches what was compiled for a compute capability."""
        self._arch = arch

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Those that were launched."""
        return self._translated[self._arch]

    def _binaries(self) -> list[bytes]:
        self._runtime.cudart_binary.restype = ctypes.c_void_p
        found = []
        for i in range(self._runtime.cudart_binaries()):
            at = self._runtime.cudart_binary(i)
            size = 16 + struct.unpack("<Q", ctypes.string_at(at + 8, 8))[0]
            found.append(ctypes.string_at(at, size))
        return found

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, values: Any) -> int:
        try:
            self.error = None
            kernel = self.kernels.get(name.decode())
            if kernel is None:
                kernel = Kernel(Program(self._sources[self._arch][name.decode()]))
                self.kernels[name.decode()] = kernel
            parameters = bytearray(kernel.program.parameters)
            for i, (_, offset, size) in enumerate(kernel.program.places):
                parameters[offset : offset + size] = ctypes.string_at(values[i], size)
            LAUNCHES.append(kernel.launch(grid[:3], block[:3], shared, bytes(parameters)))
        except Exception as error:  # must not leave through C
            self.error = error if isinstance(error, ExecutionError) else ExecutionError(repr(error))
            return 1
        return 0


def _sources(texts: Sequence[str]) -> dict[str, Source]:
    return {name: source for text in texts for name, source in kernels(text).items()}


def _ptx_of(binary: bytes) -> list[str]:
    """The PTX in a fat binary, whose entries have a kind (1 is PTX), and the sizes of their header
    and of what follows."""
    found, at = [], 16
    while at + 16 <= len(binary):
        kind, _, header, size = struct.unpack_from("<HHIQ", binary, at)
        if kind == 1:
            found.append(binary[at + header : at + header + size].rstrip(b"\0").decode())
        at += header + size
    return found
