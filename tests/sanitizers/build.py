"""Compiles csrc/cpu and its driver under sanitizers.

    cd tests && python -m sanitizers.build address,undefined|thread

prints where the driver is. Under "thread" all parallel regions run on the threads of threads.cpp,
which ThreadSanitizer knows, unlike those of libgomp.
"""

from __future__ import annotations

import ast
import platform
import sys
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


def build_driver(sanitizer: str) -> Path:
    """The driver under "address,undefined" or "thread".

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    instruction_sets, kernels = _setup_constants()
    variants: dict[str, list[str]] = {"plain": []}
    flags = [*FLAGS, "-fopenmp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants |= instruction_sets
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
    units = []
    for source in sorted(CPU.glob("*.cpp")):
        if source.name in kernels:
            units += [
                Unit(source, (*flags, *extra, *instrument, f"-DLSLPN_ISA={isa}"), f"_{isa}")
                for isa, extra in variants.items()
            ]
        elif source.name != "bindings.cpp":
            units.append(Unit(source, (*flags, *instrument)))
    units.sort(key=lambda unit: -unit.source.stat().st_size)  # the longest first
    units += [Unit(source, tuple(driver_flags)) for source in helpers]
    headers = [CPU, ROOT / "csrc" / "core", HERE]
    return build(f"sanitizers-{sanitizer.partition(',')[0]}", "driver", units, link, headers)


if __name__ == "__main__":
    print(*launcher(sys.argv[1]), build_driver(sys.argv[1]))
