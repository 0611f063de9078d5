"""Reading files of torch.save that come from anywhere."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError


def load_tensors(path: str | os.PathLike[str], expected: str) -> Any:
    """What torch.save wrote to `path`, on the CPU: tensors and plain values, no code.

    The archive's checksums are verified, which torch does not do.

    Raises:
        InputError: the file is damaged, holds something else, or was not written by torch.save;
            the message ends with `expected`, a phrase such as "a state dict".
    """
    try:
        if zipfile.is_zipfile(path):  # older files of torch.save are not
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {record}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler fail in every way there is
        # torch's message goes on for a page, in terminal colours; its first sentence will do.
        first = re.split(r"\. |[\n\x1b]", str(error))[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read ({first}); it is damaged or something else, expected "
            f"{expected}"
        ) from error


def first_unusable(state: Mapping[str, Any]) -> str | None:
    """What is wrong with the first tensor of a state dict that no network can compute with.

    Returns:
        such as "conv1.weight holds values that are not finite", or None where all can be used.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return f"{name} is no dense tensor"
        if value.is_quantized or value.is_complex():
            return f"{name} holds {value.dtype}, not real numbers"
        if not bool(value.isfinite().all()):
            return f"{name} holds values that are not finite"
        if name.endswith("running_var") and bool((value < 0).any()):
            return f"{name} holds negative variances"
    return None
