"""Timing with backends that take turns, CUDA graphs, and the rates of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .formulations import Call

Step = Callable[[], object]


class Work:
    """A part of the head on one batch by one implementation, pass by pass."""

    def __init__(
        self, call: Call, inputs: tuple[Tensor, ...], leaves: tuple[int, ...], grad: Tensor
    ) -> None:
        self.call, self.inputs, self.grad = call, inputs, grad
        self.leaves = tuple(inputs[i] for i in leaves)
        self.out: Tensor | None = None
        self.grads: tuple[Tensor, ...] | None = None

    def inference(self) -> None:
        with torch.no_grad():
            self.out = self.call(*self.inputs)

    def forward(self) -> None:
        self.out = self.call(*self.inputs)

    def backward(self) -> None:
        assert self.out is not None
        self.grads = torch.autograd.grad(self.out, self.leaves, self.grad)

    def both(self) -> None:
        self.forward()
        self.backward()

    def clear(self) -> None:
        self.out = self.grads = None


def sample(device: str, steps: Sequence[Step], repeat: int, before: Step) -> list[list[float]]:
    """Milliseconds of each step, `repeat` times; `before` is not timed.

    On a GPU the time is that between events, so a step takes as long as the slower of host and
    device.
    """
    if device == "cuda":
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
            for _ in range(repeat)
        ]
        for row in marks:
            before()
            row[0].record()
            for step, mark in zip(steps, row[1:], strict=True):
                step()
                mark.record()
        torch.cuda.synchronize()
        return [[a.elapsed_time(b) for a, b in pairwise(row)] for row in marks]
    taken = []
    for _ in range(repeat):
        before()
        clock = [time.perf_counter()]
        for step in steps:
            step()
            clock.append(time.perf_counter())
        taken.append([1e3 * (b - a) for a, b in pairwise(clock)])
    return taken


@dataclass
class Slot:
    """The steps of a backend in its turn; `names` are the passes that they time.

    If these are forward and backward, their sum is the time of "both".
    """

    part: str
    backend: str
    how: str
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    before: Step
    samples: list[list[float]] = field(default_factory=list)
    failure: str = ""
    typical: float = 0.0  # ms of one repetition

    def turn(self, device: str, repeat: int) -> None:
        if self.failure:
            return
        try:
            self.samples += sample(device, self.steps, repeat, self.before)
        except Exception as error:
            self.failure = one_line(error)
        finally:
            self.before()

    def slow(self, seconds: float) -> bool:
        """Whether a call takes so long that it is only repeated three times."""
        return self.typical > 1e3 * seconds / 20

    def passes(self) -> dict[str, list[float]]:
        """Milliseconds by pass."""
        times = dict(zip(self.names, map(list, zip(*self.samples, strict=True)), strict=False))
        if self.names == ("forward", "backward"):
            times["both"] = [sum(row) for row in self.samples]
        return times


def in_turn(slots: Sequence[Slot], device: str, seconds: float) -> None:
    """Let all slots take turns for `seconds`, so that other work on the machine affects all of them
    equally. Short calls are repeated several times per turn, very long ones three times in total.
    """
    least, most, turn_ms = 3, 200, 20.0
    for slot in slots:
        slot.turn(device, 1)  # warms up, and measures how long it takes
        slot.typical = sum(slot.samples[-1]) if slot.samples else 0.0
        if not slot.slow(seconds):
            slot.samples.clear()
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for slot in slots:
            if not slot.slow(seconds) or len(slot.samples) < least:
                slot.turn(device, max(1, min(10, int(turn_ms / max(slot.typical, 1e-3)))))


# CUDA graphs


def capture(work: Work) -> dict[tuple[str, ...], tuple[Step, ...]]:
    """Replays of a work's passes, by the passes that they time. The work must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work.inference()
            work.both()
            work.clear()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def graph_of(step: Step, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph

    inference = graph_of(work.inference, torch.cuda.graph_pool_handle())
    work.clear()
    both = graph_of(work.both, torch.cuda.graph_pool_handle())
    work.clear()
    shared = torch.cuda.graph_pool_handle()
    forward = graph_of(work.forward, shared)
    backward = graph_of(work.backward, shared)
    work.clear()
    return {
        ("inference",): (inference.replay,),
        ("both",): (both.replay,),
        ("forward", "backward"): (forward.replay, backward.replay),
    }


def flusher(device: str) -> Step:
    """A step that overwrites the GPU's cache, so that the next one reads from memory."""
    buffer = torch.empty(256 << 20, dtype=torch.int8, device=device)
    return buffer.zero_


# The machine


def _fastest(device: str, step: Step, seconds: float) -> float:
    """Seconds of the fastest of several calls."""
    sample(device, (step,), 2, _nothing)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, *(row[0] for row in sample(device, (step,), 3, _nothing)))
    return best / 1e3


def copy_rate(device: str, n: int, seconds: float = 0.3) -> float:
    """Bytes per second, read and written together, of copying `n` bytes with torch."""
    source = torch.ones(n, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return 2 * n / _fastest(device, lambda: target.copy_(source), seconds)


def matrix_rate(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float = 0.3
) -> float:
    """Operations per second of torch.mm, [m, k] x [k, n]; a multiply-add counts as two."""
    m, k, n = shape
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _fastest(device, lambda: torch.mm(a, b, out=out), seconds)


def one_line(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300]


def _nothing() -> None:
    pass
