"""Checkpoints of a run: written in the background, whole or not there, restored on any mesh.

`RUN_DIR/checkpoints/STEP` is an Orbax checkpoint. Its arrays lie under the names of their places in
the state (`model.layers.q`, `opt_state.1.0.mu.layers.q`, `step`), so that they can be read by name
without the classes that wrote them. Of a model with adapters only these are kept (`model.q.a`).
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxgrpo.config import Config
from jaxgrpo.config_file import load_config
from jaxgrpo.models import lora
from jaxgrpo.models.hf import load_hf, read_config
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sharding import FSDP, Rules, param_shardings
from jaxgrpo.types import TrainState

T = TypeVar("T")

_STATE = "state"  # the checkpoint's one item
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax calls a step until its files are complete


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
        self._saving: ocp.AsyncResponse[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.steps(), default=None)

    def newest_sound(self, say: Callable[[str], None]) -> int | None:
        """The newest step that can be restored, None if there is none."""
        return self.latest()

    def data(self, step: int) -> dict[str, Any]:
        """The `data` that was saved with a step."""
        path = self.directory / str(step)
        return ocp.metadata(path, checkpointable_name=_STATE).custom_metadata

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
          ValueError: there is a checkpoint of this step.
          OSError: the save before this one failed; its remains are removed.
        """
        self.wait()
        if step in self.steps():
            raise ValueError(f"{self.directory}: there is a checkpoint of step {step} already")
        context = ocp.Context()
        # Else a directory that cannot be made leaves Orbax's writers waiting for it.
        context.asynchronous.create_directories_asynchronously = False
        with context:
            self._saving = ocp.save_async(
                self.directory / str(step),
                _by_name(state),
                checkpointable_name=_STATE,
                custom_metadata=json.loads(json.dumps(data)),
            )

    def wait(self) -> None:
        """Returns when no save is in progress, with only the newest `keep` checkpoints left.

        Raises:
          OSError: the save failed; its remains are removed.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        finally:
            if jax.process_index() == 0:
                self._tidy()

    def restore(self, step: int, abstract: T) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint straight into place.

        Args:
          step: one of `steps()`.
          abstract: the `TrainState`, or a dict of some of its fields, the only ones read then; as
            arrays or `jax.ShapeDtypeStruct`s with shardings (`abstract_on`), which may be of
            another mesh than the one saved from.

        Returns:
          What `abstract` describes, and the `data` saved with it.

        Raises:
          ValueError: there is no such step, or its arrays have other names, shapes or dtypes.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self.directory}: no checkpoint of step {step}; there are: {there}")
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

    def _tidy(self) -> None:
        """Removes what killed and failed saves left, and all but the newest checkpoints."""
        for step in self.steps()[: -self._keep] if self._keep else ():
            # Renamed first: a half-removed checkpoint must not be taken for one.
            (self.directory / str(step)).rename(self.directory / f"{step}{_UNFINISHED}")
        for remains in self.directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(remains, ignore_errors=True)  # next time, if a failed save still writes


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
      ValueError: no such run, no such checkpoint, or one of another model than `model.path`.
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
