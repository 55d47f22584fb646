"""JSON by the letter of RFC 8259, and the reason for each text that is none."""

import json
import math
import time
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgrpo.rewards.strict_json import (
    MAX_DEPTH,
    ParseError,
    hashable,
    loads,
    parse_answer,
    with_decimals,
)

D = Decimal

PARSES = {
    # White space is space, tab, line feed, carriage return.
    "true": True,
    " \t\r\n false \t\r\n": False,
    "null": None,
    "[ ]": [],
    "{ }": {},
    "[\n1\t,\r2 ]": [D(1), D(2)],
    '{ "a" : 1 , "b" : 2 }': {"a": D(1), "b": D(2)},
    # Numbers.
    "0": D(0),
    "-0": D(0),
    "-0.0": D(0),
    "7": D(7),
    "-7": D(-7),
    "10": D(10),
    "0.5": D("0.5"),
    "-0.5": D("-0.5"),
    "1e2": D(100),
    "1E2": D(100),
    "1e+2": D(100),
    "1e-2": D("0.01"),
    "1e02": D(100),
    "0e1": D(0),
    "0e+1": D(0),
    "1.5E-3": D("0.0015"),
    "19.99": D("19.99"),
    "123456789012345678901234567890": D("123456789012345678901234567890"),
    "0.1234567890123456789012345678901234": D("0.1234567890123456789012345678901234"),
    "1.7976931348623157e308": D("1.7976931348623157e308"),
    "-1.7976931348623157e308": D("-1.7976931348623157e308"),
    "5e-324": D("5e-324"),
    "1e-400": D("1e-400"),
    "1e-999999999": D("1e-999999999"),
    "0e999999999": D(0),
    # Strings.
    '""': "",
    '"a"': "a",
    '"é€😀"': "é€😀",
    '"\x7f\x80\xa0\u2028\ufeff"': "\x7f\x80\xa0\u2028\ufeff",
    '"\ufffe\U0010ffff"': "\ufffe\U0010ffff",
    r'"\"\\\/\b\f\n\r\t"': '"\\/\b\f\n\r\t',
    r'"\u0041\u00e9\u20AC\uffff"': "Aé€\uffff",
    r'"\u0000"': "\0",
    r'"\ud83d\ude00"': "😀",
    r'"\uD83D\uDE00\uD834\uDD1E"': "😀𝄞",
    r'"\\ud800"': "\\ud800",
    r'"\\\\ud800"': "\\\\ud800",
    '"\'"': "'",
    '"/* */ // #"': "/* */ // #",
    '"```"': "```",
    '"<think>"': "<think>",
    '"[[[{{{"': "[[[{{{",
    # Arrays and objects.
    "[1]": [D(1)],
    "[[[]]]": [[[]]],
    '[null, true, "x", {}]': [None, True, "x", {}],
    '{"": 0}': {"": D(0)},
    '{"a": {"a": {"a": 1}}}': {"a": {"a": {"a": D(1)}}},
    r'{"\u0061": 1, "A": 2}': {"a": D(1), "A": D(2)},
    '{"a": [{"a": 1}, {"a": 2}]}': {"a": [{"a": D(1)}, {"a": D(2)}]},
    "[" * MAX_DEPTH + "]" * MAX_DEPTH: None,
    '"' + "[" * 1000 + '"': "[" * 1000,
    "[" + ",".join(["[]"] * 1000) + "]": [[]] * 1000,
}

