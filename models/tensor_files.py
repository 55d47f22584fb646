"""Safetensors files in and out, with one tensor or the part that is wanted in memory at a time.

Files that are read may be anyone's: what the library lets through and should not is refused here.
"""

import contextlib
import json
import re
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from jaxgrpo.json_file import check_regular, parse_object, read_object, write_object
from jaxgrpo.models.weights import Entry, Weight

# dtype in a safetensors header -> its name in JAX and in config.json.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_LARGEST_HEADER = 100_000_000  # bytes, as the library has it
_AT_ONCE = 1 << 16  # numbers that are looked at together: they stay in a core's cache


class Tensor(NamedTuple):
    """A tensor in a file: indexing `data` reads that part of it."""

    file: Path
    data: Any


def open_tensors(path: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """The tensors of a directory by name; none is read yet.

    Args:
      path: directory with model.safetensors, or else model.safetensors.index.json and the files
        that it names.
      files: closes them.

    Raises:
      ValueError: a file is missing, broken or outside of the directory; a tensor is in two files,
        or elsewhere than the index says.
    """
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
        for key, tensor in open_safetensors(path / name, files).items():
            if key in tensors:
                raise ValueError(f"{tensor.file}: {key} is in {tensors[key].file} too")
            tensors[key] = tensor
    for key in sorted(listed.keys() | tensors.keys()) if listed else ():
        found = tensors[key].file.name if key in tensors else None
        if listed.get(key) != found:
            raise ValueError(f"{index}: {key} is in {found}, listed in {listed.get(key)}")
    return tensors


def open_safetensors(file: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """The tensors of a file by name; none is read yet. Errors as of `open_tensors`."""
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


def load_parameter(
    weight: Weight,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: Any,
) -> jax.Array:
    """A parameter on the devices of this process, read one device's part after the other.

    Args:
      weight: its row of the table.
      tensors: the directory's.
      shape: of the parameter, with its layers.
      sharding: which part of it a device is to hold.
      dtype: of the parameter, whatever the files have.

    Raises:
      ValueError: a number is not finite in `dtype`.
    """

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
            if not all_finite(out):
                raise ValueError(f"{file}: {name} has NaN or infinity in {part.dtype}")
        return part

    # Not `make_array_from_callback`, which has the parts of all devices on the host at once.
    parts = [
        jax.block_until_ready(jax.device_put(read(index), device))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def all_finite(x: np.ndarray) -> bool:
    """Whether there is no NaN or infinity.

    By the bits: for bfloat16 many times as fast as NumPy's own, gigabytes a second.
    """
    kind = np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(kind)
    without_sign = kind.type(2 ** (8 * x.itemsize - 1) - 1)
    bits = x.reshape(-1).view(kind)
    return all(
        (bits[i : i + _AT_ONCE] & without_sign).max() < infinity
        for i in range(0, bits.size, _AT_ONCE)
    )


def write_tensors(path: Path, entries: Iterable[Entry], shard_bytes: int) -> None:
    """Writes all tensors, in one file or in several with an index.

    A file has at most `shard_bytes`, as far as single tensors allow it.
    """
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
        total += entry.nbytes
    if len(shards) == 1:
        write_safetensors(path / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = path / f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(file, shard)
        weight_map.update({entry.name: file.name for entry in shard})
    write_object(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def write_safetensors(file: Path, entries: list[Entry]) -> None:
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
