"""What the tests of all backends share: golden files, cases drawn by hypothesis, comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lslpn_kernels import GridSpec, cosine_match, masked_average_pool

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))

# Reproducible everywhere; LSLPN_EXAMPLES=1000 looks further.
settings.register_profile(
    "lslpn",
    max_examples=int(os.environ.get("LSLPN_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    print_blob=True,
)
settings.load_profile("lslpn")


@dataclass(frozen=True)
class Case:
    """One episode batch. `kind` says what the features look like."""

    B: int = 1
    K: int = 1
    Q: int = 1
    C: int = 2
    D: int = 5
    h: int = 5
    w: int = 5
    H: int = 21
    W: int = 19
    grid: GridSpec = GridSpec(1 / 3, 1 / 2)
    min_pixels: int = 0
    reduce: str = "max"
    kind: str = "signed"
    channels_last: bool = False
    mask_kind: str = "bool"
    seed: int = 0

    def draw(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support features, masks, query features and the gradient of the scores."""
        generator = torch.Generator().manual_seed(self.seed)

        def features(n: int) -> Tensor:
            values = torch.randn(
                self.B, n, self.D, self.h, self.w, dtype=torch.float64, generator=generator
            )
            if self.kind == "positive":
                values = values.abs()
            elif self.kind == "with_zeros":  # whole locations of zeros: features without a length
                values *= torch.rand(values[:, :, :1].shape, generator=generator) > 0.5
            values = values.to(dtype)
            if self.channels_last:
                values = values.movedim(2, -1).contiguous().movedim(-1, 2)
            return values

        shape = (self.B, self.K, self.C, self.H, self.W)
        if self.mask_kind == "soft":
            masks = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        else:
            # Blobs that leave some windows and some classes empty, one class a pixel.
            owner = torch.randint(0, self.C, (self.B, self.K, 3, 3), generator=generator)
            if self.seed % 3 == 0:
                owner[owner == self.C - 1] = 0
            rows = torch.arange(self.H) * 3 // self.H
            columns = torch.arange(self.W) * 3 // self.W
            owner = owner[:, :, rows][..., columns]
            masks = owner[:, :, None] == torch.arange(self.C)[:, None, None]
            if self.mask_kind == "uint8":
                masks = masks.to(torch.uint8)
        grad = torch.randn(
            self.B, self.Q, self.C, self.H, self.W, dtype=torch.float64, generator=generator
        )
        return features(self.K), masks, features(self.Q), grad


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


# One of each situation that a kernel treats differently, by name.
SITUATIONS = {
    "odd_rectangle": Case(),
    "features_as_large_as_image": Case(h=13, w=11, H=13, W=11),
    "features_larger_than_image": Case(h=9, w=12, H=4, W=5),
    "one_pixel_one_location": Case(h=1, w=1, H=1, W=1, C=1),
    "one_location_under_an_image": Case(h=1, w=1, H=9, W=7),
    "one_window_global_prototype": Case(grid=GridSpec(1.0)),
    "windows_of_one_pixel": Case(H=8, W=8, grid=GridSpec(1 / 8, 1 / 2)),
    "no_overlap": Case(grid=GridSpec(1 / 4, 1.0)),
    "many_windows_over_a_pixel": Case(H=20, W=20, grid=GridSpec(0.9, 0.05)),
    "two_shots_three_queries_two_episodes": Case(B=2, K=2, Q=3, C=3),
    "channels_last": Case(channels_last=True, D=8, C=3),
    "zero_features": Case(kind="with_zeros"),
    "soft_masks": Case(mask_kind="soft"),
    "few_pixels_are_none": Case(min_pixels=10, mask_kind="uint8"),
    "mean_over_windows": Case(reduce="mean", C=3),
    "many_channels_and_classes": Case(D=67, C=6, H=33, W=17),
}


def run(
    case: Case, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """Prototypes, scores and every gradient of a case. Matching starts from prototypes of its
    own, so that an error in the pooling does not hide behind one in the matching."""
    support, masks, query, grad = (t.to(device) for t in case.draw(dtype))
    support, query = (t.detach().requires_grad_() for t in (support, query))
    pooled = masked_average_pool(support, masks, case.grid, case.min_pixels, backend=backend)
    generator = torch.Generator().manual_seed(case.seed + 1)
    weight = torch.randn(pooled.shape, dtype=torch.float64, generator=generator).to(device)
    (pooled * weight.to(pooled.dtype)).sum().backward()

    free = torch.randn(pooled.shape, dtype=torch.float64, generator=generator)
    free[torch.rand(pooled.shape[:4], generator=generator) < 0.2] = 0  # empty windows
    free = free.to(device, pooled.dtype).requires_grad_()
    scores = cosine_match(query, free, case.grid, (case.H, case.W), case.reduce, backend=backend)
    (scores * grad.to(scores.dtype)).sum().backward()
    assert support.grad is not None
    assert query.grad is not None
    assert free.grad is not None
    return {
        "prototypes": pooled.detach(),
        "grad_support": support.grad,
        "scores": scores.detach(),
        "grad_query": query.grad,
        "grad_prototypes": free.grad,
    }


def assert_agree(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float
) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double().cpu(),
            value.double().cpu(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )
