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
    if field == "amount" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return any(abs(value - number) < 0.005 for number in _numbers(text))
    if field == "date" and isinstance(value, str):
        return value in text or _date_in(value, text)
    if field == "currency" and isinstance(value, str):
        return any(word in text for word in (value, *CURRENCIES.get(value, ())))
    return _squeezed(str(value)) in _squeezed(text)


def _numbers(text: str) -> set[float]:
    """Every number of the text, with commas and points read both ways."""
    found = set()
    for written in re.findall(r"\d(?:[\d.,' ]*\d)?", text):
        for thousands, decimal in ((", '", "."), (". '", ",")):
            plain = written.translate({ord(c): None for c in thousands}).replace(decimal, ".")
            if plain.count(".") <= 1:
                found.add(float(plain))
    return found


def _date_in(value: str, text: str) -> bool:
    try:
        day = date.fromisoformat(value)
    except ValueError:
        return False
    numbers = {int(digits) for digits in re.findall(r"\d+", text)}
    words = re.findall(r"[^\W\d]{3,}", text.casefold())
    months = numbers.union(*(_MONTHS.get(word[:3], ()) for word in words))
    return {day.year, day.day} <= numbers and day.month in months


def _squeezed(text: str) -> str:
    return " ".join(text.casefold().split())
