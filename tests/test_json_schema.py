"""Schema rewards: what is valid, why the rest is not, how it is graded, and what is refused."""

import builtins
import io
import itertools
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from jaxgrpo.rewards.json_schema import SchemaReward, check_schema, load_schema
from jaxgrpo.types import Verdict

INVOICE = {
    "type": "object",
    "properties": {
        "vendor": {"type": "string", "minLength": 1},
        "date": {"type": "string", "format": "date"},
        "amount": {"type": "number"},
        "currency": {"type": ["string", "null"], "pattern": "^[A-Z]{3}$"},
    },
    "required": ["vendor", "date", "amount", "currency"],
    "additionalProperties": False,
}
RIGHT = {"vendor": "ACME", "date": "2024-01-15", "amount": 1043.75, "currency": "USD"}
TREE = {"type": "object", "properties": {"sub": {"$ref": "#"}}, "additionalProperties": False}

# Schema, then the texts that meet it, then those that do not, with the reason.
CASES = [
    (True, ["1", "{}", "null"], {}),
    (False, [], {"1": "false@", "{}": "false@"}),
    ({}, ["1", "[]", '"x"'], {}),
    ({"title": "no keyword", "default": 1, "unknown": {"type": "no type"}}, ["1", "{}"], {}),
    # Types.
    ({"type": "null"}, ["null"], {"0": "type@", "false": "type@", '""': "type@", "[]": "type@"}),
    ({"type": "boolean"}, ["true", "false"], {"0": "type@", "1": "type@", '"true"': "type@"}),
    ({"type": "string"}, ['""', '"1"'], {"1": "type@", "null": "type@", "[]": "type@"}),
    ({"type": "array"}, ["[]", "[1]"], {"{}": "type@", '""': "type@"}),
    ({"type": "object"}, ["{}"], {"[]": "type@", "null": "type@"}),
    (
        {"type": "number"},
        ["0", "-1.5", "1e300", "1e-999999999", "9" * 300],
        {'"1"': "type@", "true": "type@", "false": "type@", "null": "type@"},
    ),
    (
        {"type": "integer"},
        ["0", "-3", "1.0", "1e3", "1.20e1", "9" * 300, "0e-5", "-0.0"],
        {"1.5": "type@", "true": "type@", '"1"': "type@", "1e-999999999": "type@"},
    ),
    ({"type": ["string", "null"]}, ["null", '"x"'], {"1": "type@", "{}": "type@"}),
    ({"type": "integer"}, ["1." + "0" * 1000], {"1." + "0" * 1000 + "1": "type@"}),
    # Any type: const, enum.
    ({"const": 1}, ["1", "1.0", "10e-1"], {"2": "const@", "true": "const@", '"1"': "const@"}),
    ({"const": False}, ["false"], {"0": "const@", "null": "const@", "[]": "const@"}),
    ({"const": {"a": [1, None]}}, ['{"a": [1.0, null]}'], {'{"a": [true, null]}': "const@"}),
    ({"const": [False]}, ["[false]"], {"[0]": "const@", "[]": "const@"}),
    ({"const": 0.1}, ["0.1", "1e-1"], {"0.1000000000000000055511151231257827": "const@"}),
    ({"const": "é"}, ['"é"', r'"\u00e9"'], {r'"e\u0301"': "const@"}),
    ({"enum": ["USD", None, 3]}, ['"USD"', "null", "3.0"], {'"usd"': "enum@", "4": "enum@"}),
    ({"enum": [[0], {"a": 0}]}, ["[0]", '{"a": 0}'], {"[false]": "enum@", '{"a": false}': "enum@"}),
    # Numbers.
    (
        {"minimum": 1.1},
        ["1.1", "1.10", "2", '"0"'],
        {"1.0": "minimum@", "1.0999999999": "minimum@"},
    ),
    ({"maximum": 0.3}, ["0.3", "-1"], {"0.30000000000000001": "maximum@"}),
    (
        {"exclusiveMinimum": 0},
        ["1e-999999999"],
        {"0": "exclusiveMinimum@", "-0.0": "exclusiveMinimum@"},
    ),
    ({"exclusiveMaximum": 3}, ["2.9999999999999999999"], {"3.0": "exclusiveMaximum@"}),
    (
        {"multipleOf": 0.01},
        [
            "19.99",
            "0.01",
            "0",
            "-4.20",
            "1e300",
            "1.0e-2",
            "1043.75",
            "123456789012345678901.23",
            '"x"',
        ],
        {"19.999": "multipleOf@", "0.001": "multipleOf@", "1e-999999999": "multipleOf@"},
    ),
    ({"multipleOf": 2}, ["4", "4.0", "-2", "0", "1e5"], {"7": "multipleOf@", "4.5": "multipleOf@"}),
    ({"multipleOf": 1.5}, ["4.5", "3", "1.5e10"], {"4": "multipleOf@", "0.5": "multipleOf@"}),
    ({"multipleOf": 300}, ["900", "9e2", "3e100"], {"100": "multipleOf@", "1e100": "multipleOf@"}),
    ({"multipleOf": 1e-8}, ["12391239123", "0.00000001"], {"0.000000001": "multipleOf@"}),
    ({"type": "integer", "multipleOf": 0.123456789}, ["0"], {"1e300": "multipleOf@"}),
    # Strings; length in code points.
    (
        {"minLength": 2},
        ['"ab"', '"é😀"', "1"],
        {'"a"': "minLength@", '"😀"': "minLength@", '""': "minLength@"},
    ),
    ({"maxLength": 2}, ['"ab"', '"😀😀"', r'"\ud83d\ude00a"'], {'"abc"': "maxLength@"}),
    ({"maxLength": 2.0}, ['"ab"'], {'"abc"': "maxLength@"}),
    ({"pattern": "a+"}, ['"xaay"', "1"], {'"b"': "pattern@", '""': "pattern@"}),
    (
        {"pattern": "^[A-Z]{3}$"},
        ['"USD"'],
        {'"usd"': "pattern@", '"USDX"': "pattern@", r'"USD\n"': "pattern@", '"$"': "pattern@"},
    ),
    ({"pattern": r"^\d+$"}, ['"12"'], {'"\u0661\u0662"': "pattern@", r'"12\n"': "pattern@"}),
    ({"pattern": r"^\w$"}, ['"a"', '"_"'], {'"é"': "pattern@"}),
    ({"pattern": r"^[$]\$$"}, ['"$$"'], {'"$"': "pattern@"}),
    ({"pattern": "^.$"}, ['"é"', '"😀"'], {r'"\n"': "pattern@", '"ab"': "pattern@"}),
    # Arrays.
    ({"items": {"type": "integer"}}, ["[]", "[1, 2.0]", "{}"], {'[1, "2"]': "type@/1"}),
    ({"items": False}, ["[]", "1"], {"[1]": "items@"}),
    (
        {"prefixItems": [{"type": "string"}, {"type": "null"}]},
        ["[]", '["a"]', '["a", null, 3]'],
        {"[1]": "type@/0", '["a", 1]': "type@/1"},
    ),
    ({"prefixItems": [True, False]}, ["[1]"], {"[1, 2]": "false@"}),
    (
        {"prefixItems": [{"type": "string"}], "items": {"type": "number"}},
        ['["a", 1, 2]', '["a"]'],
        {'["a", 1, "b"]': "type@/2", "[1]": "type@/0"},
    ),
    ({"prefixItems": [{}], "items": False}, ["[1]", "[]"], {"[1, 2]": "items@"}),
    ({"minItems": 1}, ["[1]", '""'], {"[]": "minItems@"}),
    ({"maxItems": 1}, ["[1]", "[]"], {"[1, 2]": "maxItems@"}),
    (
        {"uniqueItems": True},
        [
            "[1, 2]",
            "[1, true]",
            "[0, false]",
            "[[1], [true]]",
            '[{"a": 1}, {"a": true}]',
            '["1", 1]',
            "[]",
        ],
        {
            "[1, 1.0]": "uniqueItems@",
            "[0, -0.0]": "uniqueItems@",
            "[[1], [true], [1]]": "uniqueItems@",
            '[{"a": 1, "b": 2}, {"b": 2.0, "a": 1}]': "uniqueItems@",
            "[null, null]": "uniqueItems@",
            "[[[]], [[]]]": "uniqueItems@",
        },
    ),
    ({"uniqueItems": False}, ["[1, 1]"], {}),
    ({"contains": {"type": "string"}}, ['[1, "a"]'], {"[1]": "contains@", "[]": "contains@"}),
    ({"contains": {"const": 1}, "minContains": 2}, ["[1, 1.0]"], {"[1]": "minContains@"}),
    ({"contains": {"const": 1}, "minContains": 0}, ["[]", "[2]"], {}),
    ({"contains": {"const": 1}, "maxContains": 1}, ["[1, 2]"], {"[1, 1]": "maxContains@"}),
    # Objects.
    (
        {"properties": {"a": {"type": "null"}}},
        ["{}", '{"a": null, "b": 1}', "[]"],
        {'{"a": 1}': "type@/a"},
    ),
    ({"properties": {"a": False}}, ["{}"], {'{"a": 1}': "false@"}),
    (
        {"required": ["a", "b"]},
        ['{"a": 1, "b": null}', "[]"],
        {'{"b": 1}': "required@/a", '{"a": 1}': "required@/b"},
    ),
    (
        {"required": ["__proto__", "a/b", "~"]},
        ['{"__proto__": 1, "a/b": 1, "~": 1}'],
        {
            '{"__proto__": 1, "~": 1}': "required@/a~1b",
            '{"__proto__": 1, "a/b": 1}': "required@/~0",
        },
    ),
    ({"minProperties": 1}, ['{"a": 1}'], {"{}": "minProperties@"}),
    ({"maxProperties": 1}, ['{"a": 1}'], {'{"a": 1, "b": 1}': "maxProperties@"}),
    (
        {"patternProperties": {"^n_": {"type": "number"}}},
        ['{"n_a": 1, "b": "x"}'],
        {'{"n_a": "x"}': "type@/n_a"},
    ),
    ({"patternProperties": {"a$": False}}, ['{"b": 1}', r'{"a\n": 1}'], {'{"ba": 1}': "false@"}),
    (
        {"additionalProperties": False},
        ["{}", "[1]"],
        {'{"b": 1, "a": 2}': "additionalProperties@/b"},
    ),
    (
        {"properties": {"a": {}}, "additionalProperties": {"type": "number"}},
        ['{"a": "x", "b": 1}'],
        {'{"b": "x"}': "type@/b"},
    ),
    (
        {"patternProperties": {"^x-": {}}, "additionalProperties": False},
        ['{"x-a": 1}'],
        {'{"a": 1}': "additionalProperties@/a", r'{"a\nx-": 1}': "additionalProperties@/a\ufffdx-"},
    ),
    ({"propertyNames": {"maxLength": 1}}, ['{"a": 1}'], {'{"ab": 1}': "maxLength@"}),
    ({"propertyNames": False}, ["{}"], {'{"a": 1}': "false@"}),
    (
        {"dependentRequired": {"a": ["b"]}},
        ["{}", '{"b": 1}', '{"a": 1, "b": 1}'],
        {'{"a": 1}': "dependentRequired@"},
    ),
    (
        {"dependentSchemas": {"a": {"minProperties": 2}}},
        ['{"a": 1, "b": 1}'],
        {'{"a": 1}': "minProperties@"},
    ),
    # Combinations.
    ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, ["2"], {"0": "minimum@", "4": "maximum@"}),
    ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, ['"a"', "3"], {"2": "anyOf@"}),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, ["2", "9"], {"6": "oneOf@", "5": "oneOf@"}),
    ({"not": {"type": "null"}}, ["1"], {"null": "not@"}),
    (
        {"if": {"minimum": 10}, "then": {"multipleOf": 10}, "else": {"maximum": 5}},
        ["20", "5"],
        {"15": "multipleOf@", "7": "maximum@"},
    ),
    ({"if": False, "then": False}, ["1"], {}),
    ({"then": False, "else": False}, ["1"], {}),
    # What nothing else speaks of.
    (
        {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False},
        ['{"a": 1}', "[]"],
        {'{"a": 1, "b": 1}': "unevaluatedProperties@"},
    ),
    (
        {
            "anyOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {}}},
            ],
            "unevaluatedProperties": False,
        },
        ['{"a": 1, "b": 2}', '{"b": 2}'],
        {'{"a": 2}': "unevaluatedProperties@"},
    ),
    (
        {"patternProperties": {r"^\w$": {}, "bc$": {}}, "unevaluatedProperties": False},
        ['{"a": 1, "abc": 1}'],
        {'{"é": 1}': "unevaluatedProperties@", r'{"bc\n": 1}': "unevaluatedProperties@"},
    ),
    (
        {
            "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
            "then": {"properties": {"b": {}}},
            "else": {"dependentSchemas": {"c": {"properties": {"c": {}}}}},
            "unevaluatedProperties": {"type": "null"},
        },
        ['{"a": 1, "b": 2}', '{"c": 1}', '{"a": null, "b": null}', "{}"],
        {'{"a": 1, "c": 1}': "unevaluatedProperties@", '{"b": 1}': "unevaluatedProperties@"},
    ),
    (
        {
            "allOf": [{"unevaluatedProperties": True}, {"$ref": "#/$defs/a"}],
            "unevaluatedProperties": False,
            "$defs": {"a": {"additionalProperties": {"type": "number"}}},
        },
        ['{"a": 1}'],
        {'{"a": ""}': "type@/a"},
    ),
    ({"prefixItems": [{}], "unevaluatedItems": False}, ["[1]"], {"[1, 2]": "unevaluatedItems@"}),
    ({"unevaluatedItems": {"type": "null"}}, ["[null]"], {"[1]": "unevaluatedItems@"}),
    # References.
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, ["null"], {"1": "type@"}),
    ({"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": {"type": "null"}}}, ["null"], {"1": "type@"}),
    (
        {"$ref": "#n", "$defs": {"a": {"$anchor": "n", "minimum": 2}}, "maximum": 3},
        ["2"],
        {"1": "minimum@", "4": "maximum@"},
    ),
    (
        TREE,
        ['{"sub": {"sub": {}}}'],
        {
            '{"sub": {"sub": {"x": 1}}}': "additionalProperties@/sub/sub/x",
            '{"sub": 1}': "type@/sub",
        },
    ),
    (
        {
            "$id": "https://example.com/a",
            "$ref": "b",
            "$defs": {
                "b": {"$id": "b", "$ref": "#x", "$defs": {"x": {"$anchor": "x", "type": "null"}}}
            },
        },
        ["null"],
        {"1": "type@"},
    ),
    (
        {
            "$id": "https://example.com/t",
            "properties": {"n": {"$ref": "https://example.com/t"}},
            "required": ["m"],
        },
        ['{"m": 1}'],
        {'{"m": 1, "n": {}}': "required@/n/m"},
    ),
    (
        {
            "$id": "https://example.com/strings",
            "$ref": "list",
            "$defs": {
                "s": {"$dynamicAnchor": "item", "type": "string"},
                "list": {
                    "$id": "list",
                    "type": "array",
                    "items": {"$dynamicRef": "#item"},
                    "$defs": {"i": {"$dynamicAnchor": "item"}},
                },
            },
        },
        ['["a"]'],
        {"[1]": "type@/0"},
    ),
    (
        {"properties": {"$ref": {"type": "string"}}},
        ['{"$ref": "a"}'],
        {'{"$ref": 1}': "type@/$ref"},
    ),
    (
        {"enum": [{"$ref": "https://example.com"}]},
        ['{"$ref": "https://example.com"}'],
        {"1": "enum@"},
    ),
    (
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        ['{"minLength": 1.0}', "true"],
        {'{"minLength": -1}': "minimum@/minLength"},
    ),
    ({"definitions": {"a": {"type": "null"}}, "$ref": "#/definitions/a"}, ["null"], {"1": "type@"}),
    (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {"a": {"$ref": "#"}},
            "maxProperties": 1.0,
        },
        ['{"a": {}}'],
        {'{"a": {"b": 1, "c": 1}}': "maxProperties@/a"},
    ),
]

