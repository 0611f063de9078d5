"""What a caller has set in torch changes no result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lslpn
from lslpn.data.volumes import Volume
from lslpn.models import FewShotNetwork
from lslpn.segmentation.result import Align

Pair = tuple[Volume, Volume]


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Caller = Callable[[], contextlib.AbstractContextManager[None]]
CALLERS: dict[str, Caller] = {
    "default device": lambda: torch.device("meta"),  # takes the place of "cuda"
    "default dtype": default_float64,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for caller in CALLERS.values():
            stack.enter_context(caller())
        yield


@pytest.fixture(params=CALLERS)
def caller(request: pytest.FixtureRequest) -> Caller:
    return CALLERS[request.param]


def weights(model: FewShotNetwork) -> dict[str, Tensor]:
    assert not any(p.is_inference() for p in model.parameters())
    return {**model.state_dict(), **dict(model.named_buffers())}


def same(a: FewShotNetwork, b: FewShotNetwork) -> bool:
    pairs = zip(weights(a).values(), weights(b).values(), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_networks(caller: Caller) -> None:
    for make in (lslpn.pretrained, lslpn.untrained):
        expected = make()
        with caller():
            found = make()
        assert same(found, expected)


def segmented(align: Align, support: Pair, query: Pair, caller: Caller) -> np.ndarray:
    model = lslpn.pretrained()
    model.config = dataclasses.replace(model.config, size=48)
    with caller():
        return lslpn.segment(model, [support], query[0], align=align)


def test_segment_slice_by_slice(caller: Caller, support: Pair, query: Pair) -> None:
    expected = segmented("none", support, query, contextlib.nullcontext)
    assert expected.any()
    assert np.array_equal(segmented("none", support, query, caller), expected)


def test_segment_with_registration(support: Pair, query: Pair) -> None:
    expected = segmented("deformable", support, query, contextlib.nullcontext)
    assert expected.any()
    assert np.array_equal(segmented("deformable", support, query, all_at_once), expected)


def test_train_and_evaluate(caller: Caller, synthetic_dataset: Path, tmp_path: Path) -> None:
    data = lslpn.Dataset.open(synthetic_dataset)
    config = lslpn.preset("published", size=48, channels=32, batch=1, steps=2)

    def run(name: str) -> tuple[FewShotNetwork, float]:
        model = lslpn.train(
            config,
            data,
            hold_out=["liver"],
            cases=["syn_00", "syn_01"],
            out=tmp_path / name,
            progress=False,
        )
        scored = lslpn.evaluate(
            model, data, support="syn_00", queries=["syn_02"], organs=["liver"], progress=False
        )
        return model, scored.mean()

    expected, dice = run("plain")
    with caller():
        found, again = run("called")
    assert same(found, expected)
    assert again == dice
