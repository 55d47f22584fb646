"""The sampler against the plain way: full sequences through the same model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxgrpo import hlo
from jaxgrpo.config import MeshConfig
from jaxgrpo.drawing import Truncation, draw_tokens, truncate
from jaxgrpo.lookup import NO_TOKEN, look_up, prompts_and_hints
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import GATHERED, make_mesh, param_shardings, put_batch, reshard
from jaxgrpo.types import Prompts

VOCAB = 64


@pytest.fixture(scope="module")
def model():
    config = Qwen3Config(vocab=VOCAB, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48)
    # Larger weights than at initialisation, so that distributions are far from uniform.
    return jax.jit(lambda: jax.tree.map(lambda w: w * 8, Qwen3(config, nnx.Rngs(3))))()


def prompts_of(ids, bucket=16):
    prefix = np.zeros((len(ids), bucket), np.int32)
    for row, prompt in enumerate(ids):
        prefix[row, : len(prompt) - 1] = prompt[:-1]
    lengths = np.array([len(prompt) - 1 for prompt in ids], np.int32)
    return Prompts(prefix, lengths, np.array([prompt[-1] for prompt in ids], np.int32))


def random_prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length) for length in lengths]


def run(model, ids, *, numbers=None, temperature=1.0, key=0, bucket=16, hints=None, **kwargs):
    kwargs = {"group": 3, "max_tokens": 12, "stop_ids": (7, 9), **kwargs}
    numbers = np.arange(len(ids)) if numbers is None else numbers
    prompts = prompts_of(ids, bucket)
    key = jax.random.key(key)
    out = sample(
        model,
        prompts,
        key,
        np.asarray(numbers, np.uint32),
        np.float32(temperature),
        hints,
        **kwargs,
    )
    return jax.tree.map(np.asarray, out)


@jax.jit
def full_logits(model, ids_T):
    return model.logits(ids_T[None])[0]


def full_logprobs(model, prompt, completion, temperature):
    """float32 `[C, V]`: each completion token's distribution from the whole sequence."""
    ids = np.concatenate([prompt, completion])[:-1]
    padded = np.pad(ids, (0, 32 - len(ids)))  # one program for all lengths
    logits = np.asarray(full_logits(model, padded))[len(prompt) - 1 : len(ids)]
    scaled = logits / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_the_full_forward_pass(model, temperature):
    # The fixture magnifies rounding: one unit in the last place of its weights moves some of its
    # log-probabilities by 4e-4. With smaller weights 1e-4 is a bound that compilers keep.
    model = jax.tree.map(lambda w: w * 0.5, model)
    ids = random_prompts(1, [1, 2, 9, 17])  # a one-token prompt, and one that fills the bucket
    out = run(model, ids, temperature=temperature)
    for p, prompt in enumerate(ids):
        for g in range(3):
            n = out.length_PG[p, g]
            tokens = out.tokens_PGC[p, g, :n]
            want = full_logprobs(model, prompt, tokens, np.float32(temperature))
            np.testing.assert_allclose(
                out.logprobs_PGC[p, g, :n], want[np.arange(n), tokens], atol=1e-4
            )


def test_greedy_takes_the_likeliest_token(model):
    ids = random_prompts(2, [3, 8, 14])
    out = run(model, ids, temperature=0.0, group=1)
    for p, prompt in enumerate(ids):
        tokens = out.tokens_PGC[p, 0, : out.length_PG[p, 0]]
        want = full_logprobs(model, prompt, tokens, np.float32(1))
        np.testing.assert_array_equal(tokens, want.argmax(-1))


def test_lengths_end_with_the_first_stop_token(model):
    out = run(model, random_prompts(3, [5] * 12), group=6, max_tokens=20)
    assert 0 < out.stopped_PG.mean() < 1  # both kinds occur
    for tokens, length, stopped in zip(
        out.tokens_PGC.reshape(-1, 20), out.length_PG.ravel(), out.stopped_PG.ravel(), strict=True
    ):
        stops = np.flatnonzero(np.isin(tokens[:length], (7, 9)))
        if stopped:
            assert stops.tolist() == [length - 1]
        else:
            assert stops.size == 0
            assert length == 20


