"""What a run is about: its directory, data, schema, rewards; all checked before anything long."""

import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxgrpo import cluster
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import ClusterConfig, Config
from jaxgrpo.config_file import load_config, save_config
from jaxgrpo.data import load_problems
from jaxgrpo.metrics import LOGS
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


def open_run_dir(config: Config) -> Path:
    """Makes the run directory, or finds it as it was left by the same configuration.

    Raises:
      ValueError: it holds a checkpoint of another configuration, or files that are no run's; or not
        all processes see it.
    """
    run_dir = Path(cluster.on_main(lambda: str(_open_run_dir(config))))

    def look() -> None:
        if not run_dir.is_dir():
            raise ValueError(
                f"there is no {run_dir.absolute()}: run.dir must be on a file system that all"
                " processes share"
            )

    cluster.gather(look)
    return run_dir


def _open_run_dir(config: Config) -> Path:
    run_dir = Path(config.run.dir).expanduser()
    saved = run_dir / "config.toml"
    if saved.exists():
        before = load_config(saved)  # fails if it is some other program's
        if config.run.fresh:
            for log in LOGS:
                (run_dir / f"{log}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        elif (step := Checkpoints(run_dir / "checkpoints").latest()) is not None:
            _check_same(before, config, saved)
            if step > config.run.steps:
                raise ValueError(
                    f"{run_dir} is at step {step} already, beyond run.steps = {config.run.steps}"
                )
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"{run_dir} is not empty and no run directory: name another run.dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    run = replace(config.run, fresh=False)
    save_config(replace(config, run=run, cluster=ClusterConfig()), saved)
    return run_dir


def fingerprint(config: Config) -> dict[str, Any]:
    """What must be the same on all processes of a run, by name."""
    sections = asdict(replace(config, cluster=ClusterConfig()))
    files = (config.data.train, *config.data.heldout, config.data.schema)
    return {
        "the version of jax": jax.__version__,
        **{
            f"{section}.{key}": value
            for section in sections
            for key, value in sections[section].items()
        },
        **{f"the CRC of {file}": zlib.crc32(Path(file).read_bytes()) for file in files if file},
    }


def _check_same(saved: Config, config: Config, path: Path) -> None:
    """A run goes on only as what it was; where, how long and how watched it runs may change."""
    if config.update.schedule != "constant" and saved.run.steps != config.run.steps:
        raise ValueError(
            f"{path} is of a run of {saved.run.steps} steps, whose learning rate ends with them:"
            " keep run.steps, or use --run.fresh to start anew"
        )
    old, new = (asdict(_defining(c)) for c in (saved, config))
    for section, fields in new.items():
        if fields != old[section]:
            changed = next(
                k for k in {**fields, **old[section]} if fields.get(k) != old[section].get(k)
            )
            raise ValueError(
                f"{path} is of a run with another {section}.{changed}:"
                " use --run.fresh to start anew, or another --run.dir"
            )


def _defining(config: Config) -> Config:
    """The configuration with what may differ between the parts of one run left out."""
    default = Config()
    return replace(
        config,
        run=replace(default.run, seed=config.run.seed),
        model=replace(config.model, remat="none", unroll=False, attention="xla", logits_mb=0),
        sampling=replace(config.sampling, draft=0),
        grpo=replace(config.grpo, reference="device"),
        mesh=default.mesh,
        cluster=default.cluster,
        eval=default.eval,
        signal=default.signal,
        checkpoint=default.checkpoint,
    )
