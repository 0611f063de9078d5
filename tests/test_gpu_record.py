"""The command for a GPU machine, and the README's table, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, table
from benchmarks.gpu import Step


def test_a_step_that_fails_or_hangs_is_written_down_and_the_rest_runs() -> None:
    python = sys.executable
    steps = [
        Step("fails", (python, "-c", "print('why'); raise SystemExit(3)"), 1.0),
        Step("hangs", (python, "-c", "import time; time.sleep(60)"), 0.1),
        Step("absent", ("/no/such/program",), 1.0),
        Step("passes", (python, "-c", "import os; print(os.environ['A'])"), 1.0, (("A", "b"),)),
    ]
    outcomes = gpu.run(steps, 15)
    assert [o.outcome for o in outcomes] == ["failed", "out of time", "failed", "passed"]
    assert "why" in outcomes[0].tail
    assert outcomes[1].seconds < 10
    assert outcomes[3].tail.strip() == "b"
    assert json.loads(json.dumps(gpu.record_of(outcomes, {"name": "n"})))["steps"][3]["name"]


def test_a_step_without_time_is_said_not_to_have_run() -> None:
    [outcome] = gpu.run([Step("late", (sys.executable, "-c", "1"), 1.0)], 1)
    assert outcome.outcome == "not run"


def test_the_plan_builds_for_this_gpu_and_ends_with_the_benchmark(tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, "90")
    assert steps[0].environment == (("LSLPN_CUDA_ARCHS", "90"),)
    assert steps[-1].command[-1] == str(tmp_path)
    assert [s.name for s in steps][:2] == ["build", "tests"]


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


def test_the_readme_holds_what_the_records_say() -> None:
    assert table.main(["--check"]) == 0