DOES_NOT_PARSE = {
    "not_json": [
        # Nothing, or no value.
        *("", " ", "\n\t", "\xa0", "\0", "]", "}", ",", ":", "]]", "}{"),
        # White space that is not JSON's, a byte order mark.
        *("\ufeff{}", "\ufeff", "\xa0[]", "[]\xa0", "[\x0b]", "[\x0c]", "[\u2028]", "[\u3000]"),
        *("\x0c1", "{}\x00", "\x00{}", "[\x00]", "\u200b{}", "{}\ufeff"),
        # Numbers.
        *("01", "-01", "00", "+1", "[+1]", ".5", "-.5", "[.5]", "1.e2", "[1.e2]", "1.2.3", "1e2e3"),
        *("[1.]", "[1e]", "[-]", "--1", "[--1]", "0x10", "[0x10]", "1_000", "[1_000]", "1,000"),
        *(
            "1 000",
            "[1 2]",
            "[0.1.2]",
            "[1e+-2]",
            "[1e 2]",
            "1/2",
            "\u0661",
            "[\uff11]",
            "[½]",
            "1e1.5",
        ),
        *("NaN", "[NaN]", "Infinity", "-Infinity", "[-Infinity]", "[nan]", "[inf]", "[-NaN]"),
        *("1e400", "-1e400", "[1e309]", '{"a": 1e400}', "1.8e308", "1" + "0" * 309),
        *("1e99999999999999999999", "[1e-99999999999999999999]"),
        # Literals.
        *("True", "FALSE", "None", "undefined", "[True]", "nul l", "truefalse", "[nulll]", "[tru]"),
        # Strings.
        *("'a'", "['a']", "a", "[a]", "[`a`]", '["a\nb"]', '["a\tb"]', '["\x00"]', '["\x1f"]'),
        *(r'["\x41"]', r'["\a"]', r'["\0"]', r"""["\'"]""", r'["\U0041"]', '["\\\n"]', r'["\ "]'),
        *(r'["\u004"]', r'["\u00g0"]', r'["\u 041"]', r'["\u-041"]', r'["\u+041"]', r'["\u{41}"]'),
        *(r'["\ud800"]', r'["\uD800x"]', r'["\udc00"]', r'["\udc00\ud800"]', r'["\ud800\ud800"]'),
        *(r'["\ud800\n"]', r'["\ud800\u0041"]', r'["\\\ud800"]', r'{"\ud800": 1}', r'"\ud800"'),
        *('["\ud800"]', '"\udfff"', '{"\udbff": 1}', '"a" "b"', '"a""b"', 'u"a"', 'b"a"'),
        # Arrays.
        *(
            "[1,]",
            "[,1]",
            "[1,,2]",
            "[,]",
            "[1;2]",
            "[1 true]",
            "[1:2]",
            "(1)",
            "[1)",
            "[1}",
            "<1>",
        ),
        *("[]]", "[1]]", "1]", "[3[4]]", "[1],", "1,2", "[...]", "[#\n1]", "[[1}", "[*]"),
        # Objects.
        *(
            '{"a":1,}',
            "{,}",
            '{,"a":1}',
            '{"a" 1}',
            '{"a"::1}',
            '{"a":1 "b":2}',
            '{"a"}',
            '{"a",1}',
        ),
        *(
            "{a:1}",
            "{'a':1}",
            "{1:1}",
            "{null:1}",
            "{[]:1}",
            '{"a":}',
            "{:1}",
            '{"a":1]',
            '{"a":1}}',
        ),
        *('{"a":1,,"b":2}', '{"a"=1}', '{"a":1;"b":2}', '{{"a":1}}', '{"a":1},', '{"a":1};'),
        *('{"a":1 /* b */}', '{"a":1 // b\n}', '{"a":1 # b\n}', "/* */{}"),
        # Text.
        *(
            "I could not find an invoice.",
            "vendor: ACME",
            "ACME",
            "No.",
            "12 invoices",
            '"a" is it',
        ),
    ],
    "duplicate_key": [
        '{"a": 1, "a": 1}',
        '{"a": 1, "b": 2, "a": 3}',
        r'{"a": 1, "\u0061": 2}',
        '{"": 1, "": 2}',
        '[{"b": {"a": null, "a": null}}]',
        '{"a": 1, "a": 2} and more',
    ],
    "too_deep": [
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
        '[{"]":' * 100_000,
    ],
    "truncated": [
        *(
            "{",
            "[",
            '"',
            "-",
            "t",
            "[1.",
            "[1e",
            "[1E+",
            "[-",
            "[0.",
            "[tru",
            "[n",
            "[fals",
            "[[1]",
        ),
        *(
            '{"a',
            '{"a"',
            '{"a":',
            '{"a": ',
            '{"a": 1',
            '{"a": 1,',
            '{"a": 1, ',
            '{"a": [1, {"b": "c',
        ),
        *(
            '{"a": "',
            '{"a": "\\',
            r'{"a": "\u',
            r'{"a": "\u00',
            r'{"a": "\u004',
            r'{"a": "\\',
            "\n{",
        ),
        *(r'"\ud83d', r'"\ud83d' + "\\", r'"\ud83d\u', r'"\ud83d\ude0', r'"\ud8', r'"a\\\ud8'),
        *('{"a": "```', '{"a": "<think>', '{"a": "[[[', '{"amount": 1043.', '{"a": "Sure! '),
    ],
    "thinking_unfinished": [
        "<think>",
        "<think>\nThe vendor is ACME",
        '<think>\nIt could be {"vendor": "ACME"} or',
        'Well. <think> [1] {"a": ',
        '{"vendor": "ACME"} <think> no',
        "<think>\n```json\n{}\n```",
    ],
    "fenced": [
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}\n```',
        '```json {"a": 1}```',
        '```json\n{"a": 1',
        '```json\n{"a": 1}',
        '{"a": 1}\n```',
        'Here it is:\n\n```json\n{"a": 1}\n```\nAnything else?',
        "```\nvendor: ACME\n```",
        "```",
    ],
    "prose": [
        'Here is the JSON: {"a": 1}',
        '{"a": 1} Hope this helps!',
        'Sure! {"a": 1} Done.',
        "The list [1, 2] it is",
        '{"a": 1}\n\nNote: 2',
        'json\n{"a": 1}',
        'answer = {"a": 1};',
        '{"a": 1} {"b": 2}',
        "// a comment\n{}",
    ],
}


