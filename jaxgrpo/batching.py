"""Requests that come one by one, answered together: one thread that owns the devices."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from jaxgrpo.drawing import Truncation
from jaxgrpo.rollout import Answers
from jaxgrpo.types import Problem

_LINGER_S = 0.01  # for others that come at the same time
_MOST_WAITING = 256


class Draw(NamedTuple):
    """How a completion is drawn; those of a batch agree in it.

    Attributes:
      temperature: 0 is greedy.
      truncation: which tokens may be drawn.
      constrained: whether the problem's schema limits them.
    """

    temperature: float
    truncation: Truncation
    constrained: bool


class FullError(Exception):
    """Too many wait already."""


@dataclass(eq=False)
class _Asked:
    draw: Draw
    number: int
    problem: Problem
    answers: Future[Answers]


class Batcher:
    """Answers what waits, the oldest first, and with it what can go into its batch.

    Args:
      answer: draws a completion of each of at most `batch` problems; each comes after the number
        that its random keys are made of. Called in one thread, and nowhere else.
      batch: problems answered together.
    """

    def __init__(
        self,
        answer: Callable[[Draw, Sequence[tuple[int, Problem]]], Sequence[Answers]],
        batch: int,
    ):
        self._answer = answer
        self._batch = batch
        self._changed = threading.Condition()
        self._waiting: list[_Asked] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything is still answered."""
        return self._thread.is_alive()

    def submit(self, draw: Draw, problems: Sequence[tuple[int, Problem]]) -> list[Future[Answers]]:
        """Asks for a completion of each problem; one that is cancelled while it waits is not drawn.

        Args:
          draw: how.
          problems: each after the number that its random keys are made of.

        Raises:
          FullError: too many wait; none of these does.
        """
        asked = [_Asked(draw, number, problem, Future()) for number, problem in problems]
        with self._changed:
            self._drop_cancelled()
            if self._closed or len(self._waiting) + len(asked) > _MOST_WAITING:
                raise FullError
            self._waiting += asked
            self._changed.notify_all()
        return [one.answers for one in asked]

    def close(self) -> None:
        """Ends with the batch that is being answered; what waits is cancelled."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for one in waiting:
            one.answers.cancel()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            batch = [one for one in self._next() if one.answers.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                answered = self._answer(batch[0].draw, [(one.number, one.problem) for one in batch])
            except Exception as error:  # it costs this batch, not the next one
                for one in batch:
                    one.answers.set_exception(error)
            else:
                for one, answers in zip(batch, answered, strict=True):
                    one.answers.set_result(answers)

    def _next(self) -> list[_Asked]:
        """The next batch; empty at the end, or if all that waited are cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(
                lambda: len(self._alike()) == self._batch or self._closed, _LINGER_S
            )
            self._drop_cancelled()  # they would take places
            batch = self._alike()
            self._waiting = [one for one in self._waiting if one not in batch]
            return batch

    def _alike(self) -> list[_Asked]:
        """The oldest that waits and those that can go with it."""
        alike = [one for one in self._waiting if one.draw == self._waiting[0].draw]
        return alike[: self._batch]

    def _drop_cancelled(self) -> None:
        self._waiting = [one for one in self._waiting if not one.answers.cancelled()]
