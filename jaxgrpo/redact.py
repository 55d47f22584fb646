r"""What leaves a run, on the terminal and in its files: no secrets, and nothing but what it shows.

A secret is the value of an environment variable whose name speaks of a token, key, secret or
password. A completion, a file name or an error may hold anything, escape sequences for the terminal
too; what does more than show itself is shown as Python would write it: `\x1b`.
"""

import functools
import json
import os
import re
from collections.abc import Iterable
from typing import Any

Forms = tuple[tuple[str, str], ...]  # what is written, and the variable that it is the value of

_NAMES = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST = 8  # characters; less would be found in words
# Printable to Unicode, but nothing to see: joiners, fillers, variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def redact(text: str) -> str:
    """The text with every secret, also as JSON and Python would write it, replaced by its name.

    A part of a secret is not known to be one: redact before you cut.
    """
    return _replace(text, _forms(_secrets()))


def harmless(text: str) -> str:
    """The text with everything but newlines and what shows itself as escapes.

    So terminals see no control sequences, no marks that turn the direction of writing, no invisible
    characters; and any encoding of Unicode can write it, because halves of surrogate pairs go too.
    """
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(
        c if c == "\n" or (c.isprintable() and not _INVISIBLE.match(c)) else ascii(c)[1:-1]
        for c in text
    )


def printable(text: str, limit: int = 200) -> str:
    r"""Untrusted text as one harmless line, redacted and cut to `limit` characters.

    >>> print(printable("\x1b[31mred\nand more", limit=8))
    \x1b[31mred ... (17 characters)
    """
    text = redact(text)
    shown = harmless(text[:limit]).replace("\n", "\\n")
    return shown + (f" ... ({len(text)} characters)" if len(text) > limit else "")


def redacted(value: Any) -> Any:
    """A JSON value with its strings redacted; the digits of a number are no secret."""
    return _redacted(value, _forms(_secrets()))


def json_lines(values: Iterable[Any], indent: int | None = None) -> str:
    """Values as JSON, a line each if not indented, in ASCII without control characters, redacted.

    Raises:
      ValueError: a number is not finite.
    """
    lines = (json.dumps(v, allow_nan=False, indent=indent) + "\n" for v in redacted([*values]))
    return "".join(lines).replace("\x7f", "\\u007f")


def _redacted(value: Any, forms: Forms) -> Any:
    if isinstance(value, str):
        return _replace(value, forms)
    if isinstance(value, dict):
        return {_replace(key, forms): _redacted(item, forms) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, forms) for item in value]
    return value


def _replace(text: str, forms: Forms) -> str:
    for form, name in forms:
        text = text.replace(form, f"[{name}]")
    return text


def is_secret(name: str) -> bool:
    """Whether the value of an environment variable of that name is taken for a secret."""
    return bool(_NAMES.search(name))


def _secrets() -> Forms:
    """Value and name of each, as the environment is now: a reward may have set it."""
    return tuple(
        (value.strip(), name)
        for name, value in os.environ.items()
        if is_secret(name)
        and len(value.strip()) >= _SHORTEST
        and not os.path.exists(value)  # TOKENIZER_PATH
    )


@functools.lru_cache(maxsize=1)
def _forms(secrets: Forms) -> Forms:
    """Every way in which a secret is written, the longest first, and its name."""
    forms = {
        form: name
        for value, name in secrets
        for form in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            repr(value)[1:-1],
            ascii(value)[1:-1],
        )
    }
    return tuple(sorted(forms.items(), key=lambda item: -len(item[0])))
