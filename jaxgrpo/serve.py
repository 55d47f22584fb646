"""A model behind OpenAI's chat API, to try it with the clients that there are.

python -m jaxgrpo.serve HF_DIR|RUN_DIR [--port N]
"""

import ipaddress
import logging
import signal
import socket
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

import tyro

from jaxgrpo.chat import ChatConfig, open_chat
from jaxgrpo.cli import parse, run_main, say
from jaxgrpo.redact import harmless, redact
from jaxgrpo.stop import Stopped

_GRACE_S = 30  # for requests under way when the server is told to stop


@dataclass(frozen=True)
class Arguments:
    """Serves a model on OpenAI's chat API: to try it and evaluate it, not to many users."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hugging Face directory, or a run directory, whose newest checkpoint is then meant."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication."""
    port: int = 8000
    """0 is one that is free."""
    chat: tyro.conf.OmitArgPrefixes[ChatConfig] = field(default_factory=ChatConfig)


def main() -> None:
    """The command."""
    args: Arguments = parse(Arguments, prog="python -m jaxgrpo.serve")
    try:
        import uvicorn

        from jaxgrpo.chat_app import make_app
    except ModuleNotFoundError as error:
        raise ValueError(f"serving takes {error.name}: pip install 'jaxgrpo[serve]'") from error
    for name in ("max_tokens", "max_prompt_tokens", "batch"):
        value = getattr(args.chat, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    signal.signal(signal.SIGTERM, _stop)
    log = logging.StreamHandler()
    log.setFormatter(_HarmlessFormatter())
    logging.getLogger("uvicorn").addHandler(log)
    logging.getLogger("uvicorn").propagate = False
    with _bind(args.host, args.port) as listener, open_chat(args.model, args.chat) as chat:
        # Now, so that a client which waits for the line gets through.
        listener.listen()
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            say(f"no authentication: whoever reaches {host} port {port} can use the model")
        shown = f"[{host}]" if ":" in host else host
        say(f"{chat.name} at http://{shown}:{port}/v1; Ctrl-C ends it")
        config = uvicorn.Config(
            make_app(chat),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        # Raises the signal that ended it again when what has come is answered.
        uvicorn.Server(config).run(sockets=[listener])


class _HarmlessFormatter(logging.Formatter):
    """What a server logs of a bug, without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(redact(super().format(record)))


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


def _bind(host: str, port: int) -> socket.socket:
    """A socket with that address, before the model takes its time; nobody gets through yet.

    Raises:
      ValueError: there is no such address, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; it must be from 0 to 65535")
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror}; name another --port"
        ) from error
    return listener


if __name__ == "__main__":
    run_main(main)
