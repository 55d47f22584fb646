"""The GRPO update: one jitted function from a training state and a batch to the next state."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgrpo import grpo
from jaxgrpo.config import GrpoConfig, UpdateConfig
from jaxgrpo.logprobs import token_logprobs
from jaxgrpo.models import lora
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sharding import param_shardings
from jaxgrpo.types import RolloutBatch, TrainState


@cache  # the same optimiser is the same object, so that `train_step` is compiled once for it
def make_optimizer(config: UpdateConfig, rollouts: int) -> optax.GradientTransformation:
    """Gradient clipping and AdamW with a warm-up and a schedule.

    Args:
      config: learning rate, schedule, moments.
      rollouts: how many rollouts the run has; each is `epochs * minibatches` optimiser steps.
    """
    steps = rollouts * config.epochs * config.minibatches
    after = max(1, steps - config.warmup_steps)
    schedule = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, after),
        "cosine": optax.cosine_decay_schedule(config.lr, after),
    }[config.schedule]
    if config.warmup_steps:
        # The first step already moves: a warm-up that starts at 0 wastes a rollout.
        warmup = optax.linear_schedule(
            config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1
        )
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    adamw = optax.adamw(
        schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=_decayed
    )
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm or jnp.inf), adamw)
    return tx if config.moments == "float32" else _with_narrow_moment(tx, config.moments)


def _with_narrow_moment(tx: optax.GradientTransformation, dtype: str) -> Any:
    """Keeps the first moment in `dtype` between steps and computes with it in float32.

    optax's own `mu_dtype` rounds the decay, too: 0.9 is 0.8984 in bfloat16, and the moments are
    then too small by 1.5 %.
    """

    def cast(state: Any, dtype: Any) -> Any:
        mu = jax.tree.map(lambda m: m.astype(dtype), optax.tree.get(state, "mu"))
        return optax.tree.set(state, mu=mu)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)


def init_train_state(model: Qwen3, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update, its optimiser moments sharded like the parameters."""
    trained, _ = lora.split(model)
    shardings = param_shardings(jax.eval_shape(tx.init, trained), mesh, model.config.rules)
    # Without out_shardings every moment would be a full copy on every device.
    opt_state = jax.jit(tx.init, out_shardings=shardings)(trained)
    return TrainState(model, opt_state, jax.device_put(jnp.int32(0), NamedSharding(mesh, P())))


@partial(jax.jit, static_argnames=("temperature", "chunk_bytes"))
def batch_logprobs(
    model: Qwen3, batch: RolloutBatch, *, temperature: float, chunk_bytes: int
) -> Array:
    """Log-probability of every completion token under a model, float32 `[P, G, C]`.

    Computed as the update computes it: for the reference, and for the old policy where a rollout
    is used more than once.
    """
    return _logprobs(model, batch, temperature, chunk_bytes)[0]


def _logprobs(
    model: Qwen3, batch: RolloutBatch, temperature: float, chunk_bytes: int
) -> tuple[Array, Array]:
    prompts, tokens_PGC = batch.prompts, batch.completions.tokens_PGC
    first_PG1 = jnp.broadcast_to(prompts.last_P[:, None, None], (*tokens_PGC.shape[:2], 1))
    branch_PGC = jnp.concatenate([first_PG1, tokens_PGC[..., :-1]], -1)
    if model.config.unroll:
        model = model.apart()
    hidden_PGCD = model.with_prefixes(prompts.prefix_PL, prompts.prefix_len_P, branch_PGC)
    return token_logprobs(
        hidden_PGCD, model.head_VD(), tokens_PGC, temperature, chunk_bytes, batch.masks
    )


