"""Everything that needs a GPU, in one command that takes less than ten minutes.

    python -m benchmarks.gpu --out DIR [--triton-cache DIR]

The most informative steps come first: the module is built for this machine's GPU and the Triton
kernels are compiled, each backend is checked on a few cases, and the kernels are timed together
with eager PyTorch. Then come the other tests, the slow baselines (torch.compile), and the memory
and race checkers of the CUDA toolkit if they are installed. A step that fails or times out is
recorded and does not stop the others. If the command is repeated with the same folder, it
continues: steps that have passed are not repeated, and measurements are kept.

Needs torch, pytest, and for the cuda backend nvcc, pybind11 and ninja, but no network.
`--triton-cache` is the output of `python -m benchmarks.compile_ahead` for this GPU on another
machine, which saves compile time.

`DIR` gets `gpu.json` (device, driver, versions, commit, and every step's outcome so far),
`summary.txt` with the goals and what was reached (benchmarks/goals.py), the record `head.json` of
`benchmarks.head` and its plot, and each step's complete output as `STEP.log`. Exits with 0 if every
step passed, 1 if one did not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import goals, machine

_TAIL = 4000  # characters of a step's output that the record keeps
_FIRST = "test_paper_size"  # the tests of what the benchmark measures next
_GRACE = 10.0  # seconds between the request to stop and the kill


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        name: its name in the record.
        command: program and arguments.
        seconds: its time limit.
        environment: additional environment variables.
        always: whether it is repeated even if it passed in an earlier run.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()
    always: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step ("passed", "failed", "out of time" or "not run") and its details."""

    name: str
    outcome: str
    seconds: float
    command: str
    tail: str


def plan(
    out: Path, capability: str | None, checker: str | None = None, cache: Path | None = None
) -> list[Step]:
    """The steps for a GPU.

    Args:
        out: the folder of the record.
        capability: compute capability, such as "90".
        checker: path of compute-sanitizer, if it is installed.
        cache: replaces Triton's own cache.
    """
    python = sys.executable
    cached = (("TRITON_CACHE_DIR", str(cache)),) if cache else ()

    def tests(
        name: str, which: str, seconds: float, require: str, *options: str, workers: int = 0
    ) -> Step:
        environment = (("LSLPN_REQUIRE", require), *cached)
        return Step(name, _tests(which, *options, workers=workers), seconds, environment)

    def benchmark(name: str, number: int, seconds: float) -> Step:
        record = ("--record", str(out / "head.json"), "--round", str(number))
        command = (python, "-m", "benchmarks.head", "--device", "cuda", *record)
        return Step(name, command, seconds, cached)

    archs = (("LSLPN_CUDA_ARCHS", capability),) if capability else ()
    ahead = [python, "-m", "benchmarks.compile_ahead", "--arch", capability or "90"]
    ahead += ["--out", str(cache)] if cache else []
    steps = [
        Step(
            "build",
            (python, "setup.py", "build_ext", "--inplace"),
            120,
            (("LSLPN_REQUIRE", "cuda"), *archs),
            always=True,
        ),
        Step("compile-triton", tuple(ahead), 90, always=True),
        tests("check-cuda", f"{_FIRST} and not triton", 30, "cuda"),
        tests("check-triton", f"{_FIRST} and triton", 45, "triton"),
        benchmark("benchmark", 1, 150),
        tests("tests-cuda", f"not triton and not {_FIRST}", 90, "cuda"),
        tests("tests-triton", f"triton and not {_FIRST}", 90, "triton", workers=8),
        benchmark("baselines", 2, 180),
    ]
    if checker:
        # The checkers make a kernel about a hundred times slower, hence one small case per kernel.
        # They only know allocations by CUDA, not parts of them that torch hands out, hence no
        # caching.
        small = _tests("test_situation and float32 and not triton", "-x")
        own_memory = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("LSLPN_REQUIRE", "cuda"))
        steps += [
            Step(tool, (checker, "--tool", tool, "--error-exitcode", "9", *small), 120, own_memory)
            for tool in ("memcheck", "racecheck")
        ]
    return steps


