"""Compiles csrc/cuda for the host, under tests/emulation/emulation.h.

    cd tests && python -m emulation.build [address|thread]

builds the Python module of the emulated kernels, or the driver under a sanitizer, and prints
where it is. What has been built once is kept under build/ until a source changes.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from instrumented import ROOT, Unit, compiler
from instrumented import build as build_units

__all__ = ["build", "compiler"]

HERE = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-DLSLPN_EMULATION", "-I", str(ROOT / "csrc"), "-I", str(KERNELS), "-I", str(HERE)]


def build(sanitizer: str = "") -> Path:
    """The module (without a sanitizer) or the driver (with "address" or "thread").

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    flags = [*FLAGS, "-O1"]
    sources = [KERNELS / "masked_average_pool.cu", KERNELS / "cosine_match.cu"]
    if sanitizer:
        sources += [HERE / "driver.cpp", HERE / "emulation.cpp"]
        target_name = "driver"
    else:
        import pybind11

        flags += ["-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()]
        sources += [KERNELS / "bindings.cpp", HERE / "module.cpp", HERE / "emulation.cpp"]
        target_name = "emulated_kernels" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    instrument = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"] if sanitizer else []
    if sanitizer == "thread":
        flags.append("-DLSLPN_THREAD_SANITIZER")

    # The machinery of the emulation is none of the sanitizers' business.
    units = [
        Unit(source, (*flags, *(instrument if source.name != "emulation.cpp" else ())))
        for source in sources
    ]
    link = [*([] if sanitizer else ["-shared"]), *instrument]
    headers = [KERNELS, HERE, ROOT / "csrc" / "core", ROOT / "csrc"]
    return build_units(f"emulation-{sanitizer or 'plain'}", target_name, units, link, headers)


if __name__ == "__main__":
    print(build(*sys.argv[1:2]))
