"""Rewards that hang, crash, eat memory and lie cost one completion; others keep their scores."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest

from jaxgrpo.config import Config, ScoringConfig, check_ranges
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema
from jaxgrpo.rewards.pool import Compared, Pool, Rewarded

REWARD = """
import ctypes, json, os, signal, subprocess, sys, threading, time

def hang():
    while True:
        time.sleep(100)

def spin():
    while True:
        pass

def spin_in_threads():
    for _ in range(4):
        threading.Thread(target=spin, daemon=True).start()
    hang()

def lying_number():
    class Number:
        def __float__(self):
            raise OSError("no")
    return Number()

def eat():
    memory = []
    while True:
        memory.append(bytearray(1 << 24))

def flood():
    print("x" * 3_000_000)
    return 1.0

WHAT = {
    "hang": hang,
    "spin": spin,
    "spin_in_threads": spin_in_threads,
    "eat": eat,
    "eat_at_once": lambda: bytearray(1 << 40),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "leave": lambda: os._exit(3),
    "exit": lambda: sys.exit(3),
    "close": lambda: os.closerange(0, 200),
    "raise": lambda: {}["total"],
    "recurse": lambda: WHAT["recurse"](),
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "infinity": lambda: -float("inf"),
    "text": lambda: "1.0",
    "list": lambda: [1.0, 2.0],
    "huge": lambda: 10**400,
    "lying_number": lying_number,
    "read": input,
    "fork": lambda: os.fork() and 1.0 or os._exit(0),
    "flood": flood,
}

def reward(completion, row):
    if completion in WHAT:
        return WHAT[completion]()
    if completion == "change the row":
        row.clear()
    if completion == "print":
        print("said on stdout \\x1b[31m")
        os.system("echo said by a child; echo on stderr >&2")
    return len(completion) + len(row) / 10
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The name of the reward above: a completion's length, or what it asks for."""
    file = tmp_path_factory.mktemp("rewards") / "bad.py"
    file.write_text(REWARD)
    return f"{file}:reward"


@pytest.fixture(scope="module")
def pool(reward):
    with Pool(True, {reward: 2.0}, ScoringConfig(deadline=60, memory_mb=512, workers=2)) as pool:
        yield pool


def good(completion, fields=1):
    return 2 * (len(completion) + fields / 10)


BAD = {
    "eat": ("memory", "more than 512 MB"),
    "eat_at_once": ("memory", "more than 512 MB"),
    "segfault": ("crash", "died of SIGSEGV"),
    "abort": ("crash", "died of SIGABRT"),
    "leave": ("crash", "exit code 3"),
    "close": ("crash", "process"),
    "exit": ("exception", r"bad\.py:\d+: SystemExit: 3"),
    "raise": ("exception", r"bad\.py:\d+: KeyError: 'total'"),
    "recurse": ("exception", "RecursionError"),
    "read": ("exception", "EOFError"),
    "none": ("no_number", "returned None"),
    "nan": ("no_number", "returned nan"),
    "infinity": ("no_number", "returned -inf"),
    "text": ("no_number", r"returned '1\.0'"),
    "list": ("no_number", r"returned \[1\.0, 2\.0\]"),
    "huge": ("no_number", "no finite number"),
    "lying_number": ("no_number", "no finite number"),
}


def test_each_bad_completion_is_alone_without_a_score(pool):
    completions = [text for bad in BAD for text in ("x" * len(bad), bad, "yy")]
    (answers,) = pool.reward([({"a": 1}, completions)])
    for completion, answer in zip(completions, answers, strict=True):
        if completion in BAD:
            reason, failure = BAD[completion]
            assert answer[:3] == (0.0, reason, ""), (completion, answer)
            assert re.search(failure, answer.failure), (completion, answer)
            assert "\n" not in answer.failure
            assert answer.total == 0
        else:
            assert answer.failure == ""
            assert answer.total == pytest.approx(good(completion))


