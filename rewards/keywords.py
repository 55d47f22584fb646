"""The keywords of JSON Schema that are not left to jsonschema.

Replaced are those that are not exact on Decimals there, take more than linear time, read patterns
as Python does, or do not point at the key that is wrong. Patterns are Python's, except that `$` is
the very end, and classes such as that of digits are ASCII.

A keyword gets the validator, what the schema says under its name, the value and the whole schema,
and yields an error for each way in which the value fails.
"""

import functools
import re
from collections.abc import Iterator
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import Any

from jsonschema.exceptions import ValidationError
from referencing.jsonschema import DRAFT202012

from jaxgrpo.rewards.formats import conforms
from jaxgrpo.rewards.strict_json import hashable

_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_DOLLAR = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)  # escapes, classes, and it


@functools.lru_cache(maxsize=1024)
def regex(pattern: str) -> re.Pattern[str]:
    """A pattern in which `$` is the very end and the classes are ASCII, as in ECMA 262."""
    ended = _DOLLAR.sub(lambda m: r"\Z" if m[0] == "$" else m[0], pattern)
    return re.compile(ended, re.ASCII)


def additional_keys(value: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The keys that neither `properties` nor `patternProperties` speak of."""
    named = schema.get("properties", ())
    patterns = [regex(pattern) for pattern in schema.get("patternProperties", ())]
    return [
        key
        for key in value
        if key not in named and not any(pattern.search(key) for pattern in patterns)
    ]


def at(validator: Any, part: Any) -> Any:
    """The validator that stands at a part of its schema; a part may have a base URI of its own."""
    resolver = validator._resolver.in_subresource(DRAFT202012.create_resource(part))
    return validator.evolve(schema=part, _resolver=resolver)


def follow(validator: Any, ref: str) -> Any:
    """The validator that stands where a `$ref` or `$dynamicRef` of its schema leads."""
    target = validator._resolver.lookup(ref)
    return validator.evolve(schema=target.contents, _resolver=target.resolver)


def _required(validator: Any, keys: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in keys:
            if key not in value:
                yield ValidationError(f"{key!r} is missing", path=[key])


def _additional_properties(
    validator: Any, part: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for key in additional_keys(value, schema):
            if part is False:
                yield ValidationError("an additional key", path=[key])
            else:
                yield from validator.descend(value[key], part, path=key)


def _pattern_properties(
    validator: Any, parts: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for pattern, part in parts.items():
            for key in value:
                if regex(pattern).search(key):
                    yield from validator.descend(value[key], part, path=key, schema_path=pattern)


def _unevaluated_properties(
    validator: Any, part: Any, value: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        evaluated = _evaluated_beside(validator, value)
        for key in value:
            if key not in evaluated and not at(validator, part).is_valid(value[key]):
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
    keys = set(value) - set(additional_keys(value, schema))
    for there in _in_place(validator, value):
        if there.is_valid(value):
            keys |= _evaluated(there, value)
    return keys


def _in_place(validator: Any, value: dict[str, Any]) -> Iterator[Any]:
    """The validators of the schemas inside a schema that have to do with the same value."""
    schema = validator.schema
    for keyword in ("$ref", "$dynamicRef"):
        if keyword in schema:
            yield follow(validator, schema[keyword])
    parts = [part for keyword in ("allOf", "anyOf", "oneOf") for part in schema.get(keyword, ())]
    parts += [part for key, part in schema.get("dependentSchemas", {}).items() if key in value]
    if "if" in schema:
        holds = at(validator, schema["if"]).is_valid(value)
        parts += [schema[name] for name in ("if", "then" if holds else "else") if name in schema]
    for part in parts:
        yield at(validator, part)


def _pattern(validator: Any, pattern: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not regex(pattern).search(value):
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
    if isinstance(value, str) and not conforms(value, name):
        yield ValidationError(f"{value[:80]!r} is no {name}")


KEYWORDS = {
    "additionalProperties": _additional_properties,
    "format": _format,
    "multipleOf": _multiple_of,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "required": _required,
    "unevaluatedProperties": _unevaluated_properties,
    "uniqueItems": _unique_items,
}
