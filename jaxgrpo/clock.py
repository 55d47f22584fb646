"""Where the time goes: seconds by phase, and compilations."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax


class Clock:
    """Adds up seconds by name until they are taken.

    Work inside a phase must end in it: wait for arrays (`jax.block_until_ready`) before leaving.

    Args:
      before: called before each phase; what it raises keeps the phase from starting.
      watch: a context manager for each phase, made from its name.
    """

    def __init__(
        self,
        before: Callable[[], None] = lambda: None,
        watch: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._seconds: dict[str, float] = {}
        self._before = before
        self._watch = watch

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a `with` block."""
        self._before()
        start = time.perf_counter()
        try:
            with self._watch(phase):
                yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Compilations:
    """Counts the programs that XLA has compiled in this process since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