def test_what_never_ends_meets_the_deadline(reward):
    endless = {
        "hang": ("deadline", "longer than 3 s"),
        "spin": ("deadline", "longer than 3 s"),
        "spin_in_threads": ("cpu|deadline", "3 s"),
    }
    completions = ["x", "hang", "yyy", "spin", "z", "spin_in_threads", "zz"]
    with Pool(True, {reward: 2.0}, ScoringConfig(deadline=3, workers=3)) as pool:
        (answers,) = pool.reward([({"a": 1}, completions)])
        for text, answer in zip(completions, answers, strict=True):
            if text in endless:
                assert re.fullmatch(endless[text][0], answer.reason)
                assert endless[text][1] in answer.failure
            else:
                assert answer.total == pytest.approx(good(text))


def test_a_pattern_that_backtracks_without_end_meets_the_deadline(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"properties": {"a": {"pattern": "^(a+)+$"}}}')
    bad, valid = json.dumps({"a": "a" * 60 + "!"}), '{"a": "aaa"}'
    with Pool(load_schema(file), {}, ScoringConfig(deadline=2, workers=1)) as pool:
        (answers,) = pool.compare([({"ground_truth": {"a": "aaa"}}, [valid, bad, valid])])
        found = Compared(1.0, "valid", fields={"a": True}, exact=True)
        assert answers == [found, Compared(0.0, "deadline", failure=answers[1].failure), found]


def test_scores_are_those_of_the_same_rewards_here(tmp_path):
    """Every number of a schema arrives as it was written; a row's own schema comes first."""
    file = tmp_path / "schema.json"
    limit = "0.1000000000000000055511151231257827"  # above the double 0.1
    file.write_text(f'{{"properties": {{"a": {{"maximum": {limit}}}}}, "required": ["a", "ä"]}}')
    schema = load_schema(file)
    weights = {"graded": 1.0, "fields": 0.25}
    rewards, judge = resolve_rewards(weights, schema), SchemaReward(schema).judge
    texts = [
        *("{}", "", "nonsense", f'{{"a": {limit}, "ä": 1}}', f'{{"a": {limit}1, "ä": 1}}'),
        *('{"a": 1e400}', "[" * 100_000, "\ud800", "\0", '"' + "x" * 10_000_000 + '"'),
    ]
    rows = [{}, {"ground_truth": {"a": 0.1, "ä": 1}}, {"schema": {"type": "object"}}]
    with Pool(schema, weights, ScoringConfig(workers=2)) as pool:
        answers = pool.reward([(row, texts) for row in rows] + [({}, [])])
        assert pool.reward([]) == pool.compare([]) == []
    assert answers.pop() == []
    for row, row_answers in zip(rows, answers, strict=True):
        for text, answer in zip(texts, row_answers, strict=True):
            total, terms = rewards(text, row)
            verdict = judge(text, row)
            want = Rewarded(verdict.score, verdict.reason, verdict.path, total, terms)
            assert answer == want, text[:80]
    assert answers[0][3].reason == "valid"
    assert answers[0][4].reason == "maximum@/a"


def test_a_row_is_the_same_for_each_completion(pool):
    (answers,) = pool.reward([({"a": 1, "b": 2}, ["change the row", "x"])])
    assert answers[1].total == pytest.approx(good("x", fields=2))


def test_what_rewards_print_is_kept_up_to_a_megabyte_and_harmless(pool, tmp_path, monkeypatch):
    pool.reward([({}, ["print"])])  # without a file it is thrown away
    pool.output = tmp_path / "rewards.log"
    pool.reward([({}, ["print"])])
    said = pool.output.read_text()
    assert said.count("said on stdout \\x1b[31m\n") == 1
    assert "said by a child\n" in said
    assert "on stderr\n" in said
    for _ in range(2):
        (answers,) = pool.reward([({}, ["flood", "x"])])
        assert [answer.failure for answer in answers] == ["", ""]
    assert 1_000_000 < pool.output.stat().st_size <= 1 << 20


def test_where_too_many_fail_the_rest_is_not_tried(reward):
    with Pool(True, {reward: 1.0}, ScoringConfig(deadline=60, workers=1)) as pool:
        jobs = [({}, ["raise", "x"])] * 10
        answers = [answer for each in pool.reward(jobs, most_failures=3) for answer in each]
        reasons = [answer.reason for answer in answers]
        assert 4 <= reasons.count("exception") <= 5  # more may have come at once
        assert reasons[10:] == ["abandoned"] * 10
        assert all(answer.failure for answer in answers[10:])
        (again,) = pool.reward([({}, ["yy"])])  # and the pool goes on
        assert again[0].failure == ""


