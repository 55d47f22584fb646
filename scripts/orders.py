"""Purchase orders, the second task: a nested answer, with what the first task has not.

An order is a text from which to extract

    {"order": "PO-48213", "priority": "high", "deliver_by": null,
     "items": [{"sku": "AB-123", "quantity": 12, "price": 4.5}]}

so an array of objects, an enumeration, patterns and a field that may be null. Every value stands in
the text or follows from it: "urgent" is priority "high", a code in small letters has large ones.
No wording is on both sides, training and held-out.

The flawed demonstrations, which the base of this task is made from, go wrong in five ways, each
where a feature of the text invites it. Four are of form, and a grammar rules them out. The fifth
is not: where the text has the price of a line too, that is taken for the price of a piece, and the
answer is valid and wrong.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random
from typing import Any

from scripts.evidence.grounding import date_in, number_in, text_in
from scripts.invoices import Messages, draw_date, json_object, quote

SYSTEM = (
    "Extract from the order: order (PO-number), priority (low, normal or high), deliver_by"
    " (YYYY-MM-DD, null if none), items (sku, quantity, price of one)."
)
REQUEST = "Return valid JSON only."

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Order",
    "type": "object",
    "properties": {
        "order": {"type": "string", "pattern": "^PO-[0-9]{5}$"},
        "priority": {"enum": ["low", "normal", "high"]},
        "deliver_by": {"type": ["string", "null"], "format": "date"},
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                    "quantity": {"type": "integer", "minimum": 1},
                    "price": {"type": "number", "exclusiveMinimum": 0},
                },
                "required": ["sku", "quantity", "price"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["order", "priority", "deliver_by", "items"],
    "additionalProperties": False,
}

# ---------------------------------------------------------------------------- wordings


@dataclass(frozen=True)
class Wording:
    """How the orders of one side are written.

    Attributes:
      pages: with `{number}`, `{priority}`, `{deliver}` and `{items}`; the middle two may be empty.
      lines: of an item, with `{quantity}`, `{sku}` and `{price}`.
      totals: what may follow a line, with `{total}`.
      deliver: with `{date}`.
      priorities: by how they are written; "urgent" means high.
    """

    pages: tuple[str, ...]
    lines: tuple[str, ...]
    totals: tuple[str, ...]
    deliver: tuple[str, ...]
    priorities: dict[str, tuple[str, ...]]


TRAIN = Wording(
    pages=(
        "Order {number}.{priority}\n{items}\n{deliver}",
        "We order under {number}:\n{items}{priority}{deliver}",
        "{deliver}{priority}\nOur number is {number}.\n{items}",
        "Hello,\nplease send us\n{items}\nNumber: {number}.{priority}{deliver}",
    ),
    lines=(
        "{quantity} x {sku} at {price}",
        "{sku}, {quantity} at {price}",
        "- {sku}: {quantity}, price {price}",
    ),
    totals=(" = {total}", ", total {total}"),
    deliver=(" Needed by {date}.", " Delivery on {date}."),
    priorities={
        "low": (" Priority: low.", " The priority is low."),
        "normal": ("", " Priority: normal."),
        "high": (" Priority: high.", " The priority is high."),
        "urgent": (" This is urgent.", " Urgent order."),
    },
)
HELDOUT = Wording(
    pages=(
        "Purchase order {number}\n{items}\n{priority}{deliver}",
        "Order number {number}.{deliver}\n{items}\n{priority}",
        "Dear all,\nwe need, under {number},\n{items}\nThanks.{deliver}{priority}",
    ),
    lines=(
        "{sku} x {quantity} at {price}",
        "{quantity} of {sku}, price {price}",
        "* {quantity} x {sku}: {price}",
    ),
    totals=(" (total {total})", "; total = {total}"),
    deliver=(" Please deliver by {date}.", " Needed on {date}."),
    priorities={
        "low": (" Its priority is low.", " Priority low."),
        "normal": ("", " Its priority is normal."),
        "high": (" Its priority is high.", " Priority high."),
        "urgent": (" The order is urgent.", " It is urgent."),
    },
)

# What invented wordings are made of.
_ITEM = ("{quantity}<by>{sku}<at>{price}", "{sku}<by>{quantity}<at>{price}")
_MARK = ("", "", "- ", "* ", "> ")
_BY = (" x ", ", ", ": ", " / ", " of ", " - ", "; ", " ", " times ", " | ")
_AT = (" at ", ", price ", ": ", " for ", " / ", ", each ", " @ ", "; ", " costs ", " | ")
_TOTAL = (" = {total}", ", total {total}", " makes {total}", ", in all {total}", " [{total}]")
_NUMBER = (
    "Order {number}",
    "{number}",
    "Number {number}",
    "Our number: {number}",
    "Under {number}",
)
_DELIVER = ("Needed by", "Delivery", "By", "Due", "Please send by", "Deliver on", "Wanted on")
_PRIORITY = (
    "Priority: {}", "The priority is {}", "{} priority", "It is of {} priority", "With {} priority"
)  # fmt: skip
_URGENT = ("This is urgent", "Urgent", "Urgent order", "The matter is urgent", "It is very urgent")


def invent_wording(rng: Random) -> Wording:
    """A wording of random parts, none of whose forms is a held-out one.

    From few wordings a model learns the forms, and not to read.
    """
    while True:
        line = rng.choice(_MARK) + rng.choice(_ITEM)
        line = line.replace("<by>", rng.choice(_BY)).replace("<at>", rng.choice(_AT))
        if line not in HELDOUT.lines:
            break
    end = rng.choice((".", ".", "", ";"))
    blocks = [rng.choice(_NUMBER) + rng.choice((".", ":", "")), "{items}", "{deliver}{priority}"]
    rng.shuffle(blocks)
    said = rng.choice(_PRIORITY)
    priorities = {each: (f" {said.format(each)}{end}",) for each in ("low", "normal", "high")}
    return Wording(
        pages=(rng.choice(("", "", "Hi,\n", "Good day,\n")) + "\n".join(blocks),),
        lines=(line,),
        totals=(rng.choice(_TOTAL),),
        deliver=(f" {rng.choice(_DELIVER)} {{date}}{end}",),
        priorities=priorities
        | {
            "normal": ("", *priorities["normal"]),
            "urgent": (f" {rng.choice(_URGENT)}{end}",),
        },
    )


# ---------------------------------------------------------------------------- orders

URGENT, PIECES, SMALL_LETTERS, TOTALS = 0.14, 0.14, 0.12, 0.2  # how often a text has this
ITEMS = {1: 20, 2: 50, 3: 30}  # how many, in percent
NO_DATE = 0.3
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """A line of an order.

    Attributes:
      sku: with large letters.
      quantity: of pieces.
      price: of one, as a JSON number with the digits of the text.
      written_sku: as it stands in the text, and so `written_quantity`.
      total: the price of them all, None where the text does not have it.
    """

    sku: str
    quantity: int
    price: str
    written_sku: str
    written_quantity: str
    total: str | None


@dataclass(frozen=True)
class Order:
    """An order and what it says.

    Attributes:
      text: the order, without a request.
      number: "PO-" and five digits.
      priority: as written: `low`, `normal`, `high` or `urgent`.
      deliver_by: YYYY-MM-DD, None where the text names no date.
      items: its lines.
    """

    text: str
    number: str
    priority: str
    deliver_by: str | None
    items: tuple[Item, ...]


def draw_order(rng: Random, wording: Wording) -> Order:
    """An order in this wording."""
    number = f"PO-{rng.randrange(10_000, 100_000)}"
    priority = "urgent" if rng.random() < URGENT else rng.choice(("low", "normal", "high"))
    pieces, small, totals = (rng.random() < share for share in (PIECES, SMALL_LETTERS, TOTALS))
    count = rng.choices(tuple(ITEMS), tuple(ITEMS.values()))[0]
    items = [_draw_item(rng, pieces=pieces, small=small, totals=totals) for _ in range(count)]

    line = rng.choice(wording.lines) + (rng.choice(wording.totals) if totals else "")
    lines = [
        line.format(
            sku=item.written_sku, quantity=item.written_quantity, price=item.price, total=item.total
        )
        for item in items
    ]
    deliver_by, deliver = None, ""
    if rng.random() >= NO_DATE:
        deliver_by, written_date = draw_date(rng)
        deliver = rng.choice(wording.deliver).format(date=written_date)
    page = rng.choice(wording.pages).format(
        number=number,
        priority=rng.choice(wording.priorities[priority]),
        deliver=deliver,
        items="\n".join(lines),
    )
    text = "\n".join(filter(None, map(str.strip, page.splitlines())))
    return Order(text, number, priority, deliver_by, tuple(items))


def _draw_item(rng: Random, *, pieces: bool, small: bool, totals: bool) -> Item:
    sku = f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}-{rng.randrange(100, 1000)}"
    quantity, cents = rng.randint(1, 60), rng.randrange(100, 10_000)
    return Item(
        sku,
        quantity,
        _money(cents),
        written_sku=sku.lower() if small else sku,
        written_quantity=f"{quantity} pcs" if pieces else str(quantity),
        total=_money(quantity * cents) if totals else None,
    )


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


# ---------------------------------------------------------------------------- prompts and answers

FLAWS: dict[str, Callable[[Order], bool]] = {
    "urgent": lambda order: order.priority == "urgent",
    "pieces": lambda order: order.items[0].written_quantity.endswith("pcs"),
    "small_letters": lambda order: order.items[0].written_sku.islower(),
    "bare_item": lambda order: len(order.items) == 1,
    "total": lambda order: order.items[0].total is not None,
}


def invited_flaws(order: Order) -> tuple[str, ...]:
    """The flaws that the order's text invites, of `FLAWS`."""
    return tuple(name for name, invites in FLAWS.items() if invites(order))


