"""Makes `configs/tiny_qwen3/`, the base model of the embedded default run.

    python -m scripts.pretrain_tiny             train, write the directory, measure it
    python -m scripts.pretrain_tiny --out DIR   the same into another directory
"""

import argparse
import collections
import json
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxgrpo.logprobs import token_logprobs
from jaxgrpo.models.hf import export_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from scripts import build_invoices as invoices

SHAPE = Qwen3Config(
    vocab=1024,
    width=128,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    rope_theta=10_000.0,
    max_positions=1024,
)

SPLIT = r"\d|[^\W\d]+|[^\w]+|_"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(seed: int, demonstrations: int = 6000) -> PreTrainedTokenizerFast:
    rng = Random(f"{seed}/tokenizer")
    texts = []
    for _ in range(demonstrations):
        messages, completion = invoices.flawed_demonstration(rng)
        texts += [message["content"] for message in messages] + [completion]
        texts += ["system", "user", "assistant", invoices.ECHO_SYSTEM]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    assert backend.get_vocab_size() == SHAPE.vocab
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=SHAPE.max_positions,
        clean_up_tokenization_spaces=False,
    )
