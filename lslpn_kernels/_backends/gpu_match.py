"""Cosine matching of both GPU backends around their kernels: what is allocated, what is kept of a
loss, and what is computed where the kernels do not take a call.

Of a loss they keep, for a pixel with label y, logits z_c, probabilities p_c and weight w (0 where
it is ignored):

    total    []                 sum of the weights, by which the sum of the losses is divided
    slopes   [B, Q, C-1, H, W]  g_c = w (p_c - [c = y]) of the classes 1 .. C-1; all add up to 0
    radial   [B, Q, H, W]       sum_c g_c z_c
    winners, gram               as `cosine_match` keeps them

They are gradients of the sum of the losses, so that one pass can write them: total is not known
before its end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry import GridSpec
from . import through_torch, torch_, winner_dtype

GRAM_MAPS = 4


def kept(
    features: Tensor, prototypes: Tensor, grid: GridSpec, size: tuple[int, int], reduce: str
) -> list[Tensor]:
    """As empty tensors."""
    (B, Q, _, h, w), C, image = features.shape, prototypes.shape[1], tuple(size)
    winners = (B, Q, C, *image) if reduce == "max" else (0,)
    return [
        prototypes.new_empty(()),
        prototypes.new_empty((B, Q, C - 1, *image)),
        prototypes.new_empty((B, Q, *image)),
        prototypes.new_empty(winners, dtype=winner_dtype(grid)),
        prototypes.new_empty((B, Q, GRAM_MAPS, h, w)),
    ]


def loss_kept(
    features: Tensor,
    prototypes: Tensor,
    grid: GridSpec,
    size: tuple[int, int],
    reduce: str,
    wanted: tuple[bool, bool],
) -> list[Tensor]:
    """See `LossKernels`."""
    return kept(features, prototypes, grid, size, reduce) if any(wanted) else []


class Matching:
    """The functions of `Kernels` and `LossKernels` for matching, by a backend's ``match(features,
    prototypes, out, winners, gram, grid, size, reduce, logit_scale, radial, labels, grads)``.

    Forward, `grads` is None and all from `out` to `gram` are written: scores or, where `labels` is
    (labels, weight, ignore_index), slopes, with radial, and a list is returned that begins with the
    sums for `finish`. Backward, `labels` is None and `grads` (of the scores or the loss, None or
    total, of features, of prototypes), of which the last two are written. None is returned where
    the kernels do not take the call.

    `scratch`: whether the forward pass writes Gram maps even if nothing is kept of it.
    """

    def __init__(self, match: Callable[..., list[Tensor] | None], scratch: bool) -> None:
        self.match = match
        self.scratch = scratch

    def cosine_match(
        self,
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        winners: bool,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (B, Q, _, h, w), C = features.shape, prototypes.shape[1]
        shape, choice = (B, Q, C, *size), (grid, size, reduce)
        scores = prototypes.new_empty(shape)
        places = prototypes.new_empty(
            shape if winners and reduce == "max" else (0,), dtype=winner_dtype(grid)
        )
        maps = (B, Q, GRAM_MAPS, h, w) if winners or self.scratch else (0,)
        gram = prototypes.new_empty(maps)
        if self.match(features, prototypes, scores, places, gram, *choice, logit_scale) is None:
            scores = logit_scale * torch_.cosine_match(features, prototypes, *choice)
            places.zero_(), gram.zero_()
        return scores, places, gram if winners else gram.new_empty(0)

    def cosine_match_backward(
        self,
        grad: Tensor,
        features: Tensor,
        prototypes: Tensor,
        scores: Tensor,
        winners: Tensor,
        grid: GridSpec,
        reduce: str,
        *gram: Tensor,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(features), torch.empty_like(prototypes)
        taken = self.match(
            *(features, prototypes, scores, winners, gram[0], grid, scores.shape[3:], reduce),
            *(logit_scale, None, None, (grad, None, *grads)),
        )
        if taken is None:
            grads = through_torch.cosine_match_backward(
                grad, features, prototypes, grid, reduce, logit_scale
            )
        return grads

    def cosine_match_loss(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        grid: GridSpec,
        reduce: str,
        wanted: tuple[bool, bool],
        *,
        ignore_index: int,
        logit_scale: float,
    ) -> tuple[Tensor, list[Tensor]]:
        C, size = prototypes.shape[1], (labels.shape[2], labels.shape[3])
        tensors = kept(features, prototypes, grid, size, reduce)
        _, slopes, radial, *maps = tensors
        given, choice = (labels, weight, ignore_index), (grid, size, reduce)
        sums = None
        if C > 1:  # else there are no slopes
            sums = self.match(
                *(features, prototypes, slopes, *maps, *choice, logit_scale, radial, given, None)
            )
        if sums is not None:
            loss = finish(sums[0], tensors)
        else:
            logits = logit_scale * torch_.cosine_match(features, prototypes, *choice)
            loss = of_logits(logits, *given, tensors)
        return loss, tensors if any(wanted) else []

    def cosine_match_loss_backward(
        self,
        grad: Tensor,
        kept: list[Tensor],
        features: Tensor,
        prototypes: Tensor,
        grid: GridSpec,
        size: tuple[int, int],
        reduce: str,
        wanted: tuple[bool, bool],
        *,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor]:
        total, slopes, radial, *maps = kept
        grads = torch.empty_like(features), torch.empty_like(prototypes)
        taken = None
        if slopes.numel():
            taken = self.match(
                *(features, prototypes, slopes, *maps, grid, size, reduce, logit_scale, radial),
                *(None, (grad, total, *grads)),
            )
        if taken is None:
            grads = through_torch.cosine_match_backward(
                of_scores(grad, kept), features, prototypes, grid, reduce, logit_scale
            )
        return grads


def finish(partial: Tensor, kept: list[Tensor]) -> Tensor:
    """The loss, from sums of w l and of w over parts of the pixels, [..., 2], or their bytes."""
    loss, total = partial.view(kept[0].dtype).reshape(-1, 2).sum(0, dtype=torch.float64)
    kept[0].copy_(total)
    return (loss / total).to(kept[0].dtype)


def of_logits(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, kept: list[Tensor]
) -> Tensor:
    """The loss of logits [B, Q, C, H, W]; total, slopes and radial are written to what is kept."""
    C, nan = logits.shape[2], float("nan")
    counts = labels != ignore_index
    known = (labels >= 0) & (labels < C)
    right = labels.where(known, 0).to(torch.int64)
    w = logits.new_ones(()) if weight is None else weight[right]
    w = torch.where(counts, torch.where(known, w, nan), 0)
    right = right.unsqueeze(2)
    log_p = logits.log_softmax(2)
    loss = -w * log_p.gather(2, right).squeeze(2)
    g = w.unsqueeze(2) * (log_p.exp() - torch.zeros_like(logits).scatter_(2, right, 1))
    kept[1].copy_(g[:, :, 1:])
    kept[2].copy_((g * logits).sum(2))
    return finish(torch.stack((loss.where(counts, 0), w), -1), kept)


def of_scores(grad: Tensor, kept: list[Tensor]) -> Tensor:
    """The gradient of the logits [B, Q, C, H, W], of the incoming one of the loss."""
    total, slopes = kept[:2]
    g = torch.cat((-slopes.sum(2, keepdim=True), slopes), 2)
    return g * torch.where(total == 0, 0, grad / total)
