"""Constrained decoding: what it lets through, what it leaves as it is, that training follows it."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgrpo.config import GrpoConfig, MeshConfig, SamplingConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.constrain import Constraint
from jaxgrpo.logprobs import allow, token_logprobs
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.rewards.json_schema import SchemaReward
from jaxgrpo.rollout import Group, Sampler, pack
from jaxgrpo.sharding import FSDP, make_mesh, param_shardings
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.train import train
from jaxgrpo.types import Masks, Problem
from jaxgrpo.update import batch_logprobs

CONFIGS = Path(__file__).parent.parent / "configs"
TOKENIZER = load_tokenizer(CONFIGS / "tiny_qwen3")
VOCAB = len(TOKENIZER.hf) + 8  # a model may have ids that are no token
KIND = {"type": "object", "properties": {"kind": {"enum": ["a", "bc", None]}}}
KIND |= {"required": ["kind"], "additionalProperties": False}
SCHEMAS = [
    json.loads((CONFIGS / "invoices" / "schema.json").read_text("utf-8")),
    KIND,
    {"type": "array", "items": {"type": ["integer", "boolean"]}, "minItems": 1, "maxItems": 3},
    {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    {"oneOf": [{"type": "string", "pattern": "^[0-9]{2}$"}, {"const": {"x": 1.5}}]},
]
LIMIT = 48


@pytest.fixture(scope="module")
def model():
    """Weights at random: nothing but the constraint makes its texts what they are."""
    config = Qwen3Config(vocab=VOCAB, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn=48)
    return jax.jit(lambda: jax.tree.map(lambda w: w * 4, Qwen3(config, nnx.Rngs(3))))()


@pytest.fixture(scope="module")
def problems():
    """One of each schema, with prompts of different lengths."""
    rng = np.random.default_rng()
    return [
        Problem(i, str(i), tuple(rng.integers(0, VOCAB - 8, 2 + 3 * i)), {"schema": schema})
        for i, schema in enumerate(SCHEMAS)
    ]


def sampler(mesh=None, draft=0, constrain=True):
    config = SamplingConfig(max_tokens=LIMIT, draft=draft)
    constraint = Constraint(TOKENIZER, VOCAB) if constrain else None
    mesh = mesh or make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return Sampler(TOKENIZER, config, 16, mesh, constraint=constraint)


def draw(sampler, model, problems, group=4, seed=1, temperature=1.0):
    numbered = [(problem.number, problem) for problem in problems]
    key, batch = jax.random.key(seed), len(problems)
    with jax.set_mesh(sampler.mesh):
        model = jax.device_put(model, param_shardings(model, sampler.mesh, FSDP))
        return sampler(model, numbered, key, temperature=temperature, group=group, batch=batch)


HUGE = re.compile(r"\d[eE]\+?\d{3}")


def test_what_ends_before_the_limit_is_valid(model, problems):
    seed = int(np.random.default_rng().integers(2**31))
    ended = 0
    for answers in draw(sampler(), model, problems, group=24, seed=seed):
        judge = SchemaReward(answers.problem.row["schema"]).judge
        for text, stopped in zip(answers.texts, answers.stopped_G, strict=True):
            ended += stopped
            if not stopped:
                continue
            # The grammar of a date knows neither the length of months nor the calendar's begin,
            # that of a number knows no range of doubles.
            reason = judge(text).reason
            huge = reason == "not_json" and HUGE.search(text)
            assert huge or reason in ("valid", "format@/date"), (seed, text)
    assert ended > 48, seed
    free = [text for a in draw(sampler(constrain=False), model, problems) for text in a.texts]
    assert not any(text.startswith(("{", "[", '"')) and text[-1] in '}]"' for text in free)


def test_masks_are_what_can_still_become_an_answer():
    """By hand: after `{"kind": ` come the beginnings of the enum's three texts, and white space."""
    constraint = Constraint(TOKENIZER, VOCAB, KIND)
    tokens = TOKENIZER.hf.encode('{"kind": "bc"}', add_special_tokens=False)
    tokens_11C = np.array([[[*tokens, TOKENIZER.stop_ids[0], 0]]], np.int32)
    table, index = constraint.replay([{}], tokens_11C, np.array([[len(tokens) + 1]]))
    allowed = np.asarray(allow(jnp.zeros((1, VOCAB)), table[0, index[0, 0]])) == 0
    for c in range(len(tokens) + 1):
        before = TOKENIZER.decode(tokens[:c])
        for token in range(VOCAB - 8):
            if token in TOKENIZER.stop_ids:
                expected = c == len(tokens)
            else:
                text = before + TOKENIZER.decode([token])
                expected = _begins(text) and token not in TOKENIZER.hf.added_tokens_decoder
            # Where only one text can follow, of its tokens only the usual ones are allowed.
            if allowed[c, token] or "kind" in before:
                assert allowed[c, token] == expected, (before, token, TOKENIZER.decode([token]))
        assert not allowed[c, VOCAB - 8 :].any()
        assert allowed[c, tokens_11C[0, 0, c]]
    assert allowed[-1].all()  # behind the end


