"""`lslpn demo`, `segment` and `view`: labels for a scan, and pages that show them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import InputError
from ..files import check_writable
from .options import (
    CheckpointOption,
    DeviceOption,
    ForceOption,
    NamesOption,
    QuietOption,
    SizeOption,
    UntrainedPresetOption,
    UntrainedSeedOption,
    check_html,
    check_new,
    check_weights,
    model_of,
    option,
    torch_device,
    untrained_only,
)

if TYPE_CHECKING:
    from ..data.volumes import Volume
    from ..segmentation.registration import Scan
    from ..segmentation.result import Segmentation


def demo(
    out: Annotated[
        Path,
        option(
            "--out DIR",
            "Where result.html, prediction.nii.gz, overlay.png and report.json go; those of an "
            "earlier demo are replaced.",
        ),
    ] = Path("demo"),
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Segment one CT scan from another; both come with the package.

    Scan A with its labels is the support, scan B the query: another orientation, spacing and
    field of view. The labels of both are predictions of TotalSegmentator, not a human's. Runs
    offline, in minutes on two CPU cores.
    """
    for name in ("prediction.nii.gz", "overlay.png", "report.json", "result.html"):
        check_writable(out / name)
    from ..demo import run_demo

    report = run_demo(out, device=torch_device(device), progress=not quiet)
    width = max(map(len, report["dice"]))
    for organ, value in report["dice"].items():
        print(f"{organ:<{width}}  Dice {value:.3f}")
    print(report["note"])
    print(f"written to {out}: result.html, prediction.nii.gz, overlay.png, report.json")
    print(f"open {out / 'result.html'} in any browser to see it, and click into it to see why")


