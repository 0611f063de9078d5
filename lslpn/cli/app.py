"""The command line: `lslpn demo`, `segment`, `view`, `train`, `evaluate` and more, see `app`.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 done; 1 a fault of
ours or of the machine; 2 something given cannot be used, said in one line; 130 interrupted.

torch takes seconds to import, so nothing here imports it before a command needs it.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .corpora import prepare_app
from .options import (
    Align,
    CheckpointOption,
    DataOption,
    DeviceOption,
    ForceOption,
    InterruptedByUserError,
    MethodName,
    MethodOption,
    NamesOption,
    OneOfEach,
    Preset,
    PresetOption,
    ProtocolName,
    QuietOption,
    SegmentAlign,
    SegmentWeights,
    SizeOption,
    UntrainedPresetOption,
    UntrainedSeedOption,
    command,
    fraction,
    say,
    settings_of,
    split,
    torch_device,
)
from .paper import experiment_app

if TYPE_CHECKING:
    import numpy as np

    from lslpn_kernels import GridSpec

    from ..checkpoint import Checkpoint
    from ..data.dataset import Dataset
    from ..data.volumes import Volume
    from ..models import FewShotNetwork
    from ..segmentation.registration import Scan
    from ..segmentation.segment import Segmentation

_SEED = 1234  # of an untrained model

app = typer.Typer(
    name="lslpn",
    help=(
        "Few-shot segmentation of organs: with one labelled scan, find the organ in another.\n\n"
        "The method is the location-sensitive local prototype network (Yu et al., 2021). "
        "[bold]lslpn demo[/bold] shows it on two CT scans that come along; "
        "[bold]lslpn COMMAND --help[/bold] explains a command."
    ),
    epilog="--debug, before or after the command, shows the traceback of an error.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(prepare_app, name="prepare")
app.add_typer(experiment_app, name="experiment")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"lslpn {version('lslpn')}")
        except PackageNotFoundError:  # run from the source tree
            print("lslpn, not installed")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # `main` takes --debug off the line, wherever it stands; it is declared here for the help.
    pass


# --- commands -------------------------------------------------------------------------------


@app.command(cls=OneOfEach)
@command
def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where result.html, prediction.nii.gz, overlay.png and report.json go; "
            "those of an earlier demo are replaced.",
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
        _writable(out / name)
    from ..demo import run_demo

    report = run_demo(out, device=torch_device(device), progress=not quiet)
    width = max(map(len, report["dice"]))
    for organ, value in report["dice"].items():
        print(f"{organ:<{width}}  Dice {value:.3f}")
    print(report["note"])
    print(f"written to {out}: result.html, prediction.nii.gz, overlay.png, report.json")
    print(f"open {out / 'result.html'} in any browser to see it, and click into it to see why")


@app.command(cls=OneOfEach)
@command
def segment(
    support_image: Annotated[
        list[Path],
        typer.Option(
            "--support-image",
            metavar="NIFTI",
            help="A labelled scan; repeat for more of them.",
            show_default=False,
        ),
    ],
    support_mask: Annotated[
        list[Path],
        typer.Option(
            "--support-mask",
            metavar="NIFTI",
            help="Its labels: 0 is background, each other number an organ; one per "
            "--support-image, in the same order.",
            show_default=False,
        ),
    ],
    query: Annotated[
        list[Path],
        typer.Option(
            "--query",
            metavar="NIFTI",
            help="The scan to segment; repeat for more of them, for which the labelled scans are "
            "read once.",
            show_default=False,
        ),
    ],
    out: Annotated[
        list[Path],
        typer.Option(
            "--out",
            metavar="NIFTI",
            help="The labels to write, in the query's own grid, affine and header; one per "
            "--query, in the same order.",
            show_default=False,
        ),
    ],
    probabilities: Annotated[
        list[Path] | None,
        typer.Option(
            "--probabilities",
            metavar="NIFTI",
            help="Write the probability of every label as well, in a fourth axis, from the lowest "
            "label to the highest; one per --query.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        list[Path] | None,
        typer.Option(
            "--html",
            metavar="HTML",
            help="Write a page as well that shows the result in any browser: slices and 3-D, the "
            "support beside the query, and why a voxel took its label; one per --query.",
            show_default=False,
        ),
    ] = None,
    names: NamesOption = None,
    checkpoint: CheckpointOption = None,
    align: Annotated[
        SegmentAlign,
        typer.Option(
            "--align",
            help="affine and deformable register the labelled scan to the query; body and none "
            "match slice with slice, cut to the patient's body or whole.",
        ),
    ] = SegmentAlign.deformable,
    depth: Annotated[
        float | None,
        typer.Option(
            "--depth",
            metavar="MM",
            min=0,
            help="How far a window reaches along z, where scans are registered; default: 60.",
            show_default=False,
        ),
    ] = None,
    keep_islands: Annotated[
        bool,
        typer.Option(
            "--keep-islands",
            help="Keep small pieces of an organ apart from the rest, where scans are registered.",
        ),
    ] = False,
    weights: Annotated[
        SegmentWeights | None,
        typer.Option(
            "--weights",
            help="Without --checkpoint: ct has been trained on CT scans without labels, imagenet "
            "is a network before training; default: ct, and imagenet with --preset or --seed.",
            show_default=False,
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
    _untrained_only(checkpoint, preset, seed)
    if weights is not None and checkpoint is not None:
        raise InputError("--weights: a checkpoint has its own; leave out --weights or --checkpoint")
    if weights is SegmentWeights.ct and (preset is not None or seed is not None):
        raise InputError(
            "--weights ct: --preset and --seed describe an untrained network; leave them out, or "
            "give --weights imagenet"
        )
    own = checkpoint, preset, seed
    shipped = weights is not SegmentWeights.imagenet and own == (None, None, None)
    results = {"--out": out, "--probabilities": probabilities or [], "--html": html or []}
    pairs = [("--support-mask", support_mask, "--support-image", support_image)]
    pairs += [(name, files, "--query", query) for name, files in results.items() if files]
    for option, files, other, others in pairs:
        if len(files) != len(others):
            raise InputError(
                f"{option}: expected one per {other}, got {len(files)} for {len(others)}; give "
                "them in pairs, in the same order"
            )
    for option in ("--out", "--probabilities"):
        for path in results[option]:
            if not path.name.lower().endswith((".nii.gz", ".nii")):
                raise InputError(
                    f"{option}: expected a name that ends in .nii.gz or .nii, got {path.name}"
                )
    written = [(option, path) for option, files in results.items() for path in files]
    given = [("--support-image", support_image), ("--support-mask", support_mask)]
    for number, (option, path) in enumerate(written):
        earlier = [(name, [before]) for name, before in written[:number]]
        for name, files in (*given, ("--query", query), *earlier):
            if any(_same_file(path, each) for each in files):
                raise InputError(f"{option}: {path} is also given as {name}; give it another name")
    registers = align in (SegmentAlign.affine, SegmentAlign.deformable)
    for option, unused in (("--depth", depth is not None), ("--keep-islands", keep_islands)):
        if unused and not registers:
            raise InputError(
                f"{option}: belongs to --align affine and deformable; give one of them, or leave "
                "it out"
            )
    if names is not None and not html:
        raise InputError("--names: expected --html as well, whose page shows them; give both")
    for path in html or []:
        _named_html(path, "--html")
    for _, path in written:
        _free(path, force)
        _writable(path)

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
    from ..segmentation.segment import segment_matched as run
    from ..segmentation.volumetric import DEPTH_MM

    trained = None if checkpoint is None else load_checkpoint(checkpoint)
    model = _model(trained, checkpoint, preset, size, seed, device, shipped=shipped)
    kept: dict[int, Scan] = {}
    for number, volume in enumerate(volumes):
        found = run(
            model,
            supports,
            volume,
            align=align.value,
            depth=DEPTH_MM if depth is None else depth,
            keep_islands=keep_islands,
            progress=not quiet,
            explain=bool(html),
            probabilities=bool(probabilities),
            kept=kept,
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
        from ..viewer import Support, view

        scans = [
            Support(image, mask.data, match)
            for (image, mask), match in zip(supports, found.matches, strict=True)
        ]
        view(
            volume,
            {"prediction": found.labels},
            names=names,
            confidence=found.confidence,
            supports=scans,
            why=found.why,
        ).save(html)
        print(f"written: {html}")
    for label in sorted({int(v) for _, mask in supports for v in np.unique(mask.data) if v}):
        count = int((found.labels == label).sum())
        sure = "" if found.confidence is None else f", confidence {found.confidence[label]:.2f}"
        print(f"label {label}: {count} voxels, {count * volume.voxel_ml:.1f} ml{sure}")


@app.command(cls=OneOfEach)
@command
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
        typer.Option(
            "--truth",
            metavar="NIFTI",
            help="Ground truth, shown beside the labels, with the Dice of the first.",
            show_default=False,
        ),
    ] = None,
    names: NamesOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="HTML",
            help="The page; default: named after the scan, in the current folder.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--open", help="Open the page in the default browser.")
    ] = False,
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
        _named_html(out, "--out")
    named = {} if names is None else read_names(names)
    volume = read_image(image)
    path = Path(f"{file_stem(volume)}.html") if out is None else out
    _free(path, force)
    _writable(path)
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


@app.command(cls=OneOfEach)
@command
def train(
    data: DataOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="RUN", help="Folder for checkpoint and log.", show_default=False
        ),
    ],
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out",
            metavar="ORGAN",
            help="An organ that training must not see, to evaluate on it; repeat for more. "
            "Default: none, for organs that the data set has no labels of.",
            show_default=False,
        ),
    ] = None,
    method: MethodOption = None,
    preset: PresetOption = Preset.published,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--cases",
            metavar="CASE",
            help="Cases to train on, repeated or with commas; default: all. Keep some apart "
            "for `lslpn evaluate`.",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change one setting of the preset, such as --set size=257 --set steps=400; "
            "repeat for more.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")
    ] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train the network on episodes of all organs but those held out.

    No choice is made on held-out organs or on other cases: the checkpoint is the last one.
    A run that was stopped goes on with --resume, to the same weights bit for bit. Several GPUs
    share a batch with torchrun --nproc_per_node=N -m lslpn train.

    [bold]lslpn train --data DIR --hold-out liver --preset published --out RUN[/bold]
    """
    from ..distributed import joined

    if hold_out and not split(hold_out):
        raise InputError("--hold-out: expected an organ, got none; leave it out to hold out none")
    with joined(device) as own:
        _train(data, hold_out, out, preset, method, case, setting, resume, own, quiet)


