"""The update against the plain way: whole sequences, one batch, one device, no chunks."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgrpo.config import GrpoConfig, MeshConfig, UpdateConfig
from jaxgrpo.logprobs import token_logprobs
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sharding import make_mesh, param_shardings, put_batch
from jaxgrpo.types import Completions, Prompts, RolloutBatch
from jaxgrpo.update import (
    batch_logprobs,
    init_train_state,
    make_optimizer,
    take_part,
    train_step,
)

P, G, L, C, VOCAB = 8, 4, 12, 6, 48
CONFIG = Qwen3Config(vocab=VOCAB, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48)


@jax.jit
def make_model():
    # Larger weights than at initialisation, so that attention and logits are far from uniform.
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w if "norm" in jax.tree_util.keystr(path) else 5 * w,
        Qwen3(CONFIG, nnx.Rngs(0)),
    )


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    return RolloutBatch(
        Prompts(
            rng.integers(0, VOCAB, (P, L)).astype(np.int32),
            rng.integers(0, L + 1, P).astype(np.int32),
            rng.integers(0, VOCAB, P).astype(np.int32),
        ),
        Completions(
            rng.integers(0, VOCAB, (P, G, C)).astype(np.int32),
            rng.normal(-2, 0.3, (P, G, C)).astype(np.float32),
            rng.integers(1, C + 1, (P, G)).astype(np.int32),
            rng.random((P, G)) < 0.5,
        ),
        rng.normal(size=(P, G)).astype(np.float32),
        rng.random((P, G)) < 0.8,
    )


def whole_sequence_logprobs(model, batch, temperature):
    """Every completion with its prompt as one sequence, padded on the right, logits and all."""
    prompts, tokens_PGC = batch.prompts, np.asarray(batch.completions.tokens_PGC)
    ids = np.zeros((P, G, L + 1 + C), np.int32)
    where = np.zeros((P, G, C), np.int32)
    for p, n in enumerate(prompts.prefix_len_P):
        for g in range(G):
            ids[p, g, :n] = prompts.prefix_PL[p, :n]
            ids[p, g, n] = prompts.last_P[p]
            ids[p, g, n + 1 : n + 1 + C] = tokens_PGC[p, g]
            where[p, g] = n + np.arange(C)
    logits = model.logits(ids.reshape(P * G, -1)).reshape(P, G, -1, VOCAB) / temperature
    logp = jax.nn.log_softmax(jnp.take_along_axis(logits, where[..., None], 2))
    return jnp.take_along_axis(logp, jnp.asarray(tokens_PGC)[..., None], -1)[..., 0]


def plain_loss(model, batch, ref_PGC, temperature, beta):
    """DAPO's token-level loss on-policy with a k3 penalty, written out."""
    logp = whole_sequence_logprobs(model, batch, temperature)
    length = np.where(batch.train_PG, batch.completions.length_PG, 0)
    mask = np.arange(C) < length[..., None]
    ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
    d = ref_PGC - logp
    loss = -ratio * batch.advantage_PG[..., None] + beta * (jnp.exp(d) - d - 1)
    return jnp.sum(jnp.where(mask, loss, 0.0)) / np.float32(mask.sum())


TX = optax.sgd(1.0)  # the step is then the gradient; one object, so that equal steps compile once


def take_step(model, batch, ref, *, mesh=None, minibatches=None, config=None, **kwargs):
    mesh = mesh or make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = jax.device_put(model, param_shardings(model, mesh))
        before = jax.tree.map(np.asarray, model)
        state = init_train_state(model, TX, mesh)
        batch, ref = put_batch((batch, ref), mesh)
        state, metrics = train_step(
            state,
            batch,
            None,
            ref,
            tx=TX,
            config=config or GrpoConfig(loss="dapo", kl_beta=0.3),
            **{
                "microbatches": 1,
                "temperature": 0.8,
                "max_tokens": C,
                "chunk_bytes": 1 << 30,
                **kwargs,
            },
        )
    grads = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.model)
    return grads, jax.device_get(metrics)


