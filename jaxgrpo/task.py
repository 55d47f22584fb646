"""What a run is about: its data, schema and rewards, checked before anything long starts."""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh

from jaxgrpo.config import Config
from jaxgrpo.data import load_problems
from jaxgrpo.models.hf import read_config
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.json_schema import SchemaReward, check_schema, load_schema
from jaxgrpo.rollout import Sampler, Scorer
from jaxgrpo.sharding import Rules, parse_rules, ways
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem


@dataclass(frozen=True)
class Task:
    """What is trained on, and how answers are judged.

    Attributes:
      sampler: draws completions.
      schema: judges them.
      scorer: gives them their rewards.
      problems: the training set.
      heldout: the held-out sets by file; the first one decides.
    """

    sampler: Sampler
    schema: SchemaReward
    scorer: Scorer
    problems: list[Problem]
    heldout: dict[str, list[Problem]]


def load_task(config: Config, mesh: Mesh) -> Task:
    """Reads everything that the configuration names but the weights.

    Raises:
      ValueError: a file or reward is at fault; one line with its place.
    """
    platform = mesh.devices.flat[0].platform
    if config.model.attention == "cudnn" and platform != "gpu":
        raise ValueError(
            f"model.attention = 'cudnn' needs NVIDIA GPUs, the devices are {platform}: use 'xla'"
        )
    sample_rules = parse_rules(config.mesh.sample_rules, "mesh.sample_rules")
    shape = read_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    check_fits(shape, tokenizer, config.data.max_prompt_tokens, config.sampling.max_tokens)
    # Any JSON meets the schema `true`.
    json_schema = load_schema(config.data.schema) if config.data.schema else True

    def problems(path: str) -> list[Problem]:
        return load_problems(path, tokenizer, config.data.max_prompt_tokens, check_schema)

    train = problems(config.data.train)
    rewards = resolve_rewards(config.rewards, json_schema)
    if "fields" in config.rewards and not any(problem.ground_truth for problem in train):
        raise ValueError(f"{config.data.train}: no row has ground_truth for the reward `fields`")
    for problem in train:  # a reward that cannot score a row says so now
        rewards("{}", problem.row)
    schema = SchemaReward(json_schema)
    return Task(
        Sampler(tokenizer, config.sampling, config.data.max_prompt_tokens, mesh, sample_rules),
        schema,
        Scorer(schema, rewards, config.grpo, config.sampling.max_tokens),
        train,
        {path: problems(path) for path in config.data.heldout},
    )


def check_fits(
    shape: Qwen3Config, tokenizer: ChatTokenizer, prompt_tokens: int, max_tokens: int
) -> None:
    """The model must have every id of the tokenizer and every position of a sequence.

    Raises:
      ValueError: it has not.
    """
    if len(tokenizer.hf) > shape.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer.hf)} tokens, the model {shape.vocab}:"
            " they do not belong together"
        )
    if prompt_tokens + max_tokens > shape.max_positions:
        raise ValueError(
            f"prompts of {prompt_tokens} tokens and completions of {max_tokens} are beyond the"
            f" model's {shape.max_positions} positions: lower data.max_prompt_tokens or"
            " sampling.max_tokens"
        )


def check_batch(config: Config, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Every part of a batch must divide over the devices that problems are divided over.

    Raises:
      ValueError: it does not.
    """
    update, devices = config.update, ways(rules.problems, mesh)
    parts = devices * update.minibatches * update.microbatches
    if config.rollout.problems % parts:
        raise ValueError(
            f"rollout.problems = {config.rollout.problems} does not divide by {devices} devices"
            f" that share problems x update.minibatches = {update.minibatches}"
            f" x update.microbatches = {update.microbatches}: make it a multiple of {parts}"
        )