@partial(
    jax.jit,
    static_argnames=("tx", "config", "microbatches", "temperature", "max_tokens", "chunk_bytes"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: RolloutBatch,
    old_PGC: Array | None,
    ref_PGC: Array | None,
    *,
    tx: optax.GradientTransformation,
    config: GrpoConfig,
    microbatches: int,
    temperature: float,
    max_tokens: int,
    chunk_bytes: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step.

    Args:
      state: donated.
      batch: a rollout or a minibatch of one.
      old_PGC: log-probabilities under the policy that sampled, from `batch_logprobs`; None when
        this is the only step on the rollout, where they are this step's own.
      ref_PGC: log-probabilities under the reference; None without a KL term.
      tx: from `make_optimizer`.
      config: the objective.
      microbatches: parts, along P, whose gradients are added up.
      temperature: of the sampling distribution.
      max_tokens: completion limit, for `dr_grpo`.
      chunk_bytes: see `token_logprobs`.

    Returns:
      The next state, which is the old one if the loss, a gradient or a log-probability is not
      finite, and float32 scalars to report.
    """
    mask_PGC = _mask(batch)
    # From the whole batch, so that the parts' losses and gradients add up to those of the whole.
    weight_PGC = grpo.token_weights(mask_PGC, config.loss, max_tokens)
    trained, frozen = lora.split(state.model)
    state = state._replace(model=trained)

    def part_loss(trained: Any, part: tuple) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        batch, weight_PGC, old_PGC, ref_PGC = part
        mask_PGC = _mask(batch)
        model = lora.join(trained, frozen)
        logp_PGC, entropy_PGC = _logprobs(model, batch, temperature, chunk_bytes)
        policy, sums = grpo.policy_loss(
            logp_PGC,
            logp_PGC if old_PGC is None else old_PGC,
            batch.advantage_PG,
            mask_PGC,
            weight_PGC,
            loss=config.loss,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        loss = policy
        if config.entropy_bonus:
            loss -= config.entropy_bonus * jnp.sum(weight_PGC * entropy_PGC)
        sums |= {"policy_loss": policy, "entropy": jnp.sum(entropy_PGC, where=mask_PGC)}
        if ref_PGC is not None:
            kl_PGC = grpo.kl_penalty(logp_PGC, ref_PGC, mask_PGC, config.kl)
            loss += config.kl_beta * jnp.sum(weight_PGC * kl_PGC)
            sums["kl"] = jnp.sum(grpo.kl_penalty(logp_PGC, ref_PGC, mask_PGC, "k3"))
        return loss, (logp_PGC, sums)

    def part_gradients(part: tuple) -> tuple[tuple, Array]:
        value_and_grad = jax.value_and_grad(part_loss, has_aux=True)
        (loss, (logp_PGC, sums)), grads = value_and_grad(state.model, part)
        return (loss, sums, grads), logp_PGC

    def add_part(total: tuple, part: tuple) -> tuple[tuple, Array]:
        sums, logp_PGC = part_gradients(part)
        return jax.tree.map(jnp.add, total, sums), logp_PGC

    whole = (batch, weight_PGC, old_PGC, ref_PGC)
    if microbatches == 1:  # no second set of gradients to add to
        (loss, sums, grads), logp_PGC = part_gradients(whole)
    else:
        parts = jax.tree.map(lambda x: _split(x, microbatches), whole)
        shapes, _ = jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(jnp.zeros_like, shapes)
        (loss, sums, grads), logp_kPGC = jax.lax.scan(add_part, zeros, parts)
        logp_PGC = _join(logp_kPGC)

    grad_norm = optax.tree.norm(grads)
    sampled_PGC = jnp.where(mask_PGC, batch.completions.logprobs_PGC, 0.0)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(sampled_PGC).all()
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its counters
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
    new = TrainState(optax.apply_updates(state.model, updates), opt_state, state.step)
    new = jax.tree.map(partial(jnp.where, finite), new, state)
    new = new._replace(model=lora.join(new.model, frozen))
    # The next step gets the state divided as this one did: left to itself the compiler may choose
    # otherwise, which means another program, and other rounding than after a restore.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        shardings = param_shardings(new, mesh, new.model.config.rules)
        new = jax.lax.with_sharding_constraint(new, shardings)

    tokens = jnp.maximum(sums.pop("tokens"), 1.0)
    trainer_PGC = logp_PGC if old_PGC is None else old_PGC
    ratio = grpo.ratio_stats(trainer_PGC, batch.completions.logprobs_PGC, mask_PGC)
    metrics = {
        "loss": loss,
        "policy_loss": sums.pop("policy_loss"),
        "grad_norm": grad_norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
        **{name: value / tokens for name, value in sums.items()},
        **{f"ratio_{name}": value for name, value in ratio.items()},
    }
    return new, metrics


def take_part(tree: Any, index: int, parts: int) -> Any:
    """One of equal parts of arrays along P, each with a share of each device's problems."""
    # A slice by itself comes out whole on every device.
    return jax.tree.map(lambda x: jax.device_put(x[index::parts], x.sharding), tree)


def _mask(batch: RolloutBatch) -> Array:
    done = batch.completions
    return grpo.completion_mask(
        jnp.where(batch.train_PG, done.length_PG, 0), done.tokens_PGC.shape[-1]
    )


def _split(x: Array, parts: int) -> Array:
    """`[P, ...] -> [parts, P / parts, ...]`, every part with a share of each device's problems."""
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: all but norms and biases."""

    def matrix(path: tuple, _: Any) -> bool:
        return not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))

    return jax.tree_util.tree_map_with_path(matrix, params)
