"""Everything that needs a GPU, in one command and under ten minutes.

    python -m benchmarks.gpu --out DIR

Builds the compiled module for this machine's GPU, runs the tests marked `gpu` over the triton and
cuda backends, the memory and race checkers of the CUDA toolkit where they are there, and then the
benchmark of the head. Needs torch, pytest, and for the cuda backend nvcc; no network. Each step
has its time, and one that fails or runs out of it is written down and does not stop the rest.

`DIR` gets `gpu.json` (device, driver, versions, commit, and every step's outcome), `summary.txt`,
and the record and plot of `benchmarks.head`. Exits with 0 if every step passed, 1 if one did not,
2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import machine

_TAIL = 4000  # characters of a step's output that the record keeps


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        name: what it is called in the record.
        command: program and arguments.
        share: of the time that is left when it begins, how much it may take.
        environment: variables set for it.
    """

    name: str
    command: tuple[str, ...]
    share: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "not run", and why."""

    name: str
    outcome: str
    seconds: float
    command: str
    tail: str


def plan(out: Path, capability: str | None, quick: bool = False) -> list[Step]:
    """The steps for a GPU of this compute capability, such as "90"."""
    python = sys.executable
    tests = (
        python,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-rs",
        "-m",
        "gpu",
        "tests/test_gpu.py",
    )
    # The checkers slow a kernel down some hundred times: one small case for each kernel.
    small = (*tests, "-k", "situation and float32 and cuda", "-x")
    steps = [
        Step(
            "build",
            (python, "setup.py", "build_ext", "--inplace"),
            0.4,
            (("LSLPN_CUDA_ARCHS", capability),) if capability else (),
        ),
        Step("tests", tests, 0.5),
    ]
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(checker).exists():
        steps += [
            Step(tool, (checker, "--tool", tool, "--error-exitcode", "9", *small), 0.3)
            for tool in ("memcheck", "racecheck")
        ]
    benchmark = (python, "-m", "benchmarks.head", "--device", "cuda", "--out", str(out))
    steps.append(Step("benchmark", (*benchmark, *(("--quick",) if quick else ())), 1.0))
    return steps


def run(steps: Sequence[Step], seconds: float) -> list[Outcome]:
    """Runs the steps in turn, within `seconds` all together."""
    ends = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        left = ends - time.monotonic()
        print(f"== {step.name} (at most {max(left, 0) * step.share:.0f} s)", flush=True)
        outcome = _run(step, left * step.share) if left > 5 else _not_run(step)
        print(f"{outcome.tail}\n-- {step.name}: {outcome.outcome}, {outcome.seconds:.0f} s")
        outcomes.append(outcome)
    return outcomes


def _run(step: Step, seconds: float) -> Outcome:
    began = time.monotonic()
    environment = {**os.environ, **dict(step.environment)}
    try:
        done = subprocess.run(
            step.command,
            cwd=machine.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        outcome, output = "passed" if done.returncode == 0 else "failed", done.stdout
    except subprocess.TimeoutExpired as error:
        outcome, output = "out of time", error.stdout or b""
    except OSError as error:
        outcome, output = "failed", str(error).encode()
    taken = round(time.monotonic() - began, 1)
    tail = output.decode(errors="replace")[-_TAIL:]
    return Outcome(step.name, outcome, taken, " ".join(step.command), tail)


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
    steps = plan(out, capability, options.quick)
    if options.dry_run:
        for step in steps:
            print(f"{step.name}: {' '.join(step.command)}")
        return 0
    if capability is None:
        print("benchmarks.gpu: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run(steps, options.minutes * 60)
    record = record_of(outcomes, machine.describe("cuda"))
    (out / "gpu.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [f"{o.name:10} {o.outcome:12} {o.seconds:6.1f} s" for o in outcomes]
    summary = "\n".join([record["device"]["name"], record["date"], *lines]) + "\n"
    (out / "summary.txt").write_text(summary)
    print(summary)
    return 0 if all(o.outcome == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
