"""`lslpn train`."""

from __future__ import annotations

from pathlib import Path

from ..config import Method
from ..errors import InputError
from ..files import is_file
from .options import (
    DATA,
    DEVICE,
    METHOD,
    PRESET,
    QUIET,
    Preset,
    option,
    settings_of,
    split,
    torch_device,
    trained_network,
)


def train(
    data: Path = DATA,
    out: Path = option("--out RUN", "Folder for checkpoint and log.", ...),
    hold_out: list[str] | None = option(
        "--hold-out ORGAN",
        "An organ that training must not see, to evaluate on it; repeat for more. Default: "
        "none, if the data set has no labels of the organ you want.",
    ),
    method: Method | None = METHOD,
    preset: Preset = PRESET,
    weights: str | None = option(
        "--weights NAME",
        "Start from a trained network: ct (the one that ships) or a file of lslpn.save_weights. "
        "Method and network settings are then those of the weights.",
    ),
    case: list[str] | None = option(
        "--cases CASE",
        "Cases to train on, repeated or with commas; default: all. Keep some for `lslpn evaluate`.",
    ),
    setting: list[str] | None = option(
        "--set NAME=VALUE",
        "Change one setting of the preset, such as --set size=257 --set steps=400; repeat for "
        "more.",
    ),
    resume: bool = option("--resume", "Continue the run in --out where it stopped.", False),
    device: str = DEVICE,
    quiet: bool = QUIET,
) -> None:
    """Train the network on episodes of all organs but those held out.

    Nothing is selected on held-out organs or other cases: the checkpoint is the last one.
    --resume continues a run that was stopped, to bitwise the same weights. Several GPUs
    share a batch with torchrun --nproc_per_node=N -m lslpn train.

    [bold]lslpn train --data DIR --hold-out liver --preset published --out RUN[/bold]
    """
    from dataclasses import replace

    from ..config import PRESETS, with_overrides
    from ..data.dataset import Dataset, UnlabelledScans
    from ..distributed import joined, world

    if hold_out and not split(hold_out):
        raise InputError("--hold-out: expected an organ, got none; leave it out to hold out none")
    with joined(device) as own:
        changes = settings_of(setting)
        if method is not None:
            changes["method"] = method
        config, model = PRESETS[preset], None
        if weights is not None:
            model = trained_network(weights)
            config = replace(config, model=model.config)
        config = with_overrides(config, **changes)
        if model is not None and config.model != model.config:
            raise InputError(
                f"--weights {weights}: has its own network, whose settings cannot be changed; "
                "leave out --method and every --set that describes the network"
            )
        plain = config.train.supervision == "superpixels" and not is_file(data / "dataset.json")
        dataset = UnlabelledScans.open(data) if plain else Dataset.open(data)
        held_out = split(hold_out, dataset.organs)
        for organ in held_out:
            dataset.label_of(organ)
        cases = split(case, dataset.cases) or list(dataset.cases)
        for name in cases:
            dataset.check_case(name)

        from ..runs import time_spent
        from ..training import train as run

        run(
            config,
            dataset,
            hold_out=held_out,
            cases=cases,
            out=out,
            resume=resume,
            device=torch_device(own),
            progress=not quiet,
            model=model,
        )
        if world().first:
            spent = time_spent(out)
            waited = f"; it waited for data {spent[1] / spent[0]:.1%} of the time" if spent else ""
            print(f"written: {out}{waited}")
