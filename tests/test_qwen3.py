"""The forward pass against itself: branches, cache, remat and precision change no numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgrpo.models.qwen3 import Past, Prefix, Qwen3, Qwen3Config

CONFIGS = {
    "qwen3": Qwen3Config(
        vocab=50, width=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, rope_theta=1e4
    ),
    "qwen2": Qwen3Config(
        vocab=50, width=24, layers=2, heads=3, kv_heads=3, head_dim=8, ffn=40, rope_theta=1e3,
        tied=False, qk_norm=False, qkv_bias=True, family="qwen2",
    ),
    "llama": Qwen3Config(
        vocab=50, width=24, layers=3, heads=3, kv_heads=1, head_dim=8, ffn=40, rope_theta=1e5,
        qk_norm=False, family="llama",
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)

P, G, S, C = 4, 3, 7, 5
LENGTHS = np.array([7, 3, 0, 1])


def random_model(config: Qwen3Config, seed: int = 0) -> Qwen3:
    """Weights that make attention uneven; norms and biases are random too."""
    rng = np.random.default_rng(seed)
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape, x.dtype)), model)


def random_ids(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes, whose padding is garbage, and branches."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 50, (P, S)), rng.integers(0, 50, (P, G, C))


def whole(prefix_PS: np.ndarray, branch_PGC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same G·P sequences without sharing: ids `[P·G, S + C]` and where branches start."""
    ids = np.full((P, G, S + C), 49)
    for p, n in enumerate(LENGTHS):
        ids[p, :, :n] = prefix_PS[p, :n]
        ids[p, :, n : n + C] = branch_PGC[p]
    return ids.reshape(P * G, S + C), np.repeat(LENGTHS, G)


@jax.jit
def branch_logits(model: Qwen3, prefix_PS, branch_PGC) -> jax.Array:
    """`[P, G, C, V]`, with one prefix for all branches."""
    hidden = model.with_prefixes(prefix_PS, jnp.asarray(LENGTHS), branch_PGC)
    return (hidden @ model.head_VD().T).astype(jnp.float32)


def whole_logits(model: Qwen3, prefix_PS, branch_PGC) -> jax.Array:
    """The same from full sequences."""
    ids, starts = whole(prefix_PS, branch_PGC)
    return whole_logits_of(model, ids, starts)


@jax.jit
def whole_logits_of(model: Qwen3, ids_BT, start_B) -> jax.Array:
    at_BC = start_B[:, None] + jnp.arange(C)
    return jnp.take_along_axis(model.logits(ids_BT), at_BC[..., None], 1).reshape(P, G, C, -1)


@partial(jax.jit, static_argnums=0)
def gradients(logits_of, model: Qwen3, *inputs) -> Qwen3:
    """Of a random mixture of all log-probabilities."""
    mixture = np.random.default_rng(3).standard_normal((P, G, C, 50), np.float32)
    return jax.grad(lambda m: jnp.mean(mixture * jax.nn.log_softmax(logits_of(m, *inputs))))(model)


def assert_close(a: Qwen3, b: Qwen3, tolerance: float) -> None:
    """Each leaf of a, relative to the largest entry of that of b."""
    for (name, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = float(jnp.abs(y).max())
        assert scale > 0, name
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0, err_msg=str(name))


def with_config(model: Qwen3, **fields) -> Qwen3:
    """The same weights computed otherwise."""
    config = dataclasses.replace(model.config, **fields)
    other = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_full_sequences(family: str):
    model, ids = random_model(CONFIGS[family]), random_ids(1)
    plain = whole_logits(model, *ids)
    assert plain.std() > 0.5
    np.testing.assert_allclose(branch_logits(model, *ids), plain, atol=1e-4, rtol=0)


def test_one_pass_is_prefill_and_then_branches():
    model, (prefix_PS, branch_PGC) = random_model(CONFIGS["qwen3"]), random_ids(4)
    hidden, _ = model(branch_PGC, model.prefill(prefix_PS, jnp.asarray(LENGTHS)))
    together = model.with_prefixes(prefix_PS, jnp.asarray(LENGTHS), branch_PGC)
    np.testing.assert_allclose(together, hidden, atol=1e-5, rtol=0)


