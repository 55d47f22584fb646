"""Files that anyone may have made: each loads, or is refused in one line that names it."""

import json
import os
import random
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxgrpo.config_file import load_config, save_config
from jaxgrpo.data import load_problems
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.rewards.json_schema import check_schema, load_schema
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
SHAPE = Qwen3Config(vocab=32, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn=12)

# In the place of any value of a JSON or TOML file; as they are spelt there.
VALUES = [
    "null", "true", "[]", "{}", '""', '"x"', "-1", "0", "1.5", "1e400", "NaN", "-Infinity",
    "1" + 400 * "0", "1" + 5000 * "0", str(2**31), str(2**63), str(10**12), '"1"', "[[1]]",
    '{"a": 1}', '"\\ud800"', '"\\u0000"', f'"{9999 * "x"}"', 3000 * "[", 3000 * "[" + 3000 * "]",
]  # fmt: skip
SCALAR = re.compile(
    rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\b(?:true|false|null)\b'
)


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """A file with one thing wrong with it: a value, a key, some bytes, its end, a part twice."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    found = [*SCALAR.finditer(data[: 1 << 16])]
    match rng.randrange(8):
        case 0 | 1 | 2 | 3 if found:
            match = rng.choice(found)
            return data[: match.start()] + rng.choice(VALUES).encode() + data[match.end() :]
        case 4:
            flipped = bytearray(data)
            for _ in range(rng.choice([1, 1, 8])):
                flipped[rng.randrange(rng.choice([8, 256, len(data)])) % len(data)] ^= (
                    1 << rng.randrange(8)
                )
            return bytes(flipped)
        case 5:
            return data[:at]
        case 6:
            return data[:at] + data[end:]
        case _:
            return data[:at] + data[at:end] + data[at:]


def loads_or_says(load: Callable[[], Any], name: str) -> str | None:
    """What a refusal says; None if it loads."""
    try:
        load()
    except ValueError as error:
        said = str(error)
        assert name in said, said
        assert "\n" not in said, said
        assert len(said) < 20_000, said
        return said
    return None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files: a model in one file, one in several, a tokenizer, data, a schema, a config."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    model = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
        jax.eval_shape(lambda: Qwen3(SHAPE, nnx.Rngs(0))),
    )
    export_hf(model, None, root / "one")
    export_hf(model, None, root / "many", shard_bytes=1500)
    shutil.copytree(CONFIGS / "tiny_qwen3", root / "tokens")
    (root / "tokens" / "model.safetensors").unlink()
    schema = (CONFIGS / "invoices" / "schema.json").read_text()
    (root / "schema.json").write_text(schema)
    lines = (CONFIGS / "invoices" / "train.jsonl").read_text("utf-8").splitlines()[:3]
    lines[1] = json.dumps(json.loads(lines[1]) | {"id": "x", "schema": json.loads(schema)})
    (root / "data.jsonl").write_text("\n".join(lines), "utf-8")
    save_config(load_config(CONFIGS / "invoice_tiny.toml"), root / "run.toml")
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """Copies to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "here"))


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> ChatTokenizer:
    return load_tokenizer(made / "tokens")


@pytest.mark.parametrize(
    "name",
    [
        *("one/config.json", "one/model.safetensors"),
        *("many/model.safetensors.index.json", "many/model-00002-of-00004.safetensors"),
        *(f"tokens/{name}" for name in sorted(os.listdir(CONFIGS / "tiny_qwen3"))
          if not name.endswith(".safetensors")),
        *("data.jsonl", "schema.json", "run.toml"),
    ],
)  # fmt: skip
def test_spoilt_files_load_or_are_named(name: str, here: Path, tokenizer: ChatTokenizer):
    file = here / name
    load = {
        "data.jsonl": lambda: load_problems(file, tokenizer, 10_000, check_schema),
        "schema.json": lambda: load_schema(file),
        "run.toml": lambda: load_config(file),
    }.get(name, lambda: (load_tokenizer if "tokens" in name else load_hf)(file.parent))
    good = file.read_bytes()
    said = [loads_or_says(load, str(here / name.partition("/")[0]))]
    assert said == [None]
    for seed in range(40):
        file.write_bytes(spoilt(good, random.Random(f"{name} {seed}")))
        said.append(loads_or_says(load, str(here / name.partition("/")[0])))
    if not name.endswith(".jinja"):  # any text is a template
        assert len(set(said)) > 5


