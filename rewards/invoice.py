"""The schema of the invoice task."""

from typing import Any

SCHEMA: dict[str, Any] = {
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
        "amount": {
            "description": "The total to pay.",
            "type": "number",
        },
        "currency": {
            "description": "ISO 4217 code; null if the invoice names none.",
            "type": ["string", "null"],
            "pattern": "^[A-Z]{3}$",
        },
    },
    "required": ["vendor", "date", "amount", "currency"],
    "additionalProperties": False,
}
"""What `configs/invoices/schema.json` holds."""
