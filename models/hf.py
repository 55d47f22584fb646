"""Hugging Face directories in and out, by one table of names that is read both ways.

There a weight is one matrix `[out, in]` a layer. Here the layers are stacked, the heads are an axis
of their own, and matrices are `[in, out]`. `WEIGHTS` names both and spells out how their axes
correspond; the reader, which fetches only the part of a file that a device is to hold, and the
writer both follow it.
"""

import contextlib
import dataclasses
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from jaxgrpo.config import LoraConfig, LoraTarget
from jaxgrpo.files import new_directory
from jaxgrpo.json_file import check_regular, parse_object, read_object
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sharding import FSDP, Rules, param_shardings


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter here and its tensors there.

    Attributes:
      axes: of one layer here, a letter each: D model width, N query heads, K key/value heads,
        H head width, F feed-forward width, V vocabulary, R rank of an adapter.
      name: there; `{}` is the number of the layer, and stands where the parameter is a stack.
      hf_axes: of the tensor there; letters written together are one axis.
    """

    axes: str
    name: str
    hf_axes: str

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{}" in self.name

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of one layer of this shape here."""
        size = dict(zip(self.axes, shape, strict=True))
        return tuple(math.prod(size[a] for a in group) for group in self.hf_axes.split())

    def from_hf(self, tensor: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a layer of this shape; no other rows and columns are fetched."""
        size = dict(zip(self.axes, shape, strict=True))
        span = {a: slice(*s.indices(size[a])[:2]) for a, s in zip(self.axes, index, strict=True)}
        fetch, split, keep = [], [], []
        for group in self.hf_axes.split():
            first, rest = span[group[0]], group[1:]
            step = math.prod(size[a] for a in rest)
            fetch.append(slice(first.start * step, first.stop * step))
            split += [first.stop - first.start, *(size[a] for a in rest)]
            keep += [slice(None), *(span[a] for a in rest)]
        piece = tensor[tuple(fetch)].reshape(split)[tuple(keep)]
        return piece.transpose(np.argsort(self._order))

    def to_hf(self, layer: np.ndarray) -> np.ndarray:
        """A layer as the tensor there."""
        return np.ascontiguousarray(layer.transpose(self._order)).reshape(
            self.hf_shape(layer.shape)
        )

    @property
    def _order(self) -> list[int]:
        return [self.axes.index(a) for a in self.hf_axes.replace(" ", "")]


WEIGHTS = {
    "embed": Weight("VD", "model.embed_tokens.weight", "V D"),
    "layers.attn_norm": Weight("D", "model.layers.{}.input_layernorm.weight", "D"),
    "layers.q": Weight("DNH", "model.layers.{}.self_attn.q_proj.weight", "NH D"),
    "layers.k": Weight("DKH", "model.layers.{}.self_attn.k_proj.weight", "KH D"),
    "layers.v": Weight("DKH", "model.layers.{}.self_attn.v_proj.weight", "KH D"),
    "layers.q_bias": Weight("NH", "model.layers.{}.self_attn.q_proj.bias", "NH"),
    "layers.k_bias": Weight("KH", "model.layers.{}.self_attn.k_proj.bias", "KH"),
    "layers.v_bias": Weight("KH", "model.layers.{}.self_attn.v_proj.bias", "KH"),
    "layers.q_norm": Weight("H", "model.layers.{}.self_attn.q_norm.weight", "H"),
    "layers.k_norm": Weight("H", "model.layers.{}.self_attn.k_norm.weight", "H"),
    "layers.o": Weight("NHD", "model.layers.{}.self_attn.o_proj.weight", "D NH"),
    "layers.mlp_norm": Weight("D", "model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers.gate": Weight("DF", "model.layers.{}.mlp.gate_proj.weight", "F D"),
    "layers.up": Weight("DF", "model.layers.{}.mlp.up_proj.weight", "F D"),
    "layers.down": Weight("FD", "model.layers.{}.mlp.down_proj.weight", "D F"),
    "norm": Weight("D", "model.norm.weight", "D"),
    "lm_head": Weight("VD", "lm_head.weight", "V D"),
}


def _adapter(weight: Weight) -> dict[str, Weight]:
    """The two matrices of a weight's adapter, as PEFT names them."""
    outputs, inputs = weight.hf_axes.split()
    module = "base_model.model." + weight.name.removesuffix(".weight")
    return {
        "a": Weight(f"{inputs}R", f"{module}.lora_A.weight", f"R {inputs}"),
        "b": Weight(f"R{outputs}", f"{module}.lora_B.weight", f"{outputs} R"),
    }


WEIGHTS |= {
    f"{target}.{half}": matrix
    for target in get_args(LoraTarget)
    for half, matrix in _adapter(WEIGHTS[f"layers.{target}"]).items()
}

# Field of Qwen3Config -> field of config.json, a positive number.
SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
}

