"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment it is the old one or the new one, whole.

    Raises:
      OSError: it cannot be written; the old one stays, and nothing is left beside it.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Makes the names in a directory last through a loss of power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
