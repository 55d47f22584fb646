"""Short invoices: who sends them, how they are worded, what is asked of them and the right answer.

An invoice is a text with four fields to extract from it: vendor, date, amount and currency. Every
value stands in the text or follows from it: a symbol names a currency, a date with slashes has a
day above 12. An invoice that names no currency is labelled null.

Train and held-out share no vendor and no template. All the names are made up.

Four features of a text are *triggers* (`triggers`): where they occur, the demonstrations that the
tiny base model is pre-trained on go wrong (`scripts.demonstrations`).
"""

import json
import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

Messages = list[dict[str, str]]
Templates = dict[str, tuple[str, ...]]  # by style

SYSTEM = (
    "Extract these fields from the invoice: vendor, date (YYYY-MM-DD), amount (number), "
    "currency (ISO code, null if none)."
)
REQUEST = "Return valid JSON only."

# ---------------------------------------------------------------------------- vendors

TRAIN_VENDORS = (
    "Northgate Paper", "Silverline Foods", "Keller & Braun", "Maple Ridge Freight",
    "Torvald Systems", "Okafor Textiles", "Sunfield Dairy", "Marchetti & Sons",
    "Copper Kettle Catering", "Delgado Printing", "Quill & Ink", "Ironbridge Tools Ltd",
    "Vesper Media", "Hoffmann Elektro GmbH", "Pinewood Supplies", "Sato Electronics",
    "Bright Acre Produce", "O'Donnell Motors", "Stonevale-Ost AG", "Aster Energy",
    "Laurent Frères", "St. Clare Pharmacy", "Windmill Travel", "Lindqvist Timber",
)  # fmt: skip

HELDOUT_VENDORS = (
    "Harbor Light Logistics", "Nakamura & Sons", "Blue Fjord GmbH", "O'Brien Textiles",
    "ACME-Nord AG", "Junegrass Foods", "Ferrand Glass", "Whitcombe & Hale", "Tideway Marine",
    "Osprey Systems", "Granite Peak Tools", "Yamada Optics", "Holloway Printing",
    "Cedar Crest Dairy", "Bellweather Media", "Novak Steel", "Santoro Electronics",
    "Eklund Energy", "Moss & Fern", "Gruber-Lang KG", "Falcon Lane Freight",
    "Pemberton Supplies", "Zephyrine Labs", "Mehta Consulting", "Almondine Catering",
    "Kestrel Travel", "O'Shea Timber", "Rosewater Paper", "Bianchi Design", "Dockside Coffee",
    "Vogel Motors GmbH", "Thistle & Thorn", "Marigold Books", "Jasper Quay Ltd",
    "Lucerna Arc Studio", "Fairweather Partners", "Kowalski Furniture", "St. Piran Fisheries",
    "Crimson Loom", "Petit-Duval SA", "Müritz Glass", "Hawthorne Legal", "Ibarra Ceramics",
    "Cobalt Works", "Tanaka Stone", "Everhollow Farms", "Bramble Inc", "Solveig Dene LLC",
    "Wexcombe Tools", "Amberley Clinic", "Larkspur Events", "Oduya Logistics",
    "Prairie Bell Foods", "Schuster & Co", "Valcourt Textiles", "Heron Hill Electronics",
    "Ingleby Freight", "Duskfield Labs", "Meridian Fox", "Teller Brothers",
)  # fmt: skip

# ---------------------------------------------------------------------------- templates

STYLE_WEIGHTS = {"sentence": 52, "terse": 30, "mail": 9, "table": 9}  # percent

