"""A JSON Schema as a reward: does the text parse, does it meet the schema, and if not, why.

Reasons are those of `strict_json.ParseError` for a text that does not parse, `valid`, and else the
keyword that fails and the JSON pointer of the place: `type@/amount`, `required@/vendor` (the key
that is missing), `additionalProperties@/note`, `minItems@/items`. Of several failures it is the
first in the order in which the schema is written. `false` stands for a schema that is just that,
`too_deep` for a value that leads the validator into deeper recursion than Python has.

The dialect is draft 2020-12. `format` is checked: date, date-time, time, duration, email and
idn-email (both ask for an @ only), hostname, idn-hostname, ipv4, ipv6, uri, uri-reference,
uri-template, uuid, json-pointer, relative-json-pointer, regex; others say nothing. Patterns are
Python's, except that `$` is the very end, and classes such as that of digits are ASCII.
A `$ref` leads to a place in the document or in the dialect's own meta-schema: no network, no files.
"""

import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from jaxgrpo.rewards.strict_json import ParseError, hashable, loads, parse_answer, with_decimals
from jaxgrpo.types import Verdict

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LONGEST_FORMATTED = 10_000  # characters; no date or address has more, and some checks are slow
_MAY_END_IN_A_NEWLINE = ("json-pointer", "relative-json-pointer", "regex")
_LONGEST_POINTER = 100  # characters; keys are the model's to choose
_VALIDATORS_KEPT = 256
_MOST_STEPS = 100_000
_MOST_UNLESS_VALID = math.nextafter(0.8, 0)  # a share just under 1 would be rounded to it
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_FORMATS = FormatChecker(())
_FORMATS.checkers = {
    name: check
    for name, check in Draft202012Validator.FORMAT_CHECKER.checkers.items()
    if name not in ("iri", "iri-reference")  # milliseconds for every character
}


class SchemaReward:
    """What a completion earns by meeting a JSON Schema; 1.0 if it does, on either scale.

    `ladder`: 0.0 does not parse, 0.5 parses but fails the schema.

    `graded`: 0.0 does not parse, 0.3 + 0.5 * share parses but fails the schema, where the share of
    a schema that holds is the mean over its assertions of 1 for each that holds, 0 for each that
    does not, and something between for those that look inside:

    - a value of the wrong `type` has share 0, whatever else the schema asserts;
    - `required` is an assertion for each key;
    - `properties` is one for each key: the share of the key's own schema. An absent key counts 0
      if it is required, so leaving it out costs twice, and 1 if it is not;
    - `additionalProperties`, where false, is 1 / (1 + the number of additional keys), else the mean
      share of the additional values;
    - `prefixItems` is one for each place, `items` the mean share of the remaining items; items that
      are missing from `minItems` count 0;
    - `allOf` is one for each schema, `$ref` the share of what it leads to, `anyOf` and `oneOf` the
      best share of a schema that fails, if they fail;
    - every other keyword that can fail is one assertion, which holds or does not.

    The share is 1 only of a value that is valid.

    >>> number = {"type": "number"}
    >>> reward = SchemaReward({"type": "object", "properties": {"amount": number}})
    >>> reward('{"amount": 12.5}'), reward('{"amount": "12.50 EUR"}'), reward("The amount is 12.5.")
    (1.0, 0.5, 0.0)
    >>> reward.judge('{"amount": "12.50 EUR"}')
    Verdict(score=0.5, reason='type@/amount', path='/amount')

    Attributes:
      scale: `ladder` or `graded`.
    """

    def __init__(self, schema: Any, scale: Literal["ladder", "graded"] = "ladder") -> None:
        """Builds the validator.

        Args:
          schema: a JSON Schema as Python has JSON; numbers may be `Decimal`s.
          scale: what a text earns that parses but fails the schema.

        Raises:
          ValueError: it is no schema of draft 2020-12, or a `$ref` leads out of it or nowhere.
        """
        if scale not in ("ladder", "graded"):
            raise ValueError(f"scale is {scale!r}; it must be 'ladder' or 'graded'")
        self.scale = scale
        self._validator = _validator(schema)

    def __call__(self, completion: str, row: Mapping[str, Any] | None = None) -> float:
        """The score alone; see `judge`."""
        return self.judge(completion, row).score

    def judge(self, completion: str, row: Mapping[str, Any] | None = None) -> Verdict:
        """The score and the reason for it.

        Args:
          completion: any text; what follows the last `</think>` is judged.
          row: the line of the data file; its `schema`, if it has one, replaces the reward's own.

        Raises:
          ValueError: the row's schema is none.
        """
        validator = _validator(row["schema"]) if row and "schema" in row else self._validator
        try:
            value = parse_answer(completion)
        except ParseError as error:
            return Verdict(0.0, error.reason)
        try:
            failure = next(validator.iter_errors(value), None)
        except RecursionError:
            return Verdict(0.5 if self.scale == "ladder" else 0.3, "too_deep")
        if failure is None:
            return Verdict(1.0, "valid")
        score = 0.5 if self.scale == "ladder" else _grade(validator, value)
        path = _pointer(failure.absolute_path)
        return Verdict(score, f"{failure.validator or 'false'}@{path}", path)


