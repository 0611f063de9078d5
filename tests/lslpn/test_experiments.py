"""The experiments: reports agree with evaluations, and resumed experiments with complete ones."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic import CHECKOUT, write_synthetic_dataset

from lslpn import training as train_module
from lslpn.cli import main
from lslpn.config import preset, with_overrides
from lslpn.corpora.visceral import GOLD, SILVER
from lslpn.data.dataset import Dataset
from lslpn.errors import InputError
from lslpn.evaluation.protocols import protocol_of
from lslpn.files import locked
from lslpn.paper import store as store_module
from lslpn.paper.misalignment import alignment
from lslpn.paper.plan import Setup, organ_folds, plan_runs, subject_folds
from lslpn.paper.stats import compare, correlate, holm, spread

SMALL = {"size": 32, "channels": 8, "weights": "random", "batch": 1, "steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_dataset(tmp_path_factory.mktemp("data"), cases=4)


def words(command: str, data: Path, out: Path, *more: str, **changes: object) -> list[str]:
    settings = [f"--set={k}={v}" for k, v in {**SMALL, **changes}.items()]
    cases = ["--train-cases", "syn_00,syn_01", "--support", "syn_00", "--device", "cpu"]
    folds = ["--fold", "liver", "--fold", "kidney"]
    where = ["--data", str(data), "--out", str(out)]
    return ["experiment", command, *where, *cases, *folds, *settings, "--quiet", *more]


TABLE1 = ("--method", "lslpn,panet", "--seeds", "1,2", "--classes", "all", "--untrained")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished table1; do not modify it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(words("table1", data, out, *TABLE1)) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy to work in, of hard links, since files are replaced and never modified."""
    shutil.copytree(finished, tmp_path / "out", copy_function=os.link)
    return tmp_path / "out"