@pytest.mark.parametrize("text", PARSES, ids=lambda text: text[:40].encode("unicode_escape"))
def test_what_is_json_parses(text):
    value = loads(text)
    if not text.startswith("[[[["):
        assert hashable(value) == hashable(PARSES[text])


@pytest.mark.parametrize(
    ("reason", "text"),
    [(reason, text) for reason, texts in DOES_NOT_PARSE.items() for text in texts],
    ids=lambda text: text[:40].encode("unicode_escape"),
)
def test_what_is_not_json_does_not_parse_and_says_why(reason, text):
    with pytest.raises(ParseError) as error:
        loads(text)
    assert error.value.reason == reason


def test_there_are_enough_cases():
    assert len(PARSES) + sum(map(len, DOES_NOT_PARSE.values())) >= 250


def test_numbers_are_decimals_digit_by_digit():
    assert [str(number) for number in loads("[1, 1.0, 12.50, 0.1, 1e2]")] == [
        *("1", "1.0", "12.50", "0.1", "1E+2")
    ]
    assert all(type(number) is Decimal for number in loads("[1, 1.0, 0]"))


def test_errors_say_where():
    with pytest.raises(ParseError, match="line 2 column 5"):
        loads('{"a": 1,\n"b" 2}')
    with pytest.raises(ParseError, match="the key 'b' twice"):
        loads('{"a": 1, "b": 2, "b": 3}')


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