def load_schema(path: str | Path) -> Any:
    """Reads a schema file; numbers are `Decimal`s.

    Raises:
      ValueError: one line that names the file and what is wrong with it.
    """
    try:
        schema = loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read schema file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    check_schema(schema, str(path))
    return schema


def check_schema(schema: Any, where: str) -> None:
    """Refuses what `SchemaReward` would.

    Args:
      schema: as `SchemaReward` takes it.
      where: its file and line, to name in the error.

    Raises:
      ValueError: one line that says where and what is wrong.
    """
    try:
        _validator(schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_validators: dict[str, Any] = {}


def _validator(schema: Any) -> Any:
    """The validator of a schema, built once."""
    key = repr(schema)  # tells 1, True, "1" and Decimal("1") apart, which a JSON text does not
    if key not in _validators:
        validator = _build(schema)
        if len(_validators) == _VALIDATORS_KEPT:
            del _validators[next(iter(_validators))]
        _validators[key] = validator
    return _validators[key]


def _build(schema: Any) -> Any:
    try:
        schema = with_decimals(schema)
    except ValueError as error:
        raise ValueError(f"the schema is not JSON: {error}") from error
    try:
        _check_dialect(schema)
        _check_keywords(schema)
        # A registry of nothing but the dialect's meta-schemas, with no way to get more.
        validator = _Validator(schema, registry=Registry())
        _check_references(validator)
        _try(schema)
    except RecursionError:
        raise ValueError("the schema is nested too deeply, or its $refs go in a circle") from None
    return validator


def _try(schema: Any) -> None:
    """Judges short texts; RecursionError: $refs go in a circle; ValueError: it takes too long."""
    steps = itertools.count()

    def counted(validator: Any, **changes: Any) -> Any:
        if next(steps) == _MOST_STEPS:
            raise ValueError(
                f"the schema takes more than {_MOST_STEPS:,} steps to judge short texts: its $refs"
                " lead to the same places again and again"
            )
        return _evolve(validator, **changes)

    _TryingValidator.evolve = counted
    validator = _TryingValidator(schema, registry=Registry())
    for text in ("null", "true", "0", '""', "[]", "{}"):
        validator.is_valid(loads(text))


def _check_dialect(schema: Any) -> None:
    dialect = schema.get("$schema", _DIALECT) if isinstance(schema, dict) else _DIALECT
    if not isinstance(dialect, str) or dialect.removesuffix("#") != _DIALECT:
        raise ValueError(
            f"$schema is {dialect!r:.80}; only {_DIALECT} is read: rewrite the schema for it"
        )


def _check_keywords(schema: Any) -> None:
    error = best_match(_META_SCHEMA.iter_errors(schema))
    if error is not None:
        message = re.sub(r"Decimal\('([^']*)'\)", r"\1", error.message)
        raise ValueError(
            f"no JSON Schema: {message:.200} (at {_pointer(error.absolute_path) or 'its root'})"
        )


def _check_references(validator: Any) -> None:
    """Follows every `$ref` and `$dynamicRef`, compiles every pattern."""
    todo = [(validator.schema, validator._resolver)]
    seen: set[int] = set()
    while todo:
        schema, resolver = todo.pop()
        if isinstance(schema, bool) or id(schema) in seen:
            continue
        seen.add(id(schema))
        _check_dialect(schema)
        for pattern in [*schema.get("patternProperties", ()), schema.get("pattern", "")]:
            try:
                _regex(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"the pattern {pattern!r:.80} does not compile: {error}"
                ) from error
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in schema:
                ref = schema[keyword]
                try:
                    target = resolver.lookup(ref)
                except (Unresolvable, ValueError) as error:
                    raise ValueError(
                        f"the {keyword} {ref!r:.200} leads nowhere inside the schema;"
                        " nothing is read from the network or from files"
                    ) from error
                if id(target.contents) not in seen:
                    _check_keywords(target.contents)
                todo.append((target.contents, target.resolver))
        todo += [
            (part, resolver.in_subresource(DRAFT202012.create_resource(part)))
            for part in DRAFT202012.subresources_of(schema)
        ]


def _grade(validator: Any, value: Any) -> float:
    """The graded score of a value that is not valid: at least 0.3, less than 0.8."""
    try:
        return min(0.3 + 0.5 * _share(validator, value), _MOST_UNLESS_VALID)
    except RecursionError:  # the reason may be found without: the share is of every part
        return 0.3


def _share(validator: Any, value: Any) -> float:
    """How much of the validator's schema holds; see `SchemaReward`."""
    schema = validator.schema
    if isinstance(schema, bool):
        return float(schema)
    if "type" in schema and not _holds(validator, "type", value):
        return 0.0
    parts: list[float] = []
    for keyword in schema:
        parts += _parts(validator, keyword, value)
    return _mean(parts)


def _parts(validator: Any, keyword: str, value: Any) -> list[float]:
    """The assertions that a keyword makes of a value, each from 0 to 1."""
    schema = validator.schema
    argument = schema[keyword]
    match keyword, value:
        case "required", dict():
            return [float(key in value) for key in argument]
        case "properties", dict():
            required = schema.get("required", ())
            return [
                _share(_at(validator, part), value[key]) if key in value else key not in required
                for key, part in argument.items()
            ]
        case "additionalProperties", dict():
            additional = _additional(value, schema)
            if argument is False:
                return [1 / (1 + len(additional))]
            return [_mean([_share(_at(validator, argument), value[key]) for key in additional])]
        case "prefixItems", list():
            return [
                _share(_at(validator, part), value[place])
                if place < len(value)
                else place >= schema.get("minItems", 0)
                for place, part in enumerate(argument)
            ]
        case "items", list():
            places = len(schema.get("prefixItems", ()))
            shares = [_share(_at(validator, argument), item) for item in value[places:]]
            missing = int(schema.get("minItems", 0)) - max(places, len(value))
            return [_mean(shares, of=len(shares) + max(0, missing))]
        case "allOf", _:
            return [_share(_at(validator, part), value) for part in argument]
        case (("anyOf" | "oneOf"), _) if not _holds(validator, keyword, value):
            shares = [_share(_at(validator, part), value) for part in argument]
            return [max((share for share in shares if share < 1), default=0.0)]
        case "$ref", _:
            target = validator._resolver.lookup(argument)
            there = validator.evolve(schema=target.contents, _resolver=target.resolver)
            return [_share(there, value)]
    return [_holds(validator, keyword, value)] if keyword in validator.VALIDATORS else []


def _at(validator: Any, part: Any) -> Any:
    """The validator that stands at a part of its schema; a part may have a base URI of its own."""
    resolver = validator._resolver.in_subresource(DRAFT202012.create_resource(part))
    return validator.evolve(schema=part, _resolver=resolver)


def _holds(validator: Any, keyword: str, value: Any) -> bool:
    schema = validator.schema
    errors = validator.VALIDATORS[keyword](validator, schema[keyword], value, schema)
    return next(iter(errors or ()), None) is None


def _mean(shares: list[float], of: int | None = None) -> float:
    number = len(shares) if of is None else of
    return sum(shares) / number if number else 1.0


def _pointer(path: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901) fit to be shown: printable, and cut if it is long."""
    steps = (str(step)[:_LONGEST_POINTER] for step in path)
    pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    pointer = "".join(char if char.isprintable() else "\ufffd" for char in pointer)
    return pointer if len(pointer) <= _LONGEST_POINTER else pointer[: _LONGEST_POINTER - 1] + "…"


# The validator is jsonschema's. Replaced are its keywords that are not exact on Decimals, take more
# than linear time, read patterns as Python does, or do not point at the key that is wrong.


def _required(validator: Any, keys: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in keys:
            if key not in value:
                yield ValidationError(f"{key!r} is missing", path=[key])


def _additional_properties(
    validator: Any, part: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in _additional(value, schema):
            if part is False:
                yield ValidationError("an additional key", path=[key])
            else:
                yield from validator.descend(value[key], part, path=key)


def _additional(value: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The keys that neither `properties` nor `patternProperties` speak of."""
    named = schema.get("properties", ())
    patterns = [_regex(pattern) for pattern in schema.get("patternProperties", ())]
    return [
        key
        for key in value
        if key not in named and not any(pattern.search(key) for pattern in patterns)
    ]


def _pattern_properties(
    validator: Any, parts: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for pattern, part in parts.items():
            for key in value:
                if _regex(pattern).search(key):
                    yield from validator.descend(value[key], part, path=key, schema_path=pattern)


def _unevaluated_properties(
    validator: Any, part: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        evaluated = _evaluated_beside(validator, value)
        for key in value:
            if key not in evaluated and not _at(validator, part).is_valid(value[key]):
                yield ValidationError("a key that nothing else speaks of")


def _evaluated(validator: Any, value: dict[str, Any]) -> set[str]:
    """The keys that a schema that holds speaks of."""
    schema = validator.schema
    if isinstance(schema, bool):
        return set()
    if "unevaluatedProperties" in schema:
        return set(value)
    return _evaluated_beside(validator, value)


def _evaluated_beside(validator: Any, value: dict[str, Any]) -> set[str]:
    """Those that it speaks of, `unevaluatedProperties` aside."""
    schema = validator.schema
    if "additionalProperties" in schema:
        return set(value)
    keys = set(value) - set(_additional(value, schema))
    for there in _in_place(validator, value):
        if there.is_valid(value):
            keys |= _evaluated(there, value)
    return keys


def _in_place(validator: Any, value: dict[str, Any]) -> Iterator[Any]:
    """The validators of the schemas inside a schema that have to do with the same value."""
    schema = validator.schema
    for keyword in ("$ref", "$dynamicRef"):
        if keyword in schema:
            target = validator._resolver.lookup(schema[keyword])
            yield validator.evolve(schema=target.contents, _resolver=target.resolver)
    parts = [part for keyword in ("allOf", "anyOf", "oneOf") for part in schema.get(keyword, ())]
    parts += [part for key, part in schema.get("dependentSchemas", {}).items() if key in value]
    if "if" in schema:
        holds = _at(validator, schema["if"]).is_valid(value)
        parts += [schema[name] for name in ("if", "then" if holds else "else") if name in schema]
    for part in parts:
        yield _at(validator, part)


def _pattern(validator: Any, pattern: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not _regex(pattern).search(value):
        yield ValidationError(f"does not match {pattern!r}")


def _unique_items(
    validator: Any, unique: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if unique and isinstance(value, list) and len(set(map(hashable, value))) < len(value):
        yield ValidationError("an item twice")


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, Decimal) and not _is_multiple(value, step):
        yield ValidationError(f"not a multiple of {step}")


def _is_multiple(value: Decimal, step: Decimal) -> bool:
    """Exact, and without writing out the zeros of 1e300 or 1e-999999999."""
    value = value.normalize(_EXACT)
    shift = _exponent(value) - _exponent(step)
    if shift < 0:  # 10 would have to divide the digits, and it does no longer
        return not value
    digits = int(value.scaleb(-_exponent(value), _EXACT))
    step_digits = int(step.scaleb(-_exponent(step), _EXACT))
    return digits * pow(10, shift, step_digits) % step_digits == 0


def _exponent(number: Decimal) -> int:
    return int(number.as_tuple().exponent)


def _format(validator: Any, name: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and name in _FORMATS.checkers and not _conforms(value, name):
        yield ValidationError(f"{value[:80]!r} is no {name}")


def _conforms(text: str, name: str) -> bool:
    try:
        # Some of the checks let a newline pass at the end where there must be none.
        return (
            len(text) <= _LONGEST_FORMATTED
            and (not text.endswith("\n") or name in _MAY_END_IN_A_NEWLINE)
            and _FORMATS.conforms(text, name)
        )
    except Exception:  # and some let out what their parsers raise
        return False


# The library's own let through digits of any script, signs, underscores in a uuid, decimals in a
# duration; refuse 100 as a pointer; and warn of what they compile.
_HEX = "[0-9a-fA-F]"
_UUID = re.compile(rf"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}")
_RELATIVE_JSON_POINTER = re.compile(r"(0|[1-9][0-9]*)(#|(/([^~/]|~[01])*)*)")
_DAYS = "[0-9]+D"
_MONTHS = f"[0-9]+M({_DAYS})?"
_SECONDS = "[0-9]+S"
_MINUTES = f"[0-9]+M({_SECONDS})?"
_DATE = f"({_DAYS}|{_MONTHS}|[0-9]+Y({_MONTHS})?)"
_TIME = f"T({_SECONDS}|{_MINUTES}|[0-9]+H({_MINUTES})?)"
_DURATION = re.compile(f"P({_DATE}({_TIME})?|{_TIME}|[0-9]+W)")  # RFC 3339, appendix A


def _is_hostname(text: Any) -> bool:
    return text.isascii() and bool(_is_hostname_in_any_script(text))


def _is_regex(text: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        re.compile(text)  # raises, which _conforms takes for a no
    return True


def _is_like(pattern: re.Pattern[str]) -> tuple[Callable[[Any], bool], tuple[()]]:
    return (lambda text: pattern.fullmatch(text) is not None), ()


_is_hostname_in_any_script, _ = _FORMATS.checkers["hostname"]
_FORMATS.checkers |= {
    "duration": _is_like(_DURATION),
    "hostname": (_is_hostname, ValueError),
    "regex": (_is_regex, ()),
    "relative-json-pointer": _is_like(_RELATIVE_JSON_POINTER),
    "uuid": _is_like(_UUID),
}


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern in which `$` is the very end and the classes are ASCII, as in ECMA 262."""
    ended = _DOLLAR.sub(lambda m: r"\Z" if m[0] == "$" else m[0], pattern)
    return re.compile(ended, re.ASCII)


_DOLLAR = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)  # escapes, classes, and it


def _evolve(validator: Any, **changes: Any) -> Any:
    """Stays in the class, where the library's own goes by the `$schema` of the subschema."""
    same = {
        "schema": validator.schema,
        "registry": validator._registry,
        "_resolver": validator._resolver,
    }
    return type(validator)(**(same | changes))


_Validator: Any = extend(
    Draft202012Validator,
    {
        "additionalProperties": _additional_properties,
        "format": _format,
        "multipleOf": _multiple_of,
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "required": _required,
        "unevaluatedProperties": _unevaluated_properties,
        "uniqueItems": _unique_items,
    },
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer",
        lambda types, value: (
            value == value.to_integral_value()
            if isinstance(value, Decimal)
            else Draft202012Validator.TYPE_CHECKER.is_type(value, "integer")
        ),
    ),
)
_Validator.evolve = _evolve
_TryingValidator: Any = extend(_Validator)
_META_SCHEMA = _Validator(Draft202012Validator.META_SCHEMA, registry=Registry())
