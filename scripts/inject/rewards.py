"""Rewards that hang, crash, eat memory or lie on one completion of a run."""

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import Small, last_step, records

_DEADLINE = 3.0
_STEPS = 4
_OPTIONS = (
    *("--run.steps", _STEPS),
    *("--eval.every", 0),
    *("--scoring.deadline", _DEADLINE),
    *("--scoring.memory-mb", 512),
)
_REWARD = """
import ctypes, os, sys, threading, time

def hang():
    while True:
        time.sleep(100)

def spin():
    while True:
        pass

def spin_in_threads():
    for _ in range(8):
        threading.Thread(target=spin).start()
    hang()

def eat():
    memory = []
    while True:
        memory.append(bytearray(1 << 24))

class Lying:
    def __float__(self):
        raise OSError("no")

def print_without_end():
    while True:
        print("x" * 10_000, file=sys.stderr)

def letters(completion, row):
    if completion == CHOSEN:
        return BAD()
    return len(set(completion)) / 50
"""
# What is done instead of returning the number, and the reasons that may be given for it.
_BAD = {
    "hang": ("hang", "deadline"),
    "spin": ("spin", "deadline"),
    "spin_in_threads": ("spin_in_threads", "cpu deadline"),
    "print_without_end": ("print_without_end", "deadline exception"),
    "eat_memory": ("eat", "memory"),
    "segmentation_fault": ("(lambda: ctypes.string_at(0))", "crash"),
    "abort": ("os.abort", "crash"),
    "exit_at_once": ("(lambda: os._exit(3))", "crash"),
    "sys_exit": ("sys.exit", "exception"),
    "raise": ("(lambda: {}['total'])", "exception"),
    "read_stdin": ("input", "exception"),
    "nan": ("(lambda: float('nan'))", "no_number"),
    "infinity": ("(lambda: float('-inf'))", "no_number"),
    "none": ("(lambda: None)", "no_number"),
    "too_many": ("(lambda: [1.0, 2.0])", "no_number"),
    "text": ("(lambda: '1.0')", "no_number"),
    "lying": ("Lying", "no_number"),
}


def row_07(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Each bad reward on one completion, and one that is bad on all."""
    small = Small(work_dir)
    small.whole()  # before the cases, which may run at the same time
    rng = np.random.default_rng(seed)
    cases: list[tuple[str, Callable[[Path], object]]] = [
        (name, partial(_one, small, bad, reasons.split(), int(rng.integers(2**31))))
        for name, (bad, reasons) in _BAD.items()
    ]
    cases.append(("hang_on_all", partial(_all, small)))
    return run_cases(work_dir, cases[:count])


def _reward(place: Path, bad: str, chosen: str) -> tuple[str, str, str]:
    """The reward of all small runs, but for the completion that is chosen."""
    file = place / "bad.py"
    file.write_text(_REWARD.replace("BAD", bad).replace("CHOSEN", chosen), "utf-8")
    return "--rewards", f"{file}:letters", "1.0"


def _one(small: Small, bad: str, reasons: list[str], draw: int, place: Path) -> None:
    """That completion has no score, all others of its step do; it ends in time, the run goes on."""
    whole = [record for record in records(small.whole(), "completions") if record["step"] <= _STEPS]
    times = Counter(record["text"] for record in whole)
    once = [record for record in whole if times[record["text"]] == 1 and record["step"] > 1]
    chosen = once[draw % len(once)]
    step = chosen["step"]
    ended = small.finish(place, *_OPTIONS, *_reward(place, bad, repr(chosen["text"])))

    ours = [r for r in records(place / "run", "completions") if r["step"] <= step]
    found = [r for r in ours if r["reward"] is None]
    assert [r["reason"] in reasons for r in found] == [True], f"without a score: {found}"
    expected = [
        r | {"reward": None, "reason": found[0]["reason"]} if r is chosen else r
        for r in whole
        if r["step"] <= step
    ]
    assert ours == expected, f"step {step}: other completions or rewards"
    metrics = {record["step"]: record for record in records(place / "run", "metrics")}
    assert [metrics[s]["unscored"] for s in range(1, step + 1)] == [0] * (step - 1) + [1]
    spent = metrics[step]["seconds"]["reward"]
    assert spent < _DEADLINE + 2, f"step {step}: scored in {spent} s"
    assert f"step {step}: 1 completions have no score; the first: " in ended.out, ended.out
    assert last_step(place / "run") == _STEPS


def _all(small: Small, place: Path) -> None:
    """The run ends before it begins, in one line with the reason, without a wait for each."""
    start = time.monotonic()
    with small.start(place, *_OPTIONS, *_reward(place, "hang", "completion")) as process:
        ended = process.end()
    spent = time.monotonic() - start
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    assert ended.err.count("\n") == 1, ended.err
    assert f"took longer than {_DEADLINE:g} s" in ended.err, ended.err
    assert spent < _DEADLINE + 60, f"it took {spent} s"
    assert not (place / "run").exists(), json.dumps([p.name for p in (place / "run").iterdir()])
