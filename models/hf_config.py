"""config.json of a Hugging Face directory, both ways: its fields and those of `Qwen3Config`."""

import reprlib
import sys
from pathlib import Path
from typing import Any

from jaxgrpo.json_file import read_object
from jaxgrpo.models.qwen3 import Qwen3Config

# Field of Qwen3Config -> field of config.json, a positive number.
SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
}

# model_type -> class in transformers, q/k norm, bias on q, k and v.
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", False, True),
    "llama": ("LlamaForCausalLM", False, False),
}

# What a field must say where it is there: anything else is another model.
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "rope_type": "default",
    "type": "default",  # what rope_type was called once
}

# Ids that config.json and generation_config.json both name.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

_KINDS = {dict: "an object", list: "a list", bool: "true or false"}
_LARGEST_SIZE = 2**31 - 1  # of an axis


def read_config(path: str | Path) -> Qwen3Config:
    """Reads config.json as transformers 4 or 5 writes it.

    Args:
      path: a Hugging Face directory.

    Raises:
      ValueError: there is none, it is broken, or the model is not one that `Qwen3` computes
        (mixture of experts, scaled rotary positions, sliding window, quantised, ...).
    """
    file = Path(path) / "config.json"
    if not file.parent.is_dir():
        raise ValueError(
            f"{path}: no such directory; models are Hugging Face directories on disk"
            " (`hf download NAME --local-dir DIR` fetches one)"
        )
    hf = read_object(file)
    family = hf.get("model_type")
    if family not in [*FAMILIES]:  # a list, because it may be anything
        shown = reprlib.repr(family)
        raise ValueError(f"{file}: model_type {shown} is not supported, only {[*FAMILIES]}")
    _, qk_norm, qkv_bias = FAMILIES[family]
    if qkv_bias:
        hf.pop("attention_bias", None)  # a Qwen2 has its biases whatever this says

    def typed(name: str, kind: type, default: Any) -> Any:
        value = default if hf.get(name) is None else hf[name]
        if type(value) is not kind:
            raise ValueError(f"{file}: {name} is {reprlib.repr(value)}, not {_KINDS[kind]}")
        return value

    def positive(value: Any, name: str, kinds: Any = int) -> Any:
        largest = _LARGEST_SIZE if kinds is int else sys.float_info.max
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= largest:
            raise ValueError(
                f"{file}: {name} is {reprlib.repr(value)}, not a positive number"
                f" up to {largest:.4g}"
            )
        return value

    ropes = [hf, typed("rope_scaling", dict, {}), typed("rope_parameters", dict, {})]
    for fields in ropes:
        for name, plain in PLAIN.items():
            if fields.get(name) not in (None, plain):
                shown = reprlib.repr(fields[name])
                raise ValueError(f"{file}: {name} {shown} is not supported, only {plain!r}")
    if any(kind != "full_attention" for kind in typed("layer_types", list, [])):
        raise ValueError(f"{file}: layer_types other than 'full_attention' are not supported")
    # transformers would fall back to 10,000, which ruins every answer without a word.
    thetas = {
        float(positive(rope["rope_theta"], "rope_theta", (int, float)))
        for rope in ropes
        if rope.get("rope_theta") is not None
    }
    if len(thetas) != 1:
        raise ValueError(
            f"{file}: needs one rope_theta, by itself or in rope_parameters;"
            f" found {sorted(thetas) or 'none'}"
        )

    heads = positive(hf.get("num_attention_heads"), "num_attention_heads")
    defaults = {"num_key_value_heads": heads}
    if family != "qwen3":  # whose own default is 128, and which always says it
        defaults["head_dim"] = positive(hf.get("hidden_size"), "hidden_size") // heads
    found = {
        name: defaults.get(name) if hf.get(name) is None else hf[name] for name in SIZES.values()
    }
    sizes = {ours: positive(found[name], name) for ours, name in SIZES.items()}
    if heads % sizes["kv_heads"]:
        raise ValueError(f"{file}: num_attention_heads is no multiple of num_key_value_heads")
    if sizes["head_dim"] % 2:
        raise ValueError(
            f"{file}: head_dim {sizes['head_dim']} is odd; positions turn it in halves"
        )
    return Qwen3Config(
        **sizes,
        rope_theta=thetas.pop(),
        norm_eps=float(positive(hf.get("rms_norm_eps"), "rms_norm_eps", (int, float))),
        tied=typed("tie_word_embeddings", bool, False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        family=family,
    )


def config_json(config: Qwen3Config, dtype: str, generation: dict[str, Any]) -> dict[str, Any]:
    """What config.json is to say.

    Args:
      config: of the model.
      dtype: of its parameters, by name.
      generation: what generation_config.json says.

    Raises:
      ValueError: the model's switches are of no known family.
    """
    architecture, qk_norm, qkv_bias = FAMILIES[config.family]
    if (config.qk_norm, config.qkv_bias) != (qk_norm, qkv_bias):
        raise ValueError(
            f"a {config.family} has qk_norm={qk_norm} and qkv_bias={qkv_bias}, this model"
            f" {config.qk_norm} and {config.qkv_bias}; it has no Hugging Face equivalent"
        )
    return {
        "architectures": [architecture],
        "model_type": config.family,
        **{hf_name: getattr(config, ours) for ours, hf_name in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # Once for transformers 5, once for 4 and those who read its files.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{name: generation.get(name) for name in SPECIAL},
    }


def generation_config(tokenizer: Any, source: str | Path | None) -> dict[str, Any]:
    """What generation_config.json is to say: what `source` has, or else the tokenizer's ids."""
    if source is not None and (Path(source) / "generation_config.json").is_file():
        return read_object(Path(source) / "generation_config.json")
    ids = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    return {name: value for name, value in ids.items() if value is not None}
