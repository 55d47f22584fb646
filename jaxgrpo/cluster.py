"""Many processes as one run: how they meet, what they tell each other, and how they end.

`jax.distributed` connects their devices. The rest goes over a TCP connection from each process to
process 0, in lines of JSON: JAX aborts a process whose coordinator does not answer, notices that
another has died by missing heartbeats only, and tells neither to Python, which cannot interrupt a
collective that waits for the dead. A connection that closes says it at once.

With one process nothing here does anything.
"""

import ipaddress
import json
import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax

from jaxgrpo.cli import explain
from jaxgrpo.config import ClusterConfig

T = TypeVar("T")

LOST = 75  # exit code when a process is gone: EX_TEMPFAIL of sysexits.h, "try again"

_HELLO_S = 5  # for a process to say which it is, once connected
_GRACE_S = 2  # for an error's cause to arrive from elsewhere
_START_S = 60  # for JAX to connect processes that are all there
_HEARTBEAT_S = 60  # without one JAX gives up a process that is there and does nothing

# With one of these from Slurm, Open MPI or Kubernetes this may be one of several processes.
_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX")


class _Place(NamedTuple):
    host: str
    port: int
    processes: int
    process: int


@contextmanager
def join(config: ClusterConfig) -> Iterator[None]:
    """Makes this process one of a run's, before anything touches JAX's devices.

    With several processes an exception that leaves the `with` block ends all of them: process 0
    says why, once, and none returns from here.

    Raises:
      ValueError: the settings are at fault, or the processes do not find each other in time.
    """
    global _link
    place = _place(config)
    if place is None:
        yield
        return
    _link = _meet(place, config)
    if not is_main():
        os.dup2(2, 1)  # what libraries and rewards print is kept apart from what the run says
    try:
        _start_jax(_link, config)
        yield
        _link.leave()
    except BaseException as error:
        _link.fail(error)


def count() -> int:
    """How many processes the run has."""
    return len(_link.hosts) if _link else 1


def index() -> int:
    """This one's number, from 0."""
    return _link.process if _link else 0


def is_main() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return index() == 0


def gather(f: Callable[[], T]) -> list[T]:
    """Runs `f` on every process, and gives every process all results, in the order of processes.

    Args:
      f: returns what JSON can hold.

    Raises:
      ValueError: on every process, if `f` raises it or an `OSError` on any of them.
    """
    if _link is None:
        return [f()]
    try:
        outcome: list[Any] = [f(), None]
    except (ValueError, OSError) as error:
        outcome = [None, str(error)]
    outcomes = _link.exchange(outcome)
    for process, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise ValueError(failure if process == 0 else f"{_link.name(process)}: {failure}")
    return [value for value, _ in outcomes]


def on_main(f: Callable[[], T]) -> T:
    """Runs `f` on process 0 alone, and gives every process its result; errors as in `gather`."""
    return gather(lambda: f() if is_main() else None)[0]  # type: ignore[return-value]


