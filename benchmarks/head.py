"""Time and memory of the head, compared with plain PyTorch and with the limits of the machine.

    python -m benchmarks.head                     # this machine's CPU
    python -m benchmarks.head --device cuda
    python -m benchmarks.head --report FILE.json  # the tables of a record, as Markdown

Backends take turns in one process, so other work on the machine affects all of them; compare the
ratios. Before a backend is timed, its results and gradients are compared with those of `torch` in
float64. There are two rounds over all sizes: first the kernels and eager PyTorch, then the slow
baselines, which may compile for minutes, taking turns with the kernels again. The record is written
after each size of each round; if it is given as `--record`, a run continues it. Needs only torch;
with matplotlib a plot is drawn. benchmarks/results/README.md describes the record.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lslpn_kernels import backends as status_of_backends

from . import machine, memory, report
from .formulations import COMPILED, EAGER, KERNELS, NAMES, build, windows_bytes
from .sizes import PARTS, PASSES, SIZES, Inputs, Size, chosen, draw, least_bytes, least_flops
from .timing import Slot, Work, capture, copy_rate, flusher, in_turn, matrix_rate, one_line

SCHEMA = 1
# Root mean square of the difference relative to that of the truth, for results and gradients. If
# two windows have equal scores in a pixel up to rounding, the gradient goes to either of them,
# hence the larger second number.
_TOLERANCE = {
    torch.float64: (1e-9, 1e-6),
    torch.float32: (1e-4, 2e-2),
    torch.float16: (1e-2, 1e-1),
    torch.bfloat16: (2e-2, 2e-1),
}
# Baselines of the second round, which take long to compile or are slow.
SLOW = ("reference", "torch-windows", *COMPILED)
_WINDOWS_MOST = {"cpu": 3 << 30, "cuda": 16 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a backend was wrong or failed, otherwise 0."""
    options = _parse(arguments)
    if options.report:
        print(report.markdown(json.loads(options.report.read_text())))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    (options.record.parent if options.record else options.out).mkdir(parents=True, exist_ok=True)
    sizes = chosen(options.sizes, options.dtypes, options.device, options.quick)
    seconds = options.seconds or (2.5 if options.quick else 4 if options.device == "cuda" else 8)
    began = time.perf_counter()
    names = options.backends or _default_backends(options.device, options.quick)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "head",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.head " + shlex.join(arguments or sys.argv[1:]),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "device": machine.describe(options.device),
        "load_before": machine.load(),
        "seconds_a_size": seconds,
        "backends": {name: str(status) for name, status in status_of_backends().items()},
        "rates": {},
        "sizes": {},
        "rounds": [],
        "checks": [],
        "measurements": [],
        "memory": [],
        "failures": [],
    }
    path: Path = options.record or _free_name(options.out, record)
    if path.exists():
        record = _gone_on_with(path, record)
    left = [
        (number, size, of_size)
        for number in ((options.round,) if options.round else (1, 2))
        for size in sizes
        if (of_size := _of_round(number, names, size, options))
        and [number, size.key] not in record["rounds"]
    ]
    _measure_rates(record, options.device, sizes)
    try:
        for number, size, of_size in left:
            _say(f"{size.key}, round {number}: {size.describe()}")
            _measure(record, number, size, of_size, options, seconds)
            record["rounds"].append([number, size.key])
            _release(options.device)
            _compare(record)
            _save(path, record)  # in case the run is cut short
    except KeyboardInterrupt:  # also from benchmarks.gpu, when the time is up
        interrupted = _failure(size, "all", "all", "run", "interrupted")
        _compare(record)
        _save(path, {**record, "failures": [*record["failures"], interrupted]})
        print(report.markdown(_rounded(record)))
        return 1
    if options.device == "cpu" and not options.no_memory and (left or not record["memory"]):
        _measure_memory(record, sizes, names, options)
    _measure_rates(record, options.device, sizes)
    _compare(record)
    record["load_after"] = machine.load()
    record["took_seconds"] = round(record.get("took_seconds", 0) + time.perf_counter() - began, 1)
    _save(path, record)
    print(report.markdown(_rounded(record)))
    _say(f"\nrecord: {path}")
    plot = _plot(path)
    if plot:
        _say(f"plot:   {plot}")
    return 1 if record["failures"] else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head",
        description="Time and memory of the head, compared with plain PyTorch.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and backends: less than a minute on a CPU"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"some of {', '.join(NAMES)}; default: all that can run",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=tuple(SIZES),
        metavar="SIZE",
        help=f"some of {', '.join(SIZES)}",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float64", "float32", "float16", "bfloat16"),
        metavar="DTYPE",
        help="default: float32; on a GPU also bfloat16 for the sizes of training",
    )
    parser.add_argument("--seconds", type=float, help="per size (default 8; on a GPU 4)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    parser.add_argument("--round", type=int, choices=(1, 2), help="only this round")
    parser.add_argument("--record", type=Path, metavar="FILE",
                        help="write this file; if it exists, continue it")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="print the tables of a record and exit")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not options.report and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here (torch.cuda.is_available())")
    if options.report and not options.report.is_file():
        parser.error(f"--report {options.report}: no such file; give the JSON of an earlier run")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


