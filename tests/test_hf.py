"""Hugging Face directories in and out, against transformers and against broken ones."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxgrpo.config import MeshConfig
from jaxgrpo.models import hf, tensor_files
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sharding import make_mesh

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["qwen3", "qwen2", "llama"]
SMALL = Qwen3Config(
    vocab=64, width=32, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=48, rope_theta=7e3
)


logits_of = jax.jit(Qwen3.logits)


def random_model(config: Qwen3Config, seed: int) -> Qwen3:
    """Everything random, norms and biases too."""
    rng = np.random.default_rng(seed)
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, x.dtype)), model)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by name."""
    files = sorted(path.glob("*.safetensors"))
    tensors = {name: array for file in files for name, array in load_file(file).items()}
    assert len(tensors) == sum(len(load_file(file)) for file in files)
    return tensors


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array.view(np.uint8), right[name].view(np.uint8), name)


def edit(file: Path, **fields) -> None:
    """Sets fields of a JSON file; `...` takes one away."""
    value = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    model = random_model(SMALL, 0)
    export_hf(model, None, path / "small")
    export_hf(model, None, path / "shards", shard_bytes=20_000)
    assert len(list((path / "shards").glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> Path:
    """A directory of one safetensors file, for tests to spoil."""
    return Path(shutil.copytree(exported / "small", tmp_path / "small"))


@pytest.fixture
def shards(exported: Path, tmp_path: Path) -> Path:
    """The same in several files with an index."""
    return Path(shutil.copytree(exported / "shards", tmp_path / "shards"))


# What transformers computed


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits(family: str):
    model = load_hf(GOLDEN / family)
    with np.load(GOLDEN / family / "logits.npz") as golden:
        logits = logits_of(model, golden["ids"])
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_tensors_come_back_bit_by_bit(family: str, tmp_path: Path):
    stored = jnp.bfloat16 if family == "llama" else jnp.float32
    export_hf(load_hf(GOLDEN / family, dtype=stored), None, tmp_path / "out", shard_bytes=9000)
    assert_same_tensors(GOLDEN / family, tmp_path / "out")
    assert dataclasses.replace(read_config(tmp_path / "out"), dtype=None) == dataclasses.replace(
        read_config(GOLDEN / family), dtype=None
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "stored", "fields"),
    [
        ("qwen3", "float32", {"heads": (4, 2, 16), "width": 24, "tied": True, "theta": 1e6}),
        ("qwen3", "bfloat16", {"heads": (3, 3, 8), "width": 24, "tied": False, "theta": 1234.5}),
        ("qwen3", "float16", {"heads": (6, 1, 4), "width": 20, "tied": False, "theta": 17.0}),
        ("qwen2", "bfloat16", {"heads": (4, 2, None), "width": 32, "tied": True, "theta": 1e6}),
        ("qwen2", "float32", {"heads": (3, 3, None), "width": 30, "tied": False, "theta": 321.0}),
        ("llama", "float32", {"heads": (6, 2, None), "width": 36, "tied": True, "theta": 1e5}),
        ("llama", "bfloat16", {"heads": (4, 1, 12), "width": 40, "tied": False, "theta": 10000.0}),
    ],
)
def test_parity_both_ways(family: str, stored: str, fields: dict, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from golden.make import logits, random_model

    heads, kv_heads, head_dim = fields["heads"]
    theirs = random_model(
        family,
        seed=heads,
        hidden_size=fields["width"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=fields["tied"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["theta"]},
        **({} if head_dim is None else {"head_dim": head_dim}),
    )
    source, out = tmp_path / "source", tmp_path / "out"
    theirs.to(getattr(torch, stored)).save_pretrained(
        source, max_shard_size="1GB" if stored == "float32" else "10KB"
    )
    assert (source / "model.safetensors").exists() == (stored == "float32")
    # Read again: `float()` would leave its rotation frequencies rounded.
    theirs = type(theirs).from_pretrained(source, dtype=torch.float32)

    rng = np.random.default_rng(heads)
    ids, lengths = rng.integers(0, 61, (4, 13)), np.array([13, 9, 1, 5])
    mine = np.asarray(logits_of(load_hf(source), ids, lengths))
    real = np.arange(13) < lengths[:, None]
    np.testing.assert_allclose(mine[real], logits(theirs, ids)[real], atol=1e-4, rtol=0)
    assert (mine[~real] == 0).all()
    # Padded on the left, as transformers' own generation wants it.
    rolled = np.stack([np.roll(row, 13 - n) for row, n in zip(ids, lengths, strict=True)])
    mask = torch.tensor(real[:, ::-1].copy())
    padded = logits(
        theirs, rolled, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    )
    for row, n, wanted in zip(mine, lengths, padded, strict=True):
        np.testing.assert_allclose(row[:n], wanted[13 - n :], atol=1e-4, rtol=0)

    export_hf(load_hf(source, dtype=getattr(jnp, stored)), None, out, shard_bytes=10_000)
    assert_same_tensors(source, out)
    assert type(theirs).from_pretrained(out).dtype == getattr(torch, stored)
    again = type(theirs).from_pretrained(out, dtype=torch.float32)
    assert again.config.rope_parameters == theirs.config.rope_parameters
    np.testing.assert_array_equal(logits(again, ids), logits(theirs, ids))


# Configs


def test_config_of_transformers_4(small: Path):
    file = small / "config.json"
    edit(file, rope_parameters=..., rope_theta=123, rope_scaling=None, sliding_window=4096)
    assert read_config(small) == dataclasses.replace(SMALL, rope_theta=123.0)
    edit(file, rope_scaling={"type": "default"}, rope_theta=..., rope_parameters={"rope_theta": 9})
    assert read_config(small).rope_theta == 9.0


def test_config_defaults_that_families_share(small: Path):
    edit(small / "config.json", model_type="llama", head_dim=..., num_key_value_heads=None)
    config = read_config(small)
    assert (config.head_dim, config.kv_heads) == (32 // 4, 4)
    assert (config.qk_norm, config.qkv_bias) == (False, False)
    edit(small / "config.json", model_type="qwen2", tie_word_embeddings=..., attention_bias=True)
    config = read_config(small)
    assert (config.qk_norm, config.qkv_bias, config.tied) == (False, True, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type 'llama3' is not supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7e3}},
            "rope_type 'linear' is not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_theta": ..., "rope_parameters": None}, "needs one rope_theta"),
        ({"rope_theta": 1e4}, r"needs one rope_theta.* found \[7000.0, 10000.0\]"),
        ({"rope_theta": float("nan"), "rope_parameters": None}, "rope_theta is nan"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive number"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"head_dim": ...}, "head_dim is None, not a positive number"),
        ({"num_key_value_heads": 3}, "num_attention_heads is no multiple of num_key_value_heads"),
    ],
)
def test_configs_refused_by_name(small: Path, fields: dict, message: str):
    edit(small / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_hf(small)
    assert str(error.value).startswith(str(small / "config.json"))
    assert "\n" not in str(error.value)


def test_directories_without_a_config(tmp_path: Path):
    with pytest.raises(ValueError, match="Qwen/Qwen3-8B: no such directory"):
        load_hf("Qwen/Qwen3-8B")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read: No such file"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: is not JSON: .*line 1"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: is not a JSON object"):
        load_hf(tmp_path)


# Files and their tensors


def respell(path: Path, change) -> None:
    """Rewrites model.safetensors with its dict of tensors changed."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"1 tensors are missing, such as {Q}"),
        (
            lambda t: t.update(bias=np.ones(3, np.float32)),
            r"model\.safetensors: bias is unknown to a qwen3",
        ),
        (
            lambda t: t.update({Q: t[Q].T.copy()}),
            rf"{Q} has shape \(32, 64\), by config.json \(64, 32\)",
        ),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), f"{Q} is I8, not a float"),
        (lambda t: t.update({Q: t[Q].astype(jnp.float8_e4m3fn)}), f"{Q} is F8_E4M3, not a float"),
    ],
)
def test_tensors_refused_by_name(small: Path, change, message: str):
    respell(small, change)
    with pytest.raises(ValueError, match=message):
        load_hf(small)


def test_float_dtypes_may_be_mixed(small: Path):
    exact = np.asarray(load_hf(small).layers.q[...])
    kinds = {0: np.float16, 1: jnp.bfloat16, 2: np.float64}

    def change(tensors: dict) -> None:
        for layer, kind in kinds.items():
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            tensors[name] = tensors[name].astype(kind)

    respell(small, change)
    loaded = load_hf(small).layers.q[...]
    assert loaded.dtype == jnp.float32
    for layer, kind in kinds.items():
        rounded = exact[layer].astype(kind).astype(np.float32)
        np.testing.assert_array_equal(loaded[layer], rounded)


def test_a_tied_head_must_be_the_embedding(small: Path):
    embed = "model.embed_tokens.weight"
    respell(small, lambda t: t.update({"lm_head.weight": t[embed]}))
    assert load_hf(small).lm_head is None
    respell(small, lambda t: t["lm_head.weight"].__setitem__((63, 31), 0.0))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_hf(small)


def test_dtypes_of_parameters_and_compute(small: Path):
    model = load_hf(small, dtype=jnp.bfloat16, compute_dtype=jnp.float32, remat="full")
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    assert (model.config.dtype, model.config.remat) == (jnp.float32, "full")
    assert load_hf(small, dtype=jnp.bfloat16).config.dtype == jnp.bfloat16


def test_broken_and_missing_files(small: Path, shards: Path):
    index = shards / "model.safetensors.index.json"
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    key = next(k for k, v in weight_map.items() if v == first.name)

    edit(index, weight_map=weight_map | {key: second.name})
    with pytest.raises(ValueError, match=f"{key} is in {first.name}, listed in {second.name}"):
        load_hf(shards)
    edit(index, weight_map={k: v for k, v in weight_map.items() if k != key})
    with pytest.raises(ValueError, match=f"{key} is in {first.name}, listed in None"):
        load_hf(shards)
    edit(index, weight_map=...)
    with pytest.raises(ValueError, match="tensors are missing"):
        load_hf(shards)
    edit(index, weight_map=weight_map)

    save_file(load_file(second) | {key: np.zeros(3, np.float32)}, second)
    with pytest.raises(ValueError, match=f"{second.name}: {key} is in .*{first.name} too"):
        load_hf(shards)
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name}: cannot be read"):
        load_hf(shards)
    index.unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        load_hf(shards)

    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: cannot be read"):
        load_hf(small)


@pytest.mark.parametrize(
    "name", ["../small/{}", "/{}", "sub/{}", "..\\{}", "..", "", "a.bin", 7, ["x.safetensors"]]
)
def test_an_index_names_files_of_its_directory_only(shards: Path, name):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    key, file = next(iter(weight_map.items()))
    (shards / "sub").mkdir()
    shutil.copy(shards / file, shards / "sub" / file)
    name = name.format(file) if isinstance(name, str) else name
    edit(index, weight_map=weight_map | {key: name})
    with pytest.raises(ValueError, match="is no safetensors file of this directory"):
        load_hf(shards)


def test_files_may_be_links(shards: Path, tmp_path: Path):
    """As in the cache of the Hugging Face hub."""
    wanted = load_hf(shards)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(shards.iterdir())):
        file.rename(blobs / f"{i}")
        file.symlink_to(Path("..") / "blobs" / f"{i}")
    jax.tree.map(np.testing.assert_array_equal, load_hf(shards), wanted)


# Onto devices


class CountingSlice:
    """A slice of a safetensors file that adds up what is fetched."""

    def __init__(self, tensor, fetched: list[int]):
        self.tensor, self.fetched = tensor, fetched

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)

    def __getitem__(self, index):
        part = self.tensor[index]
        self.fetched.append(part.nbytes)
        return part


@pytest.mark.parametrize(
    ("family", "fsdp", "tp"), [("qwen3", 2, 4), ("qwen2", 4, 2), ("llama", 8, 1)]
)
def test_a_mesh_gets_the_parts_of_its_devices(
    family: str, fsdp: int, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(
        SMALL, kv_heads=4, tied=False, family=family, qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
    )  # fmt: skip
    source = random_model(config, 3)
    export_hf(source, None, tmp_path / "source", shard_bytes=20_000)

    fetched: list[int] = []

    class CountingFile:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_slice(self, name: str):
            return CountingSlice(self.file.get_slice(name), fetched)

    monkeypatch.setattr(tensor_files, "safe_open", CountingFile)
    model = load_hf(tmp_path / "source", make_mesh(MeshConfig(fsdp=fsdp, tp=tp)))
    leaves = jax.tree.leaves(model)
    # Float32 files and parameters: what is fetched is what the devices hold, to the byte.
    assert sum(fetched) == sum(s.data.nbytes for x in leaves for s in x.addressable_shards)

    for loaded, wanted in zip(leaves, jax.tree.leaves(source), strict=True):
        np.testing.assert_array_equal(loaded, wanted)
    c = config
    assert model.layers.q[...].addressable_shards[0].data.shape == (
        c.layers, c.width // fsdp, c.heads // tp, c.head_dim,
    )  # fmt: skip
    assert model.layers.down[...].addressable_shards[0].data.shape == (
        c.layers, c.ffn // tp, c.width // fsdp,
    )  # fmt: skip
    assert model.embed[...].addressable_shards[0].data.shape == (c.vocab // tp, c.width // fsdp)

    ids = np.random.default_rng(5).integers(0, 64, (8, 6))
    np.testing.assert_allclose(logits_of(model, ids), logits_of(source, ids), atol=1e-4, rtol=0)
    export_hf(model, None, tmp_path / "out")
    assert_same_tensors(tmp_path / "source", tmp_path / "out")


def test_an_axis_may_be_divided_anywhere(small: Path, monkeypatch: pytest.MonkeyPatch):
    """Also inside an axis that the file has merged, and along the layers."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec(None, None, "a", "b")
    split_heads = jax.sharding.NamedSharding(mesh, spec)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    monkeypatch.setattr(
        hf,
        "param_shardings",
        lambda tree, *_: jax.tree.map(
            lambda x: split_heads if x.shape == (3, 32, 4, 16) else whole, tree
        ),
    )
    model = load_hf(small, mesh)
    assert model.layers.q[...].addressable_shards[0].data.shape == (3, 32, 2, 4)
    np.testing.assert_array_equal(model.layers.q[...], load_hf(small).layers.q[...])


def test_a_mesh_that_does_not_divide(small: Path):
    with pytest.raises(ValueError, match="kv_heads of 2 does not divide over mesh axis tp"):
        load_hf(small, make_mesh(MeshConfig(fsdp=1, tp=8)))


def test_the_host_never_holds_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = Qwen3Config(
        vocab=4096, width=512, layers=6, heads=8, kv_heads=8, head_dim=64, ffn=1536
    )
    abstract = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
    sizes = [x.nbytes for x in jax.tree.leaves(model)]
    assert sum(sizes) > 85e6
    assert max(sizes) == model.layers.up.nbytes > 18e6

    def peak(run) -> int:
        run()  # whatever is compiled or imported once
        tracemalloc.start()
        run()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def export() -> None:
        shutil.rmtree(tmp_path / "big", ignore_errors=True)
        export_hf(model, None, tmp_path / "big")

    # A tensor as it is and transposed.
    assert peak(export) < 2.2 * model.embed.nbytes
    # One device's part of the largest stack, and a tensor of that. On a CPU, JAX may take over the
    # host's memory as the device's; here it is not to, or all would count.
    monkeypatch.setattr(jax, "device_put", lambda x, d: jnp.ones(x.shape, x.dtype, device=d))
    mesh = make_mesh(MeshConfig(fsdp=8, tp=1))
    assert peak(lambda: load_hf(tmp_path / "big", mesh)) < 1.5 * model.layers.up.nbytes / 8


# Export


def test_export_of_a_tokenizer(tmp_path: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "hello", "world"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    export_hf(random_model(SMALL, 0), tokenizer, tmp_path / "new" / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "new" / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(tmp_path / "new" / "out")
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (
        1, 0, None,
    )  # fmt: skip


def test_export_as_transformers_reads_it(tmp_path: Path):
    from transformers import AutoConfig

    export_hf(random_model(SMALL, 0).cast(jnp.bfloat16), None, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config).__name__ == "Qwen3Config"
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7e3}
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (
        16, 2, True,
    )  # fmt: skip
    # transformers 4, and what reads config.json by itself, want these.
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (plain["rope_theta"], plain["torch_dtype"]) == (7e3, "bfloat16")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_keeps_the_generation_config_of_its_source(small: Path, tmp_path: Path):
    generation = {"eos_token_id": [5, 3], "pad_token_id": 3, "temperature": 0.6}
    (small / "generation_config.json").write_text(json.dumps(generation))
    export_hf(load_hf(small), None, tmp_path / "out", source=small)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [5, 3]


def test_export_goes_where_nothing_is(tmp_path: Path):
    model, out = random_model(SMALL, 0), tmp_path / "out"
    out.mkdir()
    export_hf(model, None, out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(ValueError, match="out is there already"):
        export_hf(model, None, out)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="file is there already"):
        export_hf(model, None, file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # so the tokenizers library says it
    ],
)
def test_export_that_fails_leaves_nothing(tmp_path: Path, error: Exception):
    class Tokenizer:
        eos_token_id = 1

        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("half")
            raise error

    with pytest.raises(OSError, match=r"out could not be written \(.*No space left .* is left\."):
        export_hf(random_model(SMALL, 0), Tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_that_is_not_on_the_disk_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever of the files and directories the disk does not take, the last name included."""
    model, real, synced = random_model(SMALL, 0), os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    export_hf(model, None, tmp_path / "out")
    inside = {f.stat().st_ino for f in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert set(synced) == inside | {tmp_path.stat().st_ino}
    assert synced[-1] == tmp_path.stat().st_ino

    for failing in range(len(synced)):
        calls = itertools.count()

        def fails(fd: int, failing: int = failing, calls: Iterator[int] = calls) -> None:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=r"new could not be written \(Input/output error\)"):
            export_hf(model, None, tmp_path / "new")
        assert os.listdir(tmp_path) == ["out"]


def test_export_after_one_that_was_killed(tmp_path: Path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_text("half")
    export_hf(random_model(SMALL, 0), None, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.rglob("*")) == [
        "config.json", "model.safetensors", "out",
    ]  # fmt: skip
    mode = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    (tmp_path / "plain").mkdir()
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_export_of_switches_without_a_family(tmp_path: Path):
    config = dataclasses.replace(SMALL, qkv_bias=True)
    with pytest.raises(ValueError, match="it has no Hugging Face equivalent"):
        export_hf(random_model(config, 0), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
