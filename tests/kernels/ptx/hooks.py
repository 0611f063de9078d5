"""Where the backends of lslpn_kernels are made to launch their kernels in the machine, on tensors
of the CPU. Nothing else in this package depends on them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils.dlpack import to_dlpack

from lslpn_kernels import ops
from lslpn_kernels._backends import _obstacle, load, triton_plans
from lslpn_kernels._backends import cuda as cuda_backend
from lslpn_kernels._backends import triton_ as triton_backend
from lslpn_kernels._operators import kernels_of

from . import machine
from .cuda import Module

KERNELS: dict[str, Any] = {"cuda": cuda_backend, "triton": triton_backend}
_KDLCUDA = 2


def forget() -> None:
    """The cached availability of the backends, and kernels that Triton has compiled."""
    for cached in (load, _obstacle, kernels_of, ops._choose_once, *triton_plans.KEPT):
        cached.cache_clear()


def name_tensor(tensor: Tensor) -> None:
    """Allow kernels to access a tensor's bytes, from its first element to its last."""
    if tensor.numel():
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        machine.name_memory(tensor.data_ptr(), (last + 1) * tensor.element_size())


def _capsule(tensor: Tensor) -> Any:
    """A DLPack capsule that says the tensor is on a GPU."""
    name_tensor(tensor)
    capsule = to_dlpack(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # A DLTensor begins with the address of its data and the type of its device.
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = _KDLCUDA
    return capsule


class _Watched:
    """A module of bindings: kernels of a call may access its arguments only, and errors of a kernel
    are raised."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module.module, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._module.error = None
            try:
                return value(*args, **kwargs)
            except RuntimeError as error:
                raise self._module.error or error from error
            finally:
                machine.forget_memory()

        return call


@contextmanager
def cuda(module: Module) -> Iterator[None]:
    """`backend="cuda"` takes its kernels from a module."""
    watched = _Watched(module)

    def call(name: str, device: object, *arguments: Any) -> Any:
        return getattr(watched, name)(*arguments)

    with (
        patch.object(cuda_backend, "unavailable", lambda device: None),
        patch.object(cuda_backend, "DEVICE_TYPES", ("cpu",)),
        patch.object(cuda_backend, "_call", call),
        patch.object(cuda_backend, "_stream", lambda device: 0),
        patch.object(cuda_backend, "to_dlpack", _capsule),
    ):
        forget()
        try:
            yield
        finally:
            forget()


@contextmanager
def triton(arch: int) -> Iterator[None]:
    """`backend="triton"` compiles for a compute capability, 90 for 9.0."""
    from . import triton_driver

    with (
        patch.object(triton_backend, "unavailable", lambda device: None),
        patch.object(triton_backend, "DEVICE_TYPES", ("cpu",)),
        triton_driver.active(arch, name_tensor),
    ):
        forget()
        try:
            yield
        finally:
            forget()