def _train(
    data: Path,
    held_out: list[str] | None,
    out: Path,
    preset: Preset,
    method: MethodName | None,
    case: list[str] | None,
    setting: list[str] | None,
    resume: bool,
    device: str,
    quiet: bool,
) -> None:
    """`train`, in one process or each of several."""
    from ..config import PRESETS, with_overrides
    from ..data.dataset import Dataset, UnlabelledScans
    from ..distributed import world
    from ..files import is_file

    changes = settings_of(setting)
    if method is not None:
        changes["method"] = method.value
    config = with_overrides(PRESETS[preset.value], **changes)
    plain = config.train.supervision == "superpixels" and not is_file(data / "dataset.json")
    dataset = UnlabelledScans.open(data) if plain else Dataset.open(data)
    hold_out = split(held_out, dataset.organs)
    for organ in hold_out:
        dataset.label_of(organ)
    cases = split(case, dataset.cases) or list(dataset.cases)
    for name in cases:
        dataset.check_case(name)

    from ..training import time_spent
    from ..training import train as run

    run(
        config,
        dataset,
        hold_out=hold_out,
        cases=cases,
        out=out,
        resume=resume,
        device=torch_device(device),
        progress=not quiet,
    )
    if world().first:
        spent = time_spent(out)
        waited = f"; it waited for data {spent[1] / spent[0]:.1%} of the time" if spent else ""
        print(f"written: {out}{waited}")


