"""Builds the second task: its schema, its problems and the base model that is to learn it.

    python -m scripts.build_orders              into runs/orders
    python -m scripts.build_orders --out DIR

`scripts.orders` says what an order is. The base is the shipped tiny model, which copies digits and
reads dates, trained on: first with right answers, then with flawed ones. Everything is a function
of the seed, on machines whose floating point agrees.
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random

from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.tokenizer import load_tokenizer
from scripts import orders
from scripts.pretrain_tiny import OUT as TINY
from scripts.pretrain_tiny import Lengths, Stage, pretrain

STEPS = 600
CLEAN = 0.3  # share of the steps with right answers, before the flawed ones
LENGTHS = Lengths(prefix=88, branch=288, answer=144)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/orders"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the base (%(default)s)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    files = {"schema.json": json.dumps(orders.SCHEMA, indent=2) + "\n"}
    for name, draw in (("train", orders.train_order), ("heldout", orders.heldout_order)):
        rng = Random(f"{args.seed}/{name}")
        files[f"{name}.jsonl"] = orders.problem_lines(draw, rng, name, 200)
    for name, content in files.items():
        (args.out / name).write_text(content, "utf-8")

    tokenizer = load_tokenizer(TINY)
    clean = round(CLEAN * args.steps)
    stages = (
        Stage(clean, (orders.clean_demonstration,)),
        Stage(args.steps - clean, (orders.flawed_demonstration,)),
    )
    rng = Random(f"{args.seed}/orders")
    model = pretrain(load_hf(TINY), stages, tokenizer, rng, LENGTHS)
    shutil.rmtree(args.out / "model", ignore_errors=True)
    export_hf(model, tokenizer.hf, args.out / "model")
    print(f"{args.out}: {len(files)} files and the base model")


if __name__ == "__main__":
    main()
