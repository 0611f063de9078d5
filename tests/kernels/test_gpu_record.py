"""The command for a GPU machine, and the README's table, without a GPU."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, gpu, machine, table
from benchmarks.gpu import Step

PYTHON = sys.executable
# Starts another process that outlives it unless it is ended as well, and both ignore nothing.
HANGS = "import subprocess, sys, time; print('so far', flush=True); subprocess.run(['sleep', '60'])"


def test_a_step_that_fails_or_hangs_is_written_down_and_the_rest_runs(tmp_path: Path) -> None:
    steps = [
        Step("fails", (PYTHON, "-c", "print('why'); raise SystemExit(3)"), 30),
        Step("hangs", (PYTHON, "-c", HANGS), 8),
        Step("absent", ("/no/such/program",), 30),
        Step("passes", (PYTHON, "-c", "import os; print(os.environ['A'])"), 30, (("A", "b"),)),
    ]
    outcomes = gpu.run(steps, 120, tmp_path, {"name": "n"})
    assert [o.outcome for o in outcomes] == ["failed", "out of time", "failed", "passed"]
    assert "why" in outcomes[0].tail
    assert "so far" in outcomes[1].tail
    assert outcomes[1].seconds < 50
    assert outcomes[3].tail.strip() == "b"
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["outcome"] for step in record["steps"]] == [o.outcome for o in outcomes]
    assert "why" in (tmp_path / "fails.log").read_text()


def test_the_record_is_there_after_every_step(tmp_path: Path) -> None:
    read = "import json; print(len(json.load(open('gpu.json'))['steps']))"
    command = (PYTHON, "-c", f"import os; os.chdir({str(tmp_path)!r}); {read}")
    outcomes = gpu.run(
        [Step("one", (PYTHON, "-c", "1"), 30), Step("two", command, 30)], 90, tmp_path, {}
    )
    assert outcomes[1].tail.strip() == "1"


def test_a_step_without_time_is_recorded_as_not_run(tmp_path: Path) -> None:
    [outcome] = gpu.run([Step("late", (PYTHON, "-c", "1"), 30)], 1, tmp_path, {})
    assert outcome.outcome == "not run"


def test_a_second_call_continues(tmp_path: Path) -> None:
    """Steps that passed are not repeated, except those that prepare a new machine."""
    count = "import os; f = open({!r}, 'a'); f.write('x'); raise SystemExit({})"

    def step(name: str, code: int, always: bool = False) -> Step:
        command = (PYTHON, "-c", count.format(str(tmp_path / name), code))
        return Step(name, command, 30, always=always)

    steps = [step("build", 0, always=True), step("passes", 0), step("fails", 1)]
    device = {"name": "n"}
    first = gpu.run(steps[:2], 120, tmp_path, device)
    assert gpu.earlier(tmp_path, device) == first
    gpu.run(steps, 120, tmp_path, device, gpu.earlier(tmp_path, device))
    again = gpu.run(steps, 1, tmp_path, device, gpu.earlier(tmp_path, device))  # without time
    assert [o.outcome for o in again] == ["passed", "passed", "failed"]
    assert [(tmp_path / s.name).read_text() for s in steps] == ["xx", "x", "x"]
    with pytest.raises(ValueError, match="another device; give --out a new folder"):
        gpu.earlier(tmp_path, {"name": "m"})


def test_the_plan_times_the_kernels_before_all_that_takes_long(tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, "90", "compute-sanitizer", tmp_path / "cache")
    names = [step.name for step in steps]
    assert names == [
        "build", "compile-triton", "check-cuda", "check-triton", "benchmark",
        "tests-cuda", "tests-triton", "baselines", "memcheck", "racecheck",
    ]  # fmt: skip
    by_name = dict(zip(names, steps, strict=True))
    assert ("LSLPN_CUDA_ARCHS", "90") in by_name["build"].environment
    assert by_name["compile-triton"].command[-3:] == ("90", "--out", str(tmp_path / "cache"))
    cached = ("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("check-triton", "benchmark", "tests-triton", "baselines"):
        assert cached in by_name[name].environment
    for name, number in (("benchmark", "1"), ("baselines", "2")):
        record = ("--record", str(tmp_path / "head.json"), "--round", number)
        assert by_name[name].command[-4:] == record
    # Even if every step takes all of its time, the kernels have been checked and timed by then.
    assert sum(step.seconds for step in steps[:5]) < 8 * 60


COLLECT = """
import json, pytest, sys

