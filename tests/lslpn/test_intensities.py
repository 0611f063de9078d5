"""The interpretation of grey values: CT or not, its offset, and the threshold of air."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from synthetic import synthetic_ct

from lslpn.assets import demo_image
from lslpn.config import ModelConfig
from lslpn.data.intensities import Intensities, interpret
from lslpn.data.slices import body_boxes, prepare, shared_window
from lslpn.data.volumes import Volume, read_image

Change = Callable[[np.ndarray], np.ndarray]


def _around_circle(data: np.ndarray, value: float) -> np.ndarray:
    """Pad what is outside the circle in each slice."""
    _, height, width = data.shape
    y, x = (np.arange(n) / (n - 1) * 2 - 1 for n in (height, width))
    return np.where(y[:, None] ** 2 + x[None, :] ** 2 > 1, value, data)


def _one_voxel(data: np.ndarray, value: float) -> np.ndarray:
    data = data.copy()
    data[len(data) // 2, 30, 30] = value
    return data


# Name, change of the scan, offset, threshold of air in HU.
CT: dict[str, tuple[Change, float, float]] = {
    "as scanned": (lambda d: d, 0, -300),
    "limited to -950..": (lambda d: d.clip(-950), 0, -300),
    "limited to -300..400": (lambda d: d.clip(-300, 400), 0, -296),
    "limited to -200..400": (lambda d: d.clip(-200, 400), 0, -196),
    "limited to -160..240": (lambda d: d.clip(-160, 240), 0, -156),
    "limited to -125..275": (lambda d: d.clip(-125, 275), 0, -121),
    "limited, one voxel of metal": (lambda d: _one_voxel(d.clip(-200, 400), 30000), 0, -196),
    "limited, one voxel below": (lambda d: _one_voxel(d.clip(-200, 400), -3024), 0, -196),
    "HU + 1024": (lambda d: d + 1024, 1024, -300),
    "HU + 1024, one voxel below": (lambda d: _one_voxel(d + 1024, -300), 1024, -300),
    "HU + 1024, limited": (lambda d: d.clip(-200, 400) + 1024, 1024, -196),
    "HU + 1024, padded with 0": (lambda d: _around_circle((d + 1024).clip(1), 0), 1024, -300),
    "HU + 1024, padded with -2000": (lambda d: _around_circle(d + 1024, -2000), 1024, -300),
    "HU + 1000": (lambda d: (d + 1000).clip(0), 1024, -300),
    "padded with -2000": (lambda d: _around_circle(d, -2000), 0, -300),
    "padded with -3024": (lambda d: _around_circle(d, -3024), 0, -300),
    "padded with 0": (lambda d: _around_circle(d, 0), 0, -300),
}


@pytest.fixture(scope="module", params=["synthetic", "a", "b"])
def scan(request: pytest.FixtureRequest) -> np.ndarray:
    if request.param == "synthetic":
        return synthetic_ct(0)[0].astype(np.float32)
    return read_image(demo_image(request.param)).data[::4]


@pytest.mark.parametrize("situation", CT)
def test_ct_is_recognised_however_it_is_stored(scan: np.ndarray, situation: str) -> None:
    change, offset, air = CT[situation]
    data = change(scan).astype(np.float32)
    how = interpret(data)
    assert how.hu
    assert (how.offset, how.air) == (offset, air)
    hu = how.apply(data)
    # Outside the padding and within its limits, the scan is recovered.
    same = (scan > -120) & (scan < 230) & (_around_circle(scan, -5000) > -5000)
    if "voxel" in situation:
        same[len(scan) // 2, 30, 30] = False
    off = np.abs(hu[same] - scan[same]) > (24 if "1000" in situation else 1e-3)
    assert off.mean() < 1e-3  # voxels of 0 HU next to a padding of 0
    if "padded" in situation:
        assert (hu[:, 0, 0] < -900).all()


def _mr(scan: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """An MR of the same anatomy: bright fat, tissues at other levels, uneven, positive noise."""
    rng = np.random.default_rng(seed)
    shape = scan.shape
    level = np.interp(
        scan, [-1000, -300, -150, -60, 0, 60, 250, 600], [0, 0, 900, 900, 250, 500, 150, 60]
    )
    level *= np.linspace(0.7, 1.3, shape[2])[None, None, :]
    return np.hypot(level + rng.normal(0, noise, shape), rng.normal(0, noise, shape)).astype(
        np.float32
    )


@pytest.mark.parametrize("noise", [0.0, 2.0, 20.0])
def test_mr_is_not_ct_at_any_scale(scan: np.ndarray, noise: float) -> None:
    mr = _mr(scan, noise)
    for scale in np.geomspace(0.02, 20, 30):
        assert not interpret((scale * mr).round()).hu
    assert not interpret((mr - mr.mean()) / mr.std()).hu
    overshoot = _one_voxel(mr, -300)  # as left by spline resampling
    assert not interpret(overshoot).hu


def test_a_window_inside_a_padding(scan: np.ndarray) -> None:
    how = interpret(_around_circle(scan.clip(-200, 400), -1024))
    assert how == Intensities(True, 0.0, -196.0, (-200.0, 400.0), None)


def test_a_phantom_with_few_values_is_ct() -> None:
    phantom = np.full((8, 64, 64), -1000, np.float32)
    phantom[:, 16:48, 10:54] = 40
    assert interpret(phantom).hu
    phantom[:, 20:30, 20:30] = 100
    assert interpret(phantom).hu


def test_8_bit_exports_are_not_ct_in_hu(scan: np.ndarray) -> None:
    how = interpret(((scan.clip(-160, 240) + 160) * (255 / 400)).round())
    assert how == Intensities(False, 0.0, pytest.approx(2.5, abs=0.3), how.limits, None)


@pytest.mark.parametrize("noise", [0.0, 2.0, 20.0])
def test_the_body_is_found_over_any_background(scan: np.ndarray, noise: float) -> None:
    """A noisy background is separated from the body as well as one of zeros."""
    volume = _volume(scan)
    clean, noisy = (
        body_boxes(dataclasses.replace(volume, data=_mr(scan, n))) for n in (0.0, noise)
    )
    assert np.abs(noisy - clean).max() <= 3


def _volume(data: np.ndarray) -> Volume:
    """`data` with the geometry of a demo scan, of which only the spacing is used."""
    a = read_image(demo_image("a"))
    return dataclasses.replace(a, data=np.ascontiguousarray(data, np.float32))


@pytest.mark.parametrize("situation", CT)
def test_the_network_sees_the_same_however_ct_is_stored(situation: str) -> None:
    scan = synthetic_ct(0)[0].astype(np.float32)
    stored = CT[situation][0](scan)
    plain, other = (
        prepare(ModelConfig(size=64, align="body"), _volume(data)) for data in (scan, stored)
    )
    assert np.abs(other.boxes - plain.boxes).max() <= 1
    if "240" in situation or "1000" in situation or "voxel" in situation:
        return  # the values themselves differ
    if "padded" in situation:
        scan = _around_circle(scan, -1024)
    plain, other = (prepare(ModelConfig(size=64), _volume(data)) for data in (scan, stored))
    np.testing.assert_allclose(other.slices, plain.slices, atol=1e-5)


def test_the_window_that_several_scans_share() -> None:
    full = Intensities(True, 0, -300, (-1024, math.inf), None)
    narrow = dataclasses.replace(full, limits=(-100.0, 240.0))
    assert shared_window("auto", [full]) == (-125, 275)
    assert shared_window("auto", [full, narrow]) == (-100, 240)
    bone = dataclasses.replace(full, limits=(300.0, 1500.0))
    assert shared_window("auto", [full, bone]) == (-125, 275)
    mr = dataclasses.replace(narrow, hu=False)
    assert shared_window("auto", [full, mr]) == "auto"
    assert shared_window((-10, 90), [full, narrow]) == (-10, 90)
