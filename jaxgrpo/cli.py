"""How every command ends: with an exit code that scripts can trust, and one line on a mistake."""

import contextlib
import io
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro

from jaxgrpo.redact import harmless, printable, redact
from jaxgrpo.stop import Stopped

_LONGEST = 2000  # characters of a message


def run_main(main: Callable[[], object]) -> NoReturn:
    """Runs a command and exits: 0 when it is done, 2 on a user's mistake, 128 + n by signal n.

    A user's mistake is what this package reports as a `ValueError`, or an `OSError` (no such file,
    no permission, disk full): one line on stderr. Any other exception is a bug and keeps its
    traceback; with `JAXGRPO_TRACEBACK=1` in the environment all do.
    """
    keep_compiled_programs()
    sys.excepthook = _report_bug
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters
    try:
        main()
    except (Stopped, KeyboardInterrupt, ValueError, OSError) as error:
        code, text = explain(error)
        if code == 1:
            raise
        print(text, file=sys.stderr)
        sys.exit(code)
    sys.exit(0)


def say(text: str = "") -> None:
    """Prints lines for people, without secrets and control characters."""
    print(harmless(redact(text)))


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an exception, and what stderr is told; 1 and the traceback for a bug.

    The text has no secrets and, but for the newlines of a traceback, no control characters.
    """
    if isinstance(error, Stopped):
        return 128 + error.number, harmless(redact(str(error)))
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, ValueError | OSError) and os.environ.get("JAXGRPO_TRACEBACK") != "1":
        return 2, "error: " + printable(" ".join(redact(str(error)).split()), _LONGEST)
    return 1, harmless(redact("".join(traceback.format_exception(error)).rstrip()))


def _report_bug(_: object, error: BaseException, __: object) -> None:
    print(explain(error)[1], file=sys.stderr)


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache directory: the next run starts at once.

    Where `JAX_COMPILATION_CACHE_DIR` is set, JAX uses that; `JAX_ENABLE_COMPILATION_CACHE=false`
    turns it off. Entries are keyed by the program, its options, the devices and jaxlib.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
        # A run has dozens of small programs beside its few large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cache_dir() -> Path:
    """Where this package keeps, for the user, what it can make again."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jaxgrpo"


def parse(*args: Any, **kwargs: Any) -> Any:
    """`tyro.cli`, with one line in place of its box on a mistake.

    Raises:
      ValueError: the command line is at fault.
      SystemExit: with code 0, after `--help`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(*args, **kwargs)
    except SystemExit as end:
        if not end.code:
            raise
        # A title in the frame, what is wrong, a rule, advice.
        _, *lines = (
            line.strip("\u2502\u256d\u256e\u2570\u256f\u2500 ")
            for line in said.getvalue().splitlines()
        )
        raise ValueError(" ".join(itertools.takewhile(bool, lines))) from None