def _default_backends(device: str, quick: bool) -> list[str]:
    status = status_of_backends()
    names = []
    for name in NAMES:
        kernel = name in KERNELS
        if kernel and not (status[name].usable and device in status[name].devices):
            _say(f"without {name}: {status[name]}" if not status[name].usable else
                 f"without {name}: it does not run on {device}")  # fmt: skip
        elif name == "torch.compile-max" and device == "cpu":
            continue
        elif not (quick and name in COMPILED):
            names.append(name)
    return names


def _takes_part(name: str, size: Size, options: argparse.Namespace) -> bool:
    """Whether a backend is measured at a size: slow ones only if informative or requested."""
    if options.backends and options.sizes:
        return True
    if name == "reference":
        return size.reference
    if name in COMPILED:
        return options.device in size.compiled and (
            COMPILED[name] == "default" or size.name == "batch-4"  # its search takes a minute
        )
    if name == "torch-windows":
        return (
            size.windows
            and not options.quick
            and windows_bytes(size) <= _WINDOWS_MOST[options.device]
        )
    return True


def _of_round(number: int, names: Sequence[str], size: Size, options: Any) -> list[str]:
    """The backends of a round: the kernels and `torch` in the first, the slow baselines and again
    those of the first in the second."""
    here = [name for name in names if _takes_part(name, size, options)]
    first = sorted((n for n in here if n not in SLOW), key=lambda n: n not in KERNELS)
    slow = [name for name in here if name in SLOW]
    return first if number == 1 else [*first, *slow] if slow else []