@app.command(cls=OneOfEach)
@command
def evaluate(
    data: DataOption,
    support: Annotated[
        str,
        typer.Option(
            "--support",
            metavar="CASE",
            help="The case whose labels are given.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointOption = None,
    untrained: Annotated[
        bool,
        typer.Option(
            "--untrained",
            help="No checkpoint: ImageNet features and a random reduction layer.",
        ),
    ] = False,
    method: MethodOption = None,
    query: Annotated[
        list[str] | None,
        typer.Option(
            "--query",
            metavar="CASE",
            help="Cases to segment, repeated or with commas; default: all that neither the "
            "training saw nor is the support.",
            show_default=False,
        ),
    ] = None,
    organ: Annotated[
        list[str] | None,
        typer.Option(
            "--organ",
            metavar="NAME",
            help="Organs to segment, repeated or with commas; default: those that the "
            "checkpoint's training held out.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="Which support slice segments which query slices. "
            "[bold]published[/bold]: 12 chunks of the organ's range. [bold]senet[/bold]: 10, "
            "median over cases. [bold]alpnet[/bold]: 3 parts. [bold]adnet[/bold]: one support "
            "slice for the whole scan, no knowledge of the query's range.",
        ),
    ] = ProtocolName.published,
    chunks: Annotated[
        int | None,
        typer.Option(
            "--chunks",
            metavar="N",
            min=1,
            help="Parts of the organ's range; default: the protocol's own.",
            show_default=False,
        ),
    ] = None,
    align: Annotated[
        Align | None,
        typer.Option(
            "--align",
            help="body crops the scans to the patient's body first; default: as the checkpoint was "
            "trained, and none without one.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale",
            metavar="FRACTION",
            help="Size of a window over the image, such as 1/8, or 1/8:1 with a spacing of its "
            "own; default: the model's. Repeated, every grid is evaluated in one pass.",
            show_default=False,
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            "--spacing",
            metavar="FRACTION",
            help="Distance of windows over their size, such as 1/2; 1 is no overlap; default: "
            "the model's.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where evaluation.json and the figures go."),
    ] = Path("evaluation"),
    preset: UntrainedPresetOption = None,
    size: SizeOption = None,
    seed: UntrainedSeedOption = None,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Query slices encoded at once.")
    ] = 8,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown.")
    ] = False,
    html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Write evaluation.html as well: the table, a box plot, the worst cases first, and "
            "a page in views/ for each case.",
        ),
    ] = False,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score a model: 3-D Dice per organ and case, with mean and median.

    Each organ is segmented in each query case from the one support case. Prints a table, and
    writes JSON and figures.

    [bold]lslpn evaluate --data DIR --checkpoint RUN --support CASE[/bold]
    """
    if (checkpoint is None) != untrained:
        given = "both" if untrained else "neither"
        raise InputError(f"expected one of --checkpoint RUN and --untrained, got {given}")
    if checkpoint is not None and method is not None:
        raise InputError("--method: a checkpoint has its own; give it with --untrained only")
    _untrained_only(checkpoint, preset, seed)
    result = out / "evaluation.json"
    _free(result, force)
    _writable(result)

    from ..data.dataset import Dataset

    dataset = Dataset.open(data)
    dataset.check_case(support)
    wanted, asked = split(organ, dataset.organs), split(query, dataset.cases)
    for name in wanted:
        dataset.label_of(name)
    for name in asked:
        dataset.check_case(name)

    from ..checkpoint import load_checkpoint
    from ..evaluation.results import save, summary
    from ..evaluation.scoring import evaluate as run
    from ..evaluation.scoring import evaluate_grids
    from ..models import LSLPN

    trained = None if checkpoint is None else load_checkpoint(checkpoint)
    model = _model(trained, checkpoint, preset, size, seed, device, method)
    grids = _grids(scale, spacing, model)
    organs, queries, notes = _choices(trained, dataset, support, wanted, asked)
    for note in notes:
        say(f"note: {note}")
    options: dict[str, Any] = {
        "support": support,
        "queries": queries,
        "organs": organs,
        "protocol": protocol.value,
        "align": None if align is None else align.value,
        "chunks": chunks,
        "batch": batch,
        "progress": not quiet,
        "name": _name(preset, seed, method) if untrained else str(checkpoint),
    }
    views = _Views(out, dataset) if html else None
    if views is not None:
        options["observe"] = views.write
    if isinstance(model, LSLPN):
        results = evaluate_grids(model, dataset, grids=grids, **options)
    else:
        results = [run(model, dataset, **options)]
    written = save(results, out)
    for one in results:
        print(one.table(markdown=markdown), end="\n\n")
    if len(results) > 1:
        print(summary(results, markdown=markdown), end="\n\n")
    figures = len(written) - 1
    print(f"written: {written[0]} and {figures} figure{'s' * (figures != 1)} beside it")
    if views is not None:
        from ..viewer.evaluation import write_evaluation

        print(f"written: {write_evaluation(out / 'evaluation.html', results, views.addresses)}")


@app.command(cls=OneOfEach)
@command
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, processor, GPUs, and which backends of the head can run here and why not."""
    from ..info import collect, report

    facts = collect()
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        print(report(facts))


