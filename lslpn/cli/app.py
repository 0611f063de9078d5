"""The command line: `lslpn demo`, `segment`, `view`, `train`, `evaluate` and more.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 success; 1 an error
of the program or the machine; 2 an unusable argument or file, in one line; 130 interrupted.

torch takes seconds to import, so it is imported only when a command needs it.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from ..errors import InputError
from .corpora import prepare_app
from .evaluate import evaluate
from .options import InterruptedByUserError, Network, command, group, option, say, sharing
from .paper import experiment_app
from .segment import demo, segment, view
from .train import train

app = group(
    "Few-shot segmentation of organs: with one labelled scan, find the organ in another.\n\n"
    "The method is the location-sensitive local prototype network (Yu et al., 2021). "
    "[bold]lslpn demo[/bold] shows it on two CT scans that come along; "
    "[bold]lslpn COMMAND --help[/bold] explains a command.",
    name="lslpn",
    epilog="--debug, before or after the command, shows the traceback of an error.",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"lslpn {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: bool = option(
        "--version", "Print the version.", False, callback=_print_version, is_eager=True
    ),
    debug: bool = option("--debug", "Show the traceback of an error.", False),
) -> None:
    # `main` takes --debug off the line, wherever it stands; it is declared here for the help.
    pass


def info(as_json: bool = option("--json", "Print JSON.", False)) -> None:
    """Show versions, processor, GPUs, and which backends of the head can run here and why not."""
    from ..info import collect, report

    facts = collect()
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        print(report(facts))


for _function in (demo, sharing(Network, segment), view, train, sharing(Network, evaluate), info):
    command(app)(_function)
app.add_typer(prepare_app, name="prepare")
app.add_typer(experiment_app, name="experiment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the words after `lslpn`, by default those of the process.

    Returns:
        the exit code: 0, 1, 2 or 130 as the module's docstring has them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(words, debug)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a plain note, without the line of code that gave it."""
    say(f"note: {message}")


def _run(words: list[str], debug: bool) -> int:
    try:
        # Not standalone: errors come up to here, and one place decides how they read.
        code = typer.main.get_command(app).main(words, prog_name="lslpn", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explained(error)
        if code == 1 and not debug:
            message += "; --debug shows where it happened"
        if message:
            say(message)
        return code


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and the line that says what it is."""
    if isinstance(error, (KeyboardInterrupt, InterruptedByUserError, typer.Abort)):
        return 130, "interrupted; nothing was left half-written"
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        # A path that the system does not take or give, wherever it was first used.
        return 2, (
            f"error: {error.filename}: cannot be used ({error.strerror or error}); check the path "
            "and whether you may read and write there"
        )
    # Wrong options: typer has had two classes of this name, so it is known by its attributes.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "lslpn"
        # A group of commands without one has printed its help, and has nothing to add.
        message = error.format_message().rstrip(".")
        return 2, f"error: {message}; see `{path} --help`" if message else ""
    return 1, f"error: {type(error).__name__}: {error}"
