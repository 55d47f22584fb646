"""Writes the directories beside this file: tiny random models and their logits, by transformers.

They let the tests compare with transformers where torch is not installed. Needs torch:
`python tests/golden/make.py`.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

CASES = {
    # heads * head_dim != width, tied, five files
    "qwen3": {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    # heads * head_dim == width, untied, one file
    "qwen2": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    # one key/value head, tied, bfloat16
    "llama": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
}
CLASSES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def random_model(family: str, seed: int, **fields):
    """A model of few weights, all of them random, norms and biases too."""
    config_class, model_class = CLASSES[family]
    fields = {
        "vocab_size": 61,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 1e-5,
        **fields,
    }
    model = model_class(config_class(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.5 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


def logits(model, ids: np.ndarray, **kwargs) -> np.ndarray:
    """float32 `[B, T, V]` of ids `[B, T]`."""
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False, **kwargs).logits.float().numpy()


def main() -> None:
    """Writes one directory a family."""
    here = Path(__file__).parent
    for seed, (family, fields) in enumerate(CASES.items()):
        model = random_model(family, seed, tie_word_embeddings=family != "qwen2", **fields)
        stored = torch.bfloat16 if family == "llama" else torch.float32
        size = "12KB" if family == "qwen3" else "1MB"
        model.to(stored).save_pretrained(here / family, max_shard_size=size)
        model = type(model).from_pretrained(here / family, dtype=torch.float32)
        ids = np.random.default_rng(seed).integers(0, 61, (3, 17))
        np.savez(here / family / "logits.npz", ids=ids, logits=logits(model, ids))


if __name__ == "__main__":
    main()
