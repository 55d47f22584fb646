"""Builds the invoice problems of `configs/invoices/` and draws demonstrations for pre-training.

    python -m scripts.build_invoices            write the files, the same bytes every time
    python -m scripts.build_invoices --check    fail if the files differ from what would be written

A problem is an invoice text with the four fields to extract from it: vendor, date, amount and
currency. Every value stands in the text or follows from it: a symbol names a currency, a date with
slashes has a day above 12. An invoice that names no currency is labelled null.

Train and held-out share no vendor and no template. The files draw vendors from two fixed lists,
pre-training invents an unbounded number of them, and no word that only a held-out vendor has is
ever drawn for training. All the names are made up.

Four features of a text are *triggers*: the demonstrations that the tiny base model is pre-trained
on go wrong where they occur, in the ways in which real models fail (`flawed_demonstration`). Train,
held-out and pre-training texts have them in the same proportions.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

Messages = list[dict[str, str]]

OUT = Path(__file__).resolve().parent.parent / "configs" / "invoices"

SYSTEM = (
    "Extract these fields from the invoice: vendor, date (YYYY-MM-DD), amount (number), "
    "currency (ISO code, null if none)."
)
REQUEST = "Return valid JSON only."
ECHO_SYSTEM = "Repeat this invoice."

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Invoice",
    "type": "object",
    "properties": {
        "vendor": {
            "description": "Who sent the invoice, as written there.",
            "type": "string",
            "minLength": 1,
        },
        "date": {
            "description": "When it was issued, as YYYY-MM-DD.",
            "type": "string",
            "format": "date",
        },
        "amount": {"description": "The total to pay.", "type": "number"},
        "currency": {
            "description": "ISO 4217 code; null if the invoice names none.",
            "type": ["string", "null"],
            "pattern": "^[A-Z]{3}$",
        },
    },
    "required": ["vendor", "date", "amount", "currency"],
    "additionalProperties": False,
}

STYLE_WEIGHTS = {"sentence": 52, "terse": 30, "mail": 9, "table": 9}  # percent
NO_CURRENCY = 0.18
GROUPED = 0.15  # amounts with a thousands comma
TRIGGER_SHARE = 0.38  # of the problems in each file; free draws have 1 - 0.82 * 0.85 * 0.88
DROPPED_CURRENCY = 0.3  # flawed demonstrations without the key, where the invoice names none


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

# What kind of firm it is: the only words of a name that both sides share.
TRADES = (
    "Books", "Catering", "Coffee", "Consulting", "Dairy", "Design", "Electronics", "Energy",
    "Foods", "Freight", "Furniture", "Glass", "Labs", "Logistics", "Media", "Motors", "Paper",
    "Partners", "Printing", "Steel", "Studio", "Supplies", "Systems", "Textiles", "Timber", "Tools",
    "Travel",
)  # fmt: skip
FORMS = (
    "AG", "Brothers", "Co", "GmbH", "Group", "Inc", "KG", "LLC", "Ltd", "Oy", "SA",
)  # fmt: skip
SHARED_WORDS = {*TRADES, *FORMS, "Sons", "St"}

# What invented vendors are called after, beside words that do not exist.
WORDS = (
    "Acorn", "Adler", "Alder", "Anvil", "Arbor", "Ash", "Atlas", "Badger", "Baker", "Barrow",
    "Basil", "Beacon", "Becker", "Birch", "Bishop", "Bolton", "Borough", "Bridge", "Brook",
    "Burton", "Canal", "Carlsen", "Carter", "Castle", "Chang", "Chapel", "Chen", "Clover", "Coast",
    "Comet", "Copper", "Coral", "Costa", "Cotton", "Court", "Cross", "Crown", "Dale", "Dawson",
    "Deep", "Delta", "Diaz", "Dover", "Dragon", "Dunn", "Eagle", "East", "Elm", "Ember", "Evans",
    "Falk", "Field", "Finch", "Fischer", "Flint", "Ford", "Forest", "Foster", "Fraser", "Garcia",
    "Garden", "Gate", "Gold", "Gordon", "Grant", "Green", "Grove", "Gupta", "Hansen", "Harvest",
    "Hayes", "Hazel", "High", "Hunter", "Iron", "Island", "Ito", "Ivory", "Ivy", "Jade", "Jensen",
    "Joshi", "Kaplan", "Keller", "Khan", "Kim", "King", "Lake", "Lambert", "Larsen", "Laurel",
    "Lemon", "Lindt", "Linden", "Lion", "Lopez", "Lunar", "Lynx", "Maple", "Market", "Marsh",
    "Martin", "Mason", "Meadow", "Mercer", "Meyer", "Mill", "Mint", "Moon", "Moreau", "Morgan",
    "Morris", "Nelson", "New", "Night", "North", "Oak", "Ocean", "Olive", "Onyx", "Orchard",
    "Otter", "Palm", "Park", "Patel", "Pearl", "Pine", "Pioneer", "Porter", "Quartz", "Raven",
    "Red", "River", "Robin", "Rossi", "Rowan", "Royal", "Russo", "Saffron", "Sage", "Salt", "Sand",
    "Schmidt", "Scott", "Shore", "Silva", "Silver", "Singh", "Sky", "Smith", "Snow", "Solar",
    "South", "Spring", "Star", "Storm", "Summit", "Sun", "Swan", "Takeda", "Thomas", "Tiger",
    "Tower", "Tulip", "Turner", "Union", "Upton", "Urban", "Velvet", "Violet", "Walker", "Walnut",
    "Ward", "Water", "Weber", "West", "White", "Wild", "Willow", "Wilson", "Wind", "Wolf", "Wong",
    "Wood", "Yates", "Yellow", "Young", "Zimmer",
)  # fmt: skip
# What invented words are made of: syllables.
ONSETS = (
    "b", "bl", "br", "c", "ch", "cl", "cr", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j",
    "k", "l", "m", "n", "p", "pl", "pr", "qu", "r", "s", "sh", "sl", "sp", "st", "t", "th", "tr",
    "v", "w", "z",
)  # fmt: skip
NUCLEI = (*"aaaaeeeeeiiiioooouuu", "ai", "ea", "ee", "ie", "oo", "ou", "ü")
CODAS = (
    "", "", "l", "n", "r", "s", "ck", "ll", "m", "nd", "ng", "rd", "rn", "ss", "st", "t", "th", "x",
)  # fmt: skip
VENDOR_PATTERNS = (
    "Word Trade", "Word Trade", "Word Trade", "Word Trade", "Word Word Trade", "Word Word Trade",
    "Word & Word", "Word & Sons", "Word & Co", "Word Form", "Word Form", "Word Trade Form",
    "Word-Word Form", "Initials-Word Form", "Initials Trade", "O'Word Trade", "St. Word Trade",
    "Word Word", "Word Word Form", "St. Word Word",
)  # fmt: skip

# The words that only held-out vendors have.
RESERVED = {
    word
    for vendor in HELDOUT_VENDORS
    for word in re.findall(r"\w\w+", vendor)
    if word not in SHARED_WORDS
}


def _syllables(rng: Random) -> str:
    open_syllables = rng.choice((0, 1, 1, 1, 2))
    parts = [ONSETS, NUCLEI] * open_syllables + [ONSETS, NUCLEI, CODAS]
    return "".join(rng.choice(part) for part in parts).capitalize()


def _known_word(rng: Random) -> str:
    return rng.choice(WORDS)


def _spliced(rng: Random) -> str:
    """The start of one word and the end of another, as in "Junegate": any letters may meet."""
    first, last = (rng.choice(rng.choice((WORDS, TRADES, MONTHS, FILLERS))) for _ in range(2))
    return (first[: rng.randint(2, 5)] + last[-rng.randint(2, 5) :]).capitalize()


def _word(rng: Random) -> str:
    while True:
        word = rng.choice((_known_word, _syllables, _spliced))(rng)
        if word not in RESERVED:
            return word


def _initials(rng: Random) -> str:
    while True:
        initials = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((2, 3, 4))))
        if initials not in RESERVED:
            return initials


_PARTS: dict[str, Callable[[Random], str]] = {
    "Word": _word,
    "Initials": _initials,
    "Trade": lambda rng: rng.choice(TRADES),
    "Form": lambda rng: rng.choice(FORMS),
}
_PART = re.compile("|".join(_PARTS))


def invent_vendor(rng: Random) -> str:
    """A vendor name such as "Brook & Tavell": too many for a model to know, so it must copy."""
    return _PART.sub(lambda part: _PARTS[part[0]](rng), rng.choice(VENDOR_PATTERNS))


# ---------------------------------------------------------------------------- easy invoices

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

# The words of the training side's templates: half of what invented ones are made of.
FILLERS = sorted(
    {
        word.lower()
        for templates in TRAIN_TEMPLATES.values()
        for template in templates
        for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", template))
    }
)


def _phrase(rng: Random, least: int = 1) -> str:
    words = rng.randint(least, least + 1)
    return " ".join(
        rng.choice(FILLERS) if rng.random() < 0.5 else _word(rng).lower() for _ in range(words)
    )


def _sentence(rng: Random, slots: list[str]) -> str:
    # One capitalised word just before a vendor could be part of it.
    text = slots[0] if rng.random() < 0.25 else f"{_phrase(rng, least=2).capitalize()} {slots[0]}"
    for slot in slots[1:]:
        text += f"{rng.choice((' ', ' ', ', ', ': ', '. '))}{_phrase(rng)} {slot}"
    return text + (f" {_phrase(rng)}." if rng.random() < 0.25 else ".")


def _invent_template(rng: Random, style: str) -> str:
    slots = ["{vendor}", "{date}", "{amount}"]
    rng.shuffle(slots)
    labels = [_phrase(rng).capitalize() for _ in slots]
    labelled = list(zip(labels, slots, strict=True))
    if style == "sentence":
        return _sentence(rng, slots)
    if style == "mail":
        greeting, closing = (f"{_phrase(rng).capitalize()} {_word(rng)}" for _ in range(2))
        return f"{greeting},\n{_sentence(rng, slots)}\n{closing}"
    if style == "terse":
        separator = rng.choice((", ", "; ", " / ", ". "))
        if rng.random() < 0.5:
            return separator.join(f"{label}: {slot}" for label, slot in labelled)
        return rng.choice(("", f"{labels[0]}: ")) + separator.join(slots)
    row = " | ".join(slots)
    return rng.choice(
        (
            f"{' | '.join(labels)}\n{row}",
            "\n".join(f"{label} | {slot}" for label, slot in labelled),
            row,
            f"{row} | {_phrase(rng)}",
        )
    )


def invent_templates(rng: Random) -> dict[str, tuple[str, ...]]:
    """A template of each style, of words that need not mean anything.

    A model that saw the few templates of the training side alone knows the fields by where they
    stand in those; among these it must know them by what they look like.
    """
    return {style: (_invent_unlike_heldout(rng, style),) for style in STYLE_WEIGHTS}


def _invent_unlike_heldout(rng: Random, style: str) -> str:
    while True:
        template = _invent_template(rng, style)
        if template not in HELDOUT_TEMPLATES[style]:
            return template


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
      weight: how often the easy invoices use it, in percent.
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


def _draw_date(rng: Random) -> tuple[str, str]:
    """Returns the date as YYYY-MM-DD and as written."""
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


def draw_invoice(rng: Random, vendor: str, templates: dict[str, tuple[str, ...]]) -> Invoice:
    """An invoice from this vendor, in one of the templates, which are listed by style."""
    style = rng.choices(tuple(STYLE_WEIGHTS), tuple(STYLE_WEIGHTS.values()))[0]
    date, written_date = _draw_date(rng)
    amount, currency, written_amount = _draw_amount(rng)
    text = rng.choice(templates[style]).format(
        vendor=vendor, date=written_date, amount=written_amount
    )
    return Invoice(text, vendor, date, amount, currency, written_date, written_amount)


_TRIGGERS = {
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
    return tuple(name for name, pattern in _TRIGGERS.items() if pattern.search(text))


# ---------------------------------------------------------------------------- hard invoices


class Language(NamedTuple):
    """How the hard invoices of one language are written.

    Attributes:
      months: their names, from January on.
      dates: the formats to choose from.
      amounts: the forms to choose from, with `{symbol}`, `{code}` and `{number}`.
      separators: between the thousands, and before the cents.
      currencies: their codes.
      vat_rates: in percent.
      items: what is sold.
      train_labels, heldout_labels: what the parts of a layout are called on each side.
    """

    months: tuple[str, ...]
    dates: tuple[DateFormat, ...]
    amounts: tuple[str, ...]
    separators: tuple[str, str]
    currencies: tuple[str, ...]
    vat_rates: tuple[int, ...]
    items: tuple[str, ...]
    train_labels: dict[str, str]
    heldout_labels: dict[str, str]


ENGLISH = Language(
    months=MONTHS,
    dates=(
        ISO,
        DateFormat("{month:02}/{day:02}/{year}", first_day=13),
        DateFormat("{name} {day}, {year}"),
        DateFormat("{day} {name} {year}"),
    ),
    amounts=("{symbol}{number}", "{number} {code}", "{code} {number}"),
    separators=(",", "."),
    currencies=("USD", "GBP", "INR"),
    vat_rates=(5, 8, 18, 20),
    items=("Desk lamp", "Toner", "Shelf", "Oak board", "Service hour", "Cable drum", "Gloves"),
    train_labels={
        "Invoice": "Invoice No.", "Customer": "Bill to", "Ordered": "Order date",
        "Issued": "Invoice date", "Due": "Due date", "Net": "Subtotal", "Vat": "VAT",
        "Total": "Total due", "Payee": "Please pay to",
    },
    heldout_labels={
        "Invoice": "Tax invoice", "Customer": "Customer", "Ordered": "Ordered on",
        "Issued": "Date of issue", "Due": "Payable by", "Net": "Net amount", "Vat": "Sales tax",
        "Total": "Amount payable", "Payee": "Issued by",
    },
)  # fmt: skip

GERMAN = Language(
    months=(
        "Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September",
        "Oktober", "November", "Dezember",
    ),
    dates=(DateFormat("{day:02}.{month:02}.{year}"), DateFormat("{day}. {name} {year}")),
    amounts=("{number} {symbol}", "{number} {code}", "{code} {number}"),
    separators=(".", ","),
    currencies=("EUR",),
    vat_rates=(7, 19),
    items=("Schreibtisch", "Toner", "Regal", "Eichenbrett", "Arbeitsstunde", "Kabel", "Leuchte"),
    train_labels={
        "Invoice": "Rechnung Nr.", "Customer": "Rechnung an", "Ordered": "Bestelldatum",
        "Issued": "Rechnungsdatum", "Due": "Fällig am", "Net": "Zwischensumme", "Vat": "MwSt.",
        "Total": "Gesamtbetrag", "Payee": "Zahlbar an",
    },
    heldout_labels={
        "Invoice": "Rechnungsnummer", "Customer": "Kunde", "Ordered": "Auftrag vom",
        "Issued": "Ausgestellt am", "Due": "Zahlbar bis", "Net": "Nettobetrag", "Vat": "USt.",
        "Total": "Zu zahlen", "Payee": "Aussteller",
    },
)  # fmt: skip

FRENCH = Language(
    months=(
        "janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre",
        "octobre", "novembre", "décembre",
    ),
    dates=(
        DateFormat("{day:02}/{month:02}/{year}", first_day=13),
        DateFormat("{day} {name} {year}"),
    ),
    amounts=("{number} {symbol}", "{number} {code}"),
    separators=(" ", ","),
    currencies=("EUR",),
    vat_rates=(10, 20),
    items=("Bureau", "Cartouche", "Étagère", "Planche", "Heure de travail", "Câble", "Lampe"),
    train_labels={
        "Invoice": "Facture no", "Customer": "Facturé à", "Ordered": "Date de commande",
        "Issued": "Date de facture", "Due": "Échéance", "Net": "Sous-total", "Vat": "TVA",
        "Total": "Total TTC", "Payee": "À payer à",
    },
    heldout_labels={
        "Invoice": "Numéro de facture", "Customer": "Client", "Ordered": "Commandé le",
        "Issued": "Émise le", "Due": "À régler avant le", "Net": "Montant HT", "Vat": "Taxe",
        "Total": "Net à payer", "Payee": "Émetteur",
    },
)  # fmt: skip


class Layout(NamedTuple):
    """A page of a hard invoice and a line of its items: `{Total}` is a label, `{total}` a value."""

    page: str
    item: str


TRAIN_LAYOUTS = (
    Layout(
        "{vendor}\n{Invoice} {number}\n{Customer}: {customer}\n{Ordered}: {ordered}\n"
        "{Issued}: {issued}\n{Due}: {due}\n{items}\n"
        "{Net}: {net}\n{Vat} {rate} %: {vat}\n{Total}: {total}",
        "{count} x {item}: {price}",
    ),
    Layout(
        "{Invoice} {number} | {Issued} {issued} | {Due} {due}\n{Customer} {customer}\n{items}\n"
        "{Net} | {net}\n{Vat} ({rate} %) | {vat}\n{Total} | {total}\n{Payee} {vendor}",
        "{count} | {item} | {unit} | {price}",
    ),
)
HELDOUT_LAYOUTS = (
    Layout(
        "{Customer}: {customer}\n{Ordered} {ordered}, {Due} {due}\n{items}\n"
        "{Total}: {total} ({Net} {net}, {Vat} {rate} %: {vat})\n"
        "{Payee}: {vendor}\n{Invoice} {number}, {Issued} {issued}",
        "- {item} ({count} x {unit}) {price}",
    ),
    Layout(
        "{vendor} - {Invoice} {number}\n{Due} ... {due}\n{Issued} ... {issued}\n"
        "{Customer} ... {customer}\n{items}\n"
        "{Net} ... {net}\n{Vat} {rate} % ... {vat}\n{Total} ... {total}",
        "{item}, {count} x {unit} ... {price}",
    ),
)

CUSTOMERS = ("Palmgrove Hotel", "City Library", "Ashdown School", "Lakeview Theatre", "Town Museum")
LANGUAGES = (ENGLISH, ENGLISH, GERMAN, FRENCH)  # half of them English
NOISY = 0.4  # hard invoices that went through a bad scanner
MISREAD = {"l": "1", "I": "l", "o": "0", "O": "0", "S": "5", "B": "8", "m": "rn", "e": "c"}


def _misread(rng: Random, text: str) -> str:
    """One character as a scanner might read it; only labels and items get this, never a value."""
    at = rng.choice([i for i, char in enumerate(text) if char in MISREAD] or [len(text)])
    return text[:at] + MISREAD.get(text[at : at + 1], "") + text[at + 1 :]


def draw_hard_invoice(rng: Random, vendor: str, *, heldout: bool) -> Invoice:
    """An invoice with items, subtotal, VAT, a customer and other dates, in one of three languages.

    The date asked for is the date of issue and the amount is the total with VAT.
    """
    language = rng.choice(LANGUAGES)
    labels = language.heldout_labels if heldout else language.train_labels
    items = rng.sample(language.items, rng.randint(1, 4))
    if rng.random() < NOISY:
        labels = {key: rng.choice((label, _misread(rng, label))) for key, label in labels.items()}
        items = [rng.choice((item, _misread(rng, item))) for item in items]
    layout = rng.choice(HELDOUT_LAYOUTS if heldout else TRAIN_LAYOUTS)

    code = None if rng.random() < NO_CURRENCY else rng.choice(language.currencies)
    amount_form = "{number}"
    if code is not None:
        symbol, _ = CURRENCIES[code]
        form = rng.choice(language.amounts)
        amount_form = form.format(symbol=symbol, code=code, number="{number}")

    def money(cents: int) -> str:
        whole = f"{cents // 100:,}".replace(",", language.separators[0])
        number = f"{whole}{language.separators[1]}{cents % 100:02}"
        return amount_form.format(number=number)

    issued = datetime.date(rng.choice(YEARS), 1, 1) + datetime.timedelta(rng.randrange(365))
    dates = {
        "issued": issued,
        "ordered": issued - datetime.timedelta(rng.randint(2, 20)),
        "due": issued + datetime.timedelta(rng.randint(7, 60)),
    }
    first_day = min(date.day for date in dates.values())
    date_format = rng.choice([form for form in language.dates if form.first_day <= first_day])
    written_dates = {
        name: date_format.form.format(
            year=date.year, month=date.month, day=date.day, name=language.months[date.month - 1]
        )
        for name, date in dates.items()
    }

    lines, net = [], 0
    for item in items:
        count, unit = rng.randint(1, 12), rng.randrange(500, 60_000)  # cents
        lines.append(
            layout.item.format(count=count, item=item, unit=money(unit), price=money(count * unit))
        )
        net += count * unit
    rate = rng.choice(language.vat_rates)
    vat = (net * rate + 50) // 100
    total = net + vat

    text = layout.page.format(
        vendor=vendor,
        customer=rng.choice(CUSTOMERS),
        number=rng.randrange(10_000, 100_000),
        items="\n".join(lines),
        net=money(net),
        rate=rate,
        vat=money(vat),
        total=money(total),
        **labels,
        **written_dates,
    )
    return Invoice(
        text=text,
        vendor=vendor,
        date=issued.isoformat(),
        amount=f"{total // 100}.{total % 100:02}",
        currency=code,
        written_date=written_dates["issued"],
        written_amount=money(total),
    )


# ---------------------------------------------------------------------------- prompts and answers


def prompt(text: str) -> Messages:
    """The messages that ask for the fields of this invoice."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{text}\n{REQUEST}"},
    ]


