"""The error that the command line prints as a sentence."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's argument or file cannot be used.

    The message says in one or two sentences which file or argument it is, what was expected, what
    was found, and how to correct it. `lslpn` prints it to stderr and exits with code 2.
    """


def several(argument: str, given: Iterable[str]) -> tuple[str, ...]:
    """The names in `given`; InputError for a text, which would be taken for its characters."""
    if isinstance(given, str):
        raise InputError(f"{argument}: expected a list of names, got {given!r}; write [{given!r}]")
    return tuple(given)


def meant(given: str, known: Iterable[str]) -> str:
    """ " (did you mean 'liver'?)", or "" if no known name is similar."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(what: str, given: str, where: str, known: Iterable[str], most: int = 999) -> InputError:
    """The error for an unknown name, with a suggestion and up to `most` of the known names."""
    names = list(known)
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return InputError(
        f"{what} {given!r}: not in {where}{meant(given, names)}; its {len(names)} {what}s: {shown}"
    )
