"""When there is nothing to learn: what counts as that, and what is said."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgrpo.config import SignalConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.preflight import NoSignalError, Patience, check, describe
from jaxgrpo.rollout import Answers, Group
from jaxgrpo.train import look_first
from jaxgrpo.types import Problem, Verdict


def group(*rewards, reason="type@/amount"):
    n = len(rewards)
    problem = Problem(0, "0", (1, 2), {})
    zeros = np.zeros((n, 3), np.int32)
    ones = np.ones(n, np.int32)
    answers = Answers(
        problem, zeros, zeros.astype(np.float32), ones, np.ones(n, bool), ones, ["x"] * n
    )
    verdicts = [Verdict(1.0 if reason == "valid" else 0.5, reason)] * n
    return Group(answers, verdicts, np.array(rewards, np.float32), ones > 0, {}, [""] * n)


MIXED, FLAT = group(0.5, 1.0), group(0.5, 0.5)
SOLVED = group(1.0, 1.0, reason="valid")


def test_patience_ends_with_the_last_step_it_had():
    patience = Patience(SignalConfig(patience=3))
    for groups in ([FLAT, FLAT], [FLAT, MIXED], [FLAT], [FLAT]):
        patience.see(groups)
    with pytest.raises(NoSignalError, match="3 steps in a row"):
        patience.see([FLAT])


def test_a_solved_task_is_not_a_stuck_one():
    patience = Patience(SignalConfig(patience=2))
    for _ in range(10):
        patience.see([SOLVED, SOLVED])
    patience.see([SOLVED, FLAT])  # one failing group after that is no reason to stop
    assert patience.idle == 1


def test_preflight_names_the_plateau():
    with pytest.raises(NoSignalError, match=r"plateau at reward 0\.50 \(type@/amount\)") as caught:
        check([FLAT] * 8, SignalConfig(min_share=0.1))
    assert "graded reward" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_preflight_knows_what_is_solved_already():
    wrong = group(0.5, 0.5, reason="valid")
    said = r"valid already and 0% .* mean: 0\.75\), .*, where values are wrong still, .*temperature"
    with pytest.raises(NoSignalError, match=said):
        check([SOLVED, wrong] * 4, SignalConfig(min_share=0.1))


def test_where_rewards_alone_decide_full_marks_are_what_is_solved():
    done, nearly = group(1.2, 1.2, reason="prose"), group(0.7, 0.7, reason="prose")
    full = 0.7 + 0.5  # in float32 it is not 1.2
    patience = Patience(SignalConfig(patience=2), full=full)
    for _ in range(10):
        patience.see([done, done])
    patience.see([done, nearly])
    assert patience.idle == 1
    with pytest.raises(NoSignalError, match="earn full marks already"):
        check([done] * 8, SignalConfig(min_share=0.1), full)
    with pytest.raises(NoSignalError, match=r"plateau at reward 0\.70: .* pay for a part"):
        check([nearly] * 8, SignalConfig(min_share=0.1), full)
    # JSON that happens to be valid is not what is asked for.
    with pytest.raises(NoSignalError, match="2 steps in a row"):
        patience.see([SOLVED])
    done.scored_G[0] = False
    with pytest.raises(NoSignalError, match="only 0% of 8 groups"):
        check([done] * 8, SignalConfig(min_share=0.1), full)


def test_preflight_lets_go_what_has_signal():
    assert check([MIXED] + [FLAT] * 9, SignalConfig(min_share=0.1)) is None


def test_description_counts_rewards_and_shows_an_example_of_each_reason():
    hostile = group(0.0, 0.0, reason="prose")
    hostile.answers.texts[:] = ["\x1b[31m red \u202e", "y" * 10_000]
    text = "\n".join(describe([MIXED, FLAT, hostile]))
    assert "6 completions of 3 problems" in text
    assert "1 of 3 groups have unequal rewards" in text
    assert "prose, reward 0.00" in text
    assert "type@/amount, reward 0.50" in text
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)


def test_what_has_no_score_is_shown_and_not_counted():
    mixed = group(0.5, 1.0, 0.0)
    mixed.scored_G[2] = False
    mixed.verdicts[2] = Verdict(0.0, "deadline")
    text = "\n".join(describe([mixed]))
    assert "3 completions of 1 problems, 1 without a score; rewards:" in text
    assert "deadline, no score: x" in text
    assert "reward 0.00" not in text
    flat = group(0.5, 0.5, 0.0)
    flat.scored_G[2] = False
    with pytest.raises(NoSignalError, match=r"plateau at reward 0\.50"):
        check([flat] * 8, SignalConfig(min_share=0.1))


@pytest.mark.parametrize(("signal_from", "seen"), [(0, 8), (8, 32), (32, 32)])
def test_more_groups_are_seen_before_refusing(signal_from, seen):
    config = parse_args(["--rollout.problems", "4"])
    asked = []

    def sample(_, problems, key, **options):
        start = len(asked)
        asked.extend(problems)
        return [MIXED if start + i >= signal_from else FLAT for i in range(len(problems))]

    task = SimpleNamespace(
        sampler=sample,
        scorer=lambda answers: answers,
        problems=[FLAT.answers.problem] * 40,
        full=None,
    )
    said = []
    display = SimpleNamespace(say=lambda *lines: said.extend(lines))

    def look():
        look_first(config, task, None, jax.random.key(0), display)

    if signal_from == 32:
        with pytest.raises(NoSignalError, match="only 0% of 32 groups"):
            look()
    else:
        look()
    assert len(asked) == seen
    assert f" of {seen} groups have unequal rewards to learn from" in said[-1]
