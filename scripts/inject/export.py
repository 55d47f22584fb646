"""Exports that are killed, and exports to disks that are full, read-only or broken."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.types import TrainState
from scripts.inject.base import Outcome, run_cases

_CODE = Path(__file__).parents[2]
_PAGE = 4096  # bytes; what a tmpfs counts in

# Mounts a tmpfs on $1 with the options $2, runs the rest on it, and lists in $1.left what is left.
_ON_A_DISK_OF_ITS_OWN = """
disk=$1; mount -t tmpfs -o "$2" none "$disk" || exit 99
shift 2; "$@"; code=$?
find "$disk" -mindepth 1 > "$disk.left"
exit $code
"""


def row_11(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """SIGKILL at random moments: half of them of the whole process, half of its writing.

    Whatever directory there is then, hidden or not, is the undisturbed export byte by byte, or does
    not load. Where there is something beside it, the same command again writes the export and
    leaves nothing else.
    """
    run = _Run(work_dir / "made")
    rng = np.random.default_rng(seed)
    count = count or 30
    found: list[str] = []
    parts = (count + 1) // 2  # of equal length, with a moment in each
    cases = []
    for i in range(count):
        what = "writing" if i % 2 else "process"
        moment = (i // 2 + rng.random()) / parts
        cases.append((f"{what}_{i // 2:02}", partial(_kill, run, moment, what == "writing", found)))
    outcome = run_cases(work_dir, cases)
    counts = {what: found.count(what) for what in sorted(set(found))}
    note = (
        f"an export of {run.size / 1e6:.0f} MB that takes {run.seconds:.1f} s, {run.writing:.1f} s"
        f" of them to write and check; found after the kill: {counts}"
    )
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, note))


def row_05_export(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Disks of every kind of too small, a read-only one, and errors of the disk.

    Exit code 2, one line that names the directory, and nothing left. On a disk that is just large
    enough there is an export.
    """
    run = _Run(work_dir / "made")
    rng = np.random.default_rng(seed)
    cases, notes = [], []
    if subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        notes.append("no disk was full or read-only: no mount namespaces here (`unshare -Urm`)")
    else:
        pages = sum(-(-f.stat().st_size // _PAGE) for f in run.reference.iterdir())
        sizes = [1, *map(int, (rng.random(9) * pages)), pages - 1]
        cases += [(f"full_{n}", partial(_on_disk, run, f"size={_PAGE * n}", False)) for n in sizes]
        cases += [("read_only", partial(_on_disk, run, "ro", False))]
        enough = f"size={_PAGE * (pages + 8)}"  # directories take room, too
        cases += [("room", partial(_on_disk, run, enough, True))]
    if shutil.which("strace") is None:
        notes.append("no error of a disk: no `strace` here")
    else:
        tensors = len(json.loads(_header(run.reference / "model.safetensors"))) - 1
        # Small tensors share a write; they are fewer than half.
        nth = [("model.safetensors", int(1 + rng.integers(tensors // 2))) for _ in range(4)]
        nth += [(file.name, 1) for file in run.reference.iterdir()]
        cases += [
            (f"write_{i}_{name}", partial(_failing_write, run, name, n))
            for i, (name, n) in enumerate(nth)
        ]
        cases += [
            (f"fsync_{n}", partial(_failing_fsync, run, n))
            for n in range(1, len([*run.reference.iterdir()]) + 3)
        ]
    outcome = run_cases(work_dir, [cases[i] for i in rng.permutation(len(cases))[:count]])
    kinds = [name.partition("_")[0] for name, _ in cases]
    notes.append(f"all cases: { {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} }")
    return Outcome(outcome.passed, outcome.tried, (*outcome.notes, *notes))


@dataclass(frozen=True)
class _Ended:
    code: int
    err: str


class _Run:
    """A run with one checkpoint of random weights, and what an undisturbed export makes of it."""

    def __init__(self, place: Path):
        base = place / "base"
        shutil.copytree(_CODE / "configs" / "tiny_qwen3", base)
        config = json.loads((base / "config.json").read_text()) | {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
        }
        (base / "config.json").write_text(json.dumps(config))
        self.path = place / "run"
        self.path.mkdir()
        (self.path / "config.toml").write_text(f"[model]\npath = {json.dumps(str(base))}\n")
        shape = jax.eval_shape(lambda: Qwen3(read_config(base), nnx.Rngs(0)))
        rng = np.random.default_rng(0)
        model = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shape)
        with Checkpoints(self.path / "checkpoints") as checkpoints:
            checkpoints.save(1, TrainState(model, (), jnp.int32(1)), {})

        self.reference = place / "out"
        start = time.monotonic()
        with self.start(self.reference, place) as process:
            assert _wait_for(_hidden(self.reference), process), "an export that hides nothing"
            self.writing = time.monotonic()
            assert process.wait() == 0, (place / "err.txt").read_text()
        self.seconds, self.writing = time.monotonic() - start, time.monotonic() - self.writing
        self.size = sum(file.stat().st_size for file in self.reference.iterdir())
        for ours, theirs in zip(
            jax.tree.leaves(load_hf(self.reference)), jax.tree.leaves(model), strict=True
        ):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()

    def start(self, out: Path, place: Path, *before: str) -> subprocess.Popen[bytes]:
        """Starts the command, after some words that run it; its output goes to files of `place`."""
        command = [*before, sys.executable, "-m", "jaxgrpo.export", str(self.path), str(out)]
        with (place / "out.txt").open("w") as stdout, (place / "err.txt").open("w") as stderr:
            return subprocess.Popen(
                command,
                stdout=stdout,
                stderr=stderr,
                env=os.environ | {"PYTHONPATH": str(_CODE), "JAX_PLATFORMS": "cpu"},
            )

    def export(self, out: Path, place: Path, *before: str) -> _Ended:
        """Runs the command to its end."""
        with self.start(out, place, *before) as process:
            code = process.wait(600)
        return _Ended(code, (place / "err.txt").read_text())

    def is_in(self, directory: Path) -> bool:
        """Whether a directory is the undisturbed export, byte by byte."""
        names = {file.name for file in self.reference.iterdir()}
        return names == {file.name for file in directory.iterdir()} and all(
            (directory / name).read_bytes() == (self.reference / name).read_bytes()
            for name in names
        )


def _kill(run: _Run, moment: float, while_writing: bool, found: list[str], place: Path) -> None:
    out = place / "out" / "model"
    after = 1.3 * moment * (run.writing if while_writing else run.seconds)
    while True:
        out.parent.mkdir()
        with run.start(out, place) as process:
            if while_writing:
                _wait_for(_hidden(out), process)
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
                break
        shutil.rmtree(out.parent)  # it was faster than that
        after *= 0.9
    there = sorted(out.parent.iterdir())
    for directory in there:
        try:
            load_hf(directory)
        except ValueError:
            assert directory != out, "an export that does not load"
            found.append("a hidden directory that does not load")
        else:
            assert run.is_in(directory), f"{directory} loads and is wrong"
            found.append("the export" if directory == out else "the export, hidden")
    if not there:
        found.append("nothing")
    elif there != [out]:
        ended = run.export(out, place)
        assert ended.code == 0, ended.err
        assert run.is_in(out), "another export after a kill"
        assert [*out.parent.iterdir()] == [out], "remains of a kill"


def _on_disk(run: _Run, options: str, good: bool, place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    shell = ("unshare", "-Urm", "sh", "-c", _ON_A_DISK_OF_ITS_OWN, "sh", str(disk), options)
    ended = run.export(disk / "out", place, *shell)
    left = (place / "disk.left").read_text().splitlines()
    if good:
        assert (ended.code, ended.err) == (0, ""), f"exit code {ended.code}: {ended.err}"
        assert len(left) == 1 + len([*run.reference.iterdir()]), left
    else:
        why = "Read-only" if options == "ro" else "No space left on device"
        _check_refused(ended, disk / "out", why, left)


def _failing_write(run: _Run, name: str, n: int, place: Path) -> None:
    """The n-th write to a file is an error of the disk."""
    file = _hidden(place / "disk" / "out") / name
    _with_strace(run, ["-P", str(file), "-e", f"inject=write:error=EIO:when={n}"], place)


def _failing_fsync(run: _Run, n: int, place: Path) -> None:
    """The n-th fsync is an error of the disk, which is how a disk's late errors are told."""
    _with_strace(run, ["-e", f"inject=fsync:error=EIO:when={n}"], place)


def _with_strace(run: _Run, options: list[str], place: Path) -> None:
    out = place / "disk" / "out"
    out.parent.mkdir()
    log = place / "strace.txt"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", "trace=write,fsync"]
    ended = run.export(out, place, *strace, *options)
    assert "(INJECTED)" in log.read_text(), "nothing was injected"
    _check_refused(ended, out, "Input/output error", [*map(str, out.parent.iterdir())])


def _check_refused(ended: _Ended, out: Path, why: str, left: list[str]) -> None:
    assert ended.code == 2, f"exit code {ended.code}: {ended.err}"
    said = ended.err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"error: {out} could not be written ("), said
    assert why in said[0], said
    assert not left, left


def _hidden(out: Path) -> Path:
    """Where an export is until it is whole."""
    return out.with_name(f".{out.name}.partial")


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> bool:
    """Waits until there is such a path; False if the process ended before."""
    while not path.exists():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))