def test_a_tokenizer_that_would_abort_the_process_is_refused(here: Path):
    file = here / "tokens" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["continuing_subword_prefix"] = "1"  # half of an "Ġ"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokens: a continuing_subword_prefix .* not supported"):
        load_tokenizer(here / "tokens")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.mkdir()


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def nowhere(file: Path) -> None:
    file.symlink_to("nowhere")


@pytest.mark.parametrize("other", [pipe, folder, device, nowhere])
def test_only_regular_files_are_read(here: Path, other: Callable[[Path], None]):
    """Nothing waits for a pipe or reads a device without end."""
    for place, load in (("one", load_hf), ("many", load_hf), ("tokens", load_tokenizer)):
        for file in sorted((here / place).iterdir()):
            kept = file.rename(here / "kept")
            other(file)
            with pytest.raises(ValueError, match=r"cannot be read|no tokenizer|neither") as error:
                load(here / place)
            assert str(here / place) in str(error.value)
            file.rmdir() if file.is_dir() else file.unlink()
            kept.rename(file)
        load(here / place)


def test_names_that_occur_twice(here: Path):
    config, index = here / "one" / "config.json", here / "many" / "model.safetensors.index.json"
    file = here / "one" / "model.safetensors"
    config_text, file_bytes = config.read_text(), file.read_bytes()

    config.write_text(config_text.replace("{", '{"vocab_size": 31, ', 1))
    with pytest.raises(ValueError, match=r"one/config\.json: .*'vocab_size' occurs twice"):
        load_hf(here / "one")
    config.write_text(config_text)

    # Of two entries of a header the library would take the last, and so other bytes.
    size = int.from_bytes(file_bytes[:8], "little")
    header = json.loads(file_bytes[8 : 8 + size])
    norm = json.dumps({"model.norm.weight": header["model.layers.0.input_layernorm.weight"]})
    text = norm.encode()[:-1] + b", " + file_bytes[9 : 8 + size]
    file.write_bytes(len(text).to_bytes(8, "little") + text + file_bytes[8 + size :])
    with pytest.raises(ValueError, match=r"header: .*'model\.norm\.weight' occurs twice"):
        load_hf(here / "one")

    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))
    index.write_text(index.read_text().replace("{", f'{{"{name}": 1, "{name}": 2, ', 1))
    with pytest.raises(ValueError, match=rf"index\.json: .*'{re.escape(name)}' occurs twice"):
        load_hf(here / "many")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_named(here: Path, wrong: float):
    """Also those that are too large for the parameters' dtype."""
    file = here / "one" / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng()
    name = str(rng.choice(sorted(tensors)))
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name].flat[rng.integers(tensors[name].size)] = wrong
    save_file(tensors, file)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        with pytest.raises(ValueError, match=rf"model\.safetensors: {re.escape(name)} has NaN or"):
            load_hf(here / "one", dtype=dtype)


def header_of(size: int) -> Callable[[bytes], bytes]:
    return lambda data: size.to_bytes(8, "little") + data[8:]


def overlapping(data: bytes) -> bytes:
    """Two tensors of one shape made of the same bytes, all else as it was."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first, second = (
        header[f"model.layers.{i}.input_layernorm.weight"]["data_offsets"] for i in range(2)
    )
    text = json.dumps(header).replace(str(second), str(first)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        overlapping,
        *map(header_of, (0, 1, 10**6, 10**8 + 1, 2**63, 2**64 - 1)),
    ],
)
def test_weights_of_another_length_than_they_say(here: Path, spoil: Callable[[bytes], bytes]):
    file = here / "one" / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*") as error:
        load_hf(here / "one")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_size_that_no_machine_has_allocates_nothing(here: Path, field: str):
    file = here / "one" / "config.json"
    config = json.loads(file.read_text())
    for size in (2**31 - 1, 10**400):
        file.write_text(json.dumps(config | {field: size}))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=rf"one.*(missing|has shape|{field})"):
                load_hf(here / "one")
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


def test_a_tokenizer_does_not_count_the_layers_of_its_model(here: Path):
    file = here / "tokens" / "config.json"
    ids = load_tokenizer(here / "tokens").encode_chat([{"role": "user", "content": "7 USD"}])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**400}))
    tokenizer = load_tokenizer(here / "tokens")
    assert tokenizer.encode_chat([{"role": "user", "content": "7 USD"}]) == ids
