"""Problems: read from JSON lines, drawn in an order that keeps no state, packed for the engine.

Shape letters: P problems in a batch, L prefix length.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgrpo.json_file import unique
from jaxgrpo.rewards.strict_json import with_decimals
from jaxgrpo.tokenizer import ChatTokenizer
from jaxgrpo.types import Problem, Prompts


class Frame(NamedTuple):
    """What every prompt has beside the row's own messages.

    Attributes:
      system: the system message, in place of the row's own; None leaves those.
      turns: of a user and the model, before the row's first user message.
    """

    system: str | None
    turns: tuple[dict[str, str], ...]

    def around(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The messages of a prompt."""
        if self.system is not None:
            users = [message for message in messages if message["role"] == "user"]
            messages = [{"role": "system", "content": self.system}, *users]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        return [*messages[:first], *self.turns, *messages[first:]]


NO_FRAME = Frame(None, ())


def load_problems(
    path: str | Path,
    tokenizer: ChatTokenizer | None,
    max_prompt_tokens: int,
    check_schema: Callable[[dict[str, Any], str], None] | None = None,
    frame: Frame = NO_FRAME,
) -> list[Problem]:
    """Reads a data file whole, or says what is wrong with it and where.

    A line is an object with `messages` (roles system and user, a user's last) and optionally
    `ground_truth` (an object), `schema` (an object) and `id` (a string or an integer, its own).
    Other keys stay in the row for reward functions. Blank lines do not count.

    Args:
      path: JSON lines in UTF-8.
      tokenizer: renders and encodes the messages; without one problems have no prompt.
      max_prompt_tokens: the longest prompt accepted.
      check_schema: called with a row's own schema and its `file:line`; raises ValueError.
      frame: what every prompt has beside the row's own messages.

    Raises:
      ValueError: the file or a line is not as above, or prompts are too long.
    """
    problems: dict[int, Problem] = {}  # by line
    for number, problem in read_lines(path, tokenizer, check_schema, frame):
        if isinstance(problem, ValueError):
            raise problem
        problems[number] = problem
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    check_lengths(path, problems, max_prompt_tokens)
    return [*problems.values()]


def read_lines(
    path: str | Path,
    tokenizer: ChatTokenizer | None,
    check_schema: Callable[[dict[str, Any], str], None] | None = None,
    frame: Frame = NO_FRAME,
) -> Iterator[tuple[int, Problem | ValueError]]:
    """Each line that is not blank: its number from 1, and its problem or what is wrong with it.

    Arguments as of `load_problems`; the errors begin with `file:line`.

    Raises:
      ValueError: the file cannot be read.
    """
    line_of_id: dict[str, int] = {}
    for place, (number, line) in enumerate(_lines(path)):
        try:
            problem = _problem(place, parse_row(line), tokenizer, frame)
            if (first := line_of_id.setdefault(problem.id, number)) != number:
                raise ValueError(f"id {problem.id!r} is that of line {first} already")
        except ValueError as error:
            yield number, ValueError(f"{path}:{number}: {error}")
        else:
            yield number, _with_schema_checked(problem, check_schema, f"{path}:{number}")


def read_frame(system: str, examples: str) -> Frame:
    """Reads what every prompt has beside the row's own messages.

    Args:
      system: text file, whose last newline does not count; empty for none.
      examples: file of JSON lines as of `load_problems`, each with `ground_truth`; empty for none.

    Raises:
      ValueError: a file cannot be read, or is none of these.
    """
    return Frame(_read_system(system) if system else None, _read_examples(examples))