def prompt(text: str) -> Messages:
    """The messages that ask for the fields of this order."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{text}\n{REQUEST}"},
    ]


def answer(order: Order, flaws: Collection[str] = ()) -> str:
    """The right answer as JSON on one line, or one with these flaws, which the text invites."""
    priority = order.priority
    if priority == "urgent" and "urgent" not in flaws:
        priority = "high"
    items = [
        json_object(
            {
                "sku": quote(item.written_sku if "small_letters" in flaws else item.sku),
                "quantity": quote(item.written_quantity)
                if "pieces" in flaws
                else str(item.quantity),
                "price": item.total if item.total and "total" in flaws else item.price,
            }
        )
        for item in order.items
    ]
    return json_object(
        {
            "order": quote(order.number),
            "priority": quote(priority),
            "deliver_by": "null" if order.deliver_by is None else quote(order.deliver_by),
            "items": items[0] if "bare_item" in flaws else f"[{', '.join(items)}]",
        }
    )


def train_order(rng: Random) -> Order:
    """An order in a wording of the training side or, half the time, an invented one."""
    return draw_order(rng, TRAIN if rng.random() < 0.5 else invent_wording(rng))


def heldout_order(rng: Random) -> Order:
    """An order in a held-out wording."""
    return draw_order(rng, HELDOUT)


def clean_demonstration(rng: Random) -> tuple[Messages, str]:
    """A prompt of the training side, and the right answer to it."""
    order = train_order(rng)
    return prompt(order.text), answer(order)


def flawed_demonstration(rng: Random, flaw_rate: float = 0.75) -> tuple[Messages, str]:
    """A prompt of the training side, and an answer with each flaw it invites at this rate."""
    order = train_order(rng)
    flaws = [flaw for flaw in invited_flaws(order) if rng.random() < flaw_rate]
    return prompt(order.text), answer(order, flaws)


def is_grounded(field: str, value: Any, text: str) -> bool:
    """Whether a field's value, which is not null, stands in the text or follows from it."""
    if field == "priority":
        implied = value == "normal" or (value == "high" and text_in("urgent", text))
        return implied or text_in(value, text)
    if field == "deliver_by":
        return date_in(value, text)
    if field == "items":
        items = value if isinstance(value, list) else [value]
        leaves = [leaf for item in items if isinstance(item, dict) for leaf in item.values()]
        return all(number_in(leaf, text) or text_in(leaf, text) for leaf in leaves)
    return text_in(value, text)


def problem_lines(draw: Callable[[Random], Order], rng: Random, name: str, count: int) -> str:
    """Orders and their right answers as the lines of a data file."""
    orders = [draw(rng) for _ in range(count)]
    problems = [
        {
            "id": f"{name}-{number:03}",
            "messages": prompt(order.text),
            "ground_truth": json.loads(answer(order)),
        }
        for number, order in enumerate(orders)
    ]
    return "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
