"""Numbers that are none: in the loss, a gradient, a log-probability, a reward."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import Small, arrays, changed_arrays, last_step, records

_STEPS = 8
_OPTIONS = (
    *("--run.steps", _STEPS),
    *("--checkpoint.every", 1),
    *("--checkpoint.keep", _STEPS),
    *("--eval.every", 0),
)
_KINDS = ("loss", "gradient", "logprob")
_REWARD = """
def letters(completion, row):
    if completion in NONE:
        return float("nan")
    return len(set(completion)) / 50
"""


def row_06(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Two spoilt steps in a row, twice; three in a row; rewards that are no number."""
    small = Small(work_dir)
    rng = np.random.default_rng(seed)
    cases: list[tuple[str, Callable[[Path], object]]] = []
    for case in (_three, _two):
        for kind in _KINDS:
            first = int(rng.integers(1, 4))
            cases.append((f"{case.__name__[1:]}_{kind}", partial(case, small, kind, first)))
    cases.append(("one_reward", partial(_one_reward, small, int(rng.integers(2**31)))))
    cases.append(("all_rewards", partial(_all_rewards, small)))
    return run_cases(work_dir, cases[:count])


def _two(small: Small, kind: str, first: int, place: Path) -> None:
    """Goes on after two, and after two more with one good step between."""
    spoilt = [first, first + 1, first + 3, first + 4]
    with small.start(place, *_OPTIONS, hooks=[_poison(kind, spoilt)]) as process:
        ended = process.end()
    assert ended.code == 0, f"exit code {ended.code}: {ended.last_line}"
    _check_steps(place / "run", spoilt, _STEPS)


def _three(small: Small, kind: str, first: int, place: Path) -> None:
    """Ends at the third; the same command without the fault goes on from the second."""
    run_dir, last = place / "run", first + 2
    spoilt = [first, first + 1, last]
    with small.start(place, *_OPTIONS, hooks=[_poison(kind, spoilt)], name="ended_") as process:
        ended = process.end()
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    dump = run_dir / f"nonfinite_step_{last}.npz"
    assert ended.err.startswith(f"error: step {last}: 3 updates in a row were not finite"), (
        ended.err
    )
    assert str(dump) in ended.err, ended.err
    assert ended.err.count("\n") == 1, ended.err
    with np.load(dump) as batch:
        where = "logprobs_PGC" if kind == "logprob" else "advantage_PG"
        value = batch[where].flat[0]
        assert value == np.float32(1e30) if kind == "gradient" else np.isnan(value), value
        assert batch["tokens_PGC"].shape[:2] == (2, 4), batch["tokens_PGC"].shape
    _check_steps(run_dir, spoilt, last)
    small.finish(place, *_OPTIONS, name="resumed_")
    _check_steps(run_dir, [step for step in spoilt if step < last], _STEPS)


def _poison(kind: str, steps: list[int]) -> str:
    # The batch of a step is packed once.
    return f"pack:{','.join(map(str, steps))}:poison={kind}"


def _check_steps(run_dir: Path, spoilt: list[int], last: int) -> None:
    """The spoilt steps, and they alone, are counted as such and have changed nothing."""
    metrics = {record["step"]: record for record in records(run_dir, "metrics")}
    assert list(metrics) == [*range(1, last + 1)], list(metrics)
    skipped = [step for step, record in metrics.items() if record["skipped"]]
    assert skipped == spoilt, f"skipped {skipped}, spoilt {spoilt}"
    saved = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    state = {step: arrays(run_dir, step) for step in saved}
    for step in saved:
        for name, x in state[step].items():
            assert np.isfinite(x).all(), f"step {step}: {name} is not finite"
        if step - 1 in state:
            changed = changed_arrays(state[step - 1], state[step])
            if step in spoilt:
                assert changed == ["step"], f"step {step} was spoilt and has changed {changed}"
            else:
                assert len(changed) > 1, f"step {step} has changed {changed}"


def _reward(place: Path, none: str) -> tuple[str, str, str]:
    """The reward of all small runs, but no number for completions that are in `none`."""
    file = place / "no_number.py"
    file.write_text(_REWARD.replace("NONE", none), "utf-8")
    return "--rewards", f"{file}:letters", "1.0"


def _one_reward(small: Small, draw: int, place: Path) -> None:
    """That completion has no score; the others of its step have theirs, and training goes on."""
    whole = records(small.whole(), "completions")
    times = Counter(record["text"] for record in whole)
    once = [r for r in whole if times[r["text"]] == 1 and 1 < r["step"] < _STEPS]
    chosen = once[draw % len(once)]
    small.finish(place, *_OPTIONS, *_reward(place, repr([chosen["text"]])))
    ours = records(place / "run", "completions")
    up_to = [[r for r in log if r["step"] <= chosen["step"]] for log in (whole, ours)]
    expected = [r | {"reward": None, "reason": "no_number"} if r is chosen else r for r in up_to[0]]
    assert up_to[1] == expected, f"step {chosen['step']}: other completions or rewards"
    _check_steps(place / "run", [], _STEPS)


def _all_rewards(small: Small, place: Path) -> None:
    """The preflight ends the run: there is nothing to learn from."""
    with small.start(place, *_OPTIONS, *_reward(place, "completion")) as process:
        ended = process.end()
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert last_step(place / "run") == 0