def test_stop_as_first_token_and_never(model):
    ids = random_prompts(4, [6, 6])
    everything = run(model, ids, stop_ids=tuple(range(VOCAB)))
    assert everything.stopped_PG.all()
    assert (everything.length_PG == 1).all()
    never = run(model, ids, stop_ids=(VOCAB + 5,))
    assert not never.stopped_PG.any()
    assert (never.length_PG == 12).all()
    np.testing.assert_array_equal(never.tokens_PGC[..., 0], everything.tokens_PGC[..., 0])


def test_tokens_do_not_depend_on_batch_bucket_or_group(model):
    ids = random_prompts(5, [4, 11, 7, 1, 9, 13])
    numbers = [40, 41, 42, 43, 44, 45]
    out = run(model, ids, numbers=numbers)
    order = [4, 1, 3]
    other = run(
        model,
        [ids[i] for i in order],
        numbers=[numbers[i] for i in order],
        bucket=40,
        group=5,
    )
    for row, i in enumerate(order):
        for g in range(3):
            n = out.length_PG[i, g]
            assert n == other.length_PG[row, g]
            np.testing.assert_array_equal(out.tokens_PGC[i, g, :n], other.tokens_PGC[row, g, :n])


def test_keys_differ_by_step_problem_and_sample(model):
    ids = [random_prompts(6, [8])[0]] * 2
    # The model is sure of itself: at temperature 1 two branches in three are the same.
    out = run(model, ids, stop_ids=(VOCAB,), temperature=4.0)
    branches = {tuple(tokens) for tokens in out.tokens_PGC.reshape(-1, 12)}
    assert len(branches) == 6
    other = run(model, ids, stop_ids=(VOCAB,), temperature=4.0, key=1)
    assert not branches & {tuple(tokens) for tokens in other.tokens_PGC.reshape(-1, 12)}
    same = run(model, ids, stop_ids=(VOCAB,), temperature=4.0, numbers=[5, 5])
    np.testing.assert_array_equal(same.tokens_PGC[0], same.tokens_PGC[1])


def test_samples_follow_the_distribution(model):
    ids = [random_prompts(7, [6])[0]] * 8
    out = run(model, ids, group=512, max_tokens=1, stop_ids=(VOCAB,))
    counts = np.bincount(out.tokens_PGC.ravel(), minlength=VOCAB)
    want = np.exp(full_logprobs(model, ids[0], np.array([0]), np.float32(1))[0]) * counts.sum()
    likely = want > 5
    chi2 = ((counts - want)[likely] ** 2 / want[likely]).sum()
    # 99.99 % of a chi-square with k degrees of freedom lies below k + 4 sqrt(2 k) + 8, roughly.
    assert chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum()) + 8


@pytest.mark.parametrize(
    ("truncation", "allowed"),
    [
        (Truncation(top_k=3), lambda p: p >= np.sort(p)[-3]),
        (Truncation(min_p=0.2), lambda p: p >= 0.2 * p.max()),
        (
            Truncation(top_p=0.6),
            # Kept while what is likelier does not already make up 0.6.
            lambda p: np.array([p[p > x].sum() < 0.6 for x in p]),
        ),
        (Truncation(top_k=1), lambda p: p == p.max()),
    ],
)
def test_truncation_draws_all_of_what_it_allows_and_nothing_else(model, truncation, allowed):
    ids = [random_prompts(8, [6])[0]] * 8
    out = run(
        model,
        ids,
        group=256,
        max_tokens=1,
        stop_ids=(VOCAB,),
        temperature=1.5,
        truncation=truncation,
    )
    logp = full_logprobs(model, ids[0], np.array([0]), np.float32(1.5))[0]
    may = allowed(np.exp(logp))
    drawn = np.zeros(VOCAB, bool)
    drawn[out.tokens_PGC.ravel()] = True
    assert not (drawn & ~may).any()
    assert drawn[may & (logp > np.log(0.02))].all()
    # Reported are the probabilities of the whole distribution, which is the one that is trained.
    np.testing.assert_allclose(out.logprobs_PGC.ravel(), logp[out.tokens_PGC.ravel()], atol=1e-4)


