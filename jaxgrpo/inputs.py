"""Whether what a configuration names is fit for a run: model, data, schema, rewards."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxgrpo.config import Config
from jaxgrpo.data import NO_FRAME, Frame, check_lengths, read_frame, read_lines
from jaxgrpo.findings import Finding, no, of, ok, skipped
from jaxgrpo.models.hf import check_weights
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.rewards.json_schema import check_schema, load_schema
from jaxgrpo.rewards.pool import Pool
from jaxgrpo.task import check_fits
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem

_SHOWN = 10  # faults of a file
_BUILT_ON_SCHEMA = ("ladder", "graded")

Problems = Mapping[int, Problem]  # by line


def check_inputs(config: Config) -> Iterator[Finding]:
    """All of them; what needs something that is broken is left out and said to be."""
    path, data = config.model.path, config.data
    yield from of(f"weights of {path}: all there, by their headers", lambda: check_weights(path))
    tokenizer: ChatTokenizer | None = None
    try:
        tokenizer = load_tokenizer(path)
        yield from _check_tokenizer(config, tokenizer)
    except ValueError as error:
        yield no(error)

    schema: Any = True  # which any JSON meets
    if data.schema:
        try:
            schema = load_schema(data.schema)
            yield ok(f"schema {data.schema}")
        except ValueError as error:
            yield no(error)
            schema = None
    else:
        yield skipped("schema: data.schema is not set, any JSON is valid")

    frame = NO_FRAME
    if data.system or data.examples:
        try:
            frame = read_frame(data.system, data.examples)
            files = [file for file in (data.system, data.examples) if file]
            yield ok(f"every prompt has what is in {' and '.join(files)}")
        except ValueError as error:
            yield no(error)

    if tokenizer is None:
        yield skipped("data and rewards: not checked without a tokenizer")
        return
    train: dict[int, Problem] = {}
    yield from _check_file(data.train, tokenizer, config, frame, train)
    if "fields" in config.rewards:
        yield from _check_truths(data.train, train)
    if not data.heldout:
        yield no("data.heldout is empty; name at least one file to evaluate on")
    for file in data.heldout:
        heldout: dict[int, Problem] = {}
        yield from _check_file(file, tokenizer, config, frame, heldout)
        yield from _check_apart(data.train, train, file, heldout)
    for name in config.rewards:
        if not train:
            yield skipped(f"reward {name}: not tried without a sound line in {data.train}")
        elif schema is None and name in _BUILT_ON_SCHEMA:
            yield skipped(f"reward {name}: not tried without a sound schema")
        else:
            yield _try_reward(config, name, True if schema is None else schema, train)


def _check_tokenizer(config: Config, tokenizer: ChatTokenizer) -> Iterator[Finding]:
    def fits() -> None:
        shape = read_config(config.model.path)
        check_fits(shape, tokenizer, config.data.max_prompt_tokens, config.sampling.max_tokens)

    yield from of(
        f"tokenizer: its {len(tokenizer.hf)} tokens and the lengths asked for fit the model", fits
    )
    stops = ", ".join(f"{i} {tokenizer.hf.convert_ids_to_tokens(i)}" for i in tokenizer.stop_ids)
    yield from of(
        f"chat template: renders; stop ids {stops}",
        lambda: tokenizer.encode_chat([{"role": "user", "content": "Hello"}]),
    )


def _check_file(
    path: str,
    tokenizer: ChatTokenizer,
    config: Config,
    frame: Frame,
    sound: dict[int, Problem],
) -> Iterator[Finding]:
    """The file by itself; `sound` takes its lines that can be read."""
    faults = 0
    try:
        for number, problem in read_lines(path, tokenizer, check_schema, frame):
            if isinstance(problem, Problem):
                sound[number] = problem
                continue
            faults += 1
            if faults <= _SHOWN:
                yield no(f"{problem}; mend the line or take it out")
    except ValueError as error:
        yield no(f"{error}; name an existing file")
        return
    if faults > _SHOWN:
        yield no(f"{path}: {faults - _SHOWN} more lines are faulty; mend them or take them out")
    if not sound:
        if not faults:
            yield no(f"{path}: no problems in it; write a line for each")
        return
    if not faults:
        yield ok(f"{path}: {len(sound)} problems")
    longest, limit = max(len(p.prompt) for p in sound.values()), config.data.max_prompt_tokens
    yield from of(
        f"{path}: the longest prompt has {longest} tokens of {limit}",
        lambda: check_lengths(path, sound, limit),
    )
    first: dict[str, int] = {}
    again = [
        (number, line)
        for number, problem in sound.items()
        if (line := first.setdefault(_messages(problem), number)) != number
    ]
    if again:
        yield no(
            f"{path}:{again[0][0]}: the messages are those of line {again[0][1]}; in all"
            f" {len(again)} lines repeat another: take them out"
        )
    else:
        yield ok(f"{path}: no messages occur twice")


def _check_truths(path: str, train: Problems) -> Iterator[Finding]:
    without = [number for number, problem in train.items() if not problem.ground_truth]
    if without:
        yield no(
            f"{path}:{without[0]}: no ground_truth for the reward `fields`; {len(without)} of"
            f" {len(train)} lines have none: add it, or take the reward out"
        )
    elif train:
        yield ok(f"{path}: all lines have ground_truth for the reward `fields`")


def _check_apart(path: str, train: Problems, file: str, heldout: Problems) -> Iterator[Finding]:
    line_of = {_messages(problem): number for number, problem in train.items()}
    both = [(n, line_of[m]) for n, p in heldout.items() if (m := _messages(p)) in line_of]
    if both:
        yield no(
            f"{file}:{both[0][0]}: is trained on, as {path}:{both[0][1]}; in all {len(both)} of"
            f" {len(heldout)} held-out lines are: take them out of one of the files"
        )
    elif train and heldout:
        yield ok(f"{file}: none of it is trained on")


def _try_reward(config: Config, name: str, schema: Any, train: Problems) -> Finding:
    """What one reward gives to the right answer of a row, if it has one, and to `{}`."""
    number = next((n for n, p in train.items() if p.ground_truth), next(iter(train)))
    row = train[number].row
    texts = {"{}": "{}"}
    if truth := train[number].ground_truth:
        texts = {"the ground truth": json.dumps(truth, ensure_ascii=False), **texts}
    scoring = dataclasses.replace(config.scoring, workers=1)
    where = f"{config.data.train}:{number}"
    try:
        with Pool(schema, {name: 1.0}, scoring) as pool:
            [answers] = pool.reward([(row, [*texts.values()])])
    except ValueError as error:
        return no(error)
    for what, answer in zip(texts, answers, strict=True):
        if answer.failure:
            return no(f"reward {name}: {what} of {where} has no score: {answer.failure}; mend it")
    scores = [f"{a.terms[name]:g} for {what}" for what, a in zip(texts, answers, strict=True)]
    return ok(f"reward {name}: {', '.join(scores)} of {where}")


def _messages(problem: Problem) -> str:
    return json.dumps(problem.row["messages"], sort_keys=True)
