"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import shutil
from collections.abc import Iterator
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


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory to write to, which is at `path` once it is whole and on the disk.

    Until then it is `.NAME.partial` beside it, where nothing else may write. What ends the block
    early removes that; what a killed process has left, the next one removes.

    Raises:
      ValueError: there is something at `path` that is no empty directory.
      OSError: it cannot be written, or the block raised this; one line that names `path`.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already; name a new or empty directory")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for inside in (*partial.rglob("*"), partial):
            _sync(inside)
        partial.rename(path)
        try:
            sync_dir(path.parent)
        except OSError:
            path.rename(partial)
            raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            left = f"its remains are in {partial}" if partial.exists() else "nothing of it is left"
            raise OSError(
                f"{path} could not be written ({error.strerror or error}); {left}. Make room or"
                " mend the disk, or name a directory elsewhere"
            ) from error
        raise


def sync_dir(path: Path) -> None:
    """Makes the names in a directory last through a loss of power."""
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