def test_same_tokens_on_any_mesh(model):
    ids = random_prompts(9, [4, 11, 7, 1, 9, 13, 2, 16])
    want = run(model, ids)
    for config, draft in ((MeshConfig(8, 1), 0), (MeshConfig(4, 2), 0), (MeshConfig(4, 2), 3)):
        mesh = make_mesh(config)
        sharded = jax.device_put(model, param_shardings(model, mesh))
        assert sharded.layers.gate[...].sharding.spec == PartitionSpec(None, "fsdp", "tp")
        with jax.set_mesh(mesh):
            out = sample(
                sharded,
                put_batch(prompts_of(ids), mesh),
                jax.random.key(0),
                put_batch(np.arange(8, dtype=np.uint32), mesh),
                np.float32(1),
                group=3,
                max_tokens=12,
                stop_ids=(7, 9),
                draft=draft,
            )
        np.testing.assert_array_equal(want.length_PG, out.length_PG)
        np.testing.assert_array_equal(want.stopped_PG, out.stopped_PG)
        counts = np.arange(12) < want.length_PG[..., None]
        np.testing.assert_array_equal(
            np.where(counts, want.tokens_PGC, 0), np.where(counts, out.tokens_PGC, 0)
        )


def test_decoding_reads_parameters_that_only_tp_divides(model):
    mesh = make_mesh(MeshConfig(4, 2))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, param_shardings(model, mesh))
        whole = jax.jit(reshard, static_argnums=1)(sharded, GATHERED)
    assert whole.layers.gate[...].sharding.spec == PartitionSpec(None, None, "tp")
    jax.tree.map(np.testing.assert_array_equal, model, whole)


def test_bfloat16_compute_follows_float32(model):
    # Over many prompts: how one is rounded depends on how the compiler puts the program together.
    ids = random_prompts(10, [5, 9] * 32)
    full = run(model, ids, temperature=0.0, group=1, max_tokens=1)
    half = jax.tree.map(lambda w: w, model)
    half.config = half.layers.config = Qwen3Config(**{**vars(model.config), "dtype": jnp.bfloat16})
    close = run(half, ids, temperature=0.0, group=1, max_tokens=1)
    assert close.logprobs_PGC.dtype == np.float32
    assert np.mean(close.tokens_PGC == full.tokens_PGC) > 0.9
    assert np.abs(close.logprobs_PGC - full.logprobs_PGC).mean() < 0.05


# ---------------------------------------------------------------------------- prompt lookup


def as_hints(completions):
    """The completions themselves, each with `NO_TOKEN` behind it."""
    tokens_PGC = np.asarray(completions.tokens_PGC, np.int32)
    counts = np.arange(tokens_PGC.shape[-1]) < completions.length_PG[..., None]
    apart = np.pad(np.where(counts, tokens_PGC, NO_TOKEN), [(0, 0), (0, 0), (0, 1)])
    apart[..., -1] = NO_TOKEN
    return apart.ravel()


