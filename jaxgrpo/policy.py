"""A trained model to answer with, from either kind of directory that holds one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.config import Config, ModelConfig
from jaxgrpo.config_file import load_config
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sharding import Rules


@dataclass(frozen=True)
class Policy:
    """A model, its weights not read yet.

    Attributes:
      path: Hugging Face directory, or a run directory, whose newest checkpoint is then meant.
      config: of the run; all defaults but the path for a Hugging Face directory. Either way
        `model.path` holds the model's configuration and tokenizer.
      is_run: which of the two it is.
    """

    path: str
    config: Config
    is_run: bool

    def load(self, mesh: Mesh, dtype: Any, rules: Rules) -> Qwen3:
        """Reads the weights, divided over the mesh by `rules`, to compute in `dtype`.

        Raises:
          ValueError: what `load_hf` or `load_run_model` raises.
        """
        if self.is_run:
            model, _, _ = load_run_model(self.path, mesh=mesh, compute_dtype=dtype, rules=rules)
            return model
        return load_hf(self.path, mesh, compute_dtype=dtype, rules=rules)


def find_policy(path: str) -> Policy:
    """The policy in a directory.

    Raises:
      ValueError: the configuration of a run is at fault.
    """
    file = Path(path) / "config.toml"
    if file.exists():
        return Policy(path, load_config(file), is_run=True)
    return Policy(path, Config(model=ModelConfig(path=path)), is_run=False)
