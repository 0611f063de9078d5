"""All settings of a run, in three frozen dataclasses, and the presets.

`paper` follows the text of the paper, `published` the code of its authors. They differ as follows;
where the text gives no value, `paper` has the published one, unless a comment beside it says
otherwise.

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

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .errors import InputError
from .rules import Rule, at_least, check, coerce, hints, known, require

# The choices of more than one module, and of the command line, which takes them from here.
Method = Literal["lslpn", "panet", "senet", "alpnet"]
Protocol = Literal["published", "senet", "alpnet", "adnet"]
Align = Literal["none", "body"]
Classes = Literal["all", "tested", "none"]
StrideOn = Literal["1x1", "3x3"]
BatchNormMode = Literal["live", "frozen"]


_Count = Annotated[int, at_least(1)]
_Share = Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)]
_Probability = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]
_BelowOne = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]
_Positive = Annotated[float, Rule("a positive number", lambda value: 0 < value < math.inf)]
_NotNegative = Annotated[float, at_least(0)]


@dataclass(frozen=True)
class ModelConfig:
    """What makes the network and its input, and so what a checkpoint fixes for its user."""

    method: Method = "lslpn"
    """The network: "lslpn", or one that the paper compares with; see `lslpn.models`. What is said
    below of windows, logits and prototypes is LSLPN's; the other methods have their own."""
    size: Annotated[int, at_least(32, "at least {} pixels")] = 512
    """Pixels along the side of the square that slices are resized to."""
    normalise: Literal["slice", "volume", "window"] = "slice"
    """How grey values come to [0, 1]: min-max of each slice, of the volume, or the window."""
    window: Annotated[
        Literal["auto"] | tuple[float, float] | None,
        Rule(
            "'auto', 'none' or two grey values, the lower first",
            lambda value: value == "auto" or (not isinstance(value, str) and value[0] < value[1]),
        ),
    ] = "auto"
    """Grey values are limited to this range first. "auto" is -125 .. 275 for CT in HU, as the
    few-shot papers on abdominal CT have it, and no limit for anything else; None is no limit."""
    align: Align = "none"
    """"body" crops each scan to the body's box before resizing."""
    imagenet_normalisation: bool = False
    """Subtract ImageNet's mean and divide by its deviation, as the weights were trained."""
    grid_scale: _Share = 1 / 8
    """Side of a window as a share of the image's: the paper's alpha."""
    grid_spacing: _Share = 1 / 2
    """Distance of neighbouring windows as a share of a window's side; 1 for no overlap."""
    reduce: Literal["max", "mean"] = "max"
    """How the cosines of the windows over a pixel become one score."""
    logit_scale: _Positive = 20.0
    """Factor on the cosine."""
    min_pixels: Annotated[int, at_least(0)] = 10
    """A window with no more mask pixels than this gives a zero prototype."""
    channels: _Count = 256
    """Features per location."""
    dropout: _BelowOne = 0.5
    """Probability of Dropout2d after the reduction layer, in training."""
    batch_norm: BatchNormMode = "live"
    """"live": statistics of the batch in training, and the running ones are updated; "frozen":
    always the stored ones."""
    stride_on: StrideOn = "1x1"
    """Convolution with a stage's stride: "1x1" for the shipped weights, "3x3" for torchvision's.
    The tensors have the same shapes, so the wrong choice loads, and merely works worse."""
    weights: str = "imagenet"
    """What the trunk starts from: "imagenet" (shipped), "random", or a state dict file with
    torchvision's names (.safetensors, .pt, .pth)."""

    def __post_init__(self) -> None:
        check(self)
        given = self.normalise != "window" or self.window is not None
        require(given, self, "window", "given when normalise is 'window'")


