"""Faults of checkpoints: kills inside a save, damaged files, disks that fail, other meshes.

Here the checkpoints are saved by small programs (`scripts.inject.saver`), not by whole runs: a
fault costs little, so that there can be many.
"""

import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jaxgrpo.checkpoint import Checkpoints
from scripts.inject.base import Outcome, run_cases
from scripts.inject.saver import PROGRAM, check_holds, random_state

CODE = Path(__file__).parents[2]
LIMIT_S = 300  # for a process

_ON_A_DISK = ("full", "fills", "read-only", "fills")
_IN_THE_KERNEL = ("write", "fsync")

ONE = "1,1"
TWO_PROCESSES = "4,1 in 2 processes"
_MESHES = (
    ("4,1", ONE),
    (ONE, "8,1"),
    (TWO_PROCESSES, ONE),
    ("2,2", "1,4"),
    (ONE, "4,2"),
    (ONE, TWO_PROCESSES),
    ("1,8", "8,1"),
    (TWO_PROCESSES, "2,4"),
)


# ---- 2: kills inside a save


def row_02(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """SIGKILL at random moments of processes that save again and again."""
    count = 50 if count is None else count
    moments: Counter[str] = Counter()

    def case(rng: random.Random, place: Path) -> None:
        moments[kill_in_save(place / "checkpoints", rng)] += 1

    outcome = run_cases(
        work_dir,
        [(f"kill_{i}", partial(case, random.Random(f"{seed} {i}"))) for i in range(count)],
    )
    when = ", ".join(f"{n} {moment}" for moment, n in moments.most_common())
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, f"killed: {when}"))


def kill_in_save(directory: Path, rng: random.Random) -> str:
    """Kills one process that saves, checks what it has left, and says what it was doing.

    Raises:
      AssertionError: what is found is not the last complete step.
    """
    with start("for-ever", directory) as process:
        assert process.stdout is not None
        began = []
        for _ in range(rng.randint(3, 5)):
            assert process.stdout.readline(), process.communicate()[1]
            began.append(time.monotonic())
        time.sleep(rng.uniform(0, 1.5 * (began[-1] - began[-2])))
        process.send_signal(signal.SIGKILL)
        said, errors = process.communicate(timeout=LIMIT_S)
    assert errors == "", errors
    saving = len(began) + said.count("\n")

    there = os.listdir(directory)
    newest = max(int(name) for name in there if name.isdecimal())
    assert newest in (saving - 1, saving), f"saving {saving}, there are {there}"
    checkpoints = Checkpoints(directory, keep=1)
    lines: list[str] = []
    found = checkpoints.newest_sound(lines.append)
    assert (found, lines) == (newest, []), f"{found} was found of {there}: {lines}"
    for step in checkpoints.steps():
        check_holds(checkpoints, step)
    assert all(name.isdecimal() for name in os.listdir(directory)), os.listdir(directory)
    checkpoints.save(newest + 1, random_state(newest + 1), {"step": newest + 1})
    checkpoints.wait()
    assert os.listdir(directory) == [str(newest + 1)]
    check_holds(Checkpoints(directory), newest + 1)

    if str(saving) in there:
        return "when it had its name"
    begun = [name for name in there if name.startswith(f"{saving}.unfinished")]
    if not begun:
        return "before it had a directory"
    if begun == [f"{saving}.unfinished"]:
        return "between its last array and its name"
    return "while its arrays were written"


# ---- 4: damaged files


def row_04(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Every file of the newest of two checkpoints, damaged in every way, in turn."""
    sound = work_dir / "sound"
    with Checkpoints(sound) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, random_state(step), {"step": step})
    names = sorted(
        path.relative_to(sound / "2").as_posix()
        for path in (sound / "2").rglob("*")
        if path.is_file()
    )
    pairs = [
        (name, damage)
        for name in names
        for damage in (flip, cut, delete)
        if damage is delete or (sound / "2" / name).stat().st_size
    ]
    count = max(240, len(pairs)) if count is None else count
    cases = []
    for i in range(count):
        name, damage = pairs[i % len(pairs)]
        rng = random.Random(f"{seed} {i}")
        cases.append((f"{damage.__name__}_{i}", partial(damaged, sound, name, damage, rng)))
    outcome = run_cases(work_dir, cases)
    note = f"{len(names)} files, of {', '.join(names[:2])} to {names[-1]}; {len(pairs)} kinds"
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, note))


def damaged(
    sound: Path,
    name: str,
    damage: Callable[[Path, random.Random], None],
    rng: random.Random,
    place: Path,
) -> None:
    """Damages a file of step 2 in a copy of a sound directory, and looks for the newest step.

    Raises:
      AssertionError: it is not noticed, not named, or the step before it not used.
    """
    directory = place / "checkpoints"
    shutil.copytree(sound, directory)
    damage(directory / "2" / name, rng)
    said: list[str] = []
    checkpoints = Checkpoints(directory)
    found = checkpoints.newest_sound(said.append)
    assert found == 1, f"{name}: step {found} was found: {said}"
    assert len(said) == 1, said
    assert said[0].startswith(f"{directory}/2: {name!r} "), f"{name} is not named: {said}"
    assert said[0].endswith("; step 2 is set aside as 2.damaged"), said
    assert sorted(os.listdir(directory)) == ["1", "2.damaged"], os.listdir(directory)
    check_holds(checkpoints, 1)


def flip(path: Path, rng: random.Random) -> None:
    """One bit of it."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Some of its end."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: Path, _: random.Random) -> None:
    """All of it."""
    path.unlink()


