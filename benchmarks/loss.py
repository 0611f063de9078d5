"""Compare `LocalPrototypeHead.loss`, in one pass, with the head followed by `F.cross_entropy`.

    python -m benchmarks.loss [--device cuda] [--backend cpu] [--size paper] [--rounds 40]

Both run forward and backward and take turns in one process, so other work on the machine affects
both: compare the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lslpn_kernels import LocalPrototypeHead

from .formulations import KERNELS, LOGIT_SCALE
from .sizes import SIZES, draw
from .timing import sample


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", "torch", *KERNELS), default="auto")
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    inputs = draw(size, options.device)
    head = LocalPrototypeHead(size.grid, LOGIT_SCALE, backend=options.backend)
    episode = inputs.support, inputs.foreground, inputs.query
    # Every query image has the labels of the first support image.
    owner = torch.arange(1, size.C, device=options.device)[:, None, None]
    labels = (inputs.foreground[:, :1] * owner).amax(2).expand(-1, size.Q, -1, -1).contiguous()

    def in_two() -> Tensor:
        logits = head(*episode)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), ignore_index=255)

    def in_one() -> Tensor:
        return head.loss(*episode, labels)

    calls = {"head and F.cross_entropy": in_two, "head.loss": in_one}
    gradients = {}

    def both(name: str) -> None:
        gradients[name] = torch.autograd.grad(calls[name](), (inputs.support, inputs.query))

    for name in calls:
        both(name)
    for a, b in zip(*gradients.values(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm(), "the gradients differ"
    steps = [partial(both, name) for name in calls]
    taken = sample(options.device, steps, options.rounds, lambda: None)
    medians = [statistics.median(times) for times in zip(*taken, strict=True)]
    print(f"{size.key}: {size.describe()}, {torch.get_num_threads()} threads")
    for name, median in zip(calls, medians, strict=True):
        print(f"{name:>26}  {median:8.3f} ms")
    print(f"{medians[0] / medians[1]:.2f} times as fast")


if __name__ == "__main__":
    main()
