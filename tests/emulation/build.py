"""Compiles csrc/cuda for the host, under tests/emulation/emulation.h.

    python tests/emulation/build.py [address|thread]

builds the Python module of the emulated kernels, or the driver under a sanitizer, and prints
where it is. What has been built once is kept under build/ until a source changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-DLSLPN_EMULATION", "-I", str(ROOT / "csrc"), "-I", str(KERNELS), "-I", str(HERE)]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def _sources() -> list[Path]:
    folders = (KERNELS, HERE, ROOT / "csrc" / "core", ROOT / "csrc")
    return sorted(
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix in (".h", ".cpp", ".cu")
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def build(sanitizer: str = "") -> Path:
    """The module (without a sanitizer) or the driver (with "address" or "thread").

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found")
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

    seen = hashlib.sha256(repr((cxx, flags, sanitizer)).encode())
    for path in _sources():
        seen.update(path.read_bytes())
    name = f"emulation-{sanitizer or 'plain'}"
    folder = ROOT / "build" / f"{name}-{seen.hexdigest()[:16]}"
    target = folder / target_name
    if target.exists():
        return target
    for old in (ROOT / "build").glob(f"{name}-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.stem}.o")
        # The machinery of the emulation is none of the sanitizers' business.
        extra = instrument if source.name != "emulation.cpp" else []
        _run([cxx, *flags, *extra, "-x", "c++", "-c", str(source), "-o", output])
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = target.with_suffix(".partial")
    _run([cxx, *([] if sanitizer else ["-shared"]), *instrument, *objects, "-o", str(partial)])
    partial.rename(target)
    return target


if __name__ == "__main__":
    print(build(*sys.argv[1:2]))
