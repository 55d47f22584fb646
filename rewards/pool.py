"""Rewards in processes of their own: whatever a completion does costs that completion alone.

The workers are started once and stay. Each scores one completion after the other, under a deadline
and the system's limits of memory and processor time. One that exceeds them, or dies, is replaced;
its completion has no score, and those that it had before it are scored by another.

Why a completion has none is its `reason`:

- `deadline`: it took longer than `scoring.deadline`;
- `cpu`, `memory`: it took more processor time than that, more memory than `scoring.memory_mb`;
- `crash`: the worker died of something else;
- `exception`: a reward raised one;
- `no_number`: a reward returned no finite number;
- `abandoned`: so many others have none that it was not tried.
"""

import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar

from jaxgrpo.config import ScoringConfig
from jaxgrpo.redact import harmless, printable, redact
from jaxgrpo.rewards.process import Process
from jaxgrpo.rewards.strict_json import dumps
from jaxgrpo.rewards.worker import NO_MEMORY

Job = tuple[Mapping[str, Any], Sequence[str]]  # a row and completions of it

_MOST_WORKERS = 8
_LOADING_S = 120.0  # for a worker to start and import the rewards
_LARGEST_FILE_MB = 1024  # of those that a reward writes
_LONGEST_OUTPUT = 1 << 20  # bytes that are kept of what the rewards of a run print
_CHUNKS = 2  # for each worker, so that none has much left when the others are done


class Rewarded(NamedTuple):
    """What a completion is worth, in JSON's types.

    Attributes:
      score: and the next two, see `types.Verdict`; without a score the reason says why.
      reason: see there.
      path: see there.
      total: the weighted sum of all rewards.
      terms: each reward's own value by its name; empty without a score.
      failure: more about why there is no score, in one line; empty if there is one.
    """

    score: float
    reason: str
    path: str = ""
    total: float = 0.0
    terms: Mapping[str, float] = {}
    failure: str = ""


class Compared(NamedTuple):
    """How much of a completion is right, in JSON's types.

    Attributes:
      score: and the next two, see `Rewarded`.
      reason: see there.
      path: see there.
      fields: see `fields.fields_right`; None without ground truth, or without a score.
      exact: valid, all fields right and no other.
      failure: see `Rewarded`.
    """

    score: float
    reason: str
    path: str = ""
    fields: Mapping[str, bool] | None = None
    exact: bool = False
    failure: str = ""


T = TypeVar("T", Rewarded, Compared)


class _Item(NamedTuple):
    """A completion to score, and where its answer belongs."""

    job: int
    place: int
    row: str
    completion: str


class _Worker(Process):
    """A process, and how far it is.

    Attributes:
      ready: whether it has loaded the rewards.
      items: what it has not answered yet.
      answered: how many it has, since its start.
    """

    def __init__(self, setup: bytes, printed: IO[bytes]):
        super().__init__(setup, printed)
        self.ready = False
        self.items: list[_Item] = []
        self.answered = 0

    def begin(self, kind: str, items: list[_Item]) -> None:
        """Gives it something to do."""
        rows = [
            (row, [item.completion for item in same])
            for row, same in itertools.groupby(items, lambda item: item.row)
        ]
        self.unsent = json.dumps([kind, rows]).encode() + b"\n"
        self.items = items
        self.progress.begin(self.answered)

    @property
    def at(self) -> int:
        """Which of its items it has come to."""
        return max(0, self.progress.read()[1] - self.answered)


