"""Many processes as one run: what they do together, and what each does for all.

`jax.distributed` connects their devices, `jaxgrpo.link` the processes themselves. With one process
nothing here does anything.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from jaxgrpo.config import ClusterConfig
from jaxgrpo.link import Link, Place, connect, meet

T = TypeVar("T")
R = TypeVar("R")

_START_S = 60  # for JAX to connect processes that are all there
_HEARTBEAT_S = 60  # without one JAX gives up a process that is there and stands still

# With one of these from Slurm, Open MPI or Kubernetes this may be one of several processes.
_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX")

_link: Link | None = None


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
    _link = meet(place, config.bind, config.timeout)
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


def divided(f: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """`f` of all items, on every process; of n processes, i computes items i, i + n, ...

    Args:
      f: returns, for each item of a part of them, what JSON can hold.
      items: the same on all processes.

    Raises:
      ValueError: as in `gather`.
    """
    n = count()
    parts = gather(lambda: f(items[index() :: n]))
    return [parts[k % n][k // n] for k in range(len(items))]


def check_same(f: Callable[[], Mapping[str, Any]]) -> None:
    """Refuses to go on where processes differ.

    Args:
      f: returns what must be the same on all, of JSON's types, by the names that messages use.

    Raises:
      ValueError: on every process, with the first that differs; or as in `gather`.
    """
    if _link is None:
        return
    first, *others = gather(lambda: dict(f()))
    for process, other in enumerate(others, start=1):
        for name in first | other:
            here, there = first.get(name), other.get(name)
            if here != there:
                raise ValueError(
                    f"{name} is {here!r} on {_link.name(0)} and {there!r} on"
                    f" {_link.name(process)}: start all processes alike"
                )


def _place(config: ClusterConfig) -> Place | None:
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
    return Place(host.strip("[]"), int(port), processes, process) if processes > 1 else None


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


def _start_jax(link: Link, config: ClusterConfig) -> None:
    """Connects the devices; JAX's own coordinator listens on the same address, on a free port."""

    def listening() -> list[Any]:
        address = next(iter(link.sockets.values())).getsockname()[0]
        return [address, _free_port(address)]

    address, port = on_main(listening)
    if link.process:
        # JAX would abort the process if it cannot get there.
        connect(address, port, time.monotonic() + config.timeout).close()
    bracketed = f"[{address}]" if ":" in address else address
    # It would keep SIGTERM to itself, by which clusters and people stop a run.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would ask a proxy of the environment for the way to the coordinator, and wait for it.
    os.environ["no_grpc_proxy"] = address  # noqa: SIM112
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


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as probe:
        return probe.getsockname()[1]
