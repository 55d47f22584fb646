"""JSON files of a model directory: anyone's are read within bounds or refused, ours written."""

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

_LARGEST = 1 << 28  # bytes of a file that is read whole; a large tokenizer.json has some 10^7


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ValueError: there is no such file, or it holds anything else; one line that names it.
    """
    check_regular(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_object(data, str(file))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` is; `where` begins the error.

    Raises:
      ValueError: it is none, or has a key twice.
    """
    try:
        value = json.loads(data, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is not a JSON object")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs, for `object_pairs_hook`.

    Raises:
      ValueError: a key occurs twice.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return value


def check_regular(file: Path, largest: int = _LARGEST) -> None:
    """Refuses what cannot be read to an end: pipes, devices, directories; links are followed.

    Raises:
      ValueError: there is no regular file of at most `largest` bytes.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file}: cannot be read: it is no regular file")
    if status.st_size > largest:
        raise ValueError(f"{file}: cannot be read: it has more than {largest >> 20} MB")


def write_object(file: Path, value: dict[str, Any]) -> None:
    """Writes a file that `read_object` reads, a field a line."""
    file.write_text(json.dumps(value, indent=2) + "\n")
