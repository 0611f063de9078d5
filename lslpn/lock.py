"""One writer at a time in a folder.

The lock is the operating system's, held through an open file: it ends with the process, however
that ends, so a kill leaves nothing that has to be cleared away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError

FILE_NAME = ".lock"


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for the time of the `with`; the folder must be there and writable.

    Leaves an empty file `.lock` in it, which means nothing once nobody holds it.

    Raises:
        InputError: somebody else holds it, or the file cannot be written.
    """
    path = Path(folder) / FILE_NAME
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
            f"{path}: cannot be locked ({getattr(error, 'strerror', None) or error}); give a "
            "folder on a disk that you may write to and that knows locks"
        ) from error
    try:
        yield
    finally:
        lock.release()
