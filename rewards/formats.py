"""`format`: whether a string is a date, an address and so on; the checks are jsonschema's, mended.

Checked are date, date-time, time, duration, email and idn-email (both ask for an @ only), hostname,
idn-hostname, ipv4, ipv6, uri, uri-reference, uri-template, uuid, json-pointer,
relative-json-pointer, regex; other names say nothing.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

_LONGEST = 10_000  # characters; no date or address has more, and some checks are slow
_MAY_END_IN_A_NEWLINE = ("json-pointer", "relative-json-pointer", "regex")
_FORMATS = FormatChecker(())
_FORMATS.checkers = {
    name: check
    for name, check in Draft202012Validator.FORMAT_CHECKER.checkers.items()
    if name not in ("iri", "iri-reference")  # milliseconds for every character
}


def conforms(text: str, name: str) -> bool:
    """Whether a string is of a format; of one that is not checked every string is."""
    if name not in _FORMATS.checkers:
        return True
    try:
        # Some of the checks let a newline pass at the end where there must be none.
        return (
            len(text) <= _LONGEST
            and (not text.endswith("\n") or name in _MAY_END_IN_A_NEWLINE)
            and _FORMATS.conforms(text, name)
        )
    except Exception:  # and some let out what their parsers raise
        return False


# The library's own let through digits of any script, signs, underscores in a uuid, decimals in a
# duration; refuse 100 as a pointer; and warn of what they compile.
_HEX = "[0-9a-fA-F]"
_UUID = re.compile(rf"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}")
_RELATIVE_JSON_POINTER = re.compile(r"(0|[1-9][0-9]*)(#|(/([^~/]|~[01])*)*)")
_DAYS = "[0-9]+D"
_MONTHS = f"[0-9]+M({_DAYS})?"
_SECONDS = "[0-9]+S"
_MINUTES = f"[0-9]+M({_SECONDS})?"
_DATE = f"({_DAYS}|{_MONTHS}|[0-9]+Y({_MONTHS})?)"
_TIME = f"T({_SECONDS}|{_MINUTES}|[0-9]+H({_MINUTES})?)"
_DURATION = re.compile(f"P({_DATE}({_TIME})?|{_TIME}|[0-9]+W)")  # RFC 3339, appendix A


def _is_hostname(text: Any) -> bool:
    return text.isascii() and bool(_is_hostname_in_any_script(text))


def _is_regex(text: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        re.compile(text)  # raises, which `conforms` takes for a no
    return True


def _is_like(pattern: re.Pattern[str]) -> tuple[Callable[[Any], bool], tuple[()]]:
    return (lambda text: pattern.fullmatch(text) is not None), ()


_is_hostname_in_any_script, _ = _FORMATS.checkers["hostname"]
_FORMATS.checkers |= {
    "duration": _is_like(_DURATION),
    "hostname": (_is_hostname, ValueError),
    "regex": (_is_regex, ()),
    "relative-json-pointer": _is_like(_RELATIVE_JSON_POINTER),
    "uuid": _is_like(_UUID),
}
