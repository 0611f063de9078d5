"""The presets have the values of the paper and of the published code; options are parsed."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lslpn.config import PRESETS, Config, ModelConfig, TrainConfig, preset, with_overrides
from lslpn.errors import InputError


def test_presets_differ_exactly_where_the_paper_and_the_code_do() -> None:
    paper, published = preset("paper").to_dict(), preset("published").to_dict()
    differences = {
        name: (paper[group][name], published[group][name])
        for group in ("model", "train")
        for name in paper[group]
        if paper[group][name] != published[group][name]
    }
    assert differences == {
        "logit_scale": (1.0, 20.0),
        "min_pixels": (0, 10),
        "imagenet_normalisation": (True, False),
        "steps": (10_000, 2500),
        "milestones": ([2500, 5000, 7500], [800, 1600, 2400]),
        "slices_per_organ": (None, 5),
    }


def test_what_both_presets_have_in_common() -> None:
    for config in PRESETS.values():
        model, train = config.model, config.train
        assert (model.size, model.grid_scale, model.grid_spacing) == (512, 1 / 8, 1 / 2)
        assert (model.channels, model.dropout, model.batch_norm) == (256, 0.5, "live")
        assert (model.normalise, model.reduce) == ("slice", "max")
        assert (train.batch, train.lr, train.lr_decay) == (4, 1e-3, 0.1)
        assert (train.momentum, train.weight_decay, train.seed) == (0.9, 5e-4, 1234)
        assert (train.ways, train.shots) == (1, 1)
        augmentation = (train.augment_probability, train.augment_low, train.augment_high)
        assert augmentation == (0.5, 0.5, 2.0)
        assert train.ignore_index == 255
        assert (train.min_organ_pixels, train.subsample_above) == (150, 20)
        assert not train.drop_test_slices
        assert not train.amp


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trip_through_json(name: str) -> None:
    config = with_overrides(preset(name), window="-125,275", organs="liver,spleen", amp=True)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_dict(preset(name).to_dict()) == preset(name)


@given(
    steps=st.integers(1, 10**6),
    scale=st.floats(1e-3, 1.0),
    size=st.integers(32, 4096),
    live=st.booleans(),
)
def test_round_trip_for_any_values(steps: int, scale: float, size: int, live: bool) -> None:
    config = with_overrides(
        preset("published"),
        steps=steps,
        grid_scale=scale,
        size=size,
        batch_norm="live" if live else "frozen",
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.train.steps, config.model.grid_scale) == (steps, scale)


def test_no_name_is_both_a_model_and_a_train_option() -> None:
    names = [f.name for kind in (ModelConfig, TrainConfig) for f in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "given_value", "expected"),
    [
        ("size", "257", 257),
        ("grid_scale", "1/16", 1 / 16),
        ("logit_scale", 1, 1.0),
        ("window", "-125,275", (-125.0, 275.0)),
        ("window", "none", None),
        ("window", "auto", "auto"),
        ("slices_per_organ", "none", None),
        ("organs", "liver, spleen", ("liver", "spleen")),
        ("organs", ["liver"], ("liver",)),
        ("milestones", "100,200", (100, 200)),
        ("amp", "yes", True),
        ("drop_test_slices", "false", False),
        ("batch_norm", "frozen", "frozen"),
        ("seed", "7", 7),
        ("weights", "mine.pth", "mine.pth"),
    ],
)
def test_overrides_from_the_command_line(name: str, given_value: object, expected: object) -> None:
    config = with_overrides(preset("published"), **{name: given_value})
    group = config.model if hasattr(config.model, name) else config.train
    assert getattr(group, name) == expected
    assert type(getattr(group, name)) is type(expected)


def test_none_is_a_value_of_the_options_that_may_be_none() -> None:
    config = with_overrides(preset("published"), organs=["liver"], window=(0, 1))
    assert config.train.slices_per_organ == 5
    changed = with_overrides(config, slices_per_organ=None, organs=None, window=None)
    assert (changed.train.slices_per_organ, changed.train.organs) == (None, None)
    assert changed.model.window is None
    with pytest.raises(InputError, match=r"steps cannot be None; expected a whole number"):
        with_overrides(config, steps=None)


def test_alignment_belongs_to_the_model_and_is_read_from_earlier_versions() -> None:
    given_dict = with_overrides(preset("paper"), align="body").to_dict()
    assert given_dict["model"]["align"] == "body"
    given_dict["train"]["align"] = given_dict["model"].pop("align")
    assert Config.from_dict(given_dict).model.align == "body"


@pytest.mark.parametrize("broken", [[1], {"model": [1]}, {"train": None}])
def test_a_configuration_that_is_not_a_table(broken: object) -> None:
    with pytest.raises(InputError, match="must be a table of names"):
        Config.from_dict(broken)  # type: ignore[arg-type]


def test_steps_alone_move_the_milestones_and_given_milestones_stay() -> None:
    short = with_overrides(preset("published"), steps=250).train
    assert (short.steps, short.milestones) == (250, (80, 160, 240))
    both = with_overrides(preset("published"), steps=250, milestones=(100,)).train
    assert both.milestones == (100,)
    assert with_overrides(preset("published"), steps=2500).train.milestones == (800, 1600, 2400)
    assert with_overrides(preset("published"), steps=1).train.milestones == (1,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, r"no option 'stpes'.*'steps'"),
        ({"steps": "many"}, r"steps.*'many'.*whole number"),
        ({"steps": 1.5}, r"steps.*1\.5.*whole number"),
        ({"steps": 0}, r"steps.*1 or more.*0"),
        ({"lr": "-1"}, r"lr.*positive"),
        ({"lr": "nan"}, r"lr.*'nan'"),
        ({"grid_scale": 2}, r"grid_scale.*\(0, 1\].*2"),
        ({"grid_scale": "1/0"}, r"grid_scale.*'1/0'.*a number"),
        ({"batch_norm": "thawed"}, r"batch_norm.*'thawed'.*'live' or 'frozen'"),
        ({"window": "3"}, r"window.*'3'"),
        ({"window": "275,-125"}, r"window.*lower first"),
        ({"normalise": "window", "window": "none"}, r"window.*normalise is 'window'"),
        ({"amp": 3}, r"amp.*true or false"),
        ({"batch": True}, r"batch.*True.*whole number"),
        ({"accumulate": 3}, r"accumulate.*divisor of batch \(4\)"),
        ({"milestones": "200,100"}, r"milestones.*rising"),
        ({"size": 8}, r"size.*at least 32"),
        ({"ignore_index": 1}, r"ignore_index.*0 to 1"),
        ({"ignore_index": 2, "ways": 3}, r"ignore_index.*0 to 3"),
        ({"augment_low": 3}, r"augment_low.*augment_high"),
    ],
)
def test_bad_options_are_one_line_that_names_them(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        with_overrides(preset("published"), **values)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'publishd'.*'published'.*paper"):
        preset("publishd")


@pytest.mark.parametrize("group", ["model", "train", None])
def test_a_dict_with_an_unknown_name_is_refused(group: str | None) -> None:
    given_dict = preset("paper").to_dict()
    (given_dict if group is None else given_dict[group])["colour"] = 1
    with pytest.raises(InputError, match=re.escape("'colour'")):
        Config.from_dict(given_dict)
