"""How the processes of a run meet, what they tell each other, and how they end.

Each of them holds a TCP connection to process 0, over which pass lines of JSON. JAX's own runtime
does not do for this: it aborts a process whose coordinator does not answer, notices that another
has died by missing heartbeats only, and tells neither to Python, which cannot interrupt a
collective that waits for the dead. A connection that closes says it at once.
"""

import ipaddress
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

from jaxgrpo.cli import explain
from jaxgrpo.redact import harmless, redact

T = TypeVar("T")

LOST = 75  # exit code when a process is gone: EX_TEMPFAIL of sysexits.h, "try again"

_HELLO_S = 5  # for a process to say which it is, once connected
_GRACE_S = 2  # for an error's cause to arrive from elsewhere


class Place(NamedTuple):
    """Which process this is.

    Attributes:
      host: where process 0 listens.
      port: of it.
      processes: how many there are.
      process: the number of this one.
    """

    host: str
    port: int
    processes: int
    process: int


class Link:
    """The connections among the processes of a run: all of process 0's, else the one to it.

    A thread reads from each, so that the end of another process is noticed whatever this one does.

    Attributes:
      process: the number of this one.
      hosts: where each runs.
    """

    def __init__(self, process: int, hosts: Sequence[str], sockets: Mapping[int, socket.socket]):
        self.process = process
        self.hosts = hosts
        self.sockets = sockets
        self._inbox: dict[int, queue.SimpleQueue] = {peer: queue.SimpleQueue() for peer in sockets}
        self._failing = threading.Event()
        self._leaving = False
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._readers = [
            threading.Thread(target=self._read, args=(peer,), daemon=True) for peer in sockets
        ]
        for reader in self._readers:
            reader.start()

    def name(self, process: int) -> str:
        """What messages call a process."""
        return f"process {process} on {self.hosts[process]}"

    def exchange(self, value: Any) -> list[Any]:
        """Gives every process the values of all, in the order of processes."""
        if self.process:
            self._send(0, {"value": value})
            return self._inbox[0].get()
        values = [value, *(self._inbox[peer].get() for peer in sorted(self.sockets))]
        for peer in self.sockets:
            self._send(peer, {"value": values})
        return json.loads(json.dumps(values))  # as the others get them

    def leave(self) -> None:
        """Returns when all processes are done; from then on each may go."""
        self.exchange(None)
        self._leaving = True

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of what this one raises."""
        code, text = explain(error)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C need not wait
        self._failing.set()
        # Whatever fails where another process is gone, fails because of that; reading ends this
        # process meanwhile.
        time.sleep(_GRACE_S)
        if self.process == 0:
            self._end(code, text)
        is_bug = code == 1
        if is_bug:
            _say(f"{self.name(self.process)}:\n{text}")
        self._send(0, {"failed": [code, text.splitlines()[-1]]})
        self._readers[0].join(4 * _GRACE_S)
        if not is_bug:
            _say(f"{self.name(self.process)}: {text}")
        os._exit(code)

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        # If it is gone, the thread that reads from it says so.
        with suppress(OSError), self._sending:
            self.sockets[peer].sendall(json.dumps(message).encode() + b"\n")

    def _read(self, peer: int) -> None:
        with suppress(OSError), self.sockets[peer].makefile("rb") as lines:
            for line in lines:
                self._take(peer, json.loads(line))
        if not self._leaving:
            role = ", the coordinator," if peer == 0 else ""
            self._end(
                LOST,
                f"error: {self.name(peer)}{role} is gone: the same command, on all processes, goes"
                " on from the last checkpoint",
                tell=True,
            )

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        [(kind, value)] = message.items()
        if kind == "value":
            self._inbox[peer].put(value)
        elif kind == "failed" and not self._failing.wait(_GRACE_S):
            code, text = value
            self._end(code, f"error: {self.name(peer)}: {text.removeprefix('error: ')}")
        elif kind == "end":
            code, text = value
            if text:
                _say(f"{self.name(self.process)}: {text}")
            os._exit(code)

    def _end(self, code: int, text: str, tell: bool = False) -> NoReturn:
        """Says why, on process 0 and, if they are to `tell`, on the others; ends all."""
        self._ending.acquire()  # by the first thread, for good: this process ends here
        if self.process:
            _say(f"{self.name(self.process)}: {text}")
            os._exit(code)
        _say(text)
        for peer in self.sockets:
            self._send(peer, {"end": [code, text if tell else ""]})
        # JAX aborts processes that find its coordinator gone: it goes last.
        deadline = time.monotonic() + _GRACE_S
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join(max(0.0, deadline - time.monotonic()))
        os._exit(code)


def meet(place: Place, bind: str, timeout: int) -> Link:
    """Connects this process with process 0, and that one with all.

    Args:
      place: which it is.
      bind: address that process 0 listens on; if empty, the coordinator's.
      timeout: seconds that they wait for each other.

    Raises:
      ValueError: process 0 is not reached, others do not come, or it must not listen there.
      SystemExit: process 0 says why this one cannot join.
    """
    deadline = time.monotonic() + timeout
    if place.process:
        return _visit(place, timeout, deadline)
    address = bind or _own_address(place.host, deadline)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, place.port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on {address} port {place.port}: {error.strerror}: name"
            " another cluster.coordinator"
        ) from error
    with listener:
        return _host(listener, place, timeout, deadline)


def _host(listener: socket.socket, place: Place, timeout: int, deadline: float) -> Link:
    """Process 0's side of the meeting."""
    hosts = {0: socket.gethostname()}
    sockets: dict[int, socket.socket] = {}

    def tell_all(message: dict[str, Any]) -> None:
        for each in sockets.values():
            with suppress(OSError):  # gone again; who reads from it will see
                each.sendall(json.dumps(message).encode() + b"\n")

    def refuse(text: str) -> NoReturn:
        tell_all({"refused": True})
        raise ValueError(text)

    while len(hosts) < place.processes:
        try:
            listener.settimeout(max(0.0, deadline - time.monotonic()))
            guest, _ = listener.accept()
        except OSError:
            missing = ", ".join(str(i) for i in range(place.processes) if i not in hosts)
            refuse(
                f"of {place.processes} processes these did not come to process 0 at"
                f" {place.host}:{place.port} within {timeout} s: {missing}; start them, raise"
                " cluster.timeout, or set cluster.processes alone to 1"
            )
        try:
            hello = _receive(guest, _HELLO_S)
            process, processes, host = (hello[key] for key in ("process", "processes", "host"))
        except (OSError, ValueError, KeyError, TypeError):
            guest.close()  # somebody else
            continue
        if process in hosts or processes != place.processes:
            sockets[-1] = guest
            refuse(
                f"{host} came as process {process} of {processes}, but process 0 knows"
                f" {place.processes} and has met {sorted(hosts)}: give each its own cluster.process"
                " and all the same cluster.processes"
            )
        hosts[process] = host
        sockets[process] = guest
    names = [hosts[process] for process in range(place.processes)]
    tell_all({"hosts": names})
    for each in sockets.values():
        _keep(each)
    return Link(0, names, sockets)