def _begins(text):
    """Whether a JSON text of `KIND` begins so, with at most a space between two of its parts."""
    parts = ["{", '"kind"', ":", None, "}"]

    def rest(text, parts):
        if not text or not parts:
            return not text
        options = [parts[0]] if parts[0] else ['"a"', '"bc"', "null"]
        gaps = ("",) if len(parts) == 5 else ("", " ", "\n", "\n  ", "\n ")
        return any(
            (gap + part).startswith(text)
            or (text.startswith(gap + part) and rest(text[len(gap + part) :], parts[1:]))
            for gap in gaps
            for part in options
        )

    return rest(text, parts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing(model, problems, temperature):
    plain = draw(sampler(), model, problems, temperature=temperature)
    drafting = sampler(draft=3)
    draw(drafting, model, problems, temperature=temperature)
    # Again, with the first answers to look up: what is proposed then is what comes.
    drafted = draw(drafting, model, problems, temperature=temperature)
    assert [a.texts for a in plain] == [a.texts for a in drafted]
    passes = [sum(a.passes_G.sum() for a in answers) for answers in (plain, drafted)]
    assert passes[1] < passes[0]  # proposals were taken
    for one, other in zip(plain, drafted, strict=True):
        np.testing.assert_array_equal(one.length_G, other.length_G)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tp": 2}])
def test_devices_change_nothing(model, problems, sizes):
    four = [*problems[:4]]
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    alone = draw(sampler(), model, four)
    assert [a.texts for a in draw(sampler(mesh), model, four)] == [a.texts for a in alone]


def test_the_trainer_takes_log_probabilities_under_the_same_masks(model, problems):
    # Halved weights: with all four of them large, float32 alone is 1e-5 off, masks or none.
    model = jax.jit(lambda model: jax.tree.map(lambda w: w / 2, model))(model)
    drawer = sampler()
    answers = draw(drawer, model, problems[:4])
    batch = packed(answers, drawer)
    assert batch.masks.table_PUW.shape[1] <= 64  # of up to 192 positions
    args = {"temperature": 1.0, "chunk_bytes": 1 << 14}
    logp_PGC = np.asarray(batch_logprobs(model, batch, **args))
    free_PGC = np.asarray(batch_logprobs(model, batch._replace(masks=None), **args))
    differ = 0
    for p, each in enumerate(answers):
        for g, n in enumerate(each.length_G):
            np.testing.assert_allclose(logp_PGC[p, g, :n], each.logprobs_GC[g, :n], atol=2e-5)
            differ += (np.abs(free_PGC[p, g, :n] - each.logprobs_GC[g, :n]) > 0.1).sum()
    assert differ > 100


def packed(answers, drawer):
    rng = np.random.default_rng()
    groups = []
    for each in answers:
        rewards_G = rng.random(len(each.texts)).astype(np.float32)
        groups.append(Group(each, [], rewards_G, np.ones(len(rewards_G), bool), {}, []))
    return pack(groups, GrpoConfig(), drawer)


def test_log_probability_entropy_and_gradient_are_those_of_the_allowed_tokens():
    rng = np.random.default_rng()
    p, g, c, d, v, u = 2, 3, 5, 8, 70, 4
    hidden = 0.3 * rng.normal(size=(p, g, c, d)).astype(np.float32)
    head = rng.normal(size=(v, d)).astype(np.float32)
    allowed = rng.random((p, u, v)) < 0.1
    targets = rng.integers(0, v, (p, g, c)).astype(np.int32)
    index = rng.integers(0, u, (p, g, c)).astype(np.int32)
    at = (np.arange(p)[:, None, None], index)
    allowed[(*at, targets)] = True
    bits = np.pad(allowed, [(0, 0), (0, 0), (0, 96 - v)]).reshape(p, u, 3, 32)
    table = (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)

    def plain(hidden, head):
        scaled = jnp.einsum("pgcd,vd->pgcv", hidden, head) / 0.7
        logp = jax.nn.log_softmax(scaled - 1e5 * ~allowed[at])
        entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
        return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], entropy

    for chunk_bytes in (1 << 20, 1):

        def ours(hidden, head, chunk_bytes=chunk_bytes):
            return token_logprobs(hidden, head, targets, 0.7, chunk_bytes, Masks(table, index))

        for one, other in zip(ours(hidden, head), plain(hidden, head), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        gradients = [
            jax.grad(lambda *args, f=f: sum(jnp.sum(jnp.sin(x)) for x in f(*args)), (0, 1))
            for f in (ours, plain)
        ]
        for one, other in zip(*(gradient(hidden, head) for gradient in gradients), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_run_is_valid_throughout_and_its_ratio_exact(tmp_path):
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)
    (tmp_path / "heldout.jsonl").write_text("".join(lines[:8]), "utf-8")
    options = ["--data.heldout", tmp_path / "heldout.jsonl", "--run.dir", tmp_path / "run"]
    options += ["--sampling.constrain", "--run.steps", 2, "--rollout.group", 4, "--eval.samples", 0]
    train(parse_args([*map(str, options)]))
    read = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, read):
        assert record["valid_share"] == 1 - record["truncated_share"]
        assert abs(record["ratio_min"] - 1) < 1e-4 > abs(record["ratio_max"] - 1)
        assert record["grad_norm"] > 0 == record["skipped"]


