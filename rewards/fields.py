"""Field accuracy: how much of the ground truth an answer has right."""

from collections.abc import Mapping
from typing import Any

from jaxgrpo.rewards.strict_json import ParseError, hashable, parse_answer, with_decimals


def field_accuracy(completion: str, row: Mapping[str, Any]) -> float:
    """How right the fields of the row's `ground_truth` are: the mean over them of a share each.

    The share is 1 for an equal value and 0 for another or none. An array or an object counts by its
    parts, so that there is something to climb: the sum of the shares of its items, place by place,
    or of its keys, over the number of those that the answer or the truth has. It is 1 only
    where the whole value is equal.

    A row without ground truth gives 0 to all: within its group that says nothing.

    >>> row = {"ground_truth": {"vendor": "Acme", "amount": 12.5}}
    >>> field_accuracy('{"amount": 12.50, "vendor": "ACME"}', row)
    0.5
    >>> field_accuracy('{"codes": ["A1", "B3", "C4"]}', {"ground_truth": {"codes": ["A1", "B2"]}})
    0.3333333333333333
    """
    truth = with_decimals(row.get("ground_truth") or {})
    answer = _parse_object(completion)
    if not truth or answer is None:
        return 0.0
    return _sum_of_shares(answer, truth) / len(truth)


def _sum_of_shares(value: Mapping[str, Any], truth: Mapping[str, Any]) -> float:
    # In the truth's order, so that a sum of thirds has the same last bit in every process.
    return sum(_share(value[name], truth[name]) for name in truth if name in value)


def _share(value: Any, truth: Any) -> float:
    match value, truth:
        case dict(), dict() if value or truth:
            return _sum_of_shares(value, truth) / len(value.keys() | truth.keys())
        case list(), list() if value or truth:
            return sum(map(_share, value, truth)) / max(len(value), len(truth))
    return float(hashable(value) == hashable(truth))


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
