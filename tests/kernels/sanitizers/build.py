"""Compiles csrc/cpu and its driver under sanitizers.

    cd tests && python -m sanitizers.build address,undefined|thread

prints where the driver is. Under "thread" all parallel regions run on the threads of threads.cpp,
which ThreadSanitizer knows, unlike those of libgomp.
"""

from __future__ import annotations

import ast
import platform
import sys
import sysconfig
from pathlib import Path

from instrumented import ROOT, Unit, build, launcher

HERE = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
FLAGS += ["-I", str(ROOT / "csrc"), "-I", str(HERE), "-fopenmp", "-fPIC", "-fvisibility=hidden"]
HEADERS = (CPU, ROOT / "csrc" / "core", ROOT / "csrc", HERE)


def _setup_constants() -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """INSTRUCTION_SETS and KERNELS of setup.py, which cannot be imported without running it."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("INSTRUCTION_SETS", "KERNELS"):
                found[name] = eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    return found["INSTRUCTION_SETS"], found["KERNELS"]


# At import: drivers are built side by side, and Python 3.11 cannot parse in two threads at once.
INSTRUCTION_SETS, KERNELS = _setup_constants()


def build_driver(sanitizer: str) -> Path:
    """The driver under "address,undefined" or "thread".

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    instrument = _instrument(sanitizer)
    link, flags = [*instrument, "-pthread"], [*_flags(), *instrument]
    units = _kernels(sanitizer)
    if sanitizer == "thread":
        # The driver starts no threads of its own but to call kernels, and is quicker like this.
        flags = [*_flags(), "-DLSLPN_OWN_THREADS"]
        units.append(Unit(HERE / "threads.cpp", tuple(flags)))
    else:
        link.append("-fopenmp")
    units.append(Unit(HERE / "driver.cpp", tuple(flags)))
    return build(f"sanitizers-{sanitizer.partition(',')[0]}", "driver", units, link, HEADERS)


def build_module() -> Path:
    """The package's compiled module under "address,undefined", with the kernels of the driver.

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
        ImportError: there is no pybind11.
    """
    import pybind11

    instrument = _instrument("address,undefined")
    python = ("-I", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"])
    units = [
        *_kernels("address,undefined"),
        Unit(CPU / "bindings.cpp", (*_flags(), *instrument, *python)),
        Unit(ROOT / "csrc" / "module.cpp", (*_flags(), *python)),
    ]
    name = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
    link = ["-shared", *instrument, "-fopenmp"]
    return build("sanitizers-address", name, units, link, HEADERS)


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _flags() -> list[str]:
    return [*FLAGS, "-DLSLPN_X86"] if _x86() else FLAGS


def _instrument(sanitizer: str) -> list[str]:
    return [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]


def _kernels(sanitizer: str) -> list[Unit]:
    """The sources of csrc/cpu without the bindings, the longest first; the kernels once for each
    instruction set and its flags."""
    flags = [*_flags(), *_instrument(sanitizer)]
    variants = {"plain": [], **(INSTRUCTION_SETS if _x86() else {})}
    units = []
    for source in sorted(CPU.glob("*.cpp"), key=lambda path: -path.stat().st_size):
        if source.name in KERNELS:
            for isa, extra in variants.items():
                units.append(Unit(source, (*flags, *extra, f"-DLSLPN_ISA={isa}"), f"_{isa}"))
        elif source.name != "bindings.cpp":
            units.append(Unit(source, tuple(flags)))
    return units


if __name__ == "__main__":
    print(*launcher(sys.argv[1]), build_driver(sys.argv[1]))
