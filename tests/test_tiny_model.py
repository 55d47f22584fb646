"""The shipped base model: what the default run starts from, and how it was made."""

import json
import re
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import MeshConfig, SamplingConfig, ScoringConfig
from jaxgrpo.data import load_problems
from jaxgrpo.evaluate import Evaluation, evaluate_heldout
from jaxgrpo.models.hf import load_hf
from jaxgrpo.rewards.invoice import SCHEMA
from jaxgrpo.rewards.pool import Pool
from jaxgrpo.rollout import Sampler
from jaxgrpo.sharding import make_mesh
from jaxgrpo.tokenizer import load_tokenizer
from scripts import build_invoices, invoices, pretrain_tiny
from scripts.demonstrations import echo_demonstration, flawed_demonstration

TINY = pretrain_tiny.OUT


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return load_hf(TINY)


def encode(tokenizer, text):
    return tokenizer.hf.encode(text, add_special_tokens=False)


def holds(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


def test_the_directory_is_whole_and_small():
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sizes.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(sizes.values()) <= 4_000_000


def test_the_model_has_the_shape_that_the_script_says(model, tokenizer):
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 574_528
    assert model.config == pretrain_tiny.CONFIG
    assert len(tokenizer.hf) == model.config.vocab


def test_generation_ends_where_the_turn_ends(tokenizer):
    (end,) = tokenizer.stop_ids
    assert tokenizer.hf.convert_ids_to_tokens(end) == "<|im_end|>"
    assert tokenizer.hf.pad_token == "<|endoftext|>"
    assert json.loads((TINY / "generation_config.json").read_text())["eos_token_id"] == end


def test_the_chat_template_is_chatml_without_thinking(tokenizer):
    ids = tokenizer.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zürich?"}]
    )
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nZürich?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_any_text_comes_back(tokenizer):
    rng = Random(0)
    alphabet = "aZ09 \n\t_-'\"{}[]:,.&/|\\€¥üßé数字🙂\u200b\x00"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_digit_is_a_token(tokenizer):
    rng = Random(1)
    for _ in range(100):
        text = invoices.draw_invoice(rng, "Moss & Fern 24", invoices.HELDOUT_TEMPLATES).text
        tokens = [tokenizer.decode([i]) for i in encode(tokenizer, text)]
        assert [token for token in tokens if re.search(r"\d", token)] == re.findall(r"\d", text)


@pytest.mark.parametrize("vendor", invoices.HELDOUT_VENDORS + invoices.TRAIN_VENDORS)
def test_a_name_has_the_same_ids_in_the_text_and_in_the_json(tokenizer, vendor):
    name = encode(tokenizer, vendor)
    rng = Random(vendor)
    for templates in (invoices.TRAIN_TEMPLATES, invoices.HELDOUT_TEMPLATES):
        text = invoices.draw_invoice(rng, vendor, templates).text
        assert holds(tokenizer.encode_chat(invoices.prompt(text)), name)
    assert holds(encode(tokenizer, json.dumps({"vendor": vendor}, ensure_ascii=False)), name)


def test_the_base_fails_as_it_was_made_to_and_reads_well(model, tokenizer):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    problems = load_problems(build_invoices.OUT / "heldout_50.jsonl", tokenizer, 128)
    with jax.set_mesh(mesh), Pool(SCHEMA, {}, ScoringConfig()) as pool:
        record = evaluate_heldout(
            Sampler(tokenizer, SamplingConfig(max_tokens=64), 128, mesh),
            pool,
            model,
            {"heldout_50": problems},
            Evaluation("heldout_50"),
            batch=50,
            seed=0,
        )
    assert record["n"] == 50
    assert 0.5 <= record["schema_valid"]["rate"] <= 0.75
    assert record["exact"]["count"] >= 0.9 * record["schema_valid"]["count"]
    # Each way of failing that the demonstrations have, and next to no other.
    for reason in ("fenced", "prose", "type@/amount", "format@/date"):
        assert record["reasons"][reason] >= 1, record["reasons"]


def test_the_training_loss_is_that_of_whole_sequences(model, tokenizer):
    tasks = (echo_demonstration, flawed_demonstration)
    batch = pretrain_tiny.make_batch(Random(2), tasks, tokenizer)
    rng = Random(2)
    total = count = 0.0
    for task in tasks:
        for _ in range(pretrain_tiny.BATCH // 2):
            messages, text = task(rng)
            prompt = tokenizer.encode_chat(messages)
            answer = [*encode(tokenizer, text), *tokenizer.stop_ids]
            ids = np.zeros((1, 224), np.int32)
            ids[0, : len(prompt + answer)] = prompt + answer
            logp = jax.nn.log_softmax(model.logits(jnp.asarray(ids)))[0]
            for i, token in enumerate(answer):
                total -= float(logp[len(prompt) - 1 + i, token])
            count += len(answer)
    assert float(pretrain_tiny.answer_loss(model, batch)) == pytest.approx(total / count, abs=1e-4)
