"""The Triton kernels without a GPU: interpreted, and compiled ahead of time.

Both run in processes of their own. Triton reads TRITON_INTERPRET once, when it sees a kernel, and
the compilation replaces its driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lslpn_kernels._backends import triton_

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
# Why Triton cannot run at all; a missing GPU is no reason.
REASON = triton_.unavailable(torch.device("cuda")) or ""
pytestmark = pytest.mark.skipif(
    "Triton" in REASON, reason=f"the Triton kernels cannot be compiled: {REASON}"
)

KERNELS = {
    "mask_weights_kernel",
    "pool_kernel",
    "pool_backward_kernel",
    "dots_kernel",
    "scores_kernel",
    "match_weights_kernel",
    "match_backward_kernel",
}
DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = {
    "80": DTYPES,
    "90": (
        *(*DTYPES, "float32,channels_last", "bfloat16,channels_last", "bfloat16,mean,many"),
        "float32,loss",
    ),
    "100": DTYPES,
}
# Of a multiprocessor of each architecture, in bytes: all shared memory that its programs can get.
SHARED = {"80": 164 << 10, "90": 228 << 10, "100": 228 << 10}
REGISTERS = 65536


def _python(*command: str, **variables: str) -> str:
    """Runs Python on one core in a process of its own and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if "pytest" in command else None,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_interpreted() -> None:
    """The kernels' own tests, and what every backend can do (docs/backends.md), side by side."""

    def run(file: str) -> str:
        command = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "interpret_quickly")
        return _python(*command, str(TESTS / file), TRITON_INTERPRET="1")

    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(run, ("triton_interpreter.py", "test_backends.py")):
            assert " passed" in out
            print(out)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    def compile_for(arch: str) -> str:
        command = ("-m", "benchmarks.compile_ahead", "--arch", arch)
        return _python(*command, "--usage", *VARIANTS[arch])

    with ThreadPoolExecutor(2) as pool:
        return [
            json.loads(line) for out in pool.map(compile_for, VARIANTS) for line in out.splitlines()
        ]


@pytest.mark.parametrize("arch", VARIANTS)
def test_compiled_ahead_of_time(compiled: list[dict[str, Any]], arch: str) -> None:
    """Every kernel becomes machine code that spills nothing, and that leaves each multiprocessor
    room for two programs: one calculates while the other waits for memory."""
    for variant in VARIANTS[arch]:
        found = [r for r in compiled if r["arch"] == int(arch) and r["variant"] == variant]
        assert {r["kernel"] for r in found} == KERNELS
        for record in found:
            assert record["stack"] == 0, f"spills: {record}"
            assert record["local"] == 0, f"spills: {record}"
            assert record["registers"] <= 255, record
            assert 2 * record["registers"] * 32 * record["warps"] <= REGISTERS, record
            assert record["shared"] <= 99 << 10, record
            assert 2 * record["shared"] <= SHARED[arch], record


def test_what_was_compiled_ahead_is_found_again(tmp_path: Path) -> None:
    """By another process, and where the folder has been moved: Triton writes its path into it."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    command = ("-m", "benchmarks.compile_ahead", "--arch", "90", "--sizes", "tiny", "--no-tests")
    command = (*command, "--dtypes", "float32", "--processes")
    first = _python(*command, "2", "--out", str(made))
    assert first.startswith("sm_90: 9 kernels compiled, 0 found")
    made.rename(moved)
    again = _python(*command, "1", "--out", str(moved))
    assert again.startswith("sm_90: 0 kernels compiled, 9 found")
    assert {path.stem for path in moved.rglob("*.cubin")} == KERNELS
    assert {path.suffix for path in moved.rglob("*.*")} == {".cubin", ".json"}


def test_the_key_of_another_interpreter(tmp_path: Path) -> None:
    """This Triton has the same key; with another version the compiled kernels are not used."""
    text = """
import sys
from benchmarks import compile_ahead
print(compile_ahead.key_of(sys.executable) == compile_ahead._key_module().triton_key())
try:
    compile_ahead.key_of(sys.argv[1])
except ValueError as error:
    print(error)
"""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 2.1.0\necho key\n")
    other.chmod(0o755)
    same, said = _python("-c", text, str(other)).splitlines()
    assert same == "True"
    assert said.startswith(f"{other} has Triton 2.1.0, but ")