class Names(list):
    def pytest_collection_finish(self, session):
        self += [item.nodeid for item in session.items]

found = {}
for name, options in json.loads(sys.argv[1]).items():
    found[name] = Names()
    command = ["--noconftest", "-o", "addopts=", "-qq", "--collect-only", *options]
    pytest.main(command, [found[name]])
print("\\n" + json.dumps(found))
"""


def test_every_selection_of_tests_finds_some(tmp_path: Path) -> None:
    """And those of the two backends together are all tests marked `gpu`."""
    steps = gpu.plan(tmp_path, "90", "compute-sanitizer")
    commands = {s.name: s.command for s in steps if "pytest" in s.command}
    options = {name: command[command.index("gpu") - 1 :] for name, command in commands.items()}
    options["all"] = ("-m", "gpu", "tests/kernels/test_gpu.py")
    done = subprocess.run(
        [PYTHON, "-c", COLLECT, json.dumps(options)],
        check=True,
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
    )
    tests = {k: set(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    backends = ("check-cuda", "check-triton", "tests-cuda", "tests-triton")
    assert set(tests) == {*backends, "memcheck", "racecheck", "all"}
    assert all(tests.values())
    assert all("cuda" in name and "float32" in name for name in tests["memcheck"])
    assert len(tests["memcheck"]) < 30
    assert sum(len(tests[name]) for name in backends) == len(tests["all"])
    assert set().union(*(tests[name] for name in backends)) == tests["all"]
    assert not any("triton" in name for name in tests["check-cuda"] | tests["tests-cuda"])


@pytest.mark.parametrize("name", ["test_gpu.py", "test_loss.py", "cases.py"])
def test_the_gpu_tests_need_no_more_than_torch_and_pytest(name: str) -> None:
    """Packages that a GPU machine may lack must not be imported, not even by conftest.py."""
    allowed = {"torch", "pytest", "cases", "test_loss", "lslpn_kernels", *sys.stdlib_module_names}
    tree = ast.parse((Path(__file__).parent / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _record(date: str, milliseconds: float) -> dict[str, Any]:
    def measured(backend: str, value: float, ratio: float) -> dict[str, Any]:
        return {
            "size": "paper", "part": "head", "pass": "both", "how": "called",
            "backend": backend, "median_ms": value, "speedup_over": {"torch": ratio},
        }  # fmt: skip

    return {
        "benchmark": "head",
        "date": date,
        "commit": "0123456789",
        "versions": {"torch": "2.13.0"},
        "device": {"kind": "cpu", "name": "some processor"},
        "sizes": {"paper": {"describe": "D=256"}},
        "measurements": [measured("torch", 50.0, 1.0), measured("cpu", milliseconds, 12.5)],
    }


def test_the_table_shows_the_newest_record_and_what_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(_record("2026-01-01T00:00:00", 9.0)))
    (tmp_path / "a.json").write_text(json.dumps(_record("2026-02-01T00:00:00", 4.0)))
    text = table.section(tmp_path)
    assert "| paper: D=256 | 50 | 4 (12.5x) |" in text
    assert "2026-02-01" in text
    assert "GPU.** Not measured yet" in text
    again = table.rewritten(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n", text)
    assert again.startswith("a\n")
    assert again.endswith("\nb\n")
    assert "old" not in again
    assert table.rewritten(again, text) == again


SIZE = {"B": 256, "K": 1, "Q": 1, "C": 2, "D": 256, "cells": 65, "pixels": 512, "windows": 225}


def test_the_bytes_of_goals_are_those_of_the_tensors() -> None:
    """By hand, 256 episodes in float32."""
    size = SIZE | {"dtype": "float32"}
    features, image = 256 * 256 * 65**2 * 4, 256 * 512**2
    prototypes, factor, gram = 256 * 2 * 225 * 256 * 4, 256 * 2 * 225 * 4, 256 * 4 * 65**2 * 4
    forward = 2 * features + image + 2 * prototypes + factor + 2 * image * 4 + 2 * image + gram
    assert goals.moved(size)["forward"] == forward
    backward = forward + 2 * image * 4 + features + prototypes
    assert goals.moved(size)["backward"] == backward
    held = 2 * image * 4 + 2 * features + prototypes + factor + features // 12
    assert goals.held(size) == held


@pytest.mark.parametrize("dtype", goals.DTYPES)
def test_no_goal_asks_for_less_than_the_bytes_and_launches_take(dtype: str) -> None:
    size = SIZE | {"B": 4, "dtype": dtype}
    h200 = 4.3e12  # bytes a second, read and written, that a copy moves
    for goal in goals.GOALS:
        if goal.what == "replayed ms":
            assert goal.wanted > goals.floor_ms(size, h200)
        elif goal.what.endswith("of copy"):
            assert goal.wanted < 1
        elif goal.what == "memory":
            assert goal.wanted >= 1


def test_the_table_shows_what_was_counted(tmp_path: Path) -> None:
    run = {
        "size": "paper float32", "describe": "D=256", "backend": "cuda",
        "instructions": {"arithmetic": 3_000_000, "integer and control": 1_000_000},
        "bytes_asked": 9_000_000, "bytes_read": 1_000_000, "bytes_written": 2_000_000,
        "bounds": {"H200": {"least_us": 12.3}},
    }  # fmt: skip
    record = {
        "benchmark": "instructions", "date": "2026-02-01", "commit": None,
        "gpus": {"H200": {}}, "runs": [run],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(record))
    text = table.section(tmp_path)
    assert "| paper float32: D=256 | `cuda` | 4 | 75/25 | 9 | 3 | 12.3 |" in text
    assert "counted, not measured" in text
    assert "GPU.** Not measured yet" in text


def test_goals_are_set_against_what_a_record_says() -> None:
    def measured(size: str, backend: str, how: str, passes: str, ms: float) -> dict[str, Any]:
        return {
            "size": size, "part": "head", "backend": backend, "how": how, "pass": passes,
            "median_ms": ms,
        }  # fmt: skip

    size = SIZE | {"dtype": "float32"}
    moved = goals.moved(size)
    record = {
        "sizes": {"large float32": size},
        "copy_bytes_per_s": 4e12,
        "memory": [{"size": "large float32", "backend": "cuda", "extra_mib": {"both": 3000.0}}],
        "measurements": [
            measured("batch-4 float32", "torch", "called", "both", 4.0),
            measured("batch-4 float32", "triton", "called", "both", 0.25),
            measured("batch-4 float32", "cuda", "called", "both", 0.2),
            measured("batch-4 float32", "cuda", "replayed", "both", 0.1),
            measured("large float32", "cuda", "called", "forward", 1e3 * moved["forward"] / 3e12),
            measured("large float32", "cuda", "called", "backward", 1e3 * moved["backward"] / 3e12),
        ],
    }
    found = {
        (goal.backend, goal.what): goals.value(record, goal, "float32") for goal in goals.GOALS
    }
    assert found["cuda", "faster than torch"] == pytest.approx(20)
    assert found["cuda", "faster than triton"] == pytest.approx(1.25)
    assert found["cuda", "forward of copy"] == pytest.approx(0.75)
    assert found["cuda", "memory"] == pytest.approx(3000 * 2**20 / goals.held(size))
    lines = goals.lines(record)
    assert len(lines) == 2 * len(goals.GOALS)

    def verdict(backend: str, what: str) -> str:
        fits = [line for line in lines if backend in line and what in line and "float32" in line]
        return fits[-1].split("  ")[0].strip()

    assert verdict("triton", "faster than torch ") == "met"
    assert verdict("cuda", "replayed") == "MISSED"
    assert verdict("cuda", "backward of copy") == "met"
    assert verdict("cuda", "forward of copy") == "MISSED"
    assert verdict("cuda", "compile-max") == "not measured"
    assert "MISSED" in gpu.summary([], "a GPU", record)


def test_the_readme_holds_what_the_records_say() -> None:
    assert table.main(["--check"]) == 0
