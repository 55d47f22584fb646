"""Hard invoices: pages with items, subtotal, VAT and other dates, in English, German and French.

Some went through a bad scanner. Train and held-out share no vendor, no label and no layout.
"""

import datetime
from random import Random
from typing import NamedTuple

from scripts.invoices import (
    CURRENCIES,
    ISO,
    MONTHS,
    NO_CURRENCY,
    YEARS,
    DateFormat,
    Invoice,
)

# ---------------------------------------------------------------------------- languages


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

LANGUAGES = (ENGLISH, ENGLISH, GERMAN, FRENCH)  # half of them English

# ---------------------------------------------------------------------------- layouts


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

# ---------------------------------------------------------------------------- invoices

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