def divided(f: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """`f` of each item, on every process; of n processes, i computes items i, i + n, ...

    Args:
      f: returns what JSON can hold.
      items: the same on all processes.

    Raises:
      ValueError: as in `gather`.
    """
    n = count()
    parts = gather(lambda: [f(item) for item in items[index() :: n]])
    return [parts[k % n][k // n] for k in range(len(items))]


def check_same(values: Mapping[str, Any]) -> None:
    """Every process must hold the same.

    Args:
      values: of JSON's types, by the name that the message calls them by.

    Raises:
      ValueError: on every process, with the first that differs.
    """
    first, *others = gather(lambda: dict(values))
    for process, other in enumerate(others, start=1):
        for name in first:
            if first[name] != other[name]:
                assert _link is not None
                raise ValueError(
                    f"{name} is {first[name]!r} on {_link.name(0)} and {other[name]!r} on"
                    f" {_link.name(process)}: start all processes alike"
                )


class _Link:
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
        self._ending = threading.Lock()
        self._readers = [
            threading.Thread(target=self._read, args=(peer,), daemon=True) for peer in sockets
        ]
        for reader in self._readers:
            reader.start()

    def name(self, process: int) -> str:
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
        with suppress(OSError):  # it is gone: the thread that reads from it says so
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


_link: _Link | None = None


def _say(text: str) -> None:
    # Past Python's own buffer, which another thread may hold.
    os.write(2, text.rstrip("\n").encode() + b"\n")


def _place(config: ClusterConfig) -> _Place | None:
    """Which process of how many this is, and where process 0 listens; None alone."""
    if (config.coordinator, config.processes, config.process) == ("", 0, -1):
        found = _detect(config)
    elif (config.coordinator, config.processes, config.process) == ("", 1, -1):
        found = None
    else:
        found = config.coordinator, config.processes, config.process
    if found is None:
        return None
    address, processes, process = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"cluster.coordinator is {address!r}; with cluster.processes and cluster.process it"
            " must be HOST:PORT, where process 0 listens"
        )
    if not 0 <= process < processes:
        raise ValueError(
            f"cluster.process is {process} and cluster.processes is {processes}; with"
            " cluster.coordinator they must be this process' number, counted from 0, and how many"
            " there are"
        )
    return _Place(host.strip("[]"), int(port), processes, process) if processes > 1 else None


def _detect(config: ClusterConfig) -> tuple[str, int, int] | None:
    """What the variables of a cluster say, as JAX reads them."""
    name = next((name for name in _VARIABLES if name in os.environ), None)
    if name is None:
        return None
    from jax._src.clusters import ClusterEnv  # JAX offers it only as a part of `initialize`

    try:
        with warnings.catch_warnings(action="ignore"):  # kubernetes is not installed
            address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, [], None, config.timeout
            )
        assert address is not None, (
            "no such cluster; for Kubernetes the package kubernetes is needed"
        )
        assert processes is not None
        assert process is not None
    except Exception as error:
        raise ValueError(
            f"{name} is set, but which process of how many this is cannot be found out ({error}):"
            " set cluster.coordinator, cluster.processes and cluster.process, or cluster.processes"
            " alone to 1"
        ) from error
    return address, processes, process


def _meet(place: _Place, config: ClusterConfig) -> _Link:
    """Connects this process with process 0, and that one with all."""
    deadline = time.monotonic() + config.timeout
    if place.process:
        return _visit(place, config.timeout, deadline)
    address = config.bind or _own_address(place.host, deadline)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, place.port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on {address} port {place.port}: {error.strerror}: name"
            " another cluster.coordinator"
        ) from error
    with listener:
        return _host(listener, place, config.timeout, deadline)


def _host(listener: socket.socket, place: _Place, timeout: int, deadline: float) -> _Link:
    """Process 0's side of the meeting."""
    hosts = {0: socket.gethostname()}
    sockets: dict[int, socket.socket] = {}

    def refuse(text: str) -> NoReturn:
        for each in sockets.values():
            each.sendall(b'{"refused": true}\n')
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
    for each in sockets.values():
        each.sendall(json.dumps({"hosts": names}).encode() + b"\n")
        _keep(each)
    return _Link(0, names, sockets)


def _visit(place: _Place, timeout: int, deadline: float) -> _Link:
    """The side of all others."""
    where = f"process 0 at {place.host}:{place.port}"
    try:
        connection = _connect(place.host, place.port, deadline)
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
    return _Link(place.process, answer["hosts"], {0: connection})


def _start_jax(link: _Link, config: ClusterConfig) -> None:
    """Connects the devices; JAX's own coordinator listens on the same address, on a free port."""

    def listening() -> list[Any]:
        address = next(iter(link.sockets.values())).getsockname()[0]
        return [address, _free_port(address)]

    address, port = on_main(listening)
    if link.process:
        # JAX would abort the process if it cannot get there.
        _connect(address, port, time.monotonic() + config.timeout).close()
    bracketed = f"[{address}]" if ":" in address else address
    # It would keep SIGTERM to itself, by which clusters and people stop a run.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would ask a proxy of the environment for the way to the coordinator, and wait for it.
    os.environ["no_grpc_proxy"] = address
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        f"{bracketed}:{port}",
        len(link.hosts),
        link.process,
        cluster_detection_method="deactivate",
        initialization_timeout=_START_S,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_START_S,
        coordinator_bind_address=f"{bracketed}:{port}",
    )


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


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    def connect() -> socket.socket:
        left = max(0.1, deadline - time.monotonic())
        return socket.create_connection((host, port), timeout=left)

    return _retry(connect, deadline)


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


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as probe:
        return probe.getsockname()[1]
