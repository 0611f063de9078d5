"""Packages and their declarations, and builds without a compiler or other tools."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest

import lslpn
import lslpn_kernels

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("setuptools", reason="builds with setuptools")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The package without compiled backends."""
    for name in ("csrc", "lslpn_kernels"):
        skipped = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LSLPN_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=sources,
        env=kept | {"LSLPN_BUILD_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
    )


def status(sources: Path) -> str:
    # An editable installation would provide the module that it has built.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import lslpn_kernels
print(lslpn_kernels.backends()["cpu"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=sources, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_without_a_compiler_the_rest_installs(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    reasons = json.loads((sources / "lslpn_kernels" / "_build.json").read_text())
    expected = "no working C++17 compiler was found (CXX=no-such-compiler tried)"
    assert reasons["cpu"].startswith(expected)
    said = status(sources)
    assert said.startswith(f"cpu kernels were not built: {expected}")
    assert "\n" not in said


def test_a_compiler_that_fails_is_no_compiler(sources: Path) -> None:
    done = build(sources, CXX=f"{sys.executable} -c 'raise SystemExit(1)'")
    assert done.returncode == 0, done.stderr
    assert status(sources).startswith("cpu kernels were not built: no working C++17 compiler")


def test_required_backends_fail_the_install(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler", LSLPN_REQUIRE="cpu")
    assert done.returncode != 0
    assert "LSLPN_REQUIRE=cpu, but no working C++17 compiler was found" in done.stderr
    done = build(sources, CXX="no-such-compiler", LSLPN_REQUIRE="cpu,tpu")
    assert done.returncode != 0
    assert "LSLPN_REQUIRE must name cpu or cuda, got tpu" in done.stderr


def test_a_backend_that_was_not_built_says_so(sources: Path) -> None:
    assert "run `pip install .`" in status(sources)


# What the sdist leaves out: settings of the repository itself, and records of measurements.
NOT_PACKED = re.compile(r"\.(ci|github)/|\.[^/]+$|benchmarks/results/.*\.(json|png)$")


def tracked() -> list[str]:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "setup.py" not in done.stdout.split("\0"):
        pytest.skip("this is not a git checkout")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def pack(sources: Path, kind: str, **environment: str) -> Path:
    """The sdist or wheel of a source tree, built with what is installed here."""
    program = f"from setuptools.build_meta import *; print(build_{kind}('dist'))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LSLPN_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env=kept | {"LSLPN_BUILD_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return sources / "dist" / done.stdout.split()[-1]


def test_a_wheel_from_the_sdist_is_complete(tmp_path: Path) -> None:
    files = tracked()
    pytest.importorskip("setuptools", minversion="77", reason="of licence files in pyproject.toml")
    pytest.importorskip("pybind11")
    if not (compiler := shutil.which("c++")):
        pytest.skip("there is no C++ compiler")

    checkout = tmp_path / "checkout"
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    # Files of an earlier build in a checkout are not part of the sources.
    (checkout / "lslpn_kernels" / "_build.json").write_text("{}")
    (checkout / "lslpn_kernels" / "_native.so").touch()
    with tarfile.open(pack(checkout, "sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"lslpn-{version('lslpn')}"
    packed = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    made = {name for name in packed if name.startswith("lslpn.egg-info/")}
    assert packed - made == {
        "PKG-INFO",
        "setup.cfg",
        *(name for name in files if not NOT_PACKED.match(name)),
    }

    # Optimised, for every instruction set, it would take minutes.
    quick = tmp_path / "quick"
    quick.write_text(
        f'#!/bin/sh\ncase " $* " in *" -mavx512f "*) exit 1 ;; esac\n'
        f'exec {shlex.quote(compiler)} "$@" -O0\n'
    )
    quick.chmod(0o755)
    wheel = pack(unpacked, "wheel", CXX=str(quick), LSLPN_REQUIRE="cpu")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    native = [name for name in names if name.startswith("lslpn_kernels/_native.")]
    assert len(native) == 1
    packages = ("lslpn/", "lslpn_kernels/")
    assert names == {
        *native,
        "lslpn_kernels/_build.json",
        *(name for name in files if name.startswith(packages)),
    }
    assert status(tmp_path / "wheel") == "usable on cpu"


def test_packages_have_a_version_and_types() -> None:
    assert lslpn.__version__ == lslpn_kernels.__version__ == version("lslpn")
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        _ = lslpn.version  # type: ignore[attr-defined]
    for package in (lslpn, lslpn_kernels):
        assert package.__file__
        assert Path(package.__file__).with_name("py.typed").is_file()


def test_the_head_needs_torch_alone() -> None:
    """Not what `lslpn` depends on, nor NumPy: it installs with `pip install --no-deps` on torch."""
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    others = {normalised(r) for r in settings["project"]["dependencies"]}
    others -= {"torch", "filelock"}  # torch's own
    modules = {
        module
        for module, names in packages_distributions().items()
        if others & {normalised(name) for name in names}
    }
    assert {"numpy", "nibabel", "scipy", "typer", "PIL"} <= modules
    program = """
import sys
others = set(sys.argv[1].split(","))
finders = sys.meta_path[:]
class Torch:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in others:
            return next(filter(None, (f.find_spec(name, path, target) for f in finders)), None)
sys.meta_path[:] = [Torch]
import torch
from lslpn_kernels import GridSpec, LocalPrototypeHead, backends
labels = torch.zeros(1, 1, 12, 9, dtype=torch.long)
labels[..., 4:8, 3:6] = 1
for name in ("reference", "torch", "cpu"):
    if backends()[name].usable:
        support, query = torch.randn(2, 1, 1, 6, 4, 3, requires_grad=True)
        head = LocalPrototypeHead(GridSpec(1 / 2), backend=name)
        head.loss(support, labels, query, labels).backward()
        print(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, ",".join({*modules, "lslpn"})],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["reference", "torch"]


def imported(*folders: str) -> set[str]:
    """The distributions, by normalised name, that the code of these files and folders imports."""
    sources = [
        p for f in folders for p in ([ROOT / f] if f.endswith(".py") else ROOT.glob(f"{f}/**/*.py"))
    ]
    own = {"lslpn", "lslpn_kernels", "benchmarks", *(p.stem for p in ROOT.glob("tests/**/*"))}
    modules: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_bytes())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module))
    tops = {name.partition(".")[0] for name in modules} - own - set(sys.stdlib_module_names)
    known = packages_distributions()
    return {normalised(known.get(top, [top])[0]) for top in tops}


def normalised(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    always = {normalised(r) for r in project["dependencies"]}
    extras = {
        name: {normalised(r) for r in requirements}
        for name, requirements in project["optional-dependencies"].items()
    }
    build = {normalised(r) for r in settings["build-system"]["requires"]}

    # torch brings Triton, which only the Triton backend needs.
    assert imported("lslpn_kernels") == {"torch", "triton"}
    optional = set().union(*(extras[name] for name in extras.keys() - {"test", "docs", "dev"}))
    assert imported("lslpn", "lslpn_kernels") - {"triton"} == always | optional
    assert imported("benchmarks") - {"triton"} <= always
    assert imported("setup.py") | {"setuptools"} == build
    used = imported("tests")
    assert used <= always | extras["test"]
    # ninja is run by setup.py, and the optional packages are needed where the tests call lslpn.
    # Triton and Playwright are found by name; pytest-xdist is pytest's -n.
    by_name = {"triton", "playwright", "pytest-xdist"}
    assert extras["test"] <= used | build | optional | by_name
