"""The invoice schema, field accuracy, and rewards by name and by weight."""

import json
import math
import sys
from decimal import Decimal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.rewards.base import WeightedRewards, load_reward
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.fields import field_accuracy, fields_right, is_exact
from jaxgrpo.rewards.invoice import SCHEMA
from jaxgrpo.rewards.json_schema import SchemaReward

RIGHT = {"vendor": "ACME", "date": "2024-01-15", "amount": 12.5, "currency": None}


def test_the_invoice_schema_is_that_of_the_configuration():
    path = Path(__file__).parents[1] / "configs" / "invoices" / "schema.json"
    assert json.loads(path.read_text("utf-8")) == SCHEMA


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "valid"),
        ({"currency": "EUR"}, "valid"),
        ({"amount": -3}, "valid"),
        ({"vendor": ""}, "minLength@/vendor"),
        ({"vendor": None}, "type@/vendor"),
        ({"date": "01/15/2024"}, "format@/date"),
        ({"date": "Jan 15 2024"}, "format@/date"),
        ({"date": "2024-01-15T00:00:00Z"}, "format@/date"),
        ({"amount": "12.50"}, "type@/amount"),
        ({"amount": None}, "type@/amount"),
        ({"currency": "$"}, "pattern@/currency"),
        ({"currency": "eur"}, "pattern@/currency"),
        ({"currency": ""}, "pattern@/currency"),
        ({"currency_code": "EUR"}, "additionalProperties@/currency_code"),
    ],
)
def test_what_the_invoice_schema_asks_for(changes, reason):
    assert SchemaReward(SCHEMA).judge(json.dumps(RIGHT | changes)).reason == reason


@pytest.mark.parametrize("key", RIGHT)
def test_every_field_of_an_invoice_is_required(key):
    text = json.dumps({name: value for name, value in RIGHT.items() if name != key})
    assert SchemaReward(SCHEMA).judge(text).reason == f"required@/{key}"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (json.dumps(RIGHT), "vendor date amount currency"),
        (json.dumps(RIGHT | {"note": 1}), "vendor date amount currency"),
        ('{"currency": null, "amount": 12.50, "vendor": "ACME", "date": "2024-01-15"}', "all"),
        ('{"vendor": "ACME", "amount": 1.25e1}', "vendor amount"),
        ('{"vendor": "acme", "date": "15.01.2024", "amount": "12.5", "currency": ""}', ""),
        ('{"vendor": "ACME ", "amount": 12.500000000000000001, "currency": false}', ""),
        ('<think>\n\n</think>\n\n{"date": "2024-01-15"}', "date"),
        ("{}", ""),
        ("[]", ""),
        ("null", ""),
        ('"ACME"', ""),
        (f"```json\n{json.dumps(RIGHT)}\n```", ""),
        (f"Sure: {json.dumps(RIGHT)}", ""),
        (json.dumps(RIGHT)[:-1], ""),
        (json.dumps(RIGHT)[:-1] + ', "vendor": "ACME"}', ""),
    ],
)
def test_fields_that_are_right(text, right):
    names = set(RIGHT) if right == "all" else set(right.split())
    assert fields_right(text, RIGHT) == {name: name in names for name in RIGHT}
    assert field_accuracy(text, {"ground_truth": RIGHT}) == len(names) / 4


@pytest.mark.parametrize(
    ("truth", "text", "right"),
    [
        (1, "1.0", True),
        (1, "true", False),
        (True, "1", False),
        (True, "true", True),
        (False, "0", False),
        (None, "null", True),
        (12.5, "12.50", True),
        (12.5, '"12.5"', False),
        (0.1, "0.1", True),
        (19.99, "19.990", True),
        (Decimal("0.30"), "0.3", True),
        (10**20, "1e20", True),
        ([1, {"a": 2.0}], '[1.0, {"a": 2}]', True),
        ([1, 2], "[2, 1]", False),
        ({"a": 1, "b": 2}, '{"b": 2, "a": 1}', True),
        ({"a": 1}, '{"a": 1, "b": 2}', False),
        ("é", r'"\u00e9"', True),
    ],
)
def test_fields_are_compared_as_json(truth, text, right):
    completion = f'{{"field": {text}}}'
    assert fields_right(completion, {"field": truth}) == {"field": right}
    assert is_exact(completion, {"field": truth}) == right


