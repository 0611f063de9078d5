"""What the tests of all backends share: golden files, one case of each situation, comparison.

It imports PyTorch only, for machines that have nothing else than that and pytest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lslpn_kernels import GridSpec, cosine_match, masked_average_pool
from lslpn_kernels.reference import upsample

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@dataclass(frozen=True)
class Case:
    """One episode batch. `kind` says what the features look like, `strided` that they are a part
    of a larger tensor, whose other numbers are NaN and which starts at an odd address."""

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
    strided: bool = False
    mask_kind: str = "bool"
    seed: int = 0

    def draw(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support features, masks, query features and the gradient of the scores, the first three
        rounded to `rounded` (default: `dtype`)."""
        rounded = rounded or dtype
        generator = torch.Generator().manual_seed(self.seed)

        def features(n: int) -> Tensor:
            values = torch.randn(
                self.B, n, self.D, self.h, self.w, dtype=torch.float64, generator=generator
            )
            if self.kind == "positive":
                values = values.abs()
            elif self.kind == "with_zeros":  # whole locations of zeros: features of length 0
                values *= torch.rand(values[:, :, :1].shape, generator=generator) > 0.5
            values = values.to(rounded).to(dtype)
            if self.channels_last:
                values = values.movedim(2, -1).contiguous().movedim(-1, 2)
            return _within(values) if self.strided else values

        shape = (self.B, self.K, self.C, self.H, self.W)
        if self.mask_kind == "soft":
            masks = torch.rand(shape, generator=generator, dtype=torch.float64)
            masks = masks.to(rounded).to(dtype)
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


def _within(values: Tensor) -> Tensor:
    """The same numbers as a part of a larger tensor of the same order of strides."""
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    turned = values.permute(order)
    whole = values.new_full([n + 3 for n in turned.shape], torch.nan)
    part = whole[tuple(slice(1, n + 1) for n in turned.shape)].copy_(turned)
    return part.permute([order.index(axis) for axis in range(values.ndim)])


def shortest(case: Case) -> float:
    """The least length of an interpolated query feature, of those that have any. Near 0 all the
    gradients of the cosine are unbounded, and with them the rounding errors of any formula."""
    length = upsample(case.draw()[2], (case.H, case.W)).norm(dim=2)
    return min(length[length > 1e-6].tolist(), default=1.0)


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
    "part_of_a_larger_tensor": Case(strided=True, D=6, K=2),
    "zero_features": Case(kind="with_zeros"),
    "soft_masks": Case(mask_kind="soft"),
    "few_pixels_are_none": Case(min_pixels=10, mask_kind="uint8"),
    "mean_over_windows": Case(reduce="mean", C=3),
    "many_channels_and_classes": Case(D=67, C=6, H=33, W=17),
}


def _to(values: Tensor, device: str) -> Tensor:
    """On the device, with the strides and the odd address that it had."""
    if values.device.type == torch.device(device).type:
        return values
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    memory = values.as_strided((extent + values.storage_offset(),), (1,), 0).to(device)
    return memory.as_strided(values.shape, values.stride(), values.storage_offset())


def run(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Prototypes, scores and every gradient of a case, see `Case.draw`. Matching starts from
    separate prototypes, so that an error of the pooling and one of the matching are told apart."""
    support, masks, query, grad = (_to(t, device) for t in case.draw(dtype, rounded))
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


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Whether each result lies within `tolerance` of the expected one, as the length of the
    difference relative to that of the expected (plus what rounding to a half type adds), and
    whether it is finite."""
    for name, value in expected.items():
        got = actual[name].double().cpu()
        assert got.shape == value.shape, name
        assert got.isfinite().all(), f"{name}: not finite"
        # A half type rounds by at most half of its eps; the root mean square is less than that.
        allowed = tolerance + (
            torch.finfo(actual[name].dtype).eps / 2 if actual[name].element_size() == 2 else 0
        )
        error = float((got - value.double().cpu()).norm())
        length = float(value.double().norm())
        assert error <= allowed * length + 1e-30, f"{name}: {error / max(length, 1e-30):.2e}"


# The tensors that may hold a NaN or an infinity.
SPOILT = ("support", "query", "prototypes", "grad_prototypes", "grad_scores")


# Feature locations and pixels, height and width of each.
INTERPOLATED = ((9, 11), (64, 60))
ALIKE = {  # locations on pixels, along both axes or one
    "as_large_as_image": ((16, 12), (16, 12)),
    "as_high_as_image": ((16, 11), (16, 60)),
    "as_wide_as_image": ((9, 12), (64, 12)),
}


class NotFinite:
    """Pooling and matching of windows that overlap, with a number that is not finite."""

    GRID = GridSpec(1 / 4)

    def __init__(
        self,
        where: str,
        dtype: torch.dtype,
        reduce: str,
        sizes: tuple[tuple[int, int], tuple[int, int]] = INTERPOLATED,
    ) -> None:
        """`where`: one of SPOILT."""
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        features, self.size = sizes
        prototypes = (1, 2, *self.GRID.shape(*self.size), 16)
        self.where, self.reduce = where, reduce
        self.inputs = {
            "support": numbers(1, 1, 16, *features).to(dtype),
            "query": numbers(1, 1, 16, *features).to(dtype),
            "prototypes": numbers(*prototypes),
            "grad_prototypes": numbers(*prototypes),
            "grad_scores": numbers(1, 1, 2, *self.size),
        }
        self.masks = torch.rand(1, 1, 2, *self.size, generator=generator) < 0.5

    def spoil(self, value: float) -> None:
        """In the middle; of prototypes that is in one class, of features in one channel."""
        spoilt = self.inputs[self.where]
        spoilt[tuple(n // 2 for n in spoilt.shape)] = value

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """As `run`, in float64; computed in `dtype`, if it is given."""
        given = {n: t.detach().to(dtype or t.dtype, copy=True) for n, t in self.inputs.items()}
        leaves = [given[name].requires_grad_() for name in SPOILT[:3]]
        pooled = masked_average_pool(given["support"], self.masks, self.GRID, 0, backend=backend)
        scores = cosine_match(*leaves[1:], self.GRID, self.size, self.reduce, backend=backend)
        outputs = [pooled, scores]
        grads = torch.autograd.grad(outputs, leaves, [given[name] for name in SPOILT[3:]])
        names = ("prototypes", "scores", "grad_support", "grad_query", "grad_prototypes")
        results = zip(names, (*outputs, *grads), strict=True)
        return {name: t.detach().double() for name, t in results}