class _Answers(Generic[T]):
    """The answers to all jobs, some of them to come."""

    def __init__(self, kind: type[T], jobs: Sequence[Job]):
        self._kind: type[T] = kind
        self.failures = 0
        self._found: list[list[T | None]] = [[None] * len(texts) for _, texts in jobs]

    def put(self, item: _Item, answer: Any) -> None:
        """Takes the answer for a completion."""
        if isinstance(answer, dict):
            self.fail(item, answer["reason"], answer["failure"])
        else:
            self._found[item.job][item.place] = self._kind(*answer)

    def fail(self, item: _Item, reason: str, failure: str) -> None:
        """Notes why a completion has no score."""
        self.failures += 1
        self._found[item.job][item.place] = self._kind(0.0, reason, failure=failure)

    def all(self) -> list[list[T]]:
        """The answers, of those that were not tried too."""
        abandoned = self._kind(0.0, "abandoned", failure="too many others have no score")
        return [[answer or abandoned for answer in each] for each in self._found]


class Pool:
    """The workers of a run; they end with the `with` that it is used in.

    Args:
      schema: of the run, as `json_schema.load_schema` has it.
      rewards: their weights by name, see `build.resolve_rewards`.
      config: limits.

    Attributes:
      schema: as given.
      rewards: as given.
      output: a file that takes what rewards print, up to a megabyte; None: it is lost.
    """

    def __init__(self, schema: Any, rewards: Mapping[str, float], config: ScoringConfig):
        self.schema = schema
        self.rewards = rewards
        self.output: Path | None = None
        self._config = config
        self._room = _LONGEST_OUTPUT
        setup = {
            "schema": dumps(schema),
            "rewards": dict(rewards),
            "deadline": config.deadline,
            "memory_mb": config.memory_mb,
            "file_mb": _LARGEST_FILE_MB,
        }
        self._setup = json.dumps(setup).encode() + b"\n"
        self._printed = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(config.workers or min(_MOST_WORKERS, _processors())):
            self._start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()
        self._printed.close()

    def reward(self, jobs: Sequence[Job], most_failures: float = math.inf) -> list[list[Rewarded]]:
        """What completions are worth.

        Args:
          jobs: rows, each with completions of it.
          most_failures: where more than this have no score, the rest is not tried.

        Returns:
          For each job, of each of its completions.

        Raises:
          ValueError: a reward cannot be loaded; one line that says why.
        """
        return self._run(Rewarded, jobs, most_failures)

    def compare(self, jobs: Sequence[Job]) -> list[list[Compared]]:
        """How much of completions is right; arguments, result and errors as of `reward`."""
        return self._run(Compared, jobs, math.inf)

    def _run(self, kind: type[T], jobs: Sequence[Job], most_failures: float) -> list[list[T]]:
        for worker in [worker for worker in self._workers if not worker.is_alive()]:
            self._stop(worker)  # of what it did when there was nothing to do
            self._start()
        answers: _Answers[T] = _Answers(kind, jobs)
        waiting = deque(self._chunks(jobs))
        while answers.failures <= most_failures and (waiting or any(map(_is_busy, self._workers))):
            for worker in self._workers:
                if waiting and worker.ready and not worker.items:
                    worker.begin(kind.__name__, waiting.popleft())
                    self._send(worker)
            for worker, event in self._events():
                if event == selectors.EVENT_WRITE:
                    self._send(worker)
                elif (received := worker.receive()) is None:
                    self._replace(worker, *self._why(worker), answers, waiting)
                else:
                    self._take(worker, received, answers)
            for worker in [worker for worker in self._workers if self._left(worker) <= 0]:
                late = f"it took longer than {self._limit(worker):g} s"
                self._replace(worker, "deadline", late, answers, waiting)
        for worker in filter(_is_busy, list(self._workers)):
            self._stop(worker)
            self._start()
        self._keep_output()
        return answers.all()

    def _chunks(self, jobs: Sequence[Job]) -> Iterator[list[_Item]]:
        """All completions, in parts that a worker is given at a time."""
        items = [
            _Item(job, place, line, completion)
            for job, (row, completions) in enumerate(jobs)
            for line in [json.dumps(row)]
            for place, completion in enumerate(completions)
        ]
        size = max(1, math.ceil(len(items) / (_CHUNKS * len(self._workers))))
        for first in range(0, len(items), size):
            yield items[first : first + size]

    def _events(self) -> Iterator[tuple[_Worker, int]]:
        """Workers that can be read or written; waits until there are some, or one is late."""
        seconds = min(map(self._left, self._workers))
        for key, event in self._selector.select(None if seconds == math.inf else max(0, seconds)):
            if key.data in self._workers:  # it may have been replaced because of the one before
                yield key.data, event

    def _left(self, worker: _Worker) -> float:
        """Seconds until it is late."""
        if worker.ready and not worker.items:
            return math.inf
        since, _ = worker.progress.read()
        return since + self._limit(worker) - time.monotonic()

    def _limit(self, worker: _Worker) -> float:
        """Seconds that what it does may take."""
        return self._config.deadline if worker.ready else _LOADING_S

    def _send(self, worker: _Worker) -> None:
        """Sends as much as goes now; `_events` says when there is room for more."""
        worker.send()
        waits = worker.requests in self._selector.get_map()
        if worker.unsent and not waits:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)
        elif waits and not worker.unsent:
            self._selector.unregister(worker.requests)

    def _take(self, worker: _Worker, received: Sequence[Any], answers: _Answers[T]) -> None:
        for answer in itertools.chain.from_iterable(received):
            if worker.items:
                answers.put(worker.items.pop(0), answer)
                worker.answered += 1
            elif answer == "ready":
                worker.ready = True
            else:
                raise ValueError(answer["error"])

    def _why(self, worker: _Worker) -> tuple[str, str]:
        """Why a worker ended, or had to: reason and failure."""
        match worker.ended():
            case None:
                return "crash", "something else than answers came from the process"
            case code if code == NO_MEMORY:
                return "memory", f"it took more than {self._config.memory_mb} MB"
            case code if code == -signal.SIGXCPU:
                return "cpu", f"it took more than {self._config.deadline:g} s of processor time"
            case code if code < 0:
                return "crash", f"the process died of {signal.Signals(-code).name}"
            case code:
                return "crash", f"the process ended with exit code {code}"

    def _replace(
        self,
        worker: _Worker,
        reason: str,
        failure: str,
        answers: _Answers[T],
        waiting: deque[list[_Item]],
    ) -> None:
        """Puts a new worker in the place of one that has failed.

        Raises:
          ValueError: it failed while it loaded the rewards, as the next would.
        """
        at = worker.at
        self._stop(worker)
        if not worker.ready:
            raise ValueError(f"the rewards cannot be loaded: {failure}{self._last_words()}")
        self._start()
        if worker.items:
            answers.fail(worker.items.pop(at), reason, failure)
        if worker.items:
            waiting.appendleft(worker.items)

    def _start(self) -> None:
        worker = _Worker(self._setup, self._printed)
        self._workers.append(worker)
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        self._send(worker)

    def _stop(self, worker: _Worker) -> None:
        for pipe in (worker.requests, worker.answers):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
        self._workers.remove(worker)
        worker.kill()

    def _last_words(self) -> str:
        self._printed.seek(0)
        said = self._printed.read(_LONGEST_OUTPUT).decode("utf-8", "replace").strip()
        return f"; it says: {printable(said.splitlines()[-1])}" if said else ""

    def _keep_output(self) -> None:
        """Moves what was printed to `output`; a file without end would fill the disk."""
        size = os.fstat(self._printed.fileno()).st_size
        if not size:
            return
        self._printed.seek(0)
        said = self._printed.read(_LONGEST_OUTPUT).decode("utf-8", "replace")
        self._printed.truncate(0)
        if self.output is not None:
            shown = harmless(redact(said)).encode()[: self._room]
            self._room -= len(shown)
            with contextlib.suppress(OSError), self.output.open("ab") as file:
                file.write(shown)


def _is_busy(worker: _Worker) -> bool:
    return bool(worker.items)


def _processors() -> int:
    """Those that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
