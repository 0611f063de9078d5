"""One launch of a Triton kernel, made ready for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor


class Launch:
    """A kernel with its grid and all its arguments but the first, for one set of shapes: these are
    the tensors, and numbers that change from call to call.

    The first call goes through Triton, which specialises the kernel on its arguments and compiles
    it; later ones go straight to the compiled kernel, in a third of the time.
    """

    def __init__(
        self,
        kernel: str,
        programs: int,
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        warps: int = 4,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = tuple(numbers)
        self.constants = constants
        self.tail = (*numbers, *constants.values())
        # Left to itself, ptxas now and then takes fewer registers than there are, and spills.
        self.options = {"num_warps": warps, "num_stages": 1, "maxnreg": 255 if warps <= 4 else 128}
        self.compiled: Any = None

    def __call__(self, *first: Tensor | float | None) -> None:
        if self.compiled is not None:
            self.compiled[self.grid](*first, *self.tail)
            return
        from . import triton_kernels

        kernel = attrgetter(self.kernel)(triton_kernels)
        self.compiled = kernel[self.grid](*first, *self.numbers, **self.constants, **self.options)