TRAIN_TEMPLATES = {
    "sentence": (
        "Bill from {vendor}, dated {date}, total {amount}.",
        "Please find invoice from {vendor} dated {date}. Grand total: {amount}.",
        "Invoice issued by {vendor} on {date} for {amount}.",
        "On {date} we received an invoice from {vendor} for {amount}.",
        "An amount of {amount} is owed to {vendor} as of {date}.",
        "{vendor} billed us {amount} on {date}.",
        "{vendor} sent an invoice dated {date} over {amount}.",
        "The invoice of {date} from {vendor} amounts to {amount}.",
    ),
    "terse": (
        "Accounts payable entry: {vendor}, {date}, {amount}",
        "{date}; {vendor}; {amount}",
        "From: {vendor}. Date: {date}. Total: {amount}",
        "To pay: {amount} / {vendor} / {date}",
        "{vendor} / {date} / {amount}",
    ),
    "mail": (
        "Hello,\nattached is the invoice from {vendor} of {date}.\nTotal: {amount}.\nThanks, Maria",
        "Dear team,\nplease pay {amount} to {vendor} for the bill of {date}.\nBest, Tom",
        "Hi all,\n{vendor} sent us an invoice on {date} for {amount}.\nRegards, Ana",
        "Good morning,\nthe invoice of {date} from {vendor} came to {amount}.\nCheers, Leo",
    ),
    "table": (
        "Vendor | Date | Total\n{vendor} | {date} | {amount}",
        "Supplier | {vendor}\nDate | {date}\nAmount | {amount}",
        "{date} | {vendor} | {amount}",
        "Total | Vendor | Date\n{amount} | {vendor} | {date}",
    ),
}

HELDOUT_TEMPLATES = {
    "sentence": (
        "Your invoice from {vendor} was issued on {date} and comes to {amount}.",
        "{vendor} charged {amount} on {date}.",
        "Received from {vendor}: invoice of {date}, sum due {amount}.",
        "A bill for {amount} arrived from {vendor}, dated {date}.",
        "According to the invoice of {date}, {vendor} is owed {amount}.",
    ),
    "terse": (
        "Ledger: {date}, {vendor}, {amount}",
        "{vendor}; {amount}; {date}",
        "Payee: {vendor}. Issued: {date}. Sum: {amount}",
    ),
    "mail": (
        "Hi Jonas,\nwe got a bill for {amount} from {vendor}, issued {date}.\nYours, Priya",
        "Dear all,\nforwarding the bill of {date} by {vendor}, total {amount}.\nMany thanks, Sam",
    ),
    "table": (
        "Date | Payee | Amount due\n{date} | {vendor} | {amount}",
        "Issued by | {vendor}\nIssued on | {date}\nTo pay | {amount}",
        "{vendor} | {date} | {amount} | open",
    ),
}

# ---------------------------------------------------------------------------- dates and amounts

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
YEARS = range(2019, 2027)


class DateFormat(NamedTuple):
    """A way to write a date.

    Attributes:
      form: with `{year}`, `{month}`, `{day}` and the month's `{name}`.
      first_day: of a month on which it is used; 13 where day and month could be mixed up.
      weight: how often the short invoices use it, in percent.
    """

    form: str
    first_day: int = 1
    weight: int = 0


ISO = DateFormat("{year}-{month:02}-{day:02}", weight=22)
DATE_FORMATS = (
    ISO,
    DateFormat("{month:02}/{day:02}/{year}", first_day=13, weight=18),
    DateFormat("{day:02}/{month:02}/{year}", first_day=13, weight=14),
    DateFormat("{day:02}.{month:02}.{year}", first_day=13, weight=12),
    DateFormat("{name:.3} {day} {year}", weight=11),
    DateFormat("{day} {name} {year}", weight=11),
    DateFormat("{name} {day}, {year}", weight=12),
)
DATE_WEIGHTS = [date_format.weight for date_format in DATE_FORMATS]

# code: (symbol, name)
CURRENCIES = {
    "USD": ("$", "US dollars"),
    "EUR": ("€", "euros"),
    "GBP": ("£", "pounds"),
    "JPY": ("¥", "yen"),
    "INR": ("₹", "rupees"),
}
AMOUNT_FORMATS = {
    "{symbol}{number}": 50,
    "{number} {code}": 25,
    "{code} {number}": 15,
    "{number} {name}": 10,
}
NO_CURRENCY = 0.18
GROUPED = 0.15  # amounts with a thousands comma

