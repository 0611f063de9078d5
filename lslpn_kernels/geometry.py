"""The grid of overlapping windows, and its geometry along one axis of an image.

All geometry that the backends need: which windows cover a pixel, which feature locations a pixel is
interpolated from, and how window edges cut an axis into segments. Rows and columns follow the same
rules, so everything is defined for a single axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from numbers import Real

# So that a scale of 1/5 of 40 pixels is 8 and not 7, whatever the rounding of 0.2 * 40.
_SLACK = 1e-6


@dataclass(frozen=True)
class GridSpec:
    """An overlapping grid of local windows (section 3.2 of the paper).

    Along an axis of n pixels, windows are ``k = floor(scale * n)`` pixels long and
    ``s = floor(spacing * k)`` pixels apart, each at least 1. They start at 0, s, 2s, ... as long as
    they fit; if the last of them does not reach the edge, another one ends there.

    Args:
        scale: the size of a window relative to the image, the paper's alpha; in (0, 1]. At 1 a
            single window covers the image, and its prototype is the global one.
        spacing: the distance between neighbouring windows relative to their size; in (0, 1]. 1/2 is
            the paper's overlap, 1 is no overlap.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument lies outside (0, 1].

    Example:
        >>> GridSpec(scale=1 / 8, spacing=1 / 2).shape(512, 512)
        (15, 15)
        >>> GridSpec(scale=1 / 8).axis(257, 33).starts[-3:]
        (208, 224, 225)
    """

    scale: float = 1 / 8
    spacing: float = 1 / 2
    # Both as text: torch.compile specialises on strings, but may turn floats into symbols.
    written: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("scale", "spacing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"GridSpec: {name} must be a number, got {type(value).__name__}")
            if not 0 < float(value) <= 1:  # false for NaN too
                raise ValueError(f"GridSpec: {name} must lie in (0, 1], got {value}")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "written", f"{self.scale!r} {self.spacing!r}")

    def shape(self, H: int, W: int) -> tuple[int, int]:
        """(Gy, Gx), the number of windows along the height and the width of an image."""
        return self.axis(H).windows, self.axis(W).windows

    def axis(self, pixels: int, cells: int | None = None) -> Axis:
        """The geometry of an axis of `pixels` image pixels and `cells` feature locations."""
        return _axis(self.scale, self.spacing, int(pixels), int(cells or pixels))


@dataclass(frozen=True)
class Axis:
    """One axis of an image under a grid, as returned by `GridSpec.axis`.

    Attributes:
        pixels: the number of image pixels, n (the paper's w or h at image resolution).
        cells: the number of feature locations.
        window: the number of pixels in a window, k.
        step: pixels from one window to the next, s; the last window may be closer.
        windows: the number of windows.
    """

    pixels: int
    cells: int
    window: int
    step: int
    windows: int

    def start(self, m: int) -> int:
        """The first pixel of window m."""
        return min(m * self.step, self.pixels - self.window)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(self.start(m) for m in range(self.windows))

    def covering(self, pixel: int) -> tuple[int, int]:
        """The first and the last window over a pixel; all windows between them cover it too."""
        first = min(max((pixel - self.window) // self.step + 1, 0), self.windows - 1)
        at_edge = pixel >= self.pixels - self.window
        return first, self.windows - 1 if at_edge else pixel // self.step

    @property
    def overlap(self) -> int:
        """The largest number of windows that cover one pixel."""
        return max(s.last - s.first + 1 for s in self.segments)

    def taps(self, pixel: int) -> tuple[int, float]:
        """The lower of the two feature locations that a pixel is interpolated from, and the weight
        of the upper one, `lower + 1`; as in `torch.nn.functional.interpolate` with
        ``mode="bilinear", align_corners=False``.

        At the far border the weight is 0, rather than the index clamped, so that inner products of
        neighbouring locations yield the norm of the interpolated feature.
        """
        position = max((pixel + 0.5) * self.cells / self.pixels - 0.5, 0.0)
        lower = int(position)
        if lower >= self.cells - 1:
            return self.cells - 1, 0.0
        return lower, position - lower

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The axis cut at every start and end of a window: all pixels of a segment are in the same
        windows."""
        return _segments(self)


@dataclass(frozen=True)
class Segment:
    """Pixels ``begin <= x < end`` of an axis, all in windows ``first .. last`` and interpolated
    from feature locations ``lower .. upper`` (inclusive)."""

    begin: int
    end: int
    first: int
    last: int
    lower: int
    upper: int


@lru_cache(maxsize=1024)
def _axis(scale: float, spacing: float, pixels: int, cells: int) -> Axis:
    if pixels < 1 or cells < 1:
        raise ValueError(f"an axis needs at least 1 pixel and 1 cell, got {pixels} and {cells}")
    window = min(max(1, math.floor(scale * pixels + _SLACK)), pixels)
    step = max(1, math.floor(spacing * window + _SLACK))
    windows = -((window - pixels) // step) + 1
    return Axis(pixels, cells, window, step, windows)


@lru_cache(maxsize=1024)
def _segments(axis: Axis) -> tuple[Segment, ...]:
    cuts = sorted({0, axis.pixels, *axis.starts, *(s + axis.window for s in axis.starts)})
    segments = []
    for begin, end in pairwise(cuts):
        first, last = axis.covering(begin)
        lower, _ = axis.taps(begin)
        upper, weight = axis.taps(end - 1)
        segments.append(Segment(begin, end, first, last, lower, upper + (weight > 0)))
    return tuple(segments)
