"""`lslpn prepare`: a command per public corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import InputError
from .options import QuietOption, command, group, option, say, split

prepare_app = group(
    "Turn a public corpus, as it is distributed, into a data set for the other commands."
)

_Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="The corpus, unpacked.", show_default=False)
]
_Target = Annotated[
    Path,
    typer.Argument(metavar="DST", help="The data set's folder; new or empty.", show_default=False),
]
_SomeCases = Annotated[
    list[str] | None,
    option(
        "--cases CASE",
        "Only these cases, repeated or with commas; default: all that the corpus has.",
    ),
]
_SomeOrgans = Annotated[
    list[str] | None,
    option(
        "--organ NAME",
        "Only these organs, repeated or with commas, in the order of their label values.",
    ),
]
_AllowMissing = Annotated[
    bool,
    option(
        "--allow-missing",
        "Take a case though an organ has no file in it; the organ is background there.",
    ),
]
_SkipBad = Annotated[
    bool, option("--skip-bad", "Make a data set of the good cases, and list the others.")
]
_Resume = Annotated[bool, option("--resume", "Go on in DST; cases finished there are kept.")]


@command(prepare_app)
def visceral(
    src: _Source,
    dst: _Target,
    corpus: Annotated[
        Literal["gold", "silver", "both"],
        option("--corpus", "20 cases by hand, 65 fused, or both."),
    ] = "both",
    organ: _SomeOrgans = None,
    annotator: Annotated[
        str | None,
        option(
            "--annotator ID",
            "Whose drawing to take where an organ has several, as the file names have it; default,"
            " and where there is none of theirs: the lowest number.",
        ),
    ] = None,
    cases: _SomeCases = None,
    allow_missing: _AllowMissing = False,
    skip_bad: _SkipBad = False,
    resume: _Resume = False,
    quiet: QuietOption = False,
) -> None:
    """VISCERAL: SRC holds Anatomy3-trainingset and SilverCorpus."""
    _prepare(
        "visceral", src, dst, cases, skip_bad, resume, quiet,
        corpus=corpus, organs=split(organ), annotator=annotator,
        allow_missing=allow_missing,
    )  # fmt: skip


@command(prepare_app)
def btcv(
    src: _Source,
    dst: _Target,
    cases: _SomeCases = None,
    skip_bad: _SkipBad = False,
    resume: _Resume = False,
    quiet: QuietOption = False,
) -> None:
    """BTCV, the abdomens of Beyond the Cranial Vault: SRC is the unpacked RawData.zip."""
    _prepare("btcv", src, dst, cases, skip_bad, resume, quiet)


@command(prepare_app)
def chaos(
    src: _Source,
    dst: _Target,
    cases: _SomeCases = None,
    skip_bad: _SkipBad = False,
    resume: _Resume = False,
    quiet: QuietOption = False,
) -> None:
    """CHAOS, the T2-SPIR MR scans: SRC is the unpacked CHAOS_Train_Sets.zip.

    Needs pydicom: pip install "lslpn\\[dicom]".
    """
    _prepare("chaos", src, dst, cases, skip_bad, resume, quiet)


@command(prepare_app)
def totalsegmentator(
    src: _Source,
    dst: _Target,
    organ: _SomeOrgans = None,
    cases: _SomeCases = None,
    allow_missing: _AllowMissing = False,
    skip_bad: _SkipBad = False,
    resume: _Resume = False,
    quiet: QuietOption = False,
) -> None:
    """TotalSegmentator's CT data set, version 1 or 2: SRC holds s0001, s0002 and so on.

    Organs are named as their files are; default: the 13 of BTCV.
    """
    _prepare(
        "totalsegmentator", src, dst, cases, skip_bad, resume, quiet,
        organs=split(organ), allow_missing=allow_missing,
    )  # fmt: skip


def _prepare(
    name: str,
    src: Path,
    dst: Path,
    cases: list[str] | None,
    skip_bad: bool,
    resume: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from ..corpora import prepare_corpus

    outcome = prepare_corpus(
        name,
        src,
        dst,
        cases=split(cases),
        skip_bad=skip_bad,
        resume=resume,
        progress=not quiet,
        **options,
    )
    for problem in outcome.problems:
        what = problem.what.replace("`allow_missing=True`", "--allow-missing")
        say(f"{problem.case or 'no case'}: {what}")
    for note in outcome.notes:
        say(f"note: {note}; see {dst / 'prepared.json'}")
    if outcome.left_out:
        count = len(outcome.left_out)
        say(f"note: {count} case{'s' * (count != 1)} left out, which show none of the organs")
    if not outcome.complete:
        count, done = len(outcome.problems), len(outcome.done)
        if not count:
            raise InputError(f"{src}: no case shows any of the organs; choose others with --organ")
        kept = (
            f"{done} good case{'s are' if done != 1 else ' is'} in {dst}, not yet a data set; mend "
            "the files and --resume, or take the good cases alone with --resume --skip-bad"
            if done
            else "no case can be used; mend the files and --resume"
        )
        raise InputError(f"{src}: {count} problem{'s' * (count != 1)}, listed above; {kept}")
    print(f"written: {dst}, {len(outcome.done)} cases; prepared.json there says from what")
