"""Everything that needs a GPU, in one command and under ten minutes.

    python -m benchmarks.gpu --out DIR

Builds the compiled module for this machine's GPU, runs the tests marked `gpu` over the cuda and the
triton backend, the memory and race checkers of the CUDA toolkit where they are there, and then the
benchmark of the head. Needs torch, pytest, and for the cuda backend nvcc, pybind11 and ninja; no
network. Each step has its time, and one that fails or runs out of it is written down and does not
stop the rest.

`DIR` gets `gpu.json` (device, driver, versions, commit, and every step's outcome so far),
`summary.txt` with what was to be reached and what was (benchmarks/goals.py), the record and plot of
`benchmarks.head`, and each step's whole output as `STEP.log`. Exits with 0 if every step passed, 1
if one did not, 2 where there is no GPU.
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
_GRACE = 10.0  # seconds from being asked to stop to being stopped


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        name: what it is called in the record.
        command: program and arguments.
        seconds: how long it may take, at most.
        environment: variables set for it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "not run", and why."""

    name: str
    outcome: str
    seconds: float
    command: str
    tail: str


def plan(
    out: Path, capability: str | None, quick: bool = False, checker: str | None = None
) -> list[Step]:
    """The steps for a GPU of this compute capability, such as "90"; `checker` is
    compute-sanitizer, where it is there."""
    python = sys.executable
    build = (
        ("LSLPN_REQUIRE", "cuda"),
        *((("LSLPN_CUDA_ARCHS", capability),) if capability else ()),
    )
    steps = [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 120, build),
        Step("tests-cuda", _tests("not triton"), 100, (("LSLPN_REQUIRE", "cuda"),)),
        # Triton compiles for most of the time, on one core.
        Step("tests-triton", _tests("triton", workers=8), 130, (("LSLPN_REQUIRE", "triton"),)),
    ]
    if checker:
        # The checkers slow a kernel down some hundred times: one small case for each kernel. They
        # know what lies beyond an allocation, not what torch makes of it.
        small = _tests("test_situation and float32 and not triton", "-x")
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("LSLPN_REQUIRE", "cuda"))
        steps += [
            Step(tool, (checker, "--tool", tool, "--error-exitcode", "9", *small), 45, alone)
            for tool in ("memcheck", "racecheck")
        ]
    benchmark = (python, "-m", "benchmarks.head", "--device", "cuda", "--out", str(out))
    steps.append(Step("benchmark", (*benchmark, *(("--quick",) if quick else ())), 600))
    return steps


def _tests(which: str, *options: str, workers: int = 0) -> tuple[str, ...]:
    """pytest over the tests marked `gpu` whose names fit, several at a time where it can."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-q", "-rs"]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    return (*command, *options, "-m", "gpu", "-k", which, "tests/test_gpu.py")


def run(steps: Sequence[Step], seconds: float, out: Path, device: dict[str, Any]) -> list[Outcome]:
    """Runs the steps in turn, within `seconds` all together, and writes down after each how it
    went."""
    ends = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in steps:
        least = min(step.seconds, ends - time.monotonic() - _GRACE)
        print(f"== {step.name} (at most {max(least, 0):.0f} s)", flush=True)
        outcome = _run(step, least, out / f"{step.name}.log") if least > 0 else _not_run(step)
        print(f"{outcome.tail}\n-- {step.name}: {outcome.outcome}, {outcome.seconds:.0f} s")
        outcomes.append(outcome)
        _write(out / "gpu.json", json.dumps(record_of(outcomes, device), indent=2) + "\n")
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
            _signal(process, signal.SIGINT)  # pytest then tells what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            _signal(process, signal.SIGKILL)  # with all that it has started and left running
            process.wait()
    taken = round(time.monotonic() - began, 1)
    tail = log.read_bytes().decode(errors="replace")[-_TAIL:]
    return Outcome(step.name, outcome, taken, " ".join(step.command), tail)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _not_run(step: Step) -> Outcome:
    return Outcome(step.name, "not run", 0.0, " ".join(step.command), "no time was left for it")


def record_of(outcomes: Sequence[Outcome], device: dict[str, Any]) -> dict[str, Any]:
    """What gpu.json holds."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit() or os.environ.get("LSLPN_COMMIT"),
        "versions": machine.versions(),
        "device": device,
        "steps": [asdict(outcome) for outcome in outcomes],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Build, test and measure on this GPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps (default 9.5)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, run none")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    out = options.out.resolve()
    capability = None
    if torch.cuda.is_available():
        capability = "{}{}".format(*torch.cuda.get_device_capability())
    checker = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    steps = plan(out, capability, options.quick, checker)
    if options.dry_run:
        for step in steps:
            print(f"{step.name}: {shlex.join(step.command)}")
        return 0
    if capability is None:
        print("benchmarks.gpu: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the step
    out.mkdir(parents=True, exist_ok=True)
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    outcomes = run(steps, options.minutes * 60, out, machine.describe("cuda"))
    text = summary(outcomes, machine.describe("cuda")["name"], _newest(out, began))
    _write(out / "summary.txt", text)
    print(text)
    return 0 if all(o.outcome == "passed" for o in outcomes) else 1


def summary(outcomes: Sequence[Outcome], device: str, record: dict[str, Any] | None) -> str:
    """How every step went, and what was reached by the record of `benchmarks.head`."""
    lines = [device, *(f"{o.name:14} {o.outcome:12} {o.seconds:6.1f} s" for o in outcomes), ""]
    lines += goals.lines(record) if record else ["no record of benchmarks.head"]
    return "\n".join(lines) + "\n"


def _newest(out: Path, began: str) -> dict[str, Any] | None:
    """The record of `benchmarks.head` that was made since."""
    records = (json.loads(path.read_text("utf-8")) for path in out.glob("head-*.json"))
    made = [record for record in records if record["date"] >= began]
    return max(made, key=lambda record: str(record["date"]), default=None)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
