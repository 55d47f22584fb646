"""Manifests: a directory is what was written, or the file at fault is named; no way out of it."""

import errno
import hashlib
import json
import os
import random
import sys
import threading

import pytest

from jaxgrpo.manifest import NAME, check_manifest, write_manifest

opened = None  # while it is a list: the paths that this process opens


def note_opened(event, args):
    if opened is not None and event == "open" and not isinstance(args[0], int):
        opened.append(args[0])


sys.addaudithook(note_opened)  # it sees what any part of Python opens


def refusal(directory):
    """What is said of a directory that is not what was written.

    No file outside is opened, and no thread is left for whoever comes upon the exception later.
    """
    global opened
    threads = threading.active_count()
    opened = []
    try:
        with pytest.raises(ValueError, match=str(directory)) as refused:
            check_manifest(directory)
    finally:
        paths, opened = opened, None
    for path in paths:
        assert os.fsdecode(path).startswith(f"{directory}/"), path
        assert os.path.realpath(path).startswith(f"{directory}/"), path
    assert threading.active_count() == threads
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{directory}")


@pytest.fixture
def tree(tmp_path):
    """A directory of random files, with a manifest."""
    rng = random.Random()
    directory = tmp_path / "1"
    (directory / "empty" / "folders").mkdir(parents=True)
    for i in range(12):
        folder = directory.joinpath(*rng.choices("de", k=i % 3))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i} ü\n").write_bytes(rng.randbytes(rng.choice([1, 40, 100_000])))
    (directory / "nothing").touch()
    write_manifest(directory)
    return directory


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NAME)


def listed(directory):
    return {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files(directory)
    }


def forge(directory, names):
    """A manifest as this package writes it, of whatever is given."""
    own = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    document = {"version": 1, "sha256": own, "files": names}
    (directory / NAME).write_text(json.dumps(document, indent=1) + "\n")


def test_what_was_written_is_what_is_there(tree):
    check_manifest(tree)
    document = json.loads((tree / NAME).read_bytes())
    assert document["version"] == 1
    assert document["files"] == listed(tree)
    forge(tree, document["files"])
    check_manifest(tree)
    write_manifest(tree)  # its own file is not in it
    check_manifest(tree)


def test_each_kind_of_damage_to_each_file_is_named(tree):
    rng = random.Random()
    for path in files(tree):
        data = path.read_bytes()
        name = repr(path.relative_to(tree).as_posix())
        if data:
            at = rng.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            assert refusal(tree) == f": {name} is damaged: its SHA-256 is another"
            path.write_bytes(data[:at])
            assert refusal(tree) == f": {name} has {at} bytes, not {len(data)}"
        path.write_bytes(data + b"\0")
        assert refusal(tree) == f": {name} has {len(data) + 1} bytes, not {len(data)}"
        path.unlink()
        assert refusal(tree) == f": {name} is missing"
        path.mkdir()
        assert refusal(tree) == f": {name} is missing"
        path.rmdir()
        path.write_bytes(data)
        (path.parent / "more").touch()
        more = (path.parent / "more").relative_to(tree).as_posix()
        assert refusal(tree) == f": {more!r} is not in its {NAME}"
        (path.parent / "more").unlink()
        check_manifest(tree)


def test_a_damaged_manifest_says_so_itself(tree):
    rng = random.Random()
    path = tree / NAME
    good = path.read_bytes()
    damaged = f": {NAME!r} is damaged, or of another version"
    for _ in range(100):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        assert refusal(tree) == damaged
        path.write_bytes(good[:at])
        assert refusal(tree) == damaged
    path.unlink()
    assert refusal(tree) == f": {NAME!r} is missing"
    path.mkdir()
    assert refusal(tree) == f": {NAME!r} is missing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"files": []}',
        '{"files": {"nothing": 0}}',
        '{"files": {"nothing": {"size": 0}}}',
        '{"files": {"nothing": {"size": ' + "9" * 5000 + "}}}",
        '{"files": NaN}',
        "[" * 200_000,
        '{"files":' * 100_000,
        "\xff\x00",
        "\ufeff{}",
    ],
)
def test_what_is_no_manifest_is_not_taken_for_one(tree, text):
    (tree / NAME).write_text(text, "latin-1" if text.startswith("\xff") else "utf-8")
    assert refusal(tree) == f": {NAME!r} is damaged, or of another version"


def test_a_manifest_of_another_version_or_with_more_in_it_is_none(tree):
    good = json.loads((tree / NAME).read_text())
    for change in ({"version": 2}, {"sha256": "0" * 64}, {"more": 1}):
        (tree / NAME).write_text(json.dumps(good | change, indent=1) + "\n")
        assert refusal(tree) == f": {NAME!r} is damaged, or of another version"


def test_a_huge_manifest_is_not_read(tree):
    os.truncate(tree / NAME, 2**40)  # of which the disk holds a page
    assert refusal(tree) == f": {NAME!r} is too large for one"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "d/../../secret", "..", ".", "", "~"])
def test_names_do_not_lead_out(tree, name):
    (tree.parent / "secret").write_text("s")
    outside = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    forge(tree, listed(tree) | {name: outside})
    assert refusal(tree) == f": {name!r} is missing"


def test_wrong_kinds_in_a_manifest_that_is_whole_fit_no_file(tree):
    name = files(tree)[0].relative_to(tree).as_posix()
    right = listed(tree)[name]
    for wrong in ({"size": None}, {"size": [1]}, {"size": -1}, {"sha256": 7}, {"sha256": {}}):
        forge(tree, listed(tree) | {name: right | wrong})
        assert refusal(tree).startswith(f": {name!r} ")


@pytest.mark.parametrize("place", ["d/new", "nothing", NAME])
@pytest.mark.parametrize("kind", ["link", "folder", "dangling", "fifo"])
def test_links_and_the_like_are_neither_followed_nor_waited_for(tree, place, kind):
    (tree.parent / "secret").write_bytes((tree / NAME).read_bytes())
    (tree / "d").mkdir(exist_ok=True)
    path = tree / place
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": "../secret", "folder": "..", "dangling": "/nowhere"}[kind])
    assert refusal(tree) == f": {place!r} is neither a file nor a directory"
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        write_manifest(tree)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_only_a_directory_has_a_manifest(tree, kind):
    place = tree.parent / kind
    place.symlink_to(tree) if kind == "link" else place.touch()
    with pytest.raises(ValueError, match=rf"{place} is no directory"):
        check_manifest(place)


def test_what_the_disk_cannot_read_is_damage_and_what_it_may_not_is_none(tree, monkeypatch):
    names = {f": {name!r} cannot be read: Input/output error" for name in listed(tree)}

    def fail(number):
        def digest(file, _):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(hashlib, "file_digest", digest)

    fail(errno.EIO)
    assert refusal(tree) in names
    fail(errno.EACCES)
    with pytest.raises(PermissionError):
        check_manifest(tree)