def loaded(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json").read_text("utf-8"))


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any further training or evaluation fail."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    for name in ("train", "evaluate_grids"):
        monkeypatch.setattr(store_module, name, refuse)


# --- table1 ---------------------------------------------------------------------------------


def test_the_table_equals_the_evaluations(finished: Path) -> None:
    content = loaded(finished, "table1")
    with open(finished / "table1.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in content["table"]] == [
        "lslpn, all classes",
        "lslpn, untrained",
        "panet, all classes",
    ]
    # 2 cases x 2 organs x 2 seeds x 3 lines.
    assert len(rows) == 24
    assert {row["case"] for row in rows} == {"syn_02", "syn_03"}
    for line, (method, classes) in zip(
        content["table"],
        [("lslpn", "all"), ("lslpn", "untrained"), ("panet", "all")],
        strict=True,
    ):
        of_seed = {"liver": [], "kidney": []}
        for organ, seed in itertools.product(of_seed, "12"):
            mine = [
                float(row["dice"])
                for row in rows
                if (row["method"], row["classes"], row["organ"], row["seed"])
                == (method, classes, organ, seed)
            ]
            assert len(mine) == 2
            of_seed[organ].append(statistics.fmean(mine))
        for organ, values in of_seed.items():
            found = line["organs"][organ]
            assert found["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
            assert found["deviation"] == pytest.approx(statistics.stdev(values), abs=1e-6)
        means = [statistics.fmean(pair) for pair in zip(*of_seed.values(), strict=True)]
        assert line["mean"]["mean"] == pytest.approx(statistics.fmean(means), abs=1e-6)
        assert line["mean"]["deviation"] == pytest.approx(statistics.stdev(means), abs=1e-6)
    # The rows differ, so that exchanged methods would be noticed.
    assert len({line["mean"]["mean"] for line in content["table"]}) == 3


def test_the_markdown_equals_the_json(finished: Path) -> None:
    content, text = loaded(finished, "table1"), (finished / "table1.md").read_text("utf-8")
    table, comparisons = text.split("## Paired comparisons")
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for line in content["table"]:
        values = [*line["organs"].values(), line["mean"]]
        assert cells[line["label"]] == [f"{v['mean']:.3f} ± {v['deviation']:.3f}" for v in values]
    for test in content["comparisons"]:
        assert f"{test['difference']:+.3f} | {test['p']:.2g} | {test['p_holm']:.2g} |" in re.sub(
            " +", " ", comparisons
        )
    assert len(content["comparisons"]) == 3


def test_the_page_has_the_tables_the_plot_and_every_evaluation(finished: Path) -> None:
    content, page = loaded(finished, "table1"), (finished / "table1.html").read_text("utf-8")
    for line in content["table"]:
        cells = [f"{v['mean']:.3f} ± {v['deviation']:.3f}" for v in line["organs"].values()]
        values = "\n".join(f"<td>{cell}</td>" for cell in cells)
        assert f"<td>{line['label']}</td>\n{values}" in page
    assert "<h2>Paired comparisons</h2>" in page
    plot = base64.b64encode((finished / "table1.png").read_bytes()).decode()
    assert page.count("<img ") == page.count(f'src="data:image/png;base64,{plot}"') == 1
    assert page.count("<details>") == page.count("<svg ") == len(content["runs"])
    assert "<summary>panet, all classes; liver held out, seed 2, align none</summary>" in page
    # The page's Content-Security-Policy forbids these.
    assert 'style="' not in page
    assert str(finished) not in page


def test_every_output_names_its_data_settings_and_versions(finished: Path) -> None:
    content = loaded(finished, "table1")
    assert content["subject_folds"] == [
        {
            "name": "",
            "train": ["syn_00", "syn_01"],
            "test": ["syn_02", "syn_03"],
            "support": "syn_00",
        }
    ]
    assert content["model"]["size"] == 32
    assert content["train"]["lr"] == 1e-3
    assert {"lslpn", "torch", "python"} < set(content["versions"])
    text = (finished / "table1.md").read_text("utf-8")
    with open(finished / "table1.csv", encoding="utf-8", newline="") as stream:
        first = next(csv.DictReader(stream))
    for word in ("syn_00", "published", "steps=2", content["versions"]["torch"]):
        assert word in text
        assert word in " ".join(first.values())
    if content["commit"] is not None:  # not in an installed package
        assert content["commit"] in text
        assert content["commit"] == first["commit"]
    picture = (finished / "table1.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_finished_experiment_is_read_back(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    no_work(monkeypatch)
    assert main(words("table1", data, copy, *TABLE1)) == 0
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before
    said = capsys.readouterr()
    assert "8 of them already trained; 12 evaluations, 12 of them already done" in said.err
    # Fewer seeds and methods are a subset of the finished ones.
    assert main(words("table1", data, copy, "--seeds", "1", "--classes", "all")) == 0
    assert loaded(copy, "table1")["table"][0]["organs"]["liver"]["deviation"] is None


def test_a_killed_experiment_ends_with_the_same_numbers(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    part = ("--seeds", "1", "--classes", "all")
    command = words("table1", data, out, *part, checkpoint_every=1)
    real, count = train_module.train_step, 0

    def dying(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == 4:  # the second step of the second run
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", dying)
        assert main(command) == 130
    assert not (out / "table1.json").exists()
    trained = out / "runs/lslpn/liver/seed1/checkpoint.pt"
    stamp = trained.stat().st_mtime_ns
    assert main(command) == 0
    assert trained.stat().st_mtime_ns == stamp  # a complete run is not touched
    for organ in ("liver", "kidney"):
        name = f"evaluations/lslpn/{organ}/seed1/published-12-none"
        rows = [loaded(folder, name)["evaluations"][0]["rows"] for folder in (out, finished)]
        assert rows[0] == rows[1]
        line = loaded(out, "table1")["table"][0]["organs"][organ]
        assert line["mean"] == pytest.approx(statistics.fmean(row["dice"] for row in rows[1]))


def test_other_settings_in_the_same_folder_are_refused(
    data: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, changes, expected in (
        ((), {"steps": 3}, "steps was 2, now 3"),
        (("--protocol", "senet"), {}, "protocol was 'published', now 'senet'"),
        (("--test-cases", "syn_02"), {}, "test was ['syn_02', 'syn_03'], now ['syn_02']"),
        (("--setting", "II"), {}, "drop_test_slices was False, now True"),
    ):
        before = (copy / "table1.json").read_bytes()
        assert main(words("table1", data, copy, *TABLE1, *more, **changes)) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert str(copy) in said
        assert (copy / "table1.json").read_bytes() == before
    # A network that was trained with other settings is not used.
    other = copy.parent / "other"
    assert main(words("table1", data, other, *TABLE1, "--runs", str(copy / "runs"), lr=0.5)) == 2
    assert "lr was 0.001, now 0.5" in capsys.readouterr().err


def test_a_second_process_in_the_same_folder_is_refused(
    data: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(copy):
        assert main(words("table1", data, copy, *TABLE1)) == 2
        assert f"{copy}: another lslpn is at work in it" in capsys.readouterr().err
    run = tmp_path / "run"
    run.mkdir()
    train = ["train", "--data", str(data), "--hold-out", "liver", "--out", str(run), "--quiet"]
    with locked(run):
        assert main([*train, "--set=size=32", "--set=steps=1", "--set=weights=random"]) == 2
        assert f"{run}: another lslpn is at work in it" in capsys.readouterr().err
    assert not (run / "checkpoint.pt").exists()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from lslpn.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=CHECKOUT
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another lslpn"), locked(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        pass


def test_an_existing_training_run_is_reused(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--run", f"lslpn:liver:1={finished}/runs/lslpn/liver/seed1")
    part = ("--seeds", "1", "--classes", "all")
    out = tmp_path / "out"
    assert main(words("table1", data, out, *part, *given)) == 0
    assert not (out / "runs/lslpn/liver").exists()
    table = loaded(out, "table1")["table"][0]["organs"]["liver"]["mean"]
    with open(finished / "table1.csv", encoding="utf-8", newline="") as stream:
        mine = [
            float(row["dice"])
            for row in csv.DictReader(stream)
            if (row["method"], row["classes"], row["organ"], row["seed"])
            == ("lslpn", "all", "liver", "1")
        ]
    assert table == pytest.approx(statistics.fmean(mine), abs=1e-6)
    capsys.readouterr()
    wrong = ("--run", f"lslpn:kidney:1={finished}/runs/lslpn/liver/seed1")
    assert main(words("table1", data, tmp_path / "b", *part, *wrong)) == 2
    assert "hold_out was ['liver'], now ['kidney']" in capsys.readouterr().err
    unknown = ("--run", f"lslpn:spleen:1={finished}")
    assert main(words("table1", data, tmp_path / "c", *part, *unknown)) == 2
    assert "lslpn:spleen:1 is not a run of this experiment" in capsys.readouterr().err


def test_without_labels_all_organ_folds_share_one_network(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    out = tmp_path / "out"
    part = ("--seeds", "1", "--method", "lslpn,alpnet", "--set", "alpnet.supervision=superpixels")
    assert main(words("table1", data, out, *part, "--classes", "none,all", size=64)) == 0
    trained = sorted(str(p.parent.relative_to(out)) for p in out.rglob("checkpoint.pt"))
    assert trained == [
        "runs/alpnet-none/any/seed1",
        "runs/lslpn-none/any/seed1",
        "runs/lslpn/kidney/seed1",
        "runs/lslpn/liver/seed1",
    ]
    content = loaded(out, "table1")
    assert [row["label"] for row in content["table"]] == [
        "lslpn, no classes",
        "lslpn, all classes",
        "alpnet, no classes",
    ]
    assert "4 training runs took" in (out / "table1.md").read_text("utf-8")
    # A run of lslpn train is used, whichever organs it held out.
    run = tmp_path / "run"
    settings = {**SMALL, "size": 64, "supervision": "superpixels", "seed": 1}
    assert (
        main(
            ["train", "--data", str(data), "--cases", "syn_00,syn_01", "--hold-out", "kidney"]
            + [f"--set={k}={v}" for k, v in settings.items()]
            + ["--out", str(run), "--device", "cpu", "--quiet"]
        )
        == 0
    )
    monkeypatch.setattr(store_module, "train", None)
    given = ("--run", f"lslpn-none:any:1={run}", "--classes", "none", "--seeds", "1")
    assert main(words("grid-scale", data, tmp_path / "b", *given, size=64)) == 0
    assert "on no classes" in (tmp_path / "b" / "grid-scale-none.md").read_text("utf-8")
    again = loaded(tmp_path / "b", "grid-scale-none")["table"]
    (same,) = [row for row in again if (row["scale"], row["spacing"]) == (1 / 8, 1 / 2)]
    assert same["mean"] == content["table"][0]["mean"]
    capsys.readouterr()
    assert main(words("table1", data, tmp_path / "c", "--classes", "some")) == 2
    assert "expected some of all, tested, none, got 'some'" in capsys.readouterr().err
    assert main(words("table1", data, tmp_path / "d", "--set", "supervision=superpixels")) == 2
    assert "is set by --classes none" in capsys.readouterr().err


def test_setting_two_holds_out_slices_even_without_labels(data: Path) -> None:
    dataset = Dataset.open(data)
    config = with_overrides(preset("published"), drop_test_slices=True)
    setup = Setup(
        dataset, config, (("liver",), ("kidney",)), subject_folds(dataset, train=["syn_00"])
    )
    runs = plan_runs(setup, ["lslpn"], [1], ["none"])
    assert [run.hold_out for run in runs] == [("liver",), ("kidney",)]
    assert len({run.key for run in runs}) == len({run.training_path for run in runs}) == 2


# --- the other experiments ------------------------------------------------------------------


def test_grid_scale_agrees_with_table1_where_the_grid_is_the_same(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "train", None)  # the runs are table1's
    assert (
        main(words("grid-scale", data, copy, "--seeds", "1,2", "--scale", "1/8,1/4,1,1/4:1")) == 0
    )
    content = loaded(copy, "grid-scale")
    lines = {(line["scale"], line["spacing"]): line for line in content["table"]}
    assert list(lines) == [(1 / 8, 1 / 2), (1 / 4, 1 / 2), (1, 1 / 2), (1 / 4, 1)]
    table1 = loaded(copy, "table1")["table"][0]
    assert lines[1 / 8, 1 / 2]["organs"] == table1["organs"]
    assert lines[1 / 8, 1 / 2]["mean"] == table1["mean"]
    assert lines[1 / 4, 1 / 2]["mean"] != lines[1 / 4, 1]["mean"]
    text = (copy / "grid-scale.md").read_text("utf-8")
    for (scale, _), line in lines.items():
        assert f"{line['mean']['mean']:.3f} ± {line['mean']['deviation']:.3f}" in text, scale
    assert (copy / "grid-scale.png").is_file()


def test_alignment_dice_by_hand() -> None:
    # Two slices, one chunk: the middle slice (the upper of two) pairs with both of the query.
    support = np.zeros((3, 4, 4), np.uint8)
    query = np.zeros((2, 4, 4), np.uint8)
    support[0:2, 0:2, 0:2] = 1  # 4 pixels on slices 0 and 1
    support[1, 3, 3] = 1  # 5 on slice 1
    query[0, 0:2, 1:3] = 1  # 4 pixels, 2 of them in common
    query[1, 3, 3] = 1  # 1 pixel, in common
    rule = protocol_of("alpnet", 1)
    # 2 (2 + 1) / (4 + 5 + 1 + 5)
    assert alignment(rule, (support, support), (query, query), 1) == pytest.approx(6 / 15)
    assert alignment(rule, (query[:1], query[:1]), (query[:1], query[:1]), 1) == 1.0
    assert alignment(rule, (support, support), (query, query), 2) is None


def test_misalignment_and_figures(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_module, "train", None)
    assert main(words("misalignment", data, copy, "--seeds", "1,2")) == 0
    content = loaded(copy, "misalignment")
    # 2 cases x 2 organs x 2 ways of aligning.
    assert len(content["points"]) == 8
    with open(copy / "table1.csv", encoding="utf-8", newline="") as stream:
        scores = [row for row in csv.DictReader(stream) if row["classes"] == "all"]
    for point in content["points"]:
        assert 0 < point["alignment_dice"] <= 1
        if point["align"] == "none":
            mine = [
                float(row["dice"])
                for row in scores
                if (row["method"], row["organ"], row["case"])
                == ("lslpn", point["organ"], point["case"])
            ]
            assert point["segmentation_dice"] == pytest.approx(statistics.fmean(mine), abs=1e-6)
    both = [{(p["organ"], p["case"]): p for p in content["points"] if p["align"] == align}
            for align in ("none", "body")]  # fmt: skip
    assert both[0].keys() == both[1].keys()
    assert any(both[0][k]["alignment_dice"] != both[1][k]["alignment_dice"] for k in both[0])
    for line in content["summary"]:
        chosen = [
            p
            for p in content["points"]
            if p["align"] == line["align"] and line["organ"] in (p["organ"], "all")
        ]
        assert line["points"] == len(chosen)
    assert f"{content['summary'][-1]['pearson']:.3f}" in (copy / "misalignment.md").read_text()

    command = words("figures", data, copy, "--seeds", "1", "--method", "lslpn,panet")
    assert main([*command, "--case", "syn_03"]) == 0
    shown = loaded(copy, "figures")["table"]
    assert [(r["label"], r["organ"], r["case"]) for r in shown] == [
        ("lslpn, all classes", "liver", "syn_03"),
        ("panet, all classes", "liver", "syn_03"),
        ("lslpn, all classes", "kidney", "syn_03"),
        ("panet, all classes", "kidney", "syn_03"),
    ]
    labels = Dataset.open(data).load_labels("syn_03").data
    shows = np.flatnonzero((labels == 1).any(axis=(1, 2)))
    # The protocol drops the last slice; the middle one of the rest is shown, whatever its Dice.
    assert abs(shown[0]["query_slice"] - shows[len(shows) // 2]) <= 1
    pictures = {name: (copy / name).read_bytes() for name in ("fig2.png", "fig4.png")}
    no_work(monkeypatch)
    assert main([*command, "--case", "syn_03"]) == 0
    assert pictures == {name: (copy / name).read_bytes() for name in pictures}
    assert (copy / "figures.html").read_text("utf-8").count('src="data:image/png') == 2

    stored = next((copy / "evaluations/panet").rglob("pictures-*.npz"))
    for damaged in (b"", stored.read_bytes()[:-100]):
        stored.unlink()  # it is a link to a file of the other tests
        stored.write_bytes(damaged)
        capsys.readouterr()
        assert main([*command, "--case", "syn_03"]) == 1  # `no_work` refuses to evaluate it
        assert f"{stored.with_suffix('.json')} cannot be read" in capsys.readouterr().err


# --- plan -----------------------------------------------------------------------------------


def test_the_default_organ_folds_are_those_of_the_paper(data: Path) -> None:
    names = ["spleen", "kidney_right", "kidney_left", "aorta", "liver", "psoas_left", "psoas_right"]
    labels = {name: i for i, name in enumerate(names, 1)}
    dataset = Dataset(data, "made up", labels, ("a",))
    pairs = ("kidney_right", "kidney_left"), ("psoas_left", "psoas_right")
    assert organ_folds(dataset) == (("liver",), ("spleen",), *pairs)
    assert organ_folds(dataset, ["aorta", "liver+spleen"]) == (("aorta",), ("liver", "spleen"))
    for given, expected in (
        (["liver", "liver+aorta"], "liver is given twice"),
        (["lung"], "its 7 organs: spleen, "),
        (["+"], "got none"),
    ):
        with pytest.raises(InputError, match=expected):
            organ_folds(dataset, given)


def test_subject_folds(data: Path) -> None:
    cases = tuple(f"{i:02d}" for i in range(30))
    dataset = Dataset(data, "made up", {"liver": 1}, cases)
    folds = subject_folds(dataset, parts=5)
    # ALPNet's on SABS: splits at 0, 6, 12, 18, 24, 30; the scan after the fold is the support.
    assert [fold.test[0] for fold in folds] == ["00", "06", "12", "18", "24"]
    assert [fold.support for fold in folds] == ["06", "12", "18", "24", "00"]
    for fold in folds:
        assert set(fold.test) | set(fold.train) == set(cases)
        assert not set(fold.test) & set(fold.train)
        assert fold.support in fold.train
    bracketed = Dataset(data, "made up", {"liver": 1}, ("scan1", "scan[1]"))
    (one,) = subject_folds(bracketed, train=["scan[1]"])  # a name, although also a pattern
    assert one.train == ("scan[1]",)
    (one,) = subject_folds(dataset, test=["2?"], support="29")
    assert one.test == cases[20:29]
    assert one.train == cases[:20]
    for arguments, expected in (
        ({}, "expected one of them"),
        ({"parts": 31}, "expected 2 to 30"),
        ({"parts": 2, "support": "01"}, "leave out"),
        ({"train": ["0*"], "test": ["05"]}, "05 would be trained on"),
        ({"train": ["x*"]}, "no case of data set"),
        ({"train": ["0*"], "test": ["29"], "support": "29"}, "no case but the support"),
    ):
        with pytest.raises(InputError, match=re.escape(expected)):
            subject_folds(dataset, **arguments)  # type: ignore[arg-type]


def test_without_added_classes_the_other_folds_are_trained_on(data: Path) -> None:
    dataset = Dataset.open(data)
    setup = Setup(
        dataset,
        with_overrides(preset("published"), steps=1),
        (("liver",), ("kidney",)),
        subject_folds(dataset, parts=2),
    )
    runs = plan_runs(setup, ["lslpn", "panet"], [5, 6], ["all", "tested"])
    assert len(runs) == len({run.path for run in runs}) == 2 * 2 * 2 * 2 * 2
    for run in runs:
        assert run.config.model.method == run.method
        assert run.config.train.seed == run.seed
        other = ("kidney",) if run.organs == ("liver",) else ("liver",)
        assert run.config.train.organs == (None if run.classes == "all" else other)
    assert [run.seed for run in runs] == [5] * 16 + [6] * 16
    alone = Setup(dataset, setup.config, (("liver",),), setup.subject_folds)
    with pytest.raises(InputError, match="only one fold"):
        plan_runs(alone, ["lslpn"], [1], ["tested"])


def test_the_commands_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (CHECKOUT / "docs" / "experiments.md").read_text("utf-8")
    known = ""
    for name in ("table1", "grid-scale", "misalignment", "figures"):
        assert main(["experiment", name, "--help"]) == 0
        known += capsys.readouterr().out
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert len(options) > 15
    assert {o for o in options if o not in known} - {"--hold-out", "--nproc"} == set()

    sabs, visceral = text.split("## VISCERAL")[:2]
    found = []
    for part, cases in ((sabs, [f"sabs_{i:02d}" for i in range(18)]), (visceral, GOLD + SILVER)):
        given = dict(re.findall(r"--(test-cases|train-cases|support) +'?([^ '\n]+)'?", part))
        dataset = Dataset(CHECKOUT, "made up", {"liver": 1}, tuple(sorted(cases)))
        (fold,) = subject_folds(
            dataset,
            train=given.get("train-cases", "").split(",") if "train-cases" in given else [],
            test=given["test-cases"].split(","),
            support=given["support"],
        )
        found.append(fold)
    assert found[0].train == tuple(f"sabs_{i:02d}" for i in range(12))
    assert found[0].test == tuple(f"sabs_{i:02d}" for i in range(12, 18))
    assert set(found[1].train) == set(SILVER)
    assert set(found[1].test) == set(GOLD) - {"10000132"}


def test_settings_of_a_single_method(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = ("--method", "lslpn,panet", "--seeds", "1", "--classes", "all")
    own = ("--set", "panet.steps=1", "--set", "panet.channels=4")
    assert main(words("table1", data, tmp_path, *part, *own)) == 0
    for method, steps, channels in (("lslpn", 2, 8), ("panet", 1, 4)):
        record = loaded(tmp_path / f"runs/{method}/liver/seed1", "config")["config"]
        assert (record["train"]["steps"], record["model"]["channels"]) == (steps, channels)
    assert "panet.steps=1" in (tmp_path / "table1.md").read_text("utf-8")
    capsys.readouterr()
    for wrong, expected in (
        ("panet.steps=2", "steps was '1', now '2'"),
        ("panet.foo=2", "There is no option 'foo'"),
        ("unet.steps=2", "unet"),
        ("panet.seed=2", "--seeds"),
    ):
        more = ("--set", "panet.channels=4", "--set", wrong)
        assert main(words("table1", data, tmp_path, *part, *more)) == 2
        assert expected in capsys.readouterr().err


def without_kidney(root: Path, cases: int, *names: str) -> Path:
    """A data set in which some cases do not show the kidney."""
    data = write_synthetic_dataset(root, cases=cases)
    for name in names:
        path = data / "labelsTr" / f"{name}.nii.gz"
        image = nib.load(path)
        kept = np.asarray(image.dataobj)
        kept[kept == 3] = 0
        nib.save(nib.Nifti1Image(kept, image.affine, image.header), path)
    return data


def test_figures_of_an_organ_that_no_case_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = without_kidney(tmp_path / "data", 4, "syn_02", "syn_03")
    command = words("figures", data, tmp_path / "out", "--seeds", "1", "--organ", "kidney", steps=1)
    assert main(command) == 2
    assert "nothing to show: " in capsys.readouterr().err


def test_a_support_without_the_organ_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = without_kidney(tmp_path / "data", 3, "syn_00")
    assert main(words("table1", data, tmp_path / "out", "--seeds", "1")) == 2
    said = capsys.readouterr().err
    assert "the support syn_00 does not show enough of kidney" in said
    assert not (tmp_path / "out" / "runs").exists()


# --- statistics -----------------------------------------------------------------------------


def test_paired_comparison_by_hand_and_by_scipy() -> None:
    a = {i: 0.5 + 0.1 * i for i in range(5)}
    b = {i: value - 0.01 * (i + 1) for i, value in a.items()}
    found = compare("a", "b", {**a, "only here": 0.1}, {**b, "only there": 0.9})
    # Five differences of one sign: 2 of the 2^5 signs are as extreme.
    assert found["p"] == pytest.approx(2 / 2**5)
    assert found["pairs"] == 5
    assert found["difference"] == pytest.approx(0.03)
    rng = np.random.default_rng(0)
    x, y = (dict(enumerate(rng.random(20))) for _ in range(2))
    expected = scipy_stats.wilcoxon(list(x.values()), list(y.values())).pvalue
    assert compare("x", "y", x, y)["p"] == pytest.approx(expected)
    assert compare("x", "x", x, x)["p"] == 1.0
    assert compare("x", "y", x, {})["p"] is None


def test_holm_spread_and_correlation_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert spread([0.1, 0.3, float("nan")]).deviation == pytest.approx(0.2 / 2**0.5)
    assert str(spread([0.1, 0.3])) == "0.200 ± 0.141"
    assert str(spread([0.25])) == "0.250"
    assert str(spread([])) == "-"
    found = correlate([1, 2, 3], [1, 4, 9])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(8 / (2 * 98 / 3) ** 0.5)
    assert correlate([1, 1, 1], [1, 2, 3])["pearson"] is None