def test_gradients_flow_through_the_shared_prefix():
    # Every kind of parameter at once.
    config = dataclasses.replace(CONFIGS["qwen3"], qkv_bias=True, tied=False)
    model, ids = random_model(config), random_ids(2)
    shared = gradients(branch_logits, model, *ids)
    assert_close(shared, gradients(whole_logits_of, model, *whole(*ids)), 1e-4)
    remat = with_config(model, remat="full")
    assert_close(gradients(branch_logits, remat, *ids), shared, 1e-5)


def test_attention_by_the_library_is_the_same(monkeypatch):
    by_library, calls = jax.nn.dot_product_attention, []

    def on_cpu(*args, implementation, **kwargs):
        calls.append(implementation)
        return by_library(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    model, ids = random_model(CONFIGS["qwen3"]), random_ids(2)
    other = with_config(model, attention="cudnn")
    np.testing.assert_allclose(
        branch_logits(other, *ids), branch_logits(model, *ids), atol=1e-4, rtol=0
    )
    assert_close(gradients(branch_logits, other, *ids), gradients(branch_logits, model, *ids), 1e-4)
    assert set(calls) == {"cudnn"}


def test_remat_keeps_less():
    def kept(model: Qwen3) -> int:
        """Bytes that the backward pass holds beside the weights."""
        ids = random_ids(9)
        pullback = jax.eval_shape(lambda m: jax.vjp(lambda m: branch_logits(m, *ids), m)[1], model)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback)) - sum(
            x.nbytes for x in jax.tree.leaves(model)
        )

    model = random_model(dataclasses.replace(CONFIGS["qwen3"], layers=6))
    assert 0 < kept(with_config(model, remat="full")) < 0.5 * kept(model)


@pytest.mark.parametrize(("family", "tokens"), [("qwen3", 1), ("qwen3", 2), ("qwen2", 1)])
def test_cached_decode_is_teacher_forcing(family: str, tokens: int):
    """One or several tokens at a time; the last call of the latter overlaps the one before."""
    model, (prefix_PS, branch_PGC) = random_model(CONFIGS[family]), random_ids(4)

    @jax.jit
    def step(model, prefix, past, ids_PGT):
        hidden, kv = model(ids_PGT, prefix, past)
        return hidden, kv

    prefix = jax.jit(Qwen3.prefill)(model, prefix_PS, LENGTHS)
    forced, own = jax.jit(lambda m, p: m(branch_PGC, p))(model, prefix)
    # What is in the past before its tokens are written means nothing.
    kv = jax.tree.map(lambda x: x + 7.0, model.no_past(P, G, C + 2).kv)
    # Branches need not be equally far: each goes on from its own length.
    ahead_PG = np.random.default_rng(12).integers(0, tokens, (P, G))
    for start in range(0, C, tokens):
        length_PG = np.clip(start - ahead_PG, 0, C - tokens).astype(np.int32)
        at_PGT = length_PG[..., None] + np.arange(tokens)
        ids_PGT = np.take_along_axis(branch_PGC, at_PGT, -1)
        hidden, kv = step(model, prefix, Past(kv, length_PG), ids_PGT)
        want = jnp.take_along_axis(forced, at_PGT[..., None], 2)
        np.testing.assert_allclose(hidden, want, atol=1e-4, rtol=0)
    for a, b in zip(kv, own, strict=True):
        np.testing.assert_allclose(a[..., :C, :], b, atol=1e-4, rtol=0)
        assert (a[..., C:, :] == 7).all()


def test_padding_of_a_prefix_means_nothing():
    model, (prefix_PS, branch_PGC) = random_model(CONFIGS["qwen3"]), random_ids(5)
    other_PS = np.where(np.arange(S) < LENGTHS[:, None], prefix_PS, 49 - prefix_PS)
    assert (other_PS != prefix_PS).any()
    np.testing.assert_array_equal(
        branch_logits(model, prefix_PS, branch_PGC), branch_logits(model, other_PS, branch_PGC)
    )


