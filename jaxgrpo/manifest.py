"""What a directory holds, by digests: whether it still is, byte for byte, what was written.

The manifest is one more file in the directory, written last:

    {"version": 1, "sha256": ..., "files": {"state/d/0f": {"size": 4096, "sha256": ...}, ...}}

Its own `sha256` is of `files`, so that damage to it is told from damage to what it lists.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from jaxgrpo.files import replace_file, sync_dir

NAME = "manifest.json"
"""The manifest's name in its directory."""

_VERSION = 1
_LARGEST = 64 << 20  # bytes; of half a million files
_THREADS = 8  # hashlib computes without the interpreter's lock

_Listed = dict[str, tuple[int, str]]  # by path in the directory: bytes, SHA-256 in hex


def write_manifest(directory: Path) -> None:
    """Makes the files in a directory last through a loss of power, and then says so in a manifest.

    Args:
      directory: nothing else may write in it.

    Raises:
      ValueError: it holds a link, a device or the like.
      OSError: it cannot be read or written.
    """
    sizes, folders = _walk(directory)
    digests = _digests((directory / name for name in sizes), sync=True)
    listed = {name: (sizes[name], digest) for name, digest in zip(sizes, digests, strict=True)}
    for folder in folders[1:]:
        sync_dir(folder)
    replace_file(directory / NAME, _encode(listed))


def check_manifest(directory: Path) -> None:
    """Reads all files and compares them with the manifest. Nothing outside is ever opened.

    Raises:
      ValueError: one line that names the first file at fault: it is missing, not listed, of another
        size, of other bytes, cannot be read, or is neither file nor directory; or the manifest
        itself is missing or not as it was written.
      OSError: the directory may not be read.
    """
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise ValueError(f"{directory} is no directory")
    try:
        _check(directory)
    except OSError as error:
        if error.errno != errno.EIO:  # the others are no damage: no permission, no handles left
            raise
        path = Path(error.filename or directory / NAME)  # which alone is read without its name
        name = path.relative_to(directory).as_posix()
        raise ValueError(f"{directory}: {name!r} cannot be read: {error.strerror}") from error


def _check(directory: Path) -> None:
    sizes, _ = _walk(directory)
    listed = _read(directory)
    for name in sorted(sizes.keys() | listed.keys()):
        if name not in sizes:
            raise ValueError(f"{directory}: {name!r} is missing")
        if name not in listed:
            raise ValueError(f"{directory}: {name!r} is not in its {NAME}")
        size, _ = listed[name]
        if sizes[name] != size:
            raise ValueError(f"{directory}: {name!r} has {sizes[name]} bytes, not {size}")
    # Closed here, not by the garbage collector, which may run in a thread that is just starting
    # with locks held, and would wait for its threads for ever.
    with closing(_digests(directory / name for name in sizes)) as digests:
        for name, digest in zip(sizes, digests, strict=True):
            if digest != listed[name][1]:
                raise ValueError(f"{directory}: {name!r} is damaged: its SHA-256 is another")


def _walk(directory: Path) -> tuple[dict[str, int], list[Path]]:
    """The bytes of each file but the manifest, by its path in the directory; and all folders."""
    sizes, folders = {}, [directory]
    for folder in folders:  # which grow meanwhile
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = Path(entry.path).relative_to(directory).as_posix()
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{directory}: {name!r} is neither a file nor a directory")
            elif name != NAME:
                sizes[name] = entry.stat(follow_symlinks=False).st_size
    return sizes, folders


def _digests(paths: Iterable[Path], sync: bool = False) -> Generator[str, None, None]:
    """SHA-256 of some files, a few at a time."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(partial(_digest, sync=sync), paths)
    finally:
        pool.shutdown(cancel_futures=True)


def _digest(path: Path, sync: bool) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            raise
    return digest


def _read(directory: Path) -> _Listed:
    path = directory / NAME
    if not path.is_file():
        raise ValueError(f"{directory}: {NAME!r} is missing")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{directory}: {NAME!r} is too large for one")
    data = path.read_bytes()
    try:
        files = json.loads(data.decode())["files"]
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
        ours = data == _encode(listed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{directory}: {NAME!r} is damaged, or of another version")
    return listed


def _encode(listed: _Listed) -> bytes:
    """The one way to write it."""
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in listed.items()}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    document = {"version": _VERSION, "sha256": own, "files": files}
    return (json.dumps(document, indent=1) + "\n").encode()