# --- parts ----------------------------------------------------------------------------------


class _Views:
    """A page for each case of an evaluation, written as soon as the case is done."""

    def __init__(self, out: Path, dataset: Dataset) -> None:
        self.out = out
        self.names = {value: organ for organ, value in dataset.labels.items()}
        self.addresses: dict[str, str] = {}

    def write(self, case: str, image: Volume, truth: Volume, found: list[np.ndarray]) -> None:
        from urllib.parse import quote

        from ..viewer import view as shown_as

        layers = {
            "prediction" if len(found) == 1 else f"prediction, grid {i}": labels
            for i, labels in enumerate(found, 1)
        }
        path = self.out / "views" / f"{case}.html"
        shown_as(image, layers, truth=truth, names=self.names, title=case).save(path)
        self.addresses[case] = f"views/{quote(path.name)}"


def _grids(
    scales: Sequence[str] | None, spacing: str | None, model: FewShotNetwork
) -> list[GridSpec]:
    """The grids to evaluate LSLPN with; other methods have none."""
    from lslpn_kernels import GridSpec

    from ..models import LSLPN

    if not isinstance(model, LSLPN):
        if scales or spacing is not None:
            option = "--scale" if scales else "--spacing"
            raise InputError(f"{option}: {model.name} has no grid of windows; leave it away")
        return []
    own = model.head.grid
    common = own.spacing if spacing is None else fraction(spacing, "--spacing")
    grids = []
    for text in split(scales):
        first, colon, second = text.partition(":")
        alone = fraction(second, "--scale") if colon else common
        grids.append(GridSpec(fraction(first, "--scale"), alone))
    return grids or [GridSpec(own.scale, common)]


