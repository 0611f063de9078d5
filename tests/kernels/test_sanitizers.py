"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and the
host's side of the CUDA kernels under the first two.

sanitizers/driver.cpp calls the sources of csrc/cpu, compiled for each instruction set of this
machine, with memory of exactly the size that is needed, and compares what they find with the
equations and between numbers of threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest
from instrumented import ROOT, compiler, launcher
from ptx import cuda
from sanitizers.build import build_driver, build_module

ADDRESS, THREAD = "address,undefined", "thread"
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
DRAWN = 24  # problems, beside those of the list


class Outcome(NamedTuple):
    status: int
    output: str


def run(sanitizer: str, *arguments: str) -> Outcome:
    command = [*launcher(sanitizer), str(build_driver(sanitizer)), *arguments]
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, **OPTIONS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return Outcome(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def problems() -> dict[str, Future[Outcome]]:
    """The outcome of the driver's problems under each sanitizer, both at the same time."""
    runnable = []
    for sanitizer in (THREAD, ADDRESS):
        try:
            launcher(sanitizer)
        except RuntimeError:
            continue  # the tests skip with the reason
        build_driver(sanitizer)  # with two compilers at a time
        runnable.append(sanitizer)
    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(run, name, str(DRAWN)) for name in runnable}


def need(sanitizer: str) -> None:
    try:
        launcher(sanitizer)
    except RuntimeError as error:
        pytest.skip(f"cannot run sanitizers: {error}")


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_are_clean_and_right(sanitizer: str, problems: dict[str, Future[Outcome]]) -> None:
    need(sanitizer)
    status, output = problems[sanitizer].result()
    assert status == 0, output[-6000:]
    found = re.search(r"^(\d+) cases, 0 failures, instruction sets plain", output, re.M)
    assert found, output[-6000:]
    assert int(found[1]) > DRAWN
    if sanitizer == THREAD:
        # Small problems are left to one thread; there must be enough that are not.
        regions = re.search(r"(\d+) parallel regions", output)
        assert regions, output
        assert int(regions[1]) > 200


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [
        (ADDRESS, "overrun", "AddressSanitizer: heap-buffer-overflow"),
        (ADDRESS, "misaligned", "runtime error: .*misaligned address"),
        (THREAD, "race", "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers_see_planted_mistakes(sanitizer: str, mistake: str, report: str) -> None:
    """Were the kernels not instrumented, the test above could not fail."""
    need(sanitizer)
    status, output = run(sanitizer, mistake)
    assert status != 0
    assert re.search(report, output), output[-6000:]


FUZZ = """
import importlib.util, sys
import pytest
spec = importlib.util.spec_from_file_location("lslpn_kernels._native", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from lslpn_kernels._backends import native
assert native.module()[0] is module
# Not all that intrinsics read and write is instrumented.
module.cpu_use_instruction_set("plain")
sys.exit(pytest.main(["-v", "tests/kernels/test_ops.py", "-k", "fuzz or capsules"]))
"""


def test_no_call_of_the_binding_reads_or_writes_out_of_bounds() -> None:
    """The fuzz tests again, under AddressSanitizer."""
    need(ADDRESS)
    pytest.importorskip("pybind11")
    status, output = in_python(FUZZ, str(build_module()))
    assert status == 0, output[-6000:]
    assert re.search(r"\b4 passed\b", output), output[-2000:]


# Axes from one pixel to more than what fits into a plan, windows from one pixel to the whole image;
# launches are answered, and nothing is executed.
PLANS = """
import random, sys
from pathlib import Path
sys.path.insert(0, "tests/kernels")
import torch
from ptx import cuda, hooks
from lslpn_kernels import GridSpec
from lslpn_kernels._backends import cuda as backend, torch_, through_torch

# What the kernels do not take is not computed.
through_torch.masked_average_pool = lambda x, masks, C, grid, least: (None, None)
through_torch.masked_average_pool_backward = lambda *_: None
through_torch.cosine_match_backward = lambda *_: (None, None)
torch_.cosine_match = lambda *_: torch.zeros(())
names = []

class Module(cuda.Module):
    def _launch(self, name, *rest):
        names.append(name)
        return 0

module = Module(Path(sys.argv[1]))
draw = random.Random(0)

def axis():
    pixels = draw.randint(1, 900)
    return draw.randint(1, max(1, pixels // draw.choice([1, 2, 4, 8]))), pixels

def grid():
    scale = draw.choice([1, 1 / 2, 1 / 8, 1 / 16, 0.77, 1e-3])
    return GridSpec(scale, draw.choice([1, 1 / 2, 1 / 3, 0.3, 0.05]))

def call(rows, columns, grid):
    (h, H), (w, W) = rows, columns
    B, N, C, D = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 5), draw.randint(1, 40)
    G = grid.shape(H, W)
    if B * N * C * G[0] * G[1] * D > 1 << 24 or B * N * D * h * w > 1 << 24:
        return
    module.set_device(draw.choice([1, 16, 132]), draw.choice([48, 99, 227]) << 10)
    # Pages that are never accessed take no memory.
    x = torch.empty(B, N, D, h, w, dtype=draw.choice([torch.float32, torch.bfloat16]))
    masks = torch.empty(B, N, C, H, W, dtype=torch.uint8)
    prototypes, factor, *kept = backend.masked_average_pool(x, masks, C, grid, 0.0)
    for last in ([], kept) if kept else ():
        backend.masked_average_pool_backward(prototypes, masks, C, factor, x, grid, *last)
    prototypes = torch.empty(B, C, *G, D)
    reduce = draw.choice(["max", "mean"])
    scores, winners, gram = backend.cosine_match(x, prototypes, grid, (H, W), reduce, True)
    if scores.dim() == 0:
        return
    backend.cosine_match_backward(scores, x, prototypes, scores, winners, grid, reduce, gram)

with hooks.cuda(module):
    for _ in range(int(sys.argv[2])):
        call(axis(), axis(), grid())
    # The longest axis that can be divided, and axes one or some pixels longer.
    longest = (1, 16384), (1, 16385), (2, 12800), (2, 12801), (2, 12900)
    for other in ((5, 2), (1, 1), (7, 7), *longest):
        call(other, (3, 7), GridSpec())
        call((3, 7), other, GridSpec(1.0))
        call(other, (3, 7), GridSpec(1.0))
tiled = sum(b"scores" in name for name in names)
print(len(names), "launches,", tiled, "of scores")
assert tiled > int(sys.argv[2]) // 3
"""


def test_plans_of_the_cuda_kernels_are_clean() -> None:
    """How the host cuts the work, sizes workspaces and launches, for many sizes."""
    need(ADDRESS)
    pytest.importorskip("pybind11")
    if reason := cuda.obstacle():
        pytest.skip(reason)
    # An array at the end of a struct has bounds too.
    module = cuda.build_module((90,), instrument=ADDRESS + ",bounds-strict")
    status, output = in_python(PLANS, str(module), "100")
    assert status == 0, output[:6000]


def in_python(code: str, *arguments: str) -> Outcome:
    """Runs Python that loads an instrumented module."""
    # A sanitizer must be loaded first, and before the C++ runtime whose exceptions it intercepts.
    preload = [
        subprocess.run(
            [compiler() or "", f"-print-file-name={name}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    done = subprocess.run(
        [*launcher(ADDRESS), sys.executable, "-c", code, *arguments],
        check=False,
        cwd=ROOT,
        # Python itself never frees some of its memory.
        env={
            **os.environ,
            **OPTIONS,
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "LD_PRELOAD": " ".join(preload),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout)
