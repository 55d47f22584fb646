"""The rewards of a run by their names in the configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgrpo.rewards.base import RewardFn, WeightedRewards, load_reward
from jaxgrpo.rewards.fields import field_accuracy
from jaxgrpo.rewards.json_schema import SchemaReward


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
