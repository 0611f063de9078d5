"""Every number of a run, in three frozen dataclasses, and the presets that bundle them.

`paper` follows the words of the paper, `published` the code its authors put out. They differ as
follows; where the paper is silent its preset takes the published value, unless a comment beside
the value says otherwise.

| | paper | published |
|---|---|---|
| a window counts as empty | without a pixel of the mask | with at most 10 pixels |
| logits | the cosine | 20 x the cosine |
| steps x batch | 10,000 x 4 | 2,500 x 4 (10,000 episodes) |
| learning rate 1e-3, x 0.1 at step | 2500, 5000, 7500 | 800, 1600, 2400 |
| training slices | every one that shows the organ on over 150 pixels | the same, but 5 random \
ones per organ and scan where over 20 qualify |
| input | grey repeated 3 times, ImageNet mean and deviation | grey repeated 3 times |

In common: 512 x 512, scale 1/8, spacing 1/2, max over overlapping windows, ResNet-50, SGD with
momentum 0.9 and weight decay 5e-4, gamma, contrast and brightness each with probability 0.5 and a
factor uniform in 0.5 .. 2, cross-entropy that ignores label 255, live batch-norm statistics with
frozen affine parameters, seed 1234, 1 way and 1 shot. The paper's checkpoint is not said and the
published one was chosen on the test volumes; ours is the last one in both presets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import InputError

Method = Literal["lslpn", "panet", "senet", "alpnet"]
StrideOn = Literal["1x1", "3x3"]
BatchNormMode = Literal["live", "frozen"]


def _require(ok: bool, name: str, expected: str, given: object) -> None:
    if not ok:
        raise InputError(f"The option {name} must be {expected}; {given!r} was given.")


@dataclass(frozen=True)
class ModelConfig:
    """What makes the network and its input, and so what a checkpoint fixes for its user."""

    method: Method = "lslpn"
    """The network: "lslpn", or one that the paper compares with; see `lslpn.models`. What is said
    below of windows, logits and prototypes is LSLPN's; the other methods have their own."""
    size: int = 512
    """Pixels along the side of the square that slices are resized to."""
    normalise: Literal["slice", "volume", "window"] = "slice"
    """How grey values come to [0, 1]: min-max of each slice, of the volume, or the window."""
    window: Literal["auto"] | tuple[float, float] | None = "auto"
    """Grey values are limited to this range first. "auto" is -125 .. 275 for CT in HU, as the
    few-shot papers on abdominal CT have it, and no limit for anything else; None is no limit."""
    align: Literal["none", "body"] = "none"
    """"body" crops each scan to the body's box before resizing."""
    imagenet_normalisation: bool = False
    """Subtract ImageNet's mean and divide by its deviation, as the weights were trained."""
    grid_scale: float = 1 / 8
    """Side of a window as a share of the image's: the paper's alpha."""
    grid_spacing: float = 1 / 2
    """Distance of neighbouring windows as a share of a window's side; 1 for no overlap."""
    reduce: Literal["max", "mean"] = "max"
    """How the cosines of the windows over a pixel become one score."""
    logit_scale: float = 20.0
    """Factor on the cosine."""
    min_pixels: int = 10
    """A window with no more mask pixels than this gives a zero prototype."""
    channels: int = 256
    """Features per location."""
    dropout: float = 0.5
    """Probability of Dropout2d behind the reduction layer, in training."""
    batch_norm: BatchNormMode = "live"
    """"live": statistics of the batch in training; "frozen": always the stored ones."""
    stride_on: StrideOn = "1x1"
    """Convolution with a stage's stride: "1x1" for the shipped weights, "3x3" for torchvision's."""
    weights: str = "imagenet"
    """What the trunk starts from: "imagenet" (shipped), "random", or a state dict file."""

    def __post_init__(self) -> None:
        methods = typing.get_args(Method)
        _require(self.method in methods, "method", f"one of {', '.join(methods)}", self.method)
        _require(self.size >= 32, "size", "at least 32 pixels", self.size)
        _require(
            self.normalise in ("slice", "volume", "window"),
            "normalise",
            "'slice', 'volume' or 'window'",
            self.normalise,
        )
        _require(
            self.window is None
            or self.window == "auto"
            or (not isinstance(self.window, str) and self.window[0] < self.window[1]),
            "window",
            "'auto', 'none' or two grey values, the lower first",
            self.window,
        )
        _require(
            self.normalise != "window" or self.window is not None,
            "window",
            "given when normalise is 'window'",
            self.window,
        )
        _require(self.align in ("none", "body"), "align", "'none' or 'body'", self.align)
        _require(0 < self.grid_scale <= 1, "grid_scale", "in (0, 1]", self.grid_scale)
        _require(0 < self.grid_spacing <= 1, "grid_spacing", "in (0, 1]", self.grid_spacing)
        _require(self.reduce in ("max", "mean"), "reduce", "'max' or 'mean'", self.reduce)
        _require(self.logit_scale > 0, "logit_scale", "positive", self.logit_scale)
        _require(self.min_pixels >= 0, "min_pixels", "0 or more", self.min_pixels)
        _require(self.channels >= 1, "channels", "1 or more", self.channels)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(
            self.batch_norm in ("live", "frozen"),
            "batch_norm",
            "'live' or 'frozen'",
            self.batch_norm,
        )
        _require(self.stride_on in ("1x1", "3x3"), "stride_on", "'1x1' or '3x3'", self.stride_on)


