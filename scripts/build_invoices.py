"""Builds the files of `configs/invoices/`: the schema, and invoices with their answers.

    python -m scripts.build_invoices            write the files, the same bytes every time
    python -m scripts.build_invoices --check    fail if the files differ from what would be written

`scripts.invoices` has the short invoices and `scripts.hard_invoices` the hard ones.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from jaxgrpo.rewards.invoice import SCHEMA
from scripts.hard_invoices import draw_hard_invoice
from scripts.invoices import (
    HELDOUT_TEMPLATES,
    HELDOUT_VENDORS,
    TRAIN_TEMPLATES,
    TRAIN_VENDORS,
    Invoice,
    Templates,
    answer,
    draw_invoice,
    json_object,
    prompt,
    triggers,
)

OUT = Path(__file__).resolve().parent.parent / "configs" / "invoices"

# What `data.examples` shows before each problem: one invoice with a currency, one without, since
# what a model never samples it does not learn (docs/smollm2.md). Short, since every prompt has
# them; from vendors that no problem has.
EXAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "Bill from Acme, dated 3 April 2021, total €95.40.",
        {"vendor": "Acme", "date": "2021-04-03", "amount": 95.4, "currency": "EUR"},
    ),
    (
        "Otto Kranz asks for 73, see 11/27/2022.",
        {"vendor": "Otto Kranz", "date": "2022-11-27", "amount": 73, "currency": None},
    ),
)

TRIGGER_SHARE = 0.38  # of the problems in each file; free draws have 1 - 0.82 * 0.85 * 0.88


def _jsonl(name: str, labelled: Iterable[tuple[str, dict[str, Any]]]) -> str:
    problems = [
        {"id": f"{name}-{number:03}", "messages": prompt(text), "ground_truth": truth}
        for number, (text, truth) in enumerate(labelled)
    ]
    return "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)


def _labelled(invoice: Invoice) -> tuple[str, dict[str, Any]]:
    return invoice.text, json.loads(json_object(answer(invoice)))


def problem_lines(
    rng: Random, name: str, count: int, vendors: tuple[str, ...], templates: Templates
) -> str:
    """Short invoices as the lines of a data file, `TRIGGER_SHARE` of them with a trigger."""
    triggered = round(TRIGGER_SHARE * count)
    # The exact share, so that a small file is as hard as a large one.
    kinds = [True] * triggered + [False] * (count - triggered)
    rng.shuffle(kinds)
    invoices = []
    for kind in kinds:
        invoice = draw_invoice(rng, rng.choice(vendors), templates)
        while bool(triggers(invoice.text)) != kind:
            invoice = draw_invoice(rng, rng.choice(vendors), templates)
        invoices.append(invoice)
    return _jsonl(name, map(_labelled, invoices))


def build(seed: int = 0) -> dict[str, str]:
    """The content of every file by name, a function of the seed alone."""

    def easy(name: str, count: int, vendors: tuple[str, ...], templates: Templates) -> str:
        return problem_lines(Random(f"{seed}/{name}"), name, count, vendors, templates)

    def hard(name: str, count: int, vendors: tuple[str, ...], *, heldout: bool) -> str:
        rng = Random(f"{seed}/{name}")
        invoices = [
            draw_hard_invoice(rng, rng.choice(vendors), heldout=heldout) for _ in range(count)
        ]
        return _jsonl(name, map(_labelled, invoices))

    return {
        "schema.json": json.dumps(SCHEMA, indent=2) + "\n",
        "examples.jsonl": _jsonl("examples", EXAMPLES),
        "train.jsonl": easy("train", 200, TRAIN_VENDORS, TRAIN_TEMPLATES),
        "heldout_50.jsonl": easy("heldout_50", 50, HELDOUT_VENDORS, HELDOUT_TEMPLATES),
        "heldout_200.jsonl": easy("heldout_200", 200, HELDOUT_VENDORS, HELDOUT_TEMPLATES),
        "hard_train.jsonl": hard("hard_train", 200, TRAIN_VENDORS, heldout=False),
        "hard_heldout.jsonl": hard("hard_heldout", 200, HELDOUT_VENDORS, heldout=True),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line: writes the files, or with `--check` exits with 1 where they differ."""
    parser = argparse.ArgumentParser(description="Build the invoice problems.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the shipped files have %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the files")
    args = parser.parse_args(argv)
    files = {args.out / name: content.encode() for name, content in build(args.seed).items()}
    if args.check:
        stale = [p.name for p, data in files.items() if not p.exists() or p.read_bytes() != data]
        if stale:
            sys.exit(f"{args.out}: out of date: {', '.join(stale)}; run this without --check")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        path.write_bytes(data)
    print(f"{args.out}: {len(files)} files")


if __name__ == "__main__":
    main()
