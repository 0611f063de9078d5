"""Compiles native sources for tests that run them outside of the package: under sanitizers, or in
the machine of ptx/. Results are kept under build/ until a source changes."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock  # which torch needs as well

ROOT = Path(__file__).resolve().parents[2]


def compiler() -> str | None:
    """The C++ compiler: CXX, or g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


@dataclass(frozen=True)
class Unit:
    """A source file and how it is compiled: by `compiler`, or else by the C++ compiler. `name`
    distinguishes compilations of one source."""

    source: Path
    flags: tuple[str, ...]
    name: str = ""
    compiler: str = ""


def build(
    name: str, target: str, units: Sequence[Unit], link: Sequence[str], headers: Iterable[Path]
) -> Path:
    """Compiles two units at a time and links them. Targets of one name and the same headers share
    units that are compiled in the same way.

    Args:
        name: of the folder under build/.
        target: of the program or module in there.
        units: what to compile.
        link: flags for the linker.
        headers: folders whose files the units include.

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found")
    included = sorted({path for folder in headers for path in folder.iterdir() if path.is_file()})
    folder = ROOT / "build" / f"{name}-{_digest(cxx, *included)}"
    sources = [unit.source for unit in units]
    made = folder / _digest(units, link, *sources) / target
    if made.exists():
        return made
    for old in folder.parent.glob(f"{name}-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    # Another process may build the same; and a killed build leaves no file that looks complete.
    with FileLock(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as aside:
        if made.exists():
            return made

        def compile_one(unit: Unit) -> str:
            output = f"{unit.source.stem}{unit.name}-{_digest(unit, unit.source)}.o"
            if not (folder / output).exists():
                command = [unit.compiler] if unit.compiler else [cxx, "-x", "c++"]
                _run([*command, *unit.flags, "-c", str(unit.source), "-o", f"{aside}/{output}"])
                Path(aside, output).replace(folder / output)
            return str(folder / output)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, units))
        partial = Path(aside) / target
        _run([cxx, *objects, *link, "-o", str(partial)])
        made.parent.mkdir(exist_ok=True)
        partial.replace(made)
    return made


def _digest(*parts: object) -> str:
    """A digest of the parts, and of the content of those that are files."""
    seen = hashlib.sha256()
    for part in parts:
        seen.update(repr(part).encode())
        if isinstance(part, Path):
            seen.update(part.read_bytes())
    return seen.hexdigest()[:16]


@functools.cache
def launcher(sanitizer: str) -> list[str]:
    """The command prefix with which a program compiled with -fsanitize=`sanitizer` runs here.

    Raises:
        RuntimeError: it cannot be built or run; one line on why.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found (g++, or CXX)")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "try.cpp"), Path(folder, "try")
        source.write_text("int main() {}\n")
        try:
            _run([cxx, f"-fsanitize={sanitizer}", str(source), "-o", str(program)])
        except RuntimeError:
            raise RuntimeError(f"{cxx} has no runtime for -fsanitize={sanitizer}") from None
        # ThreadSanitizer fails with the randomised addresses of some Linux kernels.
        for prefix in ([], ["setarch", "-R"]):
            if prefix and shutil.which(prefix[0]) is None:
                continue
            if subprocess.run([*prefix, str(program)], check=False, capture_output=True).returncode:
                continue
            return prefix
    raise RuntimeError(f"programs compiled with -fsanitize={sanitizer} do not run on this machine")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
