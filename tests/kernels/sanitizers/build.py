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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from instrumented import ROOT, Unit, build, launcher

HERE = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
# -O1 and not -O3: what is out of bounds is so at any level, and half the time goes into compiling.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
FLAGS += ["-I", str(ROOT / "csrc"), "-I", str(HERE)]


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
    variants: dict[str, list[str]] = {"plain": []}
    flags = [*FLAGS, "-fopenmp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants |= INSTRUCTION_SETS
        flags.append("-DLSLPN_X86")
    instrument = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    link = [*instrument, "-fopenmp", "-pthread"]
    helpers = [HERE / "driver.cpp"]
    driver_flags = [*flags, *instrument]
    if sanitizer == "thread":
        helpers.append(HERE / "threads.cpp")
        link.remove("-fopenmp")
        # The driver starts no threads of its own but to call kernels, and is quicker like this.
        driver_flags = [*flags, "-DLSLPN_OWN_THREADS"]
    units = list(_units(variants, [*flags, *instrument], leave_out="bindings.cpp"))
    units.sort(key=lambda unit: -unit.source.stat().st_size)  # the longest first
    units += [Unit(source, tuple(driver_flags)) for source in helpers]
    headers = [CPU, ROOT / "csrc" / "core", HERE]
    return build(f"sanitizers-{sanitizer.partition(',')[0]}", "driver", units, link, headers)


def build_module() -> Path:
    """The package's compiled module under "address,undefined", with the plain kernels alone.

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
        ImportError: there is no pybind11.
    """
    import pybind11

    includes = ["-I", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    instrument = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = [*FLAGS, *includes, "-fopenmp", "-fPIC", "-fvisibility=hidden"]
    units = [
        *_units({"plain": []}, [*flags, *instrument]),
        Unit(ROOT / "csrc" / "module.cpp", tuple(flags)),
    ]
    headers = [CPU, ROOT / "csrc" / "core", ROOT / "csrc"]
    name = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
    return build("fuzzed", name, units, ["-shared", *instrument, "-fopenmp"], headers)


def _units(
    variants: Mapping[str, Sequence[str]], flags: Sequence[str], leave_out: str = ""
) -> Iterator[Unit]:
    """The sources of csrc/cpu; the kernels once for each instruction set and its flags."""
    for source in sorted(CPU.glob("*.cpp")):
        if source.name in KERNELS:
            for isa, extra in variants.items():
                yield Unit(source, (*flags, *extra, f"-DLSLPN_ISA={isa}"), f"_{isa}")
        elif source.name != leave_out:
            yield Unit(source, tuple(flags))


if __name__ == "__main__":
    print(*launcher(sys.argv[1]), build_driver(sys.argv[1]))
