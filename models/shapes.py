"""Shapes of models whose weights need not be here, by name."""

from pathlib import Path

from jaxgrpo.models.hf_config import read_config
from jaxgrpo.models.qwen3 import Qwen3Config


def _qwen3(width: int, layers: int, heads: int, ffn: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab=151936,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        tied=tied,
    )


# As their config.json says on the Hugging Face hub; -Base has the same.
KNOWN = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 17408, tied=False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 25600, tied=False),
}


def find_shape(path: str) -> Qwen3Config:
    """The shape of the model in a Hugging Face directory, or of the one its last part names.

    Args:
      path: a directory with a config.json, or one that is not there and is called as in `KNOWN`.

    Raises:
      ValueError: neither; or what `read_config` refuses.
    """
    if Path(path).is_dir():
        return read_config(path)
    name = Path(path).name.removesuffix("-Base")
    if name not in KNOWN:
        raise ValueError(
            f"model.path is {path!r}, which is no directory, and its last part is none of"
            f" {', '.join(KNOWN)}: name one of these or a directory with the model's config.json"
        )
    return KNOWN[name]
