"""The command line: `lslpn demo`, `segment`, `view`, `train`, `evaluate` and more.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 success; 1 an error
of the program or the machine; 2 an unusable argument or file, in one line; 130 interrupted.

torch takes seconds to import, so it is imported only when a command needs it.
"""

from __future__ import annotations

import io
import os
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
    "[bold]lslpn demo[/bold] shows it on two CT scans that ship with the package; "
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
    # `main` removes --debug from the words, wherever it is; it is declared here for the help.
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
    """Run the command line with the words after `lslpn`, by default those of the process.

    Returns:
        the exit code, see above.
    """
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    with warnings.catch_warnings():
        # Show warnings as plain notes, without the line of code that issued them.
        warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
        try:
            # Not standalone, so that all errors arrive here.
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


def _prepare_streams() -> None:
    """Print "?" for characters that stdout cannot encode, and nothing to a closed stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error; during an import it may arrive as another exception."""
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, InterruptedByUserError, typer.Abort)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if _interrupted(error):
        return 130, "interrupted; nothing was left half-written"
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, (
            f"error: {error.filename}: cannot be used ({error.strerror or error}); check the path "
            "and its permissions"
        )
    # Wrong options. typer has had two classes for them, so they are recognised by attributes.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "lslpn"
        # A group without a command has printed its help, and its message is empty.
        message = error.format_message().rstrip(".")
        return 2, f"error: {message}; see `{path} --help`" if message else ""
    return 1, f"error: {type(error).__name__}: {error}"
