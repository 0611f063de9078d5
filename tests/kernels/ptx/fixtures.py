"""`backend="cuda"` on a machine without a GPU, for any test that asks for `kernels`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import cuda, hooks


@pytest.fixture(scope="session")
def module() -> cuda.Module:
    """The CUDA kernels as nvcc compiles them."""
    if reason := cuda.obstacle():
        pytest.skip(reason)
    return cuda.load()


@pytest.fixture
def kernels(module: cuda.Module) -> Iterator[cuda.Module]:
    """Makes `backend="cuda"` launch what was compiled for 9.0 in the machine, on tensors of the
    CPU."""
    module.take(90)
    with hooks.cuda(module):
        yield module
