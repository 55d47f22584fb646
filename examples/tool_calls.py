"""Tool calls: the model picks one of the tools that a message offers, and fills in its arguments.

    python examples/tool_calls.py    writes tool_calls_train.jsonl and tool_calls_heldout.jsonl here

A row's own `schema` lets through a call of any tool that the row offers, so that it does not tell
the right one; `ground_truth` is the call that is asked for, and `right_call` the reward for it.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

from jaxgrpo.rewards.strict_json import ParseError, hashable, parse_answer, with_decimals

Schema = dict[str, Any]


def all_of(properties: Schema) -> Schema:
    """The schema of an object that has these properties and no others."""
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
TEXT = {"type": "string", "maxLength": 40}
TIME = {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}
COUNT = {"type": "integer", "minimum": 1, "maximum": 20}
CODE = {"type": "string", "pattern": "^[A-Z]{3}$"}
ITEM = all_of({"product": TEXT, "quantity": COUNT, "size": {"enum": ["small", "large", None]}})
TOOLS = {  # the schemas of their arguments
    "set_alarm": {
        "time": TIME,
        "days": {"type": "array", "items": {"enum": DAYS}, "maxItems": 7},
        "label": {"type": ["string", "null"], "maxLength": 40},
    },
    "book_table": {"restaurant": TEXT, "time": TIME, "guests": COUNT},
    "order": {"items": {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 5}},
    "convert": {"amount": {"type": "number", "exclusiveMinimum": 0}, "from": CODE, "to": CODE},
}

# How it is asked for, and with what: training and held-out rows share neither.
PARTS: dict[str, dict[str, Any]] = {
    "train": {
        "set_alarm": ["Wake me at {time} on {days}{label}.", "Alarm for {days}, {time}{label}"],
        "book_table": ["A table for {guests} at {restaurant}, {time} please."],
        "order": ["I would like {items}.", "Please order {items}"],
        "convert": ["How much is {amount} {from} in {to}?"],
        "hours": range(5, 12),
        "labels": ["gym", "early shift", "school run", "market"],
        "restaurants": ["Blue Lantern", "Casa Mirella", "The Old Mill", "Nori House"],
        "products": ["espresso", "lemon tea", "bagel", "tomato soup", "apple pie"],
        "currencies": ["EUR", "USD", "GBP", "JPY", "CHF"],
    },
    "heldout": {
        "set_alarm": ["I have to get up on {days}: make it {time}{label}."],
        "book_table": ["Could you reserve at {restaurant}? We are {guests} and come at {time}."],
        "order": ["Get us {items}, thanks!"],
        "convert": ["Change {amount} {from} into {to} for me."],
        "hours": range(13, 22),
        "labels": ["choir", "night train", "medicine"],
        "restaurants": ["Harbour Kitchen", "Saffron Court", "Chez Odile"],
        "products": ["hot chocolate", "falafel wrap", "cheese toast", "orange juice"],
        "currencies": ["SEK", "INR", "CAD", "BRL"],
    },
}


def draw_arguments(rng: Random, tool: str, part: dict[str, Any]) -> tuple[Schema, Schema]:
    """Arguments of a call, and how they are said where that is in other words."""
    time = f"{rng.choice(part['hours']):02}:{rng.choice((0, 15, 30, 45)):02}"
    if tool == "set_alarm":
        days = sorted(rng.sample(DAYS, rng.randint(1, 3)), key=DAYS.index)
        label = rng.choice([None, *part["labels"]])
        said = {"days": " and ".join(days), "label": f", for {label}" if label else ""}
        return {"time": time, "days": days, "label": label}, said
    if tool == "book_table":
        place = rng.choice(part["restaurants"])
        return {"restaurant": place, "time": time, "guests": rng.randint(1, 12)}, {}
    if tool == "order":
        sizes = ["small", "large", None]
        items = [
            {"product": product, "quantity": rng.randint(1, 6), "size": rng.choice(sizes)}
            for product in rng.sample(part["products"], rng.randint(1, 3))
        ]
        each = [(str(i["quantity"]), i["size"] or "", i["product"]) for i in items]
        return {"items": items}, {"items": " and ".join(" ".join(filter(None, e)) for e in each)}
    source, target = rng.sample(part["currencies"], 2)
    return {"amount": rng.randint(100, 99999) / 100, "from": source, "to": target}, {}


def draw_row(rng: Random, part: dict[str, Any]) -> dict[str, Any]:
    """A line of the data file."""
    offered = rng.sample([*TOOLS], 3)
    tool = rng.choice(offered)
    arguments, said = draw_arguments(rng, tool, part)
    tools = "\n".join(f"{name}: {json.dumps(TOOLS[name])}" for name in offered)
    system = (
        'Answer with one tool call, {"tool": NAME, "arguments": {...}}, as JSON and nothing else.'
        f" The tools, with the JSON schemas of their arguments, which are all required:\n{tools}"
    )
    user = rng.choice(part[tool]).format(**arguments | said)
    calls = [all_of({"tool": {"const": t}, "arguments": all_of(TOOLS[t])}) for t in offered]
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "schema": {"anyOf": calls},
        "ground_truth": {"tool": tool, "arguments": arguments},
    }


def right_call(completion: str, row: dict[str, Any]) -> float:
    """0.4 for the right tool, and 0.6 for the share of its arguments that are right."""
    truth = row["ground_truth"]
    try:
        call = parse_answer(completion)
    except ParseError:
        return 0.0
    if not isinstance(call, dict) or call.get("tool") != truth["tool"]:
        return 0.0
    given, wanted = call.get("arguments"), with_decimals(truth["arguments"])
    if not isinstance(given, dict):
        return 0.4
    right = sum(hashable(given[k]) == hashable(wanted[k]) for k in given.keys() & wanted.keys())
    return 0.4 + 0.6 * right / len(given.keys() | wanted.keys())


def main() -> None:
    """Writes the data files, the same rows every time."""
    for name, rows in (("train", 400), ("heldout", 100)):
        rng = Random(name)
        lines = [json.dumps(draw_row(rng, PARTS[name])) + "\n" for _ in range(rows)]
        file = Path(__file__).with_name(f"tool_calls_{name}.jsonl")
        file.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