# model_type -> class in transformers, q/k norm, bias on q, k and v.
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", False, True),
    "llama": ("LlamaForCausalLM", False, False),
}

# What a field must say where it is there: anything else is another model.
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "rope_type": "default",
    "type": "default",  # what rope_type was called once
}

# Ids that config.json and generation_config.json both name.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# dtype in a safetensors header -> its name in JAX and in config.json.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_KINDS = {dict: "an object", list: "a list", bool: "true or false"}
_LARGEST_SIZE = 2**31 - 1  # of an axis
_LARGEST_HEADER = 100_000_000  # bytes, as the library has it
_AT_ONCE = 1 << 16  # numbers that are looked at together: they stay in a core's cache


class Tensor(NamedTuple):
    """A tensor in a file: indexing `data` reads that part of it."""

    file: Path
    data: Any


def read_config(path: str | Path) -> Qwen3Config:
    """Reads config.json as transformers 4 or 5 writes it.

    Args:
      path: a Hugging Face directory.

    Raises:
      ValueError: there is none, it is broken, or the model is not one that `Qwen3` computes
        (mixture of experts, scaled rotary positions, sliding window, quantised, ...).
    """
    file = Path(path) / "config.json"
    if not file.parent.is_dir():
        raise ValueError(
            f"{path}: no such directory; models are Hugging Face directories on disk"
            " (`hf download NAME --local-dir DIR` fetches one)"
        )
    hf = read_object(file)
    family = hf.get("model_type")
    if family not in [*FAMILIES]:  # a list, because it may be anything
        shown = reprlib.repr(family)
        raise ValueError(f"{file}: model_type {shown} is not supported, only {[*FAMILIES]}")
    _, qk_norm, qkv_bias = FAMILIES[family]
    if qkv_bias:
        hf.pop("attention_bias", None)  # a Qwen2 has its biases whatever this says

    def typed(name: str, kind: type, default: Any) -> Any:
        value = default if hf.get(name) is None else hf[name]
        if type(value) is not kind:
            raise ValueError(f"{file}: {name} is {reprlib.repr(value)}, not {_KINDS[kind]}")
        return value

    def positive(value: Any, name: str, kinds: Any = int) -> Any:
        largest = _LARGEST_SIZE if kinds is int else sys.float_info.max
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= largest:
            raise ValueError(
                f"{file}: {name} is {reprlib.repr(value)}, not a positive number"
                f" up to {largest:.4g}"
            )
        return value

    ropes = [hf, typed("rope_scaling", dict, {}), typed("rope_parameters", dict, {})]
    for fields in ropes:
        for name, plain in PLAIN.items():
            if fields.get(name) not in (None, plain):
                shown = reprlib.repr(fields[name])
                raise ValueError(f"{file}: {name} {shown} is not supported, only {plain!r}")
    if any(kind != "full_attention" for kind in typed("layer_types", list, [])):
        raise ValueError(f"{file}: layer_types other than 'full_attention' are not supported")
    # transformers would fall back to 10,000, which ruins every answer without a word.
    thetas = {
        float(positive(rope["rope_theta"], "rope_theta", (int, float)))
        for rope in ropes
        if rope.get("rope_theta") is not None
    }
    if len(thetas) != 1:
        raise ValueError(
            f"{file}: needs one rope_theta, by itself or in rope_parameters;"
            f" found {sorted(thetas) or 'none'}"
        )

    heads = positive(hf.get("num_attention_heads"), "num_attention_heads")
    defaults = {"num_key_value_heads": heads}
    if family != "qwen3":  # whose own default is 128, and which always says it
        defaults["head_dim"] = positive(hf.get("hidden_size"), "hidden_size") // heads
    found = {
        name: defaults.get(name) if hf.get(name) is None else hf[name] for name in SIZES.values()
    }
    sizes = {ours: positive(found[name], name) for ours, name in SIZES.items()}
    if heads % sizes["kv_heads"]:
        raise ValueError(f"{file}: num_attention_heads is no multiple of num_key_value_heads")
    if sizes["head_dim"] % 2:
        raise ValueError(
            f"{file}: head_dim {sizes['head_dim']} is odd; positions turn it in halves"
        )
    return Qwen3Config(
        **sizes,
        rope_theta=thetas.pop(),
        norm_eps=float(positive(hf.get("rms_norm_eps"), "rms_norm_eps", (int, float))),
        tied=typed("tie_word_embeddings", bool, False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        family=family,
    )


def check_weights(path: str | Path) -> None:
    """Looks whether the files have just the tensors of config.json's model; reads none of them.

    But for a second embedding in the files of a tied model. Arguments and errors as of `load_hf`.
    """
    config = read_config(path)
    with contextlib.ExitStack() as files:
        model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
        _check_tensors(Path(path), _open_tensors(Path(path), files), model)


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
        _check_tensors(path, _open_tensors(path, files), model)

    def load(keys: tuple, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        # The files are mapped anew for each parameter, so that what was read of them for the last
        # one does not stay in this process's memory.
        with contextlib.ExitStack() as files:
            tensors = _open_tensors(path, files)
            return _load(_weight(keys), tensors, leaf.shape, sharding, dtype)

    return jax.tree_util.tree_map_with_path(load, model, shardings)


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
        weight = _weight(keys)
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
            if not _all_finite(found):
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
    generation = _generation_config(tokenizer, source)
    config = _config_json(model, generation)
    with new_directory(path) as partial:
        _write_json(partial / "config.json", config)
        if generation:
            _write_json(partial / "generation_config.json", generation)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial)
        _write_tensors(partial, model, shard_bytes)
        check(partial)


def export_peft(
    adapters: Any,
    config: LoraConfig,
    path: str | Path,
    *,
    source: str | Path,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Writes adapters as a PEFT directory; like `export_hf`, whole or not at all.

    Args:
      adapters: of a model (`lora.split`).
      config: what they were made by.
      path: must not exist, or be an empty directory.
      source: the directory of the model that they belong to, named in adapter_config.json.
      check: see `export_hf`.

    Raises:
      ValueError: there is something at `path`.
      OSError: it cannot be written; nothing is left.
    """
    with new_directory(path) as partial:
        _write_json(
            partial / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(source),
                "r": config.rank,
                "lora_alpha": config.alpha,
                "target_modules": [
                    WEIGHTS[f"layers.{name}"].name.split(".")[-2] for name in config.targets
                ],
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )
        _write_safetensors(partial / "adapter_model.safetensors", [*_entries(adapters)])
        check(partial)


def load_peft(path: str | Path, adapters: Any) -> Any:
    """Reads what `export_peft` has written.

    Args:
      path: the directory.
      adapters: as they are expected, or abstract ones of the same shapes.

    Raises:
      ValueError: the file cannot be read, or has other tensors.
    """
    file = Path(path) / "adapter_model.safetensors"
    with contextlib.ExitStack() as files:
        tensors = _open_file(file, files)
        found = {name: tuple(tensor.data.get_shape()) for name, tensor in tensors.items()}
        if found != {entry.name: entry.shape for entry in _entries(adapters)}:
            raise ValueError(f"{file}: has other tensors than adapters of this kind")
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: _load(_weight(keys), tensors, leaf.shape, device, leaf.dtype),
            adapters,
        )


def _weight(keys: tuple) -> Weight:
    """The table's row for a leaf of a model, or of adapters."""
    return WEIGHTS[jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")]


class Entry(NamedTuple):
    """A tensor that a directory has for a model, and where in the model it is."""

    name: str
    weight: Weight
    parameter: Any
    layer: int

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.weight.hf_shape(self.parameter.shape[self.weight.stacked :])

    @property
    def nbytes(self) -> int:
        """In the file, with the dtype of the parameter."""
        return math.prod(self.shape) * self.parameter.dtype.itemsize

    def to_hf(self) -> np.ndarray:
        """The tensor, on the host."""
        layer = self.parameter
        if self.weight.stacked:
            layer = jax.lax.dynamic_index_in_dim(layer, self.layer, keepdims=False)
        return self.weight.to_hf(np.asarray(layer))


def _entries(tree: Any) -> Iterator[Entry]:
    """All tensors of a model or of adapters, which may be abstract."""
    for keys, parameter in jax.tree_util.tree_leaves_with_path(tree):
        weight = _weight(keys)
        for layer in range(parameter.shape[0] if weight.stacked else 1):
            yield Entry(weight.name.format(layer), weight, parameter, layer)


def _open_tensors(path: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """The tensors of a directory by name; none is read yet."""
    listed: dict[str, Any] = {}
    names = {"model.safetensors"}
    index = path / "model.safetensors.index.json"
    if not (path / "model.safetensors").is_file():  # the order in which transformers looks
        if not index.is_file():
            raise ValueError(f"{path}: has neither model.safetensors nor {index.name}")
        listed = read_object(index).get("weight_map") or {}
        if not isinstance(listed, dict):
            raise ValueError(f"{index}: weight_map is no object")
        for name in listed.values():
            if not (isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)):
                raise ValueError(
                    f"{index}: {reprlib.repr(name)} is no safetensors file of this directory"
                )
        names = set(listed.values())
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        for key, tensor in _open_file(path / name, files).items():
            if key in tensors:
                raise ValueError(f"{tensor.file}: {key} is in {tensors[key].file} too")
            tensors[key] = tensor
    for key in sorted(listed.keys() | tensors.keys()) if listed else ():
        found = tensors[key].file.name if key in tensors else None
        if listed.get(key) != found:
            raise ValueError(f"{index}: {key} is in {found}, listed in {listed.get(key)}")
    return tensors


def _open_file(file: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    _check_header(file)
    try:
        opened = files.enter_context(safe_open(file, framework="np"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return {key: Tensor(file, opened.get_slice(key)) for key in opened.keys()}  # noqa: SIM118


def _check_header(file: Path) -> None:
    """Refuses what the library would not: no regular file, or a tensor that is named twice."""
    check_regular(file, largest=sys.maxsize)
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"{file}: cannot be read: its header would have {size} bytes")
        parse_object(opened.read(size), f"{file}: its header")


def _check_tensors(path: Path, tensors: dict[str, Tensor], model: Qwen3) -> None:
    """Raises ValueError unless the files have just the tensors of this (abstract) model."""
    layers = model.config.layers
    if layers > len(tensors):  # before a billion of them are named
        raise ValueError(
            f"{path}: tensors are missing: config.json has {layers} layers, the files"
            f" {len(tensors)} tensors"
        )
    shapes = {entry.name: entry.shape for entry in _entries(model)}
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


def _load(
    weight: Weight,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: Any,
) -> jax.Array:
    """A parameter on the devices of this process, read one device's part after the other."""

    def read(index: Any) -> np.ndarray:
        part = np.empty([len(range(n)[s]) for n, s in zip(shape, index, strict=True)], dtype)
        layers = (
            zip(range(shape[0])[index[0]], part, strict=True) if weight.stacked else [(0, part)]
        )
        for layer, out in layers:
            name = weight.name.format(layer)
            file, tensor = tensors[name]
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                out[...] = weight.from_hf(tensor, shape[weight.stacked :], index[weight.stacked :])
            if not _all_finite(out):
                raise ValueError(f"{file}: {name} has NaN or infinity in {part.dtype}")
        return part

    # Not `make_array_from_callback`, which has the parts of all devices on the host at once.
    parts = [
        jax.block_until_ready(jax.device_put(read(index), device))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _all_finite(x: np.ndarray) -> bool:
    """By the bits: for bfloat16 many times as fast as NumPy's own, gigabytes a second."""
    kind = np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(kind)
    without_sign = kind.type(2 ** (8 * x.itemsize - 1) - 1)
    bits = x.reshape(-1).view(kind)
    return all(
        (bits[i : i + _AT_ONCE] & without_sign).max() < infinity
        for i in range(0, bits.size, _AT_ONCE)
    )


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:  # the library has no kind of its own for a full disk
        raise error if isinstance(error, OSError) else OSError(f"the tokenizer: {error}") from error


def _write_tensors(path: Path, model: Qwen3, shard_bytes: int) -> None:
    """Writes all tensors, in one file or in several with an index."""
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in _entries(model):
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
        total += entry.nbytes
    if len(shards) == 1:
        _write_safetensors(path / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = path / f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(file, shard)
        weight_map.update({entry.name: file.name for entry in shard})
    _write_json(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_safetensors(file: Path, entries: list[Entry]) -> None:
    """Writes a file tensor by tensor; the library's writer wants all of them in memory.

    The format: the header's length in 8 bytes, the header in JSON, the tensors one after the other.
    """
    codes = {name: code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": codes[entry.parameter.dtype.name],
            "shape": entry.shape,
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            out.write(entry.to_hf().view(np.uint8).data)


def _config_json(model: Qwen3, generation: dict[str, Any]) -> dict[str, Any]:
    c = model.config
    architecture, qk_norm, qkv_bias = FAMILIES[c.family]
    if (c.qk_norm, c.qkv_bias) != (qk_norm, qkv_bias):
        raise ValueError(
            f"a {c.family} has qk_norm={qk_norm} and qkv_bias={qkv_bias}, this model"
            f" {c.qk_norm} and {c.qkv_bias}; it has no Hugging Face equivalent"
        )
    return {
        "architectures": [architecture],
        "model_type": c.family,
        **{hf_name: getattr(c, ours) for ours, hf_name in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        # Once for transformers 5, once for 4 and those who read its files.
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta,
        "dtype": model.embed.dtype.name,
        "torch_dtype": model.embed.dtype.name,
        **{name: generation.get(name) for name in SPECIAL},
    }


def _generation_config(tokenizer: Any, source: str | Path | None) -> dict[str, Any]:
    if source is not None and (Path(source) / "generation_config.json").is_file():
        return read_object(Path(source) / "generation_config.json")
    ids = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