def _untrained_only(checkpoint: Path | None, preset: Preset | None, seed: int | None) -> None:
    """Refuse what a checkpoint settles."""
    for option, value in (("--preset", preset), ("--seed", seed)):
        if checkpoint is not None and value is not None:
            raise InputError(
                f"{option}: a checkpoint has its own; give it without --checkpoint only"
            )


def _model(
    trained: Checkpoint | None,
    checkpoint: Path | None,
    preset: Preset | None,
    size: int | None,
    seed: int | None,
    device: str,
    method: MethodName | None = None,
    *,
    shipped: bool = False,
) -> FewShotNetwork:
    """The model of a checkpoint, the one that ships, or an untrained one; ready to run."""
    import dataclasses

    where = torch_device(device)
    if trained is not None and checkpoint is not None:
        from ..checkpoint import restored

        model = restored(trained, checkpoint)
    elif shipped:
        from ..models import pretrained

        model = pretrained()
    else:
        from ..config import PRESETS, with_overrides
        from ..models import untrained

        config = PRESETS[(preset or Preset.published).value]
        config = with_overrides(config, method=(method or MethodName.lslpn).value)
        model = untrained(config, seed=_SEED if seed is None else seed)
    if size is not None:
        # The network takes any size: only what its input is resized to changes.
        model.config = dataclasses.replace(model.config, size=size)
    return model.to(where).eval()


