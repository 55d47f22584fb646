"""What judges by a JSON Schema: jsonschema's validator, built where the schema is fit for it.

The dialect is draft 2020-12. A `$ref` leads to a place in the document or in the dialect's own
meta-schema: no network, no files.
"""

import itertools
import re
import threading
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from jaxgrpo.rewards.keywords import KEYWORDS, regex
from jaxgrpo.rewards.strict_json import loads, with_decimals

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LONGEST_POINTER = 100  # characters; keys are the model's to choose
_VALIDATORS_KEPT = 256
_MOST_STEPS = 100_000


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
    KEYWORDS,
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
_validators: dict[str, Any] = {}
_lock = threading.Lock()  # of these, and of the count of steps: a server reads requests in threads


def validator_of(schema: Any) -> Any:
    """The validator of a schema, built once.

    Raises:
      ValueError: one line that says why the schema is none, or cannot be used.
    """
    key = repr(schema)  # tells 1, True, "1" and Decimal("1") apart, which a JSON text does not
    with _lock:
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
            f"no JSON Schema: {message:.200} (at {pointer(error.absolute_path) or 'its root'})"
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
                regex(pattern)
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


def pointer(path: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901) fit to be shown: printable, and cut if it is long."""
    steps = (str(step)[:_LONGEST_POINTER] for step in path)
    text = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= _LONGEST_POINTER else text[: _LONGEST_POINTER - 1] + "…"