def test_schemas_that_cannot_be_held_to_are_refused_with_their_place(tmp_path):
    odd = {"type": "array", "uniqueItems": True}
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: answers cannot be .*\"uniqueItems\""):
        Constraint(TOKENIZER, VOCAB).check(odd, "x.jsonl:3")
    row = {"messages": [{"role": "user", "content": "?"}], "schema": odd}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    options = ["--data.train", str(tmp_path / "train.jsonl"), "--run.dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"train\.jsonl:1: answers cannot be constrained"):
        train(parse_args([*options, "--sampling.constrain"]))
    assert not (tmp_path / "run").exists()


def test_without_a_schema_any_json_is_allowed_and_with_false_nothing_is():
    constraint = Constraint(TOKENIZER, VOCAB)
    constraint.check(True, "nowhere")
    stop = TOKENIZER.stop_ids[0]
    for text in ('{"a": [1.5, null]}', '"a"', "-1", "false"):
        tokens = [*TOKENIZER.hf.encode(text, add_special_tokens=False), stop]
        table, index = constraint.replay([{}], np.array([[tokens]]), np.array([[len(tokens)]]))
        words = table[0, index[0, 0]]
        assert all(words[c, token // 32] >> (token % 32) & 1 for c, token in enumerate(tokens))
        assert not words[0, stop // 32] >> (stop % 32) & 1
    with pytest.raises(ValueError, match=r"false\.json: answers cannot be constrained"):
        constraint.check(False, "false.json")


def test_a_schema_cannot_loosen_the_grammar():
    loose = {"type": "integer", "x-guidance": {"lenient": True, "whitespace_pattern": ".*"}}
    constraint = Constraint(TOKENIZER, VOCAB, loose)
    with pytest.raises(ValueError, match="uniqueItems"):
        constraint.check(loose | {"uniqueItems": True}, "x")
    tokens = np.array([[[*TOKENIZER.hf.encode("x", add_special_tokens=False)]]], np.int32)
    table, index = constraint.replay([{}], tokens, np.array([[1]]))
    x = tokens[0, 0, 0]
    assert not table[0, index[0, 0, 0], x // 32] >> np.uint32(x % 32) & 1
