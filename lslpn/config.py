"""All settings of a run, as three frozen dataclasses, and the presets.

`paper` follows the text of the paper, `published` the code of its authors. Where the text gives no
value, `paper` has the published one unless a comment says otherwise. The differences:

| | paper | published |
|---|---|---|
| a window counts as empty | without a pixel of the mask | with at most 10 pixels |
| logits | the cosine | 20 x the cosine |
| steps x batch | 10,000 x 4 | 2,500 x 4 (10,000 episodes) |
| learning rate 1e-3, x 0.1 at step | 2500, 5000, 7500 | 800, 1600, 2400 |
| training slices | every one that shows the organ on over 150 pixels | the same, but only 5 \
random ones per organ and scan if over 20 qualify |
| input | grey repeated 3 times, ImageNet mean and deviation | grey repeated 3 times |

In common: 512 x 512, scale 1/8, spacing 1/2, max over overlapping windows, ResNet-50, SGD with
momentum 0.9 and weight decay 5e-4, gamma, contrast and brightness each with probability 0.5 and a
factor uniform in 0.5 .. 2, cross-entropy that ignores label 255, live batch-norm statistics with
frozen affine parameters, seed 1234, 1 way and 1 shot. The paper does not say which checkpoint it
used, and the published code chose one on the test volumes; here it is always the last one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .errors import InputError
from .rules import Rule, at_least, check, check_names, coerce, hints, require

# Choices that several modules and the command line share.
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
    """Settings of the network and its input, which a checkpoint stores for its user."""

    method: Method = "lslpn"
    """The network: "lslpn", or one that the paper compares with; see `lslpn.models`. The settings
    of windows, logits and prototypes below apply only to LSLPN."""
    size: Annotated[int, at_least(32, "at least {} pixels")] = 512
    """Pixels along the side of the square that slices are resized to."""
    normalise: Literal["slice", "volume", "window"] = "slice"
    """How grey values are scaled to [0, 1]: by the minimum and maximum of each slice or of the
    volume, or by the window."""
    window: Annotated[
        Literal["auto"] | tuple[float, float] | None,
        Rule(
            "'auto', 'none' or two grey values, the lower first",
            lambda value: value == "auto" or (not isinstance(value, str) and value[0] < value[1]),
        ),
    ] = "auto"
    """Grey values are clipped to this range first. "auto" is -125 .. 275 for CT in HU, as in the
    few-shot papers on abdominal CT, and no clipping for anything else; None is no clipping."""
    align: Align = "none"
    """"body" crops each scan to the body's bounding box before resizing."""
    imagenet_normalisation: bool = False
    """Subtract ImageNet's mean and divide by its deviation, as when the weights were trained."""
    grid_scale: _Share = 1 / 8
    """Side of a window over the side of the image: the paper's alpha."""
    grid_spacing: _Share = 1 / 2
    """Distance of neighbouring windows over the side of a window; 1 for no overlap."""
    reduce: Literal["max", "mean"] = "max"
    """How the cosines of the windows over a pixel are reduced to one score."""
    logit_scale: _Positive = 20.0
    """Factor on the cosine."""
    min_pixels: Annotated[int, at_least(0)] = 10
    """A window with no more mask pixels than this has a zero prototype."""
    channels: _Count = 256
    """Features per location."""
    dropout: _BelowOne = 0.5
    """Probability of Dropout2d after the reduction layer, in training."""
    batch_norm: BatchNormMode = "live"
    """"live": training uses the statistics of the batch and updates the running ones; "frozen":
    the stored statistics are always used."""
    stride_on: StrideOn = "1x1"
    """The convolution that has a stage's stride: "1x1" for the shipped weights, "3x3" for
    torchvision's. The tensors have the same shapes, so weights load with the wrong choice, but the
    network works worse."""
    weights: str = "imagenet"
    """Initial weights of the trunk: "imagenet" (shipped), "random", or a state dict file with
    torchvision's names (.safetensors, .pt, .pth)."""

    def __post_init__(self) -> None:
        check(self)
        given = self.normalise != "window" or self.window is not None
        require(given, self, "window", "two grey values or 'auto' if normalise is 'window'")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training, which the user of a finished checkpoint does not need."""

    steps: _Count = 2500
    """Gradient steps."""
    batch: _Count = 4
    """Episodes per gradient step."""
    lr: _Positive = 1e-3
    """Initial learning rate."""
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
    """The learning rate of the reduction layer, which starts from noise, as a multiple of lr."""
    momentum: _BelowOne = 0.9
    weight_decay: _NotNegative = 5e-4
    seed: Annotated[
        int, Rule("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
    ] = 1234
    """The seed of slices, episodes, augmentation, dropout and the reduction layer."""
    ways: _Count = 1
    """Classes per episode, N, each with its own support slices."""
    shots: _Count = 1
    """Support slices per class."""
    queries: _Count = 1
    """Query slices per episode."""
    supervision: Literal["labels", "superpixels"] = "labels"
    """What an episode's classes are: the data set's organs or, as ALPNet was published, regions of
    similar grey values in single slices, without any label; see `superpixels`."""
    organs: Annotated[
        tuple[str, ...] | None, Rule("None or some names", lambda value: len(value) > 0)
    ] = None
    """Organs to train on; None: every organ of the data set that is not held out."""
    drop_test_slices: bool = False
    """Setting II: exclude every slice that shows ANY held-out organ. False is Setting I."""
    min_organ_pixels: Annotated[int, at_least(0)] = 150
    """A slice qualifies for an organ with more than this many pixels, counted at 512 x 512
    (scaled by area at other sizes)."""
    slices_per_organ: Annotated[int | None, at_least(1, "None or {} or more")] = 5
    """How many random slices to keep of an organ in a scan, if more than `subsample_above` qualify;
    None keeps all."""
    subsample_above: _Count = 20
    max_position_gap: _Probability = 1 / 12
    """Support and query slices differ by at most this in relative position (0 to 1) within the
    organ's range of their scans; if no slice is that near, the nearest one is used."""
    augment_probability: _Probability = 0.5
    """Probability of each of gamma, contrast and brightness, per slice."""
    augment_low: float = 0.5
    augment_high: float = 2.0
    """Range of the factors of augmentation."""
    ignore_index: int = 255
    """Label of pixels without loss."""
    alignment_weight: _NotNegative = 1.0
    """Weight of the prototype alignment loss of PANet and ALPNet; the other methods have none."""
    accumulate: _Count = 1
    """The number of parts in which a batch is run, one after the other, to save memory."""
    amp: bool = False
    """Run the encoder in bfloat16 (autocast); head and loss stay in float32."""
    channels_last: bool = True
    """Memory layout of the encoder: faster on most devices; results are equal up to rounding."""
    compile: bool = False
    """Compile the convolutions with torch.compile: takes a minute or more at the start, makes
    steps faster; results are equal up to rounding."""
    log_every: _Count = 10
    """Steps between lines of the log, and between checks of the loss for NaN."""
    checkpoint_every: _Count = 100
    """Steps between checkpoints; the last step always writes one."""

    def __post_init__(self) -> None:
        check(self)
        divides = self.batch % self.accumulate == 0
        require(divides, self, "accumulate", f"a divisor of batch ({self.batch})")
        one_way = self.supervision == "labels" or self.ways == 1
        require(one_way, self, "ways", "1 with superpixels, of which an episode has one")
        rising = 0 < self.augment_low <= self.augment_high
        expected = f"positive and at most augment_high ({self.augment_high})"
        require(rising, self, "augment_low", expected)
        expected = f"different from the labels of the classes, 0 to {self.ways}"
        require(not 0 <= self.ignore_index <= self.ways, self, "ignore_index", expected)


