"""A run's directory: made or found as it was left, one run at a time."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jaxgrpo import cluster
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import ClusterConfig, Config, TrackerName
from jaxgrpo.config_file import load_config, save_config
from jaxgrpo.identity import differences
from jaxgrpo.metrics import LOGS
from jaxgrpo.trackers import FOLDERS

_LOCK = "lock"
_FIRST = (_LOCK, "config.toml.new")  # what a run leaves that is killed before its first files are
_WRITTEN = (
    *(f"{log}.jsonl" for log in LOGS),
    *("report.html", "curve.png", "rewards_*.log", "stacks_*.txt", "nonfinite_step_*.npz"),
    *(f"{tracker}.id" for tracker in get_args(TrackerName)),
)


@contextmanager
def open_run_dir(
    config: Config, identity: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[tuple[Path, int | None]]:
    """Makes the run directory, or finds it; inside of the `with` block no other run may use it.

    Args:
      config: names it.
      identity: of this run (`jaxgrpo.identity`); the one that is there must be the same.
      say: takes lines about what is found.

    Yields:
      Its path, and the newest sound checkpoint's step; None if there is none.

    Raises:
      ValueError: another run writes there; it holds a checkpoint of another run, or files that are
        no run's; or not all processes see it.
    """
    with ExitStack() as lock:
        found = cluster.on_main(lambda: _open(config, identity, say, lock))
        run_dir = Path(found[0])

        def look() -> None:
            if not run_dir.is_dir():
                raise ValueError(
                    f"there is no {run_dir.absolute()}: run.dir must be on a file system that all"
                    " processes share"
                )

        cluster.gather(look)
        yield run_dir, found[1]


def _open(
    config: Config, identity: Mapping[str, Any], say: Callable[[str], None], lock: ExitStack
) -> tuple[str, int | None]:
    run_dir = Path(config.run.dir).expanduser()
    saved = run_dir / "config.toml"
    if saved.exists():
        load_config(saved)  # fails if it is some other program's
    elif run_dir.is_dir() and any(path.name not in _FIRST for path in run_dir.iterdir()):
        raise ValueError(f"{run_dir} is not empty and no run directory: name another run.dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock.enter_context(_locked(run_dir, say))
    step = None
    if config.run.fresh:
        for pattern in _WRITTEN:
            for file in run_dir.glob(pattern):
                file.unlink()
        for folder in ("checkpoints", *FOLDERS):
            shutil.rmtree(run_dir / folder, ignore_errors=True)
    else:
        checkpoints = Checkpoints(run_dir / "checkpoints")
        step = checkpoints.newest_sound(say)
        if step is not None:
            _check_same(checkpoints.data(step)["identity"], identity, config, run_dir, say)
            if step > config.run.steps:
                raise ValueError(
                    f"{run_dir} is at step {step} already, beyond run.steps = {config.run.steps}"
                )
        elif any(checkpoints.directory.glob("*.damaged*")):  # by this start or an earlier one
            raise ValueError(
                f"{run_dir} has no sound checkpoint left: use --run.fresh to start anew"
            )
    run = replace(config.run, fresh=False, allow_change=False)
    save_config(replace(config, run=run, cluster=ClusterConfig()), saved)
    return str(run_dir), step


def _check_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    config: Config,
    run_dir: Path,
    say: Callable[[str], None],
) -> None:
    """A run goes on only as what it was, unless it is told that it may change."""
    changed = differences(before, now)
    if not changed:
        return
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
    if not config.run.allow_change:
        raise ValueError(
            f"{run_dir} is of a run with another {shown}: use --run.allow-change to go on all the"
            " same, --run.fresh to start anew, or another --run.dir"
        )
    say(f"goes on with another {shown}")


@contextmanager
def _locked(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the run directory; the kernel lets go of it when the process ends, however it does."""
    with (run_dir / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise ValueError(
                f"{run_dir} is in use by {holder}: wait for that run, stop it, or name another"
                " --run.dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            say(f"{run_dir}: its file system has no locks; nothing else may write there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
