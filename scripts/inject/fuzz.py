"""The schema reward against another validator, on random schemas and completions.

The other one is jsonschema-rs, in Rust. Whether a text is JSON is decided by the grammar of RFC
8259, written down here a second time. Where the two differ, the tables below have to say why.
"""

import functools
import json
import math
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from jsonschema_rs import Draft202012Validator

from jaxgrpo.redact import printable
from jaxgrpo.rewards.json_schema import SchemaReward
from scripts.inject import fuzzed
from scripts.inject.base import Outcome

COMPLETIONS = 20_000
SCHEMAS = 50  # that judge a completion
NOT_JSON, VALID, INVALID = "not JSON", "valid", "invalid"
_OF_NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_ASSERTIONS = (*_OF_NUMBERS, "format", "pattern")
_AT_A_TIME = 250  # completions; then there are other schemas
_LONGEST = 2.0  # seconds of processor time for a case
_NOTES = 20  # failures that are told; each is counted
_SHOWN = 600  # characters of a schema or a text in a note; its file has all of them


@dataclass(frozen=True)
class Limit:
    """What RFC 8259's grammar lets through, and `strict_json` does not.

    Attributes:
      why: in plain words.
      reason: of the verdict.
      holds: whether a text, given as its tokens, goes past it.
    """

    why: str
    reason: str
    holds: Callable[[list[str]], bool]


@dataclass(frozen=True)
class Difference:
    """What the two validators do not agree on, of one keyword and one number or string.

    Attributes:
      why: in plain words.
      holds: whether it explains that the reward takes the value for valid, or does not; given the
        keyword, its argument, the value, and which of both.
    """

    why: str
    holds: Callable[[str, Any, Any, bool], bool]


def _depth(tokens: list[str]) -> int:
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(accumulate(steps.get(token, 0) for token in tokens), default=0)


def _has_twins(tokens: list[str]) -> bool:
    found = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        found.append(len({key for key, _ in pairs}) < len(pairs))

    if _depth(tokens) <= 128:
        json.loads("".join(tokens), object_pairs_hook=look, parse_int=float)
    return any(found)


def _is_half(token: str) -> bool:
    return token[0] == '"' and re.search("[\ud800-\udfff]", json.loads(token)) is not None


LIMITS = {
    "too deep": Limit(
        "more than 128 arrays and objects inside each other",
        "too_deep",
        lambda tokens: _depth(tokens) > 128,
    ),
    "a key twice": Limit("an object has a key twice", "duplicate_key", _has_twins),
    "number out of range": Limit(
        "a double would be infinite",
        "not_json",
        lambda tokens: any(t[0] in "-0123456789" and math.isinf(float(t)) for t in tokens),
    ),
    "half a character": Limit(
        "half of a surrogate pair is no character",
        "not_json",
        lambda tokens: any(map(_is_half, tokens)),
    ),
}
RECURSION, DOUBLES, DOUBLING = "recursion", "doubles", "doubling"


def _in_fractions(keyword: str, argument: Decimal, number: Decimal) -> bool:
    """Whether a number meets a keyword, in arithmetic that neither of the validators uses."""
    bound, value = Fraction(argument), Fraction(number)
    match keyword:
        case "minimum":
            return value >= bound
        case "exclusiveMinimum":
            return value > bound
        case "maximum":
            return value <= bound
        case "exclusiveMaximum":
            return value < bound
    return value % bound == 0


def _is_no_double(number: Decimal | int) -> bool:
    return Fraction(number) != Fraction(float(number))