# Strings that are of a format, and strings that are not.
FORMATS = {
    "date": (
        ["2024-02-29", "0001-01-01"],
        ["2023-02-29", "2024-2-9", "20240229", "29/02/2024", "2024-02-29\n", "2024-02-2\u0669", ""],
    ),
    "date-time": (
        ["2024-01-15T10:00:00Z", "2024-01-15t10:00:00.5+01:00"],
        ["2024-01-15", "2024-01-15T10:00:00", "2024-01-15T25:00:00Z", "2024-01-15T10:00:00Z\n"],
    ),
    "time": (["10:00:00Z", "10:00:00.25-08:00"], ["10:00", "10:00:00", "24:00:00Z"]),
    "duration": (
        ["P1DT2H", "P3W", "P1Y2M3DT4H5M6S", "PT36H", "P1M", "PT5M"],
        ["1 day", "PT1D", "P", "P1DT", "P1Y1D", "P1DT+2H", "PT0.5S", "-PT1H", "P\u0661D", "P1W1D"],
    ),
    "email": (["a@example.com"], ["a.example.com", ""]),
    "uri": (["https://example.com/a?b#c", "urn:a:b"], ["/a", "a b", "https://example.com\n"]),
    "uri-reference": (["/a", "#b"], ["\\\\a"]),
    "uri-template": (["https://example.com/{a}"], ["https://example.com/{a"]),
    "uuid": (
        ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"],
        ["2eb8aa08aa9811eab4aa73b441d16380", "x", "2eb_aa08-aa98-11ea-b4aa-73b441d16380"],
    ),
    "ipv4": (["192.168.0.1"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (["::1", "2001:db8::ff00:42:8329"], [":::1", "1.2.3.4"]),
    "hostname": (["example.com", "1.a"], ["-a.com", "a b", "", "\u0661.com"]),
    "idn-hostname": (["b\u00fccher.de"], ["-a.de"]),
    "json-pointer": (["/a/0", "", "/a\n"], ["a", "/~2"]),
    "relative-json-pointer": (
        ["1/a", "0#", "0", "100", "0/\u00e9\n"],
        ["/a", "\u00b21", "\u00b2#", "01", "1#a", "1/~2", ""],
    ),
    "regex": (["a+", "a\n", "[[a]"], ["(", "a{99999999999999999999}"]),
    "iban": (["of no format that is known", ""], []),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_checked_of_strings_alone(name):
    reward = SchemaReward({"format": name})
    right, wrong = FORMATS[name]
    for text in right:
        assert reward.judge(json.dumps(text)) == Verdict(1.0, "valid")
    for text in wrong:
        assert reward.judge(json.dumps(text)) == Verdict(0.5, "format@")
    for text in ("1", "null", "[]"):
        assert reward(text) == 1.0


@pytest.mark.parametrize(
    ("schema", "text", "reason"),
    [
        (schema, text, reason)
        for schema, valid, invalid in CASES
        for text, reason in [*((text, "valid") for text in valid), *invalid.items()]
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_verdicts(schema, text, reason):
    verdict = SchemaReward(schema).judge(text)
    path = reason.partition("@")[2]
    assert verdict == Verdict(1.0 if reason == "valid" else 0.5, reason, path)
    graded = SchemaReward(schema, "graded")(text)
    assert graded == 1.0 if reason == "valid" else 0.3 <= graded < 0.8


def test_there_are_enough_cases():
    assert sum(len(valid) + len(invalid) for _, valid, invalid in CASES) > 200


def test_ladder_and_reasons_of_an_invoice():
    reward = SchemaReward(INVOICE)

    def judge(**changes):
        return reward.judge(json.dumps(RIGHT | changes))

    assert judge() == Verdict(1.0, "valid")
    assert judge(currency=None) == Verdict(1.0, "valid")
    assert judge(amount="1043.75") == Verdict(0.5, "type@/amount", "/amount")
    assert judge(date="15/01/2024") == Verdict(0.5, "format@/date", "/date")
    assert judge(currency="$") == Verdict(0.5, "pattern@/currency", "/currency")
    assert judge(currency_code="USD").reason == "additionalProperties@/currency_code"
    assert reward.judge('{"vendor": "ACME"}').reason == "required@/date"
    assert reward.judge("[]").reason == "type@"
    right = json.dumps(RIGHT)
    assert reward.judge(f"```json\n{right}\n```") == Verdict(0.0, "fenced")
    assert reward.judge(f"Sure: {right}") == Verdict(0.0, "prose")
    assert reward.judge(right[:-1]) == Verdict(0.0, "truncated")
    assert reward.judge(f"<think>\n{right}") == Verdict(0.0, "thinking_unfinished")
    assert reward.judge(f"<think>\n\n</think>\n\n{right}") == Verdict(1.0, "valid")
    assert reward.judge(right[:-1] + ', "vendor": "B"}') == Verdict(0.0, "duplicate_key")
    assert reward.judge("") == Verdict(0.0, "not_json")
    assert reward(right) == 1.0
    assert reward(right, {"messages": []}) == 1.0


def test_of_several_failures_the_first_in_the_order_of_the_schema_is_the_reason():
    text = '{"z": 1, "amount": "1", "vendor": 2}'
    for order in itertools.permutations(("properties", "required", "additionalProperties")):
        reward = SchemaReward({"type": "object"} | {keyword: INVOICE[keyword] for keyword in order})
        first = {
            "properties": "type@/vendor",
            "required": "required@/date",
            "additionalProperties": "additionalProperties@/z",
        }[order[0]]
        assert reward.judge(text).reason == first


@given(st.permutations("abcdefghijkl"))
def test_of_several_keys_the_first_in_the_order_of_the_text_is_the_reason(keys):
    text = json.dumps(dict.fromkeys(keys, 1))
    for schema in (False, {"type": "null"}):
        verdict = SchemaReward({"additionalProperties": schema}).judge(text)
        assert verdict.path == f"/{keys[0]}"


def test_pointers_of_the_models_own_keys_are_printable_and_short():
    reward = SchemaReward({"additionalProperties": False})
    for key in ("k" * 10**6, "\x1b[31m\u202e\x00\n", "/" * 200, "[red]é"):
        verdict = reward.judge(json.dumps({key: 1}))
        assert verdict.reason == "additionalProperties@" + verdict.path
        assert len(verdict.path) <= 100
        assert verdict.path.isprintable()
    assert reward.judge('{"[red]é": 1}').path == "/[red]é"


GRADED = [
    # Ten assertions of an invoice: its type, four keys there, four values, nothing additional.
    (INVOICE, json.dumps(RIGHT), 1),
    (INVOICE, json.dumps(RIGHT | {"amount": "1043.75"}), 9 / 10),
    (INVOICE, json.dumps(RIGHT | {"date": "15/01/2024"}), 9.5 / 10),
    (INVOICE, json.dumps(RIGHT | {"vendor": ""}), 9.5 / 10),
    (INVOICE, json.dumps(RIGHT | {"note": 1}), 9.5 / 10),
    (INVOICE, json.dumps(RIGHT | {"note": 1, "more": 2}), (9 + 1 / 3) / 10),
    (INVOICE, json.dumps({key: RIGHT[key] for key in ("vendor", "date", "amount")}), 8 / 10),
    (INVOICE, '{"vendor": 1, "date": 1, "amount": "", "currency": 1}', 6 / 10),
    (INVOICE, "{}", 2 / 10),
    (INVOICE, json.dumps({"invoice": RIGHT}), 1.5 / 10),
    (INVOICE, json.dumps([RIGHT]), 0),
    (INVOICE, '"an invoice"', 0),
    # Items: the mean of their shares.
    ({"items": {"type": "number"}}, '[1, "2", "3", 4]', 1 / 2),
    ({"type": "array", "items": {"type": "number"}}, '[1, "2", "3", 4]', 3 / 4),
    ({"type": "array", "items": {"type": "number"}, "minItems": 2}, '["a", "b"]', 2 / 3),
    ({"type": "array", "items": {"type": "number"}, "minItems": 2}, "[1]", (1 + 1 / 2 + 0) / 3),
    ({"type": "array", "items": {"type": "number"}, "minItems": 2}, "[]", 1 / 3),
    ({"items": {}, "minItems": 10**9}, "[]", 0),
    ({"prefixItems": [{"type": "null"}, {"type": "null"}]}, "[1]", 1 / 2),
    ({"prefixItems": [{}, {}], "minItems": 2}, "[1]", 1 / 3),
    ({"prefixItems": [{}], "items": {"type": "null"}}, "[1, 2, null]", (1 + 1 / 2) / 2),
    # Nested objects count as much as their place.
    (
        {"properties": {"a": {"properties": {"b": {"type": "null"}}, "required": ["b", "c"]}}},
        '{"a": {"b": 1}}',
        (0 + 1 + 0) / 3,
    ),
    ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}}}, '{"a": 1}', 1 / 2),
    ({"additionalProperties": {"type": "null"}}, '{"a": 1, "b": null, "c": null}', 2 / 3),
    # Combinations.
    ({"allOf": [{"minimum": 3}, {"maximum": 5}, {"multipleOf": 2}]}, "7", 1 / 3),
    ({"anyOf": [{"type": "null"}, {"minimum": 3, "multipleOf": 2}]}, "1", 0),
    ({"anyOf": [{"type": "null"}, {"minimum": 3, "multipleOf": 2}]}, "2", 1 / 2),
    ({"oneOf": [{"minimum": 1}, {"minimum": 2}]}, "3", 0),
    ({"oneOf": [{"minimum": 1, "multipleOf": 3}, {"minimum": 9}]}, "2", 1 / 2),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"minimum": 3, "multipleOf": 2}}}, "2", 1 / 2),
    ({"not": {"const": 1}, "minimum": 0}, "1", 1 / 2),
    ({"if": {"minimum": 1}, "then": {"multipleOf": 3, "maximum": 1}}, "2", 0),
    ({"contains": {"type": "null"}, "maxItems": 3}, "[1, 2]", 1 / 2),
    ({"propertyNames": {"maxLength": 1}, "minProperties": 1}, '{"ab": 1}', 1 / 2),
    (False, "1", 0),
    (TREE, '{"sub": {"sub": 1}}', (1 + (1 + 0 + 1) / 3 + 1) / 3),
]