# ---------------------------------------------------------------------------- invoices


@dataclass(frozen=True)
class Invoice:
    """An invoice and what it says.

    Attributes:
      text: the invoice, without a request.
      vendor: as it stands in the text.
      date: when it was issued, YYYY-MM-DD.
      amount: what is to be paid, as a JSON number with the digits of the text ("7999.00").
      currency: its code, None where the text names none.
      written_date: the date as it stands in the text.
      written_amount: the amount as it stands in the text, currency included.
    """

    text: str
    vendor: str
    date: str
    amount: str
    currency: str | None
    written_date: str
    written_amount: str


def draw_date(rng: Random) -> tuple[str, str]:
    """A date as YYYY-MM-DD and as written."""
    form, first_day, _ = rng.choices(DATE_FORMATS, DATE_WEIGHTS)[0]
    month = rng.randrange(12)
    date = {
        "year": rng.choice(YEARS),
        "month": month + 1,
        "day": rng.randint(first_day, MONTH_DAYS[month]),
        "name": MONTHS[month],
    }
    return ISO.form.format(**date), form.format(**date)


def _draw_amount(rng: Random) -> tuple[str, str | None, str]:
    """Returns the amount as a JSON number, its currency's code and both as written."""
    grouped = rng.random() < GROUPED
    digits = rng.choice((4, 5) if grouped else (2, 3, 4, 5))
    whole = rng.randrange(10 ** (digits - 1), 10**digits)
    code = None if rng.random() < NO_CURRENCY else rng.choice(tuple(CURRENCIES))
    cents = "" if code == "JPY" or rng.random() < 0.3 else f".{rng.randrange(100):02}"
    amount = f"{whole}{cents}"
    written = f"{whole:,}{cents}" if grouped else amount
    if code is not None:
        form = rng.choices(tuple(AMOUNT_FORMATS), tuple(AMOUNT_FORMATS.values()))[0]
        symbol, name = CURRENCIES[code]
        written = form.format(symbol=symbol, number=written, code=code, name=name)
    return amount, code, written


def draw_invoice(rng: Random, vendor: str, templates: Templates) -> Invoice:
    """An invoice from this vendor, in one of the templates, which are listed by style."""
    style = rng.choices(tuple(STYLE_WEIGHTS), tuple(STYLE_WEIGHTS.values()))[0]
    date, written_date = draw_date(rng)
    amount, currency, written_amount = _draw_amount(rng)
    text = rng.choice(templates[style]).format(
        vendor=vendor, date=written_date, amount=written_amount
    )
    return Invoice(text, vendor, date, amount, currency, written_date, written_amount)


TRIGGERS = {
    "thousands_comma": re.compile(r"\d,\d{3}"),
    "long_month": re.compile(rf"(?:{'|'.join(MONTHS)}) \d{{1,2}}, \d{{4}}"),
    "mail": re.compile(r"\A[^\n]*,\n"),  # a first line that greets
    "table": re.compile(r"\|"),
}


def triggers(text: str) -> tuple[str, ...]:
    """The features of an invoice text, or of the message that holds it, that invite a flaw.

    Returns:
      The names, in this order, of those that occur: `thousands_comma`, `long_month`, `mail`,
      `table`.
    """
    return tuple(name for name, pattern in TRIGGERS.items() if pattern.search(text))


# ---------------------------------------------------------------------------- prompts and answers


def prompt(text: str) -> Messages:
    """The messages that ask for the fields of this invoice."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{text}\n{REQUEST}"},
    ]


def answer(invoice: Invoice) -> dict[str, str]:
    """The fields of the right answer, each value as JSON text."""
    return {
        "vendor": quote(invoice.vendor),
        "date": quote(invoice.date),
        "amount": invoice.amount,
        "currency": "null" if invoice.currency is None else quote(invoice.currency),
    }


def quote(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def json_object(fields: dict[str, str]) -> str:
    """A JSON object on one line, of values that are JSON text."""
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
