"""Hostile completions and schemas in a process with little memory, no files and no network.

The process is this file as a program: it judges all of `COMPLETIONS`, refuses all of `REFUSED` and
says what came of it. Were it to hang, its limit of processor time would end it.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo.rewards.json_schema import SchemaReward

MEMORY = 2**28  # bytes, for all that the process holds
PROCESSOR_TIME = 60  # seconds
# What Python tells its audit hooks: https://docs.python.org/3/library/audit_events.html
FORBIDDEN = ("open", "import", "socket.", "urllib.", "http.", "subprocess.", "os.", "ctypes.")
REMOTE = "http://127.0.0.1:9/schema.json"
FILE = Path(__file__).as_uri()


def doubled(times, schema):
    """A schema that refers to another one twice, that to another one twice, and so on."""
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(times)}
    return {"$ref": "#/$defs/d0", "$defs": chain | {f"d{times}": schema}}


ORDER = {
    "$id": REMOTE,
    "type": "object",
    "properties": {
        "vendor": {"type": "string"},
        "amount": {"type": "number", "multipleOf": 0.01},
        "rows": {"type": "array", "uniqueItems": True},
        "link": {"format": "uri", "contentSchema": {"$ref": "#"}},
    },
    "additionalProperties": {"$ref": "#"},
}
ROWS = [{"i": i, "j": [i, True, None]} for i in range(20_000)]
TIMES = doubled(10, {"type": "number"})
# The same value again and again; each time one more frame of Python's, at least.
LOOP = {"if": {"type": "object", "minProperties": 1}, "then": {"allOf": [{"$ref": "#"}]}}
TREE = {"type": "object", "additionalProperties": {"allOf": [{"$ref": "#"}]}}

# Schema, text, reason.
COMPLETIONS = {
    "brackets": (ORDER, "[" * 100_000, "too_deep"),
    "objects": (ORDER, '{"a":' * 100_000, "too_deep"),
    "closed brackets": (ORDER, "[" * 100_000 + "]" * 100_000, "too_deep"),
    "a long string": (ORDER, '{"vendor": "' + "v" * 10**7 + '"}', "valid"),
    "a long string that ends": (ORDER, '{"vendor": "' + "v" * 10**7, "truncated"),
    "a long key": (ORDER, '{"' + "k" * 10**7 + '": 1}', "type@/" + "k" * 98 + "…"),
    "an integer": (ORDER, '{"amount": ' + "9" * 10**6 + "}", "not_json"),
    "a number": (ORDER, '{"amount": 0.' + "9" * 10**6 + "}", "multipleOf@/amount"),
    "many zeros": (ORDER, '{"amount": 1.' + "0" * 10**6 + "}", "valid"),
    "NaN": (ORDER, '{"amount": NaN}', "not_json"),
    "Infinity": (ORDER, '{"amount": -Infinity}', "not_json"),
    "out of range": (ORDER, '{"amount": 1e400}', "not_json"),
    "far out of range": (ORDER, '{"amount": 1e' + "9" * 10**5 + "}", "not_json"),
    "next to nothing": (ORDER, '{"amount": 1e-999999999}', "multipleOf@/amount"),
    "keys twice": (ORDER, "{" + '"vendor": "a",' * 10**5 + '"vendor": "a"}', "duplicate_key"),
    "many keys": (ORDER, json.dumps({f"k{i}": {} for i in range(50_000)}), "valid"),
    "half a pair": (ORDER, '{"vendor": "\ud800"}', "not_json"),
    "half a pair, escaped": (ORDER, r'{"vendor": "\udc00\ud800"}', "not_json"),
    "BOM": (ORDER, '\ufeff{"vendor": ""}', "not_json"),
    "NUL": (ORDER, '{"vendor": "\0"}', "not_json"),
    "NUL, escaped": (ORDER, r'{"vendor": "\u0000"}', "valid"),
    "NUL, after": (ORDER, '{"vendor": ""}\0', "not_json"),
    "unlike rows": (ORDER, json.dumps({"rows": ROWS}), "valid"),
    "a row twice": (ORDER, json.dumps({"rows": [*ROWS, ROWS[7]]}), "uniqueItems@/rows"),
    "a thousand references, met": (TIMES, "1", "valid"),
    "a thousand references, not met": (TIMES, "[]", "type@"),
    "a reference without end": (LOOP, '{"loop": 1}', "too_deep"),
    "a reference for each level": (TREE, '{"a":' * 64 + "1" + "}" * 64, "type@" + "/a" * 49 + "/…"),
    "a link": (ORDER, json.dumps({"link": FILE}), "valid"),
    "a reference": (ORDER, json.dumps({"$ref": REMOTE, "$schema": FILE}), "type@/$ref"),
}
REFERENCES = [{name: ref} for name in ("$ref", "$dynamicRef") for ref in (REMOTE, FILE)]
# Schema, and what the error must name.
REFUSED = [
    *((reference, next(iter(reference.values()))) for reference in REFERENCES),
    *(
        (schema, part["$ref"])
        for part in ({"$ref": REMOTE}, {"$id": REMOTE, "$ref": "?other"})
        for schema in (
            *({name: part} for name in ("items", "contains", "unevaluatedItems", "not", "if")),
            *({name: part} for name in ("additionalProperties", "propertyNames", "then", "else")),
            *({name: part} for name in ("unevaluatedProperties", "contentSchema")),
            *({name: [True, part]} for name in ("allOf", "anyOf", "oneOf", "prefixItems")),
            *({name: {"a": part}} for name in ("properties", "patternProperties", "$defs")),
            {"dependentSchemas": {"a": part}},
        )
    ),
    ({"$schema": REMOTE}, REMOTE),
    ({"$defs": {"a": {"$schema": FILE}}}, FILE),
]


def judge_all():
    """What the process does: see above."""
    events = []

    def hook(event, arguments):
        if event.startswith(FORBIDDEN):
            events.append(f"{event} {arguments!r:.100}")
            raise PermissionError(event)

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_TIME, PROCESSOR_TIME))
    sys.addaudithook(hook)
    verdicts = {}
    for name, (schema, text, _) in COMPLETIONS.items():
        row = {"schema": schema}
        for scale in ("ladder", "graded"):
            verdict = SchemaReward({}, scale).judge(text, row)
            verdicts[f"{name}, {scale}"] = verdict.score, verdict.reason
    errors = []
    for schema, _ in REFUSED:
        try:
            SchemaReward(schema)
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append("none")
    sys.stdout.write(json.dumps({"verdicts": verdicts, "errors": errors, "events": events}))


@pytest.fixture(scope="module")
def judged():
    ended = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_hostile_completions_get_their_reason_and_score_in_little_memory(judged):
    for name, (_, _, reason) in COMPLETIONS.items():
        ladder, graded = (judged["verdicts"][f"{name}, {scale}"] for scale in ("ladder", "graded"))
        assert ladder[1] == graded[1] == reason, name
        if reason == "valid":
            assert ladder[0] == graded[0] == 1.0, name
        elif "@" in reason or name == "a reference without end":
            assert ladder[0] == 0.5, name
            assert 0.3 <= graded[0] < 0.8, name
        else:
            assert ladder[0] == graded[0] == 0.0, name


def test_schemas_that_lead_elsewhere_are_refused_by_name(judged):
    for (schema, named), error in zip(REFUSED, judged["errors"], strict=True):
        assert named in error, schema
        assert "\n" not in error


def test_nothing_is_opened_imported_or_started(judged):
    assert judged["events"] == []


if __name__ == "__main__":
    judge_all()
