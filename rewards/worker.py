"""The process in which rewards run: `jaxgrpo.rewards.pool` starts it, limits it and kills it.

It reads lines of JSON on stdin, and answers on stdout with lists of what it has found, in the order
of the completions. What rewards print goes to stderr, and their stdin is empty.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from jaxgrpo.rewards.base import RewardError, describe
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.fields import fields_right, is_exact
from jaxgrpo.rewards.json_schema import SchemaReward
from jaxgrpo.rewards.progress import Progress
from jaxgrpo.rewards.strict_json import loads

NO_MEMORY = 77  # exit code
_ANSWER_S = 0.02  # answers that took less come together; if the worker dies, they are lost
_PR_SET_PDEATHSIG = 1

Judge = Callable[[str, dict[str, Any]], list[Any]]


def main(progress_file: int) -> None:
    """Serves until stdin ends.

    Args:
      progress_file: descriptor of the file that the pool reads the progress from.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as empty:
        os.dup2(empty.fileno(), 0)
    os.dup2(2, 1)
    # A cluster's warning goes to every process of the job, but it is the run that ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def answer(values: list[Any]) -> None:
        answers.write(json.dumps(values).encode() + b"\n")
        answers.flush()

    progress = Progress(progress_file)
    os.close(progress_file)
    try:
        setup = json.loads(requests.readline())
        _limit(resource.RLIMIT_DATA, setup["memory_mb"] << 20)
        _limit(resource.RLIMIT_FSIZE, setup["file_mb"] << 20)
        _limit(resource.RLIMIT_CORE, 0)
        try:
            kinds = _judges(setup["rewards"], loads(setup["schema"]))
        except ValueError as error:
            answer([{"error": str(error)}])
            return
        answer(["ready"])
        begun = 0
        for request in requests:
            kind, rows = json.loads(request)
            values: list[Any] = []
            since = time.monotonic()
            for row, completions in rows:
                for completion in completions:
                    progress.begin(begun)
                    begun += 1
                    # A reward may change its row; so each completion has one of its own.
                    value = _attempt(kinds[kind], completion, json.loads(row), setup["deadline"])
                    values.append(value)
                    if isinstance(value, dict) or time.monotonic() > since + _ANSWER_S:
                        answer(values)
                        values, since = [], time.monotonic()
            answer(values)
    except MemoryError:
        os._exit(NO_MEMORY)


def _judges(weights: Mapping[str, float], schema: Any) -> dict[str, Judge]:
    """What can be asked for each completion; answers as in `pool.Rewarded` and `pool.Compared`."""
    judge = SchemaReward(schema).judge
    rewards = resolve_rewards(weights, schema)

    def reward(completion: str, row: dict[str, Any]) -> list[Any]:
        total, terms = rewards(completion, row)
        verdict = judge(completion, row)
        return [verdict.score, verdict.reason, verdict.path, total, terms]

    def compare(completion: str, row: dict[str, Any]) -> list[Any]:
        verdict, truth = judge(completion, row), row.get("ground_truth")
        fields = None if truth is None else fields_right(completion, truth)
        exact = verdict.score == 1.0 and truth is not None and is_exact(completion, truth)
        return [verdict.score, verdict.reason, verdict.path, fields, exact]

    return {"Rewarded": reward, "Compared": compare}


def _attempt(judge: Judge, completion: str, row: dict[str, Any], deadline: float) -> Any:
    """The answer for a completion, or why there is none."""
    # The deadline itself is the pool's; threads that a reward leaves behind meet this one.
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline) + 1)
    try:
        return judge(completion, row)
    except MemoryError:
        raise
    except RewardError as error:
        return {"reason": error.reason, "failure": str(error)}
    except BaseException as error:  # sys.exit() is no way to score a completion either
        return {"reason": "exception", "failure": describe(error)}


def _limit(what: int, value: int) -> None:
    """Lowers a limit of this process, as far as the system has it."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with suppress(ValueError):  # macOS has not all of them
        resource.setrlimit(what, (value, hard))
