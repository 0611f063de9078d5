"""Atomic writes, a lock for a folder, and reading tensors from untrusted files.

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
        "choose an output path in a folder where you have write permission"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def look_up(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of `path`, or None if it does not exist.

    Unlike `Path.exists` and its kin, which raise an OSError if a folder cannot be searched or a
    name is too long, it raises an InputError.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(
            f"{path}: cannot be accessed ({_reason(error)}); check the path and the permissions "
            "of its folder"
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
    """Yield a path to write to, which replaces `path` on a clean exit.

    The yielded file is in the folder of `path`, which is created if necessary. Its name starts with
    a dot and ends in `.partial` and the suffixes of `path`, from which nibabel and matplotlib take
    the format. On any exception it is removed and `path` stays as it was.

    Raises:
        InputError: the folder cannot be created or written to, or the disk is full.
    """
    target = Path(path)
    try:
        aside = _beside(target)
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error
    try:
        yield aside
        # mkstemp creates a private file; give it the mode of a plain open().
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
    """A new empty file in the folder of `target`, which is created if necessary."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # This also refuses names that the file system does not take, before anything is written.
        if stat.S_ISDIR(os.stat(target).st_mode):
            raise IsADirectoryError(21, "it is a folder")
    except FileNotFoundError:
        pass
    # A long name with dots in it may have long suffixes; file systems take 255 bytes.
    suffix = "".join(target.suffixes[-2:])[-_SUFFIX_CHARACTERS:]
    suffix = suffix[suffix.find(".") :] if "." in suffix else ""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".lslpn.", suffix=f".partial{suffix}")
    os.close(handle)
    return Path(name)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically; raises as `replacing`."""
    with replacing(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 atomically; raises as `replacing`.

    Names of files may hold bytes that are not UTF-8; each becomes a question mark.
    """
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` to `path` as JSON atomically; raises as `replacing`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Append `text` to `path` as UTF-8. A kill may truncate it, which readers must expect."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _refusal(Path(path), error) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what `write_bytes` would, before any work is done; creates the folder of `path`."""
    target = Path(path)
    try:
        _beside(target).unlink()
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which must exist and be writable.

    The lock is the operating system's and ends with the process, however that ends. It leaves an
    empty file `.lock`, which has no meaning once nobody holds it.

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
            f"{folder}: another lslpn is at work in it; wait until it has ended, or give another "
            "folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"{path}: cannot be locked ({_reason(error)}); give a folder where you have write "
            "permission, on a disk that supports locks"
        ) from error
    try:
        yield
    finally:
        lock.release()


def load_tensors(path: str | os.PathLike[str], expected: str) -> Any:
    """Read tensors and plain values, never code, that torch.save wrote to `path`, onto the CPU.

    The archive's checksums are verified, which torch does not do.

    Raises:
        InputError: the file is damaged, holds something else, or was not written by torch.save;
            the message ends with `expected`, a phrase such as "a state dict".
    """
    import torch  # here, since most users of this module need no torch

    try:
        if zipfile.is_zipfile(path):  # files of old versions of torch are not
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {record}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on such files the unpickler can raise anything
        # torch's message fills a page, in terminal colours; its first sentence is enough.
        first = re.split(r"\. |[\n\x1b]", str(error))[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read ({first}); it is damaged or another kind of file, expected "
            f"{expected}"
        ) from error


def load_safetensors(path: Path, expected: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata; raises as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise InputError(f"{path}: there is no such file, expected {expected}; check the path")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected {expected}") from error


def check_state(
    given: Mapping[str, Any],
    own: Mapping[str, Any],
    name: str | os.PathLike[str],
    correct: str = "build the model from its configuration",
) -> None:
    """Refuse a state dict whose tensors differ from `own` in names or shapes, or are not dense,
    real and finite; `name` and `correct`, how to correct it, are for the message."""
    import torch

    for key, value in given.items():
        wrong = None
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            wrong = "is not a dense tensor"
        elif value.is_quantized or value.is_complex():
            wrong = f"holds {value.dtype}, not real numbers"
        elif not bool(value.isfinite().all()):
            wrong = "has values that are not finite"
        elif key.endswith("running_var") and bool((value < 0).any()):
            wrong = "has negative variances"
        if wrong:
            raise InputError(f"{name}: is damaged: {key} {wrong}; use another copy of the file")
    differ = sorted(set(own) ^ set(given), key=str)
    differ += [key for key in own if key in given and own[key].shape != given[key].shape]
    if differ:
        expected, found = (
            tuple(state[differ[0]].shape) if differ[0] in state else "nothing"
            for state in (own, given)
        )
        raise InputError(
            f"{name}: has another architecture: {len(differ)} tensors differ, the first is "
            f"{differ[0]}: expected {expected}, found {found}; {correct}"
        )
