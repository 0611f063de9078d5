"""What the GPU backends are to reach on an NVIDIA H200, and what a record says of it.

Two sizes are asked about, in float32 and bfloat16: the paper's episode in a batch of four, and
1 GiB of features a side and more. `lines(record)` sets a record of `benchmarks.head` against each
number; benchmarks/results/README.md says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "bfloat16")
TRAINING, LARGE = "batch-4", "large"


@dataclass(frozen=True)
class Goal:
    """One number.

    Attributes:
        backend, size: of whom, and on what.
        what: "faster than NAME", "replayed ms", "forward of copy", "backward of copy" or
            "memory": peak over results, gradients and a tenth of the features.
        wanted: at least that for ratios and shares, at most that for times and memory.
    """

    backend: str
    size: str
    what: str
    wanted: float

    @property
    def at_most(self) -> bool:
        return self.what in ("replayed ms", "memory")

    def met(self, value: float) -> bool:
        return value <= self.wanted if self.at_most else value >= self.wanted


GOALS = (
    Goal("triton", TRAINING, "faster than torch", 15),
    Goal("triton", TRAINING, "faster than torch.compile", 5),
    Goal("triton", TRAINING, "replayed ms", 0.080),
    Goal("triton", LARGE, "forward of copy", 0.70),
    Goal("triton", LARGE, "backward of copy", 0.60),
    Goal("cuda", TRAINING, "faster than torch", 20),
    Goal("cuda", TRAINING, "faster than torch.compile-max", 6),
    Goal("cuda", TRAINING, "faster than triton", 1.2),
    Goal("cuda", TRAINING, "replayed ms", 0.060),
    Goal("cuda", LARGE, "forward of copy", 0.80),
    Goal("cuda", LARGE, "backward of copy", 0.70),
    Goal("cuda", TRAINING, "memory", 1.0),
    Goal("cuda", LARGE, "memory", 1.0),
)


def value(record: dict[str, Any], goal: Goal, dtype: str) -> float | None:
    """What a record of `benchmarks.head` says; None where it says nothing."""
    size = f"{goal.size} {dtype}"

    def found(backend: str, how: str, passes: str) -> dict[str, Any] | None:
        place = {"size": size, "backend": backend, "how": how, "pass": passes, "part": "head"}
        of = (m for m in record["measurements"] if place.items() <= m.items())
        return next(of, None)

    if goal.what == "memory":
        return _memory(record, size, goal.backend)
    if goal.what == "replayed ms":
        mine = found(goal.backend, "replayed", "both")
        return mine["median_ms"] if mine else None
    if goal.what.endswith(" of copy"):
        mine = found(goal.backend, "called", goal.what.split()[0])
        return mine["share_of_copy"] if mine else None
    mine = found(goal.backend, "called", "both")
    other = found(goal.what.removeprefix("faster than "), "called", "both")
    return other["median_ms"] / mine["median_ms"] if mine and other else None


def _memory(record: dict[str, Any], size: str, backend: str) -> float | None:
    of = record["sizes"].get(size)
    peaks = (m for m in record["memory"] if (m["size"], m["backend"]) == (size, backend))
    peak = next(peaks, None)
    if of is None or peak is None:
        return None
    itemsize = 4 if of["dtype"] == "float32" else 2
    features = of["B"] * (of["K"] + of["Q"]) * of["D"] * of["cells"] ** 2 * itemsize
    scores = of["B"] * of["Q"] * of["C"] * of["pixels"] ** 2 * 4
    allowed = scores + 1.1 * features  # the result, the gradients, a tenth of the features
    return float(peak["extra_mib"]["both"] * 2**20 / allowed)


def _each(record: dict[str, Any]) -> Iterator[tuple[str, Goal, float | None]]:
    for goal in GOALS:
        for dtype in DTYPES:
            yield dtype, goal, value(record, goal, dtype)


def lines(record: dict[str, Any]) -> list[str]:
    """A line for each number: whether it was met, what was found and what was wanted."""
    text = []
    for dtype, goal, found in _each(record):
        verdict = "not measured" if found is None else "met" if goal.met(found) else "MISSED"
        number = "-" if found is None else f"{found:.3g}"
        bound = "at most" if goal.at_most else "at least"
        text.append(
            f"{verdict:13} {goal.backend:7} {goal.size:8} {dtype:9} {goal.what:30} "
            f"{number:>7}, {bound} {goal.wanted:g}"
        )
    return text
