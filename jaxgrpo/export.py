"""Export: a run's model as a Hugging Face directory, for transformers, vLLM and the rest.

python -m jaxgrpo.export RUN_DIR OUT_DIR [--step N] [--dtype bfloat16] [--adapter]
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jaxgrpo.checkpoint import load_run_model, load_run_trained
from jaxgrpo.cli import parse, run_main, say
from jaxgrpo.models import lora
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.peft import export_peft, load_peft
from jaxgrpo.tokenizer import load_tokenizer


def export(
    run_dir: Annotated[Path, tyro.conf.arg(metavar="RUN_DIR")],
    out_dir: Annotated[Path, tyro.conf.arg(metavar="OUT_DIR")],
    /,
    *,
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    adapter: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Writes a run's model as a Hugging Face directory and checks it by loading it again.

    The directory appears under its name only when it is whole, checked and on the disk. Adapters
    are added into the weights, in float32.

    Args:
      run_dir: Run directory.
      out_dir: Directory to write; must not exist.
      step: Checkpoint to export; the newest if not given.
      dtype: Of the weights: as they were trained, or rounded to half the size.
      adapter: Write the adapters by themselves, as a PEFT directory.

    Raises:
      ValueError: what `load_run_model` raises; `out_dir` exists; there are no adapters; a tensor
        reads back differently.
      OSError: `out_dir` cannot be written; nothing is left of it.
    """
    if out_dir.exists():
        raise ValueError(f"{out_dir} is there already; name a new directory")
    model: Any
    if adapter:
        what = "the adapters"
        model, config, step = load_run_trained(run_dir, step)
        if not config.lora.rank:
            raise ValueError(f"{run_dir} has no adapters (lora.rank is 0); export it without them")
    else:
        what = "the model"
        model, config, step = load_run_model(run_dir, step)
        if config.lora.rank:
            model = lora.merge(model)
        model = model.cast(dtype)
    source = config.model.path
    if adapter:
        export_peft(
            model,
            config.lora,
            out_dir,
            source=source,
            check=lambda path: check_same(model, load_peft(path, model), path),
        )
    else:
        export_hf(
            model,
            load_tokenizer(source).hf,
            out_dir,
            source=source,
            check=lambda path: check_same(model, load_hf(path, dtype=dtype), path),
        )
    say(f"{out_dir}: {what} of {run_dir} at step {step}, checked by loading it again")


def check_same(model: Any, loaded: Any, path: Path) -> None:
    """Raises ValueError unless what the directory loads as is what was exported, bit for bit."""
    written = jax.tree_util.tree_leaves_with_path(model)
    for (keys, ours), theirs in zip(written, jax.tree.leaves(loaded), strict=True):
        if not np.array_equal(_bits(ours), _bits(theirs)):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            raise ValueError(f"{name} reads back from {path} as another; nothing was exported")


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def main() -> None:
    """The command."""
    parse(export, prog="python -m jaxgrpo.export")


if __name__ == "__main__":
    run_main(main)
