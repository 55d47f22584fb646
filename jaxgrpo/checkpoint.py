"""Checkpoints of a run: written in the background, whole or not there, restored on any mesh.

`RUN_DIR/checkpoints/STEP` is an Orbax checkpoint with a manifest of its files
(`jaxgrpo.manifest`). It has that name only once all of it is on the disk: then it is what was
saved, or it is damaged, and what is damaged is not restored.

Its arrays lie under the names of their places in the state (`model.layers.q`,
`opt_state.1.0.mu.layers.q`, `step`), so that they can be read by name without the classes that
wrote them. Of a model with adapters only these are kept (`model.q.a`).
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxgrpo import cluster
from jaxgrpo.config import Config
from jaxgrpo.config_file import load_config
from jaxgrpo.files import sync_dir
from jaxgrpo.manifest import check_manifest, write_manifest
from jaxgrpo.models import lora
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sharding import FSDP, Rules, param_shardings
from jaxgrpo.types import TrainState

T = TypeVar("T")

# Orbax's threads log pages about a failure that its caller is told anyway, in one line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in str(record.msg))

_STATE = "state"  # the checkpoint's one item
_UNFINISHED = ".unfinished"  # in the names of what is being written or removed
_QUIET_S = 0.5  # without a new file, after which a failed save is taken to have ended
_WRITERS_END_S = 10.0  # longer is not waited for it
_ROOM = 1.2  # times the bytes of the state that must be free before a save
_GOES_ON = (
    "the earlier steps are intact. Make room, be it by removing older steps, or mend the disk; the"
    " same command then goes on from the newest"
)


def room(nbytes: int) -> int:
    """Bytes that must be free before a state of that many is saved."""
    return math.ceil(_ROOM * nbytes)


class Checkpoints:
    """The checkpoints in a directory.

    As a context manager it waits, on leaving, for the save in progress.

    Args:
      directory: need not exist before the first save.
      keep: newest checkpoints kept by `save`; all of them if not given.
    """

    def __init__(self, directory: str | Path, keep: int | None = None):
        assert keep is None or keep >= 1
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._sound: set[int] = set()  # verified already

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif self._saving is not None:  # the other processes need not be here
            wait([self._saving])

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first, once the save in progress has ended.

        One of several processes that calls this alone must not have a save in progress: where
        another process has failed in it, that does not end.
        """
        if self._saving is not None:
            wait([self._saving])
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.steps(), default=None)

    def newest_sound(self, say: Callable[[str], None]) -> int | None:
        """The newest step that is what was saved, to the byte; None if there is none.

        Newer ones that are not are set aside, as `STEP.damaged`, and what killed saves left is
        removed: nothing else may save there meanwhile.

        Args:
          say: takes a line for each step that is set aside, which names the file at fault.

        Raises:
          OSError: the directory may not be read or written.
        """
        if self.directory.is_dir():
            self._remove_remains()
        for step in reversed(self.steps()):
            try:
                check_manifest(self.directory / str(step))
            except ValueError as error:
                say(f"{error}; step {step} is set aside as {self._set_aside(step)}")
            else:
                self._sound.add(step)
                return step
        return None

    def verify(self, step: int) -> None:
        """Compares all files of a step with their digests.

        Raises:
          ValueError: there is no such step, or it is damaged; names the first file at fault.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self.directory}: no checkpoint of step {step}; there are: {there}")
        if step in self._sound:
            return
        try:
            check_manifest(self.directory / str(step))
        except ValueError as error:
            raise ValueError(
                f"{error}: name another step where there is a --step, or run the training command"
                f" again, which sets step {step} aside and goes on from the one before"
            ) from error
        self._sound.add(step)

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], best: int | None = None
    ) -> None:
        """Starts a checkpoint, after the one before it is complete.

        On return the state may be donated and `data` changed: what they held is saved. In a run of
        several processes all must call this.

        Args:
          step: one without a checkpoint.
          state: kept bit for bit.
          data: of JSON's types; whatever else it takes to go on from here.
          best: a step that is kept beside the newest ones.

        Raises:
          ValueError: there is a checkpoint of this step, or a value of the state is not finite.
          OSError: there is no room; or the save before this one failed, or this one at once, and
            its remains are removed (by the next start, if process 0 did not fail). The earlier
            steps are as they were.
        """
        self.wait()
        arrays = _by_name(state)
        cluster.on_main(lambda: self._prepare(step, arrays))
        _check_finite(step, arrays)
        context = ocp.Context()
        # Else a directory that cannot be made leaves Orbax's writers waiting for it.
        context.asynchronous.create_directories_asynchronously = False
        try:
            with context, _without_late_callbacks():
                writing = ocp.save_async(
                    self._unfinished(step),
                    arrays,
                    checkpointable_name=_STATE,
                    custom_metadata=json.loads(json.dumps(data)),
                )
        except OSError as error:
            raise self._failed(step, error) from error
        self._saving = self._background.submit(self._complete, step, best, writing)

    def wait(self) -> None:
        """Returns when no save is in progress. In a run of several processes all must call this.

        Raises:
          OSError: the save failed; its remains are removed, the earlier steps are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()
        cluster.gather(lambda: None)  # now process 0 has named the step

    def data(self, step: int) -> dict[str, Any]:
        """The `data` that was saved with a step, without its arrays."""
        path = self.directory / str(step)
        return ocp.metadata(path, checkpointable_name=_STATE).custom_metadata

    def restore(self, step: int, abstract: T) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint straight into place.

        In a run of several processes all must call this.

        Args:
          step: one of `steps()`.
          abstract: the `TrainState`, or a dict of some of its fields, the only ones read then; as
            arrays or `jax.ShapeDtypeStruct`s with shardings (`abstract_on`), which may be of
            another mesh than the one saved from.

        Returns:
          What `abstract` describes, and the `data` saved with it.

        Raises:
          ValueError: there is no such step, it is damaged, or its arrays have other names, shapes
            or dtypes.
        """
        cluster.on_main(lambda: self.verify(step))
        path = self.directory / str(step)
        metadata = ocp.metadata(path, checkpointable_name=_STATE)
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in _by_name(abstract).items()
        }
        _check_arrays(path, metadata.metadata, wanted)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            found = ocp.load(path, wanted, checkpointable_name=_STATE)
        restored = jax.tree.unflatten(
            jax.tree.structure(abstract), [found[name] for name in wanted]
        )
        return restored, metadata.custom_metadata

    def _unfinished(self, step: int) -> Path:
        return self.directory / f"{step}{_UNFINISHED}"

    def _prepare(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Makes the directory ready for a step."""
        if step in self.steps():
            raise ValueError(f"{self.directory}: there is a checkpoint of step {step} already")
        self.directory.mkdir(parents=True, exist_ok=True)
        sync_dir(self.directory.parent)
        self._remove_remains()
        needed = room(sum(x.nbytes for x in arrays.values()))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"{self.directory}: no room for the checkpoint of step {step}: it needs"
                f" {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; {_GOES_ON}"
            )

    def _complete(self, step: int, best: int | None, writing: ocp.AsyncResponse[None]) -> None:
        """Gives a checkpoint its name once all its files are written; in the background."""
        with _without_late_callbacks():
            try:
                writing.result()  # of all processes
                if not cluster.is_main():
                    return
                write_manifest(self._unfinished(step))
                self._unfinished(step).rename(self.directory / str(step))
                sync_dir(self.directory)
            except Exception as error:  # the libraries below Orbax have many kinds for a full disk
                raise self._failed(step, error) from error
        self._prune(best)

    def _failed(self, step: int, error: Exception) -> OSError:
        """Removes what a failed save has left, and says what to do."""
        if cluster.is_main():
            self._remove_until_quiet()
        return OSError(
            f"{self.directory}: the checkpoint of step {step} could not be written"
            f" ({_reason(error)}); {_GOES_ON}"
        )

    def _prune(self, best: int | None) -> None:
        """Removes all checkpoints but the newest and the best."""
        complete = sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())
        for step in complete[: -self._keep] if self._keep else ():
            if step != best:
                # Renamed first: a half-removed checkpoint must not be taken for one.
                (self.directory / str(step)).rename(self._unfinished(step))
        self._remove_remains()

    def _remove_until_quiet(self) -> None:
        """Removes remains until no new ones come: the first failure does not end all writers."""
        now = quiet_since = time.monotonic()
        end = now + _WRITERS_END_S
        while now < min(end, quiet_since + _QUIET_S):
            if self._remove_remains():
                quiet_since = now
            time.sleep(_QUIET_S / 10)
            now = time.monotonic()

    def _remove_remains(self) -> bool:
        """Removes what is left of saves that did not end; whether there was anything."""
        found = list(self.directory.glob(f"*{_UNFINISHED}*"))
        for remains in found:
            shutil.rmtree(remains, ignore_errors=True)  # next time, if it is still written to
        return bool(found)

    def _set_aside(self, step: int) -> str:
        """Takes a step's number from it, and returns its new name."""
        names = (f"{step}.damaged{i}" for i in itertools.chain([""], itertools.count(2)))
        name = next(name for name in names if not os.path.lexists(self.directory / name))
        (self.directory / str(step)).rename(self.directory / name)
        sync_dir(self.directory)
        return name


