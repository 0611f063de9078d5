"""Matching with cross-entropy as a differentiable operator: `_autograd` for the loss.

Backends save different tensors for the backward pass (`_backends.LossKernels`), so the operator's
second result is a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backends import LossKernels
from ._operators import (
    Final,
    grid_of,
    kernels_of,
    library,
    may_differentiate,
    only,
    register,
    register_fake,
)
from ._torch_internals import is_eager, refuse_tangents
from .geometry import GridSpec
from .reference import accumulation_dtype


def match_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    grid: GridSpec,
    reduce: str,
    ignore_index: int,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """The mean cross-entropy, by the kernels of `backend`; not under `torch.func` transforms."""
    refuse_tangents(features, prototypes)
    trained = torch.is_grad_enabled()
    wanted = [trained and features.requires_grad, trained and prototypes.requires_grad]
    call: Any = _loss
    if not is_eager(features, prototypes):
        call = torch.ops.lslpn_kernels.cosine_match_loss.default
        wanted = [trained, trained]  # under torch.func, requires_grad does not tell
    elif any(wanted):
        call = _CosineMatchLoss.apply
    settings = (grid.scale, grid.spacing, reduce, ignore_index, logit_scale, backend)
    loss: Tensor = call(features, prototypes, labels, weight, *settings, *wanted)[0]
    return loss


def _kernels(backend: str, device: torch.device) -> LossKernels:
    kernels: Any = kernels_of(backend, device)
    return kernels


@register(
    "cosine_match_loss(Tensor features, Tensor prototypes, Tensor labels, Tensor? weight, "
    "float scale, float spacing, str reduce, int ignore_index, float logit_scale, str backend, "
    "bool wants_features, bool wants_prototypes) -> (Tensor loss, Tensor[] kept)"
)
def _loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    scale: float,
    spacing: float,
    reduce: str,
    ignore_index: int,
    logit_scale: float,
    backend: str,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, list[Tensor]]:
    kernels, grid = _kernels(backend, features.device), grid_of(scale, spacing)
    prototypes, wanted = prototypes.contiguous(), (wants_features, wants_prototypes)
    if features.numel() == 0:
        size = (labels.shape[2], labels.shape[3])
        nothing = prototypes.new_full((), float("nan"))
        return nothing, kernels.loss_kept(features, prototypes, grid, size, reduce, wanted)
    return kernels.cosine_match_loss(
        *(features, prototypes, labels.contiguous(), weight, grid, reduce, wanted),
        ignore_index=ignore_index,
        logit_scale=logit_scale,
    )


@register_fake("cosine_match_loss")
def _(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    scale: float,
    spacing: float,
    reduce: str,
    ignore_index: int,
    logit_scale: float,
    backend: str,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, list[Tensor]]:
    kernels, size = _kernels(backend, features.device), (labels.shape[2], labels.shape[3])
    grid = GridSpec(scale, spacing)
    loss = features.new_empty((), dtype=accumulation_dtype(features.dtype))
    prototypes, wanted = prototypes.contiguous(), (wants_features, wants_prototypes)
    return loss, kernels.loss_kept(features, prototypes, grid, size, reduce, wanted)


def _loss_backward(
    grad: Tensor,
    kept: list[Tensor],
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    logit_scale: float,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if features.numel() == 0:
        return only(wanted, (torch.zeros_like(features), torch.zeros_like(prototypes)))
    grads = _kernels(backend, features.device).cosine_match_loss_backward(
        *(grad, kept, features, prototypes.contiguous(), grid_of(scale, spacing), (H, W)),
        *(reduce, (wanted[0], wanted[1])),
        logit_scale=logit_scale,
    )
    return only(wanted, grads)


@register(
    "cosine_match_loss_backward(Tensor grad, Tensor[] kept, Tensor features, Tensor prototypes, "
    "float scale, float spacing, SymInt H, SymInt W, str reduce, float logit_scale, str backend, "
    "bool[2] wanted) -> (Tensor, Tensor)"
)
def _apart(grad: Tensor, kept: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """Clone results that are arguments, which an operator may not return."""
    first, second = (
        g.clone() if any(g is k for k in kept) else g for g in _loss_backward(grad, kept, *args)
    )
    return first, second


@register_fake("cosine_match_loss_backward")
def _(
    grad: Tensor,
    kept: list[Tensor],
    features: Tensor,
    prototypes: Tensor,
    scale: float,
    spacing: float,
    H: int,
    W: int,
    reduce: str,
    logit_scale: float,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features) if wanted[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if wanted[1] else (0,)),
    )


# ---- torch.func.vmap inside torch.compile: one call after the other ------------------------------


def _register_vmap(name: str) -> None:
    operator = getattr(torch.ops.lslpn_kernels, name).default

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def one(value: Any, dim: Any, i: int) -> Any:
            if isinstance(value, list):
                return [one(v, d, i) for v, d in zip(value, dim, strict=True)]
            return value if dim is None else value.select(dim, i)

        calls = [
            operator(*(one(v, d, i) for v, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        first, second = zip(*calls, strict=True)
        if isinstance(second[0], Tensor):
            return (torch.stack(first), torch.stack(second)), (0, 0)
        kept = [torch.stack(tensors) for tensors in zip(*second, strict=True)]
        return (torch.stack(first), kept), (0, [0] * len(kept))

    torch.library.register_vmap(f"lslpn_kernels::{name}", rule, lib=library)


_register_vmap("cosine_match_loss")
_register_vmap("cosine_match_loss_backward")


# ---- autograd ------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    features, prototypes, labels, _, scale, spacing, reduce, _, logit_scale, backend, *wanted = (
        inputs
    )
    _, kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, prototypes, *kept)
    size = (labels.shape[2], labels.shape[3])
    # Tensors were saved for these gradients, although the backward pass may need fewer.
    ctx.settings = (scale, spacing, *size, reduce, logit_scale, backend, wanted)


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    features, prototypes, *kept = ctx.saved_tensors  # once: checkpointing permits no second access
    call: Any = _loss_backward
    if not is_eager(grad, features):
        call = torch.ops.lslpn_kernels.cosine_match_loss_backward.default
    grads = call(grad, kept, features, prototypes, *ctx.settings)
    if may_differentiate():
        grads = Final.apply("cosine_match_loss", *grads, grad, features, prototypes)
    needed = ctx.needs_input_grad[:2]
    first, second = (g if w else None for g, w in zip(grads, needed, strict=True))
    return first, second, *(None,) * 10


torch.library.register_autograd(
    "lslpn_kernels::cosine_match_loss", _gradients, setup_context=_keep, lib=library
)


class _CosineMatchLoss(torch.autograd.Function):
    """In eager mode saved tensors are not outputs."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, labels: Tensor, *args: Any
    ) -> tuple[Tensor]:
        inputs = (features, prototypes.contiguous(), labels, *args)
        loss, kept = _loss(*inputs)
        _keep(ctx, inputs, (loss, kept))
        return (loss,)

    backward = staticmethod(_gradients)
