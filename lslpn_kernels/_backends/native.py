"""The compiled module, and why it or a part of it is missing. Importing this never fails."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType

_REASONS = Path(__file__).resolve().parents[1] / "_build.json"


@cache
def module() -> tuple[ModuleType | None, str]:
    """lslpn_kernels._native, or None and one line on why it cannot be loaded."""
    try:
        return importlib.import_module("lslpn_kernels._native"), ""
    except ImportError as error:
        return None, built_without("cpu") or f"the compiled module cannot be loaded: {error}"


def built_without(backend: str) -> str:
    """Why the build left a backend out; empty where it did not."""
    try:
        reason = json.loads(_REASONS.read_text())[backend]
    except (OSError, ValueError, KeyError):
        return "the package was not built: run `pip install .` or `pip install -e .`"
    return f"{backend} kernels were not built: {reason}" if reason else ""
