"""Small training runs as real processes, and whether two of them came to the same.

A run here trains the first layer of the shipped model on two problems of four completions a step,
for a reward that has nothing to do with invoices: a start costs seconds and a step a twentieth.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

CODE = Path(__file__).parents[2]
INVOICES = CODE / "configs" / "invoices"
STEPS, EVERY = 20, 4
TRAIN = (sys.executable, "-m", "jaxgrpo.train")
DRIVER = (sys.executable, "-m", "scripts.inject.driver")

# Of metrics.jsonl and eval.jsonl, what the clock and the compiler decide.
_BY_CHANCE = {"seconds", "sample_tokens_per_s", "train_tokens_per_s", "compilations"}
_REWARD = """
def letters(completion, row):
    return len(set(completion)) / 50
"""
_loading = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, what it wrote, and seconds since its start."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line on stderr."""
        return (self.err.splitlines() or [""])[-1]


class Process:
    """A command that runs, its output in files of its directory.

    Args:
      place: directory for `out.txt` and `err.txt`; with a name before each if there are several.
      command: see `TRAIN` and `DRIVER`.
      env: added to the environment.
    """

    def __init__(self, place: Path, command: Sequence[object], name: str = "", **env: str):
        place.mkdir(parents=True, exist_ok=True)
        self._files = [place / f"{name}{stream}.txt" for stream in ("out", "err")]
        self._start = time.monotonic()
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err, env=one_device(**env)
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def stderr(self) -> str:
        """What it has written there."""
        return self._files[1].read_text()

    def end(self, timeout: float = 600) -> Ended:
        """Waits for the end.

        Raises:
          subprocess.TimeoutExpired: it did not come in time.
        """
        code = self._process.wait(timeout)
        out, err = (file.read_text() for file in self._files)
        return Ended(code, out, err, time.monotonic() - self._start)

    def wait_for(self, what: Path, timeout: float = 300) -> None:
        """Waits for a file.

        Raises:
          AssertionError: the process ended before it was there, or it is late.
        """
        end = time.monotonic() + timeout
        while not what.exists():
            assert self.running(), f"ended before {what.name}: {self.end().last_line}"
            assert time.monotonic() < end, f"no {what.name} in {timeout:g} s"
            time.sleep(0.01)


def one_device(**env: str) -> dict[str, str]:
    """The environment of a run on one CPU device that keeps its compiled programs."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1"
    return {
        **os.environ,
        "PYTHONPATH": str(CODE),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **env,
    }


def programs(beside: Path) -> str:
    """The folder of compiled programs that all rows share, beside a row's directory."""
    return str(beside.parent / "shared" / "programs")


class Small:
    """Small runs that share their files, compiled programs and one undisturbed run.

    Args:
      work_dir: of a row; what is shared lies beside it in `shared` and is made once.
    """

    def __init__(self, work_dir: Path):
        self.shared = work_dir.parent / "shared"
        self.files = self.shared / "files"
        if not self.files.exists():
            new = self.shared / "files.new"
            shutil.rmtree(new, ignore_errors=True)
            _write_files(new)
            new.rename(self.files)

    def options(self, run_dir: Path, files: Path | None = None) -> list[str]:
        """A run's command line, without the command.

        Args:
          run_dir: where it is to live.
          files: a changed copy of `self.files` to be used in its place.
        """
        files = files or self.files
        values = {
            "run.dir": run_dir,
            "run.steps": STEPS,
            "model.path": files / "model",
            "data.train": files / "train.jsonl",
            "data.heldout": files / "heldout.jsonl",
            "data.schema": files / "schema.json",
            "rollout.problems": 2,
            "rollout.group": 4,
            "sampling.max-tokens": 32,
            "signal.preflight-groups": 2,
            "signal.min-share": 0,
            "signal.patience": STEPS,
            "grpo.kl-beta": 0.05,
            "eval.every": 5,
            "eval.batch": 4,
            "eval.samples": 0,
            "checkpoint.every": EVERY,
        }
        rewards = ["--rewards", f"{files / 'reward.py'}:letters", "1.0"]
        pairs = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        return [*pairs, "--model.no-unroll", *rewards]

    def start(
        self,
        place: Path,
        *more: object,
        hooks: Sequence[str] = (),
        files: Path | None = None,
        name: str = "",
    ) -> Process:
        """Starts a run in `place/run`, its output beside it.

        Args:
          place: a case's directory.
          more: options that come last.
          hooks: what the driver does to it (`driver.py`); without any it is the plain command.
          files: see `options`.
          name: before the names of the files with its output.
        """
        options = [*self.options(place / "run", files), *more]
        command = [*DRIVER, *hooks, "--", *options] if hooks else [*TRAIN, *options]
        return Process(place, command, name, JAX_COMPILATION_CACHE_DIR=programs(self.shared))

    def hold(self, place: Path, point: str, name: str = "") -> Process:
        """Starts a run and waits until it stands at `POINT:N`; `place/go` frees it."""
        process = self.start(place, hooks=[f"{point}:hold={place}"], name=name)
        process.wait_for(place / "held")
        return process

    def finish(
        self, place: Path, *more: object, files: Path | None = None, name: str = ""
    ) -> Ended:
        """Runs the command to its end, which must be a good one."""
        with self.start(place, *more, files=files, name=name) as process:
            ended = process.end()
        assert ended.code == 0, f"exit code {ended.code}: {ended.last_line}"
        return ended

    def whole(self) -> Path:
        """The directory of the undisturbed run."""
        place = self.shared / "whole"
        if not (place / "run" / "checkpoints" / str(STEPS)).exists():
            shutil.rmtree(place, ignore_errors=True)
            self.finish(place)
        return place / "run"


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a log, in a run that may be alive or dead."""
    file = run_dir / f"{name}.jsonl"
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl; 0 if there is none."""
    return max((record["step"] for record in records(run_dir, "metrics")), default=0)


