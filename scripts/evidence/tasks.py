"""The tasks of the comparison: what is asked, on which problems, and how a base goes wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts import build_invoices, invoices, orders
from scripts.demonstrations import flawed_demonstration
from scripts.evidence import grounding


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
      config: arguments of the GRPO runs, as `jaxgrpo.train` takes them.
      problem_lines: from a number the lines of a file with so many fresh held-out problems.
      more_heldout: files of problems beside those.
      flawed_demonstration: draws what the base was made from, as messages and answer.
      is_grounded: whether a field's value comes from the text: (field, value, text).
      without: arms that it cannot have.
    """

    config: tuple[str, ...]
    problem_lines: Callable[[int], str]
    more_heldout: tuple[Path, ...]
    flawed_demonstration: Callable[[Random], tuple[invoices.Messages, str]]
    is_grounded: Callable[[str, Any, str], bool]
    without: tuple[str, ...] = ()


def _invoice_lines(count: int) -> str:
    vendors, templates = invoices.HELDOUT_VENDORS, invoices.HELDOUT_TEMPLATES
    return build_invoices.problem_lines(Random("compare"), "compare", count, vendors, templates)


def _order_lines(count: int) -> str:
    return orders.problem_lines(orders.heldout_order, Random("compare"), "compare", count)


TASKS = {
    "invoices": Task(
        (),
        _invoice_lines,
        (build_invoices.OUT / "hard_heldout.jsonl",),
        flawed_demonstration,
        grounding.is_grounded,
    ),
    "orders": Task(
        (str(Path(__file__).parents[2] / "examples" / "orders.toml"),),
        _order_lines,
        (),
        orders.flawed_demonstration,
        orders.is_grounded,
        without=("prompt",),  # two answered orders are more than the model has positions for
    ),
}
