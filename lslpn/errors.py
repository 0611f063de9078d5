"""The one error that the command line turns into a plain sentence."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one clear sentence or two: which file or argument, what was expected,
    what was found, and how to mend it. `lslpn` prints it to stderr and exits with code 2.
    """
