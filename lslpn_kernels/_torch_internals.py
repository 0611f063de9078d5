"""The private parts of PyTorch that direct calls in eager mode rely on.

If a release of PyTorch lacks one of them, only speed is lost: all calls then go through the
registered operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ORDINARY = (Tensor, torch.nn.Parameter)

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack
    from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
    from torch.autograd import forward_ad

    _known = isinstance(forward_ad._current_level, int)
except (ImportError, AttributeError):  # pragma: no cover - no release so far
    _known = False


def in_transform() -> bool:
    """Whether a `torch.func` transform (`vmap`, `grad`, ...) is active."""
    return _known and peek_interpreter_stack() is not None


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode, such as that of fake tensors, sees every operator."""
    return not _known or _len_torch_dispatch_stack() > 0


def is_eager(a: Any, b: Any) -> bool:
    """Whether these are ordinary tensors with storage, outside of any trace, `torch.func` transform
    and dispatch mode."""
    if torch.compiler.is_compiling() or not _known:
        return False
    return (
        type(a) in _ORDINARY
        and type(b) in _ORDINARY
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and not (a.is_nested or b.is_nested)
        and not (a.is_neg() or b.is_neg())
        and not is_legacy_batchedtensor(a)  # of autograd's is_grads_batched
    )


def refuse_tangents(*values: Any) -> None:
    """
    Raises:
        RuntimeError: a tensor carries a forward-mode derivative, which would be lost in a kernel.
    """
    if torch.compiler.is_compiling() or not _known or forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "the kernels of lslpn_kernels have no forward-mode derivative (jvp); "
                'backend="torch" and backend="reference" have one'
            )