def _gone_on_with(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier run with the same code and machine.

    Raises:
        SystemExit: code or machine differ, or it is not a record.
    """
    try:
        earlier: dict[str, Any] = json.loads(path.read_text("utf-8"))
        differ = [k for k in ("schema", "commit", "versions", "device") if earlier[k] != record[k]]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--record {path}: not a record of benchmarks.head ({error!r})") from error
    if differ:
        raise SystemExit(
            f"--record {path}: written with another {' and '.join(differ)}; give a new file"
        )
    earlier["failures"] = [f for f in earlier["failures"] if f["step"] != "run"]
    return earlier


def _measure_rates(record: dict[str, Any], device: str, sizes: Sequence[Size]) -> None:
    """Measure how fast this machine copies and multiplies matrices, and keep the higher rates.

    Called at the beginning and the end of a run. Small copies are in the caches of a CPU, as an
    episode's features are; on a GPU only a large one is measured. One matrix product has the shape
    of the head's (locations x channels by a few prototypes), one is square.
    """
    tiny = all(size.name == "tiny" for size in sizes)
    few = 0.05 if tiny else 0.3
    copies = (16, 64, 256) if device == "cpu" else (2048,)
    copies = copies[:1] if all(size.name == "tiny" for size in sizes) else copies
    rates = record["rates"]
    for mebibytes in copies:
        _faster(rates, f"copy {mebibytes} MiB", copy_rate(device, mebibytes << 20, few))
    side = 1024 if device == "cpu" else 8192
    for dtype in dict.fromkeys(size.dtype for size in sizes):
        for shape in ((65 * 65, 256, 32), (side, side, side)):
            label = f"{dtype} [{shape[0]}, {shape[1]}] x [{shape[1]}, {shape[2]}]"
            rate = matrix_rate(device, dtype, shape, few)
            _faster(rates, "matrix " + label.removeprefix("torch."), rate)


def _faster(rates: dict[str, float], name: str, rate: float) -> None:
    rates[name] = max(rate, rates.get(name, 0.0))


def _measure(
    record: dict[str, Any],
    number: int,
    size: Size,
    names: list[str],
    options: argparse.Namespace,
    seconds: float,
) -> None:
    device = options.device
    torch.compiler.reset()
    record["sizes"][size.key] = {
        **{letter: getattr(size, letter) for letter in ("B", "K", "Q", "C", "D")},
        "cells": size.cells,
        "pixels": size.pixels,
        "scale": size.scale,
        "windows": size.axis.windows**2,
        "dtype": str(size.dtype).removeprefix("torch."),
        "describe": size.describe(),
        "bytes": {part: least_bytes(size, part) for part in PARTS},
        "flops": {part: least_flops(size, part) for part in PARTS},
    }
    try:
        inputs = draw(size, device)
        truth = {part: _truth(size, inputs, part) for part in PARTS[: 3 if number == 1 else 1]}
    except Exception as error:
        record["failures"].append(_failure(size, "torch", "head", "inputs", error))
        return
    failed = {
        (f["backend"], f["part"])
        for f in record["failures"]
        if (f["size"], f["step"]) == (size.key, "check")
    }
    works = []
    for name in names:
        for part in truth:
            if number == 2 and (name, part) in failed:
                continue
            work = _checked(record, size, name, part, inputs, truth[part], device)
            if work:
                works.append((name, part, work))
    del truth
    _release(device)
    slots = [slot for name, part, work in works for slot in _called(name, part, work, device)]
    if device == "cuda":
        new = [work for work in works if number == 1 or work[0] in SLOW]
        if not options.no_memory:
            _measure_cuda_memory(record, size, new)
        if size.replayed:
            slots += _replays(record, size, new)
    _say(f"  timing for {seconds:g} s and more")
    try:
        in_turn(slots, device, seconds)
    finally:
        _collect(record, size, slots)


def _checked(
    record: dict[str, Any],
    size: Size,
    name: str,
    part: str,
    inputs: Inputs,
    truth: list[tuple[slice, Tensor, tuple[Tensor, ...]]],
    device: str,
) -> Work | None:
    """A part of a backend, ready to be timed; None if it is wrong or fails, which is recorded."""
    _say(f"  checking {name} {part}")
    work: Work | None = None
    try:
        work = Work(build(name, part, size, device), *inputs.of(part))
        if name in COMPILED:
            work.inference()  # has its own graph, which is compiled here to keep it out of timing
        work.clear()
        work.both()
        wrong: BaseException | str = _check(record, size, name, part, work, truth)
    except Exception as error:
        wrong = error
    if work is not None:
        work.clear()
    if not wrong:
        return work
    record["failures"].append(_failure(size, name, part, "check", wrong))
    _release(device)
    return None


def _called(name: str, part: str, work: Work, device: str) -> list[Slot]:
    before = _marked(work) if name in COMPILED and device == "cuda" else work.clear
    steps = {
        ("inference",): (work.inference,),
        ("forward", "backward"): (work.forward, work.backward),
    }
    return [Slot(part, name, "called", passes, steps[passes], before) for passes in steps]


def _collect(record: dict[str, Any], size: Size, slots: Sequence[Slot]) -> None:
    """Record the measurements of the slots, replacing those of an earlier round."""
    for slot in slots:
        if slot.failure:
            how = " ".join((slot.how, *slot.names))
            record["failures"].append(_failure(size, slot.backend, slot.part, how, slot.failure))
        if not slot.samples:
            continue
        for name, times in slot.passes().items():
            q20, median, q80 = _quantiles(times)
            place = {
                "size": size.key,
                "part": slot.part,
                "backend": slot.backend,
                "how": slot.how,
                "pass": name,
            }
            entry = {"median_ms": median, "q20_ms": q20, "q80_ms": q80, "samples": len(times)}
            _enter(record["measurements"], place, entry)


def _enter(entries: list[dict[str, Any]], place: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add an entry, or replace an earlier one in its place, which keeps the order of tables."""
    for earlier in entries:
        if place.items() <= earlier.items():
            earlier.update(entry)
            return
    entries.append({**place, **entry})


def _truth(size: Size, inputs: Inputs, part: str) -> list[tuple[slice, Tensor, tuple[Tensor, ...]]]:
    """Result and gradients of `torch` in float64.

    Of all episodes if they are few, otherwise of the first and the last, which is enough to find an
    offset that overflows.
    """
    B = inputs.query.shape[0]
    found = []
    for of in [slice(0, B)] if B <= 4 else [slice(0, 1), slice(B - 1, B)]:
        exact = inputs.episodes(of, torch.float64)
        call = build("torch", part, size.with_dtype(torch.float64), str(inputs.query.device))
        work = Work(call, *exact.of(part))
        work.both()
        assert work.out is not None
        assert work.grads is not None
        found.append((of, work.out.detach(), work.grads))
    return found


def _check(
    record: dict[str, Any],
    size: Size,
    name: str,
    part: str,
    work: Work,
    truth: list[tuple[slice, Tensor, tuple[Tensor, ...]]],
) -> str:
    """Record the difference of a backend from the truth; returns a message if it is too large."""
    assert work.out is not None
    assert work.grads is not None
    result, gradients = 0.0, 0.0
    for of, out, grads in truth:
        result = _larger(result, _distance(work.out[of], out))
        for actual, expected in zip(work.grads, grads, strict=True):
            gradients = _larger(gradients, _distance(actual[of], expected))
    place = {"size": size.key, "part": part, "backend": name}
    _enter(record["checks"], place, {"result": result, "gradients": gradients})
    most = _TOLERANCE[size.dtype]
    if result <= most[0] and gradients <= most[1]:
        return ""
    return (
        f"differs from torch in float64 by {result:.1e} in the result (expected at most "
        f"{most[0]:g}) and {gradients:.1e} in the gradients (at most {most[1]:g})"
    )


def _distance(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.detach().double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-300))


