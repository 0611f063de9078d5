"""Reading files of torch.save that come from anywhere."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from .errors import InputError


def load_tensors(path: str | os.PathLike[str], expected: str) -> Any:
    """What torch.save wrote to `path`, on the CPU: tensors and plain values, no code.

    Raises:
        InputError: the file is damaged, holds something else, or was not written by torch.save;
            the message ends with `expected`, a phrase such as "a state dict".
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler fail in every way there is
        # torch's message goes on for a page, in terminal colours; its first sentence will do.
        first = re.split(r"\. |[\n\x1b]", str(error))[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read ({first}); it is damaged or something else, expected "
            f"{expected}"
        ) from error
