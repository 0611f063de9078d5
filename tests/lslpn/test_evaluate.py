"""The evaluation: protocols checked by hand, and scores that can be counted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lslpn.config import ModelConfig
from lslpn.data.dataset import Dataset
from lslpn.errors import InputError
from lslpn.evaluation.protocols import PROTOCOLS, Pair, areas, protocol_of
from lslpn.evaluation.results import (
    Evaluation,
    Row,
    Skipped,
    dice,
    fraction,
    render_table,
    save,
    summary,
)
from lslpn.evaluation.scoring import evaluate, evaluate_grids
from lslpn.models import LSLPN, untrained
from lslpn_kernels import GridSpec, LocalPrototypeHead


def organ_on(length: int, **runs: int) -> np.ndarray:
    """Areas per slice: organ_on(30, _3_27=300) has 300 pixels on slices 3 to 27."""
    found = np.zeros(length, int)
    for name, value in runs.items():
        first, last = (int(part) for part in name.strip("_").split("_"))
        found[first : last + 1] = value
    return found


# --- protocols ------------------------------------------------------------------------------


def test_published_cuts_both_ranges_into_twelve_and_takes_the_middle_slices() -> None:
    # Over 200 pixels on 3..27; 27 is dropped, so 24 slices, 12 chunks of 2: the upper middle.
    support = organ_on(30, _1_29=150, _3_27=300)
    # Over 200 pixels on 40..76; 76 is dropped, so 36 slices, 12 chunks of 3.
    query = organ_on(100, _35_80=200, _40_76=201)
    pairs = PROTOCOLS["published"].pairs(support, query)
    assert [p.support for p in pairs] == [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26]
    assert pairs[0] == Pair(4, (40, 41, 42))
    assert pairs[11] == Pair(26, (73, 74, 75))


def test_published_with_three_chunks() -> None:
    pairs = protocol_of("published", 3).pairs(organ_on(10, _0_9=999), organ_on(7, _0_6=999))
    # Support: 9 slices 0..8, thirds of 3, middles 1, 4, 7. Query: 6 slices, halves of 2.
    assert pairs == [Pair(1, (0, 1)), Pair(4, (2, 3)), Pair(7, (4, 5))]


def test_an_organ_of_fewer_slices_than_chunks_uses_each_slice_once() -> None:
    pairs = PROTOCOLS["published"].pairs(organ_on(30, _0_24=999), organ_on(9, _2_5=999))
    # Three slices 2, 3, 4; their centres are at 2/12, 6/12 and 10/12: chunks 2, 6 and 10.
    assert pairs == [Pair(5, (2,)), Pair(13, (3,)), Pair(21, (4,))]


def test_a_single_slice_is_not_dropped() -> None:
    pairs = protocol_of("published", 1).pairs(organ_on(9, _4_4=999), organ_on(9, _7_7=999))
    assert pairs == [Pair(4, (7,))]


def test_published_skips_a_gap_in_the_support_organ() -> None:
    # 12 slices from 0 to 11 without the last; the middle is 6, and 8 is nearer than 3.
    support = organ_on(20, _0_3=999, _8_12=999)
    assert protocol_of("published", 1).support_slices(support) == [8]


def test_areas_are_counted_in_pixels_of_512_by_512() -> None:
    labels = np.zeros((2, 512, 512), np.uint8)
    labels[0, 0, :200] = 3
    labels[1, 0, :9] = 2
    assert areas(labels, 3).tolist() == [200, 0]
    # 200 pixels of 512 x 512 are 50.4 of 257 x 257.
    small = np.zeros((12, 257, 257), np.uint8)
    small[:, 0, :50] = 1
    small[4:9, 0, 50] = 1
    assert protocol_of("published", 1).query_groups(areas(small, 1)) == [(4, 5, 6, 7)]


def test_senet_has_nine_groups_and_a_single_last_slice() -> None:
    pairs = PROTOCOLS["senet"].pairs(organ_on(60, _0_50=10, _20_39=11), organ_on(20, _0_19=1))
    # round(linspace(0, 19, 10)) = 0 2 4 6 8 11 13 15 17 19
    assert [p.queries for p in pairs] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9, 10),
        (11, 12),
        (13, 14),
        (15, 16),
        (17, 18),
        (19,),
    ]
    # 20 support slices in 10 parts of 2; slices with exactly 10 pixels do not count.
    assert [p.support for p in pairs] == [21, 23, 25, 27, 29, 31, 33, 35, 37, 39]


def test_alpnet_takes_a_sixth_a_half_and_five_sixths() -> None:
    pairs = PROTOCOLS["alpnet"].pairs(organ_on(30, _10_21=1), organ_on(30, _5_13=1))
    # 12 support slices: positions 2, 6 and 10. 9 query slices: parts of 3.
    assert pairs == [Pair(12, (5, 6, 7)), Pair(16, (8, 9, 10)), Pair(20, (11, 12, 13))]


def test_adnet_segments_the_whole_query_with_one_slice() -> None:
    pairs = PROTOCOLS["adnet"].pairs(organ_on(30, _10_20=1), organ_on(6, _2_3=5))
    assert pairs == [Pair(15, (0, 1, 2, 3, 4, 5))]


def test_how_the_authors_average_and_normalise() -> None:
    assert {n: p.average for n, p in PROTOCOLS.items()} == {
        "published": "mean",
        "senet": "median",
        "alpnet": "mean",
        "adnet": "mean",
    }
    assert [n for n, p in PROTOCOLS.items() if p.normalise == "volume"] == ["senet"]
    assert {n: p.chunks for n, p in PROTOCOLS.items()} == {
        "published": 12,
        "senet": 10,
        "alpnet": 3,
        "adnet": 1,
    }


@pytest.mark.parametrize("name", ["published", "senet", "alpnet"])
@given(
    chunks=st.integers(1, 20),
    support=st.lists(st.integers(0, 400), min_size=1, max_size=60),
    query=st.lists(st.integers(0, 400), min_size=1, max_size=60),
)
def test_every_slice_of_the_range_is_segmented_once(
    name: str, chunks: int, support: list[int], query: list[int]
) -> None:
    rule = protocol_of(name, chunks)
    pairs = rule.pairs(np.array(support), np.array(query))
    threshold = 200 if name == "published" else 0
    shown = [z for z, a in enumerate(query) if a > threshold]
    least = {"published": 200, "senet": 10, "alpnet": 0}[name]
    if not shown or not any(a > least for a in support):
        assert pairs == []
        return
    span = list(range(shown[0], shown[-1] + 1))
    if name == "published" and len(span) > 1:
        span.pop()
    assert [z for p in pairs for z in p.queries] == span
    supports = [p.support for p in pairs]
    assert supports == sorted(supports)
    assert all(support[z] > least for z in supports)


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(InputError, match="published, senet, alpnet, adnet, got 'alp'"):
        protocol_of("alp")
    with pytest.raises(InputError, match="chunks: expected 1 or more, got 0"):
        protocol_of("published", 0)
    with pytest.raises(InputError, match="one support slice for the whole volume, got 12"):
        protocol_of("adnet", 12)
    assert protocol_of("adnet", 1).chunks == 1


# --- scores ---------------------------------------------------------------------------------


def test_dice_by_hand() -> None:
    a, b = np.array([1, 1, 1, 0], bool), np.array([0, 1, 1, 1], bool)
    assert dice(a, b) == pytest.approx(2 * 2 / 6)
    assert dice(a, ~a) == 0.0
    assert dice(a, a) == 1.0
    assert dice(a & False, b & False) == 1.0
    with pytest.raises(ValueError, match="expected the shape of truth"):
        dice(a, b[:2])


class Bright(LSLPN):
    """An encoder with known features: (1, 0) for bright pixels, (0, 1) for dark ones."""

    def __init__(self, size: int, grid: GridSpec) -> None:
        nn.Module.__init__(self)  # without the encoder
        self.parameter = nn.Parameter(torch.zeros(1))
        self.config = ModelConfig(size=size, min_pixels=0, weights="random", window=None)
        self.head = LocalPrototypeHead(grid)
        self.encoded = 0

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return torch.stack((images, 1 - images), dim=-3)


SIDE = 32


def volume(path: Path, data: np.ndarray, dtype: type) -> None:
    """[Z, Y, X] in display orientation, written in RAS order."""
    path.parent.mkdir(exist_ok=True, parents=True)
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(data.transpose(2, 1, 0).astype(dtype), affine), path)


def box(slices: range, y: int, x: int, side: int = 8, depth: int = 12) -> np.ndarray:
    found = np.zeros((depth, SIDE, SIDE), bool)
    found[slices.start : slices.stop, y : y + side, x : x + side] = True
    return found


@pytest.fixture
def squares(tmp_path: Path) -> Dataset:
    """Bright squares on black: `a` is the support, `b` the same, `c` moved by 4 pixels, `d`
    with a second square outside the organ's range, `e` without the organ."""
    organ = box(range(2, 10), 8, 8)
    moved = box(range(2, 10), 8, 12)
    other = box(range(11, 12), 8, 8, side=4)
    empty = np.zeros_like(organ)
    cases = {
        "a": (organ, organ),
        "b": (organ, organ),
        "c": (moved, moved),
        "d": (organ | other, organ),
        "e": (other, empty),
    }
    for name, (bright, labels) in cases.items():
        # A corner that is bright on every slice, so that min-max does not change dark slices.
        image = bright.astype(float) * 100
        image[:, -1, -1] = 100
        volume(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", image, np.float32)
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz", labels, np.uint8)
    meta = {"name": "squares", "labels": {"background": 0, "square": 1, "nothing": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps({**meta, "file_ending": ".nii.gz"}))
    return Dataset.open(tmp_path)


def run(dataset: Dataset, queries: str, grid: GridSpec, **options: object) -> Evaluation:
    return evaluate(
        Bright(SIDE, grid),  # type: ignore[arg-type]
        dataset,
        support="a",
        queries=list(queries),
        organs=["square"],
        progress=False,
        **options,  # type: ignore[arg-type]
    )


def test_an_identical_query_is_segmented_exactly(squares: Dataset) -> None:
    found = run(squares, "b", GridSpec(1 / 4, 1))
    # 8 slices, and the last one of the published protocol is dropped: 7 x 64 voxels.
    assert found.rows == (Row("square", "b", 1.0, 7, 7 * 64, 7 * 64),)


def test_local_prototypes_apply_within_their_windows_only(squares: Dataset) -> None:
    # The square is moved by half its width. The global prototype finds it; windows of 8 pixels
    # without overlap find it only where the support has it: half of the square.
    # The bright corner is far from the support's organ: 7 pixels with the global one only.
    whole = run(squares, "c", GridSpec(1, 1)).mean("square")
    assert whole == pytest.approx(2 * 448 / (448 + 448 + 7))
    local = run(squares, "c", GridSpec(1 / 4, 1))
    assert local.rows[0].predicted_voxels == 7 * 32
    assert local.mean("square") == pytest.approx(2 * 32 / (32 + 64))
    # Overlapping windows reach 4 pixels further, over the whole square.
    assert run(squares, "c", GridSpec(1 / 4, 1 / 2)).mean("square") == pytest.approx(1.0)


def test_only_adnet_counts_what_is_found_outside_the_organ(squares: Dataset) -> None:
    grid = GridSpec(1 / 4, 1)
    assert run(squares, "d", grid, protocol="published").mean() == pytest.approx(1.0)
    assert run(squares, "d", grid, protocol="alpnet").rows[0].slices == 8
    whole = run(squares, "d", grid, protocol="adnet").rows[0]
    assert whole.slices == 12
    assert whole.predicted_voxels == 8 * 64 + 16
    assert whole.dice == pytest.approx(2 * 512 / (512 + 16 + 512))


def test_examples_do_not_keep_volumes_in_memory(squares: Dataset) -> None:
    (example,) = run(squares, "b", GridSpec(1, 1)).examples
    arrays = [value for value in vars(example).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 5
    assert all(array.base is None for array in arrays)


def test_a_query_without_the_organ_is_skipped_and_reported(squares: Dataset) -> None:
    found = run(squares, "bec", GridSpec(1, 1))
    assert [row.case for row in found.rows] == ["b", "c"]
    assert found.skipped == (Skipped("square", "e", "its labels do not show the organ"),)
    assert "skipped: square in e" in found.table()
    assert found.to_dict()["skipped"][0]["case"] == "e"


def test_support_and_query_of_different_sizes(squares: Dataset) -> None:
    # A pixel of the support's 32 x 32 is above the threshold of 200 in 512 x 512, one of the
    # query's 64 x 64 is not: each counts in its own size.
    support = box(range(6, 12), 8, 8)
    support[:6, 8, 8] = True
    query = support.repeat(2, axis=1).repeat(2, axis=2)
    query[:, 0, 0] = True
    query[:2] = False
    query[:2, 0, 0] = True
    for name, bright in (("a", support), ("b", query)):
        image = bright.astype(float)
        image[:, -1, -1] = 1
        volume(squares.root / "imagesTr" / f"{name}_0000.nii.gz", image, np.float32)
        volume(squares.root / "labelsTr" / f"{name}.nii.gz", bright, np.uint8)
    rows = run(squares, "b", GridSpec(1, 1)).rows
    # Slices 2 to 11 show 4 pixels and more besides the corner; the last one is dropped.
    assert rows[0].slices == 9
    assert rows[0].truth_voxels == 4 * 5 + 5 * (256 + 1)


def test_grids_share_the_encoder_and_agree_with_one_at_a_time(squares: Dataset) -> None:
    grids = [GridSpec(1, 1), GridSpec(1 / 4, 1), GridSpec(1 / 4, 1 / 2)]
    model = Bright(SIDE, grids[0])
    together = evaluate_grids(
        model,
        squares,
        grids=grids,
        support="a",
        queries=["b", "c"],
        organs=["square"],
        batch=3,
        progress=False,
    )
    # 7 slices of the support, and 7 of each query, once.
    assert model.encoded == 7 + 2 * 7
    for grid, result in zip(grids, together, strict=True):
        assert result.rows == run(squares, "bc", grid).rows
        assert (result.scale, result.spacing) == (grid.scale, grid.spacing)


def test_the_batch_size_changes_nothing(squares: Dataset) -> None:
    grid = GridSpec(1 / 4, 1 / 2)
    assert run(squares, "cd", grid, batch=1).rows == run(squares, "cd", grid, batch=100).rows


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_unchanged(squares: Dataset, training: bool) -> None:
    model = Bright(SIDE, GridSpec(1, 1)).train(training)
    modes = []
    encode = model.encode
    model.encode = lambda x: (modes.append(model.training), encode(x))[1]  # type: ignore
    evaluate(
        model,
        squares,
        support="a",
        queries=["b"],
        organs=["square"],
        progress=False,
    )
    assert not any(modes)
    assert modes
    assert model.training is training


def test_predictions_are_those_of_the_model(synthetic_dataset: Path) -> None:
    """Against the forward pass of the network, pair by pair."""
    dataset = Dataset.open(synthetic_dataset)
    model = untrained(ModelConfig(size=64, min_pixels=0, window=None), seed=1)
    found = evaluate(
        model,
        dataset,
        support="syn_00",
        queries=["syn_01"],
        organs=["liver"],
        protocol="alpnet",
        progress=False,
    )
    assert found.rows[0].dice == pytest.approx(by_forward(model, dataset), abs=1e-3)
    assert 0.2 < found.rows[0].dice < 1


def by_forward(model: LSLPN, dataset: Dataset) -> float:
    from lslpn.data.slices import prepare

    sets = []
    for case in ("syn_00", "syn_01"):
        image, labels = dataset.load(case)
        sets.append((prepare(ModelConfig(size=64, window=None), image, labels), labels.data == 1))
    (support, support_truth), (query, query_truth) = sets
    assert support.labels is not None
    pairs = PROTOCOLS["alpnet"].pairs(support_truth.sum((1, 2)), query_truth.sum((1, 2)))
    predicted = np.zeros(query.slices.shape, np.uint8)
    covered = []
    for pair in pairs:
        for z in pair.queries:
            with torch.no_grad():
                logits = model(
                    torch.from_numpy(support.slices[pair.support])[None, None],
                    torch.from_numpy((support.labels[pair.support] == 1).astype(np.float32))[
                        None, None, None
                    ],
                    torch.from_numpy(query.slices[z])[None, None],
                )
            predicted[z] = logits[0, 0].argmax(0).numpy()
            covered.append(z)
    return dice(query.restore(predicted)[covered] > 0, query_truth[covered])


def test_dice_is_taken_in_the_files_own_grid(synthetic_dataset: Path) -> None:
    dataset = Dataset.open(synthetic_dataset)
    model = untrained(ModelConfig(size=48), seed=1)
    found = evaluate(
        model,
        dataset,
        support="syn_00",
        queries=["syn_01", "syn_02"],
        organs=["liver", "spleen"],
        protocol="adnet",
        align="body",
        progress=False,
    )
    for row in found.rows:
        truth = dataset.load_labels(row.case).data
        assert row.truth_voxels == (truth == dataset.label_of(row.organ)).sum()
        assert row.slices == len(truth)


# --- ignored voxels, small organs, alignment ------------------------------------------------


def relabelled(dataset: Dataset, **values: int) -> Dataset:
    path = dataset.root / "dataset.json"
    meta = json.loads(path.read_text())
    meta["labels"] = {"background": 0, **values}
    path.write_text(json.dumps(meta))
    return Dataset.open(dataset.root)


def test_voxels_with_the_ignore_label_are_not_scored(synthetic_dataset: Path) -> None:
    dataset = relabelled(Dataset.open(synthetic_dataset), liver=1, spleen=2, ignore=3)
    model = untrained(ModelConfig(size=64, min_pixels=0), seed=1)
    # A network that finds the organ everywhere: its result in ignored voxels must not count.
    model.match = lambda features, support, size: torch.tensor([0.0, 1.0])[
        None, None, :, None, None
    ].expand(1, features.shape[1], 2, *size)  # type: ignore[method-assign]
    found = evaluate(
        model,
        dataset,
        support="syn_00",
        queries=["syn_01"],
        organs=["liver"],
        protocol="adnet",
        progress=False,
    )
    truth = dataset.load_labels("syn_01").data
    known, liver = int((truth != 3).sum()), int((truth == 1).sum())
    assert (truth == 3).any()
    assert found.rows[0].predicted_voxels == known
    assert found.rows[0].dice == pytest.approx(2 * liver / (known + liver))
    with pytest.raises(InputError, match="organ 'ignore'"):
        dataset.label_of("ignore")


@pytest.mark.parametrize("method", ["lslpn", "panet"])
def test_an_organ_too_small_for_the_networks_size_is_skipped_and_reported(
    synthetic_dataset: Path, tmp_path: Path, method: str
) -> None:
    # A single voxel, which contains no pixel centre of the network's square.
    for path in (synthetic_dataset / "labelsTr").iterdir():
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        place = np.argwhere(data == 3)[0]
        data[data == 3] = 0
        data[tuple(place)] = 3
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    dataset = Dataset.open(synthetic_dataset)
    config = ModelConfig(size=32, method=method, min_pixels=10)  # type: ignore[arg-type]
    options = {"support": "syn_00", "queries": ["syn_01"], "protocol": "adnet", "progress": False}
    model = untrained(config, seed=1)
    found = evaluate(model, dataset, organs=["liver", "kidney"], **options)  # type: ignore[arg-type]
    lost = "the support shows too little of it for 32 x 32 pixels"
    assert [(row.organ, row.case) for row in found.rows] == [("liver", "syn_01")]
    assert [(s.organ, s.case) for s in found.skipped] == [("kidney", "syn_01")]
    assert found.skipped[0].reason.startswith(lost)
    assert math.isnan(found.mean("kidney"))
    assert lost in found.table()


def test_support_slices_on_which_an_organ_is_too_small_are_named(squares: Dataset) -> None:
    for case in "ab":
        path = squares.root / "labelsTr" / f"{case}.nii.gz"
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        kept = np.argwhere(data[..., 3])
        data[..., 3] = 0
        data[(*kept[0], 3)] = 1  # a window with one pixel counts as empty
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    grids = [GridSpec(1, 1), GridSpec(1 / 4, 1)]
    model = untrained(ModelConfig(size=32, min_pixels=1, channels=8, weights="random"))
    with pytest.warns(UserWarning, match=r"support a shows too little of square .* slice 3:"):
        evaluate_grids(
            model,  # type: ignore[arg-type]
            squares,
            grids=grids,
            support="a",
            queries=["b"],
            organs=["square"],
            protocol="alpnet",
            chunks=7,
            progress=False,
        )


def test_figures_of_two_grids_when_one_skips_an_organ(tmp_path: Path, squares: Dataset) -> None:
    found = run(squares, "bc", GridSpec(1 / 4, 1))
    without = dataclasses.replace(found, rows=found.rows[1:], examples=found.examples[1:])
    for pair in ([found, without], [without, found]):
        names = [path.name for path in save(pair, tmp_path)]
        assert names == ["evaluation.json", "b.png", "c.png"]


def test_scans_are_aligned_as_the_model_was_trained(synthetic_dataset: Path) -> None:
    dataset = Dataset.open(synthetic_dataset)
    options = {"support": "syn_00", "queries": ["syn_01"], "organs": ["liver"], "progress": False}
    by_default = {}
    for own in ("none", "body"):
        model = untrained(ModelConfig(size=48, align=own), seed=1)  # type: ignore[arg-type]
        by_default[own] = evaluate(model, dataset, **options)  # type: ignore[arg-type]
        assert by_default[own].align == own
        for align in ("none", "body"):
            given_align = evaluate(model, dataset, align=align, **options)  # type: ignore[arg-type]
            assert given_align.align == align
    assert by_default["none"].rows != by_default["body"].rows


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": "z"}, "case 'z'"),
        ({"queries": ["b", "z"]}, "case 'z'"),
        ({"queries": ["b", "a"]}, "a is the support"),
        ({"queries": []}, "queries: expected at least one"),
        ({"organs": []}, "organs: expected at least one"),
        ({"organs": "square"}, "organs: expected a list of names, got 'square'"),
        ({"queries": "b"}, "queries: expected a list of names, got 'b'"),
        ({"organs": ["sqare"]}, "did you mean 'square'"),
        ({"organs": ["square", "nothing"]}, r"a\.nii\.gz: the support a does not show enough of"),
        ({"support": "e", "queries": ["b"]}, r"e\.nii\.gz: the support e does not show enough of"),
        ({"protocol": "none"}, "protocol: expected one of"),
        ({"align": "organ"}, "align must be 'none' or 'body'"),
        ({"chunks": -1}, "chunks: expected 1 or more"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    squares: Dataset, change: dict[str, object], message: str
) -> None:
    options: dict[str, object] = {"support": "a", "queries": ["b"], "organs": ["square"]}
    with pytest.raises(InputError, match=message):
        evaluate(
            Bright(SIDE, GridSpec(1, 1)),  # type: ignore[arg-type]
            squares,
            progress=False,
            **{**options, **change},  # type: ignore[arg-type]
        )


# --- results --------------------------------------------------------------------------------


def example() -> Evaluation:
    scores = {("liver", "p"): 0.5, ("liver", "q"): 0.6, ("liver", "r"): 1.0, ("spleen", "p"): 0.25}
    return Evaluation(
        dataset="D",
        model="m",
        support="s",
        queries=("p", "q", "r"),
        organs=("liver", "spleen", "aorta"),
        protocol="senet",
        average="median",
        chunks=10,
        align="none",
        size=257,
        scale=1 / 8,
        spacing=1 / 2,
        seconds=1.0,
        rows=tuple(Row(o, c, d, 1, 1, 1) for (o, c), d in scores.items()),
    )


def test_means_and_medians_by_hand() -> None:
    found = example()
    assert found.mean("liver") == pytest.approx(0.7)
    assert found.median("liver") == pytest.approx(0.6)
    assert math.isnan(found.mean("aorta"))
    assert found.mean() == pytest.approx((0.7 + 0.25) / 2)
    assert found.headline() == pytest.approx((0.6 + 0.25) / 2)
    assert dataclasses.replace(found, average="mean").headline() == pytest.approx(found.mean())


def test_json_is_valid_and_tables_have_every_score() -> None:
    found = example()
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["mean"]["aorta"] is None
    assert read["median"]["all"] == pytest.approx(found.median())
    assert [row["dice"] for row in read["rows"]] == [0.5, 0.6, 1.0, 0.25]
    table = found.table()
    assert "scale 1/8, spacing 1/2" in table
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:] if line.split()}
    assert lines["liver"] == ["0.500", "0.600", "1.000", "0.700", "0.600"]
    assert lines["spleen"] == ["0.250", "-", "-", "0.250", "0.250"]
    assert lines["aorta"] == ["-"] * 5
    marked = found.table(markdown=True)
    assert "| liver  | 0.500 | 0.600 | 1.000 | 0.700 |  0.600 |" in marked
    assert "| 1/8   |" in summary([found], markdown=True)
    named = render_table("", [""], [["[bold]a :smile: [/none]"]], False)
    assert "[bold]a :smile: [/none]" in named


def test_a_bar_in_a_name_makes_no_column() -> None:
    assert "a|b" in render_table("", [""], [["a|b"]], False)
    assert r"| a\|b |" in render_table("", [""], [["a|b"]], True)


@pytest.mark.parametrize("markdown", [False, True])
def test_names_are_not_shortened_in_wide_tables(markdown: bool) -> None:
    names = [f"{'long' * 20}_{i}" for i in range(40)]
    table = render_table("", names, [names], markdown)
    assert all(table.count(f"{name} ") == 2 for name in names[:-1])


def test_fractions_are_written_as_quotients() -> None:
    assert [fraction(v) for v in (1.0, 0.125, 1 / 3, 0.123)] == ["1", "1/8", "1/3", "0.123"]


def test_save_writes_json_and_a_figure_per_case(squares: Dataset, tmp_path: Path) -> None:
    found = run(squares, "bce", GridSpec(1 / 4, 1))
    written = save([found, found], tmp_path / "out")
    names = [str(p.relative_to(tmp_path / "out")) for p in written]
    assert names == ["evaluation.json", "figures/b.png", "figures/c.png"]
    read = json.loads(written[0].read_text())
    assert len(read["evaluations"]) == 2
    assert read["evaluations"][0]["rows"][1]["case"] == "c"
    assert read["versions"]["torch"] == torch.__version__
    assert written[1].read_bytes()[:4] == b"\x89PNG"
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {"evaluation.json", "b.png", "c.png"}


# --- real scans -----------------------------------------------------------------------------


def test_local_prototypes_beat_global_ones_on_real_ct(shared_path: Callable[[str], Path]) -> None:
    """The order of the paper's Fig. 3 (left) on SABS, untrained: 1/8 is better than 1."""
    dataset = Dataset.open(shared_path("data/Dataset101_SABS"))
    whole, local = evaluate_grids(
        untrained(ModelConfig(size=257)),
        dataset,
        grids=[GridSpec(1, 1 / 2), GridSpec(1 / 8, 1 / 2)],
        support="sabs_00",
        queries=["sabs_03"],
        organs=["spleen", "kidney_right"],
        progress=False,
    )
    assert local.mean() > 0.55
    assert local.mean("spleen") > whole.mean("spleen") + 0.05
    assert local.mean("kidney_right") > whole.mean("kidney_right") + 0.05
