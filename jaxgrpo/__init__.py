"""GRPO for structured output, in JAX."""

import os

# transformers, used for its tokenizers, would say on stderr that it has found no torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
