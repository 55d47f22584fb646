"""Whether an answer's values come from the invoice: read there, or derived as a reader would."""

import re
from datetime import date
from typing import Any

from scripts.hard_invoices import LANGUAGES
from scripts.invoices import CURRENCIES

_MONTHS: dict[str, set[int]] = {}  # by the first three letters: "jui" is June and July
for _language in LANGUAGES:
    for _number, _name in enumerate(_language.months, start=1):
        _MONTHS.setdefault(_name[:3].casefold(), set()).add(_number)


def is_grounded(field: str, value: Any, text: str) -> bool:
    """Whether a field's value stands in the text, in any form that means it.

    Args:
      field: `vendor`, `date`, `amount` or `currency`.
      value: of a JSON answer, and not null.
      text: the invoice.
    """
    if field == "amount" and number_in(value, text):
        return True
    if field == "date" and date_in(value, text):
        return True
    if field == "currency" and isinstance(value, str):
        return any(word in text for word in (value, *CURRENCIES.get(value, ())))
    return text_in(value, text)


def text_in(value: Any, text: str) -> bool:
    """Whether a value stands in the text as it is, but for case and spaces."""
    return _squeezed(str(value)) in _squeezed(text)


def number_in(value: Any, text: str) -> bool:
    """Whether a value is a number of the text, with its commas and points read either way."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return any(abs(value - number) < 0.005 for number in _numbers(text))


def _numbers(text: str) -> set[float]:
    """Every number of the text, with commas and points read both ways."""
    found = set()
    for written in re.findall(r"\d(?:[\d.,' ]*\d)?", text):
        for thousands, decimal in ((", '", "."), (". '", ",")):
            plain = written.translate({ord(c): None for c in thousands}).replace(decimal, ".")
            if plain.count(".") <= 1:
                found.add(float(plain))
    return found


def date_in(value: Any, text: str) -> bool:
    """Whether a value is a date as YYYY-MM-DD whose year, month and day are in the text."""
    try:
        day = date.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    numbers = {int(digits) for digits in re.findall(r"\d+", text)}
    words = re.findall(r"[^\W\d]{3,}", text.casefold())
    months = numbers.union(*(_MONTHS.get(word[:3], ()) for word in words))
    return {day.year, day.day} <= numbers and day.month in months


def _squeezed(text: str) -> str:
    return " ".join(text.casefold().split())