@pytest.mark.parametrize(("schema", "text", "share"), GRADED)
def test_grades_are_what_one_counts_by_hand(schema, text, share):
    expected = 1.0 if share == 1 else 0.3 + 0.5 * share
    assert SchemaReward(schema, "graded")(text) == pytest.approx(expected, abs=1e-12)


def test_what_does_not_parse_earns_nothing_on_either_scale():
    for scale in ("ladder", "graded"):
        reward = SchemaReward(INVOICE, scale)
        assert reward.scale == scale
        for text in ("", "{", "```json\n{}\n```", "Sure: {}", '{"a": NaN}'):
            assert reward(text) == 0.0
    with pytest.raises(ValueError, match="'graded'"):
        SchemaReward(INVOICE, "grades")


LEAVES = st.sampled_from(
    [
        {"type": "string", "minLength": 2},
        {"type": "integer", "minimum": 0},
        {"type": ["number", "null"], "multipleOf": 2},
        {"enum": ["a", 1]},
        {"const": [1]},
        {"type": "boolean"},
        {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^a"}]},
        True,
    ]
)
KEYS = ("a", "b", "c")


@st.composite
def objects(draw, schemas):
    """An object schema over the keys a, b, c."""
    properties = draw(st.dictionaries(st.sampled_from(KEYS), schemas, min_size=1))
    required = draw(st.sets(st.sampled_from(sorted(properties)))) if properties else set()
    schema = {"type": "object", "properties": properties, "required": sorted(required)}
    return schema | draw(st.sampled_from([{}, {"additionalProperties": False}]))


SCHEMAS = st.recursive(
    LEAVES,
    lambda schemas: (
        objects(schemas)
        | schemas.map(lambda items: {"type": "array", "items": items, "minItems": 1})
        | st.lists(schemas, min_size=1, max_size=2).map(lambda parts: {"allOf": parts})
        | st.lists(schemas, min_size=1, max_size=2).map(lambda parts: {"oneOf": parts})
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 2, -1, "", "a", "ab", [1]]),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from((*KEYS, "z")), values)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(SCHEMAS, VALUES)
def test_agrees_with_the_plain_validator_where_that_is_exact(schema, value):
    """jsonschema's own keywords are right about integers and texts of one line."""
    text = json.dumps(value)
    valid = Draft202012Validator(schema).is_valid(value)
    assert SchemaReward(schema)(text) == (1.0 if valid else 0.5)
    graded = SchemaReward(schema, "graded")(text)
    assert graded == 1.0 if valid else 0.3 <= graded < 0.8


