"""The command line on real files: results, one-line errors, and the files that remain."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from synthetic import synthetic_ct, write_nifti

from lslpn import pretrained, save_weights
from lslpn.cli import main
from lslpn.cli.options import torch_device

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("info", ...) -> exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(
        nib.Nifti1Image(data, np.diag([2.0, 2.0, 4.0, 1.0]) if affine is None else affine), path
    )
    return path


class Scans:
    """A support with its mask and a query on disk, to be made invalid one at a time."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        self.root = root
        self.image = rng.normal(40, 20, (40, 36, 6)).astype(np.float32)
        self.mask = np.zeros((40, 36, 6), np.uint8)
        self.mask[10:25, 8:24, 1:5] = 1
        self.a = save(root / "a.nii.gz", self.image)
        self.m = save(root / "a_mask.nii.gz", self.mask)
        self.b = save(root / "b.nii.gz", self.image[::-1].copy())
        self.out = root / "out" / "b_mask.nii.gz"

    def words(self) -> list[str]:
        return [
            "segment",
            f"--support-image={self.a}",
            f"--support-mask={self.m}",
            f"--query={self.b}",
            f"--out={self.out}",
            "--size=64",
            "--quiet",
        ]


@pytest.fixture
def scans(tmp_path: Path) -> Scans:
    return Scans(tmp_path)


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def is_one_line(err: str, *fragments: str) -> None:
    assert err.startswith("lslpn: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


# --- help, versions, info -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "segment", "train", "evaluate", "info"])
def test_help_of_every_command(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert code == 0
    assert err == ""
    assert f"lslpn {command} [OPTIONS]" in out
    assert out.count("<bool>") <= 1  # flags take no value; --help is the library's
    assert command in run("--help")[1]


def test_the_command_without_arguments_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "evaluate" in out


def test_help_is_fast_because_torch_is_not_imported() -> None:
    check = (
        "import sys; from lslpn.cli import main; code = main(['evaluate', '--help']); "
        "sys.exit(code or (1 if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_info_names_versions_and_every_backend_with_a_reason(run: Run) -> None:
    import torch

    from lslpn_kernels import backends

    code, out, err = run("info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]) == set(backends()) >= {"reference", "torch", "cpu", "cuda"}
    assert facts["backends"]["torch"]["usable"] is True
    for name, state in facts["backends"].items():
        assert state["usable"] or state["reason"], name
    code, text, _ = run("info")
    assert code == 0
    _, _, text = text.partition("backends of the head")
    for name, state in facts["backends"].items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert state["reason"] in line


# --- bad input to segment -------------------------------------------------------------------


def shape_differs(s: Scans) -> None:
    save(s.m, s.mask[:-1])


def affine_differs(s: Scans) -> None:
    save(s.m, s.mask, np.diag([2.0, 2.0, 5.0, 1.0]))


def mask_is_empty(s: Scans) -> None:
    save(s.m, s.mask * 0)


def mask_is_no_whole_number(s: Scans) -> None:
    save(s.m, s.mask.astype(np.float32) * 0.5)


def query_is_truncated(s: Scans) -> None:
    s.b.write_bytes(s.b.read_bytes()[:-2000])


def image_is_truncated(s: Scans) -> None:
    s.a.write_bytes(s.a.read_bytes()[:3000])


def query_is_2d(s: Scans) -> None:
    save(s.b, s.image[..., 0])


def query_is_4d(s: Scans) -> None:
    save(s.b, np.stack([s.image, s.image], -1))


def query_has_nan(s: Scans) -> None:
    spoilt = s.image.copy()
    spoilt[3, 3, 3] = np.nan
    save(s.b, spoilt)


def image_is_constant(s: Scans) -> None:
    save(s.a, np.full_like(s.image, 7.0))


def query_is_text(s: Scans) -> None:
    s.b.write_bytes(gzip.compress(b"not a scan" * 100))


def query_is_missing(s: Scans) -> None:
    s.b.unlink()


@pytest.mark.parametrize(
    ("spoil", "named", "said"),
    [
        (shape_differs, "a_mask.nii.gz", "39 x 36 x 6"),
        (affine_differs, "a_mask.nii.gz", "affine"),
        (mask_is_empty, "a_mask.nii.gz", "empty"),
        (mask_is_no_whole_number, "a_mask.nii.gz", "whole numbers"),
        (query_is_truncated, "b.nii.gz", "cut short"),
        (image_is_truncated, "a.nii.gz", "cut short"),
        (query_is_2d, "b.nii.gz", "2 dimensions"),
        (query_is_4d, "b.nii.gz", "4 dimensions"),
        (query_has_nan, "b.nii.gz", "NaN"),
        (image_is_constant, "a.nii.gz", "every voxel is 7"),
        (query_is_text, "b.nii.gz", "not a NIfTI"),
        (query_is_missing, "b.nii.gz", "no such file"),
    ],
)
def test_an_invalid_file_is_named_in_one_line_and_nothing_is_written(
    scans: Scans, run: Run, spoil: Callable[[Scans], None], named: str, said: str
) -> None:
    spoil(scans)
    before = files(scans.root)
    code, out, err = run(*scans.words())
    assert code == 2
    assert out == ""
    is_one_line(err, named, said)
    assert files(scans.root) == before


def test_pairs_of_support_must_match(scans: Scans, run: Run) -> None:
    code, _, err = run(*scans.words(), f"--support-image={scans.b}")
    assert code == 2
    is_one_line(err, "--support-mask", "got 1 for 2")


def test_the_output_is_checked_before_any_work(scans: Scans, run: Run, tmp_path: Path) -> None:
    scans.b.unlink()  # would be the next error
    (tmp_path / "file").write_text("x")
    scans.out = tmp_path / "file" / "b_mask.nii.gz"
    code, _, err = run(*scans.words())
    assert code == 2
    is_one_line(err, "b_mask.nii.gz", "cannot be written")
    scans.out = tmp_path / "b_mask.png"
    code, _, err = run(*scans.words())
    assert code == 2
    is_one_line(err, "--out", ".nii.gz")


def test_a_read_only_folder_is_refused(scans: Scans, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write to any folder")
    scans.out = folder / "b_mask.nii.gz"
    code, _, err = run(*scans.words())
    assert code == 2
    is_one_line(err, "b_mask.nii.gz", "cannot be written")


def test_inputs_and_results_are_not_overwritten(scans: Scans, run: Run) -> None:
    before = scans.m.read_bytes()
    good = scans.out
    scans.out = scans.m
    code, _, err = run(*scans.words(), "--force")
    assert code == 2
    is_one_line(err, "--support-mask", "another name")
    assert scans.m.read_bytes() == before
    good.parent.mkdir()
    good.write_bytes(b"drawn by hand")
    scans.out = good
    code, _, err = run(*scans.words())
    assert code == 2
    is_one_line(err, "b_mask.nii.gz", "--force")
    assert good.read_bytes() == b"drawn by hand"


def test_two_results_in_one_file_are_refused_however_it_is_spelled(scans: Scans, run: Run) -> None:
    scans.out.parent.mkdir()
    (scans.root / "link").symlink_to(scans.out.parent)
    for folder in ("link", "out/../out"):
        second = scans.root / folder / scans.out.name
        code, _, err = run(*scans.words(), f"--query={scans.a}", f"--out={second}")
        assert code == 2
        is_one_line(err, "is also given as --out")


def test_a_depth_that_is_no_length(scans: Scans, run: Run) -> None:
    for depth in ("inf", "nan", "-1"):
        code, _, err = run(*scans.words(), f"--depth={depth}")
        assert code == 2
        is_one_line(err, "--depth")


def test_an_option_of_one_value_is_not_given_twice(scans: Scans, run: Run) -> None:
    code, _, err = run(*scans.words(), "--size=48")
    assert code == 2
    is_one_line(err, "--size: expected one, got 2")
    for command in (["train"], ["evaluate"], ["prepare", "btcv"], ["experiment", "table1"]):
        code, _, err = run(*command, "--quiet", "--quiet", "--nonsense")
        assert (code, "expected one" in err) == (2, False)
    code, _, err = run("experiment", "table1", "--data=a", "--out=b", "--support=c", "--support=d")
    is_one_line(err, "--support: expected one, got 2")
    code, _, err = run("train", "--data=a", "--out=b", "--set=steps=1", "--set=steps=2")
    is_one_line(err, "--set steps: expected one value")


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_options_of_an_untrained_network_are_refused_with_a_checkpoint(
    scans: Scans, run: Run, command: str
) -> None:
    words = scans.words() if command == "segment" else ["evaluate", "--data=d", "--support=a"]
    for more in ("--preset=published", "--seed=1234"):
        code, _, err = run(*words, "--checkpoint=run", more)
        assert code == 2
        is_one_line(err, f"{more.partition('=')[0]}: a checkpoint has its own")


def test_names_too_long_for_the_file_system(scans: Scans, run: Run) -> None:
    long = "n" * 300
    good = scans.out
    for more in (
        [f"--checkpoint={long}"],
        [f"--support-image={long}.nii.gz", f"--support-mask={scans.m}"],
    ):
        code, _, err = run(*scans.words(), *more)
        assert code == 2
        is_one_line(err, long, "File name too long")
    scans.out = good.with_name(f"{long}.nii.gz")
    before = files(scans.root)
    code, _, err = run(*scans.words())
    assert code == 2
    is_one_line(err, long, "File name too long")
    assert files(scans.root) == before
    for words in (["train"], ["evaluate", "--untrained", "--support=a"]):
        code, _, err = run(*words, f"--data={long}", f"--out={scans.root / 'run'}")
        assert code == 2
        is_one_line(err, long, "File name too long")
    # The longest names that the file system takes: the temporary file must have a shorter one.
    for name in ("o" * 241 + ".nii.gz", "o." + "o" * 239 + ".nii.gz"):
        scans.out = good.with_name(name)
        code, _, err = run(*scans.words())
        assert code == 0, err
        assert scans.out.is_file()


def test_a_seed_out_of_range(scans: Scans, run: Run) -> None:
    code, _, err = run(*scans.words(), f"--seed={2**64}")
    assert code == 2
    is_one_line(err, "--seed")


def test_messages_of_the_library_name_options_and_leave_paths_alone() -> None:
    from lslpn.cli.options import in_options
    from lslpn.cli.paper import table1
    from lslpn.cli.train import train

    for command, said, expected in (
        (table1, "`train`, `test` or `parts`: one", "--train-cases, --test-cases or --folds: one"),
        (table1, "organ_folds: liver twice", "--fold: liver twice"),
        (table1, "cases: none given", "--train-cases: none given"),
        (train, "cases: none given", "--cases: none given"),
        (train, "go on with `resume=True` or `chunks`", "go on with --resume or `chunks`"),
        (train, "out: holds no run", "out: holds no run"),
        (train, "out/run: holds no run", "out/run: holds no run"),
        (train, "batch: expected 2", "batch: expected 2"),
    ):
        for given in (Path("out"), ["lslpn:liver:1=out"]):
            assert in_options(said, command, [given]) == expected


def test_no_message_of_the_library_names_an_option_of_the_command_line() -> None:
    import ast

    import lslpn

    root = Path(lslpn.__file__).parent
    theirs = {"--nproc_per_node", "--error-unmatch", "--porcelain", "--untracked-files"}
    for path in sorted(root.rglob("*.py")):
        if "cli" in path.parts:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        prose = {
            ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = set(re.findall(r"--[a-z][\w-]*", node.value)) - theirs
                assert not found or node.value in prose, (path, node.lineno, node.value)


# --- bad input to train and evaluate --------------------------------------------------------


def test_a_data_set_without_its_json(run: Run, tmp_path: Path) -> None:
    for words in (
        ("evaluate", "--untrained", "--support=a", "--organ=liver"),
        ("train", "--hold-out=liver"),
    ):
        code, _, err = run(*words, f"--data={tmp_path}", f"--out={tmp_path / 'out'}")
        assert code == 2
        is_one_line(err, "dataset.json", "no such file")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--untrained", "--organ=livr"], "did you mean 'liver'"),
        (["--untrained"], "--organ: expected at least one"),
        (["--untrained", "--organ=liver", "--query=syn_09"], "case 'syn_09'"),
        (["--untrained", "--organ=liver", "--query=syn_00"], "syn_00 is the support"),
        (["--untrained", "--organ=liver", "--scale=8"], "--scale: expected a fraction"),
        (["--untrained", "--organ=liver", "--scale=1e-999999999"], "--scale: expected a fraction"),
        (["--untrained", "--organ=liver", "--spacing=1/0"], "--spacing: expected a fraction"),
        (["--untrained", "--organ=liver", "--scale=1/8:x"], "--scale: expected a fraction"),
        (["--untrained", "--organ=liver", "--device=tpu"], "--device: expected auto"),
        (["--untrained", "--organ=liver", "--device=cuda:99"], "cuda:99 does not exist"),
        (["--untrained", "--organ=liver", "--chunks=3", "--protocol=adnet"], "one support slice"),
        (["--untrained", "--checkpoint=x"], "got --checkpoint and --untrained"),
        (["--weights=ct", "--checkpoint=x"], "--weights: a checkpoint has its own"),
        (["--weights=ct", "--method=panet"], "--method: a trained network"),
        (["--weights=ct", "--seed=1"], "--weights ct: --preset and --seed"),
        (["--weights=vit"], "--weights: expected ct"),
        (["--weights=ct"], "--organ: expected at least one"),
        (["--organ=liver"], "got none of them"),
        (["--checkpoint=nowhere"], "nowhere"),
        (["--untrained", "--protocol=alp"], "--protocol"),
        (["--untrained", "--chunks=two"], "--chunks"),
        (["--untrained", "--colour=red"], "--colour"),
    ],
)
def test_invalid_arguments_to_evaluate(
    synthetic_dataset: Path, run: Run, tmp_path: Path, words: list[str], said: str
) -> None:
    out = tmp_path / "out"
    code, stdout, err = run(
        "evaluate", f"--data={synthetic_dataset}", "--support=syn_00", f"--out={out}", "-q", *words
    )
    assert (code, stdout) == (2, "")
    is_one_line(err, said)
    assert files(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hold-out=livr"], "did you mean 'liver'"),
        (["--hold-out=liver", "--cases=syn_00,syn_77"], "case 'syn_77'"),
        (["--hold-out=liver", "--set=steps"], "--set: expected NAME=VALUE"),
        (["--hold-out=liver", "--set=stps=3"], "stps"),
        (["--hold-out=liver", "--set=steps=many"], "steps"),
        (["--hold-out=liver,spleen,kidney"], "held out"),
        (["--hold-out=", "--set=size=48", "--set=steps=1"], "--hold-out: expected an organ"),
    ],
)
def test_invalid_arguments_to_train(
    synthetic_dataset: Path, run: Run, tmp_path: Path, words: list[str], said: str
) -> None:
    code, _, err = run("train", f"--data={synthetic_dataset}", f"--out={tmp_path / 'run'}", *words)
    assert code == 2
    is_one_line(err.splitlines(keepends=True)[-1], said)
    assert "Traceback" not in err
    assert not any(name.endswith(".pt") for name in files(tmp_path / "run"))


def test_a_checkpoint_of_another_architecture(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    import torch

    from lslpn.checkpoint import Checkpoint, save_checkpoint
    from lslpn.config import Config

    record = {"dataset": "d", "cases": [], "organs": [], "hold_out": ["liver"], "checksum": 0}
    wrong = {"encoder.conv1.weight": torch.zeros(8, 3, 3, 3)}
    save_checkpoint(tmp_path / "w.pt", Checkpoint(Config(), 1, wrong, {}, record, {}))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, said in (
        ("w.pt", "another architecture"),
        ("other.pt", "not an lslpn checkpoint"),
        ("text.pt", "cannot be read"),
    ):
        code, _, err = run(
            "evaluate",
            f"--data={synthetic_dataset}",
            "--support=syn_00",
            f"--checkpoint={tmp_path / name}",
            f"--out={tmp_path / 'out'}",
        )
        assert code == 2
        is_one_line(err, name, said)
    assert files(tmp_path / "out") == set()


# --- what works -----------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_json_and_figures(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    words = [
        "evaluate",
        f"--data={synthetic_dataset}",
        "--untrained",
        "--support=syn_00",
        "--query=syn_01,syn_02",
        "--organ=liver",
        "--organ=spleen",
        "--size=64",
        "--protocol=alpnet",
        "--scale=1",
        "--scale=1/8:1",
        "--spacing=1/2",
        f"--out={tmp_path / 'out'}",
    ]
    code, out, err = run(*words)
    assert code == 0, err
    assert "slice" in err  # the bar
    assert "scale 1, spacing 1/2" in out
    assert "scale 1/8, spacing 1," in out
    names = {"evaluation.json", "figures/syn_01.png", "figures/syn_02.png"}
    assert files(tmp_path / "out") == names
    read = json.loads((tmp_path / "out" / "evaluation.json").read_text())["evaluations"]
    assert [(e["scale"], e["spacing"]) for e in read] == [(1.0, 0.5), (0.125, 1.0)]
    for row in read[0]["rows"]:
        assert f"{row['dice']:.3f}" in out
    # Results are not replaced unless asked.
    code, _, err = run(*words)
    assert code == 2
    is_one_line(err, "evaluation.json", "--force")
    assert run(*words, "--force", "-q")[0] == 0


def test_train_then_evaluate_the_held_out_organs(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [
        "train",
        f"--data={synthetic_dataset}",
        "--hold-out=liver",
        "--cases=syn_01,syn_02",
        f"--out={folder}",
        *(
            f"--set={s}"
            for s in ("size=48", "steps=2", "batch=1", "min_organ_pixels=10", "min_pixels=0")
        ),
        "--device=cpu",
        "-q",
    ]
    code, _, err = run(*words)
    assert code == 0, err
    assert "checkpoint.pt" in files(folder)
    # A second run does not overwrite the first.
    code, _, err = run(*words)
    assert code == 2
    is_one_line(err, "--resume")

    base = [
        "evaluate",
        f"--data={synthetic_dataset}",
        f"--checkpoint={folder}",
        "--support=syn_00",
        "-q",
    ]
    code, _, err = run(*base, f"--out={tmp_path / 'e'}")
    assert code == 0, err
    assert err == ""
    read = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"][0]
    # The defaults: what was held out, on cases that were neither trained on nor the support.
    assert read["organs"] == ["liver"]
    assert read["queries"] == ["syn_03"]
    assert read["size"] == 48
    # Organs and cases of the training are evaluated with a note.
    code, _, err = run(*base, "--organ=liver,spleen", "--query=syn_01", f"--out={tmp_path / 'f'}")
    assert code == 0, err
    assert "did not hold out spleen" in err
    assert "training used syn_01" in err


def test_names_of_organs_and_cases_are_plain_text_in_figures_and_pages(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    """A formula to matplotlib, markup to a page, and not valid UTF-8."""
    path = synthetic_dataset / "dataset.json"
    path.write_text(path.read_text().replace('"liver"', '"li $ver_{"'))
    case = os.fsdecode(b"<b>$\\frac{\xe9")
    try:
        for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            old = synthetic_dataset / folder / f"syn_01{end}"
            old.rename(old.with_name(case + end))
    except OSError as error:
        pytest.skip(f"the file system takes no such name: {error}")
    words = ["evaluate", "--untrained", f"--data={synthetic_dataset}", "--support=syn_00"]
    words += [f"--query={case}", "--organ=li $ver_{", "--size=48", "--html", "--quiet"]
    code, _, err = run(*words, f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert (tmp_path / "out" / "figures" / f"{case}.png").stat().st_size > 5000
    page = (tmp_path / "out" / "evaluation.html").read_text("utf-8")
    assert "li $ver_{" in page
    assert '<a href="views/%3Cb%3E%24%5Cfrac%7B%E9.html">&lt;b&gt;$\\frac{?</a>' in page


def test_names_that_contain_commas_are_not_split(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    path = synthetic_dataset / "dataset.json"
    path.write_text(path.read_text().replace('"spleen"', '"spleen, left"'))
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        folder = synthetic_dataset / part
        (folder / f"syn_01{ending}").rename(folder / f"syn,01{ending}")
    (
        synthetic_dataset / "labelsTr" / "syn_03.nii.gz"
    ).unlink()  # a case that is not evaluated: a note
    words = ["evaluate", f"--data={synthetic_dataset}", "--untrained", "--support=syn_00", "-q"]
    more = ["--organ=liver,spleen, left", "--query=syn,01,syn_02", "--size=32", "--align=body"]
    code, _, err = run(*words, *more, f"--out={tmp_path / 'e'}")
    assert code == 0, err
    assert "1 case left out" in err
    read = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"][0]
    assert (read["organs"], read["queries"]) == (["liver", "spleen, left"], ["syn,01", "syn_02"])


def test_scans_are_aligned_as_the_checkpoint_was_trained(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    from lslpn.checkpoint import Checkpoint, save_checkpoint
    from lslpn.config import preset, with_overrides
    from lslpn.models import untrained

    record = {"dataset": "d", "cases": [], "organs": [], "hold_out": ["liver"], "checksum": 0}
    for align in ("none", "body"):
        config = with_overrides(preset("published"), size=32, channels=8, align=align)
        weights = untrained(config).state_dict()
        save_checkpoint(tmp_path / f"{align}.pt", Checkpoint(config, 1, weights, {}, record, {}))
        trained = f"--checkpoint={tmp_path / f'{align}.pt'}"
        words = ["evaluate", f"--data={synthetic_dataset}", "--support=syn_00", "--query=syn_01"]
        code, _, err = run(*words, trained, "-q", f"--out={tmp_path / align}")
        assert code == 0, err
        read = json.loads((tmp_path / align / "evaluation.json").read_text())["evaluations"][0]
        assert read["align"] == align


def test_evaluate_accepts_weights_or_a_checkpoint(
    synthetic_dataset: Path, run: Run, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    save_weights(own, pretrained())
    words = ["evaluate", f"--data={synthetic_dataset}", "--support=syn_00", "--query=syn_01"]
    words += ["--organ=liver", "--size=64", "-q"]
    read = []
    for number, given in enumerate(("--weights=ct", f"--weights={own}", "--untrained")):
        out = tmp_path / str(number)
        code, _, err = run(*words, given, f"--out={out}")
        assert code == 0, err
        read.append(json.loads((out / "evaluation.json").read_text())["evaluations"][0])
    assert read[0]["rows"] == read[1]["rows"] != read[2]["rows"]
    assert [one["model"] for one in read[:2]] == ["weights ct", f"weights {own}"]


def test_segment_uses_the_shipped_network_or_another(scans: Scans, run: Run) -> None:
    written = []
    for more in ((), ("--weights=ct",), ("--weights=imagenet",), ("--seed=1234",)):
        assert run(*scans.words(), "--align=body", "--force", *more)[0] == 0
        written.append(np.asanyarray(nib.load(scans.out).dataobj))
    assert np.array_equal(written[0], written[1])
    assert np.array_equal(written[2], written[3])
    assert not np.array_equal(written[0], written[2])
    own = scans.root / "own.safetensors"
    save_weights(own, pretrained())
    assert run(*scans.words(), "--align=body", "--force", f"--weights={own}")[0] == 0
    assert np.array_equal(np.asanyarray(nib.load(scans.out).dataobj), written[0])
    is_one_line(run(*scans.words(), "--force", "--weights=ct", "--seed=1")[2], "--weights ct")
    is_one_line(run(*scans.words(), "--force", "--weights=mr")[2], "--weights", "ct, imagenet")
    nowhere = run(*scans.words(), "--force", "--weights=no.safetensors")[2]
    is_one_line(nowhere, "no.safetensors", "there is no such file")
    err = run(*scans.words(), "--force", "--weights=ct", "--checkpoint=x.pt")[2]
    is_one_line(err, "--weights", "--checkpoint")


def test_train_on_every_organ(synthetic_dataset: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = (f"--set={s}" for s in ("size=48", "steps=1", "batch=1", "min_organ_pixels=10"))
    code, _, err = run(
        "train", f"--data={synthetic_dataset}", f"--out={folder}", *small, "--device=cpu", "-q"
    )
    assert code == 0, err
    record = json.loads((folder / "config.json").read_text())["data"]
    assert (record["hold_out"], record["organs"]) == ([], ["liver", "spleen", "kidney"])
    # Nothing was held out, so the organs to evaluate must be named.
    words = ["evaluate", f"--data={synthetic_dataset}", f"--checkpoint={folder}", "-q"]
    code, _, err = run(*words, "--support=syn_00", f"--out={tmp_path / 'e'}")
    assert code == 2
    is_one_line(err, "--organ: expected at least one")


def test_segment_writes_into_the_grid_of_the_query(scans: Scans, run: Run) -> None:
    code, out, err = run(*scans.words())
    assert code == 0, err
    assert "label 1: " in out
    assert files(scans.out.parent) == {"b_mask.nii.gz"}
    query, found = nib.load(scans.b), nib.load(scans.out)
    assert found.shape == query.shape
    np.testing.assert_array_equal(found.affine, query.affine)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}


def test_segment_of_several_queries_with_probabilities(scans: Scans, run: Run) -> None:
    other = save(scans.root / "c.nii.gz", scans.image[:, ::-1].copy())
    last, shares = scans.root / "c_mask.nii.gz", [scans.root / f"p{n}.nii.gz" for n in (0, 1)]
    more = [f"--query={other}", f"--out={last}", *(f"--probabilities={p}" for p in shares)]
    code, out, err = run(*scans.words(), *more)
    assert code == 0, err
    assert out.count("label 1: ") == 2
    for label_file, share_file in zip((scans.out, last), shares, strict=True):
        labels, share = nib.load(label_file).get_fdata(), nib.load(share_file)
        assert share.shape == (*labels.shape, 1)
        values = share.get_fdata()[..., 0]
        assert values.max() <= 1 + 1e-6
        assert ((values > 0.5) == (labels == 1)).mean() > 0.98
    for words, *said in (
        ([f"--query={other}"], "--out: expected one per --query, got 1 for 2"),
        ([f"--probabilities={scans.out}"], "--probabilities", "also given as --out"),
        ([f"--probabilities={scans.root / 'p.txt'}"], "--probabilities: expected a name that ends"),
        ([f"--html={scans.root / n}.html" for n in "ab"], "--html: expected one per --query"),
    ):
        code, _, err = run(*scans.words(), "--force", *words)
        assert code == 2
        is_one_line(err, *said)


# --- exit codes of the process --------------------------------------------------------------


def process(*words: object) -> list[str]:
    return [sys.executable, "-m", "lslpn", *map(str, words)]


def test_exit_code_and_stderr_of_the_process(scans: Scans) -> None:
    scans.b.unlink()
    for words in (scans.words(), [*scans.words(), "--debug"], ["--debug", *scans.words()]):
        done = subprocess.run(process(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert ("Traceback" in done.stderr) == ("--debug" in words)
        is_one_line(done.stderr.splitlines(keepends=True)[-1], "b.nii.gz")


def test_without_stderr_progress_and_notes_are_dropped(scans: Scans) -> None:
    words = [word for word in scans.words() if word != "--quiet"]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "lslpn"]
    done = subprocess.run([*shell, *words], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("written: ")


def test_names_that_the_terminal_and_pages_cannot_encode(scans: Scans) -> None:
    name = os.fsdecode(b"caf\xe9.nii.gz")  # Latin-1; not valid UTF-8
    try:
        scans.b = scans.b.rename(scans.b.with_name(name))
    except OSError as error:
        pytest.skip(f"the file system takes no such name: {error}")
    scans.out = scans.out.with_name(name)
    page = scans.out.with_suffix(".html")
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-m", "lslpn", *scans.words(), f"--html={page}", "--force"],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "caf?" in done.stdout
        assert "<title>caf?</title>" in page.read_text("utf-8")


def test_an_unexpected_error_is_one_line_and_exits_with_1(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lslpn.info

    def broken() -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(lslpn.info, "collect", broken)
    code, out, err = run("info")
    assert (code, out) == (1, "")
    is_one_line(err, "ZeroDivisionError: boom", "--debug")
    code, _, err = run("info", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_ctrl_c_that_arrives_as_another_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while Python sets up a class, in Python 3.11 and before."""
    import lslpn.info

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("Error calling __set_name__") from interrupt

    monkeypatch.setattr(lslpn.info, "collect", interrupted)
    code, _, err = run("info")
    assert (code, err) == (130, "lslpn: interrupted; nothing was left half-written\n")


def test_warnings_are_notes_of_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import lslpn.info

    def warns() -> dict[str, str]:
        warnings.warn("no training slice shows aorta", stacklevel=2)
        return {}

    monkeypatch.setattr(lslpn.info, "collect", warns)
    code, out, err = run("info", "--json")
    assert (code, out) == (0, "{}\n")
    assert err == "lslpn: note: no training slice shows aorta\n"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_exits_with_130_and_leaves_nothing_half_written(
    synthetic_dataset: Path, tmp_path: Path
) -> None:
    words = process(
        "evaluate",
        f"--data={synthetic_dataset}",
        "--untrained",
        "--support=syn_00",
        "--organ=liver",
        "--protocol=adnet",  # one slice is encoded before the bar appears
        "--batch=1",
        "--size=512",
        f"--out={tmp_path / 'out'}",
    )
    child = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A job started in the background may inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert child.stderr is not None
        seen = ""
        deadline = time.monotonic() + 120
        while "0%" not in seen and time.monotonic() < deadline:
            piece = child.stderr.read(1)
            assert piece, f"ended before the bar appeared: {seen}"
            seen += piece
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert err.splitlines()[-1].startswith("lslpn: interrupted")
    assert "Traceback" not in err
    assert files(tmp_path / "out") == set()


def test_segment_reports_assumptions_and_an_empty_result(tmp_path: Path, run: Run) -> None:
    image, labels = synthetic_ct(0)
    a = write_nifti(tmp_path / "a.nii.gz", image)
    m = write_nifti(tmp_path / "m.nii.gz", labels, dtype=np.uint8)
    b = write_nifti(tmp_path / "b.nii.gz", image + 1024)
    grey = write_nifti(tmp_path / "grey.nii.gz", np.where(image > -300, 250, 0) + image * 0)
    common = ["segment", "--support-image", a, "--support-mask", m, "--size=33", "--quiet"]
    code, out, err = run(*common, "--query", b, "--out", tmp_path / "b_out.nii.gz")
    assert code == 0
    assert "note: b.nii.gz: treated as CT stored as HU + 1024" in err
    assert "label 1: not found" not in out
    code, out, err = run(*common, "--query", grey, "--out", tmp_path / "grey_out.nii.gz")
    assert code == 0
    assert "note: grey.nii.gz: not treated as CT in HU, while a.nii.gz is" in err
    assert ("note: grey.nii.gz: nothing was found" in err) == (out.count(": not found") == 3)


def test_the_cpu_is_used_without_looking_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> bool:
        raise AssertionError("looked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", looked)
    assert torch_device("cpu") == torch.device("cpu")
