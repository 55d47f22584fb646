"""The C library's heaps: few, so that a long run does not grow."""

import ctypes
from contextlib import suppress

_M_ARENA_MAX = -8  # of glibc's malloc.h
_HEAPS = 2


def limit_heaps() -> None:
    """Lets glibc keep two heaps in place of eight a processor; elsewhere nothing.

    Each thread that saves a checkpoint may get a heap of its own, and what is left of its arrays
    there is not given back: about 2.4 MB more after each save of the default run.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)