def restored_step(said: str) -> int:
    """The step from which a run says that it goes on; 0 if it starts anew."""
    found = re.search(r"^restored step (\d+) ", said, re.MULTILINE)
    return int(found[1]) if found else 0


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by their names, as Orbax reads them without this package."""
    path = run_dir / "checkpoints" / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _loading:
        metadata = ocp.metadata(path, checkpointable_name="state").metadata
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
            for name, x in metadata.items()
        }
        found = ocp.load(path, abstract, checkpointable_name="state")
    return {name: np.asarray(x) for name, x in found.items()}


def changed_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not the same in type, shape and every bit."""
    assert a.keys() == b.keys(), f"other arrays: {sorted(a.keys() ^ b.keys())}"
    return [
        name
        for name in a
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)
        or a[name].tobytes() != b[name].tobytes()
    ]


def check_same_run(run_dir: Path, whole: Path) -> None:
    """Raises AssertionError unless a run's logs and last state are those of the undisturbed one.

    The logs line by line, without what the clock decides; parameters, Adam's moments and the
    optimiser's counters bit by bit.
    """
    for name in ("completions", "metrics", "eval"):
        ours, theirs = (
            [{k: v for k, v in r.items() if k not in _BY_CHANCE} for r in records(run, name)]
            for run in (run_dir, whole)
        )
        steps = [[record["step"] for record in log] for log in (ours, theirs)]
        assert steps[0] == steps[1], f"{name}.jsonl has other steps: {steps[0]}"
        differ = [a["step"] for a, b in zip(ours, theirs, strict=True) if a != b]
        assert not differ, f"{name}.jsonl differs at steps {differ}"
    changed = changed_arrays(arrays(run_dir, STEPS), arrays(whole, STEPS))
    assert not changed, f"other bits in {changed}"


def send_after(process: Process, seconds: float, number: int) -> bool:
    """Sends a signal after so many seconds; False if the process had ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.end(seconds)
        return False
    process.send(number)
    return True


def _write_files(place: Path) -> None:
    """The model with one layer, a few problems, the schema, and a reward of one's own."""
    shutil.copytree(CODE / "configs" / "tiny_qwen3", place / "model")
    weights = place / "model" / "model.safetensors"
    tensors = load_file(weights)
    other_layers = re.compile(r"model\.layers\.[1-9]")
    first = {name: x for name, x in tensors.items() if not other_layers.match(name)}
    save_file(first, weights, {"format": "pt"})
    config = place / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    for name, source, count in (("train", "train", 16), ("heldout", "heldout_50", 4)):
        lines = (INVOICES / f"{source}.jsonl").read_text("utf-8").splitlines(True)
        (place / f"{name}.jsonl").write_text("".join(lines[:count]), "utf-8")
    shutil.copy(INVOICES / "schema.json", place / "schema.json")
    (place / "reward.py").write_text(_REWARD)
