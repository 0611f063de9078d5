"""Atomic writes, a lock for a folder, and tensors from files of others.

All files of this package are written here: to a temporary file in the same folder, flushed to
disk, and renamed over the target. A kill at any moment leaves the previous file intact.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InputError

_SUFFIX_CHARACTERS = 20


def _refusal(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({_reason(error)}); "
        "give an output path in a folder that you may write to"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def look_up(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What is at `path`; None where nothing is.

    `Path.exists` and its like raise a bare OSError where a folder may not be searched or a name
    is too long.

    Raises:
        InputError: it cannot be found out.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(
            f"{path}: cannot be looked up ({_reason(error)}); check the path and whether you may "
            "read its folder"
        ) from error


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file; raises as `look_up`."""
    found = look_up(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder; raises as `look_up`."""
    found = look_up(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; on a clean exit it takes the place of `path`.

    The yielded file lies in the folder of `path` (which is made if need be), starts with a dot
    and ends in `.partial` followed by the suffixes of `path`, because nibabel and matplotlib
    read the format off the name. On any exception it is removed and `path` stays as it was.

    Raises:
        InputError: the folder cannot be made or written to, or the disk refuses.
    """
    target = Path(path)
    try:
        aside = _beside(target)
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error
    try:
        yield aside
        # mkstemp makes the file private; give it the mode that a plain open() would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _refusal(target, error) from error
    finally:
        aside.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    """An empty file in the folder of `target`, which is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A name that the file system does not take is refused here, before anything is written.
        if stat.S_ISDIR(os.stat(target).st_mode):
            raise IsADirectoryError(21, "it is a folder")
    except FileNotFoundError:
        pass
    # Of a long name with dots in it, no more than the file system takes; names have 255 bytes.
    suffix = "".join(target.suffixes[-2:])[-_SUFFIX_CHARACTERS:]
    suffix = suffix[suffix.find(".") :] if "." in suffix else ""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".lslpn.", suffix=f".partial{suffix}")
    os.close(handle)
    return Path(name)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can open folders at all."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` to `path`, whole or not at all; raises as `replacing` does."""
    with replacing(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; raises as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as JSON to `path`, whole or not at all; raises as `write_bytes` does."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Append `text` as UTF-8 to `path`; a kill may cut it, so readers leave out what is cut."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _refusal(Path(path), error) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what `write_bytes` would, before the work is done; makes the folder of `path`."""
    target = Path(path)
    try:
        _beside(target).unlink()
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for the time of the `with`; the folder must be there and writable.

    The lock is the operating system's and ends with the process, however that ends. Leaves an
    empty file `.lock`, which means nothing once nobody holds it.

    Raises:
        InputError: somebody else holds it, or the file cannot be written.
    """
    path = Path(folder) / ".lock"
    # Not a singleton: two callers in one process exclude each other as two processes do.
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder}: another lslpn is at work in it; wait until that has ended, or give "
            "another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"{path}: cannot be locked ({_reason(error)}); give a "
            "folder on a disk that you may write to and that knows locks"
        ) from error
    try:
        yield
    finally:
        lock.release()


def load_tensors(path: str | os.PathLike[str], expected: str) -> Any:
    """What torch.save wrote to `path`, on the CPU: tensors and plain values, no code.

    The archive's checksums are verified, which torch does not do.

    Raises:
        InputError: the file is damaged, holds something else, or was not written by torch.save;
            the message ends with `expected`, a phrase such as "a state dict".
    """
    import torch  # here, since most who need this module need no torch

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


def load_safetensors(path: Path, expected: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata; as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise InputError(f"{path}: there is no such file, expected {expected}; check the path")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected {expected}") from error


def first_unusable(state: Mapping[str, Any]) -> str | None:
    """The first tensor of a state dict that no network can compute with, and what is wrong with it;
    None where all can be used."""
    import torch

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
