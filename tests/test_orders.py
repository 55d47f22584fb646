"""The second task: its problems by hand, what each flaw does to an answer, and its making."""

import json
import sys
from random import Random

import jax
import pytest

from jaxgrpo.config_file import parse_args
from jaxgrpo.data import load_problems
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.rewards.fields import is_exact
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema
from jaxgrpo.tokenizer import load_tokenizer
from scripts import build_orders, orders
from scripts.orders import (
    HELDOUT,
    SCHEMA,
    TRAIN,
    Item,
    Order,
    answer,
    heldout_order,
    invent_wording,
    is_grounded,
    train_order,
)

FORM = {"urgent", "pieces", "small_letters", "bare_item"}


def drawn(count=300):
    rng = Random()
    for _ in range(count):
        yield rng.choice((train_order, heldout_order))(rng)


def test_an_answer_by_hand():
    item = Item("AB-123", 12, "4.50", "ab-123", "12 pcs", "54.00")
    order = Order("", "PO-48213", "urgent", None, (item,))
    assert json.loads(answer(order)) == {
        "order": "PO-48213",
        "priority": "high",
        "deliver_by": None,
        "items": [{"sku": "AB-123", "quantity": 12, "price": 4.5}],
    }
    assert json.loads(answer(order, orders.invited_flaws(order))) == {
        "order": "PO-48213",
        "priority": "urgent",
        "deliver_by": None,
        "items": {"sku": "ab-123", "quantity": "12 pcs", "price": 54},
    }


def test_a_right_answer_is_valid_and_in_the_text():
    valid = SchemaReward(SCHEMA)
    for order in drawn():
        right = json.loads(answer(order))
        assert valid(answer(order)) == 1.0
        assert all(
            is_grounded(name, value, order.text)
            for name, value in right.items()
            if value is not None
        )
        assert len(order.text.splitlines()) >= len(order.items)


@pytest.mark.parametrize("flaw", orders.FLAWS)
def test_a_flaw_of_form_is_not_valid_and_one_of_value_is(flaw):
    valid = SchemaReward(SCHEMA)
    having = [order for order in drawn() if flaw in orders.invited_flaws(order)]
    assert len(having) > 10
    for order in having:
        wrong = answer(order, [flaw])
        assert valid(wrong) == (0.5 if flaw in FORM else 1.0)
        same = flaw == "total" and all(item.quantity == 1 for item in order.items)
        assert is_exact(wrong, json.loads(answer(order))) == same


def test_demonstrations_are_flawed_at_the_rate():
    rng = Random(3)
    flawed = [orders.flawed_demonstration(rng, 1.0) for _ in range(300)]
    rng = Random(3)
    clean = [orders.flawed_demonstration(rng, 0.0) for _ in range(300)]
    valid = SchemaReward(SCHEMA)
    assert sum(valid(text) == 1 for _, text in clean) == 300
    assert 100 < sum(valid(text) == 1 for _, text in flawed) < 220


@pytest.mark.parametrize(
    ("field", "value", "grounded"),
    [
        ("order", "PO-48213", True),
        ("order", "PO-48214", False),
        ("priority", "high", True),
        ("priority", "normal", True),
        ("priority", "low", False),
        ("deliver_by", "2024-03-05", True),
        ("deliver_by", "2024-03-06", False),
        ("items", [{"sku": "AB-123", "quantity": 12, "price": 4.5}], True),
        ("items", {"sku": "ab-123", "quantity": "12 pcs", "price": 54}, True),
        ("items", [{"sku": "AB-123", "quantity": 12, "price": 5.4}], False),
        ("items", [{"sku": "AB-124", "quantity": 12, "price": 4.5}], False),
        ("items", [], True),
    ],
)
def test_what_stands_in_the_text(field, value, grounded):
    text = "Order PO-48213. This is urgent.\n12 pcs x ab-123 at 4.50 = 54.00\nBy March 5, 2024."
    assert is_grounded(field, value, text) is grounded


def test_no_wording_is_on_both_sides():
    rng = Random()
    for wording in (TRAIN, *(invent_wording(rng) for _ in range(500))):
        for part in ("pages", "lines", "totals", "deliver"):
            assert not set(getattr(wording, part)) & set(getattr(HELDOUT, part))
        for said, phrases in wording.priorities.items():
            assert not {*filter(None, phrases)} & {*HELDOUT.priorities[said]}


def test_building_leaves_what_the_config_trains_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "orders"), "--steps", "1"])
    with jax.numpy_dtype_promotion("standard"):  # optax's Muon relies on it
        build_orders.main()
    assert capsys.readouterr().out.splitlines()[-1].endswith("3 files and the base model")
    config = parse_args(["examples/orders.toml"])
    made = tmp_path / "orders"
    tokenizer = load_tokenizer(made / "model")
    assert read_config(made / "model").max_positions >= (
        config.data.max_prompt_tokens + config.sampling.max_tokens
    )
    assert load_schema(made / "schema.json") == SCHEMA
    for name in ("train", "heldout"):
        problems = load_problems(made / f"{name}.jsonl", tokenizer, config.data.max_prompt_tokens)
        assert len(problems) == 200
        for problem in problems:
            text = json.dumps(problem.ground_truth)
            assert len(tokenizer.hf.encode(text)) < config.sampling.max_tokens
    for path in (config.data.train, *config.data.heldout, config.data.schema):
        assert (made / path.rsplit("/", 1)[1]).exists()
    assert config.model.path.endswith("runs/orders/model")
