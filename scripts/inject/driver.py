"""`python -m jaxgrpo.train` with something done to it at a certain place.

    python -m scripts.inject.driver sample:3:hold=DIR ... -- TRAIN_OPTIONS

Each hook is `POINT:N:ACTION=ARGUMENT`: on entering POINT for the N-th time, ACTION is done first.
N may be a list, as in `1,2,3`.

Points: `load` (the model), `preflight`, `evaluate` (one file), `save`, `log` (a write of records),
and the phases of a step as the run's clock knows them: `sample`, `reward`, `reference`, `update`.

Actions:
  hold=DIR: makes DIR/held and waits for DIR/go.
  run=COMMAND: a shell command that must succeed.
  break=: of what a write of records appends, half arrives, and then it fails as on a bad disk.
  poison=KIND: makes the batch of this step, at point `pack`, one whose `loss` or `gradient` is not
    finite, or whose `logprob` from the sampler was none.
"""

import errno
import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp

import jaxgrpo.train
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.cli import run_main
from jaxgrpo.clock import Clock
from jaxgrpo.metrics import RunLog
from jaxgrpo.types import RolloutBatch

_FUNCTIONS: dict[str, tuple[Any, str]] = {
    "load": (jaxgrpo.train, "load_policy"),
    "preflight": (jaxgrpo.train, "look_first"),
    "evaluate": (jaxgrpo.train, "evaluate_heldout"),
    "pack": (jaxgrpo.train, "pack"),
    "save": (Checkpoints, "save"),
    "log": (RunLog, "write"),
}


def main() -> None:
    """The command."""
    dashes = sys.argv.index("--")
    hooks = sys.argv[1:dashes]
    for hook in hooks:
        point, times, do = hook.split(":", 2)
        action, _, argument = do.partition("=")
        when = {int(n) for n in times.split(",")}
        _hook(point, when, partial(_ACTIONS[action], argument))
    sys.argv[1:] = sys.argv[dashes + 1 :]
    jaxgrpo.train.main()


def hold(place: str, call: Callable[[], Any]) -> Any:
    """Stands still until it may go on."""
    (Path(place) / "held").touch()
    while not (Path(place) / "go").exists():
        time.sleep(0.01)
    return call()


def run(command: str, call: Callable[[], Any]) -> Any:
    """Runs a shell command first."""
    subprocess.run(command, shell=True, check=True)
    return call()


def break_appends(_: str, call: Callable[[], Any]) -> Any:
    """Makes the call while JSON lines cannot be appended."""
    whole = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        is_log = self.suffix == ".jsonl" and mode == "ab"
        return _Broken(self, mode) if is_log else whole(self, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", open_):
        return call()


def poison(kind: str, call: Callable[[], RolloutBatch]) -> RolloutBatch:
    """The batch with one number in it that spoils the step."""
    batch = call()
    advantage_PG, logprobs_PGC = batch.advantage_PG, batch.completions.logprobs_PGC
    if kind == "logprob":
        spoilt = jnp.asarray(logprobs_PGC).at[0, 0, 0].set(jnp.nan)
        return batch._replace(completions=batch.completions._replace(logprobs_PGC=spoilt))
    # A finite loss of 1e30 has a gradient whose norm is beyond float32.
    number = {"loss": jnp.nan, "gradient": 1e30}[kind]
    return batch._replace(advantage_PG=jnp.asarray(advantage_PG).at[0, 0].set(number))


_ACTIONS: dict[str, Callable[[str, Callable[[], Any]], Any]] = {
    "hold": hold,
    "run": run,
    "break": break_appends,
    "poison": poison,
}


class _Broken(io.FileIO):
    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _hook(point: str, when: set[int], action: Callable[[Callable[[], Any]], Any]) -> None:
    """Has the action make the calls, counted from 1, that are in `when`."""
    calls = itertools.count(1)

    def enter(call: Callable[[], Any]) -> Any:
        return action(call) if next(calls) in when else call()

    if point in _FUNCTIONS:
        owner, name = _FUNCTIONS[point]
        function = getattr(owner, name)

        @wraps(function)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return enter(lambda: function(*args, **kwargs))

        setattr(owner, name, replaced)
        return

    phases = Clock.__call__

    @contextmanager
    def phase(self: Clock, which: str) -> Iterator[None]:
        with phases(self, which):
            if which == point:
                enter(lambda: None)
            yield

    Clock.__call__ = phase  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    run_main(main)
