"""The evaluation command on the shipped base, and its counts by hand."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config import ScoringConfig
from jaxgrpo.evaluate import best_evaluation, count, main, wilson
from jaxgrpo.metrics import answer_records
from jaxgrpo.rewards.pool import Compared, Pool
from jaxgrpo.rollout import Answers
from jaxgrpo.types import Problem

CONFIGS = Path(__file__).parent.parent / "configs"
SCHEMA = CONFIGS / "invoices" / "schema.json"


def evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    main()


@pytest.fixture
def data(tmp_path):
    """Eleven problems, no multiple of anything: nine labelled, two not, one with its own schema."""
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines()[:11]
    rows = [json.loads(line) for line in lines]
    del rows[3]["ground_truth"], rows[7]["ground_truth"]
    rows[5]["schema"] = False  # which nothing meets
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_counts_of_the_command(monkeypatch, tmp_path, data, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[5]["schema"] = {"type": "array"}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    out = tmp_path / "result.json"
    options = ("--data", data, "--schema", SCHEMA, "--batch", 4, "--sampling.max-tokens", 64)
    options += ("--rewards", "graded", 0.5, "fields", 1)
    evaluate(monkeypatch, "--model", CONFIGS / "tiny_qwen3", *options, "--output", out)
    record = json.loads(out.read_text())
    assert (record["n"], record["temperature"], record["data"]) == (11, 0.0, str(data))
    assert record["reasons"]["type@"] == 1  # the row with its own schema
    assert sum(record["reasons"].values()) == 11
    assert record["schema_valid"]["count"] == record["reasons"]["valid"]
    assert record["exact"]["rate"] == record["exact"]["count"] / 9
    assert record["fields"].keys() == {"vendor", "date", "amount", "currency"}
    assert record["decides"] == "exact"
    graded, right = record["rewards"].values()
    assert record["schema_valid"]["rate"] <= graded <= record["parses"]["rate"]
    assert right == pytest.approx(9 / 11 * sum(record["fields"].values()) / 4)
    assert record["reward_mean"] == pytest.approx(0.5 * graded + right)
    assert 0 < record["tokens"] <= 64
    assert "schema valid" in capsys.readouterr().out

    # The same completions are drawn in batches of another size.
    sampled = ("--sampling.temperature", 1, "--samples", 3)
    for batch in (4, 16):
        (tmp_path / str(batch)).mkdir()
        evaluate(
            monkeypatch,
            *("--model", CONFIGS / "tiny_qwen3", "--data", data, "--schema", SCHEMA),
            *("--sampling.max-tokens", 64, "--batch", batch, *sampled),
            *("--output", tmp_path / str(batch) / "r.json"),
        )
    small, large = (json.loads((tmp_path / b / "r.json").read_text()) for b in ("4", "16"))
    assert small.pop("seconds") > 0
    assert large.pop("seconds") > 0
    assert small == large
    assert small["n"] == 33
    assert "rewards" not in small


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "no such model directory: nowhere"),
        ({"--data": "nowhere.jsonl"}, r"cannot read data file nowhere\.jsonl"),
        ({"--schema": "nowhere.json"}, r"cannot read schema file nowhere\.json"),
        ({"--system": "nowhere.txt"}, r"cannot read system message nowhere\.txt"),
        ({"--examples": "nowhere.jsonl"}, r"cannot read data file nowhere\.jsonl"),
        (
            {"--system": SCHEMA, "--max-prompt-tokens": "128"},
            "11 of 11 prompts are longer than 128",
        ),
        ({"--sampling.top-p": "0"}, r"sampling\.top_p is 0\.0; it must be above 0"),
        ({"--sampling.temperature": "-1"}, r"sampling\.temperature is -1\.0"),
        ({"--samples": "0"}, "at least 1"),
        ({"--rewards": "graded"}, "'graded' has no weight"),
        ({"--output": "."}, "is not a file"),
        ({"--mesh.fsdp": "3"}, "does not make 8 devices"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(monkeypatch, tmp_path, data, changes, message):
    model = tmp_path / "model"
    shutil.copytree(CONFIGS / "tiny_qwen3", model)
    (model / "model.safetensors").unlink()
    given = {"--model": model, "--data": data, "--schema": SCHEMA} | changes
    data.write_text(data.read_text().replace('"schema": false', '"schema": {}'))
    with pytest.raises(ValueError, match=message):
        evaluate(monkeypatch, *[word for pair in given.items() for word in pair])


def answers(truth, *texts):
    n = len(texts)
    zeros = np.zeros((n, 4), np.int32)
    row = {} if truth is None else {"ground_truth": truth}
    problem = Problem(0, "0", (1, 2), row)
    lengths, stopped = np.arange(1, n + 1, dtype=np.int32), np.arange(n) != 0
    return Answers(problem, zeros, zeros.astype(np.float32), lengths, stopped, lengths, list(texts))


def test_counts_by_hand():
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    with Pool(schema, {}, ScoringConfig(workers=1)) as pool:
        check_counts(pool)


def check_counts(pool):
    judged = []
    record = count(
        [
            # Right; valid with one field wrong; fails with one field right; valid, with a key more.
            answers(
                {"a": 1.5, "b": "x"},
                '{"a": 1.50, "b": "x"}',
                '{"a": 2, "b": "x"}',
                '{"a": "1.5", "b": "x"}',
                '{"a": 1.5, "b": "x", "c": 0}',
            ),
            answers({"a": 0}, "```json\n{}\n```"),
            answers(None, "{}"),
        ],
        pool,
        judged.append,
    )
    assert (record["n"], record["schema_valid"]["count"], record["parses"]["count"]) == (6, 4, 5)
    assert (record["exact"]["count"], record["exact"]["rate"]) == (1, 1 / 5)
    assert record["fields"] == {"a": 2 / 5, "b": 4 / 4}
    assert record["fields_if_valid"] == {"a": 2 / 3, "b": 3 / 3}
    assert record["reasons"] == {"valid": 4, "type@/a": 1, "fenced": 1}
    assert record["truncated"] == 3 / 6
    assert record["tokens"] == (1 + 2 + 3 + 4 + 1 + 1) / 6
    assert [(each.texts[-1], [one.reason for one in all_of]) for each, all_of in judged] == [
        ('{"a": 1.5, "b": "x", "c": 0}', ["valid", "valid", "type@/a", "valid"]),
        ("```json\n{}\n```", ["fenced"]),
        ("{}", ["valid"]),
    ]
    kept = [*answer_records(7, judged * 9)]
    assert len(kept) == 10
    assert kept[4] == {"step": 7, "problem": "0", "text": "```json\n{}\n```", "reason": "fenced"}


def test_what_cannot_be_judged_is_wrong():
    class Late:
        schema, rewards = True, {}

        def compare(self, jobs):
            late, right = Compared(0.0, "deadline", failure="late"), (1.0, "valid", "")
            return [[late, Compared(*right, {"a": True}, True)] for _ in jobs]

    record = count([answers({"a": 0}, "{}", "{}")], Late())
    assert record["reasons"] == {"deadline": 1, "valid": 1}
    assert (record["exact"]["count"], record["exact"]["rate"]) == (1, 0.5)
    assert (record["fields"], record["fields_if_valid"]) == ({"a": 0.5}, {"a": 1.0})


REWARDS = """
def parses(completion, row):
    return completion.startswith("SELECT")