def test_an_empty_prefix_is_none():
    model, (_, branch_PGC) = random_model(CONFIGS["qwen3"]), random_ids(6)

    @jax.jit
    def both(m):
        empty = m.prefill(np.zeros((P, S), int), jnp.zeros(P, int))
        return m(branch_PGC, empty)[0], m(branch_PGC)[0]

    after_nothing, alone = both(model)
    np.testing.assert_allclose(after_nothing, alone, atol=1e-5, rtol=0)


def test_branches_do_not_see_each_other_nor_the_future():
    model, (prefix_PS, branch_PGC) = random_model(CONFIGS["qwen3"]), random_ids(7)
    changed_PGC = branch_PGC.copy()
    changed_PGC[1, 2, 3] = (changed_PGC[1, 2, 3] + 1) % 50
    differs = jnp.any(
        branch_logits(model, prefix_PS, branch_PGC) != branch_logits(model, prefix_PS, changed_PGC),
        axis=-1,
    )
    expected = np.zeros((P, G, C), bool)
    expected[1, 2, 3:] = True
    np.testing.assert_array_equal(differs, expected)


def test_logits_past_a_length_are_zero():
    model, ids = random_model(CONFIGS["qwen3"]), random_ids(8)[0]
    lengths = np.array([7, 2, 1, 4])
    logits = jax.jit(Qwen3.logits)(model, ids, lengths)
    np.testing.assert_array_equal((logits != 0).any(-1), np.arange(S) < lengths[:, None])


def test_bfloat16_is_close():
    ids = random_ids(10)
    exact = random_model(CONFIGS["qwen3"])
    half = with_config(exact, dtype=jnp.bfloat16)
    hidden, kv = jax.eval_shape(lambda: half(ids[1], half.prefill(ids[0], jnp.asarray(LENGTHS))))
    assert hidden.dtype == kv.k.dtype == half.no_past(1, 1, 1).kv.v.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: half.logits(ids[0])).dtype == jnp.float32
    wanted = branch_logits(exact, *ids)
    error = jnp.sqrt(jnp.mean((branch_logits(half, *ids) - wanted) ** 2))
    assert 0 < error < 0.05 * wanted.std()


def test_the_prefix_is_stored_once_and_programs_do_not_grow_with_layers():
    prefix_PS, branch_PGC = random_ids(11)
    model = random_model(CONFIGS["qwen3"])
    prefix = jax.eval_shape(lambda: model.prefill(prefix_PS, jnp.asarray(LENGTHS)))
    assert isinstance(prefix, Prefix)
    c = model.config
    assert prefix.kv.k.shape == (c.layers, P, c.kv_heads, S, c.head_dim)
    assert model.no_past(P, G, C).kv.k.shape == (c.layers, P, c.kv_heads, G, C, c.head_dim)

    def program(layers: int) -> int:
        deep = random_model(dataclasses.replace(c, layers=layers))
        return len(branch_logits.lower(deep, prefix_PS, branch_PGC).as_text().splitlines())

    assert program(12) == program(2)


def test_cast_rounds_the_parameters():
    model = random_model(CONFIGS["qwen2"])
    rounded = model.cast(jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(model), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    assert rounded.config == model.config


@pytest.mark.parametrize(
    ("layers", "width", "heads", "ffn", "tied", "billions"),
    [
        (28, 1024, 16, 3072, True, 0.596),
        (28, 2048, 16, 6144, True, 1.721),
        (36, 2560, 32, 9728, True, 4.022),
        (36, 4096, 32, 12288, False, 8.191),
        (40, 5120, 40, 17408, False, 14.768),
        (64, 5120, 64, 25600, False, 32.762),
    ],
)
def test_parameter_counts_of_the_real_models(layers, width, heads, ffn, tied, billions):
    config = Qwen3Config(
        vocab=151_936, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=128, ffn=ffn,
        tied=tied,
    )  # fmt: skip
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    assert round(sum(x.size for x in jax.tree.leaves(model)) / 1e9, 3) == billions
