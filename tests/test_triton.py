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
# What keeps Triton from running at all; a missing GPU does not.
REASON = triton_.unavailable(torch.device("cuda")) or ""
pytestmark = pytest.mark.skipif(
    "Triton" in REASON, reason=f"the Triton kernels cannot be compiled: {REASON}"
)

KERNELS = {
    "mask_tiles_kernel",
    "pool_kernel",
    "pool_back_kernel",
    "dots_kernel",
    "scores_kernel",
    "match_tiles_kernel",
    "match_back_kernel",
}
DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = {
    "80": DTYPES,
    "90": (*DTYPES, "float32,channels_last", "bfloat16,channels_last", "bfloat16,mean,many"),
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
        cwd=TESTS.parent,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
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
    out = _python(
        *("-m", "pytest", "-p", "no:cacheprovider", str(TESTS / "triton_interpreter.py")),
        TRITON_INTERPRET="1",
    )
    assert " passed" in out
    print(out)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    def compile_for(arch: str) -> str:
        return _python(str(TESTS / "triton_compile.py"), arch, *VARIANTS[arch])

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
