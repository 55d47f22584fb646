"""Prompt lookup: what is likely to come next, from where the last tokens occurred before."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.types import Prompts

NO_TOKEN = -1  # between texts that are searched; equals no token id


def prompts_and_hints(prompts: Prompts, hints_X: Array | None) -> Array:
    """What is searched and does not change: hints, then the problem's prompt; `[P, X]`."""
    problems, size = prompts.prefix_PL.shape
    inside_PL = jnp.arange(size) < prompts.prefix_len_P[:, None]
    # On the right, so that the last token follows the prefix.
    prefix_PL = jnp.where(inside_PL, prompts.prefix_PL, NO_TOKEN)
    prefix_PL = jax.vmap(jnp.roll)(prefix_PL, size - prompts.prefix_len_P)
    nothing = jnp.full((problems, 2), NO_TOKEN, jnp.int32)  # there are always two tokens before
    texts = [nothing, prefix_PL, prompts.last_P[:, None]]
    if hints_X is not None:
        texts = [nothing, jnp.broadcast_to(hints_X, (problems, hints_X.size)), *texts]
    return jnp.concatenate(texts, -1)


def look_up(read_only_PX: Array, branch_PGB: Array, length_PG: Array, draft: int) -> Array:
    """`[P, G, draft]`: what followed where a branch's last tokens occurred before.

    The place is the one where most of the last three tokens agree; of several the last, in the
    order hints, prompt, branches of the problem. `NO_TOKEN` where nothing is known.
    """
    problems, group, size = branch_PGB.shape
    drawn_PGB = jnp.where(jnp.arange(size) <= length_PG[..., None], branch_PGB, NO_TOKEN)
    drawn_PGB = jnp.pad(drawn_PGB, [(0, 0), (0, 0), (1, 0)], constant_values=NO_TOKEN)
    text_PX = jnp.concatenate([read_only_PX, drawn_PGB.reshape(problems, -1)], -1)
    text_PX = jnp.pad(text_PX, [(0, 0), (0, draft)], constant_values=NO_TOKEN)

    # The last three tokens: the prompt's end comes before the branch's first.
    before_PG2 = jnp.broadcast_to(read_only_PX[:, None, -3:-1], (problems, group, 2))
    last_PG3 = window(jnp.concatenate([before_PG2, branch_PGB], -1), length_PG, 3)
    width = text_PX.shape[-1] - 3
    agree = text_PX[:, None, 3:] != NO_TOKEN  # something follows
    score = jnp.int32(0)
    for i in (2, 1, 0):
        agree = agree & (text_PX[:, None, i : i + width] == last_PG3[..., i, None])
        score += agree.astype(jnp.int32)
    # One number for both, because a maximum is cheaper to find than its place.
    best_PG1 = (score * width + jnp.arange(width)).max(-1, keepdims=True)
    following = best_PG1 % width + 3 + jnp.arange(draft)
    found = jax.vmap(lambda text_X, at: text_X[at])(text_PX, following)
    return jnp.where(best_PG1 >= width, found, NO_TOKEN)


def window(x_PGB: Array, start_PG: Array, size: int) -> Array:
    """`[P, G, size]` from each branch's own start."""
    g = jnp.arange(x_PGB.shape[1])[:, None]

    def one(x_GB: Array, start_G: Array) -> Array:
        return x_GB[g, start_G[:, None] + jnp.arange(size)]

    return jax.vmap(one)(x_PGB, start_PG)  # problems may be divided over devices