def _larger(a: float, b: float) -> float:
    return b if not b <= a else a  # NaN stays


def _marked(work: Work) -> Any:
    def before() -> None:
        work.clear()
        torch.compiler.cudagraph_mark_step_begin()

    return before


def _replays(
    record: dict[str, Any], size: Size, works: Sequence[tuple[str, str, Work]]
) -> list[Slot]:
    slots = []
    flush = flusher("cuda")
    for name, part, work in works:
        if name in EAGER[1:] or COMPILED.get(name) == "max-autotune":  # has its own graphs
            continue
        try:
            graphs = capture(work)
        except Exception as error:
            record["failures"].append(_failure(size, name, part, "capture", error))
            continue
        for passes, steps in graphs.items():
            slots.append(Slot(part, name, "replayed", passes, steps, lambda: None))
            slots.append(Slot(part, name, "replayed cold", passes, steps, flush))
    return slots


def _measure_cuda_memory(
    record: dict[str, Any], size: Size, works: Sequence[tuple[str, str, Work]]
) -> None:
    for name, part, work in works:
        if part == "head":
            try:
                found = memory.on_cuda(work)
            except Exception as error:
                record["failures"].append(_failure(size, name, part, "memory", error))
                continue
            _enter(record["memory"], {"size": size.key, "backend": name}, {"extra_mib": found})