@given(JSON, st.booleans(), st.sampled_from([None, 2]))
def test_whatever_python_writes_is_read_back(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert hashable(loads(text)) == hashable(with_decimals(value))


@given(st.dictionaries(st.text(), JSON, min_size=1), st.booleans(), st.data())
def test_every_beginning_of_an_object_is_truncated(value, ascii_only, data):
    text = json.dumps(value, ensure_ascii=ascii_only)
    cut = text[: data.draw(st.integers(1, len(text) - 1))]
    with pytest.raises(ParseError) as error:
        loads(cut)
    assert error.value.reason == "truncated"


def test_every_beginning_of_a_text_with_every_kind_of_token_is_truncated():
    text = (
        r'{"a\\": ["\u00e9\ud83d\ude00\n", true, false, null, -0, 1.5e+10, -2E-3], "b": {"\"": ""}}'
    )
    loads(text)
    for end in range(1, len(text)):
        with pytest.raises(ParseError) as error:
            loads(text[:end])
        assert error.value.reason == "truncated", text[:end]
        # A control character is wrong wherever it stands, so this is no beginning of anything.
        with pytest.raises(ParseError) as error:
            loads(text[:end] + "\x01")
        assert error.value.reason == "not_json", text[:end]


@given(st.text(alphabet='[]{}",:\\ue+-.01atrlsn \n\ud800', max_size=40))
@example('[1e111, -0.10, "\\ue000", {"a": [true, null]}]')
def test_agrees_with_pythons_parser_where_that_is_strict_enough(text):
    def refuse(constant):
        raise ValueError(constant)

    def no_twins(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("twins")
        return dict(pairs)

    try:
        value = json.loads(text, parse_int=float, parse_constant=refuse, object_pairs_hook=no_twins)
        expected = json.dumps(value, ensure_ascii=False, allow_nan=False)
        expected.encode()
    except ValueError:
        with pytest.raises(ParseError):
            loads(text)
    else:
        assert json.dumps(loads(text), ensure_ascii=False, default=float) == expected


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('<think>\n\n</think>\n\n{"a": 1}', {"a": D(1)}),
        ('<think>{"a": 2}</think>{"a": 1}', {"a": D(1)}),
        ('never opened</think> {"a": 1}\n', {"a": D(1)}),
        ('<think>a</think> x <think>b</think>\n{"a": 1}', {"a": D(1)}),
        ('{"a": 1}', {"a": D(1)}),
    ],
)
def test_what_follows_the_last_thought_is_the_answer(completion, value):
    assert parse_answer(completion) == value


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ('{"a": 1}</think>', "not_json"),
        ("<think></think>\n", "not_json"),
        ('<think></think>\n```\n{"a": 1}\n```', "fenced"),
        ('<think>a</think><think>\n{"a": 1}', "thinking_unfinished"),
        ('<think></think>{"a": ', "truncated"),
        ('<think></think>\xa0{"a": 1}', "not_json"),
    ],
)
def test_the_answer_after_a_thought_is_read_as_strictly(completion, reason):
    with pytest.raises(ParseError) as error:
        parse_answer(completion)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1", "1.0", True),
        ("12.5", "12.50", True),
        ("0", "-0.0", True),
        ("1e2", "100", True),
        ("0.1", "0.10000000000000000000000000000001", False),
        ("1", "true", False),
        ("0", "false", False),
        ("[1]", "[true]", False),
        ('{"a": 0}', '{"a": false}', False),
        ('"1"', "1", False),
        ("null", "false", False),
        ("null", "0", False),
        ('""', "null", False),
        ("[]", "{}", False),
        ("[1, 2]", "[2, 1]", False),
        ("[[1], []]", "[[1.0], []]", True),
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', True),
        ('["boolean", true]', "true", False),
    ],
)
def test_equality_is_that_of_json(one, other, equal):
    assert (hashable(loads(one)) == hashable(loads(other))) == equal
    if equal:
        assert hash(hashable(loads(one))) == hash(hashable(loads(other)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.5, "12.50"),
        (19.99, "19.99"),
        (1e22, "1e22"),
        (10**30, "1" + "0" * 30),
        (Decimal("0.10"), "0.1"),
        ({"a": [True, None, "x", 1]}, '{"a": [true, null, "x", 1]}'),
    ],
)
def test_python_values_become_what_their_text_says(value, text):
    assert hashable(with_decimals(value)) == hashable(loads(text))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        Decimal("NaN"),
        10**400,
        {1: 2},
        {None: 1},
        (1, 2),
        {1},
        b"x",
        1j,
    ],
    ids=lambda value: str(value)[:20],
)
def test_python_values_that_json_does_not_have_are_refused(value):
    with pytest.raises(ValueError, match=r"\S"):
        with_decimals({"a": [value]})


def test_python_values_nested_too_deeply_are_refused():
    value = []
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    with_decimals(value)
    with pytest.raises(ValueError, match="nested deeper"):
        with_decimals([value])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10**6, "too_deep"),
        ("[]" * 10**6, "not_json"),
        ('x"' + "[" * 10**6, "not_json"),
        ("9" * 10**6, "not_json"),
        ("[0." + "3" * 10**6, "truncated"),
        ('"' + "a" * 10**7, "truncated"),
        ('"' + "\\" * (10**7 + 1), "truncated"),
        ('{"a": "' + "a" * 10**7 + '" x', "not_json"),
        ("Sure, " * 10**6, "not_json"),
        ("a" * 10**7, "not_json"),
        ('{"k": 1, ' * 10**5, "too_deep"),
        ("{" + '"k": 1, ' * 10**5 + '"k": 1}', "duplicate_key"),
        ("```" * 10**6, "fenced"),
        ("<think>" * 10**6, "thinking_unfinished"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_texts_take_linear_time(text, reason):
    start = time.perf_counter()
    with pytest.raises(ParseError) as error:
        loads(text)
    assert error.value.reason == reason
    assert time.perf_counter() - start < 10


def test_long_texts_that_are_json_parse():
    assert loads('"' + "a" * 10**7 + '"') == "a" * 10**7
    assert len(loads("[" + "1," * 10**5 + "1]")) == 10**5 + 1
    assert loads("0." + "3" * 10**6) == Decimal("0." + "3" * 10**6)