def test_a_worker_that_died_with_nothing_to_do_costs_nothing(reward):
    others = workers(os.getpid())
    with Pool(True, {reward: 2.0}, ScoringConfig(workers=1)) as pool:
        pool.reward([({"a": 1}, ["x"])])
        [worker] = set(workers(os.getpid())) - set(others)
        os.kill(worker, signal.SIGKILL)
        while worker in workers(os.getpid()):
            time.sleep(0.01)
        assert pool.reward([({"a": 1}, ["x"])])[0][0].total == pytest.approx(good("x"))


def workers(parent):
    """The worker processes of a process that have not ended."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,stat=,args=", "--ppid", str(parent)],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    rows = [line.split(None, 2) for line in found]
    return [int(pid) for pid, stat, args in rows if "rewards.worker" in args and stat[0] != "Z"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", r"mine\.py:1: ModuleNotFoundError: No module named"),
        ("def reward(:", r"mine\.py:1: invalid syntax"),
        ("x = 1", "there is no reward in"),
        ("import os; os._exit(3)", "the rewards cannot be loaded: .* exit code 3"),
        ("import sys, os; print('why', file=sys.stderr); os.abort()", "SIGABRT; it says: .*why"),
    ],
)
def test_rewards_that_cannot_be_loaded_are_named(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with (
        Pool(True, {f"{file}:reward": 1.0}, ScoringConfig(workers=2)) as pool,
        pytest.raises(ValueError, match=message) as caught,
    ):
        pool.reward([({}, ["x"])])
    assert "\n" not in str(caught.value)


def test_rewards_that_take_too_long_to_load_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgrpo.rewards.pool._LOADING_S", 2.0)
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(1000)\n")
    rewards = {f"{tmp_path}/mine.py:reward": 1.0}
    with (
        Pool(True, rewards, ScoringConfig(deadline=60, workers=1)) as pool,
        pytest.raises(ValueError, match="rewards cannot be loaded: it took longer than 2 s"),
    ):
        pool.reward([({}, ["x"])])


def test_a_reward_that_is_a_module_is_found_as_here(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def mine(completion, row): return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(True, {"my_rewards:mine": 1.0}, ScoringConfig(workers=1)) as pool:
        assert pool.reward([({}, ["x"])])[0][0].total == 0.5


def test_workers_see_no_accelerator_and_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "seen.py").write_text(
        "import os\n"
        "def reward(completion, row):\n"
        "    names = ('CUDA_VISIBLE_DEVICES', 'JAX_PLATFORMS')\n"
        "    return float([os.environ[name] for name in names] == ['', 'cpu'])\n"
    )
    body = """
        import sys, time
        from jaxgrpo.config import ScoringConfig
        from jaxgrpo.rewards.pool import Pool
        pool = Pool(True, {"seen.py:reward": 1.0, "bad.py:reward": 1.0}, ScoringConfig(workers=2))
        print(pool.reward([({}, ["x"])])[0][0].terms["seen.py:reward"], flush=True)
        pool.reward([({}, ["hang", "hang"])])
    """
    (tmp_path / "bad.py").write_text(REWARD)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "1.0\n"
        started = workers(process.pid)
        assert len(started) == 2
        process.kill()
    for pid in started:
        for _ in range(1000):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"{pid} is still there")


def test_nothing_is_left_open(reward):
    def count():
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = count()
    with Pool(True, {reward: 1.0}, ScoringConfig(workers=2)) as pool:
        pool.reward([({}, ["x"])])
        during = count()
        for _ in range(3):
            pool.reward([({}, ["leave", "x"])])
        assert count() == during
    assert count() == before


def test_limits_are_checked():
    for name, value in {"deadline": 0, "memory_mb": 10, "max_failed": 1.0, "workers": -1}.items():
        with pytest.raises(ValueError, match=f"scoring.{name} is"):
            check_ranges(replace(Config(), scoring=ScoringConfig(**{name: value})))