@settings(max_examples=150, deadline=None)
@given(objects(SCHEMAS), st.dictionaries(st.sampled_from(KEYS), VALUES), st.data())
def test_leaving_a_required_key_out_never_earns_more_than_giving_it_wrongly(schema, value, data):
    key = data.draw(st.sampled_from(sorted(schema["properties"])))
    schema["required"] = sorted({*schema["required"], key})
    value.setdefault(key, data.draw(VALUES))
    without = {name: value[name] for name in value if name != key}
    reward = SchemaReward(schema, "graded")
    assert reward(json.dumps(without)) < reward(json.dumps(value))
    if "additionalProperties" in schema:
        assert reward(json.dumps(value | {"z": 1})) < reward(json.dumps(value))


@settings(deadline=None)
@given(st.sampled_from(sorted(RIGHT)), st.dictionaries(st.sampled_from(sorted(RIGHT)), VALUES))
def test_a_value_of_the_wrong_type_never_earns_as_much_as_a_right_one(key, wrong):
    reward = SchemaReward(INVOICE, "graded")
    others = RIGHT | wrong
    right, bad = (json.dumps(others | {key: value}) for value in (RIGHT[key], [RIGHT[key]]))
    assert reward(bad) < reward(right)


def test_more_right_items_do_not_make_up_for_a_missing_key():
    schema = {
        "type": "object",
        "properties": {"rows": {"type": "array", "items": {"type": "number"}}},
        "required": ["rows", "total"],
    }
    reward = SchemaReward(schema, "graded")
    assert reward('{"rows": [1]}') == reward(json.dumps({"rows": [1] * 500})) < 0.8


