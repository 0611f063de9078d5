"""Files that are either whole or not there.

Everything this package writes goes through here: written aside in the same folder, flushed to
the disk, and renamed over the target. A kill at any moment leaves the previous file whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def _refusal(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); "
        "give an output path in a folder that you may write to"
    )


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; on a clean exit it takes the place of `path`.

    The yielded file lies in the folder of `path` (which is made if need be), starts with a dot
    and ends in `.partial` followed by the suffixes of `path`, because nibabel and matplotlib
    read the format off the name. On any exception it is removed and `path` stays as it was.

    Raises:
        InputError: the folder cannot be made or written to, or the disk refuses.
    """
    target = Path(path)
    suffix = ".partial" + "".join(target.suffixes[-2:])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name.split('.')[0]}.", suffix=suffix
        )
        os.close(handle)
    except OSError as error:
        raise _refusal(target, error) from error
    aside = Path(name)
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


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can open folders at all."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        InputError: the folder cannot be made or written to, or the disk refuses.
    """
    with replacing(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; raises as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out that `path` cannot be written before the work is done, not after it.

    Makes the folder of `path` if need be, and leaves nothing else behind.

    Raises:
        InputError: as `write_bytes` would.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _refusal(target, error) from error
