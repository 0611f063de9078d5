"""Builds the compiled module lslpn_kernels._native; the package's settings are in pyproject.toml.

Neither torch nor a GPU is needed to build. Every source is compiled by its own command through
ninja, so that a second build compiles only what has changed. Where a compiler is missing the
package installs all the same, and `lslpn_kernels.backends()` tells why a backend is not there.

Environment variables:
    LSLPN_REQUIRE     "cpu", "cuda" or "cpu,cuda": backends without which the install must fail.
    LSLPN_BUILD_CUDA  0 to leave the CUDA backend out even where nvcc is found.
    LSLPN_CUDA_ARCHS  compute capabilities to compile for, "80;90;100" by default.
    CXX, CUDA_HOME    the C++ compiler and the CUDA toolkit, where they are not found by themselves.
    MAX_JOBS          how many files are compiled at a time; the number of cores by default.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "lslpn_kernels._native"

# The CPU kernels are compiled once for each of these, and the processor decides at run time.
# Nothing may be compiled for the machine that happens to build.
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # of intrinsics, in gcc 12
    ],
}
# In csrc/cpu.
KERNELS = ("masked_average_pool.cpp", "cosine_match.cpp", "cosine_match_loss.cpp")

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]


class BuildError(Exception):
    """One line on why a part of the module cannot be built."""


@dataclass
class Plan:
    """The commands that make up one build of the module."""

    folder: Path
    commands: list[tuple[Path, Path, list[str]]] = field(default_factory=list)
    link: list[str] = field(default_factory=list)

    def compile(self, source: Path, name: str, command: list[str]) -> None:
        self.commands.append((source, self.folder / f"{name}.o", command))


def quiet_run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def find_cxx(folder: Path) -> list[str]:
    """The C++ compiler, tried out."""
    configured = shlex.split(os.environ.get("CXX") or "")
    for command in [configured] if configured else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) and compiles(command, folder):
            return command
    named = f"CXX={shlex.join(configured)}" if configured else "c++, g++ and clang++"
    raise BuildError(f"no working C++17 compiler was found ({named} tried) when it was installed")


def compiles(command: list[str], folder: Path, *flags: str) -> bool:
    """Whether a small program compiles and links with these flags."""
    source = folder / "try.cpp"
    source.write_text("#include <cmath>\nint main() { if constexpr (true) return 0; }\n")
    tried = quiet_run([*command, "-std=c++17", *flags, str(source), "-o", str(folder / "try")])
    return tried.returncode == 0


def find_nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME, on the path, where the toolkit installs itself, or of the
    package nvidia-cuda-nvcc (also where pip builds in isolation from it)."""
    if os.environ.get("LSLPN_BUILD_CUDA", "1") == "0":
        raise BuildError("LSLPN_BUILD_CUDA=0 was set when it was installed")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (
        str(Path(home) / "bin" / "nvcc") if home else None,
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
        *map(str, sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvcc"))),
    ):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise BuildError("nvcc was not found when it was installed (set CUDA_HOME and install again)")


def cpu_plan(plan: Plan, cxx: list[str]) -> None:
    """csrc/cpu: the kernels once per instruction set, everything else once."""
    flags = [*CXX_FLAGS, "-I", str(ROOT / "csrc")]
    if compiles(cxx, plan.folder, "-fopenmp"):
        flags.append("-fopenmp")
        plan.link.append("-fopenmp")
    else:
        print("OpenMP is not there: the cpu backend will use one thread", file=sys.stderr)
    variants = {"plain": []}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and compiles(cxx, plan.folder, *INSTRUCTION_SETS["avx512"]):
        variants |= INSTRUCTION_SETS
        flags.append("-DLSLPN_X86")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [*cxx, *flags, *python_flags()]
        if source.name not in KERNELS:
            plan.compile(source, f"cpu_{source.stem}", command)
            continue
        for isa, extra in variants.items():
            options = [*cxx, *flags, *extra, f"-DLSLPN_ISA={isa}"]
            plan.compile(source, f"cpu_{source.stem}_{isa}", options)


def cuda_plan(plan: Plan, cxx: list[str], nvcc: str) -> None:
    """csrc/cuda: *.cu through nvcc, *.cpp through the C++ compiler, cudart linked statically."""
    sources = ROOT / "csrc" / "cuda"
    if not (sources / "bindings.cpp").exists():
        raise BuildError("its sources are not part of this package")
    include, libraries = toolkit(nvcc, plan.folder)
    flags = [*CXX_FLAGS, "-I", str(ROOT / "csrc")]
    known = quiet_run([nvcc, "--list-gpu-arch"]).stdout.split()
    wanted = os.environ.get("LSLPN_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
    archs = sorted((a for a in wanted if f"compute_{a}" in known), key=int)
    if not archs:
        raise BuildError(f"nvcc knows none of the GPUs {', '.join(wanted)}")
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    for source in sorted(sources.glob("*.cu")):
        command = [nvcc, "-std=c++17", "-O3", *gencode, "-cudart=static", "-ccbin", cxx[0]]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-I", str(ROOT / "csrc")]
        plan.compile(source, f"cuda_{source.stem}", command)
    for source in sorted(sources.glob("*.cpp")):
        command = [*cxx, *flags, *python_flags(), *include]
        command.append(f'-DLSLPN_CUDA_ARCHS="{";".join(archs)}"')
        plan.compile(source, f"cuda_{source.stem}", command)
    plan.link += [*libraries, "-lcudart_static", "-ldl", "-lpthread", "-lrt"]


def toolkit(nvcc: str, folder: Path) -> tuple[list[str], list[str]]:
    """Where nvcc itself takes headers and libraries from, as compiler flags. What stands on the
    path may be a script that calls an nvcc elsewhere."""
    source = folder / "try.cu"
    source.write_text("int main() {}\n")
    found: dict[str, list[str]] = {"INCLUDES=": [], "LIBRARIES=": []}
    for line in quiet_run([nvcc, "--dryrun", str(source)]).stdout.splitlines():
        for name, flags in found.items():
            if line.startswith(f"#$ {name}"):
                flags += shlex.split(line.partition("=")[2])
    return found["INCLUDES="], found["LIBRARIES="]


def python_flags() -> list[str]:
    import pybind11

    return ["-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()]


def ninja_file(plan: Plan, link: list[str], target: Path) -> str:
    """The plan as build.ninja. gcc, clang and nvcc all write the headers used with -MD -MF."""

    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"builddir = {escape(plan.folder)}",
        "rule compile",
        "  command = $command",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += ["  description = $in -> $out", "rule link", "  command = $command"]
    lines += ["  description = $out"]
    objects = []
    for source, output, command in plan.commands:
        whole = [*command, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        lines += [f"build {escape(output)}: compile {escape(source)}"]
        lines += ["  command = " + shlex.join(whole).replace("$", "$$")]
        objects.append(output)
    whole = [*link, *map(str, objects), *plan.link, "-o", str(target)]
    lines += [f"build {escape(target)}: link {' '.join(map(escape, objects))}"]
    lines += ["  command = " + shlex.join(whole).replace("$", "$$")]
    return "\n".join([*lines, ""])


def run_ninja(plan: Plan, link: list[str], target: Path) -> None:
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or ""
    if not program:
        raise BuildError("ninja was not found when it was installed")
    target.parent.mkdir(parents=True, exist_ok=True)
    build = plan.folder / "build.ninja"
    build.write_text(ninja_file(plan, link, target))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    done = subprocess.run([program, "-f", str(build), "-j", jobs], check=False)
    if done.returncode:
        raise BuildError("it did not compile when it was installed (pip install -v shows why)")


def build(folder: Path, target: Path) -> dict[str, str]:
    """Builds the module as `target`. Returns for each native backend why it is not in there;
    an empty string where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = {"cpu": "", "cuda": ""}
    try:
        cxx = find_cxx(folder)
    except BuildError as error:
        return dict.fromkeys(missing, str(error))
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]

    def attempt(nvcc: str | None) -> None:
        plan = Plan(folder)
        cpu_plan(plan, cxx)
        command = [*cxx, *CXX_FLAGS, "-I", str(ROOT / "csrc"), *python_flags()]
        if nvcc:
            cuda_plan(plan, cxx, nvcc)
            command.append("-DLSLPN_WITH_CUDA")
        plan.compile(ROOT / "csrc" / "module.cpp", "module", command)
        run_ninja(plan, [*cxx, *shared], target)

    try:
        attempt(find_nvcc())
        return missing
    except BuildError as error:
        missing["cuda"] = str(error)
    try:
        attempt(None)
    except BuildError as error:
        return dict.fromkeys(missing, str(error))
    return missing


class BuildNative(build_ext):
    """Builds with ninja instead of setuptools' one-by-one compiler."""

    def run(self) -> None:
        # setuptools clears `inplace` while it runs, then copies what was built.
        self.in_source = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        wanted = {n.strip() for n in os.environ.get("LSLPN_REQUIRE", "").split(",") if n.strip()}
        unknown = sorted(wanted - {"cpu", "cuda"})
        if unknown:
            raise SystemExit(f"LSLPN_REQUIRE must name cpu or cuda, got {', '.join(unknown)}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        missing = build(self.folder(), target)
        for name, reason in missing.items():
            if reason:
                print(f"lslpn: the {name} backend is left out: {reason}", file=sys.stderr)
        for name in sorted(wanted):
            if missing[name]:
                raise SystemExit(f"LSLPN_REQUIRE={name}, but {missing[name]}")
        if missing["cpu"]:
            target.unlink(missing_ok=True)  # of an earlier build
        self.tell(missing)

    def folder(self) -> Path:
        """Where objects are kept from build to build; pip's own folders are thrown away."""
        platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"native-{platform}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return (Path(self.build_temp) / "native").resolve()
        return folder

    def tell(self, missing: dict[str, str]) -> None:
        """Writes down why a backend is missing, for `lslpn_kernels.backends()` to say."""
        package = MODULE.rpartition(".")[0].split(".")
        for root in (Path(self.build_lib), *((ROOT,) if self.in_source else ())):
            folder = root.joinpath(*package)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(json.dumps(missing) + "\n")


setup(
    ext_modules=[Extension(MODULE, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
