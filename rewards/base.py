"""What a reward is, where it comes from, and the weighted sum of several."""

import functools
import importlib
import importlib.util
import math
import reprlib
import sys
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

_LARGEST = 1e30  # float32 holds more, but sums of it are taken


class RewardFn(Protocol):
    """Any function that scores a completion."""

    def __call__(self, completion: str, row: dict[str, Any], /) -> float:
        """The reward.

        Args:
          completion: what the model wrote.
          row: the problem's whole line of the data file.
        """
        ...


class RewardError(ValueError):
    """A reward that gives a completion no score.

    Attributes:
      reason: `exception` or `no_number`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class WeightedRewards:
    """The weighted sum of several rewards.

    Attributes:
      terms: name, reward and weight of each.
    """

    terms: Sequence[tuple[str, RewardFn, float]]

    def __call__(self, completion: str, row: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """The weighted sum, and each reward's own value by its name.

        Raises:
          RewardError: a reward raises, or returns no finite number; True and False are 1 and 0.
        """
        values = {name: _value(name, reward, completion, row) for name, reward, _ in self.terms}
        total = sum(weight * values[name] for name, _, weight in self.terms)
        if abs(total) > _LARGEST:
            message = f"the rewards add up to {total:g}, too much for float32: {values}"
            raise RewardError("no_number", message)
        return total, values


def load_reward(spec: str, base_dir: str | Path) -> RewardFn:
    """Imports a reward.

    Args:
      spec: `module:attribute` or `path/to/file.py:attribute`.
      base_dir: where a relative path starts.

    Raises:
      ValueError: one line that says what is missing, or what the import raises and where.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"reward {spec!r} is neither module:attribute nor file.py:attribute")
    path = Path(base_dir, source)
    if source.endswith(".py") and not path.is_file():
        raise ValueError(f"reward {spec!r}: there is no file {path}")
    try:
        is_file = source.endswith(".py")
        module = _import_file(path.resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {spec!r} cannot be imported: {describe(error)}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {spec!r}: there is no {attribute} in {source}")
    reward = getattr(module, attribute)
    if not callable(reward):
        raise ValueError(f"reward {spec!r} is {reprlib.repr(reward)}, not a function")
    return reward


@functools.cache  # a file is run once, however many rewards it holds
def _import_file(path: Path) -> ModuleType:
    # What the file defines looks itself up in sys.modules, and may stand beside what it imports.
    name = f"jaxgrpo_reward_{path.stem}_{zlib.crc32(bytes(path)):08x}"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException) -> str:
    """The error on one line with the place that raises it, if that is not the import itself."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    places = [
        f"{frame.filename}:{frame.lineno}: "
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and "<frozen" not in frame.filename
    ]
    return f"{(places or [''])[-1]}{type(error).__name__}: {' '.join(str(error).split())}"


def _value(name: str, reward: RewardFn, completion: str, row: dict[str, Any]) -> float:
    try:
        value = reward(completion, row)
    except MemoryError:  # it is of the whole process
        raise
    except Exception as error:
        raise RewardError("exception", f"reward {name!r} failed: {describe(error)}") from error
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # whatever its own __float__ raises
        number = math.nan
    if not math.isfinite(number):
        shown = " ".join(reprlib.repr(value).split())
        message = f"reward {name!r} returned {shown}, which is no finite number"
        raise RewardError("no_number", message)
    return number
