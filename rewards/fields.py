"""Field accuracy: how much of the ground truth an answer has right."""

from collections.abc import Mapping
from typing import Any

from jaxgrpo.rewards.strict_json import ParseError, hashable, parse_answer, with_decimals


def field_accuracy(completion: str, row: Mapping[str, Any]) -> float:
    """The share of the fields of the row's `ground_truth` that are right; see `fields_right`.

    A row without ground truth gives 0 to all: within its group that says nothing.

    >>> row = {"ground_truth": {"vendor": "Acme", "amount": 12.5}}
    >>> field_accuracy('{"amount": 12.50, "vendor": "ACME"}', row)
    0.5
    """
    if not row.get("ground_truth"):
        return 0.0
    right = fields_right(completion, row["ground_truth"])
    return sum(right.values()) / len(right)


def fields_right(completion: str, ground_truth: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each field of the ground truth is in the answer with an equal value.

    Equal as JSON: 12.5 is 12.50 but not "12.5", and true is not 1; arrays in order, objects in any.
    Nothing is right in a text that does not parse strictly or is no object.
    """
    answer = _parse_object(completion) or {}
    return {
        name: name in answer and hashable(answer[name]) == hashable(with_decimals(value))
        for name, value in ground_truth.items()
    }


def is_exact(completion: str, ground_truth: Mapping[str, Any]) -> bool:
    """Whether the answer is the ground truth: all of its fields are right and there is no other."""
    answer = _parse_object(completion)
    return answer is not None and hashable(answer) == hashable(with_decimals(dict(ground_truth)))


def _parse_object(completion: str) -> dict[str, Any] | None:
    try:
        answer = parse_answer(completion)
    except ParseError:
        return None
    return answer if isinstance(answer, dict) else None