def _visit(place: Place, timeout: int, deadline: float) -> Link:
    """The side of all others."""
    where = f"process 0 at {place.host}:{place.port}"
    try:
        connection = connect(place.host, place.port, deadline)
    except OSError as error:
        raise ValueError(
            f"process {place.process} cannot reach {where} within {timeout} s"
            f" ({error.strerror or error}): is that one running, and is this its address?"
        ) from error
    hello = {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
    }
    try:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        # Process 0 may have started later, and waits as long for the others.
        answer = _receive(connection, timeout + _HELLO_S)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"process {place.process} has reached {where}, which does not answer: is it the"
            " coordinator of this run?"
        ) from error
    if "refused" in answer:
        raise SystemExit(2)  # process 0 says why
    _keep(connection)
    return Link(place.process, answer["hosts"], {0: connection})


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connects, trying until the deadline.

    Raises:
      OSError: why it did not work the last time.
    """

    def attempt() -> socket.socket:
        left = max(0.1, deadline - time.monotonic())
        return socket.create_connection((host, port), timeout=left)

    return _retry(attempt, deadline)


def _own_address(host: str, deadline: float) -> str:
    """The coordinator's address, if it is one to listen on without being told so."""
    try:  # a cluster may not know the name of a new pod at once
        found = _retry(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), deadline)
    except OSError as error:
        raise ValueError(
            f"cluster.coordinator: {host} is no known host ({error.strerror})"
        ) from error
    address = found[0][4][0]
    ip = ipaddress.ip_address(str(address).partition("%")[0])
    if ip.is_global or ip.is_unspecified or ip.is_multicast:
        raise ValueError(
            f"cluster.coordinator {host} is {ip}, which is neither a loopback nor a private"
            " address: whoever reaches it could join the run; name one that is, or set cluster.bind"
            " to the address to listen on"
        )
    return str(address)


def _retry(f: Callable[[], T], deadline: float) -> T:
    """Tries until the deadline.

    Raises:
      OSError: why it did not work the last time.
    """
    while True:
        try:
            return f()
        except OSError:
            if time.monotonic() + 0.2 > deadline:
                raise
            time.sleep(0.2)


def _receive(connection: socket.socket, seconds: float) -> Any:
    """A first line of JSON, byte by byte: what follows it is for somebody else."""
    connection.settimeout(seconds)
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 2**16:
            raise ValueError("not a line")
        line += byte
    return json.loads(line)


def _keep(connection: socket.socket) -> None:
    """Lets a connection live until one of its ends is gone; a machine that is off, for 30 s."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 30_000),
    ):
        if hasattr(socket, option):  # not all systems have all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _say(text: str) -> None:
    # Past Python's own buffer, which another thread may hold.
    os.write(2, harmless(redact(text.rstrip("\n"))).encode() + b"\n")
