"""A JSON Schema as a reward: does the text parse, does it meet the schema, and if not, why.

Reasons are those of `strict_json.ParseError` for a text that does not parse, `valid`, and else the
keyword that fails and the JSON pointer of the place: `type@/amount`, `required@/vendor` (the key
that is missing), `additionalProperties@/note`, `minItems@/items`. Of several failures it is the
first in the order in which the schema is written. `false` stands for a schema that is just that,
`too_deep` for a value that leads the validator into deeper recursion than Python has.

The dialect is draft 2020-12 as `validator`, `keywords` and `formats` have it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxgrpo.rewards.graded import grade
from jaxgrpo.rewards.strict_json import ParseError, loads, parse_answer
from jaxgrpo.rewards.validator import pointer, validator_of
from jaxgrpo.types import Verdict


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
        self._validator = validator_of(schema)

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
        validator = validator_of(row["schema"]) if row and "schema" in row else self._validator
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
        score = 0.5 if self.scale == "ladder" else grade(validator, value)
        path = pointer(failure.absolute_path)
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
        validator_of(schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
