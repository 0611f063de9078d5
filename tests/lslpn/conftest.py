"""Fixtures of the tests of `lslpn`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import CHECKOUT, synthetic_scan, write_synthetic_dataset

from lslpn.data.volumes import Volume


def _shared_path(name: str) -> Path:
    path = CHECKOUT.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"the optional folder ../shared/{name} does not lie beside this checkout")
    return path


@pytest.fixture
def shared_path() -> Callable[[str], Path]:
    """shared_path(name): a path in the optional folder beside the checkout, or a skip."""
    return _shared_path


@pytest.fixture
def synthetic_dataset(tmp_path: Path) -> Path:
    """The folder of a small data set: 4 cases syn_00..syn_03 with liver, spleen and kidney."""
    return write_synthetic_dataset(tmp_path / "Dataset001_synthetic")


@pytest.fixture
def support(tmp_path: Path) -> tuple[Volume, Volume]:
    """A synthetic scan and its labels."""
    return synthetic_scan(tmp_path, 0)


@pytest.fixture
def query(tmp_path: Path) -> tuple[Volume, Volume]:
    """Another patient's, shifted, in another orientation."""
    return synthetic_scan(tmp_path, 1, shift=0.04, axes="LPI")
