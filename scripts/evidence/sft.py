"""Supervised fine-tuning on demonstrations, by the very update of GRPO.

With one completion a problem, an advantage of 1 and the tokens' own log-probabilities as the old
ones the ratio is 1, and the gradient of GRPO's loss is that of the mean cross-entropy of the
answers' tokens. So SFT differs from GRPO in what it learns from, and in nothing else.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

import jax
import numpy as np

from jaxgrpo.config import Config, GrpoConfig, UpdateConfig
from jaxgrpo.data import bucket_for, pack_prompts
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sharding import make_mesh, parse_rules, put_batch
from jaxgrpo.tokenizer import ChatTokenizer
from jaxgrpo.train import load_policy
from jaxgrpo.types import Completions, Problem, RolloutBatch
from jaxgrpo.update import init_train_state, make_optimizer, train_step

Demonstration = tuple[Problem, str]


def fine_tune(
    config: Config,
    tokenizer: ChatTokenizer,
    demonstrations: Iterable[Demonstration],
    *,
    steps: int,
    batch: int,
    microbatches: int,
) -> Qwen3:
    """Trains `config.model` on `steps` batches of `batch` demonstrations.

    The optimiser is `config.update`'s, one step a batch, whose gradients are added up over
    `microbatches` parts; there is no KL term.
    """
    mesh = make_mesh(config.mesh)
    rules = parse_rules(config.mesh.train_rules, "mesh.train_rules")
    once = UpdateConfig(**{**vars(config.update), "epochs": 1, "minibatches": 1})
    tx = make_optimizer(once, steps)
    stream = iter(demonstrations)
    with jax.set_mesh(mesh):
        state = init_train_state(load_policy(config, mesh, rules, jax.random.key(0)), tx, mesh)
        for step in range(1, steps + 1):
            part = [*islice(stream, batch)]
            state, metrics = train_step(
                state,
                put_batch(_pack(config, tokenizer, part), mesh, rules),
                None,
                None,
                tx=tx,
                config=GrpoConfig(loss="bnpo"),
                microbatches=microbatches,
                temperature=1.0,
                max_tokens=config.sampling.max_tokens,
                chunk_bytes=config.model.logits_mb << 20,
            )
            assert not metrics["skipped"]
            if step % max(1, steps // 10) == 0:
                print(f"  step {step} of {steps}", flush=True)
    return state.model


def in_epochs(demonstrations: list[Demonstration], seed: int) -> Iterator[Demonstration]:
    """The same ones again and again, each time in another order."""
    rng = Random(f"{seed}/epochs")
    while True:
        yield from rng.sample(demonstrations, len(demonstrations))


def _pack(config: Config, tokenizer: ChatTokenizer, part: list[Demonstration]) -> RolloutBatch:
    limit, longest = config.sampling.max_tokens, config.data.max_prompt_tokens
    tokens_P1C = np.zeros((len(part), 1, limit), np.int32)
    length_P1 = np.zeros((len(part), 1), np.int32)
    for tokens_1C, length_1, (_, text) in zip(tokens_P1C, length_P1, part, strict=True):
        answer = [*tokenizer.hf.encode(text, add_special_tokens=False), tokenizer.stop_ids[0]]
        answer = answer[:limit]
        tokens_1C[0, : len(answer)] = answer
        length_1[0] = len(answer)
    all_PG = np.ones_like(length_P1, bool)
    return RolloutBatch(
        pack_prompts([problem for problem, _ in part], bucket_for(longest, longest)),
        Completions(tokens_P1C, np.zeros(tokens_P1C.shape, np.float32), length_P1, all_PG),
        all_PG.astype(np.float32),
        all_PG,
    )
