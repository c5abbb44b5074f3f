"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a part of it is never seen under its name; the last of several writers wins.

    A process that is killed may leave `.NAME.*.unfinished` behind, for :func:`remove_unfinished`.

    Raises:
        OSError: with the name of the file, if it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")  # of this call alone
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name with none of its data
        os.replace(unfinished, path)
    except OSError as error:  # itself of the unfinished file, or of none where the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of a file left; only where nobody can be writing it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*unfinished"):
        left.unlink(missing_ok=True)
