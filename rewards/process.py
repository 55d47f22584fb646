"""One worker process as the pool sees it: started, spoken to without waiting, killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any

from jaxgrpo.rewards.progress import BYTES, Progress

_LONGEST_LINE = 1 << 20  # bytes; answers are far shorter
_READ = 1 << 16
_ENDING_S = 0.5  # seconds between the end of a process' output and its own
_COMMAND = (
    "import json, sys; sys.path[:], progress = json.loads(sys.argv.pop());"
    " from jaxgrpo.rewards.worker import main; main(progress)"
)
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Process:
    """A process that runs `jaxgrpo.rewards.worker`.

    Args:
      setup: the first line that it is sent.
      printed: file that takes its stderr, and with it all that rewards print.

    Attributes:
      requests: file descriptor to write to it; does not block.
      answers: file descriptor to read from.
      unsent: what it is still to be sent.
      progress: see there; what it begins with is to be loaded.
    """

    def __init__(self, setup: bytes, printed: IO[bytes]):
        path = [entry or os.getcwd() for entry in sys.path]
        with tempfile.TemporaryFile() as shared:
            shared.truncate(BYTES)
            self.progress = Progress(shared.fileno())
            self.progress.begin(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, json.dumps([path, shared.fileno()])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                pass_fds=[shared.fileno()],
                # Ctrl-C is for the run; and what a reward starts is killed with it.
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = self._process.stdin, self._process.stdout
        self.requests, self.answers = (pipe.fileno() for pipe in self._pipes)
        os.set_blocking(self.requests, False)
        self.unsent, self._received = setup, b""

    def send(self) -> None:
        """Sends as much of what is unsent as the pipe takes now."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.requests, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has ended, and the end of its answers says so
            self.unsent = b""

    def receive(self) -> list[Any] | None:
        """The answers that have come; None at their end, or if what comes is no answer."""
        data = os.read(self.answers, _READ)
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _LONGEST_LINE:
            return None
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None

    def kill(self) -> None:
        """Ends it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self.progress.close()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ended(self) -> int | None:
        """Its exit code, or minus the signal that it died of; None if it does not end."""
        try:
            return self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            return None
