"""`lslpn demo`, `segment` and `view`: labels for a scan, and pages that show them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ..errors import InputError
from .options import (
    DEVICE,
    FORCE,
    NAMES,
    QUIET,
    Network,
    check_ending,
    check_new,
    option,
    torch_device,
)

if TYPE_CHECKING:
    from ..segmentation.descriptors import Scan


def demo(
    out: Path = option(
        "--out DIR",
        "Where result.html, prediction.nii.gz, overlay.png and report.json go; those of an "
        "earlier demo are replaced.",
        Path("demo"),
    ),
    device: str = DEVICE,
    quiet: bool = QUIET,
) -> None:
    """Segment one CT scan from another; both ship with the package.

    Scan A with its labels is the support, scan B the query, which has another orientation, spacing
    and field of view. The labels of both are predictions of TotalSegmentator, not drawn by a human.
    Runs offline, in minutes on two CPU cores.
    """
    from ..demo import run_demo

    report = run_demo(out, device=torch_device(device), progress=not quiet)
    width = max(map(len, report["dice"]))
    for organ, value in report["dice"].items():
        print(f"{organ:<{width}}  Dice {value:.3f}")
    print(report["note"])
    print(f"written to {out}: result.html, prediction.nii.gz, overlay.png, report.json")
    print(f"open {out / 'result.html'} in any browser, and click on a voxel to see why")


def segment(
    given: Network,
    *,
    support_image: list[Path] = option(
        "--support-image NIFTI", "A labelled scan; repeat for more.", ...
    ),
    support_mask: list[Path] = option(
        "--support-mask NIFTI",
        "Its labels: 0 is background, every other number an organ; one per --support-image, in "
        "the same order.",
        ...,
    ),
    query: list[Path] = option(
        "--query NIFTI",
        "The scan to segment; repeat for more; the labelled scans are read only once.",
        ...,
    ),
    out: list[Path] = option(
        "--out NIFTI",
        "The labels to write, with the query's grid, affine and header; one per --query, in the "
        "same order.",
        ...,
    ),
    probabilities: list[Path] | None = option(
        "--probabilities NIFTI",
        "Also write the probability of every label, along a fourth axis, from the lowest label to "
        "the highest; one per --query.",
    ),
    html: list[Path] | None = option(
        "--html HTML",
        "Also write a page that shows the result in any browser: slices and 3-D, the support "
        "beside the query, and why a voxel got its label; one per --query.",
    ),
    names: Path | None = NAMES,
    align: Literal["none", "body", "affine", "deformable"] = option(
        "--align",
        "affine and deformable register the labelled scan to the query; body and none match "
        "single slices, cropped to the patient's body or whole.",
        "deformable",
    ),
    depth: float | None = option(
        "--depth MM", "Extent of a window along z, if scans are registered; default: 60.", min=0
    ),
    keep_islands: bool = option(
        "--keep-islands",
        "Keep small components of an organ that are apart from the rest, if scans are registered.",
        False,
    ),
    force: bool = FORCE,
    quiet: bool = QUIET,
) -> None:
    """Find the organs of a labelled scan in another scan.

    By default it uses the network that ships, trained on CT scans without any label.

    [bold]lslpn segment --support-image A.nii.gz --support-mask A_mask.nii.gz --query B.nii.gz
    --out B_mask.nii.gz[/bold]
    """
    results = {"--out": out, "--probabilities": probabilities or [], "--html": html or []}
    matching = [("--support-mask", support_mask, "--support-image", support_image)]
    matching += [(name, files, "--query", query) for name, files in results.items() if files]
    for name, files, other, others in matching:
        if len(files) != len(others):
            raise InputError(
                f"{name}: expected one per {other}, got {len(files)} for {len(others)}; give "
                "them in pairs, in the same order"
            )
    inputs = {"--support-image": support_image, "--support-mask": support_mask, "--query": query}
    taken = [(name, path) for name, files in inputs.items() for path in files]
    written = [(name, path) for name, files in results.items() for path in files]
    for name, path in written:
        check_ending(path, name, *((".html", ".htm") if name == "--html" else (".nii.gz", ".nii")))
        for other, file in taken:
            if _same_file(path, file):
                raise InputError(f"{name}: {path} is also given as {other}; choose another name")
        taken.append((name, path))
    for name, used in (("--depth", depth is not None), ("--keep-islands", keep_islands)):
        if used and align not in ("affine", "deformable"):
            raise InputError(
                f"{name}: only applies to --align affine and deformable; use one of them, or "
                f"leave out {name}"
            )
    if names is not None and not html:
        raise InputError("--names: expected --html as well, since its page shows them; give both")
    for _, path in written:
        check_new(path, force)

    import numpy as np

    from ..data.dataset import read_names
    from ..data.volumes import (
        check_same_grid,
        read_image,
        read_labels,
        write_labels,
        write_probabilities,
    )

    supports = []
    for image_path, mask_path in zip(support_image, support_mask, strict=True):
        image = read_image(image_path)
        mask = read_labels(mask_path, require_foreground=True)
        check_same_grid(image, mask)
        supports.append((image, mask))
    drawn = sorted({int(v) for _, mask in supports for v in np.unique(mask.data) if v})
    volumes = [read_image(path) for path in query]
    named = {} if names is None else read_names(names)

    from ..segmentation.registered import DEPTH_MM
    from ..segmentation.segment import segment_matched as run
    from ..viewer import Support
    from ..viewer import view as shown_as

    model, _ = given.load()
    cache: dict[int, Scan] = {}
    for number, volume in enumerate(volumes):
        found = run(
            model,
            supports,
            volume,
            align=align,
            depth=DEPTH_MM if depth is None else depth,
            keep_islands=keep_islands,
            progress=not quiet,
            explain=bool(html),
            probabilities=bool(probabilities),
            cache=cache,
        )
        write_labels(out[number], found.labels, volume)
        if probabilities and found.probabilities is not None:
            write_probabilities(probabilities[number], found.probabilities, volume)
        if html:
            scans = [
                Support(image, mask.data, match)
                for (image, mask), match in zip(supports, found.matches, strict=True)
            ]
            shown_as(
                volume,
                {"prediction": found.labels},
                names=named,
                confidence=found.confidence,
                supports=scans,
                why=found.why,
            ).save(html[number])
        for files in results.values():
            if files:
                print(f"written: {files[number]}")
        for label in drawn:
            count = int((found.labels == label).sum())
            if not count:
                print(f"label {label}: not found")
                continue
            sure = ""
            if found.confidence is not None:
                sure = f", confidence {found.confidence[label]:.2f}"
                sure += ", check it" if label in found.doubtful else ""
            print(f"label {label}: {count} voxels, {count * volume.voxel_ml:.1f} ml{sure}")


def view(
    image: Path = typer.Argument(..., metavar="IMAGE", help="A scan, NIfTI.", show_default=False),
    labels: list[Path] | None = typer.Argument(
        None,
        metavar="[LABELS]...",
        help="Its labels; the first are shown on the left, the others beside them.",
        show_default=False,
    ),
    truth: Path | None = option(
        "--truth NIFTI", "Ground truth, shown beside the labels, with the Dice of the first."
    ),
    names: Path | None = NAMES,
    out: Path | None = option(
        "--out HTML", "The page; default: named after the scan, in the current folder."
    ),
    show: bool = option("--open", "Open the page in the default browser.", False),
    force: bool = FORCE,
) -> None:
    """Write a page that shows a scan and its labels in any browser, offline.

    One HTML file holds everything; large scans are reduced for it.

    [bold]lslpn view B.nii.gz B_mask.nii.gz --out B.html[/bold]
    """
    from ..data.dataset import read_names
    from ..data.volumes import read_image, read_labels
    from ..viewer import file_stem
    from ..viewer import view as shown_as

    if out is not None:
        check_ending(out, "--out", ".html", ".htm")
    named = {} if names is None else read_names(names)
    volume = read_image(image)
    path = Path(f"{file_stem(volume)}.html") if out is None else out
    check_new(path, force)
    layers: dict[str, Any] = {}
    for file in labels or []:
        one = read_labels(file)
        name = file_stem(one)
        while name in layers:  # the same name in another folder
            name += " (another)"
        layers[name] = one
    shown_as(volume, layers, truth=truth, names=named).save(path)
    print(f"written: {path}")
    if show:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:  # one does not exist yet
        return os.path.realpath(a) == os.path.realpath(b)
