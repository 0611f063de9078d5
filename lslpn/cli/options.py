"""Options that commands share, and their parsing."""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from ..config import Method
from ..errors import InputError
from ..files import check_writable, is_folder, look_up
from ..rules import number

if TYPE_CHECKING:
    import torch

    from lslpn_kernels import GridSpec

    from ..checkpoint import Checkpoint
    from ..models import FewShotNetwork

DEFAULT_SEED = 1234  # of an untrained model
Preset = Literal["paper", "published"]

_F = TypeVar("_F", bound=Callable[..., None])
_T = TypeVar("_T")


class InterruptedByUserError(Exception):
    """Ctrl-C, as an exception that no version of typer catches."""


class _OneOfEach(TyperCommand):
    """A command that refuses a repeated option unless it takes several values; click would use the
    last one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option in given:
            single = not getattr(option, "multiple", True) and not getattr(option, "is_flag", True)
            if single and (count := given.count(option)) > 1:
                raise InputError(f"{option.opts[0]}: expected one, got {count}; give it once")
        return super().parse_args(ctx, args)


# The options of library arguments whose name differs, the most likely one first.
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
    """Replace library arguments in a message with the options of a command.

    Arguments are a word before a colon at the start, and names in backquotes, which may have a
    value: `resume=True`. A word that is a path among the command's `values` is left as it is.
    """
    own = {
        name
        for parameter in signature(function).parameters.values()
        for name in getattr(parameter.default, "param_decls", None) or ()
    }

    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    paths = {str(one).rpartition("=")[2] for one in flat}  # of --run METHOD:FOLD:SEED=PATH as well

    def option(match: re.Match[str]) -> str:
        if match[1] in paths:
            return match[0]
        name = match[1] or match[2]
        names = _OPTIONS.get(name, (f"--{name.replace('_', '-')}",))
        return next((one for one in names if one in own), match[0])

    return re.sub(r"^(\w+)(?=: )|`(\w+)(?:=\w+)?`", option, message)


def group(help: str, **more: Any) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(
        help=help,
        rich_markup_mode="rich",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        **more,
    )


def command(app: typer.Typer) -> Callable[[_F], _F]:
    """Make a function a command of `app`, with its docstring as the help, one exception for Ctrl-C,
    and options in place of arguments in the library's messages."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            try:
                function(**values)
            except KeyboardInterrupt as interrupt:
                raise InterruptedByUserError from interrupt
            except InputError as error:
                message = in_options(str(error), function, list(values.values()))
                raise InputError(message) from error

        # typer would keep the line breaks within paragraphs.
        paragraphs = (function.__doc__ or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        app.command(function.__name__.replace("_", "-"), cls=_OneOfEach)(run)
        return function

    return decorate


def sharing(shared: type, function: Callable[..., _T]) -> Callable[..., _T]:
    """Turn a function of an instance of `shared`, a dataclass of options, and of further options
    into a function of all these options."""
    own = typing.get_type_hints(function, include_extras=True)
    common = typing.get_type_hints(shared, include_extras=True)
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=parameter.default, annotation=hint)
        for hints, source in ((own, function), (common, shared))
        for name, parameter in signature(source).parameters.items()
        if name != "given" and (hint := hints[name])
    ]

    def run(**values: Any) -> _T:
        given = shared(**{name: values.pop(name) for name in common})
        return function(given, **values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def option(declaration: str, help: str, default: Any = None, **more: Any) -> Any:
    """An option declared as "--out DIR", "--force" or "--quiet -q"; the default `...` makes it
    required."""
    words = declaration.split()
    names = [word for word in words if word.startswith("-")]
    # For flags some versions of typer would show <bool>, as if they took a value.
    metavar = words[-1] if words[-1] not in names else "" if default is False else None
    return typer.Option(default, *names, metavar=metavar, help=help, **more)


DATA = option(
    "--data DIR", "Data set in nnU-Net's raw layout: dataset.json, imagesTr, labelsTr.", ...
)
DEVICE = option("--device NAME", "auto (a GPU if there is one), cpu, or cuda[:N].", "auto")
FORCE = option("--force", "Replace existing results.", False)
QUIET = option("--quiet -q", "No progress bars.", False)
BATCH = option("--batch N", "Query slices encoded at once.", 8, min=1)
CHUNKS = option("--chunks N", "Parts of the organ's range; default: the protocol's.", min=1)
NAMES = option(
    "--names JSON",
    'Names of the organs for the page: a dataset.json, or any file with its "labels".',
)
_PRESET_HELP = "Settings: [bold]published[/bold], those of the authors' code, or [bold]paper[/bold]"
PRESET = option("--preset", f"{_PRESET_HELP}.", "published")
METHOD = option(
    "--method NAME",
    "The network: [bold]lslpn[/bold] (default), or one that the paper compares it with, "
    "[bold]panet[/bold], [bold]senet[/bold] or [bold]alpnet[/bold].",
)


def split(values: Sequence[str] | None, known: Collection[str] = ()) -> list[str]:
    """Repeated and comma-separated values as one list without duplicates.

    Names in `known` may contain commas: the longest match is not split.
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


def pairs(option: str, values: Sequence[str] | None, expected: str) -> dict[str, str]:
    """NAME=VALUE pairs with distinct names; `expected` is for the message."""
    found: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = (part.strip() for part in value.partition("="))
        if not equals or not name:
            raise InputError(f"{option}: expected {expected}, got {value!r}")
        if name in found:
            raise InputError(f"{option} {name}: expected one value, got {rest} as well; give one")
        found[name] = rest
    return found


def settings_of(values: Sequence[str] | None) -> dict[str, str]:
    """The NAME=VALUE pairs of --set."""
    parts = (value.partition("=") for value in values or ())
    texts = [name.replace("-", "_") + equals + rest for name, equals, rest in parts]
    return pairs("--set", texts, "NAME=VALUE such as steps=400")


def fraction(text: str, option: str) -> float:
    """A number in (0, 1], written as 1/8, 0.125 or 1."""
    try:
        value = number(text)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise InputError(
            f"{option}: expected a fraction above 0 and up to 1, such as 1/8, got {text!r}"
        )
    return value


def grid_of(text: str, spacing: float) -> GridSpec:
    """The grid of --scale SIZE or SIZE:SPACING."""
    from lslpn_kernels import GridSpec

    size, colon, own = text.partition(":")
    return GridSpec(fraction(size, "--scale"), fraction(own, "--scale") if colon else spacing)


def torch_device(name: str) -> torch.device:
    """The device of --device; InputError if it does not exist."""
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
    if device.type == "cuda":  # for the CPU, do not initialise CUDA
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device: {name} does not exist, torch finds {count} GPUs; use cpu, or see "
                "`lslpn info`"
            )
    return device


def check_new(path: Path, force: bool) -> None:
    """Refuse a result that already exists, unless `force`, or that cannot be written."""
    if look_up(path) is not None and not is_folder(path) and not force:
        raise InputError(f"{path}: already exists; give another --out, or --force to replace it")
    check_writable(path)


def check_ending(path: Path, name: str, *endings: str) -> None:
    """Refuse a result with another ending."""
    if not path.name.lower().endswith(endings):
        raise InputError(
            f"{name}: expected a name that ends in {' or '.join(endings)}, got {path.name}"
        )


@dataclass(frozen=True)
class Network:
    """The options that choose the network, for `sharing`."""

    checkpoint: Path | None = option(
        "--checkpoint RUN",
        "A trained model: the folder that `lslpn train` wrote, or a checkpoint file.",
    )
    weights: str | None = option(
        "--weights NAME",
        "Without a checkpoint: ct (trained on CT scans without labels, the default of `lslpn "
        "segment`), imagenet (before training), or a file of lslpn.save_weights.",
    )
    preset: Preset | None = option(
        "--preset", f"{_PRESET_HELP}; for an untrained model, default: published."
    )
    size: int | None = option(
        "--size PIXELS",
        "Side of the square that slices are resized to; default: the model's.",
        min=32,
    )
    seed: int | None = option(
        "--seed N",
        "Seed of an untrained model's reduction layer, default: 1234.",
        min=0,
        max=2**63 - 1,
    )
    device: str = DEVICE

    def __post_init__(self) -> None:
        """Refuse unknown weights, and options of an untrained network with a trained one."""
        options = {"--weights": self.weights, "--preset": self.preset, "--seed": self.seed}
        given = [name for name, value in options.items() if value is not None]
        if self.checkpoint is not None and given:
            raise InputError(
                f"{given[0]}: a checkpoint has its own; leave out {given[0]} or --checkpoint"
            )
        if self.weights in (None, "imagenet"):
            return
        if len(given) > 1:
            raise InputError(
                f"--weights {self.weights}: --preset and --seed describe an untrained network; "
                "leave them out, or give --weights imagenet"
            )
        if self.weights != "ct" and not self.weights.endswith(".safetensors"):
            raise InputError(
                "--weights: expected ct, imagenet or a file that ends in .safetensors, got "
                f"{self.weights}"
            )

    @property
    def _seed(self) -> int:
        return DEFAULT_SEED if self.seed is None else self.seed

    def load(
        self, *, untrained: bool = False, method: Method | None = None
    ) -> tuple[FewShotNetwork, Checkpoint | None]:
        """The network, ready to run, and its checkpoint, if it has one.

        Without any option it is the network that ships, unless `untrained`.
        """
        import dataclasses

        from .. import models
        from ..checkpoint import load_checkpoint, restored
        from ..config import preset

        where, trained = torch_device(self.device), None
        untrained = untrained or self.weights == "imagenet"
        if self.checkpoint is not None:
            trained = load_checkpoint(self.checkpoint)
            model = restored(trained, self.checkpoint)
        elif untrained or self.preset is not None or self.seed is not None:
            config = preset(self.preset or "published", method=method or "lslpn")
            model = models.untrained(config, seed=self._seed)
        else:
            model = trained_network(self.weights or "ct")
        if self.size is not None:
            # Only the resizing of the input changes: the network accepts any size.
            model.config = dataclasses.replace(model.config, size=self.size)
        return model.to(where), trained

    def name(self, method: Method | None) -> str:
        """The name of the network in results."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        if self.weights is not None:
            return f"weights {self.weights}"
        which = "" if method is None else f"{method}, "
        return f"untrained ({which}{self.preset or 'published'}, seed {self._seed})"


def trained_network(weights: str) -> FewShotNetwork:
    """The network of --weights, `ct` or a file."""
    from ..checkpoint import load_model, pretrained

    return pretrained() if weights == "ct" else load_model(weights)


def say(line: str) -> None:
    """Print a line to stderr."""
    print(f"lslpn: {' '.join(line.split())}", file=sys.stderr, flush=True)