def assert_same_completions(got, want):
    np.testing.assert_array_equal(got.length_PG, want.length_PG)
    np.testing.assert_array_equal(got.stopped_PG, want.stopped_PG)
    counts = np.arange(want.tokens_PGC.shape[-1]) < want.length_PG[..., None]
    np.testing.assert_array_equal(got.tokens_PGC[counts], want.tokens_PGC[counts])
    # One unit in the last place of all weights moves some of these by 4e-4.
    np.testing.assert_allclose(got.logprobs_PGC[counts], want.logprobs_PGC[counts], atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("draft", [1, 3, 20])  # the last beyond the limit
def test_drafts_change_no_token(model, draft, temperature):
    ids = random_prompts(11, [4, 1, 17, 9])
    plain = run(model, ids, temperature=temperature, group=4)
    assert (plain.passes_PG == plain.length_PG).all()
    # Nothing to look up but the prompt and the siblings; noise; and the very answers.
    noise = np.random.default_rng(12).integers(-1, VOCAB, 60).astype(np.int32)
    passes = {}
    for name, hints in (("none", None), ("noise", noise), ("answers", as_hints(plain))):
        out = run(model, ids, temperature=temperature, group=4, draft=draft, hints=hints)
        assert_same_completions(out, plain)
        assert (out.passes_PG <= out.length_PG).all()
        passes[name] = out.passes_PG.sum()
    # Known answers are gone through in strides.
    assert passes["answers"] < plain.length_PG.sum() * (0.8 if draft == 1 else 0.65)


def test_drafts_stop_at_a_stop_token_within_what_was_proposed(model):
    ids = random_prompts(13, [6] * 8)
    plain = run(model, ids, stop_ids=(7, 9, 11), max_tokens=30)
    assert plain.stopped_PG.mean() > 0.3
    out = run(model, ids, stop_ids=(7, 9, 11), max_tokens=30, draft=6, hints=as_hints(plain))
    assert_same_completions(out, plain)
    assert out.passes_PG.sum() < 0.7 * plain.passes_PG.sum()


def test_drafts_leave_the_distribution_as_it_is(model):
    """The second token's, after a likely first one was proposed together with a guess at it."""
    ids = [random_prompts(14, [6])[0]] * 8
    first = np.exp(full_logprobs(model, ids[0], np.array([0]), np.float32(1.5))[0])
    second = np.stack(
        [full_logprobs(model, ids[0], np.array([t, 0]), np.float32(1.5))[1] for t in range(VOCAB)]
    )
    want = first @ np.exp(second)
    guess = first.argmax()
    hints = np.array([ids[0][-1], guess, second[guess].argmax(), NO_TOKEN], np.int32)
    out = run(
        model, ids, temperature=1.5, group=512, max_tokens=2, stop_ids=(VOCAB,), draft=2,
        hints=hints,
    )  # fmt: skip
    # Those that drew the guess have drawn the second token in the same pass, whatever it is.
    np.testing.assert_array_equal(out.passes_PG == 1, out.tokens_PGC[..., 0] == guess)
    assert 0.05 < (out.passes_PG == 1).mean() < 0.95
    counts = np.bincount(out.tokens_PGC[..., 1].ravel(), minlength=VOCAB)
    want = want * counts.sum()
    likely = want > 5
    chi2 = ((counts - want)[likely] ** 2 / want[likely]).sum()
    assert chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum()) + 8


def test_lookup_by_hand():
    hints = np.array([5, 6, 7, NO_TOKEN], np.int32)
    prompts = Prompts(
        np.array([[1, 2, 3, 4, 2, 0]], np.int32), np.array([5], np.int32), np.array([3], np.int32)
    )
    text = prompts_and_hints(prompts, hints)
    assert text.tolist() == [[-1, -1, 5, 6, 7, -1, -1, -1, -1, 1, 2, 3, 4, 2, 3]]
    branches = np.full((1, 4, 6), 99, np.int32)
    branches[0, :, :4] = [[3, 99, 99, 99], [3, 5, 6, 99], [3, 8, 1, 99], [3, 9, 8, 99]]
    lengths = np.array([[0, 2, 2, 2]], np.int32)
    found = look_up(text, branches, lengths, 2)
    # "2 3" went on with 4 in the prompt; "5 6" with 7 and the end of the hint; "1" with 2 in the
    # prompt, the longer match with nothing behind it being no match; "8" with 1 in the sibling.
    assert found.tolist() == [[[4, 2], [7, -1], [2, 3], [1, -1]]]


