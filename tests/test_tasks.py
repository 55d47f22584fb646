"""The two tasks of docs/tasks.md: their data, their rewards by hand, a step of training."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxgrpo.evaluate
from jaxgrpo.config import ScoringConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.rewards.base import load_reward
from jaxgrpo.rewards.json_schema import SchemaReward
from jaxgrpo.rewards.pool import Pool
from jaxgrpo.train import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
right_call = load_reward("tool_calls.py:right_call", EXAMPLES)
well_formed = load_reward("sql.py:well_formed", EXAMPLES)
right = load_reward("sql.py:right", EXAMPLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples, copied as a user would, with their data written."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("tool_calls", "sql"):
        for ending in ("py", "toml"):
            shutil.copy(EXAMPLES / f"{name}.{ending}", folder)
        command = [sys.executable, folder / f"{name}.py"]
        subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT)}, cwd="/")
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def asked(row):
    return row["messages"][-1]["content"]


# --------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", ["tool_calls", "sql"])
def test_data_are_the_same_every_time_and_its_parts_share_nothing(folder, name):
    files = [folder / f"{name}_{part}.jsonl" for part in ("train", "heldout")]
    before = [file.read_bytes() for file in files]
    load_reward(f"{name}.py:main", folder)()
    assert [file.read_bytes() for file in files] == before
    train, heldout = (rows(folder, file.stem) for file in files)
    assert (len(train), len(heldout)) == (400, 100)
    values = [{value for row in part for value in values_of(row)} for part in (train, heldout)]
    assert len(values[0]) > 3 < len(values[1])
    assert values[0].isdisjoint(values[1])
    assert {asked(row) for row in train}.isdisjoint(map(asked, heldout))


def values_of(row):
    """A table and its kinds; of a call the texts but for days and sizes, which are few."""
    if "database" in row:
        tables = re.findall(r"INTO (\w+)", row["database"])
        return {*tables, *re.findall(r", '(\w+)', ", row["database"])}
    texts = re.findall(r': "([^"]+)"', json.dumps(row["ground_truth"]["arguments"]))
    return {*texts} - {"small", "large"}


def test_every_ground_truth_earns_everything(folder):
    judge = SchemaReward(True)
    for row in rows(folder, "tool_calls_train") + rows(folder, "tool_calls_heldout"):
        call = json.dumps(row["ground_truth"])
        assert (judge(call, row), right_call(call, row)) == (1.0, 1.0)
    for row in rows(folder, "sql_train")[:30] + rows(folder, "sql_heldout")[:30]:
        assert (well_formed(row["reference"], row), right(row["reference"], row)) == (1.0, 1.0)
        # What the prompt shows is not enough to answer from.
        shown = row["database"].splitlines()[:3]
        assert all(line in asked(row) for line in shown)
        assert len(row["database"].splitlines()) == 13


# ------------------------------------------------------------------------------------- tool calls

ALARM = {"time": "07:30", "days": ["mon", "fri"], "label": None}


def call(tool="set_alarm", **changed):
    return json.dumps({"tool": tool, "arguments": ALARM | changed})


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (call(), 1.0),
        (f"<think>Hm.</think>{call()}", 1.0),
        (call(days=["fri", "mon"]), 0.4 + 0.6 * 2 / 3),
        (call(label="null"), 0.4 + 0.6 * 2 / 3),
        (call(snooze=True), 0.4 + 0.6 * 3 / 4),
        (call(time=True, days=None, label=0), 0.4),
        ('{"tool": "set_alarm", "arguments": {}}', 0.4),
        ('{"tool": "set_alarm", "arguments": [1]}', 0.4),
        ('{"tool": "set_alarm"}', 0.4),
        (call("book_table"), 0.0),
        ('{"tool": ["set_alarm"]}', 0.0),
        (f"```json\n{call()}\n```", 0.0),
        ("[" * 100_000, 0.0),
        ('["set_alarm"]', 0.0),
        ("null", 0.0),
        ("", 0.0),
    ],
)
def test_reward_of_a_call(completion, reward):
    row = {"ground_truth": {"tool": "set_alarm", "arguments": ALARM}}
    assert right_call(completion, row) == pytest.approx(reward)


def test_numbers_and_nested_arguments_are_equal_as_json():
    truth = {"items": [{"product": "tea", "quantity": 2, "size": None}], "amount": 0.1}
    row = {"ground_truth": {"tool": "order", "arguments": truth}}
    text = '{"arguments": {"amount": 0.10, "items": [%s]}, "tool": "order"}'
    assert right_call(text % '{"size": null, "quantity": 2.0, "product": "tea"}', row) == 1.0
    assert right_call(text % '{"size": null, "quantity": "2", "product": "tea"}', row) == 0.7


def test_the_schema_is_the_rows_own_and_does_not_tell_the_tool(folder):
    """In the processes of a run: what another row offers, and what this one offers by the way."""
    both = [row for row in rows(folder, "tool_calls_train") if "set_alarm" in said_tools(row)]
    alarm = next(row for row in both if row["ground_truth"]["tool"] != "set_alarm")
    other = next(
        row for row in rows(folder, "tool_calls_train") if "set_alarm" not in said_tools(row)
    )
    rewards = {"graded": 1.0, f"{EXAMPLES}/tool_calls.py:right_call": 1.0}
    texts = [call(), call(time="7:30"), call(days="mon")]
    with Pool(True, rewards, ScoringConfig(workers=1)) as pool:
        [offered, not_offered] = pool.reward([(alarm, texts), (other, texts[:1])])
    assert [one.score == 1.0 for one in offered] == [True, False, False]
    assert offered[0].terms["graded"] == 1.0
    assert 0.3 < offered[1].terms["graded"] < 0.8
    assert not_offered[0].score == 0.5
    assert all(list(one.terms.values())[1] == 0.0 for one in offered + not_offered)


def said_tools(row):
    return re.findall(r"^(\w+): ", row["messages"][0]["content"], re.M)


# -------------------------------------------------------------------------------------------- SQL

ROW = {
    "database": "CREATE TABLE trips (name TEXT, city TEXT, km INTEGER);"
    "INSERT INTO trips VALUES ('A', 'Ulm', 1), ('B', 'Ghent', 2), ('C', 'Ghent', 4);",
    "reference": "SELECT city, SUM(km) FROM trips GROUP BY city",
}
RIGHT = [
    ROW["reference"],
    'select "CITY", sum([Km]) from `Trips` group by 1 order by 2 desc;',
    "-- by city\nSELECT city, SUM(km) /* all */ FROM trips GROUP BY city -- ; DROP TABLE trips",
    "<think>SELECT 1</think>\nSELECT t.city, SUM(t.km) * 1.0 FROM trips AS t GROUP BY t.city",
    "SELECT city AS c, SUM(km) AS s FROM trips GROUP BY c HAVING s > 0 ORDER BY s",
    "WITH u(c, k) AS (SELECT city, km FROM trips) SELECT c, SUM(k) FROM u GROUP BY c",
    "SELECT DISTINCT city, (SELECT SUM(km) FROM trips b WHERE b.city = a.city) FROM trips a",
    "SELECT city, SUM(km) FROM (SELECT * FROM trips) GROUP BY city",
]
WRONG = [
    "SELECT city, MAX(km) FROM trips GROUP BY city",
    "SELECT SUM(km), city FROM trips GROUP BY city",
    "SELECT city, SUM(km) FROM trips GROUP BY city LIMIT 1",
    "SELECT trips.* FROM trips",
    "SELECT trips.name FROM trips u",  # SQLite finds out that this is not its name
    "SELECT CAST(x'ff' AS TEXT), km FROM trips",  # is no text
    "SELECT '\ud800', km FROM trips",
    "SELECT '\0', km FROM trips",
]
NOT_THERE = [
    "SELECT 'Ghent', 6",
    "SELECT town FROM trips",
    'SELECT "town", km FROM trips',  # to SQLite a string
    "SELECT km FROM trips WHERE town = 'Ulm'",
    "SELECT km FROM journeys",
    "SELECT km FROM trips JOIN journeys USING (km)",
    "SELECT name FROM main.trips",
    "SELECT name FROM sqlite_master",
    "SELECT name FROM pragma_table_info('trips')",
]
NO_SELECT = [
    "",
    "{}",
    "Use SUM.",
    "```sql\nSELECT km FROM trips\n```",
    "SELECT km FROM trips; SELECT km FROM trips",
    "SELECT km FROM trips; ATTACH 'attached.db' AS a",
    "SELECT km FROM trips UNION SELECT 1",
    "ATTACH 'attached.db' AS a",
    "VACUUM INTO 'attached.db'",
    "PRAGMA table_info(trips)",
    "EXPLAIN SELECT km FROM trips",
    "DELETE FROM trips",
    "DROP TABLE trips",
    "INSERT INTO trips SELECT * FROM trips",
    "CREATE TABLE t AS SELECT * FROM trips",
    "SELECT km FROM trips WHERE km = " + "(" * 400,
    "SELECT km FROM trips WHERE " + "NOT " * 100 + "1; SELECT 1",
    "SELECT '" + "x" * 100_000 + "' FROM trips",
    "(" * 100_000,
    # SQLite would write this out to 2**40 terms.
    "WITH c0 AS (SELECT km x FROM trips)"
    + "".join(f",c{i} AS(SELECT x+x x FROM c{i - 1})" for i in range(1, 13))
    + " SELECT x FROM c12",
]
ENDLESS = [
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, km FROM n, trips",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT MAX(i), km FROM n, trips",
    "SELECT COUNT(*) FROM " + ", ".join(f"trips t{i}" for i in range(30)),
    "SELECT printf('%.*c', 2000000000, 'x') FROM trips",
    "SELECT zeroblob(2000000000) FROM trips",
    "SELECT load_extension('attached') FROM trips",
    f"SELECT km FROM trips WHERE '{'a' * 240}' LIKE '{'%a' * 90}%b'",
    "SELECT " + "+".join("x" * 60)
    + " FROM (SELECT " + "+".join("x" * 60)
    + " x FROM (SELECT " + "+".join("x" * 60) + " x FROM (SELECT km x FROM trips)))",
]  # fmt: skip
CASES = [
    *((text, 1.0, 1.0) for text in RIGHT),
    *((text, 1.0, 0.0) for text in WRONG + ENDLESS),
    *((text, 0.5, 0.0) for text in NOT_THERE),
    *((text, 0.0, 0.0) for text in NO_SELECT),
]


@pytest.mark.parametrize(("text", "formed", "result"), CASES, ids=lambda x: str(x)[:40])
def test_rewards_of_a_query(text, formed, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert (well_formed(text, ROW), right(text, ROW)) == (formed, result)
    assert time.process_time() < start + 5
    assert not list(tmp_path.iterdir())


def test_an_order_counts_where_the_reference_has_one():
    row = ROW | {"reference": "SELECT name FROM trips ORDER BY km DESC LIMIT 2"}
    assert right("SELECT name FROM trips WHERE km > 1 ORDER BY km DESC", row) == 1.0
    assert right("SELECT name FROM trips WHERE km > 1 ORDER BY km", row) == 0.0


# --------------------------------------------------------------------------------------- training


def one_step(folder, name, *more):
    """A step of the tiny model, which knows invoices alone: the plumbing, not that it learns."""
    lines = (folder / f"{name}_heldout.jsonl").read_text().splitlines(True)
    (folder / f"{name}_few.jsonl").write_text("".join(lines[:8]))
    options = [
        *(str(folder / f"{name}.toml"), "--run.dir", str(folder / name), "--run.steps", "1"),
        *("--model.path", str(ROOT / "configs" / "tiny_qwen3"), "--model.dtype", "float32"),
        *("--model.remat", "none", "--data.heldout", str(folder / f"{name}_few.jsonl")),
        *("--rollout.problems", "8", "--rollout.group", "2", "--rollout.max-refills", "0"),
        *("--update.microbatches", "1", "--grpo.kl-beta", "0", "--eval.samples", "0"),
        *("--eval.batch", "8", "--signal.preflight-groups", "0"),
    ]
    train(parse_args([*options, *more]))
    (folder / name / "report.html").stat()
    return [rows(folder / name, log) for log in ("metrics", "completions", "eval")]


def test_a_step_of_tool_calls_constrained_to_each_rows_schema(folder):
    metrics, completions, evaluations = one_step(
        folder, "tool_calls", "--sampling.constrain", "--sampling.max-tokens", "96"
    )
    problems = rows(folder, "tool_calls_train")
    ended = [each for each in completions if each["reason"] != "truncated"]
    assert len(completions) == 16
    assert len(ended) > 4
    judge = SchemaReward(True)
    for each in ended:
        assert each["reason"] == "valid"
        assert judge(each["text"], problems[int(each["problem"])]) == 1.0
        assert json.loads(each["text"])["tool"] in said_tools(problems[int(each["problem"])])
    assert metrics[0]["rewards"].keys() == {"graded", f"{folder}/tool_calls.py:right_call"}
    assert metrics[0]["valid_share"] == len(ended) / 16
    assert 0.999 < metrics[0]["ratio_min"] <= metrics[0]["ratio_max"] < 1.001
    assert [record["decides"] for record in evaluations] == ["exact", "exact"]
    assert evaluations[0]["fields"].keys() == {"tool", "arguments"}


def test_a_step_of_sql_is_judged_by_its_rewards_alone(folder, monkeypatch):
    metrics, completions, evaluations = one_step(folder, "sql", "--sampling.max-tokens", "24")
    names = [f"{folder}/sql.py:{name}" for name in ("well_formed", "right")]
    assert [*metrics[0]["rewards"]] == names
    assert "valid_share" not in metrics[0]
    assert metrics[0]["unscored"] == 0
    assert len(completions) == 16
    for record in evaluations:
        assert (record["decides"], record["n"], record["unscored"]) == ("reward_mean", 8, 0)
        assert [*record["rewards"]] == names
    assert "Rewards alone judge these answers." in (folder / "sql" / "report.html").read_text()

    # The command takes the rewards of the run.
    command = f"evaluate --model {folder}/sql --data {folder}/sql_few.jsonl --output {folder}/out"
    monkeypatch.setattr(sys, "argv", command.split())
    jaxgrpo.evaluate.main()
    record = json.loads((folder / "out").read_text())
    assert record["rewards"] == evaluations[-1]["rewards"]


def test_what_the_page_shows_stands_in_the_examples():
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    files = [file.read_text("utf-8") for file in EXAMPLES.glob("*.*")]
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) > 3
    for block in blocks:
        assert any(block in text for text in files), block
