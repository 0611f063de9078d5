"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

tests/sanitizers/driver.cpp calls the sources of csrc/cpu, compiled for each instruction set of this
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
            continue  # the tests will say so
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
sys.exit(pytest.main(["-v", "tests/test_ops.py", "-k", "fuzz or capsules"]))
"""


def test_no_call_of_the_binding_reads_or_writes_out_of_bounds() -> None:
    """The fuzz tests again, under AddressSanitizer."""
    need(ADDRESS)
    pytest.importorskip("pybind11")
    module = build_module()
    # A sanitizer must come before all else, and before the C++ exceptions that it listens to.
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
        [*launcher(ADDRESS), sys.executable, "-c", FUZZ, str(module)],
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
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\b4 passed\b", done.stdout), done.stdout[-2000:]
