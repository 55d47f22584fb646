"""Chat requests answered with a model, whatever brings them."""

import asyncio
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.batching import Batcher, Draw, FullError
from jaxgrpo.chat_api import ApiError, ChatRequest, Choice
from jaxgrpo.cli import explain
from jaxgrpo.config import MeshConfig, SamplingConfig
from jaxgrpo.constrain import Constraint
from jaxgrpo.drawing import NO_TRUNCATION, Truncation
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.policy import find_policy
from jaxgrpo.rollout import Answers, Sampler
from jaxgrpo.sharding import make_mesh, parse_rules
from jaxgrpo.task import check_fits
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem

_LONGEST_PROMPT = 4096  # tokens, where the model takes as many
_MOST_TRUNCATIONS = 8  # each is a program to compile for every length of prompt


@dataclass(frozen=True)
class ChatConfig:
    """How a model answers chat requests."""

    name: str = ""
    """What the model is called; the directory's name if not given."""
    max_tokens: int | None = None
    """Completion limit; that of the run, or 256 for a Hugging Face directory, if not given."""
    max_prompt_tokens: int | None = None
    """A longer prompt is refused; 4096, or what the model's positions leave, if not given."""
    batch: int = 8
    """Completions drawn together; programs are compiled for as many."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; that of the run, or float32, if not given."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass
class Chat:
    """Answers chat requests.

    Attributes:
      name: of the model.
      tokenizer: renders and encodes messages.
      max_prompt_tokens: a longer prompt is refused.
      max_tokens: of a completion; a request may ask for fewer.
      constraint: holds those to a schema whose request has one.
      batcher: draws the completions.
    """

    name: str
    tokenizer: ChatTokenizer
    max_prompt_tokens: int
    max_tokens: int
    constraint: Constraint
    batcher: Batcher
    _truncations: set[Truncation] = field(default_factory=lambda: {NO_TRUNCATION})

    async def __call__(self, asked: ChatRequest) -> tuple[int, list[Choice]]:
        """The number of the prompt's tokens, and the completions.

        Raises:
          ApiError: the request cannot be answered.
        """
        if asked.model != self.name:
            raise ApiError(
                404,
                f"no model {asked.model!r} here, only {self.name!r}",
                "model",
                "model_not_found",
            )
        limit = self._limit(asked)
        draw = self._draw(asked)
        prompt = await asyncio.to_thread(self._prompt, asked)  # another process renders it
        await asyncio.to_thread(self._check_schema, asked)
        row: dict[str, Any] = {"messages": asked.messages}
        if asked.schema is not None:
            row["schema"] = asked.schema
        seed = secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
        # Each choice is a place in a batch, so that `n` is nothing to compile for.
        numbers = [
            int(np.random.SeedSequence([seed, choice]).generate_state(1)[0])
            for choice in range(asked.n)
        ]
        problems = [(number, Problem(0, "request", prompt, row)) for number in numbers]
        try:
            waiting = self.batcher.submit(draw, problems)
        except FullError as error:
            raise ApiError(429, "too many requests are waiting; try again") from error
        try:
            answers = await asyncio.gather(*map(asyncio.wrap_future, waiting))
        except Exception as error:
            print(explain(error)[1], file=sys.stderr)
            raise ApiError(500, f"the model failed: {error}") from error
        return len(prompt), [self._choice(each, limit) for each in answers]

    def _limit(self, asked: ChatRequest) -> int:
        if asked.max_tokens is not None and asked.max_tokens > self.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {asked.max_tokens}; this server's limit is {self.max_tokens}, which"
                " --max-tokens sets",
                "max_tokens",
            )
        return asked.max_tokens or self.max_tokens

    def _draw(self, asked: ChatRequest) -> Draw:
        if asked.truncation not in self._truncations:
            if len(self._truncations) > _MOST_TRUNCATIONS:
                raise ApiError(
                    400,
                    "this server has seen its fill of top_k, top_p and min_p, which it compiles"
                    " programs for; it takes only those that it has, or none",
                    "top_p",
                )
            self._truncations.add(asked.truncation)
        return Draw(asked.temperature, asked.truncation, asked.schema is not None)

    def _prompt(self, asked: ChatRequest) -> tuple[int, ...]:
        try:
            prompt = self.tokenizer.encode_chat(asked.messages)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from error
        if len(prompt) > self.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens; this server's limit is"
                f" {self.max_prompt_tokens}, which --max-prompt-tokens sets",
                "messages",
                "context_length_exceeded",
            )
        return tuple(prompt)

    def _check_schema(self, asked: ChatRequest) -> None:
        if asked.schema is not None and (why := self.constraint.fault(asked.schema)):
            raise ApiError(
                400,
                f"completions cannot be constrained to this schema: {why}",
                "response_format",
            )

    def _choice(self, answers: Answers, limit: int) -> Choice:
        """The completion, cut at the request's own limit.

        A token depends on those before it alone, so what is left is what a lower limit gives.
        """
        [length], [stopped], [text] = answers.length_G, answers.stopped_G, answers.texts
        if length <= limit:
            return Choice(text, int(length), bool(stopped))
        return Choice(self.tokenizer.decode(answers.tokens_GC[0, :limit].tolist()), limit, False)


@contextmanager
def open_chat(path: str, config: ChatConfig) -> Iterator[Chat]:
    """Loads a model and answers with it until the end.

    Args:
      path: Hugging Face directory, or a run directory, whose newest checkpoint is then meant.
      config: see there.

    Raises:
      ValueError: a setting or a file is at fault.
    """
    policy = find_policy(path)
    run = policy.config
    sampling = SamplingConfig(max_tokens=config.max_tokens or run.sampling.max_tokens)
    tokenizer = load_tokenizer(run.model.path)
    shape = read_config(run.model.path)
    max_prompt_tokens = config.max_prompt_tokens or max(
        1, min(_LONGEST_PROMPT, shape.max_positions - sampling.max_tokens)
    )
    check_fits(shape, tokenizer, max_prompt_tokens, sampling.max_tokens)
    constraint = Constraint(tokenizer, shape.vocab)
    mesh = make_mesh(config.mesh)
    rules = parse_rules(config.mesh.train_rules, "mesh.train_rules")
    sample_rules = parse_rules(config.mesh.sample_rules, "mesh.sample_rules")
    with jax.set_mesh(mesh):
        model = policy.load(mesh, jnp.dtype(config.dtype or run.model.dtype), rules)
        key = jax.random.key(0)  # requests differ by the numbers of their problems

    def answer(draw: Draw, problems: Sequence[tuple[int, Problem]]) -> list[Answers]:
        top_k, top_p, min_p = draw.truncation
        drawn = replace(sampling, top_k=top_k, top_p=top_p, min_p=min_p)
        held = constraint if draw.constrained else None
        sampler = Sampler(tokenizer, drawn, max_prompt_tokens, mesh, sample_rules, held)
        with jax.set_mesh(mesh):
            return sampler(
                model, problems, key, temperature=draw.temperature, group=1, batch=config.batch
            )

    batcher = Batcher(answer, config.batch)
    try:
        name = config.name or Path(path).resolve().name
        yield Chat(name, tokenizer, max_prompt_tokens, sampling.max_tokens, constraint, batcher)
    finally:
        batcher.close()