def _name(preset: Preset | None, seed: int | None, method: MethodName | None) -> str:
    """What the untrained model is called in results."""
    which = "" if method is None else f"{method.value}, "
    settings = (preset or Preset.published).value
    return f"untrained ({which}{settings}, seed {_SEED if seed is None else seed})"


def _choices(
    checkpoint: Checkpoint | None,
    dataset: Dataset,
    support: str,
    organs: list[str],
    queries: list[str],
) -> tuple[list[str], list[str], list[str]]:
    """Organs and query cases to evaluate on, and what a reader of the result should know."""
    held_out: list[str] = []
    learnt: list[str] = []
    trained: list[str] = []
    if checkpoint is not None:
        record = checkpoint.data
        held_out, learnt = list(record["hold_out"]), list(record["organs"])
        trained = list(record["cases"])
    notes = []
    if not organs:
        organs = [name for name in held_out if name in dataset.labels]
        if not organs:
            raise InputError(
                "--organ: expected at least one, got none; known organs: "
                + ", ".join(dataset.labels)
            )
    elif seen := [organ for organ in organs if organ in learnt]:
        notes.append(f"the training did not hold out {', '.join(seen)}")
    if not queries:
        queries = [c for c in dataset.cases if c != support and c not in trained]
        if not queries:
            raise InputError(
                "--query: the training saw every case but the support; name cases to evaluate on"
            )
    elif seen := [c for c in queries if c in trained]:
        notes.append(f"the training saw {', '.join(seen)} (other organs of them)")
    return organs, queries, notes


def _writable(path: Path) -> None:
    from ..files import check_writable

    check_writable(path)


def _named_html(path: Path, option: str) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option}: expected a name that ends in .html, got {path.name}")


def _free(path: Path, force: bool) -> None:
    """Refuse to replace a result unless told to."""
    from ..files import is_folder, look_up

    if look_up(path) is not None and not is_folder(path) and not force:
        raise InputError(f"{path}: already exists; give another --out, or --force to replace it")


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return a.absolute() == b.absolute()


# --- the way out ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words behind `lslpn`; default: those of the process.

    Returns:
        the exit code: 0, 1, 2 or 130 as the module's docstring has them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(words, debug)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a plain note, without the line of code that gave it."""
    say(f"note: {message}")


def _run(words: list[str], debug: bool) -> int:
    try:
        # Not standalone: errors come up to here, and one place decides how they read.
        code = typer.main.get_command(app).main(words, prog_name="lslpn", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except (KeyboardInterrupt, InterruptedByUserError, typer.Abort):
        if debug:
            traceback.print_exc()
        say("interrupted; nothing was left half-written")
        return 130
    except InputError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        return 2
    except OSError as error:
        # A path that the system does not take or give, wherever it was first used.
        if error.filename is None:
            return _unforeseen(error, debug)
        if debug:
            traceback.print_exc()
        say(
            f"error: {error.filename}: cannot be used ({error.strerror or error}); check the path "
            "and whether you may read and write there"
        )
        return 2
    except Exception as error:
        # Wrong options: typer has carried two classes of this name, so it is known by its shape.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "lslpn"
            # A group of commands without one has printed its help, and has nothing to add.
            if message := error.format_message().rstrip("."):
                say(f"error: {message}; see `{path} --help`")
            return 2
        return _unforeseen(error, debug)


def _unforeseen(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
        say(f"error: {type(error).__name__}: {error}")
    else:
        say(f"error: {type(error).__name__}: {error}; --debug shows where it happened")
    return 1