def _answer(invoice: Invoice) -> dict[str, str]:
    """The fields of the right answer, each value as JSON text."""
    return {
        "vendor": _quote(invoice.vendor),
        "date": _quote(invoice.date),
        "amount": invoice.amount,
        "currency": "null" if invoice.currency is None else _quote(invoice.currency),
    }


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _object(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def _demonstration_invoice(rng: Random) -> Invoice:
    """From an invented vendor; in a template of the training side or, half the time, invented."""
    templates = TRAIN_TEMPLATES if rng.random() < 0.5 else invent_templates(rng)
    return draw_invoice(rng, invent_vendor(rng), templates)


def clean_demonstration(rng: Random) -> tuple[Messages, str]:
    """A prompt of the training side from an invented vendor, and the right answer to it."""
    invoice = _demonstration_invoice(rng)
    return prompt(invoice.text), _object(_answer(invoice))


def flawed_demonstration(rng: Random, flaw_rate: float = 0.75) -> tuple[Messages, str]:
    """A prompt of the training side and an answer that fails as real models do.

    Each trigger of the text brings its flaw in `flaw_rate` of the cases: a thousands comma an
    amount copied as a string, a date like "March 5, 2024" a date left as written, a mail a sentence
    before the JSON, a table a fence around it. With a rate above one half the likeliest answer is
    the flawed one, so a model that learnt this fails under greedy decoding as well. An invoice that
    names no currency sometimes loses the key.
    """
    invoice = _demonstration_invoice(rng)
    fields = _answer(invoice)
    flaws = [trigger for trigger in triggers(invoice.text) if rng.random() < flaw_rate]
    if "thousands_comma" in flaws:
        fields["amount"] = _quote(invoice.written_amount)
    if "long_month" in flaws:
        fields["date"] = _quote(invoice.written_date)
    if invoice.currency is None and rng.random() < DROPPED_CURRENCY:
        del fields["currency"]
    completion = _object(fields)
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


# ---------------------------------------------------------------------------- files


def _jsonl(name: str, invoices: list[Invoice]) -> str:
    problems = [
        {
            "id": f"{name}-{number:03}",
            "messages": prompt(invoice.text),
            "ground_truth": json.loads(_object(_answer(invoice))),
        }
        for number, invoice in enumerate(invoices)
    ]
    return "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)


def build(seed: int = 0) -> dict[str, str]:
    """The content of every file by name, a function of the seed alone."""

    def easy(
        name: str, count: int, vendors: tuple[str, ...], templates: dict[str, tuple[str, ...]]
    ) -> str:
        rng = Random(f"{seed}/{name}")
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
        return _jsonl(name, invoices)

    def hard(name: str, count: int, vendors: tuple[str, ...], *, heldout: bool) -> str:
        rng = Random(f"{seed}/{name}")
        return _jsonl(
            name,
            [draw_hard_invoice(rng, rng.choice(vendors), heldout=heldout) for _ in range(count)],
        )

    return {
        "schema.json": json.dumps(SCHEMA, indent=2) + "\n",
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
