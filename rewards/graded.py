"""The graded score of a value: how much of a schema that it does not meet holds of it.

The rules stand in `json_schema.SchemaReward`, for those who choose the scale.
"""

import math
from typing import Any

from jaxgrpo.rewards.keywords import additional_keys, at, follow

_MOST_UNLESS_VALID = math.nextafter(0.8, 0)  # a share just under 1 would be rounded to it


def grade(validator: Any, value: Any) -> float:
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
                _share(at(validator, part), value[key]) if key in value else key not in required
                for key, part in argument.items()
            ]
        case "additionalProperties", dict():
            additional = additional_keys(value, schema)
            if argument is False:
                return [1 / (1 + len(additional))]
            return [_mean([_share(at(validator, argument), value[key]) for key in additional])]
        case "prefixItems", list():
            return [
                _share(at(validator, part), value[place])
                if place < len(value)
                else place >= schema.get("minItems", 0)
                for place, part in enumerate(argument)
            ]
        case "items", list():
            places = len(schema.get("prefixItems", ()))
            shares = [_share(at(validator, argument), item) for item in value[places:]]
            missing = int(schema.get("minItems", 0)) - max(places, len(value))
            return [_mean(shares, of=len(shares) + max(0, missing))]
        case "allOf", _:
            return [_share(at(validator, part), value) for part in argument]
        case (("anyOf" | "oneOf"), _) if not _holds(validator, keyword, value):
            shares = [_share(at(validator, part), value) for part in argument]
            return [max((share for share in shares if share < 1), default=0.0)]
        case "$ref", _:
            return [_share(follow(validator, argument), value)]
    return [_holds(validator, keyword, value)] if keyword in validator.VALIDATORS else []


def _holds(validator: Any, keyword: str, value: Any) -> bool:
    schema = validator.schema
    errors = validator.VALIDATORS[keyword](validator, schema[keyword], value, schema)
    return next(iter(errors or ()), None) is None


def _mean(shares: list[float], of: int | None = None) -> float:
    number = len(shares) if of is None else of
    return sum(shares) / number if number else 1.0
