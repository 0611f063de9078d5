"""The benchmark runs, and its record has what benchmarks/results/README.md describes."""

from __future__ import annotations

import json
import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import head, instructions, loss, machine, report
from benchmarks.formulations import build
from benchmarks.sizes import PARTS, PASSES, SIZES, draw, least_bytes, least_flops
from benchmarks.timing import Slot, Work, in_turn, sample
from lslpn_kernels import backends

BACKENDS = ["torch", *(["cpu"] if backends()["cpu"].usable else [])]


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sizes", "tiny", "--seconds", "0.1", "--threads", "1", "--no-memory"]
    assert head.main([*arguments, "--backends", *BACKENDS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("head-*.json")
    record = json.loads(path.read_text())
    assert record["failures"] == []
    assert record["device"]["threads"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert all(rate > 0 for rate in record["rates"].values())

    measured = {(m["backend"], m["part"], m["pass"]): m for m in record["measurements"]}
    assert set(measured) == {(b, p, q) for b in BACKENDS for p in PARTS for q in PASSES}
    size = record["sizes"]["tiny float32"]
    for (_, part, of), m in measured.items():
        assert 0 < m["q20_ms"] <= m["median_ms"] <= m["q80_ms"]
        assert m["samples"] >= 3
        baseline = measured["torch", part, of]["median_ms"]
        assert m["speedup_over"]["torch"] == pytest.approx(baseline / m["median_ms"], rel=1e-3)
        floor = size["floor_ms"][part][of]
        assert m["times_floor"] == pytest.approx(m["median_ms"] / floor, rel=1e-3)
    assert len(record["checks"]) == len(BACKENDS) * len(PARTS)

    printed = capsys.readouterr().out
    assert head.main(["--report", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert report.markdown(record) in printed
    assert all(f"| {name} |" in printed for name in BACKENDS)
    if path.with_suffix(".png").exists():  # matplotlib is optional
        assert path.with_suffix(".png").stat().st_size > 5000


def test_loss_in_one_pass_beside_two(capsys: pytest.CaptureFixture[str]) -> None:
    loss.main(["--size", "tiny", "--rounds", "2"])
    assert re.search(r"head\.loss +\d+\.\d+ ms\n\d+\.\d+ times as fast\n$", capsys.readouterr().out)


def test_wrong_backend_is_found_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(name: str, part: str, size: object, device: str) -> object:
        call = build("torch", part, size, device)  # type: ignore[arg-type]
        return (lambda *inputs: call(*inputs) * 1.001) if name == "torch-windows" else call

    monkeypatch.setattr(head, "build", slightly_wrong)
    arguments = ["--sizes", "tiny", "--seconds", "0.05", "--no-memory", "--out", str(tmp_path)]
    assert head.main([*arguments, "--backends", "torch", "torch-windows"]) == 1
    record = json.loads(next(tmp_path.glob("head-*.json")).read_text())
    (failure,) = record["failures"]
    assert (failure["backend"], failure["step"]) == ("torch-windows", "check")
    assert "differs from torch in float64 by 1.0e-03" in failure["reason"]
    assert {m["backend"] for m in record["measurements"]} == {"torch"}


class _Stop:
    """Let `build` run until it reaches a name, and interrupt it there, as at the end of the time.
    `torch.compile` is replaced by what it compiles."""

    def __init__(self, at: str, size: str) -> None:
        self.at, self.size = at, size
        self.built: list[tuple[str, str, str]] = []

    def __call__(self, name: str, part: str, size: Any, device: str) -> Any:
        self.built.append((size.key, name, part))
        if (name, size.key) == (self.at, self.size):
            raise KeyboardInterrupt
        return build("torch" if name.startswith("torch.compile") else name, part, size, device)


ROUNDS = ["--sizes", "tiny", "--dtypes", "float32", "float64", "--seconds", "0.05", "--no-memory"]
NAMES_OF_ROUNDS = ["torch.compile", "torch-windows", "torch", "cpu"]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")


@needs_cpu
def test_kernels_are_timed_before_any_baseline_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all sizes; and an interrupt during compilation keeps all measurements, to continue."""
    path = tmp_path / "head.json"
    arguments = [*ROUNDS, "--record", str(path), "--backends", *NAMES_OF_ROUNDS]
    stop = _Stop("torch.compile", "tiny float64")
    monkeypatch.setattr(head, "build", stop)
    assert head.main(arguments) == 1
    # (The truth is built too, of the `torch` backend in float64, before anything is checked.)
    order = [(size, name) for size, name, _ in stop.built if name != "torch"]
    first = [("tiny float32", "cpu"), ("tiny float64", "cpu")]
    assert list(dict.fromkeys(order))[:2] == first
    assert order.index(("tiny float32", "torch.compile")) > order.index(first[1])

    record = json.loads(path.read_text())
    assert record["failures"][-1]["reason"] == "interrupted"
    assert record["rounds"] == [[1, "tiny float32"], [1, "tiny float64"], [2, "tiny float32"]]
    measured = {(m["size"], m["backend"]) for m in record["measurements"] if m["part"] == "head"}
    assert measured == {
        *(("tiny float32", name) for name in NAMES_OF_ROUNDS),
        *(("tiny float64", name) for name in ("torch", "cpu")),
    }
    parts = {m["part"] for m in record["measurements"] if m["backend"] == "cpu"}
    assert parts == set(PARTS)

    again = _Stop("nobody", "")
    monkeypatch.setattr(head, "build", again)
    assert head.main(arguments) == 0
    assert {size for size, _, _ in again.built} == {"tiny float64"}
    assert {part for _, _, part in again.built} == {"head"}
    finished = json.loads(path.read_text())
    assert finished["failures"] == []
    assert finished["rounds"] == [*record["rounds"], [2, "tiny float64"]]
    places = [(m["size"], m["part"], m["backend"], m["pass"]) for m in finished["measurements"]]
    assert len(places) == len(set(places))


@needs_cpu
def test_an_interrupt_keeps_what_the_same_size_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the first size, while calls are timed."""
    path = tmp_path / "head.json"
    turns = []

    def interrupted(slots: Any, device: str, seconds: float) -> None:
        if turns:
            raise KeyboardInterrupt
        turns.append(len(slots))
        in_turn(slots, device, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "in_turn", interrupted)
    assert head.main([*ROUNDS, "--record", str(path), "--backends", "torch", "cpu"]) == 1
    record = json.loads(path.read_text())
    assert {m["backend"] for m in record["measurements"]} == {"torch", "cpu"}
    assert record["rounds"] == []


def test_a_record_of_another_commit_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head.json"
    arguments = [*ROUNDS[:2], *ROUNDS[-3:], "--record", str(path), "--backends", "torch"]
    assert head.main(arguments) == 0
    before = path.read_bytes()
    monkeypatch.setattr(machine, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="written with another commit; give a new file"):
        head.main(arguments)
    assert path.read_bytes() == before


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_torch_windows_is_exact(name: str, part: str) -> None:
    size = SIZES[name].with_dtype(torch.float64)
    inputs = draw(size, "cpu")
    found = []
    for backend in ("torch", "torch-windows"):
        work = Work(build(backend, part, size, "cpu"), *inputs.of(part))
        work.both()
        found.append((work.out, *(work.grads or ())))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_least_work_of_the_paper() -> None:
    """By hand: one episode, 65x65 locations of 256 channels, 512x512 pixels, 2 classes."""
    features, image, prototypes = 256 * 65 * 65 * 4, 512 * 512, 2 * 225 * 256 * 4
    paper = SIZES["paper"]
    assert least_bytes(paper, "head")["forward"] == 2 * features + image + 2 * image * 4
    assert least_bytes(paper, "match")["backward"] == 2 * features + 2 * prototypes + 8 * image
    pool = least_bytes(paper, "pool")
    assert pool["both"] == 2 * (features + 2 * image + prototypes)
    # An inner location reaches 4 windows and up to 9, for either class; 5 products are for norms.
    products = least_flops(paper, "match")["forward"] / (2 * 256 * 65**2)
    assert 2 * 4 + 5 < products < 2 * 9 + 5


def test_bounds_by_hand() -> None:
    """Two launches on an H200, of half of the work: one bound by issue, one by memory."""
    instructions_a_us = 132 * 4 * 1980
    launches = [
        {"instructions": {"arithmetic": 3 * instructions_a_us, "tensor core": instructions_a_us},
         "shared_wavefronts": 132 * 1980, "bytes_read": 4_800_000, "bytes_written": 0},
        {"instructions": {"arithmetic": instructions_a_us, "tensor core": 0},
         "shared_wavefronts": 0, "bytes_read": 4_800_000, "bytes_written": 4_800_000},
    ]  # fmt: skip
    found = instructions.bounds(launches, times=2)["H200"]
    assert found == pytest.approx(
        {"issue_us": 2 * 5, "shared_us": 2 * 1, "memory_us": 2 * 3, "least_us": 2 * (4 + 2)}
    )


def test_peak_memory_of_a_process(tmp_path: Path) -> None:
    from benchmarks import memory

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory on a CPU is measured on Linux only")
    size = SIZES["small"]
    found = memory.in_a_process("torch-windows", [size], threads=1)[size.key]
    # It keeps the support features at the size of the image, times each of two masks, to say
    # the least; and holds no more than a few dozen of those.
    image = size.D * size.pixels**2 * 4 / 2**20
    assert 2 * image < found["both"] < 40 * image
    assert found["inference"] < found["both"]


def test_slots_take_turns() -> None:
    order: list[str] = []

    def slot(name: str) -> Slot:
        return Slot("head", name, "called", ("inference",), (lambda: order.append(name),), _nothing)

    slots = [slot("a"), slot("b")]
    in_turn(slots, "cpu", 0.01)
    turns = [name for name, _ in groupby(order)]
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 2 * (1 + 3)  # to warm up, and three at least
    assert len(slots[0].samples) == len(slots[1].samples) >= 3
    assert all(math.isfinite(t) for row in slots[0].samples for t in row)


def test_a_failing_step_is_reported_and_left_out() -> None:
    def step() -> None:
        raise RuntimeError("no such kernel\nand more")

    slot = Slot("head", "a", "called", ("inference",), (step,), _nothing)
    in_turn([slot], "cpu", 0.01)
    assert slot.failure == "RuntimeError: no such kernel"
    assert slot.samples == []


def test_preparations_are_not_timed() -> None:
    import time

    (row,) = sample("cpu", (lambda: None, lambda: time.sleep(0.02)), 1, lambda: time.sleep(0.1))
    assert row[0] < 10
    assert 20 <= row[1] < 90


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "huge"], "--sizes"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--report", "nowhere.json"], "no such file"),
    ],
)
def test_mistakes_are_reported(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        head.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_record_of_a_gpu(tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--sizes", "tiny", "--seconds", "0.2", "--out", str(tmp_path)]
    kernels = [n for n in ("triton", "cuda") if backends()[n].usable]
    assert head.main([*arguments, "--backends", "torch", *kernels]) == 0
    record = json.loads(next(tmp_path.glob("head-*.json")).read_text())
    hows = {m["how"] for m in record["measurements"] if m["backend"] in kernels}
    assert not kernels or hows == {"called", "replayed", "replayed cold"}
    assert {m["backend"] for m in record["memory"]} == {"torch", *kernels}


def _nothing() -> None:
    pass
