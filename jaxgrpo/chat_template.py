"""Chat templates, rendered where they can do no harm: in Jinja's sandbox, in a process of its own.

A template is a program by whoever made the model. The sandbox keeps it from files and from Python's
internals, but not from a string of a terabyte or a loop without end. So another process renders,
under the system's own limits of memory and time, and ends where a template exceeds them.
"""

import atexit
import datetime
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

MAX_CHARS = 1 << 24  # of one rendered chat
SECONDS = 10.0  # of processor time for one chat
_MEMORY = 1 << 30  # bytes of address space, of which Python itself takes 25 million
_LONGEST_ERROR = 1000  # characters

_lock = threading.Lock()
_renderer: subprocess.Popen[bytes] | None = None


def render(template: str, values: Mapping[str, Any]) -> str:
    """Renders a template as transformers does.

    Args:
      template: Jinja's language with `break`, `continue`, `generation`, `tojson`, `strftime_now`
        and `raise_exception`, as transformers has them. A template that asks for the date with
        `strftime_now` renders otherwise tomorrow.
      values: what it is given, by name; JSON.

    Raises:
      ValueError: the template cannot be compiled, fails, or takes too much; one line.
    """
    request = {
        "template": template,
        "values": values,
        "chars": MAX_CHARS,
        "seconds": SECONDS,
    }
    with _lock:
        process = _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # its answer is not to be taken for the next one's
            _stop()
            raise
        if not answer:
            # SIGPROF, which ends it in time, or no memory even to say so.
            _stop()
            raise ValueError(
                f"it takes more than {SECONDS:g} s, or {_MEMORY >> 30} GB of memory, for one chat"
            )
    kind, text = json.loads(answer)
    if kind == "error":
        raise ValueError(text)
    return text


def _start() -> subprocess.Popen[bytes]:
    """The process that renders, which ends when its input does, with this process."""
    global _renderer
    if _renderer is None or _renderer.poll() is not None:
        _stop()
        # -P: the modules beside this one, such as types.py, are not Python's own.
        command = [sys.executable, "-P", __file__]
        _renderer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    return _renderer


@atexit.register
def _stop() -> None:
    global _renderer
    if _renderer is not None:
        _renderer.kill()
        with suppress(BrokenPipeError):  # what was not written for it any more
            _renderer.communicate()
        _renderer = None


def _serve() -> None:
    """The other process: answers each line of JSON with one."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with suppress(ValueError):  # macOS has no such limit; that of time holds there too
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process
        try:
            answer = "text", _render(request)
        except MemoryError:
            answer = "error", f"it takes more than {_MEMORY >> 30} GB of memory for one chat"
        except Exception as error:  # a template is a program: anything may go wrong in it
            answer = "error", " ".join(str(error)[:_LONGEST_ERROR].split()) or type(error).__name__
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _render(request: Mapping[str, Any]) -> str:
    parts, chars = [], 0
    for part in _compile(request["template"]).generate(request["values"]):
        parts.append(part)
        chars += len(part)
        if chars > request["chars"]:
            raise ValueError(f"it renders more than {request['chars']} characters")
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The template in an environment like that of transformers."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model has said; here it is rendered like the rest."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Not Jinja's own, which writes < as an escape.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


if __name__ == "__main__":
    _serve()