def _compiles(pattern: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(pattern)
    except (re.error, OverflowError):
        return False
    return True


def _format(names: str, valid: bool, pattern: str = "") -> Callable[[str, Any, Any, bool], bool]:
    return lambda keyword, argument, value, is_valid: (
        keyword == "format"
        and argument in names.split()
        and is_valid == valid
        and re.search(pattern, value) is not None
    )


def _pattern(parts: str, string: str) -> Callable[[str, Any, Any, bool], bool]:
    return lambda keyword, argument, value, _: (
        keyword == "pattern"
        and re.search(parts, argument) is not None
        and re.search(string, value) is not None
    )


DIFFERENCES = {
    "doubles inside": Difference(
        "jsonschema-rs makes doubles of some numbers; fractions agree with the reward",
        lambda keyword, argument, value, valid: (
            keyword in _OF_NUMBERS
            and (_is_no_double(argument) or _is_no_double(value))
            and _in_fractions(keyword, argument, value) == valid
        ),
    ),
    "white space": Difference(
        r"\s is ASCII's to the reward, ECMA 262's to jsonschema-rs",
        _pattern(
            r"\\[sS]",
            "[\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]",
        ),
    ),
    "ends of lines": Difference(
        "`.` is all but \\n to the reward, all but ECMA 262's ends of lines to jsonschema-rs",
        _pattern(r"\.", "[\r\u2028\u2029]"),
    ),
    "ends of words": Difference(
        "\\b goes by ASCII's letters to the reward, by Unicode's to jsonschema-rs",
        _pattern(r"\\[bB]", r"[^\x00-\x7f]"),
    ),
    "iri": Difference("the reward does not check it", _format("iri iri-reference", True)),
    "email": Difference("the reward asks for an @ only", _format("email idn-email", True, "@")),
    "uri-template": Difference(
        "the reward looks at the braces only", _format("uri-template", True)
    ),
    "uri-template's operators": Difference(
        "the reward has none of those that RFC 6570 reserves",
        _format("uri-template", False, "[{][=,!@|]"),
    ),
    "year 0": Difference("Python has none", _format("date date-time", False, "^0000")),
    "leap second": Difference("Python has none", _format("time date-time", False, ":60")),
    "hostname": Difference(
        "the reward lets a dot stand at the end, and decodes no xn-- and its like",
        _format("hostname idn-hostname", True, r"\.$|(^|\.)..--"),
    ),
    "idn-hostname": Difference(
        "the reward goes by IDNA 2008, jsonschema-rs writes letters in other forms first",
        _format("idn-hostname", False, r"[^\x00-\x7f]"),
    ),
    "regex": Difference(
        "Python's are what counts to the reward",
        lambda keyword, argument, value, valid: (
            (keyword, argument) == ("format", "regex") and _compiles(value) == valid
        ),
    ),
}
WHY = {name: known.why for name, known in (LIMITS | DIFFERENCES).items()} | {
    RECURSION: "in a deep value Python's recursion ends before the validator does",
    DOUBLING: "the time doubles with each level of the value; given up",
    DOUBLES: "jsonschema-rs has doubles, if the numbers come to it from Python's json as usual",
}


# ---- 13: completions against schemas


def row_13(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Each completion is judged by 50 schemas; a case is a judgement."""
    count = COMPLETIONS if count is None else count
    rng = Random(seed)
    tally: Counter[str] = Counter()
    notes: list[str] = []
    failed = 0
    keywords = cycle(fuzzed.KEYWORDS)
    for number in range(count):
        if number % _AT_A_TIME == 0:
            judges = [_judges_over(rng, keyword) for keyword in islice(keywords, SCHEMAS)]
        text = Text(_completion(rng, judges[number % SCHEMAS].schema))
        for judge in judges:
            try:
                tally.update(_compare_soon(judge, text))
            except Exception as error:
                failed += 1
                if failed <= _NOTES:
                    case = work_dir / f"case_{failed}.txt"
                    case.write_text(f"{judge.text}\n\n{text.completion!a}\n", "utf-8")
                    notes.append(
                        f"{case}: {type(error).__name__}: {error}; the schema"
                        f" {printable(judge.text, _SHOWN)}; the text"
                        f" {printable(text.completion, _SHOWN)}"
                    )
    for name, number in tally.most_common():
        notes.append(f"{number:,} x {name}" + (f": {WHY[name]}" if name in WHY else ""))
    return Outcome(count * SCHEMAS - failed, count * SCHEMAS, tuple(notes))


def _judges_over(rng: Random, keyword: str) -> "Judges":
    """Those of a schema that some values meet and others do not."""
    while True:
        schema = fuzzed.schema_over(rng, keyword)
        other = _other(schema)
        values = (fuzzed.meant_for(rng, schema, schema) for _ in range(20))
        if len({other.is_valid(value) for value in values}) == 2:
            return judges_of(fuzzed.as_json(schema))


def _completion(rng: Random, schema: Any) -> str:
    value = fuzzed.meant_for(rng, schema, schema)
    for _ in range(rng.choice([0, 0, 1, 2])):
        value = fuzzed.near_miss(rng, value)
    return fuzzed.completion(rng, value)


class Judges:
    """Who judges by a schema: the reward on either scale, the other validator, and it in doubles.

    Args:
      text: the schema as JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.schema = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        self.ladder = SchemaReward(self.schema, "ladder")
        self.graded = SchemaReward(self.schema, "graded")
        self.other = _other(self.schema)
        self.in_doubles = _other(json.loads(text))


def _other(schema: Any) -> Draft202012Validator:
    return Draft202012Validator(schema, validate_formats=True, offline=True)


judges_of = functools.lru_cache(maxsize=1000)(Judges)


class Text:
    """A completion.

    Attributes:
      depth: arrays and objects inside each other.
      is_json: whether the grammar says that the answer in it is JSON.
      limits: those of `LIMITS` that it goes past.
      value: its value with exact numbers, if it is JSON and goes past none.
      in_doubles: likewise, with doubles.
    """

    def __init__(self, completion: str) -> None:
        self.completion = completion
        answer = completion.rpartition("</think>")[2]
        tokens = _tokens(answer)
        self.is_json = _is_value(tokens)
        self.depth = _depth(tokens)
        self.limits = [
            name for name, limit in LIMITS.items() if self.is_json and limit.holds(tokens)
        ]
        if self.is_json and not self.limits:
            self.value = json.loads(answer, parse_float=Decimal)
            self.in_doubles = json.loads(answer)


class _OutOfTime(BaseException):
    """No Exception: those that a format's check raises are taken for a no."""


def _give_up(*_: object) -> None:
    raise _OutOfTime


def _compare_soon(judges: Judges, text: Text) -> list[str]:
    """`compare`, or `DOUBLING` if that takes long and may."""
    before = signal.signal(signal.SIGVTALRM, _give_up)
    try:
        # Again and again: where it is raised in a callback of the collector, Python only prints it.
        signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST, 0.1)
        return compare(judges, text)
    except _OutOfTime:
        assert text.depth > 8, "out of time"
        assert "$ref" in judges.text or "$dynamicRef" in judges.text, "out of time"
        return [DOUBLING]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def compare(judges: Judges, text: Text) -> list[str]:
    """`not JSON`, `valid` or `invalid`; then what explains that the validators differ, if they do.

    Raises:
      AssertionError: nothing does, or a verdict is not what it must be.
    """
    verdict = judges.ladder.judge(text.completion)
    graded = judges.graded.judge(text.completion)
    assert judges.ladder.judge(text.completion) == verdict, "another verdict the second time"
    assert (graded.reason, graded.path) == (verdict.reason, verdict.path), f"{graded} {verdict}"
    if not text.is_json or text.limits:
        assert verdict.score == graded.score == 0.0, f"no strict JSON: {verdict}"
        reasons = {LIMITS[name].reason for name in text.limits}
        assert verdict.reason in reasons or not text.is_json, f"{verdict}, not {reasons}"
        return [NOT_JSON, *text.limits]
    valid = verdict.score == 1.0
    assert (verdict.reason == "valid") == valid, verdict
    assert graded.score == 1.0 if valid else 0.3 <= graded.score < 0.8, graded
    assert valid or verdict.score == 0.5, verdict
    if verdict.reason == "too_deep":
        assert text.depth > 40, verdict
        return [INVALID, RECURSION]
    said = VALID if valid else INVALID
    if judges.other.is_valid(text.value) != valid:
        return [said, *_explanations(judges, text, said)]
    return [said, DOUBLES] if judges.in_doubles.is_valid(text.in_doubles) != valid else [said]


def _explanations(judges: Judges, text: Text, said: str) -> list[str]:
    """Why the validators differ: without the keywords that they read differently they must not."""
    differing = {
        (keyword, fuzzed.as_json(argument)): name
        for keyword, argument in _assertions(judges.schema)
        for scalar in _scalars(text.value)
        if isinstance(scalar, str) == isinstance(argument, str)
        and (name := difference(keyword, fuzzed.as_json(argument), fuzzed.as_json(scalar)))
    }
    assert differing, f"{said} to the reward alone"
    rest = judges_of(fuzzed.as_json(_without(judges.schema, differing)))
    ours = rest.ladder.judge(text.completion)
    assert rest.other.is_valid(text.value) == (ours.score == 1.0), (
        f"without {differing} it is {ours} to the reward alone"
    )
    return sorted(set(differing.values()))


@functools.lru_cache(maxsize=100_000)
def difference(keyword: str, argument: str, value: str) -> str | None:
    """The name of the difference between the validators on one keyword, if there is one.

    Args:
      keyword: `format`, `pattern`, or one of numbers.
      argument: its argument, as JSON.
      value: a string or a number, as JSON.

    Raises:
      AssertionError: `DIFFERENCES` does not have it.
    """
    judges = judges_of(f'{{"{keyword}":{argument}}}')
    valid = judges.ladder(value.replace("<", r"\u003c")) == 1.0  # no </think>
    exact = json.loads(value, parse_float=Decimal)
    if judges.other.is_valid(exact) == valid:
        return None
    for name, known in DIFFERENCES.items():
        if known.holds(keyword, judges.schema[keyword], exact, valid):
            return name
    raise AssertionError(f"{keyword} {argument}: {value!a} is {valid} to the reward alone")


def _assertions(schema: Any) -> Iterator[tuple[str, Any]]:
    """The keywords of strings and numbers, with their arguments, wherever they stand."""
    if isinstance(schema, dict):
        yield from ((name, schema[name]) for name in _ASSERTIONS if name in schema)
        yield from (("pattern", pattern) for pattern in schema.get("patternProperties", ()))
    if isinstance(schema, dict | list):
        for part in schema.values() if isinstance(schema, dict) else schema:
            yield from _assertions(part)


def _without(schema: Any, assertions: Container[tuple[str, str]]) -> Any:
    """The schema without some of its `_assertions`."""
    if isinstance(schema, list):
        return [_without(part, assertions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without(part, assertions)
        for name, part in schema.items()
        if ("pattern", fuzzed.as_json(name)) not in assertions
        and not (name in _ASSERTIONS and (name, fuzzed.as_json(part)) in assertions)
    }


def _scalars(value: Any) -> Iterator[Any]:
    """Every string and number in a value, and every key."""
    if isinstance(value, str | int | Decimal) and not isinstance(value, bool):
        yield value
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _scalars(part)


# ---- the grammar of RFC 8259

_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_SCALAR = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null"
_TOKEN = re.compile(rf"[ \t\n\r]*+({_STRING}|{_SCALAR}|[\[\]{{}}:,])[ \t\n\r]*+")
# An array or object of strings s and other values v.
_FLAT = re.compile(r"\[(?:[sv](?:,[sv])*+)?\]|\{(?:s:[sv](?:,s:[sv])*+)?\}")


def _tokens(text: str) -> list[str]:
    """All tokens of a text, or none if a part of it is no token."""
    tokens, end = [], 0
    while end < len(text):
        token = _TOKEN.match(text, end)
        if token is None:
            return []
        tokens.append(token[1])
        end = token.end()
    return tokens


def _is_value(tokens: list[str]) -> bool:
    """Whether tokens make one value: arrays and objects become values from the inside out."""
    shape = "".join("s" if t[0] == '"' else t if t in "[]{}:," else "v" for t in tokens)
    before = ""
    while shape != before:
        before, shape = shape, _FLAT.sub("v", shape)
    return shape in ("s", "v")
