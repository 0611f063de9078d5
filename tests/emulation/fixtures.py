"""`backend="cuda"` on a machine without a GPU, for any test that asks for `kernels`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from lslpn_kernels import ops
from lslpn_kernels._backends import _obstacle, cuda, load
from lslpn_kernels._operators import kernels_of

from . import build


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The bindings over the emulated kernels, as a module."""
    if build.compiler() is None:
        pytest.skip("the emulated kernels need a C++ compiler (g++, or CXX)")
    spec = importlib.util.spec_from_file_location("emulated_kernels", build.build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget() -> None:
    """What was found out about backends, once for all."""
    for cached in (load, _obstacle, kernels_of, ops._choose_once):
        cached.cache_clear()


@pytest.fixture
def kernels(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes `backend="cuda"` run the emulated kernels, on tensors of the CPU."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(
        cuda, "_call", lambda name, device, *arguments: getattr(emulated, name)(*arguments)
    )
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    forget()
    yield emulated
    forget()