def test_a_rows_own_schema_replaces_the_rewards():
    reward = SchemaReward(INVOICE)
    row = {"schema": {"type": "array", "items": {"maximum": 1.1}}, "ground_truth": {}}
    assert reward.judge("[1.1]", row) == Verdict(1.0, "valid")
    assert reward.judge(json.dumps(RIGHT), row).reason == "type@"
    # Each is its own, however much they look alike; many do not pile up.
    for number in (*range(600), 1):
        assert reward(f"{number}", {"schema": {"const": number}}) == 1.0
    for constant, text in ((1, "1"), (True, "true"), ("1", '"1"'), (Decimal("1.0"), "1.0")):
        assert reward(text, {"schema": {"const": constant}}) == 1.0
    assert reward("1", {"schema": {"const": "1"}}) == 0.5
    with pytest.raises(ValueError, match="no JSON Schema"):
        reward("{}", {"schema": {"type": "sting"}})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/schema.json"}, "'https://example.com/schema.json'"),
        ({"$ref": "http://127.0.0.1:9/x"}, "nothing is read from the network or from files"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "'file:///etc/passwd'"),
        ({"items": {"$ref": "other.json#/$defs/a"}}, r"'other.json#/\$defs/a'"),
        ({"$id": "https://example.com/a", "$ref": "b"}, "'b'"),
        ({"$ref": "#/$defs/missing"}, r"\$ref '#/\$defs/missing'"),
        ({"anyOf": [{"not": {"$ref": "#missing"}}]}, "#missing"),
        ({"$dynamicRef": "#missing"}, r"\$dynamicRef '#missing'"),
        ({"$ref": "#/allOf/7", "allOf": [True]}, "#/allOf/7"),
        ({"$ref": "http://[::1"}, "http://"),
        ({"$defs": {"a": {"if": {"$ref": "urn:example:x"}}}}, "urn:example:x"),
        ({"$ref": "#/minLength", "minLength": 3}, "3 is not of type 'object', 'boolean'"),
        ({"$ref": "#/x", "x": {"type": "sting"}}, "'sting'"),
        ({"$ref": "#"}, "in a circle"),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#"}]}}}, "circle"),
        ({"type": "sting"}, r"'sting' .*\(at /type\)"),
        ({"properties": {"a": {"minLength": 1.5}}}, r"1.5 is not of type 'integer'"),
        ({"multipleOf": 0}, "at /multipleOf"),
        ({"required": "vendor"}, "at /required"),
        ({"required": ["a", "a"]}, "at /required"),
        ({"pattern": "("}, "at /pattern"),
        ({"patternProperties": {"[": {}}}, "at /patternProperties"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "draft-07.*only .*2020-12"),
        ({"$defs": {"a": {"$schema": "http://example.com/my"}}}, "example.com/my"),
        ({"const": float("nan")}, "not JSON: a number out of range: nan"),
        ({1: {}}, "not JSON"),
        ({"enum": [(1, 2)]}, "not JSON"),
        ([], "at its root"),
        ("{}", "at its root"),
        (None, "at its root"),
    ],
)
def test_what_is_no_schema_of_its_own_is_refused_in_one_line(schema, message, monkeypatch):
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ValueError, match=message):
        SchemaReward(schema)
    with pytest.raises(ValueError, match=r"^data\.jsonl:7: .*" + message) as error:
        check_schema(schema, "data.jsonl:7")
    assert "\n" not in str(error.value)


