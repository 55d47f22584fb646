"""Says where a run hangs: the stacks of all threads, when a phase takes far longer than ever."""

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FAR_LONGER = 10  # times the longest of a phase so far


class Watchdog:
    """Watches over phases by name.

    Args:
      file: takes the stacks; made when the first phase is late.
      least: seconds that any phase may take.
      say: takes a line that says so.
    """

    def __init__(self, file: Path, least: float, say: Callable[[str], None]):
        self._file = file
        self._least = least
        self._say = say
        self._longest: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Watches over a `with` block, not inside another."""
        limit = max(self._least, _FAR_LONGER * self._longest.get(phase, 0.0))
        timer = threading.Timer(limit, self._bark, (phase, limit))
        timer.daemon = True
        timer.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            timer.cancel()
            spent = time.perf_counter() - start
            self._longest[phase] = max(self._longest.get(phase, 0.0), spent)

    def _bark(self, phase: str, limit: float) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {phase} for {limit:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._say(
            f"the phase {phase!r} has taken {limit:.0f} s, far longer than before; where it is"
            f" stands in {self._file}"
        )