@dataclass(frozen=True)
class TrainConfig:
    """What a training run does; none of it matters to a finished checkpoint's user."""

    steps: int = 2500
    """Gradient steps."""
    batch: int = 4
    """Episodes per gradient step."""
    lr: float = 1e-3
    """Learning rate at the start."""
    milestones: tuple[int, ...] = (800, 1600, 2400)
    """Steps at which the learning rate is multiplied by lr_decay."""
    lr_decay: float = 0.1
    reduction_lr_factor: float = 1.0
    """The reduction layer, which starts from noise, learns at this multiple of lr."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 1234
    """Of the slices, the episodes, the augmentation, dropout and the reduction layer."""
    ways: int = 1
    """Classes per episode, N; each has its own support slices."""
    shots: int = 1
    """Support slices per class."""
    queries: int = 1
    """Query slices per episode."""
    supervision: Literal["labels", "superpixels"] = "labels"
    """Where an episode's classes come from: the data set's organs, or, as ALPNet was published,
    regions of alike grey values in single slices, without any label; see `superpixels`."""
    organs: tuple[str, ...] | None = None
    """Organs to train on; None: every organ of the data set that is not held out."""
    drop_test_slices: bool = False
    """Setting II: leave out every slice that shows ANY held-out organ. False is Setting I."""
    min_organ_pixels: int = 150
    """A slice qualifies for an organ with more than this many pixels, counted at 512 x 512
    (scaled by area at other sizes)."""
    slices_per_organ: int | None = 5
    """How many random ones to keep of an organ's slices in a scan; None keeps all ..."""
    subsample_above: int = 20
    """... and only when more than this many qualify."""
    max_position_gap: float = 1 / 12
    """Support and query slice differ by at most this in relative position (0 to 1) within the
    organ's range of their scans; the nearest one where none does."""
    augment_probability: float = 0.5
    """Of each of gamma, contrast and brightness, per slice."""
    augment_low: float = 0.5
    augment_high: float = 2.0
    """Range of the augmentations' factors."""
    ignore_index: int = 255
    """Label without loss."""
    alignment_weight: float = 1.0
    """Factor of the prototype alignment loss of PANet and ALPNet; the other methods have none."""
    accumulate: int = 1
    """Parts that a batch is run in, one after the other, to save memory."""
    amp: bool = False
    """Run the encoder in bfloat16 (autocast); the head and the loss stay in float32."""
    channels_last: bool = True
    """Memory layout of the encoder: faster on most devices, equal to rounding."""
    compile: bool = False
    """Let torch.compile make the convolutions' code: a minute or more at the start, faster steps
    after it, equal to rounding."""
    log_every: int = 10
    """Steps between lines of the log; the loss is looked at for NaN as often."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "ways",
            "shots",
            "queries",
            "accumulate",
            "log_every",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            _require(value >= 1, name, "1 or more", value)
        _require(
            self.accumulate <= self.batch and self.batch % self.accumulate == 0,
            "accumulate",
            f"a divisor of batch ({self.batch})",
            self.accumulate,
        )
        _require(
            self.supervision in ("labels", "superpixels"),
            "supervision",
            "'labels' or 'superpixels'",
            self.supervision,
        )
        _require(
            self.supervision == "labels" or self.ways == 1,
            "ways",
            "1 with superpixels, one of which is an episode's class",
            self.ways,
        )
        _require(0 < self.lr < math.inf, "lr", "a positive number", self.lr)
        _require(
            list(self.milestones) == sorted(set(self.milestones))
            and all(m >= 1 for m in self.milestones),
            "milestones",
            "steps in rising order",
            self.milestones,
        )
        _require(0 < self.lr_decay <= 1, "lr_decay", "in (0, 1]", self.lr_decay)
        _require(
            self.reduction_lr_factor > 0,
            "reduction_lr_factor",
            "positive",
            self.reduction_lr_factor,
        )
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2^63 - 1", self.seed)
        _require(
            self.organs is None or len(self.organs) > 0, "organs", "None or some names", self.organs
        )
        _require(self.min_organ_pixels >= 0, "min_organ_pixels", "0 or more", self.min_organ_pixels)
        _require(
            self.slices_per_organ is None or self.slices_per_organ >= 1,
            "slices_per_organ",
            "None or 1 or more",
            self.slices_per_organ,
        )
        _require(self.subsample_above >= 1, "subsample_above", "1 or more", self.subsample_above)
        _require(
            0 <= self.max_position_gap <= 1, "max_position_gap", "in [0, 1]", self.max_position_gap
        )
        _require(
            0 <= self.augment_probability <= 1,
            "augment_probability",
            "in [0, 1]",
            self.augment_probability,
        )
        _require(
            0 < self.augment_low <= self.augment_high,
            "augment_low",
            f"positive and at most augment_high ({self.augment_high})",
            self.augment_low,
        )
        _require(
            not 0 <= self.ignore_index <= self.ways,
            "ignore_index",
            f"another value than the labels of the classes, 0 to {self.ways}",
            self.ignore_index,
        )
        _require(self.alignment_weight >= 0, "alignment_weight", "0 or more", self.alignment_weight)


@dataclass(frozen=True)
class Config:
    """A whole run. `with_overrides` changes single values, `to_dict` makes it JSON."""

    preset: str = "published"
    """The preset it started from, for the record."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        one_shot = self.train.ways == self.train.shots == 1
        _require(
            one_shot or self.model.method != "senet",
            "method",
            f"another than 'senet', which is for 1 way and 1 shot, with {self.train.ways} ways and "
            f"{self.train.shots} shots",
            self.model.method,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, ready for JSON."""
        return {
            "preset": self.preset,
            "model": _plain(self.model),
            "train": _plain(self.train),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; values that are left out take their defaults.

        Raises:
            InputError: an unknown name, or a value of the wrong kind.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"The configuration must be a table of names; {given!r} was given.")
        _known(given, {"preset", "model", "train"}, "configuration")
        model, train = (_table(given, name) for name in ("model", "train"))
        if "align" in train:  # where earlier versions had it
            model.setdefault("align", train.pop("align"))
        return cls(
            preset=str(given.get("preset", "published")),
            model=_from_plain(ModelConfig, model),
            train=_from_plain(TrainConfig, train),
        )


_PUBLISHED = Config(preset="published")

_PAPER = Config(
    preset="paper",
    model=ModelConfig(
        min_pixels=0,
        logit_scale=1.0,
        # Not said. ImageNet weights are the paper's, and this is the input they were trained on.
        imagenet_normalisation=True,
    ),
    train=TrainConfig(
        steps=10_000,
        milestones=(2500, 5000, 7500),
        # Not said; "65 silver corpus scans for training" suggests that nothing was left out.
        slices_per_organ=None,
    ),
)

PRESETS: dict[str, Config] = {"paper": _PAPER, "published": _PUBLISHED}


def preset(name: str) -> Config:
    """The preset of that name.

    Raises:
        InputError: there is none.
    """
    _known({name: None}, set(PRESETS), "preset")
    return PRESETS[name]


def with_overrides(config: Config, **values: Any) -> Config:
    """A copy of `config` with single values replaced, by the names of ModelConfig and TrainConfig.

    Values may be strings, as a command line has them: "257", "1/16", "true", "none", and lists
    with commas, "100,200". None, or the string "none", is a value like any other, of the options
    that may be None.

    Where `steps` is changed and `milestones` is not, the milestones move in proportion, so that a
    shorter run still sees the whole schedule.

    Raises:
        InputError: an unknown name, or a value of the wrong kind or range.
    """
    groups: dict[str, type] = {"model": ModelConfig, "train": TrainConfig}
    owner = {f.name: g for g, kind in groups.items() for f in dataclasses.fields(kind)}
    _known(values, set(owner), "option")
    changes: dict[str, dict[str, Any]] = {g: {} for g in groups}
    for name, value in values.items():
        kind = typing.get_type_hints(groups[owner[name]])[name]
        changes[owner[name]][name] = _coerce(name, value, kind)
    train = changes["train"]
    if "steps" in train and "milestones" not in train and train["steps"] != config.train.steps:
        share = train["steps"] / config.train.steps
        moved = {max(1, round(m * share)) for m in config.train.milestones}
        train["milestones"] = tuple(sorted(moved))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes["model"]),
        train=dataclasses.replace(config.train, **train),
    )


def _plain(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }


_T = typing.TypeVar("_T", ModelConfig, TrainConfig)


def _table(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = given.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"The configuration {name} must be a table of names; got {table!r}.")
    return dict(table)


def _from_plain(kind: type[_T], given: Mapping[str, Any]) -> _T:
    hints = typing.get_type_hints(kind)
    _known(given, set(hints), "option")
    values: dict[str, Any] = {k: _coerce(k, v, hints[k]) for k, v in given.items()}
    return kind(**values)


def _known(given: Mapping[str, Any], names: set[str], what: str) -> None:
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"There is no {what} {name!r}. {hint}Known are: {', '.join(sorted(names))}."
            )


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value`, perhaps a string of the command line, as the type that the field is declared to."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = InputError(f"The option {name} cannot be {value!r}; expected {_words(kind)}.")
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or str(value).lower() == "none"):
            return None
        for inner in args:
            if inner is not type(None):
                with contextlib.suppress(InputError):
                    return _coerce(name, value, inner)
        raise wrong
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise wrong
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise wrong
        return tuple(_coerce(name, part, args[0]) for part in value)
    if kind is str:
        return str(value)
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise wrong
    if isinstance(value, bool):
        raise wrong
    try:
        if isinstance(value, str):
            numerator, _, denominator = value.partition("/")
            number = float(numerator) / float(denominator or 1)
            value = int(value) if kind is int else number
        number = kind(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise wrong from error
    if not math.isfinite(number) or (kind is int and number != value):
        raise wrong
    return number


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("'none'" if a is type(None) else _words(a) for a in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"{_words(args[0])}, several with commas"
        return f"{len(args)} values with a comma, each {_words(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
