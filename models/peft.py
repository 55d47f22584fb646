"""PEFT directories: the adapters of a model by themselves, in and out."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxgrpo.config import LoraConfig
from jaxgrpo.files import new_directory
from jaxgrpo.json_file import write_object
from jaxgrpo.models.tensor_files import load_parameter, open_safetensors, write_safetensors
from jaxgrpo.models.weights import WEIGHTS, entries, weight_of


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
        write_object(
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
        write_safetensors(partial / "adapter_model.safetensors", [*entries(adapters)])
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
        tensors = open_safetensors(file, files)
        found = {name: tuple(tensor.data.get_shape()) for name, tensor in tensors.items()}
        if found != {entry.name: entry.shape for entry in entries(adapters)}:
            raise ValueError(f"{file}: has other tensors than adapters of this kind")
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: load_parameter(
                weight_of(keys), tensors, leaf.shape, device, leaf.dtype
            ),
            adapters,
        )