def test_exact_means_nothing_missing_and_nothing_more():
    assert is_exact(json.dumps(RIGHT), RIGHT)
    assert is_exact("<think>\n</think>" + json.dumps(RIGHT, indent=2), RIGHT)
    assert not is_exact(json.dumps(RIGHT | {"note": None}), RIGHT)
    assert not is_exact(json.dumps(RIGHT | {"amount": 13}), RIGHT)
    assert not is_exact(json.dumps({"vendor": "ACME"}), RIGHT)
    assert not is_exact(json.dumps([RIGHT]), RIGHT)
    assert not is_exact(json.dumps(RIGHT)[:-1], RIGHT)
    assert is_exact("{}", {})


@pytest.mark.parametrize(
    ("truth", "text", "share"),
    [
        ([1, 2], "[1, 2]", 1),
        ([1, 2], "[1.0, 3]", 1 / 2),
        ([1, 2], "[2, 1]", 0),
        ([1, 2], "[1, 2, 2]", 2 / 3),
        ([1, 2], "[1]", 1 / 2),
        ([1, 2], '{"0": 1, "1": 2}', 0),
        ([], "[]", 1),
        ([], "[1]", 0),
        ([1], "[]", 0),
        ({}, "{}", 1),
        ({}, "[]", 0),
        ({"a": 1, "b": 2}, '{"b": 2, "a": 1}', 1),
        ({"a": 1, "b": 2}, '{"b": 2, "c": 1}', 1 / 3),
        ({"a": 1}, '{"a": true}', 0),
        ([{"a": 1, "b": [2, 3]}, {"a": 4}], '[{"a": 1, "b": [2, 4]}, {"a": 5}]', 3 / 8),
    ],
)
def test_a_nested_field_counts_by_its_parts(truth, text, share):
    row = {"ground_truth": {"field": truth, "other": 0}}
    assert field_accuracy(f'{{"field": {text}, "other": 0}}', row) == pytest.approx((share + 1) / 2)
    assert field_accuracy(f'{{"field": {text}, "more": 0}}', row) == pytest.approx(share / 2)


@pytest.mark.parametrize("row", [{}, {"ground_truth": None}, {"ground_truth": {}}, {"id": "7"}])
def test_field_accuracy_says_nothing_without_ground_truth(row):
    assert field_accuracy('{"total": 1}', row) == 0.0


def test_rewards_are_weighted_and_reported_each_by_itself():
    rewards = WeightedRewards(
        [
            ("length", lambda text, row: len(text), 0.5),
            ("row", lambda text, row: row["x"], -2.0),
            ("yes", lambda text, row: "a" in text, 1.0),
            ("unused", lambda text, row: 7, 0.0),
        ]
    )
    total, terms = rewards("abc", {"x": 0.25})
    assert total == 0.5 * 3 - 2.0 * 0.25 + 1.0
    assert terms == {"length": 3.0, "row": 0.25, "yes": 1.0, "unused": 7.0}
    assert all(type(value) is float for value in (total, *terms.values()))


@pytest.mark.parametrize(
    "value",
    [1, 1.0, True, np.float32(1), np.int64(1), np.bool_(True), jnp.float32(1), Decimal(1)],
    ids=lambda value: type(value).__name__,
)
def test_any_finite_number_is_a_reward(value):
    assert WeightedRewards([("r", lambda text, row: value, 2.0)])("", {}) == (2.0, {"r": 1.0})


@pytest.mark.parametrize(
    "value",
    [
        None,
        math.nan,
        math.inf,
        -math.inf,
        "1",
        b"1",
        1j,
        [1],
        {},
        np.nan,
        np.ones(2),
        10**400,
        "\n" * 9,
    ],
    ids=lambda value: str(value)[:9],
)
def test_what_is_no_finite_number_is_no_reward(value):
    rewards = WeightedRewards([("my_reward", lambda text, row: value, 1.0)])
    with pytest.raises(ValueError, match=r"^reward 'my_reward' returned .+ no finite number$"):
        rewards("", {})


