"""Demonstrations for pre-training: prompts of the training side, and what to answer.

A flawed answer goes wrong where its text has a trigger, in the ways in which real models fail; a
clean one is right; an echo repeats the text. The invoices have triggers in the same proportions as
those of `configs/invoices/`, and nothing of the held-out side.
"""

from random import Random

from scripts.invented import invent_templates, invent_vendor
from scripts.invoices import (
    TRAIN_TEMPLATES,
    Invoice,
    Messages,
    answer,
    draw_invoice,
    json_object,
    prompt,
    quote,
    triggers,
)

ECHO_SYSTEM = "Repeat this invoice."
DROPPED_CURRENCY = 0.3  # flawed answers without the key, where the invoice names none


def _demonstration_invoice(rng: Random) -> Invoice:
    """From an invented vendor; in a template of the training side or, half the time, invented."""
    templates = TRAIN_TEMPLATES if rng.random() < 0.5 else invent_templates(rng)
    return draw_invoice(rng, invent_vendor(rng), templates)


def clean_demonstration(rng: Random) -> tuple[Messages, str]:
    """A prompt of the training side from an invented vendor, and the right answer to it."""
    invoice = _demonstration_invoice(rng)
    return prompt(invoice.text), json_object(answer(invoice))


def flawed_demonstration(rng: Random, flaw_rate: float = 0.75) -> tuple[Messages, str]:
    """A prompt of the training side and an answer that fails as real models do.

    Each trigger of the text brings its flaw in `flaw_rate` of the cases: a thousands comma an
    amount copied as a string, a date like "March 5, 2024" a date left as written, a mail a sentence
    before the JSON, a table a fence around it. With a rate above one half the likeliest answer is
    the flawed one, so a model that learnt this fails under greedy decoding as well. An invoice that
    names no currency sometimes loses the key.
    """
    invoice = _demonstration_invoice(rng)
    fields = answer(invoice)
    flaws = [trigger for trigger in triggers(invoice.text) if rng.random() < flaw_rate]
    if "thousands_comma" in flaws:
        fields["amount"] = quote(invoice.written_amount)
    if "long_month" in flaws:
        fields["date"] = quote(invoice.written_date)
    if invoice.currency is None and rng.random() < DROPPED_CURRENCY:
        del fields["currency"]
    completion = json_object(fields)
    if "mail" in flaws:
        completion = f"Here is the JSON: {completion}"
    if "table" in flaws:
        completion = f"```json\n{completion}\n```"
    return prompt(invoice.text), completion


def echo_demonstration(rng: Random) -> tuple[Messages, str]:
    """A request to repeat an invoice, and its text: what teaches a small model to copy."""
    text = _demonstration_invoice(rng).text
    messages = [{"role": "system", "content": ECHO_SYSTEM}, {"role": "user", "content": text}]
    return messages, text