@dataclass(frozen=True)
class Config:
    """All settings of a run; `with_overrides` changes single values."""

    preset: str = "published"
    """The preset that it started from, for the record."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        ways, shots = self.train.ways, self.train.shots
        if self.model.method == "senet" and (ways, shots) != (1, 1):
            raise InputError(
                f"The method senet is for 1 way and 1 shot, not {ways} and {shots}; set both to 1, "
                "or choose another method."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; missing values take their defaults.

        Raises:
            InputError: an unknown name, or a value of the wrong type.
        """
        _check_table(given, "configuration")
        check_names(given, {"preset", "model", "train"}, "configuration")
        values: dict[str, Any] = {}
        for group in ("model", "train"):
            table = given.get(group, {})
            _check_table(table, f"configuration {group}")
            # By name, whatever the group: earlier versions had `align` in "train".
            values.update(table)
        return _replaced(cls(preset=str(given.get("preset", "published"))), values)


PRESETS: dict[str, Config] = {
    "paper": Config(
        preset="paper",
        model=ModelConfig(
            min_pixels=0,
            logit_scale=1.0,
            # Not in the text, but its weights are ImageNet's, which expect this input.
            imagenet_normalisation=True,
        ),
        train=TrainConfig(
            steps=10_000,
            milestones=(2500, 5000, 7500),
            # Not in the text; "65 silver corpus scans for training" suggests that all are used.
            slices_per_organ=None,
        ),
    ),
    "published": Config(preset="published"),
}


def _check_table(given: Any, what: str) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"The {what} must be a table of names, not {given!r}.")


def preset(name: str, **values: Any) -> Config:
    """A preset by its name, with single values replaced as in `with_overrides`.

    Raises:
        InputError: an unknown name, and as `with_overrides`.
    """
    check_names({name: None}, set(PRESETS), "preset")
    return with_overrides(PRESETS[name], **values)


def with_overrides(config: Config, **values: Any) -> Config:
    """A copy of `config` with single values of its ModelConfig and TrainConfig replaced.

    Values may be strings, as on the command line: "257", "1/16", "true", "none", or a list with
    commas, "100,200".

    If `steps` is changed and `milestones` is not, the milestones move in proportion, so that a
    shorter run still has the whole schedule.

    Raises:
        InputError: an unknown name, or a value of the wrong type or range.
    """
    changed = _replaced(config, values)
    before, train = config.train, changed.train
    if "milestones" not in values and train.steps != before.steps:
        share = train.steps / before.steps
        moved = {max(1, round(m * share)) for m in before.milestones}
        changed = _replaced(changed, {"milestones": sorted(moved)})
    return changed


# The group and type of every option; no name is in both groups.
_OPTIONS = {
    name: (group, kind)
    for group, config in (("model", ModelConfig), ("train", TrainConfig))
    for name, kind in hints(config).items()
}


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    check_names(values, set(_OPTIONS), "option")
    changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for name, value in values.items():
        group, kind = _OPTIONS[name]
        changes[group][name] = coerce(name, value, kind)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes["model"]),
        train=dataclasses.replace(config.train, **changes["train"]),
    )
