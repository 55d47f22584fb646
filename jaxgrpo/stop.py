"""SIGTERM and Ctrl-C end a run where nothing is lost; a second one ends it at once.

Python runs its own signal handlers between two of the main thread's bytecodes, so not while a
program compiles or a collective waits. Here a thread hears of a signal whatever the others do.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_S = 0.3  # signals that come closer are one: timeout(1) sends its own twice
_SHOW_CURSOR = "\x1b[?25h"  # the live display has hidden it


class Stopped(BaseException):
    """The run was told to stop, and stands where it may.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, where: str = "stopped"):
        super().__init__(f"{signal.Signals(number).name}: {where}")
        self.number = number


class StopSignals:
    """Listens for SIGTERM and SIGINT inside a `with` block, in the main thread.

    A signal ends the process at once with exit code 128 + its number; inside of `deferred` the
    first one only sets `received`.

    Attributes:
      received: number of the first signal, None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False

    def __enter__(self) -> "StopSignals":
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._listener.join()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the process lives on after a first signal, to end where nothing is lost.

        Raises:
          Stopped: on leaving without an exception, if there was one.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Stopped(self.received)

    def _listen(self, pipe: int) -> None:
        first = 0.0
        with os.fdopen(pipe, "rb", buffering=0) as signals:
            while heard := signals.read(1):
                if heard[0] not in _SIGNALS:  # some other handler's
                    continue
                name = signal.Signals(heard[0]).name
                if self.received is not None:
                    if time.monotonic() < first + _ONE_S:
                        continue
                    _say(f"{name} again: stopped at once")
                    _exit(128 + heard[0])
                if not self._deferred:
                    _say(f"{name}: stopped; there was nothing to save")
                    _exit(128 + heard[0])
                self.received, first = heard[0], time.monotonic()
                # By sys.stderr, because a live table would draw over what it does not know of.
                print(f"{name}: saving, then stopping; another one stops at once", file=sys.stderr)


def _say(line: str) -> None:
    # Past sys.stderr, which the live table may have taken or another thread may hold. The table
    # leaves the cursor at the end of its last line.
    start = "" if sys.stderr is sys.__stderr__ else "\n"
    os.write(2, f"{start}{line}\n".encode())


def _exit(code: int) -> None:
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(1, _SHOW_CURSOR.encode())
    os._exit(code)