# ---------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("vocab", [7, 64, 77, 1000, 4096])
def test_draws_follow_any_vocabulary(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.float32(2 * rng.standard_normal(vocab))
    keys = jax.random.split(jax.random.key(vocab), (40, 50))
    shape = (40, 50, 4)
    position = np.broadcast_to(np.arange(4), shape)
    draw = jax.jit(draw_tokens, static_argnums=4)
    many = np.broadcast_to(logits, (*shape, vocab))
    tokens, logprobs = draw(many, keys, position, np.bool_(False), Truncation())
    want = np.exp(logits - np.logaddexp.reduce(logits))
    np.testing.assert_allclose(np.exp(logprobs), want[tokens], rtol=1e-4)
    counts, want = np.bincount(np.ravel(tokens), minlength=vocab), want * tokens.size
    likely = want > 5
    chi2 = ((counts - want)[likely] ** 2 / want[likely]).sum()
    assert chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum()) + 8
    greedy, _ = draw(many, keys, position, np.bool_(True), Truncation())
    assert (greedy == logits.argmax()).all()


@pytest.mark.parametrize("seed", range(3))
def test_truncation_without_sorting_is_truncation_by_sorting(seed):
    rng = np.random.default_rng(seed)
    logits = np.float32(3 * rng.standard_normal((50, 300)))
    logits[10] = 0.0  # all the same
    logits[11, ::2] = -np.inf
    descending = -np.sort(-logits, -1)
    for k in (1, 2, 50, 299, 300, 1000):
        kept = np.isfinite(truncate(logits, Truncation(top_k=k)))
        np.testing.assert_array_equal(
            kept, (logits >= descending[:, [min(k, 300) - 1]]) & np.isfinite(logits)
        )
    p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True)).astype(np.float64)
    before = np.array([[row[row > x].sum() for x in row] for row in p])
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        sure = np.abs(before - top_p) > 1e-5
        kept = np.isfinite(truncate(logits, Truncation(top_p=top_p)))
        np.testing.assert_array_equal(kept[sure], ((before < top_p) & np.isfinite(logits))[sure])


# ---------------------------------------------------------------------------- the program


@pytest.mark.parametrize("draft", [0, 3])
def test_the_cache_is_written_in_place_and_the_prefix_not_repeated(model, draft):
    ids = random_prompts(16, [9] * 5)
    program = sample.lower(
        model, prompts_of(ids), jax.random.key(0), np.arange(5, dtype=np.uint32), np.float32(1),
        group=6, max_tokens=13, stop_ids=(7,), draft=draft,
    ).compile().as_text()  # fmt: skip
    program, cache = hlo.parse(program), (5, 2, 6, 13, 8)  # P, K, G, C, H
    (body,) = hlo.open_loops(program)
    written = [instruction for instruction, _ in hlo.written(program, body)]
    of_cache = [i for i in written if i.results[0].dims == cache]
    assert of_cache  # two for each layer
    assert not [i for i in of_cache if hlo.moves_only(program, i)]
    prefix_for_each_branch = (5, 2, 6, 16, 8)
    assert all(i.results[0].dims != prefix_for_each_branch for i in written)


@pytest.mark.parametrize("draft", [0, 3])
def test_devices_write_their_own_branches(model, draft):
    mesh = make_mesh(MeshConfig(8, 1))
    ids = random_prompts(17, [4] * 8)
    with jax.set_mesh(mesh):
        program = sample.lower(
            jax.device_put(model, param_shardings(model, mesh)),
            put_batch(prompts_of(ids), mesh),
            jax.random.key(0),
            put_batch(np.arange(8, dtype=np.uint32), mesh),
            np.float32(1),
            group=3,
            max_tokens=12,
            stop_ids=(7,),
            draft=draft,
        ).compile()
    moved = [line for line in program.as_text().splitlines() if re.search(r" all-\w+\(", line)]
    assert moved  # weights are gathered, before the loop
    assert not [line for line in moved if "while/body" in line]
