"""`lslpn prepare`: a command for each public corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from ..errors import InputError
from .options import QUIET, command, group, option, say, sharing, split

prepare_app = group(
    "Convert a public corpus, as it is distributed, into a data set for the other commands."
)

_ORGANS = option(
    "--organ NAME",
    "Only these organs, repeated or with commas, in the order of their label values.",
)
_ALLOW_MISSING = option(
    "--allow-missing",
    "Accept cases without a file for an organ, which is background there.",
    False,
)


@dataclass(frozen=True)
class _Given:
    """The options that all corpora share, which `_recipe` adds to every command."""

    src: Path = typer.Argument(..., metavar="SRC", help="The corpus, unpacked.")
    dst: Path = typer.Argument(..., metavar="DST", help="The data set's folder; new or empty.")
    cases: list[str] | None = option(
        "--cases CASE",
        "Only these cases, repeated or with commas; default: all.",
    )
    skip_bad: bool = option("--skip-bad", "Convert the good cases, and list the others.", False)
    resume: bool = option("--resume", "Continue in DST, and keep its finished cases.", False)
    quiet: bool = QUIET


def _recipe(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function of `_Given` and options of its own."""
    return command(prepare_app)(sharing(_Given, function))


@_recipe
def visceral(
    given: _Given,
    corpus: Literal["gold", "silver", "both"] = option(
        "--corpus", "20 cases by hand, 65 fused, or both.", "both"
    ),
    organ: list[str] | None = _ORGANS,
    annotator: str | None = option(
        "--annotator ID",
        "The annotator to use if an organ has several, as in the file names; default, and if there "
        "is none of theirs: the lowest number.",
    ),
    allow_missing: bool = _ALLOW_MISSING,
) -> None:
    """VISCERAL: SRC holds Anatomy3-trainingset and SilverCorpus."""
    own = {"corpus": corpus, "annotator": annotator}
    _prepare("visceral", given, organs=split(organ), allow_missing=allow_missing, **own)


@_recipe
def btcv(given: _Given) -> None:
    """BTCV, the abdomens of Beyond the Cranial Vault: SRC is the unpacked RawData.zip."""
    _prepare("btcv", given)


@_recipe
def chaos(given: _Given) -> None:
    """CHAOS, the T2-SPIR MR scans: SRC is the unpacked CHAOS_Train_Sets.zip.

    Needs pydicom: pip install "lslpn\\[dicom]".
    """
    _prepare("chaos", given)


@_recipe
def totalsegmentator(
    given: _Given, organ: list[str] | None = _ORGANS, allow_missing: bool = _ALLOW_MISSING
) -> None:
    """TotalSegmentator's CT data set, version 1 or 2: SRC holds s0001, s0002 and so on.

    Organs are named as their files are; default: the 13 of BTCV.
    """
    _prepare("totalsegmentator", given, organs=split(organ), allow_missing=allow_missing)


def _prepare(name: str, given: _Given, **options: Any) -> None:
    from ..corpora import prepare_corpus

    src, dst = given.src, given.dst
    outcome = prepare_corpus(
        name,
        src,
        dst,
        cases=split(given.cases),
        skip_bad=given.skip_bad,
        resume=given.resume,
        progress=not given.quiet,
        **options,
    )
    for problem in outcome.problems:
        what = problem.what.replace("`allow_missing=True`", "--allow-missing")
        say(f"{problem.case or 'no case'}: {what}")
    for note in outcome.notes:
        say(f"note: {note}; see {dst / 'prepared.json'}")
    if outcome.left_out:
        count = len(outcome.left_out)
        say(f"note: {count} case{'s' * (count != 1)} left out, without any of the organs")
    if not outcome.complete:
        count, done = len(outcome.problems), len(outcome.done)
        if not count:
            raise InputError(f"{src}: no case shows any of the organs; choose others with --organ")
        kept = (
            f"{done} good case{'s are' if done != 1 else ' is'} in {dst}, not yet a data set; "
            "correct the files and --resume, or use only the good cases with --resume --skip-bad"
            if done
            else "no case can be used; correct the files and --resume"
        )
        raise InputError(f"{src}: {count} problem{'s' * (count != 1)}, listed above; {kept}")
    print(f"written: {dst}, {len(outcome.done)} cases; see prepared.json there for their files")