# ---- 5: disks that fail


def row_05_save(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Real disks that are full, become full or are mounted read-only; EIO from the kernel."""
    faults, notes = [], []
    if _may_mount():
        faults += _ON_A_DISK
    else:
        notes.append("no user namespaces here: no full and no read-only disk was tried")
    if platform.machine() in ("x86_64", "aarch64"):
        faults += _IN_THE_KERNEL
    else:
        notes.append(f"no I/O error was tried on {platform.machine()}")
    count = 3 * len(faults) if count is None else count
    lines: Counter[str] = Counter()

    def case(fault: str, number: int, place: Path) -> None:
        disk = place / "disk"
        disk.mkdir()
        if fault in _IN_THE_KERNEL:
            process = start("fail-and-go-on", disk, fault, number)
        else:
            process = start("on-tmpfs", disk, fault, number, before=("unshare", "-Urm"))
        with process:
            said, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, errors
        reason = re.search(r"no room|\(.*?\)", said)
        lines[f"{fault}: {reason[0].strip('()') if reason else said}"] += 1

    cases = [
        (f"{fault}_{i}", partial(case, fault, 1000 * seed + i))
        for i, fault in ((i, faults[i % len(faults)]) for i in range(count))
    ]
    outcome = run_cases(work_dir, cases)
    notes += [f"{n} x {line}" for line, n in sorted(lines.items())]
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, *notes))


def _may_mount() -> bool:
    """Whether this user may mount disks in a namespace of their own."""
    mount = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/tmp"]
    try:
        return subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# ---- 8: another mesh


def row_08(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Saved on one mesh or number of processes, restored on another."""
    count = len(_MESHES) if count is None else count
    differences = [0.0]

    def case(saved_on: str, restored_on: str, number: int, place: Path) -> None:
        saved, restored = (
            on_mesh(do, place, mesh, number)
            for do, mesh in (("save", saved_on), ("restore", restored_on))
        )
        assert saved["digests"] == restored["digests"], f"{saved_on} to {restored_on}: other bits"
        difference = abs(saved["loss"] - restored["loss"])
        differences.append(difference)
        assert difference < 1e-5, f"{saved_on} to {restored_on}: the next loss is {difference} off"
        assert saved["loss"] != 0

    cases = [
        (f"mesh_{i}", partial(case, *_MESHES[i % len(_MESHES)], 1000 * seed + i))
        for i in range(count)
    ]
    outcome = run_cases(work_dir, cases)
    tried = "; ".join(f"{a} to {b}" for a, b in _MESHES[:count])
    notes = (f"fsdp,tp: {tried}", f"the next loss differs by {max(differences):.1e} at most")
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, *notes))


def on_mesh(do: str, place: Path, mesh: str, seed: int) -> dict:
    """Saves or restores on a mesh, and returns what is said of it by process 0."""
    sizes, _, many = mesh.partition(" ")
    fsdp, tp = map(int, sizes.split(","))
    processes = 2 if many else 1
    places: list[tuple[object, ...]] = [()]
    if many:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        places = [(process, port) for process in range(2)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                start(
                    *("on-mesh", do, place / "checkpoints", sizes, seed, *where),
                    devices=fsdp * tp // processes,
                )
            )
            for where in places
        ]
        ended = [process.communicate(timeout=LIMIT_S) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    # The CPU's collectives say on stdout whom they met.
    return json.loads(ended[0][0][ended[0][0].index('{"digests"') :].splitlines()[0])


def start(*command: object, before: tuple[str, ...] = (), devices: int = 1) -> subprocess.Popen:
    """A program of `saver`, on so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*before, *PROGRAM, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(CODE),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": flags.strip(),
        },
    )
