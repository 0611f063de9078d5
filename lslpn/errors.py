"""The error that the command line prints as a sentence."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument or file of the user cannot be used.

    The message is one or two sentences: which file or argument, what was expected, what was found,
    and how to correct it. `lslpn` prints it to stderr and exits with code 2.
    """


def meant(given: str, known: Iterable[str]) -> str:
    """ " (did you mean 'liver'?)", or nothing where no name is like the one that was given."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(what: str, given: str, where: str, known: Iterable[str], most: int = 999) -> InputError:
    """The error for a name that is not there, with the one that was meant and those there are."""
    names = list(known)
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return InputError(
        f"{what} {given!r}: not in {where}{meant(given, names)}; its {len(names)} {what}s: {shown}"
    )
