"""Data in the package: CT scans with labels, and weights; NOTICE has sources and licences."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

from .errors import InputError

LABELS_NOTE = (
    "The labels of both demo scans are predictions of TotalSegmentator, not drawn by a human: "
    "the Dice scores say how far the two methods agree."
)


def asset(name: str) -> Path:
    """The path of a shipped file.

    Raises:
        InputError: it is missing from the installation.
    """
    path = Path(str(files("lslpn") / "assets" / name))
    if not path.is_file():
        raise InputError(f"{path}: a file of the package is missing; install lslpn again")
    return path


def trunk_weights() -> Path:
    """The weights of ResNet-50, conv1 to layer3, trained on ImageNet, with torchvision's names."""
    return asset("resnet50_imagenet_trunk.safetensors")


def trained_weights() -> Path:
    """LSLPN trained on CT scans, as written by `save_weights`; see docs/weights.md."""
    return asset("lslpn_ct.safetensors")


def demo_image(scan: Literal["a", "b"]) -> Path:
    """The CT of demo scan "a" (3 mm, RAS) or "b" (1.95 x 1.95 x 2 mm, LPS), in HU."""
    return asset(f"ct_{scan}_image.nii.gz")


def demo_labels(scan: Literal["a", "b"]) -> Path:
    """The labels of demo scan "a" or "b", which are TotalSegmentator's predictions."""
    return asset(f"ct_{scan}_labels.nii.gz")


def demo_organs() -> dict[str, int]:
    """The label value of each organ in both demo scans, by name."""
    labels: dict[str, int] = json.loads(asset("labels.json").read_text("utf-8"))["labels"]
    return labels
