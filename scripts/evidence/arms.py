"""The arms of the comparison: what each makes of the base model, and how it asks."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from jaxgrpo.config import Config, RunConfig
from jaxgrpo.data import load_problems, read_frame
from jaxgrpo.models.hf import export_hf
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.train import train
from jaxgrpo.types import Problem
from scripts.evidence.sft import Demonstration, fine_tune, in_epochs
from scripts.evidence.tasks import Task


@dataclass(frozen=True)
class Arm:
    """One way to better answers.

    Attributes:
      title: for the table.
      make: from a configuration, a place and the task to a model's directory, which may be that
        place.
      seeds: whether the seed makes a difference.
      strict: whether the system message spells out the schema, and the prompt shows two examples.
    """

    title: str
    make: Callable[[Config, Path, Task], Path]
    seeds: bool = True
    strict: bool = False


def asked_strictly(config: Config, place: Path) -> Config:
    """The configuration with a system message that spells out the schema, and two examples."""
    schema = json.loads(Path(config.data.schema).read_text("utf-8"))
    system, examples = place / "strict.txt", place / "examples.jsonl"
    system.write_text(
        "Answer with one JSON object and nothing else: no sentence before or after it, no code"
        f" fence. It must meet this JSON Schema: {json.dumps(schema['properties'])}. All keys are"
        " required, and there is no other.\n",
        "utf-8",
    )
    lines = Path(config.data.train).read_text("utf-8").splitlines(keepends=True)
    examples.write_text("".join(lines[:2]), "utf-8")
    data = replace(config.data, system=str(system), examples=str(examples), max_prompt_tokens=1536)
    return replace(config, data=data)


def _base(config: Config, *_: object) -> Path:
    return Path(config.model.path)


def _grpo(
    config: Config, place: Path, _: Task, *, constrain: bool = False, **rewards: float
) -> Path:
    """The configuration's run, with these rewards if they are named."""
    sampling = replace(config.sampling, constrain=constrain)
    train(
        replace(
            config,
            run=RunConfig(dir=str(place), steps=config.run.steps, seed=config.run.seed),
            rewards=rewards or config.rewards,
            sampling=sampling,
            # All that is said of the model is measured afterwards, on other problems.
            eval=replace(config.eval, every=0, samples=0),
        )
    )
    return place


def _sft(
    config: Config,
    place: Path,
    task: Task,
    demonstrations: Callable[[Config, ChatTokenizer, Task], Iterator[Demonstration]],
) -> Path:
    """GRPO's work, in batches of as many branches as it has.

    A GRPO step of P x G branches learns from those, may ask the reference about them, and has
    sampled as many, again for each refill of groups without signal: in passes forward 3 + 1 + 2
    with one refill, where a batch of SFT takes 3.
    """
    tokenizer = load_tokenizer(config.model.path)
    passes = 3 + (config.grpo.kl_beta > 0) + 1 + config.rollout.max_refills
    model = fine_tune(
        config,
        tokenizer,
        demonstrations(config, tokenizer, task),
        steps=round(config.run.steps * passes / 3),
        batch=config.rollout.problems * config.rollout.group,
        # Each demonstration has a prefix of its own: no more of them at once than in GRPO's update.
        microbatches=config.update.microbatches * config.rollout.group,
    )
    export_hf(model, tokenizer.hf, place)
    return place


def _flawed(config: Config, tokenizer: ChatTokenizer, task: Task) -> Iterator[Demonstration]:
    """Those that the base was made with, new ones without end."""
    rng = Random(f"{config.run.seed}/flawed")
    while True:
        messages, text = task.flawed_demonstration(rng)
        prompt = tuple(tokenizer.encode_chat(messages))
        if len(prompt) <= config.data.max_prompt_tokens:  # hardly any is longer
            yield Problem(0, "", prompt, {}), text


def _correct(config: Config, tokenizer: ChatTokenizer, _: Task) -> Iterator[Demonstration]:
    """The training set with its right answers."""
    data = config.data
    frame = read_frame(data.system, data.examples)
    problems = load_problems(data.train, tokenizer, data.max_prompt_tokens, frame=frame)
    labelled = [
        (problem, json.dumps(problem.ground_truth, ensure_ascii=False)) for problem in problems
    ]
    return in_epochs(labelled, config.run.seed)


ARMS = {
    "base": Arm("base", _base, seeds=False),
    "prompt": Arm("base, strict prompt with two examples", _base, seeds=False, strict=True),
    "sft_flawed": Arm("SFT, flawed demonstrations", lambda *a: _sft(*a, _flawed)),
    "sft_correct": Arm("SFT, right answers", lambda *a: _sft(*a, _correct)),
    "grpo_schema": Arm("GRPO, schema", lambda *a: _grpo(*a, graded=1.0)),
    "grpo": Arm("GRPO, as configured", _grpo),
    "grpo_constrained": Arm(
        "GRPO in constrained rollouts, fields", lambda *a: _grpo(*a, constrain=True, fields=1.0)
    ),
}