@contextmanager
def _without_late_callbacks() -> Iterator[None]:
    """Keeps back what Python prints of writes that end when their save has failed already."""
    hook = sys.unraisablehook

    def show(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = show
    try:
        yield
    finally:
        sys.unraisablehook = hook


def abstract_on(tree: Any, mesh: Mesh | None = None, rules: Rules = FSDP) -> Any:
    """What `Checkpoints.restore` needs to know of a state, or of a part of it.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`.
      mesh: devices to divide them over (`jaxgrpo.sharding`); one device if not given.
      rules: how.

    Returns:
      The same pytree of `jax.ShapeDtypeStruct`s with shardings.
    """
    if mesh is None:
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one_device, tree)
    else:
        shardings = param_shardings(tree, mesh, rules)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def load_run_model(
    run_dir: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    *,
    compute_dtype: Any = None,
    rules: Rules = FSDP,
) -> tuple[Qwen3, Config, int]:
    """The model that a run has trained, without its optimiser state; adapted if it has adapters.

    Args:
      run_dir: has config.toml and checkpoints.
      step: one of its checkpoints; the newest if not given.
      mesh: devices to divide the parameters over; one device if not given.
      compute_dtype: of the forward pass; the run's if not given.
      rules: how the mesh divides the parameters.

    Returns:
      The model, the run's configuration and the step.

    Raises:
      ValueError: what `load_run_trained` raises.
    """
    trained, config, step = load_run_trained(
        run_dir, step, mesh, compute_dtype=compute_dtype, rules=rules
    )
    if not config.lora.rank:
        return trained, config, step
    frozen = load_hf(
        config.model.path,
        mesh,
        compute_dtype=compute_dtype or jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        rules=rules,
    )
    return lora.join(trained, frozen), config, step


