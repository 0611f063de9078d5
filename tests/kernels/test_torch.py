"""The torch backend against the oracle."""

from __future__ import annotations

import pytest
import torch
from cases import SITUATIONS, Case, assert_agree, run, shortest
from strategies import assume, cases, given

from lslpn_kernels import GridSpec, cosine_match, masked_average_pool
from lslpn_kernels._backends import torch_

# In float64. Where neighbouring features nearly cancel, |Up F| is small and its gradient, some
# 1 / |Up F|, large: the absolute part is for the sums of such terms, whose true value may be 0.
RTOL, ATOL = 1e-9, 1e-8


@given(cases())
def test_any_geometry(case: Case) -> None:
    assume(shortest(case) > 0.01)
    assert_agree(run(case, "torch"), run(case, "reference"), RTOL, ATOL)


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    case = SITUATIONS[name]
    assert_agree(run(case, "torch"), run(case, "reference"), RTOL, ATOL)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(kind="positive", D=32)
    low = run(case, "torch", dtype)
    assert low["scores"].dtype == low["prototypes"].dtype == torch.float32
    assert low["grad_query"].dtype == low["grad_support"].dtype == dtype
    expected = run(case, "reference", torch.float64)
    for name, value in expected.items():
        error = (low[name].double() - value).norm() / value.norm()
        assert error < tolerance, name


def test_bands_of_tiles_give_the_result_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(H=40, W=24)
    whole = run(case, "torch")
    monkeypatch.setattr(torch_, "_GROUP", 1)  # one row of tiles at a time
    assert_agree(run(case, "torch"), whole, rtol=1e-12, atol=1e-12)


def test_nothing_of_size_d_h_w_is_held() -> None:
    D, size = 64, 256
    grid = GridSpec()
    features = torch.rand(1, 1, D, 33, 33)
    masks = torch.ones(1, 1, 1, size, size, dtype=torch.bool)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        prototypes = masked_average_pool(features, masks, grid, backend="torch")
        cosine_match(features, prototypes, grid, (size, size), backend="torch")
    assert 0 < largest < D * size * size * 4 / 4