def test_a_schema_nested_too_deeply_is_refused():
    for levels in (127, 600):
        schema = {}
        for _ in range(levels):
            schema = {"items": schema}
        with pytest.raises(ValueError, match="nested"):
            SchemaReward(schema)
    SchemaReward({"items": {"items": {"items": {"items": {"items": {"items": {}}}}}}})


def test_load_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"multipleOf": 0.01, "title": "é"}', "utf-8")
    schema = load_schema(path)
    assert schema == {"multipleOf": Decimal("0.01"), "title": "é"}
    assert SchemaReward(schema)("19.99") == 1.0
    for text, message in [
        ('{"type": "object",}', r"schema\.json: not JSON: .* line 1 column 19"),
        ('{"type": "object", "type": "array"}', r"schema\.json: not JSON: the key 'type' twice"),
        ('{"type": "sting"}', r"schema\.json: no JSON Schema: 'sting'"),
        ('{"$ref": "https://example.com"}', r"schema\.json: the \$ref 'https://example.com'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_schema(path)
    path.write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"schema\.json: not JSON"):
        load_schema(path)
    with pytest.raises(ValueError, match=r"cannot read schema file .*missing\.json: No such file"):
        load_schema(tmp_path / "missing.json")


def refuse(*args, **kwargs):
    raise AssertionError("neither files nor sockets")


EVERY_FORMAT = {
    "properties": {name: {"format": name} for name in Draft202012Validator.FORMAT_CHECKER.checkers},
    "additionalProperties": False,
}


def test_judging_opens_no_file_and_no_socket(monkeypatch):
    rewards = [SchemaReward(schema, "graded") for schema in (INVOICE, TREE, EVERY_FORMAT)]
    for owner, name in ((socket, "socket"), (builtins, "open"), (io, "open")):
        monkeypatch.setattr(owner, name, refuse)
    texts = [json.dumps(RIGHT), '{"sub": {"sub": {}}}', '{"$ref": "https://example.com"}', "{"]
    texts += [
        json.dumps(dict.fromkeys(EVERY_FORMAT["properties"], value))
        for value in ("2024-01-15", "http://127.0.0.1:9/x", "file:///etc/passwd", "a@b", "ü.de", "")
    ]
    own = {"schema": {"$id": "https://example.com/own", "$ref": "#/$defs/a", "$defs": {"a": {}}}}
    for reward in rewards:
        for text in texts:
            assert reward.judge(text).reason != ""
            assert reward(text, own) in (0.0, 1.0)


HOSTILE = {
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 100_000 + "]" * 100_000,
    "nested as deep as is allowed": '{"sub":' * 127 + "{}" + "}" * 127,
    "nested and wrong": '{"sub":' * 127 + "1" + "}" * 127,
    "nested too deep": '{"sub":' * 500 + "{}" + "}" * 500,
    "long string": json.dumps(RIGHT | {"vendor": "v" * 10**7}),
    "long string of a format": json.dumps(RIGHT | {"date": "2" * 10**7}),
    "long key": json.dumps(RIGHT | {"k" * 10**7: 1}),
    "many keys": json.dumps(RIGHT | {f"k{i}": 1 for i in range(20_000)}),
    "many items": json.dumps(RIGHT | {"vendor": [{"a": [1]}] * 20_000}),
    "digits": json.dumps(RIGHT)[:-1] + ', "amount_": ' + "9" * 10**6 + "}",
    "decimals": json.dumps(RIGHT).replace("1043.75", "0." + "3" * 10**6),
    "tiny": json.dumps(RIGHT).replace("1043.75", "1e-999999999"),
    "huge": json.dumps(RIGHT).replace("1043.75", "1e999999999"),
    "NaN": json.dumps(RIGHT).replace("1043.75", "NaN"),
    "surrogate": json.dumps(RIGHT).replace("ACME", "\\ud800"),
    "raw surrogate": json.dumps(RIGHT).replace("ACME", "\ud800"),
    "NUL": json.dumps(RIGHT).replace("ACME", "\0"),
    "BOM": "\ufeff" + json.dumps(RIGHT),
    "formats": json.dumps(dict.fromkeys(EVERY_FORMAT["properties"], "http://a/" + "a" * 10**6)),
    "format errors": json.dumps(dict.fromkeys(EVERY_FORMAT["properties"], "\u00b21")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_get_a_verdict_soon(name):
    schemas = [
        INVOICE,
        TREE,
        EVERY_FORMAT,
        {"additionalProperties": {"multipleOf": 0.01, "uniqueItems": True}, "maxProperties": 9},
        {"enum": [RIGHT, [RIGHT]]},
    ]
    for schema, scale in itertools.product(schemas, ("ladder", "graded")):
        start = time.perf_counter()
        verdict = SchemaReward(schema, scale).judge(HOSTILE[name])
        assert 0.0 <= verdict.score <= 1.0
        assert verdict.reason.isprintable()
        assert len(verdict.reason) < 150
        assert time.perf_counter() - start < 10


def test_the_deepest_text_that_parses_is_judged():
    reward = SchemaReward(TREE)
    assert reward.judge(HOSTILE["nested as deep as is allowed"]) == Verdict(1.0, "valid")
    assert reward.judge(HOSTILE["nested and wrong"]).reason.startswith("type@/sub/sub/sub")
    assert reward.judge(HOSTILE["nested too deep"]) == Verdict(0.0, "too_deep")


def test_recursion_that_only_some_values_start_does_not_raise():
    schema = {"if": {"type": "object", "required": ["loop"]}, "then": {"$ref": "#"}}
    assert SchemaReward(schema).judge("{}") == Verdict(1.0, "valid")
    assert SchemaReward(schema).judge('{"loop": 1}') == Verdict(0.5, "too_deep")
    assert SchemaReward(schema, "graded").judge('{"loop": 1}') == Verdict(0.3, "too_deep")


def test_a_reason_that_is_found_is_kept_where_the_grade_takes_too_deep_a_recursion():
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(3)}
    tree = {"properties": {"sub": {"$ref": "#/$defs/d0"}}, "$defs": chain | {"d3": {"$ref": "#"}}}
    schema = {"maxProperties": 0} | tree
    text = '{"sub":' * 127 + "{}" + "}" * 127
    assert SchemaReward(tree).judge(text) == Verdict(0.5, "too_deep")
    assert SchemaReward(schema).judge(text) == Verdict(0.5, "maxProperties@")
    assert SchemaReward(schema, "graded").judge(text) == Verdict(0.3, "maxProperties@")


def test_a_grade_is_below_the_best_however_deep_the_failure():
    graded = SchemaReward(TREE, "graded").judge('{"sub":' * 100 + "1" + "}" * 100)
    assert graded.reason.startswith("type@/sub")
    assert 0.79 < graded.score < 0.8


def test_unique_items_of_thousands_of_objects_take_linear_time():
    reward = SchemaReward({"uniqueItems": True})
    items = [{"a": i, "b": [i, True]} for i in range(20_000)]
    start = time.perf_counter()
    assert reward(json.dumps(items)) == 1.0
    assert reward(json.dumps([*items, {"b": [7.0, True], "a": 7}])) == 0.5
    assert time.perf_counter() - start < 10


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{}",:\\ue+-.019atrfnlsvdmc \n\ud800`<think>/', max_size=60))
def test_any_text_gets_a_verdict(text):
    for scale in ("ladder", "graded"):
        verdict = SchemaReward(INVOICE, scale).judge(text)
        assert (verdict.score == 0.0) == ("@" not in verdict.reason and verdict.reason != "valid")


def test_a_schema_that_doubles_at_every_reference_is_refused_in_time():
    links = 60  # 2 ** 60 ways from the first to the last
    parts = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(links)}
    schema = {"$ref": "#/$defs/d0", "$defs": parts | {f"d{links}": {"type": "object"}}}
    with pytest.raises(ValueError, match=r"takes more than 100,000 steps to judge short texts"):
        SchemaReward(schema)
    # Each once is a chain like any other.
    chain = {name: {"allOf": part["allOf"][:1]} for name, part in parts.items()}
    schema["$defs"] = chain | {f"d{links}": {"type": "object"}}
    assert SchemaReward(schema).judge("[]").reason == "type@"


def test_the_steps_of_schemas_that_are_checked_in_threads_do_not_add_up():
    links = 11  # some 49,000 steps: those of three would be too many for one
    parts = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(links)}
    schema = {"$ref": "#/$defs/d0", "$defs": parts | {f"d{links}": {}}}
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(check_schema, [schema | {"title": title} for title in "abc"], "abc"))
