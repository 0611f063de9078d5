"""Figures: drawings, errors, and no incomplete files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lslpn.errors import InputError
from lslpn.evaluation.overlay import PALETTE, Panel, colour, overlay


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def near(image: np.ndarray, hue: str, tolerance: float = 0.02) -> int:
    """How many pixels of a picture have a colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(image - np.array(to_rgb(hue))).max(-1) < tolerance).sum())


def disc(size: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (y**2 + x**2 < radius**2).astype(np.uint8)


def test_the_colours_of_the_labels_are_stable_and_differ() -> None:
    assert len(set(PALETTE)) == len(PALETTE)
    assert colour(1) == PALETTE[0]
    assert colour(len(PALETTE) + 2) == PALETTE[1]
    with pytest.raises(ValueError, match="label: expected 1 or more, got 0"):
        colour(0)


def test_overlay_draws_the_labels_and_the_legend_names_only_what_is_shown(tmp_path: Path) -> None:
    grey = np.zeros((64, 64), np.float32)
    grey[:, 32:] = 1.0
    labels = disc(64, 15) * 2
    plain = overlay(tmp_path / "plain.png", [[Panel(grey, None, "query")]])
    drawn = overlay(tmp_path / "drawn.png", [[Panel(grey, labels, "query")]], {2: "liver"})
    # The outline and the legend's patch have the exact colour of label 2, and no other.
    assert near(picture(plain), colour(2)) == 0
    assert near(picture(drawn), colour(2)) > 50
    assert near(picture(drawn), colour(1)) == 0


def test_rows_of_different_lengths_and_pixels_that_are_not_square(tmp_path: Path) -> None:
    wide = Panel(np.random.default_rng(0).random((20, 60)), np.zeros((20, 60), int), "a", 1.5)
    tall = Panel(np.ones((60, 20)), np.ones((60, 20), int), "b")
    path = overlay(tmp_path / "sub" / "f.png", [[wide, tall], [tall]], {1: "spleen"}, title="t")
    assert picture(path).shape[1] == pytest.approx(2 * 2.6 * 110, abs=2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2)])
def test_tiny_images_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    labels = np.zeros(shape, int)
    labels[0, 0] = 3
    overlay(tmp_path / "f.png", [[Panel(np.zeros(shape), labels)]])
    assert near(picture(tmp_path / "f.png"), colour(3)) > 0


def test_the_same_panels_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [[Panel(disc(32, 9) * 1.0, disc(32, 5))]]
    a, b = overlay(tmp_path / "a.png", rows), overlay(tmp_path / "b.png", rows)
    assert a.read_bytes() == b.read_bytes()


def test_rounding_errors_of_the_layout_do_not_change_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    real, noise = ConstrainedLayoutEngine.execute, np.random.default_rng(0)

    def execute(engine: ConstrainedLayoutEngine, figure: Figure) -> object:
        found = real(engine, figure)
        for axes in figure.axes:
            bounds = np.array(axes.get_position(original=True).bounds)
            axes._set_position(list(bounds + noise.uniform(-1e-9, 1e-9, 4)))
        return found

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", execute)
    rows = [[Panel(disc(32, 9) * 1.0, disc(32, 5), f"panel {i}") for i in range(3)]] * 2
    paths = [overlay(tmp_path / f"{i}.png", rows, title="discs") for i in range(5)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        overlay(tmp_path / "f.png", [[]])
    with pytest.raises(ValueError, match=r"panel 'q': image: expected \[H, W\]"):
        overlay(tmp_path / "f.png", [[Panel(np.zeros((2, 2, 2)), title="q")]])
    with pytest.raises(ValueError, match=r"labels: expected the image's shape \(2, 2\)"):
        overlay(tmp_path / "f.png", [[Panel(np.zeros((2, 2)), np.zeros((2, 3), int))]])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_named_and_the_old_figure_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        overlay(tmp_path / "file" / "f.png", [[Panel(np.zeros((4, 4)))]])


def test_a_failure_while_writing_keeps_the_old_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    path = overlay(tmp_path / "f.png", [[Panel(disc(16, 5) * 1.0)]])
    before = path.read_bytes()

    def full(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(InputError, match="No space left on device"):
        overlay(path, [[Panel(np.zeros((4, 4)))]])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.png"]
