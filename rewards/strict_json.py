"""JSON to the letter of RFC 8259, and the reason why a text is none.

Python's `json` does the parsing; what it lets through is refused here. Numbers become `Decimal`s,
so that 19.99 is what it says, whatever its number of digits.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import accumulate
from typing import Any

MAX_DEPTH = 128
"""Arrays and objects that may stand inside each other; deeper text does not parse."""

# What is left of a text when strings, and then all else that is no bracket, are gone.
_NO_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[^\[\]{}"]++', re.DOTALL)
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
# The escapes of a text one after another; group 1 is half a surrogate pair without the other.
_ESCAPES = re.compile(rf"{_HIGH}{_LOW}|({_HIGH}|{_LOW})|\\.", re.DOTALL)
# An escape, or pair of them, that a text breaks off in.
_PART_ESCAPE = re.compile(rf"(?:{_HIGH})?\\(?:u[0-9a-fA-F]{{0,3}})?\Z|{_HIGH}\Z")
_LITERALS = ("true", "false", "null")


class ParseError(ValueError):
    """A text that is not JSON.

    Attributes:
      reason: one word, the first of these that fits:
        `too_deep`: more than `MAX_DEPTH` levels of arrays and objects.
        `duplicate_key`: an object has a key twice.
        `truncated`: the text ends inside a value that was JSON until there.
        `thinking_unfinished`: `<think>` stands outside the JSON.
        `fenced`: a ``` fence stands outside the JSON.
        `prose`: words stand before or after an array or object.
        `not_json`: anything else: an empty text, NaN, a number past the range of a double such as
          1e400, half a surrogate pair.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def loads(text: str) -> Any:
    """The value of a JSON text.

    Args:
      text: JSON, with JSON's own white space around it and nothing else.

    Returns:
      Numbers as exact `Decimal`s, the rest as `json.loads` has it.

    Raises:
      ParseError: it is not JSON.
    """
    try:
        _check_depth(text)
        return _decode(text)
    except json.JSONDecodeError as error:
        raise ParseError(_diagnose(text), str(error)) from None


def parse_answer(completion: str) -> Any:
    """The value that a completion answers with: the JSON text after the last `</think>`, if any.

    Raises:
      ParseError: that is not JSON.
    """
    return loads(completion.rpartition("</think>")[2])


def dumps(value: Any) -> str:
    """A value of `loads`, or a Python value, as JSON from which `loads` makes the same."""
    match value:
        case Decimal():
            return str(value)
        case dict():
            return f"{{{', '.join(f'{json.dumps(key)}: {dumps(value[key])}' for key in value)}}}"
        case list():
            return f"[{', '.join(map(dumps, value))}]"
    return json.dumps(value)


def with_decimals(value: Any) -> Any:
    """A Python value as `loads` would have read it: each number a `Decimal`, floats as they print.

    Raises:
      ValueError: JSON has no such value, or it is nested deeper than `MAX_DEPTH`.
    """
    return _with_decimals(value, depth=0)


def _with_decimals(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float, Decimal)):
        return _number(str(value))
    if isinstance(value, (list, dict)) and depth == MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_with_decimals(item, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _with_decimals(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"a Python value that JSON does not have: {value!r:.80}")


def hashable(value: Any) -> Any:
    """A value of `loads` as one that hashes, and that equals another where JSON Schema says so.

    Numbers are equal by value, objects in any order of keys; true is not 1.
    """
    match value:
        case dict():
            return "object", frozenset((key, hashable(item)) for key, item in value.items())
        case list():
            return "array", tuple(hashable(item) for item in value)
        case bool():
            return "boolean", value
    return value


def _decode(text: str) -> Any:
    """`_DECODER.decode`, with an error for half a surrogate pair too."""
    if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
        raise json.JSONDecodeError("Half a surrogate pair", text, half.start())
    if "\\u" in text:
        for escape in _ESCAPES.finditer(text):
            if escape[1]:
                raise json.JSONDecodeError("Half a surrogate pair", text, escape.start())
    return _DECODER.decode(text)


def _check_depth(text: str) -> None:
    """Raises where `json` would recurse too deeply; brackets after its first error count too."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        steps = map(_STEP.__getitem__, _NO_BRACKETS.sub("", text))
        if max(accumulate(steps), default=0) > MAX_DEPTH:
            raise ParseError("too_deep", f"nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ParseError("duplicate_key", f"the key {key[:80]!r} twice in an object")
    return value


def _number(literal: str) -> Decimal:
    try:
        if math.isfinite(float(literal)):
            return Decimal(literal)
    except InvalidOperation:  # an exponent of twenty digits
        pass
    raise ParseError("not_json", f"a number out of range: {literal:.40}")


def _constant(name: str) -> None:
    raise ParseError("not_json", f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=_number,
    parse_int=_number,
    parse_constant=_constant,
)


def _diagnose(text: str) -> str:
    """The reason why `_decode` fails."""
    if _is_cut(text):
        return "truncated"
    bracket = re.search(r"[\[{]", text)
    start = bracket.start() if bracket else len(text)
    outside, has_value = text[:start], True
    try:
        _check_depth(text[start:])
        outside += text[_DECODER.raw_decode(text, start)[1] :]
    except ValueError:
        has_value = False
    if "<think>" in outside:
        return "thinking_unfinished"
    if "```" in outside:
        return "fenced"
    if has_value and re.search(r"\w", outside):
        return "prose"
    return "not_json"


def _is_cut(text: str) -> bool:
    """Whether a JSON text begins like this.

    It does if the decoder gets to its very end once the token that it breaks off in is completed.
    """
    if not text.strip():
        return False
    for completed in _completions(text):
        try:
            _decode(completed)
        except json.JSONDecodeError as error:
            if error.pos == len(completed):
                return True
        except ParseError:
            pass
        else:
            return True
    return False


def _completions(text: str) -> Iterator[str]:
    """The text with its last token completed: one for every kind of token that it may be."""
    yield text
    yield text + '"'
    yield text[:-11] + _PART_ESCAPE.sub("", text[-11:]) + '"'
    yield text + "0"
    for literal in _LITERALS:
        for length in range(1, len(literal)):
            if text.endswith(literal[:length]):
                yield text + literal[length:]