def segment(
    support_image: Annotated[
        list[Path], option("--support-image NIFTI", "A labelled scan; repeat for more of them.")
    ],
    support_mask: Annotated[
        list[Path],
        option(
            "--support-mask NIFTI",
            "Its labels: 0 is background, each other number an organ; one per --support-image, in "
            "the same order.",
        ),
    ],
    query: Annotated[
        list[Path],
        option(
            "--query NIFTI",
            "The scan to segment; repeat for more of them, for which the labelled scans are read "
            "once.",
        ),
    ],
    out: Annotated[
        list[Path],
        option(
            "--out NIFTI",
            "The labels to write, in the query's own grid, affine and header; one per --query, in "
            "the same order.",
        ),
    ],
    probabilities: Annotated[
        list[Path] | None,
        option(
            "--probabilities NIFTI",
            "Write the probability of every label as well, in a fourth axis, from the lowest label "
            "to the highest; one per --query.",
        ),
    ] = None,
    html: Annotated[
        list[Path] | None,
        option(
            "--html HTML",
            "Write a page as well that shows the result in any browser: slices and 3-D, the "
            "support beside the query, and why a voxel got its label; one per --query.",
        ),
    ] = None,
    names: NamesOption = None,
    checkpoint: CheckpointOption = None,
    align: Annotated[
        Literal["none", "body", "affine", "deformable"],
        option(
            "--align",
            "affine and deformable register the labelled scan to the query; body and none match "
            "slice with slice, cropped to the patient's body or whole.",
        ),
    ] = "deformable",
    depth: Annotated[
        float | None,
        option(
            "--depth MM",
            "Extent of a window along z, where scans are registered; default: 60.",
            min=0,
        ),
    ] = None,
    keep_islands: Annotated[
        bool,
        option(
            "--keep-islands",
            "Keep small components of an organ that are apart from the rest, where scans are "
            "registered.",
        ),
    ] = False,
    weights: Annotated[
        str | None,
        option(
            "--weights NAME",
            "Without --checkpoint: ct (trained on CT scans without labels), imagenet (before "
            "training), or a file of lslpn.save_weights; default: ct, but imagenet with --preset "
            "or --seed.",
        ),
    ] = None,
    preset: UntrainedPresetOption = None,
    size: SizeOption = None,
    seed: UntrainedSeedOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the organs of a labelled scan in another scan.

    Without --checkpoint the network is the one that ships, trained on CT scans without any label.

    [bold]lslpn segment --support-image A.nii.gz --support-mask A_mask.nii.gz --query B.nii.gz
    --out B_mask.nii.gz[/bold]
    """
    untrained_only(checkpoint, preset, seed)
    if weights is not None and checkpoint is not None:
        raise InputError("--weights: a checkpoint has its own; leave out --weights or --checkpoint")
    check_weights(weights, preset, seed)
    if weights is None and (checkpoint, preset, seed) == (None, None, None):
        weights = "ct"
    results = {"--out": out, "--probabilities": probabilities or [], "--html": html or []}
    pairs = [("--support-mask", support_mask, "--support-image", support_image)]
    pairs += [(name, files, "--query", query) for name, files in results.items() if files]
    for name, files, other, others in pairs:
        if len(files) != len(others):
            raise InputError(
                f"{name}: expected one per {other}, got {len(files)} for {len(others)}; give "
                "them in pairs, in the same order"
            )
    for name in ("--out", "--probabilities"):
        for path in results[name]:
            if not path.name.lower().endswith((".nii.gz", ".nii")):
                raise InputError(
                    f"{name}: expected a name that ends in .nii.gz or .nii, got {path.name}"
                )
    written = [(name, path) for name, files in results.items() for path in files]
    given = [("--support-image", support_image), ("--support-mask", support_mask)]
    for number, (name, path) in enumerate(written):
        earlier = [(other, [before]) for other, before in written[:number]]
        for other, files in (*given, ("--query", query), *earlier):
            if any(_same_file(path, each) for each in files):
                raise InputError(f"{name}: {path} is also given as {other}; give it another name")
    registers = align in ("affine", "deformable")
    for name, unused in (("--depth", depth is not None), ("--keep-islands", keep_islands)):
        if unused and not registers:
            raise InputError(
                f"{name}: belongs to --align affine and deformable; give one of them, or "
                "leave it out"
            )
    if names is not None and not html:
        raise InputError("--names: expected --html as well, whose page shows them; give both")
    for path in html or []:
        check_html(path, "--html")
    for _, path in written:
        check_new(path, force)

    from ..data.dataset import read_names
    from ..data.volumes import check_same_grid, read_image, read_labels

    supports = []
    for image_path, mask_path in zip(support_image, support_mask, strict=True):
        image = read_image(image_path)
        mask = read_labels(mask_path, require_foreground=True)
        check_same_grid(image, mask)
        supports.append((image, mask))
    volumes = [read_image(path) for path in query]
    named = {} if names is None else read_names(names)

    from ..checkpoint import load_checkpoint
    from ..segmentation.registered import DEPTH_MM
    from ..segmentation.segment import segment_matched as run

    trained = None if checkpoint is None else load_checkpoint(checkpoint)
    model = model_of(trained, checkpoint, preset, size, seed, device, weights=weights)
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
        _write_segmentation(
            found, supports, volume, named, *(f[number] if f else None for f in results.values())
        )


def _write_segmentation(
    found: Segmentation,
    supports: list[tuple[Volume, Volume]],
    volume: Volume,
    names: dict[int, str],
    out: Path | None,
    probabilities: Path | None,
    html: Path | None,
) -> None:
    import numpy as np

    from ..data.volumes import write_labels, write_probabilities

    assert out is not None
    write_labels(out, found.labels, volume)
    print(f"written: {out}")
    if probabilities is not None:
        assert found.probabilities is not None
        write_probabilities(probabilities, found.probabilities, volume)
        print(f"written: {probabilities}")
    if html is not None:
        from ..viewer import Support
        from ..viewer import view as shown_as

        scans = [
            Support(image, mask.data, match)
            for (image, mask), match in zip(supports, found.matches, strict=True)
        ]
        shown_as(
            volume,
            {"prediction": found.labels},
            names=names,
            confidence=found.confidence,
            supports=scans,
            why=found.why,
            notes=_notes(found, names),
        ).save(html)
        print(f"written: {html}")
    for label in sorted({int(v) for _, mask in supports for v in np.unique(mask.data) if v}):
        count = int((found.labels == label).sum())
        if not count:
            print(f"label {label}: not found")
            continue
        sure = ""
        if found.confidence is not None:
            sure = f", confidence {found.confidence[label]:.2f}"
            sure += ", check it" if label in found.doubtful else ""
        print(f"label {label}: {count} voxels, {count * volume.voxel_ml:.1f} ml{sure}")


def _notes(found: Segmentation, names: dict[int, str]) -> list[str]:
    doubtful = ", ".join(names.get(label, f"label {label}") for label in found.doubtful)
    return [f"Low confidence, check these organs: {doubtful}."] if doubtful else []


def view(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A scan, NIfTI.", show_default=False)
    ],
    labels: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LABELS]...",
            help="Labels of it; the first are shown on the left, the others beside them.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        option(
            "--truth NIFTI", "Ground truth, shown beside the labels, with the Dice of the first."
        ),
    ] = None,
    names: NamesOption = None,
    out: Annotated[
        Path | None,
        option("--out HTML", "The page; default: named after the scan, in the current folder."),
    ] = None,
    show: Annotated[bool, option("--open", "Open the page in the default browser.")] = False,
    force: ForceOption = False,
) -> None:
    """Write a page that shows a scan and its labels in any browser, offline.

    One HTML file holds everything; large scans are thinned for it.

    [bold]lslpn view B.nii.gz B_mask.nii.gz --out B.html[/bold]
    """
    from ..data.dataset import read_names
    from ..data.volumes import read_image, read_labels
    from ..viewer import file_stem
    from ..viewer import view as shown_as

    if out is not None:
        check_html(out, "--out")
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
    except OSError:
        return a.absolute() == b.absolute()