def assert_trees_close(got, want):
    """Equal up to float32 rounding, relative to each array's largest element."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.fixture(scope="module")
def reference():
    """The step on one device, in one piece, that all variants have to equal."""
    model, batch = make_model(), make_batch()
    ref = np.random.default_rng(9).normal(-3, 0.5, (P, G, C)).astype(np.float32)
    return model, batch, ref, *take_step(make_model(), batch, ref)


def test_step_is_the_gradient_of_whole_sequences(reference):
    model, batch, ref, grads, metrics = reference
    plain = partial(plain_loss, batch=batch, ref_PGC=ref, temperature=0.8, beta=0.3)
    loss, want = jax.jit(jax.value_and_grad(plain))(model)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(want), rtol=1e-4)
    assert_trees_close(grads, want)


def test_chunks_and_microbatches_add_up_to_the_whole(reference):
    _, batch, ref, want, metrics = reference
    # The second has logits for one position at a time.
    grads, again = take_step(make_model(), batch, ref, microbatches=4, chunk_bytes=1)
    assert_trees_close(grads, want)
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_remat_changes_nothing(reference):
    _, batch, ref, want, _ = reference
    model = make_model()
    model.config = model.layers.config = dataclasses.replace(CONFIG, remat="full")
    grads, _ = take_step(model, batch, ref)
    assert_trees_close(grads, want)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 2)])
def test_devices_change_nothing(reference, sizes):
    _, batch, ref, want, metrics = reference
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: sizes[0] * sizes[1]])
    grads, again = take_step(make_model(), batch, ref, mesh=mesh)
    assert_trees_close(grads, want)
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def lower_step(mesh, batch, microbatches=1):
    """The update's program on a mesh, compiled and not run."""
    tx = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        model = make_model()
        state = init_train_state(jax.device_put(model, param_shardings(model, mesh)), tx, mesh)
        return train_step.lower(
            state,
            batch,
            None,
            None,
            tx=tx,
            config=GrpoConfig(),
            microbatches=microbatches,
            temperature=1.0,
            max_tokens=C,
            chunk_bytes=1 << 30,
        ).compile()


def test_work_and_state_are_divided_over_devices():
    batch = make_batch()
    one = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    eight = make_mesh(MeshConfig(8, 1))
    with jax.set_mesh(eight):
        divided = lower_step(eight, put_batch(batch, eight))
    with jax.set_mesh(one):
        whole = lower_step(one, put_batch(batch, one))
    flops = [program.cost_analysis()["flops"] for program in (whole, divided)]
    # Each device has an eighth of the problems; what every device does itself is small.
    assert flops[0] / flops[1] > 5
    logits = rf"f32\[{P},{G},{C},{VOCAB}\]|f32\[{P * G * C},{VOCAB}\]"
    assert re.search(logits, whole.as_text())
    assert not re.search(logits, divided.as_text())
    sizes = [program.memory_analysis().argument_size_in_bytes for program in (whole, divided)]
    assert sizes[0] / sizes[1] > 5


