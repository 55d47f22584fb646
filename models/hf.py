"""Hugging Face directories in and out: all files of one, and its model on any mesh.

`hf_config` has config.json, `tensor_files` the files of the weights; both ways follow the table in
`weights`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxgrpo.files import new_directory
from jaxgrpo.json_file import write_object
from jaxgrpo.models.hf_config import config_json, generation_config, read_config
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.models.tensor_files import (
    DTYPES,
    Tensor,
    all_finite,
    load_parameter,
    open_tensors,
    write_tensors,
)
from jaxgrpo.models.weights import WEIGHTS, entries, weight_of
from jaxgrpo.sharding import FSDP, Rules, param_shardings


def load_hf(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    remat: Literal["none", "dots", "full"] = "none",
    unroll: bool = False,
    attention: Literal["xla", "cudnn"] = "xla",
    rules: Rules = FSDP,
) -> Qwen3:
    """Loads a Qwen3, Qwen2 or Llama from a Hugging Face directory.

    The part of a parameter that a device is to hold is read from the files by itself; the host
    never holds more than one such part (of all layers) and one tensor of it.

    Args:
      path: directory with config.json and model.safetensors, or else model.safetensors.index.json
        and the files that it names.
      mesh: devices to divide the parameters over (`jaxgrpo.sharding`); one device if not given.
      dtype: of the parameters, whatever the files have.
      compute_dtype: of the forward pass; `dtype` if not given.
      remat: see `Qwen3Config`.
      unroll: see `Qwen3Config`.
      attention: see `Qwen3Config`.
      rules: how the mesh divides the parameters.

    Returns:
      The model. Every tensor of the files is used exactly once, but for an `lm_head.weight` in
      the files of a tied model: it must be the embedding again, and is left out.

    Raises:
      ValueError: what `read_config` refuses; a file that is missing, broken or outside of the
        directory; a tensor that is missing, unknown, in two files, or of another shape or kind
        of number; an axis that the mesh does not divide.
    """
    path = Path(path)
    config = dataclasses.replace(
        read_config(path),
        dtype=dtype if compute_dtype is None else compute_dtype,
        remat=remat,
        unroll=unroll,
        attention=attention,
        rules=rules,
    )
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    if mesh is None:
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one_device, model)
    else:
        shardings = param_shardings(model, mesh, rules)
    with contextlib.ExitStack() as files:
        _check_tensors(path, open_tensors(path, files), model)

    def load(keys: tuple, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        # The files are mapped anew for each parameter, so that what was read of them for the last
        # one does not stay in this process's memory.
        with contextlib.ExitStack() as files:
            tensors = open_tensors(path, files)
            return load_parameter(weight_of(keys), tensors, leaf.shape, sharding, dtype)

    return jax.tree_util.tree_map_with_path(load, model, shardings)


def check_weights(path: str | Path) -> None:
    """Looks whether the files have just the tensors of config.json's model; reads none of them.

    But for a second embedding in the files of a tied model. Arguments and errors as of `load_hf`.
    """
    config = read_config(path)
    with contextlib.ExitStack() as files:
        model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
        _check_tensors(Path(path), open_tensors(Path(path), files), model)


def _check_tensors(path: Path, tensors: dict[str, Tensor], model: Qwen3) -> None:
    """Raises ValueError unless the files have just the tensors of this (abstract) model."""
    layers = model.config.layers
    if layers > len(tensors):  # before a billion of them are named
        raise ValueError(
            f"{path}: tensors are missing: config.json has {layers} layers, the files"
            f" {len(tensors)} tensors"
        )
    shapes = {entry.name: entry.shape for entry in entries(model)}
    head, embed = WEIGHTS["lm_head"].name, WEIGHTS["embed"].name
    repeated = model.config.tied and head in tensors
    if repeated:
        shapes[head] = shapes[embed]
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, such as {missing[0]}")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{tensor.file}: {name} is unknown to a {model.config.family}")
        if tensor.data.get_dtype() not in DTYPES:
            raise ValueError(f"{tensor.file}: {name} is {tensor.data.get_dtype()}, not a float")
        if tuple(tensor.data.get_shape()) != shapes[name]:
            raise ValueError(
                f"{tensor.file}: {name} has shape {tuple(tensor.data.get_shape())},"
                f" by config.json {shapes[name]}"
            )
    if repeated and not _equal(tensors[head].data, tensors[embed].data):
        raise ValueError(f"{tensors[head].file}: {head} differs from {embed} in a tied model")


def _equal(a: Any, b: Any, rows: int = 4096) -> bool:
    """Whether two tensors in files are the same, a few rows at a time."""
    end = a.get_shape()[0]
    parts = (slice(i, min(i + rows, end)) for i in range(0, end, rows))
    return all(np.array_equal(a[part], b[part]) for part in parts)


def model_from(config: Qwen3Config, tensor: Callable[[str], np.ndarray]) -> Qwen3:
    """A model in float32 on one device, of tensors from elsewhere.

    Args:
      config: of the model.
      tensor: gives the tensor of a name, as a Hugging Face directory would have it.

    Raises:
      ValueError: a tensor has another shape, or numbers that are not finite.
    """
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))

    def build(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        weight = weight_of(keys)
        layer_shape = leaf.shape[weight.stacked :]
        whole = tuple(slice(n) for n in layer_shape)
        layers = np.empty(leaf.shape if weight.stacked else (1, *leaf.shape), np.float32)
        for i, out in enumerate(layers):
            name = weight.name.format(i)
            found = tensor(name)
            if found.shape != weight.hf_shape(layer_shape):
                raise ValueError(
                    f"{name} has shape {found.shape}, not {weight.hf_shape(layer_shape)}"
                )
            if not all_finite(found):
                raise ValueError(f"{name} has NaN or infinity")
            out[...] = weight.from_hf(found, layer_shape, whole)
        return jnp.asarray(layers if weight.stacked else layers[0])

    return jax.tree_util.tree_map_with_path(build, model)


def export_hf(
    model: Qwen3,
    tokenizer: Any,
    path: str | Path,
    *,
    source: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Writes a Hugging Face directory that transformers, and so vLLM, loads.

    It appears under its name only when it is whole and on disk. Tensors keep the dtype of the
    parameters (`model.cast` rounds them first) and pass through the host one at a time.

    Args:
      model: on any devices of this process.
      tokenizer: from transformers; its files and chat template are saved too. May be None.
      path: must not exist, or be an empty directory.
      source: directory that the model was loaded from; its generation_config.json is kept. Without
        one, the tokenizer says which tokens begin, end and pad.
      shard_bytes: largest size of a safetensors file, as far as single tensors allow it.
      check: is called with the directory when all is written; if it raises, nothing is left.

    Raises:
      ValueError: there is something at `path`, or the model's switches are of no known family.
      OSError: it cannot be written; nothing is left.
    """
    generation = generation_config(tokenizer, source)
    config = config_json(model.config, model.embed.dtype.name, generation)
    with new_directory(path) as partial:
        write_object(partial / "config.json", config)
        if generation:
            write_object(partial / "generation_config.json", generation)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial)
        write_tensors(partial, entries(model), shard_bytes)
        check(partial)


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:  # the library has no kind of its own for a full disk
        raise error if isinstance(error, OSError) else OSError(f"the tokenizer: {error}") from error