def _tests(which: str, *options: str, workers: int = 0) -> tuple[str, ...]:
    """A pytest command for the tests marked `gpu` that `which` selects, in parallel if possible."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-q", "-rs"]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    return (*command, *options, "-m", "gpu", "-k", which, "tests/kernels/test_gpu.py")


def run(
    steps: Sequence[Step],
    seconds: float,
    out: Path,
    device: dict[str, Any],
    earlier: Sequence[Outcome] = (),
) -> list[Outcome]:
    """Run the steps one after the other, within `seconds` in total, and record each outcome.

    Steps that passed `earlier` are not repeated.
    """
    ends = time.monotonic() + seconds
    known = {outcome.name: outcome for outcome in earlier}
    outcomes: list[Outcome] = []
    for step in steps:
        before = known.get(step.name)
        if before and before.outcome == "passed" and not step.always:
            outcome = before
        else:
            least = min(step.seconds, ends - time.monotonic() - _GRACE)
            print(f"== {step.name} (at most {max(least, 0):.0f} s)", flush=True)
            ran = _run(step, least, out / f"{step.name}.log") if least > 0 else None
            outcome = ran or before or _not_run(step)
            print(f"{outcome.tail}\n-- {step.name}: {outcome.outcome}, {outcome.seconds:.0f} s")
        known[step.name] = outcome
        outcomes.append(outcome)
        so_far = [known[s.name] for s in steps if s.name in known]
        _write(out / "gpu.json", json.dumps(record_of(so_far, device), indent=2) + "\n")
    return outcomes


def _run(step: Step, seconds: float, log: Path) -> Outcome:
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=machine.ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, "failed", 0.0, " ".join(step.command), str(error))
        try:
            outcome = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
            _signal(process, signal.SIGINT)  # pytest then reports what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            _signal(process, signal.SIGKILL)  # also ends the processes that it has started
            process.wait()
    taken = round(time.monotonic() - began, 1)
    tail = log.read_bytes().decode(errors="replace")[-_TAIL:]
    return Outcome(step.name, outcome, taken, " ".join(step.command), tail)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _not_run(step: Step) -> Outcome:
    return Outcome(step.name, "not run", 0.0, " ".join(step.command), "no time was left for it")


def record_of(outcomes: Sequence[Outcome], device: dict[str, Any]) -> dict[str, Any]:
    """The content of gpu.json."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "device": device,
        "steps": [asdict(outcome) for outcome in outcomes],
    }


def earlier(out: Path, device: dict[str, Any]) -> list[Outcome]:
    """The outcomes of an earlier run with this folder.

    Raises:
        ValueError: the earlier run had other code or another machine.
    """
    path = out / "gpu.json"
    if not path.exists():
        return []
    found, here = json.loads(path.read_text("utf-8")), record_of([], device)
    differ = [key for key in ("commit", "versions", "device") if found[key] != here[key]]
    if differ:
        raise ValueError(
            f"{path} was written with another {' and '.join(differ)}; give --out a new folder"
        )
    return [Outcome(**step) for step in found["steps"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Build, test and measure on this GPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps (default 9.5)")
    parser.add_argument(
        "--triton-cache", type=Path, metavar="DIR", help="output of benchmarks.compile_ahead"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the steps")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    cache = options.triton_cache.resolve() if options.triton_cache else None
    if cache and not cache.is_dir():
        parser.error(f"--triton-cache {cache}: no such folder")
    out = options.out.resolve()
    capability = None
    if torch.cuda.is_available():
        capability = "{}{}".format(*torch.cuda.get_device_capability())
    checker = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    steps = plan(out, capability, checker, cache)
    if options.dry_run:
        for step in steps:
            print(f"{step.name}: {shlex.join(step.command)}")
        return 0
    if capability is None:
        print("benchmarks.gpu: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step is ended, too
    out.mkdir(parents=True, exist_ok=True)
    device = machine.describe("cuda")
    try:
        before = earlier(out, device)
    except ValueError as error:
        parser.error(str(error))
    outcomes = run(steps, options.minutes * 60, out, device, before)
    head = out / "head.json"
    record = json.loads(head.read_text("utf-8")) if head.exists() else None
    text = summary(outcomes, device["name"], record)
    _write(out / "summary.txt", text)
    print(text)
    return 0 if all(o.outcome == "passed" for o in outcomes) else 1


def summary(outcomes: Sequence[Outcome], device: str, record: dict[str, Any] | None) -> str:
    """The outcome of every step, and the goals that the record of `benchmarks.head` reaches."""
    lines = [device, *(f"{o.name:14} {o.outcome:12} {o.seconds:6.1f} s" for o in outcomes), ""]
    lines += goals.lines(record) if record else ["no record of benchmarks.head"]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