@dataclass(frozen=True)
class TrainConfig:
    """What a training run does; none of it matters to a finished checkpoint's user."""

    steps: _Count = 2500
    """Gradient steps."""
    batch: _Count = 4
    """Episodes per gradient step."""
    lr: _Positive = 1e-3
    """Learning rate at the start."""
    milestones: Annotated[
        tuple[int, ...],
        Rule(
            "steps in rising order",
            lambda value: list(value) == sorted(set(value)) and all(m >= 1 for m in value),
        ),
    ] = (800, 1600, 2400)
    """Steps at which the learning rate is multiplied by lr_decay."""
    lr_decay: _Share = 0.1
    reduction_lr_factor: _Positive = 1.0
    """The reduction layer, which starts from noise, learns at this multiple of lr."""
    momentum: _BelowOne = 0.9
    weight_decay: _NotNegative = 5e-4
    seed: Annotated[
        int, Rule("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
    ] = 1234
    """Of the slices, the episodes, the augmentation, dropout and the reduction layer."""
    ways: _Count = 1
    """Classes per episode, N; each has its own support slices."""
    shots: _Count = 1
    """Support slices per class."""
    queries: _Count = 1
    """Query slices per episode."""
    supervision: Literal["labels", "superpixels"] = "labels"
    """Where an episode's classes come from: the data set's organs, or, as ALPNet was published,
    regions of similar grey values in single slices, without any label; see `superpixels`."""
    organs: Annotated[
        tuple[str, ...] | None, Rule("None or some names", lambda value: len(value) > 0)
    ] = None
    """Organs to train on; None: every organ of the data set that is not held out."""
    drop_test_slices: bool = False
    """Setting II: leave out every slice that shows ANY held-out organ. False is Setting I."""
    min_organ_pixels: Annotated[int, at_least(0)] = 150
    """A slice qualifies for an organ with more than this many pixels, counted at 512 x 512
    (scaled by area at other sizes)."""
    slices_per_organ: Annotated[int | None, at_least(1, "None or {} or more")] = 5
    """How many random ones to keep of an organ's slices in a scan; None keeps all ..."""
    subsample_above: _Count = 20
    """... and only when more than this many qualify."""
    max_position_gap: _Probability = 1 / 12
    """Support and query slice differ by at most this in relative position (0 to 1) within the
    organ's range of their scans; the nearest one where none does."""
    augment_probability: _Probability = 0.5
    """Of each of gamma, contrast and brightness, per slice."""
    augment_low: float = 0.5
    augment_high: float = 2.0
    """Range of the augmentations' factors."""
    ignore_index: int = 255
    """Label without loss."""
    alignment_weight: _NotNegative = 1.0
    """Factor of the prototype alignment loss of PANet and ALPNet; the other methods have none."""
    accumulate: _Count = 1
    """Parts that a batch is run in, one after the other, to save memory."""
    amp: bool = False
    """Run the encoder in bfloat16 (autocast); the head and the loss stay in float32."""
    channels_last: bool = True
    """Memory layout of the encoder: faster on most devices, equal to rounding."""
    compile: bool = False
    """Let torch.compile make the convolutions' code: a minute or more at the start, faster steps
    after it, equal to rounding."""
    log_every: _Count = 10
    """Steps between lines of the log; the loss is looked at for NaN as often."""
    checkpoint_every: _Count = 100
    """Steps between checkpoints; the last step always writes one."""

    def __post_init__(self) -> None:
        check(self)
        divides = self.batch % self.accumulate == 0
        require(divides, self, "accumulate", f"a divisor of batch ({self.batch})")
        one_way = self.supervision == "labels" or self.ways == 1
        require(one_way, self, "ways", "1 with superpixels, one of which is an episode's class")
        rising = 0 < self.augment_low <= self.augment_high
        expected = f"positive and at most augment_high ({self.augment_high})"
        require(rising, self, "augment_low", expected)
        expected = f"another value than the labels of the classes, 0 to {self.ways}"
        require(not 0 <= self.ignore_index <= self.ways, self, "ignore_index", expected)


@dataclass(frozen=True)
class Config:
    """A whole run. `with_overrides` changes single values, `to_dict` makes it JSON."""

    preset: str = "published"
    """The preset it started from, for the record."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        ways, shots = self.train.ways, self.train.shots
        expected = "another than 'senet', which is for 1 way and 1 shot, with "
        expected += f"{ways} ways and {shots} shots"
        fits = self.model.method != "senet" or ways == shots == 1
        require(fits, self.model, "method", expected)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; values that are left out take their defaults.

        Raises:
            InputError: an unknown name, or a value of the wrong kind.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"The configuration must be a table of names; {given!r} was given.")
        known(given, {"preset", "model", "train"}, "configuration")
        values: dict[str, Any] = {}
        for group in ("model", "train"):
            table = given.get(group, {})
            if not isinstance(table, Mapping):
                raise InputError(
                    f"The configuration {group} must be a table of names; got {table!r}."
                )
            # By name: earlier versions had `align` among those of training.
            values.update(table)
        return _replaced(cls(preset=str(given.get("preset", "published"))), values)


PRESETS: dict[str, Config] = {
    "paper": Config(
        preset="paper",
        model=ModelConfig(
            min_pixels=0,
            logit_scale=1.0,
            # Not said. ImageNet weights are the paper's, and this is the input they expect.
            imagenet_normalisation=True,
        ),
        train=TrainConfig(
            steps=10_000,
            milestones=(2500, 5000, 7500),
            # Not said; "65 silver corpus scans for training" suggests that nothing was left out.
            slices_per_organ=None,
        ),
    ),
    "published": Config(preset="published"),
}


def preset(name: str, **values: Any) -> Config:
    """The preset of that name, with single values replaced as `with_overrides` does.

    Raises:
        InputError: there is none; and as `with_overrides`.
    """
    known({name: None}, set(PRESETS), "preset")
    return with_overrides(PRESETS[name], **values) if values else PRESETS[name]


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
    changed = _replaced(config, values)
    before, train = config.train, changed.train
    if "milestones" not in values and train.steps != before.steps:
        share = train.steps / before.steps
        moved = {max(1, round(m * share)) for m in before.milestones}
        changed = _replaced(changed, {"milestones": sorted(moved)})
    return changed


# Every option's group and type; no name is in both groups.
_OPTIONS = {
    name: (group, kind)
    for group, config in (("model", ModelConfig), ("train", TrainConfig))
    for name, kind in hints(config).items()
}


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    known(values, set(_OPTIONS), "option")
    changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for name, value in values.items():
        group, kind = _OPTIONS[name]
        changes[group][name] = coerce(name, value, kind)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes["model"]),
        train=dataclasses.replace(config.train, **changes["train"]),
    )
