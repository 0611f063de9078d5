"""Cases drawn by hypothesis, and what tests need of it. Without it, their files are skipped.

Apart from `cases`, which needs PyTorch alone.
"""

from __future__ import annotations

import os

import pytest
from cases import Case

from lslpn_kernels import GridSpec

pytest.importorskip("hypothesis", reason="hypothesis, which draws cases, is not installed")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

__all__ = ["HealthCheck", "assume", "cases", "given", "grids", "settings", "st"]

# Reproducible everywhere; LSLPN_EXAMPLES=1000 looks further.
settings.register_profile(
    "lslpn",
    max_examples=int(os.environ.get("LSLPN_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    print_blob=True,
)
settings.load_profile("lslpn")


def grids() -> st.SearchStrategy[GridSpec]:
    fraction = st.sampled_from([1 / 16, 1 / 8, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 0.77, 1.0])
    return st.builds(GridSpec, scale=fraction, spacing=st.sampled_from([0.1, 1 / 3, 0.5, 0.8, 1.0]))


def cases() -> st.SearchStrategy[Case]:
    """Odd shapes: rectangular, one pixel, features as large as the image or larger than it."""
    few = st.integers(1, 3)
    cells = st.integers(1, 9)
    pixels = st.integers(1, 24)
    return st.builds(
        Case,
        B=st.integers(1, 2),
        K=few,
        Q=few,
        C=few,
        D=st.sampled_from([1, 3, 8, 17]),
        h=cells,
        w=cells,
        H=pixels,
        W=pixels,
        grid=grids(),
        min_pixels=st.sampled_from([0, 1, 10]),
        reduce=st.sampled_from(["max", "max", "mean"]),
        kind=st.sampled_from(["signed", "positive", "with_zeros"]),
        channels_last=st.booleans(),
        mask_kind=st.sampled_from(["bool", "uint8", "soft"]),
        seed=st.integers(0, 1000),
    )
