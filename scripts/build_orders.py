"""Builds the second task: its schema, its problems and the base model that is to learn it.

    python -m scripts.build_orders              into runs/orders
    python -m scripts.build_orders --out DIR

`scripts.orders` says what an order is. The base is the shipped tiny model, which reads dates and
copies numbers, fine-tuned on orders whose answers are flawed. Everything is a function of the seed,
on machines whose floating point agrees.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from jaxgrpo.config import Config
from jaxgrpo.config_file import parse_args
from jaxgrpo.models.hf import export_hf
from jaxgrpo.tokenizer import ChatTokenizer, load_tokenizer
from jaxgrpo.types import Problem
from scripts import orders
from scripts.evidence.sft import Demonstration, fine_tune

STEPS = 600
BATCH = 32  # demonstrations
LR = 3e-3


def demonstrations(config: Config, tokenizer: ChatTokenizer) -> Iterator[Demonstration]:
    """Flawed ones, without end."""
    rng = Random(f"{config.run.seed}/orders")
    while True:
        messages, text = orders.flawed_demonstration(rng)
        yield Problem(0, "", tuple(tokenizer.encode_chat(messages)), {}), text


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/orders"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the base (%(default)s)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    files = {"schema.json": json.dumps(orders.SCHEMA, indent=2) + "\n"}
    for name, wording in (("train", orders.TRAIN), ("heldout", orders.HELDOUT)):
        rng = Random(f"{args.seed}/{name}")
        files[f"{name}.jsonl"] = orders.problem_lines(rng, name, 200, wording)
    for name, content in files.items():
        (args.out / name).write_text(content, "utf-8")

    config = parse_args([])
    config = replace(
        config,
        run=replace(config.run, seed=args.seed),
        data=replace(config.data, max_prompt_tokens=256),
        sampling=replace(config.sampling, max_tokens=144),
        update=replace(config.update, lr=LR, schedule="linear", warmup_steps=20),
    )
    tokenizer = load_tokenizer(config.model.path)
    shown = demonstrations(config, tokenizer)
    model = fine_tune(config, tokenizer, shown, steps=args.steps, batch=BATCH)
    shutil.rmtree(args.out / "model", ignore_errors=True)
    export_hf(model, tokenizer.hf, args.out / "model")
    print(f"{args.out}: {len(files)} files and the base model")


if __name__ == "__main__":
    main()
