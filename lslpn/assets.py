"""Data in the package: two CT scans with labels, and weights.

Sources and licences are in NOTICE. The labels of the scans are TotalSegmentator's predictions,
not drawn by a human.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

from .errors import InputError

LABELS_NOTE = (
    "The labels of both demo scans are predictions of TotalSegmentator, not drawings by a human: "
    "the Dice scores say how far the two methods agree."
)


def asset(name: str) -> Path:
    """The path of a shipped file.

    Raises:
        InputError: the installation lacks it.
    """
    path = Path(str(files("lslpn") / "assets" / name))
    if not path.is_file():
        raise InputError(
            f"{path}: the file belongs to the package and is not there; install lslpn again"
        )
    return path


def trunk_weights() -> Path:
    """ResNet-50, conv1 to layer3, trained on ImageNet; torchvision's names, safetensors."""
    return asset("resnet50_imagenet_trunk.safetensors")


def trained_weights() -> Path:
    """LSLPN trained on CT scans, see docs/weights.md: its tensors, and as metadata its
    configuration, safetensors."""
    return asset("lslpn_ct.safetensors")


def demo_image(scan: Literal["a", "b"]) -> Path:
    """The CT of demo scan "a" (3 mm, RAS) or "b" (1.95 x 1.95 x 2 mm, LPS), in HU."""
    return asset(f"ct_{scan}_image.nii.gz")


def demo_labels(scan: Literal["a", "b"]) -> Path:
    """The labels of demo scan "a" or "b"; `demo_organs` names them."""
    return asset(f"ct_{scan}_labels.nii.gz")


def demo_organs() -> dict[str, int]:
    """Organ name to label value in the labels of both demo scans."""
    labels: dict[str, int] = json.loads(asset("labels.json").read_text("utf-8"))["labels"]
    return labels
