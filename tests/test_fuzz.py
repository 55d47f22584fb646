"""Some of the fault campaign's row 13, and that it would report what it is there to find."""

import dataclasses
import itertools
import json

import pytest
from jsonschema_rs import Draft202012Validator

from jaxgrpo.rewards.json_schema import SchemaReward
from scripts.inject import fuzz


def test_the_reward_and_another_validator_agree_or_it_is_known_why(tmp_path):
    outcome = fuzz.row_13(tmp_path, seed=0, count=250)
    assert (outcome.passed, outcome.tried) == (250 * 50, 250 * 50), "\n".join(outcome.notes)
    for verdict in (fuzz.VALID, fuzz.INVALID, fuzz.NOT_JSON):
        assert any(note.endswith(f" x {verdict}") for note in outcome.notes)


class WrongAboutSeven:
    """Another validator that is broken."""

    def __init__(self, schema):
        self.right = Draft202012Validator(schema, validate_formats=True)

    def is_valid(self, value):
        return self.right.is_valid(value) != (value == 7)


@pytest.mark.parametrize("schema", [{"type": "number"}, {"minimum": 3}])
def test_what_nothing_explains_is_told_with_schema_and_text(tmp_path, monkeypatch, schema):
    text = json.dumps(schema)
    numbers = itertools.count()
    fuzz.judges_of.cache_clear()
    monkeypatch.setattr(fuzz, "_other", WrongAboutSeven)
    monkeypatch.setattr(fuzz, "_judges_over", lambda *_: fuzz.Judges(text))
    monkeypatch.setattr(fuzz, "_completion", lambda *_: str(next(numbers)))
    outcome = fuzz.row_13(tmp_path, seed=0, count=10)
    fuzz.judges_of.cache_clear()
    assert (outcome.passed, outcome.tried) == (450, 500)
    assert "to the reward alone" in outcome.notes[0]
    assert text in outcome.notes[0]
    assert outcome.notes[0].endswith("the text 7")
    assert (tmp_path / "case_1.txt").read_text() == f"{text}\n\n'7'\n"


def test_what_takes_too_long_is_a_failure_but_where_time_doubles_with_depth(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "_LONGEST", 0.2)
    monkeypatch.setattr(fuzz, "SCHEMAS", 1)
    doubling = '{"allOf": [{"items": {"$ref": "#"}}], "unevaluatedItems": {"$ref": "#"}}'
    for schema, passed in ((doubling, 1), ('{"minimum": 3}', 0)):
        monkeypatch.setattr(fuzz, "_judges_over", lambda *_, schema=schema: fuzz.Judges(schema))
        monkeypatch.setattr(fuzz, "_completion", lambda *_: "[" * 100 + "]" * 100)
        if not passed:
            monkeypatch.setattr(fuzz, "compare", lambda *_: [0 for _ in itertools.repeat(0) if _])
        outcome = fuzz.row_13(tmp_path, seed=0, count=1)
        assert (outcome.passed, outcome.tried) == (passed, 1)
        assert ("doubling" if passed else "out of time") in outcome.notes[0]


@pytest.mark.parametrize(
    "broken",
    [
        lambda verdict: dataclasses.replace(verdict, score=0.8),
        lambda verdict: dataclasses.replace(verdict, score=0.25),
        lambda verdict: dataclasses.replace(verdict, reason="another", path=""),
        lambda verdict: None,
    ],
)
def test_verdicts_that_are_none_are_failures(monkeypatch, broken):
    judges, text = fuzz.Judges('{"minimum": 3}'), fuzz.Text("2")
    assert fuzz.compare(judges, text) == [fuzz.INVALID]
    judge = SchemaReward.judge
    for scale in ("ladder", "graded"):
        with monkeypatch.context() as patch:
            patch.setattr(
                SchemaReward,
                "judge",
                lambda self, text, scale=scale: (
                    broken(judge(self, text)) if self.scale == scale else judge(self, text)
                ),
            )
            with pytest.raises((AssertionError, AttributeError)):
                fuzz.compare(judges, text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[" * 129 + "]" * 129, "too deep"),
        ('{"a": 1, "\\u0061": 1}', "a key twice"),
        ("[1e400]", "number out of range"),
        ('["\\ud800"]', "half a character"),
    ],
)
def test_what_the_grammar_has_and_the_reward_does_not_is_known(text, name):
    judges = fuzz.Judges("true")
    assert fuzz.compare(judges, fuzz.Text(text)) == [fuzz.NOT_JSON, name]


# One string or number for each difference.
EXAMPLES = {
    "doubles inside": ("minimum", "1.0", "0.99999999999999999999"),
    "white space": ("pattern", r'"a\\sb"', '"a\u00a0b"'),
    "ends of lines": ("pattern", '"^.$"', r'"\r"'),
    "ends of words": ("pattern", r'"\\bb"', '"éb"'),
    "iri": ("format", '"iri"', '"a b"'),
    "email": ("format", '"email"', '"@"'),
    "uri-template": ("format", '"uri-template"', '"a b"'),
    "uri-template's operators": ("format", '"uri-template"', '"{@a}"'),
    "year 0": ("format", '"date"', '"0000-01-01"'),
    "leap second": ("format", '"time"', '"23:59:60Z"'),
    "hostname": ("format", '"hostname"', '"example.com."'),
    "idn-hostname": ("format", '"idn-hostname"', '"Bücher.de"'),
    "regex": ("format", '"regex"', '"(?P<year>2024)"'),
}


def test_each_difference_is_there():
    assert EXAMPLES.keys() == fuzz.DIFFERENCES.keys()
    for name, example in EXAMPLES.items():
        assert fuzz.difference(*example) == name
    judges, text = fuzz.Judges('{"maximum": 0.3}'), fuzz.Text("0.30000000000000001")
    assert fuzz.compare(judges, text) == [fuzz.INVALID, fuzz.DOUBLES]
    tree = '{"properties": {"a": {"allOf": [{"allOf": [{"allOf": [{"$ref": "#"}]}]}]}}}'
    judges, text = fuzz.Judges(tree), fuzz.Text('{"a":' * 127 + "{}" + "}" * 127)
    assert fuzz.compare(judges, text) == [fuzz.INVALID, fuzz.RECURSION]