def right(completion, row):
    if completion == "raise":
        raise KeyError(completion)
    return completion == row["wanted"]
"""


def test_rewards_are_reported_and_decide_where_nothing_else_does(tmp_path):
    file = tmp_path / "sql.py"
    file.write_text(REWARDS)
    parses, right = f"{file}:parses", f"{file}:right"
    asked = answers(None, "SELECT 1", "SELECT 2", "raise", '{"sql": "SELECT 1"}')
    asked.problem.row["wanted"] = "SELECT 1"
    with Pool(True, {parses: 0.5, right: 1.0}, ScoringConfig(workers=1)) as pool:
        record = count([asked], pool)
        # A schema, or one of a row, says what is valid; so do ground truth and what reads JSON.
        asked.problem.row["schema"] = {"type": "object"}
        assert count([asked], pool)["decides"] == "schema_valid"
    assert record["decides"] == "reward_mean"
    # What raises has no score and counts 0 in all of them.
    assert record["rewards"] == {parses: 2 / 4, right: 1 / 4}
    assert record["reward_mean"] == (1.5 + 0.5 + 0 + 0) / 4
    assert record["unscored"] == 1
    # The counts of JSON are what they are for any text, whatever the rewards do.
    assert (record["schema_valid"]["count"], record["parses"]["count"]) == (1, 1)
    assert sum(record["reasons"].values()) == 4

    del asked.problem.row["schema"]
    with Pool(True, {"graded": 0.5, right: 1.0}, ScoringConfig(workers=1)) as pool:
        record = count([asked, answers({"a": 1}, '{"a": 1}')], pool)
    assert (record["decides"], record["unscored"]) == ("exact", 2)  # the last has no `wanted`
    assert record["rewards"] == {"graded": 1 / 5, right: 1 / 5}


def test_the_best_is_the_best_by_what_decides():
    def record(step, valid, reward, **more):
        of = {"data": "a", "temperature": 0.0, "schema_valid": {"rate": valid}}
        return {"step": step, **of, "reward_mean": reward, **more}

    def best(*records):
        return best_evaluation(records, [1, 2, 3])

    both = [(0, 1.0, 9.0), (1, 0.5, 0.1), (2, 0.25, 0.4), (3, 0.0, 0.3)]
    assert best(*[record(*each) for each in both]) == {"step": 1, "rate": 0.5}
    by = {"decides": "schema_valid", "exact": {"rate": 0.0}}
    assert best(*[record(*each, **by) for each in both]) == {"step": 1, "rate": 0.5}
    by = {"decides": "reward_mean"}
    assert best(*[record(*each, **by) for each in both]) == {"step": 2, "rate": 0.4}
    by = {"exact": {"rate": 0.5}}
    assert best(*[record(*each, **by) for each in both]) == {"step": 3, "rate": 0.5}


def test_a_field_of_nested_ground_truth_is_right_as_a_whole_and_rewarded_by_its_parts():
    lines = [{"sku": "A-1", "quantity": 2, "price": 9.5}, {"sku": "B-7", "quantity": 1}]
    truth = {"number": "7", "lines": lines, "buyer": {"name": "Ash", "address": {"zip": None}}}

    def answer(**changed):
        return json.dumps(truth | changed)

    reordered = [{"price": 9.50, "quantity": 2.0, "sku": "A-1"}, lines[1]]
    texts = [
        answer(lines=reordered),  # keys in any order, numbers by value
        answer(lines=lines[::-1]),
        answer(lines=lines[:1]),
        answer(lines=[lines[0] | {"quantity": "2"}, lines[1]]),
        answer(lines=[*lines, lines[1]]),
        answer(buyer={"name": "Ash", "address": {}}),
        answer(buyer={"name": "Ash", "address": {"zip": None}, "vat": 1}),
        answer(lines={"0": lines[0], "1": lines[1]}),
    ]
    with Pool(True, {"fields": 1.0}, ScoringConfig(workers=1)) as pool:
        record = count([answers(truth, *texts)], pool)
    assert record["fields"] == {"number": 8 / 8, "lines": 3 / 8, "buyer": 6 / 8}
    assert record["exact"]["count"] == 1
    lines_and_buyer = [2, 1, 1 / 2 + 1, 5 / 6 + 1, 2 / 3 + 1, 1 + 1 / 2, 1 + 2 / 3, 1]
    mean = sum((1 + share) / 3 for share in lines_and_buyer) / 8
    assert record["reward_mean"] == pytest.approx(mean)


def test_wilson_interval_by_hand():
    # The article's 31 of 50 and 41 of 50, which it gave without intervals: 48-74 % and 69-90 %.
    assert wilson(31, 50)["low"] == pytest.approx(0.4815, abs=1e-4)
    assert wilson(31, 50)["high"] == pytest.approx(0.7414, abs=1e-4)
    assert wilson(41, 50)["low"] == pytest.approx(0.6920, abs=1e-4)
    assert wilson(41, 50)["high"] == pytest.approx(0.9023, abs=1e-4)
    assert wilson(0, 10)["low"] == 0
    assert wilson(10, 10)["high"] == pytest.approx(1)
    # The bounds are where the score test just rejects: |rate - p| = z sqrt(p (1 - p) / n).
    for right in (1, 7, 19):
        share = wilson(right, 20)
        for p in (share["low"], share["high"]):
            assert abs(right / 20 - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / 20))
