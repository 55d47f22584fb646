"""A run's numbers where people watch them: TensorBoard, Weights & Biases, trackio, MLflow.

A tracker's package is imported only when a run has it. What a tracker gets are numbers and the
settings, redacted; no completion, no line of the terminal, no file.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jaxgrpo import cluster
from jaxgrpo.config import Config, TrackerName
from jaxgrpo.files import replace_file
from jaxgrpo.identity import settings
from jaxgrpo.redact import printable, redacted

_PROJECT = "jaxgrpo"
FOLDERS = ("tensorboard", "wandb")  # in the run directory


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with."""

    dir: Path
    """The run directory."""
    name: str
    """Of the run."""
    settings: dict[str, Any]
    """Every setting by its name, redacted."""
    step: int
    """Updates that are done; -1 for a new run."""
    id: str | None
    """The `Tracker.id` of before, to go on with it."""


class Tracker(Protocol):
    """One of them, made from a `Start`; any method may raise any `Exception`."""

    id: str | None
    """By which it goes on in a resumed run, with all that it has; None for one that goes on in the
    run directory and forgets there what came after `Start.step`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers of a step; more of the same step may follow."""

    def finish(self, failed: bool) -> None:
        """Ends."""


class _TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    id: str | None = None

    def __init__(self, start: Start):
        # Its SummaryWriter would write from a thread: a full disk ends that, and then the run waits
        # for room in a queue for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = start.dir.absolute() / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._event = Event
        self._writer = EventsWriter(str(folder / "events"), f".{start.step + 1}")
        # TensorBoard drops what files before this one have from that step on.
        self._write(step=start.step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": scalars})

    def finish(self, failed: bool) -> None:
        self._writer.close()

    def _write(self, **event: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **event))
        self._writer.flush()


class _WandB:
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables hold."""

    def __init__(self, start: Start):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=start.name,
            id=start.id,
            resume="allow",
            dir=str(start.dir),
            config=start.settings,
            # By itself it takes the terminal's lines, the command line, code and packages, too.
            settings=wandb.Settings(
                console="off",
                save_code=False,
                disable_git=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        self.id: str | None = self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """trackio, whose data is on this machine unless its variables name a place elsewhere."""

    def __init__(self, start: Start):
        import trackio

        self._trackio = trackio
        run = trackio.init(
            project=_PROJECT,
            name=start.name,
            config=start.settings,
            resume="never" if start.id is None else "allow",
        )
        self.id: str | None = run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        self._trackio.finish()


class _MLflow:
    """MLflow, at MLFLOW_TRACKING_URI and as its other variables say."""

    def __init__(self, start: Start):
        import mlflow

        self._mlflow = mlflow
        run = mlflow.start_run(run_id=start.id, run_name=start.name)
        self.id: str | None = run.info.run_id
        if start.id is None:  # they cannot be changed
            mlflow.log_params(start.settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w./ :-]", "_", name): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step)

    def finish(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


_KINDS: dict[TrackerName, tuple[Callable[[Start], Tracker], str]] = {
    "tensorboard": (_TensorBoard, "tensorboardX"),
    "wandb": (_WandB, "wandb"),
    "trackio": (_Trackio, "trackio"),
    "mlflow": (_MLflow, "mlflow"),
}


def check_installed(names: Sequence[TrackerName]) -> None:
    """Refuses trackers that are not there; process 0 needs them.

    Raises:
      ValueError: one is not installed.
    """
    for name in names if cluster.is_main() else ():
        if name != "auto" and not _is_installed(package := _KINDS[name][1]):
            raise ValueError(
                f"run.trackers names {name!r}, but {package} is not installed: pip install"
                f" {package}, or take it out of run.trackers"
            )


class Trackers:
    """The trackers of a run, on process 0. One that fails is said, and the run goes on without it.

    Args:
      config: of the run.
      run_dir: its directory.
      say: takes a line when one fails.
    """

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]):
        self._names = _chosen(config.run.trackers) if cluster.is_main() else []
        self._settings = redacted(settings(config))
        self._dir = run_dir
        self._say = say
        self._open: dict[TrackerName, Tracker] = {}
        self._going_on: set[TrackerName] = set()
        self._logged: Mapping[str, int] = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.finish, kind is not None))

    def start(self, step: int, logged: Mapping[str, int]) -> None:
        """Opens them.

        Args:
          step: updates that are done; -1 for a new run.
          logged: the last step of each log, which may be later. A resumed run does those steps
            again, with the same numbers, and a tracker that has them does not get them twice.

        Raises:
          ValueError: one does not start; not if the run has begun already.
        """
        self._logged = logged
        for name in self._names:
            try:
                self._begin(name, step)
            except Exception as error:
                if step < 0:
                    raise ValueError(
                        f"run.trackers: {name} does not start ({_line(error)}): see to that, or"
                        " take it out"
                    ) from error
                self._fail(name, error)

    def log(self, log: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Passes on the numbers of records of `metrics` and `eval`; other logs are texts."""
        if log not in ("metrics", "eval"):
            return
        for record in records:
            step = record["step"]
            values = dict(_rates(record) if log == "eval" else _flat(record))
            values.pop("step", None)
            for name, tracker in list(self._open.items()):
                if name not in self._going_on or step > self._logged[log]:
                    self._try(name, partial(tracker.log, step, values))

    def _begin(self, name: TrackerName, step: int) -> None:
        file = self._dir / f"{name}.id"
        before = file.read_text("utf-8") if step >= 0 and file.exists() else None
        start = Start(self._dir, printable(self._dir.name), self._settings, step, before)
        tracker = _KINDS[name][0](start)
        self._open[name] = tracker
        if before is not None:
            self._going_on.add(name)
        elif tracker.id is not None:
            replace_file(file, tracker.id.encode())

    def _try(self, name: TrackerName, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            del self._open[name]
            self._fail(name, error)

    def _fail(self, name: TrackerName, error: Exception) -> None:
        self._say(f"{name} failed ({_line(error)}): the run goes on without it")


def _chosen(names: Sequence[TrackerName]) -> list[TrackerName]:
    """Each once, with what `auto` means here."""
    auto: list[TrackerName] = ["tensorboard"] if _is_installed("tensorboardX") else []
    return [*dict.fromkeys(one for name in names for one in (auto if name == "auto" else [name]))]


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def _line(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}", 300)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record by its path: `reward_mean`, `seconds/sample`."""
    for key, value in record.items():
        name = prefix + printable(key).replace("/", "_")  # a reward's may be a path
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        elif isinstance(value, int | float):
            yield name, float(value)


def _rates(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a record of an evaluation says of its answers: shares with their intervals' ends."""
    temperature = record["temperature"]
    how = f"T={temperature:g}" if temperature else "greedy"
    shares: dict[str, Any] = {}
    for name in ("schema_valid", "parses", "exact"):
        if name in record:
            share = record[name]
            shares |= {name: share["rate"], f"{name}_low": share["low"]}
            shares[f"{name}_high"] = share["high"]
    others = "fields fields_if_valid reward_mean rewards unscored truncated tokens"
    shares |= {name: record[name] for name in others.split() if name in record}
    return _flat(shares, f"eval/{printable(Path(record['data']).stem)}/{how}/")
