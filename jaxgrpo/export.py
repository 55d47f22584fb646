"""Export: a run's model as a Hugging Face directory, for transformers, vLLM and the rest.

python -m jaxgrpo.export RUN_DIR OUT_DIR [--step N]
"""

import shutil
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.cli import parse, run_main
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.tokenizer import load_tokenizer


def export(
    run_dir: Annotated[Path, tyro.conf.arg(metavar="RUN_DIR")],
    out_dir: Annotated[Path, tyro.conf.arg(metavar="OUT_DIR")],
    /,
    *,
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> None:
    """Writes a run's model as a Hugging Face directory and checks it by loading it again.

    The directory appears under its name only when it is whole and checked.

    Args:
      run_dir: Run directory.
      out_dir: Directory to write; must not exist.
      step: Checkpoint to export; the newest if not given.

    Raises:
      ValueError: what `load_run_model` raises; `out_dir` exists; a tensor reads back differently.
    """
    if out_dir.exists():
        raise ValueError(f"{out_dir} is there already; name a new directory")
    model, config, step = load_run_model(run_dir, step)
    tokenizer = load_tokenizer(config.model.path)
    unchecked = out_dir.absolute().with_name(f".{out_dir.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)  # of an export that was killed
    try:
        export_hf(model, tokenizer.hf, unchecked, source=config.model.path)
        _check(model, unchecked)
        unchecked.rename(out_dir)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    print(f"{out_dir}: the model of {run_dir} at step {step}, checked by loading it again")


def _check(model: Qwen3, path: Path) -> None:
    """Raises ValueError unless the directory loads as this model, bit for bit."""
    written = jax.tree_util.tree_leaves_with_path(model)
    for (keys, ours), theirs in zip(written, jax.tree.leaves(load_hf(path)), strict=True):
        if not np.array_equal(_bits(ours), _bits(theirs)):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            raise ValueError(f"{name} reads back from {path} as another; nothing was exported")


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


if __name__ == "__main__":
    run_main(lambda: parse(export, prog="python -m jaxgrpo.export"))
