"""The rewards of a run by their names in the configuration."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgrpo.rewards.base import RewardFn, WeightedRewards, load_reward
from jaxgrpo.rewards.fields import field_accuracy
from jaxgrpo.rewards.json_schema import SchemaReward

BUILT_IN = ("ladder", "graded", "fields")


def resolve_rewards(
    weights: Mapping[str, float], schema: Any, base_dir: str | Path = "."
) -> WeightedRewards:
    """The weighted sum that a configuration asks for.

    Args:
      weights: by the reward's name: `ladder`, `graded`, `fields`, or one for `load_reward`.
      schema: of the run; `ladder` and `graded` judge by it.
      base_dir: where relative paths in names start.

    Raises:
      ValueError: there is no such reward, or the schema is none.
    """
    return WeightedRewards(
        [(name, _resolve(name, schema, base_dir), weight) for name, weight in weights.items()]
    )


def full_marks(
    weights: Mapping[str, float], schema: Any, rows: Iterable[Mapping[str, Any]]
) -> float | None:
    """What a right answer earns, where only rewards of one's own say what is right: 1 from each.

    That is where answers need not be JSON: neither the run nor a row has a schema, and none of
    `BUILT_IN`, which read JSON, has a weight. Else None: the schema and the fields say it.

    >>> full_marks({"sql.py:parses": 0.5, "sql.py:right": 1.0}, True, [{}])
    1.5
    >>> full_marks({"sql.py:right": 1.0}, {"type": "string"}, [{}])

    Args:
      weights: of the rewards by name.
      schema: of the run; True stands for none.
      rows: of the data.
    """
    named = {name for name, weight in weights.items() if weight}
    if not named or not named.isdisjoint(BUILT_IN) or schema is not True:
        return None
    if any("schema" in row for row in rows):
        return None
    return sum(weight for weight in weights.values() if weight > 0)


def _resolve(name: str, schema: Any, base_dir: str | Path) -> RewardFn:
    match name:
        case "ladder" | "graded":
            return SchemaReward(schema, name)
        case "fields":
            return field_accuracy
    if ":" in name:
        return load_reward(name, base_dir)
    raise ValueError(
        f"no reward {name!r}; there are ladder, graded, fields, module:attribute and"
        " path/to/file.py:attribute"
    )