def load_run_trained(
    run_dir: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    *,
    compute_dtype: Any = None,
    rules: Rules = FSDP,
) -> tuple[Any, Config, int]:
    """What a run has trained: its model, or its adapters alone.

    Args:
      run_dir: and the others, see `load_run_model`.
      step: see there.
      mesh: see there.
      compute_dtype: see there.
      rules: see there.

    Returns:
      The first part of `lora.split`, the run's configuration and the step.

    Raises:
      ValueError: no such run, no such checkpoint, one that is damaged, or one of another model
        than `model.path`.
    """
    file = Path(run_dir) / "config.toml"
    if not file.is_file():
        raise ValueError(f"{run_dir}: no such run directory (it would have a config.toml)")
    config = load_config(file)
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints")
    if step is None:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{run_dir}: has no checkpoint yet")
    shape = dataclasses.replace(
        read_config(config.model.path),
        dtype=jnp.dtype(config.model.dtype if compute_dtype is None else compute_dtype),
        remat=config.model.remat,
        rules=rules,
    )
    model = jax.eval_shape(
        lambda: lora.adapt(Qwen3(shape, nnx.Rngs(0)), config.lora, jax.random.key(0))
    )
    trained, _ = lora.split(model)
    restored, _ = checkpoints.restore(step, {"model": abstract_on(trained, mesh, rules)})
    return restored["model"], config, step


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree under their dotted paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        # An nnx.Param is a node above its array; its key is no part of the name.
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in leaves
    }


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


def _check_finite(step: int, arrays: dict[str, jax.Array]) -> None:
    """Raises ValueError with the name of the first array that holds NaN or infinity."""
    finite = jax.device_get(_all_finite(arrays))
    for name in arrays:
        if not finite[name]:
            raise ValueError(
                f"step {step} is not saved: {name} holds a value that is not finite. The earlier"
                " steps are intact; lower update.lr, and the same command goes on from there"
            )


def _reason(error: Exception) -> str:
    """What the system says of a failed save, in its own words where they are found."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().partition("\n")[0]
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text


def _check_arrays(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError unless the fields that are wanted hold just the arrays that are wanted."""
    fields = {name.partition(".")[0] for name in wanted}
    names = {name for name in stored if name.partition(".")[0] in fields} | wanted.keys()
    differ = []
    for name in sorted(names):
        there, here = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "absent"
            for tree in (stored, wanted)
        )
        if there != here:
            differ.append(f"{name} is {there} in it and {here} here")
    if differ:
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise ValueError(f"{path}: is of another model or optimiser: {differ[0]}{more}")