def test_a_reward_by_file_and_by_module(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    source = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n\n"
        "@dataclass\n"
        "class Shortest:\n"
        "    limit: int\n\n"
        "    def __call__(self, completion: str, row: dict) -> float:\n"
        "        return float(len(completion) <= self.limit)\n\n\n"
        "short = Shortest(3)\n"
        "def always(completion, row): return 1.0\n"
    )
    (tmp_path / "rewards" / "my-short.py").write_text(source)
    assert load_reward("rewards/my-short.py:short", tmp_path)("abcd", {}) == 0.0
    absolute = tmp_path / "rewards" / "my-short.py"
    assert load_reward(f"{absolute}:short", "/elsewhere")("abc", {}) == 1.0

    (tmp_path / "a_module_of_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("a_module_of_rewards:always", "/elsewhere")("", {}) == 1.0
    assert load_reward("jaxgrpo.rewards.fields:field_accuracy", ".") is field_accuracy
    del sys.modules["a_module_of_rewards"]


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("", "mine.py", "neither module:attribute nor file.py:attribute"),
        ("", ":f", "neither"),
        ("", "mine.py:", "neither"),
        ("", "other.py:f", r"'other.py:f': there is no file .*other\.py"),
        ("", "no_such_module:f", "No module named 'no_such_module'$"),
        (
            "",
            "jaxgrpo.no_such:f",
            r"imported: ModuleNotFoundError: No module named 'jaxgrpo.no_such'",
        ),
        ("g = 1", "mine.py:f", r"'mine.py:f': there is no f in mine\.py"),
        ("f = 1", "mine.py:f", "is 1, not a function"),
        ("\n\ndef f(:", "mine.py:f", r"mine\.py:3: invalid syntax"),
        ("\nimport nothing_at_all\n", "mine.py:f", r"mine\.py:2: ModuleNotFoundError: No module"),
        ("def f():\n    return 1 / 0\n\nf()", "mine.py:f", r"mine\.py:2: ZeroDivisionError: div"),
        ("raise ValueError('two\\nlines')", "mine.py:f", r"mine\.py:1: ValueError: two lines$"),
        ("import sys\nsys.exit('no')", "mine.py:f", r"mine\.py:2: SystemExit: no$"),
    ],
)
def test_a_reward_that_cannot_be_had_says_why_in_one_line(tmp_path, source, spec, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=message) as error:
        load_reward(spec, tmp_path)
    assert "\n" not in str(error.value)
    assert spec in str(error.value)


def test_rewards_by_the_names_of_a_configuration(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completion, row): return row['x']\n")
    rewards = resolve_rewards(
        {"ladder": 1.0, "graded": 2.0, "fields": 4.0, "mine.py:f": 8.0}, SCHEMA, tmp_path
    )
    row = {"ground_truth": RIGHT, "x": 0.5}
    assert rewards(json.dumps(RIGHT), row)[1] == {
        "ladder": 1.0,
        "graded": 1.0,
        "fields": 1.0,
        "mine.py:f": 0.5,
    }
    total, terms = rewards(json.dumps(RIGHT | {"amount": "12.5"}), row)
    assert terms["ladder"] == 0.5
    assert terms["graded"] == pytest.approx(0.3 + 0.5 * 9 / 10)
    assert terms["fields"] == 0.75
    assert total == pytest.approx(0.5 + 2 * 0.75 + 4 * 0.75 + 8 * 0.5)


def test_names_that_are_none():
    with pytest.raises(ValueError, match="no reward 'grade'; there are ladder, graded, fields"):
        resolve_rewards({"grade": 1.0}, SCHEMA)
    with pytest.raises(ValueError, match="no JSON Schema"):
        resolve_rewards({"ladder": 1.0}, {"type": "sting"})
