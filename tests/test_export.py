"""The export command: a directory that loads as the run's model, or none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from jaxgrpo import export as export_module
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.export import export
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.types import TrainState

SHAPE = Qwen3Config(vocab=260, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=32)
TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def new_model(seed: int) -> Qwen3:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
        jax.eval_shape(lambda: Qwen3(SHAPE, nnx.Rngs(0))),
    )


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    base = tmp_path / "base"
    export_hf(new_model(0), bytes_tokenizer(), base)
    (base / "generation_config.json").write_text('{"eos_token_id": [256], "temperature": 0.6}')
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f"[model]\npath = {json.dumps(str(base))}\n")
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, TrainState(new_model(step), (), jnp.int32(step)), {})
    return run


def assert_is_step(out: Path, step: int) -> None:
    loaded, expected = load_hf(out), new_model(step)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_command_writes_a_directory_that_loads_elsewhere(run_dir):
    out = run_dir.parent / "out"
    done = subprocess.run(
        [sys.executable, "-m", "jaxgrpo.export", run_dir, out],
        capture_output=True,
        text=True,
        # It imports what this process can.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{out}: the model of {run_dir} at step 4" in done.stdout
    assert_is_step(out, 4)
    assert AutoConfig.from_pretrained(out).hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("Grüße")["input_ids"] == bytes_tokenizer()("Grüße")["input_ids"]
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert sorted(os.listdir(run_dir.parent)) == ["base", "out", "run"]


def test_an_older_step_by_its_number(run_dir, tmp_path):
    # A killed export has left its remains here.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.json").write_text("{")
    export(run_dir, tmp_path / "out", step=2)
    assert_is_step(tmp_path / "out", 2)
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "run"]


def test_half_the_size(run_dir, tmp_path):
    export(run_dir, tmp_path / "half", dtype="bfloat16")
    export(run_dir, tmp_path / "whole")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    loaded = load_hf(tmp_path / "half", dtype=jnp.bfloat16)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(new_model(4)), strict=True):
        assert np.array_equal(x, y.astype(jnp.bfloat16))
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_cannot_be_exported_is_said(run_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; there are: 2, 4$"):
        export(run_dir, out, step=3)
    with pytest.raises(ValueError, match=r"run has no adapters \(lora\.rank is 0\)"):
        export(run_dir, out, adapter=True)
    with pytest.raises(ValueError, match="nowhere: no such run directory"):
        export(tmp_path / "nowhere", out)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(
        ValueError, match=r"4: is of another model .*: model.embed is float32\[260, 16"
    ):
        export(run_dir, out)
    assert sorted(os.listdir(tmp_path)) == ["base", "run"]
    out.mkdir()
    with pytest.raises(ValueError, match=r"out is there already; name a new directory$"):
        export(run_dir, out)


def test_a_tensor_that_reads_back_differently_leaves_nothing(run_dir, tmp_path, monkeypatch):
    def damaged(path, **kwargs):
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # the last tensor's last byte: the sign and exponent of a norm's weight
        file.write_bytes(content)
        return load_hf(path, **kwargs)

    monkeypatch.setattr(export_module, "load_hf", damaged)
    with pytest.raises(ValueError, match=r"reads back from .* as another; nothing was exported"):
        export(run_dir, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "run"]
