"""What a run is about: its directory, data, schema, rewards; all checked before anything long."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from jaxgrpo.config import Config
from jaxgrpo.config_file import load_config, save_config
from jaxgrpo.data import load_problems
from jaxgrpo.metrics import LOGS
from jaxgrpo.rewards.build import resolve_rewards
from jaxgrpo.rewards.json_schema import SchemaReward, check_schema, load_schema
from jaxgrpo.rollout import Sampler, Scorer
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem


@dataclass(frozen=True)
class Task:
    """What is trained on, and how answers are judged.

    Attributes:
      tokenizer: of the base model.
      sampler: draws completions.
      scorer: judges them.
      problems: the training set.
      heldout: the held-out sets by file; the first one decides.
    """

    tokenizer: ChatTokenizer
    sampler: Sampler
    scorer: Scorer
    problems: list[Problem]
    heldout: dict[str, list[Problem]]


def load_task(config: Config, mesh: Mesh) -> Task:
    """Reads everything that the configuration names but the weights.

    Raises:
      ValueError: a file or reward is at fault; one line with its place.
    """
    tokenizer = load_tokenizer(config.model.path)
    schema = load_schema(config.data.schema)

    def problems(path: str) -> list[Problem]:
        return load_problems(path, tokenizer, config.data.max_prompt_tokens, check_schema)

    train = problems(config.data.train)
    rewards = resolve_rewards(config.rewards, schema)
    # A reward that cannot score a row of this data says so now.
    rewards("{}", train[0].row)
    return Task(
        tokenizer,
        Sampler(tokenizer, config.sampling, config.data.max_prompt_tokens, mesh),
        Scorer(SchemaReward(schema), rewards, config.grpo, config.sampling.max_tokens),
        train,
        {path: problems(path) for path in config.data.heldout},
    )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Every part of a batch must divide over the devices that problems are divided over.

    Raises:
      ValueError: it does not.
    """
    parts = config.update.minibatches * config.update.microbatches
    devices = mesh.shape["fsdp"]
    if config.rollout.problems % (parts * devices):
        raise ValueError(
            f"rollout.problems = {config.rollout.problems} does not divide by mesh fsdp = {devices}"
            f" x update.minibatches = {config.update.minibatches}"
            f" x update.microbatches = {config.update.microbatches}"
        )
    if config.eval.batch % devices:
        raise ValueError(
            f"eval.batch = {config.eval.batch} does not divide by mesh fsdp = {devices}"
        )


def open_run_dir(config: Config) -> Path:
    """Makes the run directory, or finds it as it was left by the same configuration.

    Raises:
      ValueError: it holds another configuration, or files that are no run's.
    """
    run_dir = Path(config.run.dir)
    saved = run_dir / "config.toml"
    if not saved.exists() and run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"{run_dir} is not empty and no run directory: name another run.dir")
    if config.run.fresh:
        for name in ("config.toml", "report.html", *(f"{log}.jsonl" for log in LOGS)):
            (run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    elif saved.exists():
        _check_same(load_config(saved), config, saved)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(
        dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False)), saved
    )
    return run_dir


def _check_same(saved: Config, config: Config, path: Path) -> None:
    """A run goes on only as what it was; how long it is and what it prints may change."""
    old, new = (
        dataclasses.asdict(
            dataclasses.replace(
                c, run=dataclasses.replace(c.run, steps=0, fresh=False, quiet=False)
            )
        )
        for c in (saved, config)
    )
    for section, fields in new.items():
        if fields != old[section]:
            changed = [name for name in fields if fields[name] != old[section].get(name)]
            raise ValueError(
                f"{path} is of a run with another {section}.{(changed or ['?'])[0]}:"
                " use --run.fresh to start anew, or another --run.dir"
            )