def _read_system(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"cannot read system message {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
    if not text.strip():
        raise ValueError(f"{path}: no system message in it; write one, or do not name the file")
    return text


def _read_examples(path: str) -> tuple[dict[str, str], ...]:
    turns: list[dict[str, str]] = []
    for number, line in _lines(path) if path else ():
        try:
            row = parse_row(line)
            turns += [message for message in messages_of(row) if message["role"] == "user"]
            if not _object(row, "ground_truth"):
                raise ValueError("no ground_truth, which is the answer that an example shows")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        answer = json.dumps(row["ground_truth"], ensure_ascii=False)
        turns.append({"role": "assistant", "content": answer})
    if path and not turns:
        raise ValueError(f"{path}: no examples in it; write some, or do not name the file")
    return tuple(turns)


def check_lengths(path: str | Path, problems: Mapping[int, Problem], max_tokens: int) -> None:
    """Refuses prompts that are too long.

    Args:
      path: of the file, to name in the error.
      problems: by line.
      max_tokens: the longest prompt accepted.

    Raises:
      ValueError: there are some; how many, the longest, and where the first are.
    """
    too_long = {n: len(p.prompt) for n, p in problems.items() if len(p.prompt) > max_tokens}
    if too_long:
        first, *_ = too_long
        where = ", ".join(map(str, [*too_long][:5]))
        raise ValueError(
            f"{path}:{first}: the prompt has {too_long[first]} tokens; in all {len(too_long)} of"
            f" {len(problems)} prompts are longer than {max_tokens}, the longest"
            f" {max(too_long.values())}"
            f" (lines {where}{', ...' if len(too_long) > 5 else ''}):"
            " raise max_prompt_tokens or take them out"
        )


def problem_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` problems in an epoch, a function of its arguments alone.

    Sorts the raw output of a bit generator, which NumPy promises never to change; `permutation` it
    does not.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")


def draw(
    problems: Sequence[Problem], position: int, count: int, seed: int
) -> list[tuple[int, Problem]]:
    """The problems at `position`, `position + 1`, ... of an endless series of epochs.

    Args:
      problems: all n of a file; each comes once in an epoch.
      position: how many were drawn before.
      count: how many to draw, at least 1; may exceed an epoch.
      seed: of the order.

    Returns:
      `count` pairs of the problem and, before it, a number that no other position has: epoch * n +
      its place in `problems`. It names the random keys of the problem's completions.
    """
    n = len(problems)
    first, last = position // n, (position + count - 1) // n
    series = np.concatenate(
        [epoch * n + problem_order(n, seed, epoch) for epoch in range(first, last + 1)]
    )
    start = position - first * n
    return [(int(key), problems[key % n]) for key in series[start : start + count]]


def bucket_for(length: int, longest: int) -> int:
    """The padded length of a batch of prefixes; few, because each is compiled for.

    Buckets are powers of two and one and a half times those, from 32 tokens or a 32nd of the
    largest, whichever is more: at most eleven. At most a third of one is padding, but for the
    smallest.

    Args:
      length: tokens of the longest prefix in the batch.
      longest: the limit for all prefixes, at least 1; rounded up to 32s it caps the bucket.
    """
    assert 0 <= length <= longest
    largest = 1 << (longest - 1).bit_length()
    bucket = max(32, largest // 32)
    while bucket < length:
        bucket += bucket // 2 if bucket.bit_count() == 1 else bucket // 3
    return min(bucket, -(-longest // 32) * 32)


def pack_prompts(problems: Sequence[Problem], bucket: int) -> Prompts:
    """Splits prompts into prefixes, padded with 0 to `[P, bucket]`, and last tokens; int32."""
    prefix_len_P = np.array([len(problem.prompt) - 1 for problem in problems], np.int32)
    prefix_PL = np.zeros((len(problems), bucket), np.int32)
    for row_L, length, problem in zip(prefix_PL, prefix_len_P, problems, strict=True):
        row_L[:length] = problem.prompt[:-1]
    last_P = np.array([problem.prompt[-1] for problem in problems], np.int32)
    return Prompts(prefix_PL, prefix_len_P, last_P)


def _with_schema_checked(
    problem: Problem, check_schema: Callable[[dict[str, Any], str], None] | None, where: str
) -> Problem | ValueError:
    if check_schema is not None and "schema" in problem.row:
        try:
            check_schema(problem.row["schema"], where)
        except ValueError as error:
            return error
    return problem


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, by their numbers from 1."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read data file {path}: {error.strerror}") from error
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _problem(
    number: int, row: dict[str, Any], tokenizer: ChatTokenizer | None, frame: Frame
) -> Problem:
    row["messages"] = frame.around(messages_of(row))  # so that rewards see what the model sees
    for key in ("ground_truth", "schema"):
        _object(row, key)
    name = row.get("id", number)
    if type(name) not in (str, int):
        raise ValueError("id is neither a string nor an integer; leave it out where there is none")
    with_decimals(row.get("ground_truth"))  # what answers are compared with must be comparable
    prompt = tokenizer.encode_chat(row["messages"]) if tokenizer else ()
    return Problem(number, str(name), tuple(prompt), row)


def messages_of(
    row: Mapping[str, Any], roles: Sequence[str] = ("system", "user")
) -> list[dict[str, str]]:
    """The messages of a row, a user's last.

    Raises:
      ValueError: it has none, or others than objects of `role`, one of `roles`, and `content`.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages: a list of objects with role and content is needed")
    for i, message in enumerate(messages, start=1):
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
        ):
            raise ValueError(f"message {i} is not an object of role and content, both strings")
        if message["role"] not in roles:
            raise ValueError(f"message {i} has role {message['role']!r}, not {' or '.join(roles)}")
    if messages[-1]["role"] != "user":
        raise ValueError("the last message is not a user's")
    return messages


def _object(row: dict[str, Any], key: str) -> dict[str, Any]:
    """The object that a row has under a key, or an empty one."""
    value = row.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object; leave it out where there is none")
    return value


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object that a line is.

    Raises:
      ValueError: it is none, has a key twice, or what Python reads and JSON does not have.
    """
    try:
        row = json.loads(
            line.decode(),
            object_pairs_hook=unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half a surrogate pair (\\ud800 to \\udfff)") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a number that JSON and a float can hold")
    return value
