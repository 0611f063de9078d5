"""Write the README's performance tables from the newest records in benchmarks/results/.

    python -m benchmarks.table           # rewrites README.md between the markers
    python -m benchmarks.table --check   # exits with 1 if README.md would change

Records are written by `python -m benchmarks.head` and `python -m benchmarks.instructions`. A kind
of device without a record is reported as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine

BEGIN = "<!-- performance: written by python -m benchmarks.table -->"
END = "<!-- end of performance -->"
_KINDS = {"cpu": "CPU", "cuda": "GPU"}


def newest(folder: Path, kind: str) -> dict[str, Any] | None:
    """The newest record of a kind of device, "cpu" or "cuda"."""
    return _newest(folder, "head", lambda record: record["device"]["kind"] == kind)


def _newest(
    folder: Path, benchmark: str, wanted: Callable[[dict[str, Any]], bool] = lambda record: True
) -> dict[str, Any] | None:
    found = []
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record.get("benchmark") == benchmark and wanted(record):
            found.append(record | {"file": path.name})
    return max(found, key=lambda record: record["date"], default=None)


def section(folder: Path) -> str:
    """The text between the markers."""
    parts = []
    for kind, title in _KINDS.items():
        record = newest(folder, kind)
        if record is None:
            parts.append(
                f"**{title}.** Not measured yet. "
                + ("`python -m benchmarks.gpu --out DIR` does." if kind == "cuda" else "")
            )
        else:
            parts.append(_table(record, title))
    if record := _newest(folder, "instructions"):
        parts.append(_counted(record))
    return "\n\n".join(part.strip() for part in parts)


def _counted(record: dict[str, Any]) -> str:
    """A table of what the GPU kernels execute, with the bounds on time that follow."""
    gpus = list(record["gpus"])
    lines = [
        "**GPU, counted, not measured**: what the compiled kernels execute for the whole head, "
        "forward and backward, counted by running their PTX on a CPU "
        f"({record['date'][:10]}, commit {(record['commit'] or 'unknown')[:7]}). Instructions are "
        "millions of warp instructions of PTX (ptxas may emit more or fewer), followed by the "
        "percentages of arithmetic, tensor cores, shared memory, global memory, and integers and "
        "control. Memory is in megabytes: all that warps request from global memory, and the "
        "distinct bytes of each launch. On the right is the time that this takes **at least**, in "
        "microseconds, if every scheduler issues an instruction in every cycle and memory moves "
        "at its full rate. Real kernels take longer; how much longer is not known before they "
        "have run.",
        "",
    ]
    head = ["size", "backend", "instructions", "% by class", "requested", "moved", *gpus]
    lines += ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * (len(head) - 2) + "|"]
    for run in sorted(record["runs"], key=lambda run: run["size"]):
        total = sum(run["instructions"].values())
        parts = "/".join(f"{100 * n / total:.0f}" for n in run["instructions"].values())
        moved = run["bytes_read"] + run["bytes_written"]
        cells = [f"{run['size']}: {run['describe']}", f"`{run['backend']}`", f"{total / 1e6:.4g}"]
        cells += [parts, f"{run['bytes_asked'] / 1e6:.4g}", f"{moved / 1e6:.4g}"]
        cells += [f"{run['bounds'][gpu]['least_us']:.3g}" for gpu in gpus]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(record: dict[str, Any], title: str) -> str:
    device = record["device"]
    lines = [
        f"**{title}: {device['name']}**, {record['date'][:10]}, commit "
        f"{(record['commit'] or 'unknown')[:7]}, torch {record['versions']['torch']}. "
        "The whole head, forward and backward: median milliseconds, with the backends taking "
        "turns, and in brackets the speed-up over `torch` in the same run.",
        "",
    ]
    times = {
        (m["size"], m["backend"]): m
        for m in record["measurements"]
        if (m["part"], m["pass"], m["how"]) == ("head", "both", "called")
    }
    backends = list(dict.fromkeys(backend for _, backend in times))
    lines += ["| size | " + " | ".join(f"`{b}`" for b in backends) + " |"]
    lines += ["|---" * (len(backends) + 1) + "|"]
    for size, about in record["sizes"].items():
        cells = []
        for backend in backends:
            m = times.get((size, backend))
            ratio = (m or {}).get("speedup_over", {}).get("torch")
            text = f"{m['median_ms']:.3g}" if m else "-"
            cells.append(f"{text} ({ratio:.1f}x)" if ratio and backend != "torch" else text)
        lines.append(f"| {size}: {about['describe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rewritten(readme: str, text: str) -> str:
    """The README with `text` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that it is up to date")
    options = parser.parse_args(arguments)
    path = machine.ROOT / "README.md"
    before = path.read_text("utf-8")
    after = rewritten(before, section(machine.ROOT / "benchmarks" / "results"))
    if options.check:
        if after != before:
            print("README.md: run python -m benchmarks.table", file=sys.stderr)
        return int(after != before)
    path.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
