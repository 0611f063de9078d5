"""Helpers for the differentiable operators in `_autograd` and `_loss`.

Geometry is passed as plain numbers, so that graphs can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._backends import Kernels, load
from .geometry import GridSpec

library = torch.library.Library("lslpn_kernels", "DEF")
grid_of = lru_cache(maxsize=64)(GridSpec)


@lru_cache(maxsize=64)
def kernels_of(backend: str, device: torch.device) -> Kernels:
    module, reason = load(backend, device)
    if module is None:
        raise RuntimeError(f'backend="{backend}" {reason}')
    return module


def register(schema: str) -> Any:
    """Define an operator; the decorated function implements it on every device."""

    def register(function: Any) -> Any:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


def register_fake(name: str) -> Any:
    return torch.library.register_fake(f"lslpn_kernels::{name}", lib=library)


def register_vmap(name: str) -> None:
    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        n = info.batch_size

        def merge(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            moved = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
            return moved.flatten(0, 1)

        def split(value: Tensor) -> Tensor:
            # Tensors saved for the backward pass may be [0]. Without a length, -1 is not unique.
            if value.dim() == 1:
                return value.new_empty(n, 0)
            return value.unflatten(0, (n, value.shape[0] // n))

        out = getattr(torch.ops.lslpn_kernels, name).default(*map(merge, args, in_dims))
        if isinstance(out, Tensor):
            return split(out), 0
        return tuple(map(split, out)), (0,) * len(out)

    torch.library.register_vmap(f"lslpn_kernels::{name}", rule, lib=library)


def only(wanted: Sequence[bool], grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted, empty tensors in place of the others."""
    first, second = (g if w else g.new_empty(0) for g, w in zip(grads, wanted, strict=True))
    return first, second


def may_differentiate() -> bool:
    """Whether differentiable gradients are requested."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


class Final(torch.autograd.Function):
    """The identity on gradients, without a derivative of its own, so that second derivatives are an
    error rather than silently zero. `sources` are the tensors that the gradients depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str, first: Tensor, second: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return first.view_as(first), None if second is None else second.view_as(second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"lslpn_kernels.{ctx.name} has no second derivative; "
            'backend="torch" and backend="reference" have one'
        )
