"""What the commands share: their common options, and how what is given is read."""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from ..errors import InputError

if TYPE_CHECKING:
    import torch


class Align(str, Enum):
    """How support and query are brought to lie alike."""

    none = "none"
    body = "body"


class SegmentAlign(str, Enum):
    """How `segment` brings supports to the query."""

    none = "none"
    body = "body"
    affine = "affine"
    deformable = "deformable"


class SegmentWeights(str, Enum):
    """The networks that come with the package."""

    ct = "ct"
    imagenet = "imagenet"


class ProtocolName(str, Enum):
    """The evaluation protocols; `lslpn.evaluation.protocols.PROTOCOLS` has what they do."""

    published = "published"
    senet = "senet"
    alpnet = "alpnet"
    adnet = "adnet"


class MethodName(str, Enum):
    """The few-shot networks; `lslpn.models` has them."""

    lslpn = "lslpn"
    panet = "panet"
    senet = "senet"
    alpnet = "alpnet"


class Preset(str, Enum):
    """The bundles of settings in `lslpn.config`."""

    paper = "paper"
    published = "published"


class InterruptedByUserError(Exception):
    """Ctrl-C, in a form that no version of typer turns into something else on its way up."""


_F = TypeVar("_F", bound=Callable[..., None])


class OneOfEach(TyperCommand):
    """A command that refuses two values for an option of one: the parser would take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option in given:
            single = not getattr(option, "multiple", True) and not getattr(option, "is_flag", True)
            if single and (count := given.count(option)) > 1:
                raise InputError(f"{option.opts[0]}: expected one, got {count}; give it once")
        return super().parse_args(ctx, args)


# Arguments of the library whose options are not called as they are, the likeliest first.
_OPTIONS = {
    "cases": ("--cases", "--train-cases"),
    "given": ("--run",),
    "hold_out": ("--hold-out", "--fold"),
    "organ_folds": ("--fold",),
    "organs": ("--organ", "--fold"),
    "parts": ("--folds",),
    "queries": ("--query", "--test-cases"),
    "test": ("--test-cases",),
    "train": ("--train-cases",),
}


def in_options(message: str, function: Callable[..., None], values: Sequence[object]) -> str:
    """A message of the library with the options of a command for the arguments that it names.

    Those are a word before a colon at its start, and what stands in backquotes, alone or with a
    value: `resume=True`.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = {
        option
        for hint in hints.values()
        for info in getattr(hint, "__metadata__", ())
        # In Annotated, typer has the first of the option's names as its default.
        for option in (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ()))
    }

    def option(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        names = _OPTIONS.get(name, (f"--{name.replace('_', '-')}",))
        # A file may be called as an option is.
        found = [] if match[1] in map(str, values) else [one for one in names if one in own]
        return found[0] if found else match[0]

    return re.sub(r"^(\w+)(?=: )|`(\w+)(?:=\w+)?`", option, message)


def command(function: _F) -> _F:
    """Make a function a command: Ctrl-C as one exception, the docstring as paragraphs, and the
    library's messages in the words of the command line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise InterruptedByUserError from interrupt
        except InputError as error:
            values = [*args, *kwargs.values()]
            raise InputError(in_options(str(error), function, values)) from error

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
NamesOption = Annotated[
    Path | None,
    typer.Option(
        "--names",
        metavar="JSON",
        help='Names of the organs for the page: a dataset.json, or any file with its "labels".',
        show_default=False,
    ),
]
_PRESET_HELP = "Settings: [bold]published[/bold], those of the authors' code, or [bold]paper[/bold]"
PresetOption = Annotated[Preset, typer.Option("--preset", help=f"{_PRESET_HELP}.")]
UntrainedPresetOption = Annotated[
    Preset | None,
    typer.Option(
        "--preset",
        help=f"{_PRESET_HELP}; of an untrained model, default: published.",
        show_default=False,
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
UntrainedSeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**63 - 1,
        help="Seed of an untrained model's reduction layer, default: 1234.",
        show_default=False,
    ),
]


def split(values: Sequence[str] | None, known: Collection[str] = ()) -> list[str]:
    """Repeated and comma-separated values as one list, each once.

    `known` are names that may hold commas themselves: the longest one is taken whole.
    """
    found: list[str] = []
    for value in values or ():
        parts = value.split(",")
        while parts:
            joined = (",".join(parts[:count]).strip() for count in range(len(parts), 0, -1))
            name = next((name for name in joined if name in known), parts[0].strip())
            found.append(name)
            del parts[: name.count(",") + 1]
    return list(dict.fromkeys(name for name in found if name))


def settings_of(values: Sequence[str] | None) -> dict[str, str]:
    """The NAME=VALUE pairs of --set."""
    settings: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set: expected NAME=VALUE such as steps=400, got {value!r}")
        name = name.strip().replace("-", "_")
        if name in settings:
            raise InputError(f"--set {name}: expected one value, got {value!r} as well; give one")
        settings[name] = rest.strip()
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
