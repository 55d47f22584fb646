"""What a look at machine, data and rewards found: a line for each check."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from jaxgrpo.redact import printable

_LONGEST = 1000  # characters of a line


class Finding(NamedTuple):
    """The outcome of a check.

    Attributes:
      mark: `ok`; `no`, and then the text says what to do; `--` where the check does not apply.
      text: what was found; may quote anything.
    """

    mark: Literal["ok", "no", "--"]
    text: str

    def line(self) -> str:
        """As one harmless line."""
        return f"{self.mark}  {printable(' '.join(self.text.split()), _LONGEST)}"


def ok(text: str) -> Finding:
    """All is well."""
    return Finding("ok", text)


def no(text: object) -> Finding:
    """Something is wrong; the text, or the error's, says what to do."""
    return Finding("no", str(text))


def skipped(text: str) -> Finding:
    """There is nothing to check, or no way to."""
    return Finding("--", text)


def of(what: str, check: Callable[[], object]) -> Iterator[Finding]:
    """A check that raises where something is wrong."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield no(error)
    else:
        yield ok(what)
