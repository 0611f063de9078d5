"""The oracle against the authors' own numbers, against finite differences, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import GOLDEN

from lslpn_kernels import (
    GridSpec,
    LocalPrototypeHead,
    cosine_match,
    masked_average_pool,
)
from lslpn_kernels import backends as backend_status

np = pytest.importorskip("numpy", reason="numpy is not installed")

BACKENDS = [
    name
    for name, status in backend_status().items()
    if status.usable and {"cpu", "any device"} & {*status.devices}
]


def relative(actual: torch.Tensor, expected: np.ndarray) -> float:
    wanted = torch.from_numpy(expected).double()
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_logits_and_gradients(backend: str, dtype: torch.dtype, path: Path) -> None:
    golden = np.load(path)
    support = torch.from_numpy(golden["support_features"]).to(dtype)[None].requires_grad_()
    query = torch.from_numpy(golden["query_features"]).to(dtype)[None].requires_grad_()
    foreground = torch.from_numpy(golden["foreground"])[None]
    grid = GridSpec(1 / int(golden["n_grid"]), 0.5 if golden["overlap"] else 1)
    head = LocalPrototypeHead(
        grid, float(golden["scale"]), int(golden["min_pixels"]), backend=backend
    )
    logits = head(support, foreground, query)
    label = torch.from_numpy(golden["query_label"]).long()
    loss = F.cross_entropy(logits[0], label.expand(logits.shape[1], -1, -1))
    loss.backward()
    assert relative(logits[0].detach(), golden["logits"]) < 1e-5
    assert abs(loss.item() - golden["loss"]) < 1e-5 * abs(golden["loss"])
    assert relative(support.grad[0], golden["grad_support"]) < 1e-4
    assert relative(query.grad[0], golden["grad_query"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradcheck_of_the_whole_head(backend: str, reduce: str) -> None:
    torch.manual_seed(0)
    support = torch.randn(1, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 2, 1, 5, 6) > 0.5
    head = LocalPrototypeHead(GridSpec(1 / 2, 1 / 2), reduce=reduce, backend=backend)
    assert torch.autograd.gradcheck(lambda s, q: head(s, masks, q), (support, query))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_two_pixels_by_hand(backend: str) -> None:
    grid = GridSpec(1 / 2, 1.0)  # two windows of one pixel
    features = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 1, 2, 1, 2)
    masks = torch.tensor([1, 0]).to(torch.uint8).reshape(1, 1, 1, 1, 2)
    pooled = masked_average_pool(features, masks, grid, backend=backend)
    assert pooled.flatten().tolist() == [3, 4, 0, 0]  # the second window is empty
    query = torch.tensor([[4.0, 1.0], [3.0, 1.0]]).reshape(1, 1, 2, 1, 2)
    scores = cosine_match(query, pooled, grid, (1, 2), backend=backend)
    torch.testing.assert_close(scores.flatten(), torch.tensor([24 / 25, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_features_score_zero_and_get_no_gradient(backend: str) -> None:
    grid = GridSpec(1 / 2)
    query = torch.zeros(1, 1, 3, 2, 2, requires_grad=True)
    prototypes = torch.randn(1, 2, *grid.shape(6, 6), 3, requires_grad=True)
    scores = cosine_match(query, prototypes, grid, (6, 6), backend=backend)
    scores.sum().backward()
    assert not scores.any()
    assert not query.grad.any()
    assert not prototypes.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_windows_the_first_gets_the_gradient(backend: str) -> None:
    grid = GridSpec(1 / 2, 1 / 2)
    query = torch.ones(1, 1, 3, 2, 2)
    prototypes = torch.eye(3)[0].expand(1, 1, *grid.shape(8, 8), 3).clone().requires_grad_()
    cosine_match(query, prototypes, grid, (8, 8), backend=backend).sum().backward()
    # Window (2, 2) starts at (4, 4); windows before it hold all but its last 2 x 2 pixels.
    pixels = prototypes.grad[0, 0].abs().sum(-1)
    assert pixels[2, 2] < pixels[0, 0]
    torch.testing.assert_close(pixels[0, 0] / pixels[2, 2], torch.tensor(16 / 4.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_features_give_nan_where_they_are(backend: str) -> None:
    query = torch.ones(1, 1, 3, 4, 4)
    query[..., 0, 0] = float("nan")
    prototypes = torch.ones(1, 1, *GridSpec(1 / 4).shape(16, 16), 3)
    scores = cosine_match(query, prototypes, GridSpec(1 / 4), (16, 16), backend=backend)
    assert scores[..., 0, 0].isnan().all()
    torch.testing.assert_close(scores[..., -1, -1], torch.ones(1, 1, 1))
