"""GRPO for structured output, in JAX."""

__version__ = "0.1.0"