def _measure_memory(
    record: dict[str, Any], sizes: Sequence[Size], names: Sequence[str], options: Any
) -> None:
    for name in names:
        failed = {(f["size"], f["backend"]) for f in record["failures"]}
        of = [s for s in sizes if _takes_part(name, s, options) and (s.key, name) not in failed]
        if not of:
            continue
        _say(f"memory of {name}")
        try:
            found = memory.in_a_process(name, of, torch.get_num_threads())
        except Exception as error:
            record["failures"].append(
                {"size": "", "backend": name, "part": "head", "step": "memory",
                 "reason": one_line(error)}
            )  # fmt: skip
            continue
        for key, extra in found.items():
            _enter(record["memory"], {"size": key, "backend": name}, {"extra_mib": extra})


def _compare(record: dict[str, Any]) -> None:
    """Add floors, rates and ratios to the medians."""
    rates = record["rates"]
    copies = sorted((int(n.split()[1]) << 20, r) for n, r in rates.items() if n.startswith("copy"))
    record["copy_bytes_per_s"] = copies[-1][1]
    for size in record["sizes"].values():
        matrix = max(r for n, r in rates.items() if n.startswith(f"matrix {size['dtype']} "))
        # The data of an episode may be in the caches of a CPU, where a copy of main memory is no
        # floor. Hence a second floor, by the smallest copy that moves at least as much.
        moved = size["bytes"]["head"]["both"]
        cached = next((rate for n, rate in copies if 2 * n >= moved), copies[-1][1])
        for name, copy in (("floor_ms", copies[-1][1]), ("floor_cached_ms", cached)):
            size[name] = {
                part: {
                    p: 1e3 * (size["bytes"][part][p] / copy + size["flops"][part][p] / matrix)
                    for p in PASSES
                }
                for part in PARTS
            }

    def place(m: dict[str, Any], backend: str) -> tuple[str, ...]:
        return m["size"], m["part"], m["how"], m["pass"], backend

    medians = {place(m, m["backend"]): m["median_ms"] for m in record["measurements"]}
    for m in record["measurements"]:
        size = record["sizes"][m["size"]]
        m["times_floor"] = m["median_ms"] / size["floor_ms"][m["part"]][m["pass"]]
        m["bytes_per_s"] = size["bytes"][m["part"]][m["pass"]] / (m["median_ms"] / 1e3)
        m["share_of_copy"] = m["bytes_per_s"] / record["copy_bytes_per_s"]
        baselines = {
            n: medians[place(m, n)] for n in ("torch", *COMPILED) if place(m, n) in medians
        }
        m["speedup_over"] = {name: t / m["median_ms"] for name, t in baselines.items()}
        if baselines:
            m["speedup_over"]["fastest"] = min(baselines.values()) / m["median_ms"]


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _failure(
    size: Size, backend: str, part: str, step: str, reason: BaseException | str
) -> dict[str, str]:
    text = reason if isinstance(reason, str) else one_line(reason)
    _say(f"  FAILED {backend} {part} ({step}): {text}")
    return {"size": size.key, "backend": backend, "part": part, "step": step, "reason": text}


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _free_name(out: Path, record: dict[str, Any]) -> Path:
    """head-DEVICE-DATE.json, with a number if that file already exists."""
    slug = re.sub(r"\((r|tm)\)", "", record["device"]["name"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", slug).strip("-")
    stem = f"head-{slug}-{record['date'][:10]}"
    path, number = out / f"{stem}.json", 2
    while path.exists():
        path, number = out / f"{stem}-{number}.json", number + 1
    return path


def _save(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _plot(path: Path) -> Path | None:
    try:
        from . import plot
    except ImportError:
        _say("no plot: matplotlib is not installed")
        return None
    return plot.draw(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