def test_parts_of_a_batch_stay_divided_and_make_it_whole():
    mesh = make_mesh(MeshConfig(4, 2))
    batch = put_batch(make_batch(), mesh)
    parts = [take_part((batch, None), i, 2)[0] for i in range(2)]
    for part in parts:
        for x in jax.tree.leaves(part):
            assert x.sharding.shard_shape(x.shape)[0] == P // 2 // 4
    together = jax.tree.map(lambda a, b: np.stack([a, b], 1).reshape(P, *a.shape[1:]), *parts)
    for x, want in zip(jax.tree.leaves(together), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(x, want)


def test_padding_and_masked_completions_do_not_count(reference):
    _, batch, ref, want, _ = reference
    rng = np.random.default_rng(5)
    done = batch.completions
    past = np.arange(C) >= np.where(batch.train_PG, done.length_PG, 0)[..., None]
    noise = rng.integers(0, VOCAB, done.tokens_PGC.shape).astype(np.int32)
    prefix_past = np.arange(L) >= batch.prompts.prefix_len_P[:, None]
    other = batch._replace(
        completions=done._replace(
            tokens_PGC=np.where(past, noise, done.tokens_PGC),
            logprobs_PGC=np.where(past, np.nan, done.logprobs_PGC).astype(np.float32),
        ),
        prompts=batch.prompts._replace(prefix_PL=np.where(prefix_past, 1, batch.prompts.prefix_PL)),
    )
    grads, _ = take_step(make_model(), other, ref)
    assert_trees_close(grads, want)


def test_batch_logprobs_are_what_the_step_uses():
    model, batch = make_model(), make_batch(3)
    logp = batch_logprobs(model, batch, temperature=0.8, chunk_bytes=1 << 30)
    want = jax.jit(lambda model: whole_sequence_logprobs(model, batch, 0.8))(model)
    np.testing.assert_allclose(logp, want, atol=1e-4)
    # On-policy and with itself as reference: no KL, and ratios to the sampler as given.
    _, metrics = take_step(make_model(), batch, np.asarray(logp))
    assert abs(metrics["kl"]) < 1e-6
    length = np.where(batch.train_PG, batch.completions.length_PG, 0)
    mask = np.arange(C) < length[..., None]
    ratio = np.exp(np.asarray(logp) - batch.completions.logprobs_PGC)[mask]
    np.testing.assert_allclose(metrics["ratio_max"], ratio.max(), rtol=1e-3)
    assert 0 < metrics["entropy"] < np.log(VOCAB)


def test_bfloat16_compute_trains_float32_parameters(reference):
    model, batch, *_ = reference
    half = make_model()
    half.config = half.layers.config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16, remat="full")
    frozen = jax.tree.map(lambda w: jnp.array(w, jnp.bfloat16, copy=True), half)
    ref = batch_logprobs(frozen, batch, temperature=0.8, chunk_bytes=1)
    grads, metrics = take_step(half, batch, np.asarray(ref), microbatches=2, chunk_bytes=1)
    # The reference, rounded beforehand, is multiplied as the policy is: no KL between them.
    assert metrics["kl"] == 0
    assert metrics["skipped"] == 0
    ref = batch_logprobs(model, batch, temperature=0.8, chunk_bytes=1 << 30)
    exact, _ = take_step(make_model(), batch, np.asarray(ref))
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert g.dtype == np.float32
        cosine = (g * w).sum() / np.sqrt((g**2).sum() * (w**2).sum())
        assert cosine > 0.98


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["advantage", "sampler", "reference"])
def test_what_is_not_finite_never_reaches_the_parameters(where, value):
    batch, ref = make_batch(), np.full((P, G, C), -3, np.float32)
    batch.train_PG[0, 0] = True
    if where == "reference" and value == -np.inf:
        value = np.inf  # a token that the reference rules out: exp(-inf) is a plain 0
    target = {
        "advantage": batch.advantage_PG[..., None],
        "sampler": batch.completions.logprobs_PGC,
        "reference": ref,
    }[where]
    target[0, 0, 0] = value
    steps, metrics = take_step(make_model(), batch, ref)
    assert metrics["skipped"] == 1
    assert all((step == 0).all() for step in jax.tree.leaves(steps))


def test_what_is_not_finite_behind_the_mask_is_no_reason_to_skip(reference):
    model, batch, ref, _, metrics = reference
    spoilt = batch._replace(
        completions=batch.completions._replace(
            logprobs_PGC=np.where(
                np.arange(C) < np.where(batch.train_PG, batch.completions.length_PG, 0)[..., None],
                batch.completions.logprobs_PGC,
                np.float32(np.nan),
            )
        )
    )
    steps, same = take_step(model, spoilt, ref)
    assert same["skipped"] == metrics["skipped"] == 0
    assert any((step != 0).any() for step in jax.tree.leaves(steps))


def test_token_logprobs_by_hand():
    # Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4 at temperature 1, and at
    # temperature 1/2 the logits double, so the odds are 9: 1/10 and 9/10.
    hidden = jnp.ones((1, 1, 2, 1))
    head = jnp.array([[0.0], [np.log(3)]], jnp.float32)
    targets = jnp.array([[[0, 1]]])
    logp, entropy = token_logprobs(hidden, head, targets)
    np.testing.assert_allclose(np.exp(logp[0, 0]), [1 / 4, 3 / 4], rtol=1e-6)
    want = -(1 / 4 * np.log(1 / 4) + 3 / 4 * np.log(3 / 4))
    np.testing.assert_allclose(entropy[0, 0], [want, want], rtol=1e-6)
    logp, _ = token_logprobs(hidden, head, targets, temperature=0.5)
    np.testing.assert_allclose(np.exp(logp[0, 0]), [1 / 10, 9 / 10], rtol=1e-6)


