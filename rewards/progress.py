"""How far a worker is, in memory that it shares with the pool: without a message for each step."""

import mmap
import time

BYTES = mmap.PAGESIZE


class Progress:
    """The place, in all that a worker was ever sent, of what it is at, and since when.

    Args:
      file: descriptor of a file of `BYTES` bytes.
    """

    def __init__(self, file: int):
        self._memory = mmap.mmap(file, BYTES)
        # An item of eight bytes in its place is written and read at one go.
        with memoryview(self._memory) as view:
            self._places, self._times = view.cast("q"), view.cast("d")

    def begin(self, place: int) -> None:
        """Notes that a completion is begun."""
        self._places[0] = place
        self._times[1] = time.monotonic()

    def read(self) -> tuple[float, int]:
        """When it was begun, by a clock that all processes share, and its place."""
        return self._times[1], self._places[0]

    def close(self) -> None:
        """Lets go of the memory."""
        self._places.release()
        self._times.release()
        self._memory.close()
