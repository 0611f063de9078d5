"""The goals of the GPU backends on an NVIDIA H200, and what a record says about them.

There are two sizes, in float32 and bfloat16: the paper's episode in a batch of four, and a batch
with at least 1 GiB of features per side. Shares of the copy rate and memory are computed from
bytes: `moved` adds up what each pass of the head must read and write, `held` what must be in memory
at the same time. So kernels that move nothing twice and never wait for anything else have a share
of 1, and those that hold nothing twice a memory of 1. `floor_ms` is the time of a replayed graph
by its bytes and its launches; no goal is below it. That bytes allow a goal does not mean that
today's kernels come close: see the instructions in benchmarks/results/README.md.

`lines(record)` compares a record of `benchmarks.head` with each goal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lslpn_kernels._backends.cuda import GRAM_MAPS

DTYPES = ("float32", "bfloat16")
TRAINING, LARGE = "batch-4", "large"
LAUNCHES = 9  # of the head by `cuda`, forward and backward
LAUNCH_MS = 0.002  # approximate gap between the kernels of a graph


def tensors(size: dict[str, Any]) -> dict[str, int]:
    """Bytes of each tensor of the head, for an entry of a record's `sizes`."""
    B, K, Q, C, D = (size[letter] for letter in "BKQCD")
    cells, image, windows = size["cells"] ** 2, size["pixels"] ** 2, size["windows"]
    itemsize = 4 if size["dtype"] == "float32" else 2
    return {
        "support": B * K * D * cells * itemsize,
        "masks": B * K * (C - 1) * image,  # of the foreground: the background is derived
        "query": B * Q * D * cells * itemsize,
        "prototypes": B * C * windows * D * 4,
        "factor": B * K * C * windows * 4,
        "scores": B * Q * C * image * 4,
        "winners": B * Q * C * image,
        "gram": B * Q * GRAM_MAPS * cells * 4,
    }


def moved(size: dict[str, Any]) -> dict[str, int]:
    """Bytes that the kernels of each pass read and write: every argument and every result of an
    operator once, and what is kept for the backward pass. A gradient has the size of its tensor."""
    t = tensors(size)
    pool = t["support"] + t["masks"] + t["factor"] + t["prototypes"]
    match = t["query"] + t["prototypes"] + t["scores"] + t["winners"] + t["gram"]
    # Gradients of scores (which are read too), query features and prototypes.
    match_back = match + t["scores"] + t["query"] + t["prototypes"]
    forward, backward = pool + match, match_back + pool
    return {"forward": forward, "backward": backward, "both": forward + backward}


def held(size: dict[str, Any]) -> int:
    """Peak bytes in addition to the inputs, in the backward pass of either matching or pooling.

    The caller holds the logits. A twelfth of the features of one side is for the workspace. In the
    large batch `cuda` needs less (`WORKSPACE` in its module); in the small one it needs 2.4 MB for
    pooling, 1.0 MB more than that in float32 and 1.7 MB in bfloat16.
    """
    t = tensors(size)
    kept = t["winners"] + t["gram"] + t["prototypes"] + t["factor"]
    matching = kept + t["query"] + t["prototypes"] + t["query"] // 12
    pooling = t["factor"] + t["prototypes"] + t["query"] + t["support"] + t["support"] // 12
    return t["scores"] + max(matching, pooling)


def floor_ms(size: dict[str, Any], copy_bytes_per_s: float) -> float:
    """Time of a replayed forward and backward pass at the rate of a copy, with launch gaps."""
    return 1e3 * moved(size)["both"] / copy_bytes_per_s + LAUNCHES * LAUNCH_MS


@dataclass(frozen=True)
class Goal:
    """A number to be reached.

    Attributes:
        backend: that must reach it.
        size: on which it is measured.
        what: "faster than NAME", "replayed ms", "forward of copy" or "backward of copy" (bytes
            `moved` per second, relative to the measured copy rate), or "memory" (the peak relative
            to `held`).
        wanted: a minimum for ratios and shares, a maximum for times and memory.
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


# A twentieth of the memory is for the allocator's rounding.
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
    Goal("cuda", TRAINING, "memory", 1.05),
    Goal("cuda", LARGE, "memory", 1.05),
)


def value(record: dict[str, Any], goal: Goal, dtype: str) -> float | None:
    """The number in a record of `benchmarks.head`, or None if it was not measured."""
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
        passes = goal.what.split()[0]
        mine = found(goal.backend, "called", passes)
        if not mine:
            return None
        rate = moved(record["sizes"][size])[passes] / (mine["median_ms"] / 1e3)
        return float(rate / record["copy_bytes_per_s"])
    mine = found(goal.backend, "called", "both")
    other = found(goal.what.removeprefix("faster than "), "called", "both")
    return other["median_ms"] / mine["median_ms"] if mine and other else None


def _memory(record: dict[str, Any], size: str, backend: str) -> float | None:
    peaks = (m for m in record["memory"] if (m["size"], m["backend"]) == (size, backend))
    peak = next(peaks, None)
    if peak is None:
        return None
    return float(peak["extra_mib"]["both"] * 2**20 / held(record["sizes"][size]))


def _each(record: dict[str, Any]) -> Iterator[tuple[str, Goal, float | None]]:
    for goal in GOALS:
        for dtype in DTYPES:
            yield dtype, goal, value(record, goal, dtype)


def lines(record: dict[str, Any]) -> list[str]:
    """A line for each goal: whether it was met, the number found and the number wanted."""
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