def test_logits_are_never_kept_for_the_backward_pass():
    batch = make_batch()
    wide = dataclasses.replace(CONFIG, vocab=4096)
    model = jax.eval_shape(lambda: Qwen3(wide, nnx.Rngs(0)))

    def loss(model, chunk_bytes):
        hidden, _ = model(batch.completions.tokens_PGC)
        logp, _ = token_logprobs(
            hidden, model.head_VD(), batch.completions.tokens_PGC, 1.0, chunk_bytes
        )
        return logp.sum()

    one_position = 4 * P * G * 4096

    def temporary(chunk_bytes):
        step = jax.jit(jax.grad(loss), static_argnums=1).lower(model, chunk_bytes).compile()
        return step.memory_analysis().temp_size_in_bytes

    # All C positions at once hold C times as many logits (and their gradients) as one at a time.
    assert temporary(1 << 30) - temporary(1) > (C - 2) * one_position


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (UpdateConfig(lr=1.0), [1, 1, 1, 1]),
        (UpdateConfig(lr=1.0, schedule="linear"), [1, 0.75, 0.5, 0.25]),
        (UpdateConfig(lr=1.0, warmup_steps=2), [0.5, 1, 1, 1]),
        (UpdateConfig(lr=1.0, schedule="cosine", warmup_steps=2), [0.5, 1, 1, 0.5]),
    ],
)
def test_schedules(config, rates):
    # Adam's first steps on a constant gradient each move by the learning rate.
    with jax.numpy_dtype_promotion("standard"):
        tx = make_optimizer(dataclasses.replace(config, eps=1e-12), rollouts=4)
        params = {"w": jnp.zeros(3)}
        opt_state = tx.init(params)
        for rate in rates:
            updates, opt_state = tx.update({"w": jnp.full(3, 0.1)}, opt_state, params)
            np.testing.assert_allclose(updates["w"], -rate, rtol=1e-4)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_first_moment_is_kept_as_configured(moments):
    """Adam in NumPy, its first moment rounded after each step; the second is float32 always."""
    rng, rounded = np.random.default_rng(), jnp.dtype(moments)
    config = UpdateConfig(lr=1e-2, b1=0.75, b2=0.95, clip_norm=0.0, moments=moments)
    tx = make_optimizer(config, rollouts=9)
    params = {"w": rng.normal(size=50).astype(np.float32)}
    opt_state = tx.init(params)
    mu = nu = np.zeros(50, np.float32)
    with jax.numpy_dtype_promotion("standard"):
        for n in range(1, 6):
            # Exact in float32, so that what is rounded is the same number here and there.
            grad = rng.integers(-64, 65, 50).astype(np.float32) / 16
            updates, opt_state = tx.update({"w": grad}, opt_state, params)
            mu = np.float32(0.75) * mu.astype(np.float32) + np.float32(0.25) * grad
            nu = np.float32(0.95) * nu + np.float32(0.05) * grad**2
            want = -1e-2 * mu / (1 - 0.75**n) / (np.sqrt(nu / (1 - 0.95**n)) + 1e-8)
            np.testing.assert_allclose(updates["w"], want, rtol=1e-5, atol=1e-9)
            mu = mu.astype(rounded)
    adam = opt_state[1][0]
    assert adam.mu["w"].dtype == rounded
    assert adam.nu["w"].dtype == jnp.float32


def test_weight_decay_leaves_norms_and_biases_alone():
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    tx = make_optimizer(UpdateConfig(lr=0.1, weight_decay=0.5), rollouts=1)

    @jax.jit
    def decay():
        model = jax.tree.map(lambda w: w + 1, Qwen3(config, nnx.Rngs(0)))
        zero = jax.tree.map(jnp.zeros_like, model)
        return model, tx.update(zero, tx.init(model), model)[0]

    with jax.numpy_dtype_promotion("standard"):
        model, updates = decay()
    np.testing.assert_allclose(updates.layers.gate[...], -0.05 * model.layers.gate[...], rtol=1e-5)
    np.testing.assert_allclose(updates.embed[...], -0.05 * model.embed[...], rtol=1e-5)
    for name in ("q_bias", "attn_norm", "q_norm"):
        assert (np.asarray(getattr(updates.layers, name)[...]) == 0).all()


def test_mesh_that_does_not_make_the_devices():
    with pytest.raises(ValueError, match="fsdp=3 x tp=1 does not make 8 devices"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ValueError, match="at most one may be -1"):
        make_mesh(MeshConfig(fsdp=-1, tp=-1))
    assert dict(make_mesh(MeshConfig(fsdp=-1, tp=2)).shape) == {"fsdp": 4, "tp": 2}
    config = dataclasses.replace(CONFIG, ffn=36, heads=8, kv_heads=8)
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig(fsdp=1, tp=8))
    with pytest.raises(ValueError, match="ffn of 36 does not divide over mesh axis tp of 8"):
        param_shardings(model, mesh)
