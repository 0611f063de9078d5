"""Versions, devices and backends: the facts for a bug report."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lslpn_kernels import backends


def versions() -> dict[str, str]:
    """The versions of the software that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("lslpn", "numpy", "nibabel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit that this package runs from, followed by "-dirty" if tracked files have been
    changed; None if the package is installed or git cannot tell."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        # An environment inside somebody's checkout is not part of it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def collect() -> dict[str, Any]:
    """Versions, processor, GPUs and backends, ready for JSON."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": _cores(), "threads": torch.get_num_threads()},
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "backends": {
            name: {"usable": s.usable, "devices": list(s.devices), "reason": s.reason}
            for name, s in backends().items()
        },
    }


def report(facts: dict[str, Any]) -> str:
    """The facts of `collect` as readable text."""
    cpu = facts["cpu"]
    gpus = [
        f"{g['name']}, {g['memory_gib']:.0f} GiB, compute capability {g['capability']}"
        for g in facts["gpus"]
    ]
    why = "torch finds no usable GPU" if facts["cuda"] else "this torch is built without CUDA"
    gpus = gpus or [f"none: {why}"]
    lines = [*facts["versions"].items(), ("platform", facts["platform"])]
    lines.append(("processor", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']}"))
    if facts["cuda"] is not None:
        lines.append(("cuda", facts["cuda"]))
    lines += [("gpu", gpu) for gpu in gpus]
    text = _columns(lines)
    states = [
        (name, f"usable on {', '.join(s['devices'])}" if s["usable"] else f"no: {s['reason']}")
        for name, s in facts["backends"].items()
    ]
    return f"{text}\n\nbackends of the head\n{_columns(states, indent='  ')}"


def _columns(lines: list[tuple[str, str]], indent: str = "") -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in lines)


def _cores() -> int:
    # A container or a job may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "memory_gib": device.total_memory / 2**30,
            "capability": f"{device.major}.{device.minor}",
        }
        for device in devices
    ]
