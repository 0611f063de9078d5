"""What happens to an installation where something that it builds with is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("setuptools", reason="builds with setuptools")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The package without anything built."""
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
    # An editable installation would lend these sources the module that it has built.
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


def test_what_was_never_built_says_so(sources: Path) -> None:
    assert "run `pip install .`" in status(sources)
