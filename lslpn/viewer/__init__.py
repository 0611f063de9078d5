"""Scans and labels as an HTML page that opens offline in any browser.

Takes plain data (volumes, arrays, names) and does not depend on networks.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from ..data.volumes import Volume, as_volume, check_same_grid, read_image, read_labels
from ..errors import InputError
from ..files import write_text
from .page import viewer
from .payload import Support, check_labels, contents, file_stem

if TYPE_CHECKING:
    from ..segmentation.why import Why

__all__ = ["Support", "View", "file_stem", "view"]

Image = Volume | nib.Nifti1Image | str | os.PathLike[str]
Labels = np.ndarray | Image

_HEIGHT = 720  # of the page in a notebook, in pixels


@dataclass(frozen=True)
class View:
    """A scan with its labels, ready to be shown; returned by `view`.

    In a notebook it displays itself, by ipyniivue if that is installed, otherwise as the page.

    Attributes:
        title: the page's title.
        facts: the page's data, except for volumes.
        blocks: volumes by name, in base64.
    """

    title: str
    facts: dict[str, Any] = field(repr=False)
    blocks: dict[str, str] = field(repr=False)

    def html(self) -> str:
        """The page: a self-contained HTML document."""
        return viewer(self.title, self.facts, self.blocks)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, completely or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        write_text(path, self.html())
        return Path(path)

    def widget(self) -> Any:
        """An `ipyniivue.NiiVue` with the scan and the first labels, for further use in Python.

        Raises:
            InputError: ipyniivue is not installed.
        """
        if find_spec("ipyniivue") is None:
            raise InputError(
                'widget: needs ipyniivue, which is not installed; pip install "lslpn[notebook]"'
            )
        from ipyniivue import NiiVue, Volume

        def volume(name: str, **shown: Any) -> Any:
            data = base64.b64decode(self.blocks[name])
            return Volume(data=data, name=f"{name}.nii.gz", colormap="gray", **shown)

        _, low, high = self.facts["image"]["windows"][0]
        shown = [volume("image", opacity=1.0, cal_min=low, cal_max=high)]
        if "layer-0" in self.blocks:
            labels = volume("layer-0", opacity=0.5, cal_min=None, cal_max=None)
            organs = [{"colour": "#000000", "name": ""}, *self.facts["organs"]]
            channels: dict[str, Any] = {
                channel: [int(organ["colour"][i : i + 2], 16) for organ in organs]
                for channel, i in (("R", 1), ("G", 3), ("B", 5))
            }
            labels.set_colormap_label(channels | {"labels": [organ["name"] for organ in organs]})
            shown.append(labels)
        widget = NiiVue(is_radiological_convention=True)
        widget.load_volumes(shown)
        return widget

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if find_spec("ipyniivue") is not None:
            return self.widget()._repr_mimebundle_(**options)
        page = html.escape(self.html())
        frame = (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="{html.escape(self.title)}" '
            f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )
        return {"text/html": frame, "text/plain": repr(self)}


def view(
    image: Image,
    labels: Labels | Mapping[str, Labels] | None = None,
    *,
    truth: Labels | None = None,
    names: Mapping[int, str] | None = None,
    confidence: Mapping[int, float] | None = None,
    supports: Sequence[Support] = (),
    why: Why | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> View:
    """Show a scan with its labels: in a notebook, or by `view(...).save("scan.html")`.

    A scan of more than 12 million voxels is thinned, and the page says so; volumes and Dice are
    those of the whole scan. The page contains the names of files, but not their paths.

    Args:
        image: the scan: a volume, a nibabel image, or the path of a file.
        labels: whole numbers, 0 for the background: [Z, Y, X] in the frame of a volume's `data`,
            or as `image`; or a mapping from names to such labels, of which the first are shown on
            the left.
        truth: ground truth; it is shown beside the labels, with their Dice.
        names: maps label values to organ names.
        confidence: maps label values to the confidence in the organ, 0 to 1; a note names organs
            below 0.5.
        supports: the labelled scans by which the scan was segmented; their matched slices follow
            those of the query.
        why: the windows that decided, see `lslpn.segmentation.why`; its supports must be
            `supports`, in that order.
        title: of the page; default: the name of the image's file.
        notes: lines at the top of the page.

    Raises:
        InputError: a file cannot be used, or labels are on another grid than their image, negative
            or not whole numbers.
        TypeError: `image` is none of the above.
    """
    scan = read_image(image) if isinstance(image, (str, os.PathLike)) else as_volume(image)
    only = "labels" if truth is None else "prediction"
    named = dict(labels) if isinstance(labels, Mapping) else {only: labels}
    if truth is not None:
        named["ground truth"] = truth
    layers = {name: _array(name, one, scan) for name, one in named.items() if one is not None}
    for support in supports:
        check_labels(support.title, support.labels, support.image)
    facts, blocks = contents(
        scan,
        layers,
        truth=None if truth is None else layers["ground truth"],
        names=names or {},
        confidence=confidence or {},
        supports=supports,
        why=why,
        notes=notes,
    )
    return View(title or file_stem(scan), facts, blocks)


def _array(name: str, labels: Labels, image: Volume) -> np.ndarray:
    """Labels in the frame of the image, after checking them."""
    if isinstance(labels, (str, os.PathLike)):
        labels = read_labels(labels)
    if isinstance(labels, (Volume, nib.Nifti1Image)):
        labels = as_volume(labels, labels=True)
        check_same_grid(image, labels)
        labels = labels.data
    labels = np.asarray(labels)
    check_labels(name, labels, image)
    return labels
