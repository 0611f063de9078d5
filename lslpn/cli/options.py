"""What the commands share: their common options, and how what is given is read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import InputError

if TYPE_CHECKING:
    import torch


class Align(str, Enum):
    """How support and query are brought to lie alike."""

    none = "none"
    body = "body"


class ProtocolName(str, Enum):
    """The evaluation protocols; `lslpn.protocols.PROTOCOLS` has what they do."""

    published = "published"
    senet = "senet"
    alpnet = "alpnet"
    adnet = "adnet"


class MethodName(str, Enum):
    """The few-shot networks; `lslpn.methods` has them."""

    lslpn = "lslpn"
    panet = "panet"
    senet = "senet"
    alpnet = "alpnet"


class Preset(str, Enum):
    """The bundles of settings in `lslpn.presets`."""

    paper = "paper"
    published = "published"


class InterruptedByUserError(Exception):
    """Ctrl-C, in a form that no version of typer turns into something else on its way up."""


_F = TypeVar("_F", bound=Callable[..., None])


def command(function: _F) -> _F:
    """Make a function a command: Ctrl-C as one exception, the docstring as paragraphs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise InterruptedByUserError from interrupt

    # Line breaks of the source would otherwise be kept within paragraphs.
    paragraphs = (function.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return run  # type: ignore[return-value]


DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Data set in nnU-Net's raw layout: dataset.json, imagesTr, labelsTr.",
        show_default=False,
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="RUN",
        help="A trained model: the folder that `lslpn train` wrote, or a checkpoint file.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto (a GPU if there is one), cpu, or cuda[:N]."
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace results that are already there.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
SizeOption = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="PIXELS",
        min=32,
        help="Side of the square that slices are resized to; default: the model's own.",
        show_default=False,
    ),
]
PresetOption = Annotated[
    Preset,
    typer.Option(
        "--preset",
        help="Settings: [bold]published[/bold], those of the authors' code, or [bold]paper[/bold].",
    ),
]
MethodOption = Annotated[
    MethodName | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="The network: [bold]lslpn[/bold] (default), or one that the paper compares it with, "
        "[bold]panet[/bold], [bold]senet[/bold] or [bold]alpnet[/bold].",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, help="Seed of an untrained model's reduction layer."
    ),
]


def split(values: Sequence[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list, each once."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def settings_of(values: Sequence[str] | None) -> dict[str, str]:
    """The NAME=VALUE pairs of --set."""
    settings: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set: expected NAME=VALUE such as steps=400, got {value!r}")
        settings[name.strip().replace("-", "_")] = rest.strip()
    return settings


def fraction(text: str, option: str) -> float:
    """1/8, 0.125 or 1 as a number in (0, 1]."""
    from fractions import Fraction

    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise InputError(
            f"{option}: expected a fraction above 0 and up to 1, such as 1/8, got {text!r}"
        )
    return value


def torch_device(name: str) -> torch.device:
    """What --device names; InputError where it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = InputError(f"--device: expected auto, cpu or cuda[:N], got {name!r}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise wrong from error
    if device.type not in ("cpu", "cuda"):
        raise wrong
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device: {name} is not there, torch finds {count} GPUs; "
                "take cpu, or see `lslpn info`"
            )
    return device


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(f"lslpn: {' '.join(line.split())}", file=sys.stderr, flush=True)
