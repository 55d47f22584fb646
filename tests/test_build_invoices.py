"""The shipped invoices say what their labels claim, and the builder writes them again."""

import json
import re
from decimal import Decimal
from random import Random

import jsonschema
import pytest

from jaxgrpo.rewards.invoice import SCHEMA
from jaxgrpo.rewards.json_schema import SchemaReward
from scripts import build_invoices as builder
from scripts.build_invoices import OUT
from scripts.demonstrations import clean_demonstration, echo_demonstration, flawed_demonstration
from scripts.hard_invoices import LANGUAGES
from scripts.invented import FORMS, TRADES, invent_vendor
from scripts.invoices import (
    HELDOUT_TEMPLATES,
    HELDOUT_VENDORS,
    TRAIN_TEMPLATES,
    TRAIN_VENDORS,
    TRIGGERS,
    triggers,
)

SIZES = {"train": 200, "heldout_50": 50, "heldout_200": 200, "hard_train": 200, "hard_heldout": 200}
EASY = ("train", "heldout_50", "heldout_200")
HARD = ("hard_train", "hard_heldout")
FIELDS = ["vendor", "date", "amount", "currency"]


def load(name):
    return [json.loads(line) for line in (OUT / f"{name}.jsonl").read_text("utf-8").splitlines()]


def invoice_text(messages):
    text, request = messages[-1]["content"].rsplit("\n", 1)
    assert request == "Return valid JSON only."
    return text


# A reader of its own, which shares nothing with the builder: it finds dates, numbers and currencies
# in a text as a person would.

MONTH_STARTS = {
    1: "jan", 2: "feb|fév", 3: "mar|mär", 4: "apr|avr", 5: "may|mai", 6: "jun|juin",
    7: "jul|juil", 8: "aug|aoû", 9: "sep", 10: "oct|okt", 11: "nov", 12: "dec|dez|déc",
}  # fmt: skip
MONTH = rf"(?P<month>(?:{'|'.join(MONTH_STARTS.values())})[a-zéäû]*)"
DATE = (
    r"\d{4}-\d\d-\d\d|\d\d[/.]\d\d[/.]\d{4}"
    rf"|(?i:(?P<before>\d{{1,2}})\.? {MONTH} (?P<year>\d{{4}}))"
    rf"|(?i:{MONTH.replace('month', 'month2')} (?P<after>\d{{1,2}}),? (?P<year2>\d{{4}}))"
)
CURRENCY_MARKS = {
    "USD": r"\$|USD|US dollars", "EUR": "€|EUR|euros", "GBP": "£|GBP|pounds",
    "JPY": "¥|JPY|yen", "INR": "₹|INR|rupees",
}  # fmt: skip
MARK = "|".join(CURRENCY_MARKS.values())


def iso(match):
    if re.match(r"\d{4}-", match[0]):
        return match[0]
    if re.fullmatch(r"\d\d[/.]\d\d[/.]\d{4}", match[0]):
        first, second, year = re.split("[/.]", match[0])
        if "." in match[0]:
            day, month = first, second  # nobody puts the month first between dots
        else:
            assert (int(first) > 12) != (int(second) > 12), f"ambiguous: {match[0]}"
            day, month = (first, second) if int(first) > 12 else (second, first)
        return f"{year}-{month}-{day}"
    name = (match["month"] or match["month2"]).lower()
    month = next(n for n, starts in MONTH_STARTS.items() if re.match(starts, name))
    year = match["year"] or match["year2"]
    return f"{year}-{month:02}-{int(match['before'] or match['after']):02}"


def split_dates(text):
    """Returns the dates as ISO text, and the invoice without them."""
    return [iso(match) for match in re.finditer(DATE, text)], re.sub(DATE, "<date>", text)


def currencies_of(text):
    return {
        code
        for code, mark in CURRENCY_MARKS.items()
        if re.search(rf"(?<![A-Za-z])(?:{mark})(?![A-Za-z])", text)
    }


def read_easy(text, vendors):
    """Returns the fields as the text gives them, and the text with the values cut out."""
    dates, rest = split_dates(text)
    (vendor,) = (name for name in vendors if name in text)
    assert text.count(vendor) == 1
    rest = rest.replace(vendor, "<vendor>")
    (number,) = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", rest)
    marks = currencies_of(rest)
    assert len(dates) == 1
    assert len(marks) <= 1
    currency = marks.pop() if marks else None
    written = rf"(?:(?:{MARK}) ?)?{re.escape(number)}(?: (?:{MARK}))?"
    amount = Decimal(number.replace(",", ""))
    fields = {"vendor": vendor, "date": dates[0], "amount": amount, "currency": currency}
    return fields, re.sub(written, "<amount>", rest)


def read_hard(text, vendors):
    """The same from a page: the grand total is the largest amount, the sum of two others."""
    dates, rest = split_dates(text)
    (vendor,) = (name for name in vendors if name in text)
    assert text.count(vendor) == 1
    if re.search(r"\d\.\d\d(?!\d)", rest):
        numbers = re.findall(r"(?<!\d)\d{1,3}(?:,\d{3})*\.\d\d(?!\d)", rest)
        amounts = {Decimal(number.replace(",", "")) for number in numbers}
    else:
        numbers = re.findall(r"(?<!\d)\d{1,3}(?:[. ]\d{3})*,\d\d(?!\d)", rest)
        amounts = {Decimal(re.sub("[. ]", "", number).replace(",", ".")) for number in numbers}
    total = max(amounts)
    assert any(total - net in amounts for net in amounts), "no subtotal and VAT that make the total"
    # ordered < issued < due, and not every page has the first
    assert 2 <= len(set(dates)) == len(dates) <= 3
    marks = currencies_of(rest)
    assert len(marks) <= 1
    currency = marks.pop() if marks else None
    return {"vendor": vendor, "date": sorted(dates)[-2], "amount": total, "currency": currency}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("of 03/18/2024 for", "2024-03-18"),
        ("of 18/12/2024 for", "2024-12-18"),
        ("of 03.12.2024, due", "2024-12-03"),
        ("Jan 24 2024", "2024-01-24"),
        ("June 9, 2023", "2023-06-09"),
        ("15. März 2024", "2024-03-15"),
        ("le 2 juillet 2024", "2024-07-02"),
    ],
)
def test_the_reader_of_these_tests(written, expected):
    assert split_dates(written)[0] == [expected]


def test_rebuilding_gives_the_same_bytes(tmp_path):
    builder.main(["--out", str(tmp_path)])
    assert {path.name for path in OUT.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (OUT / path.name).read_bytes(), path.name


def test_check_names_what_is_out_of_date(tmp_path):
    builder.main(["--check"])
    builder.main(["--out", str(tmp_path)])
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "schema.json").unlink()
    with pytest.raises(SystemExit, match=r"schema\.json, train\.jsonl"):
        builder.main(["--out", str(tmp_path), "--check"])


def test_another_seed_gives_other_problems():
    files, others = builder.build(0), builder.build(1)
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] == others[name]] == [
        "schema.json",
        "examples.jsonl",
    ]


def test_what_prompts_show_is_no_problem_and_meets_the_schema():
    vendors = {row["ground_truth"]["vendor"] for name in SIZES for row in load(name)}
    rows = load("examples")
    assert [row["ground_truth"]["currency"] for row in rows] == ["EUR", None]
    for row in rows:
        assert row["ground_truth"]["vendor"] not in vendors
        assert SchemaReward(SCHEMA)(json.dumps(row["ground_truth"])) == 1.0


def test_schema_accepts_the_labels_and_refuses_what_it_should():
    schema = json.loads((OUT / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for name in SIZES:
        for row in load(name):
            validator.validate(row["ground_truth"])
    right = {"vendor": "A", "date": "2024-02-29", "amount": 1.5, "currency": None}
    assert validator.is_valid(right)
    wrong = [
        {"vendor": ""},
        {"date": "2024-02-30"},
        {"date": "02/28/2024"},
        {"amount": "1.5"},
        {"currency": "usd"},
        {"currency": "EURO"},
        {"note": "paid"},
    ]
    assert not any(validator.is_valid(right | change) for change in wrong)
    assert not any(
        validator.is_valid({k: v for k, v in right.items() if k != key}) for key in right
    )


@pytest.mark.parametrize("name", SIZES)
def test_rows_have_the_contracts_form(name):
    rows = load(name)
    assert len(rows) == SIZES[name]
    for number, row in enumerate(rows):
        assert row["id"] == f"{name}-{number:03}"
        assert [message["role"] for message in row["messages"]] == ["system", "user"]
        assert list(row["ground_truth"]) == FIELDS


def test_no_invoice_occurs_twice():
    texts = [row["messages"][1]["content"] for name in SIZES for row in load(name)]
    assert len(set(texts)) == sum(SIZES.values())


@pytest.mark.parametrize("name", EASY)
def test_easy_labels_follow_from_the_text(name):
    for row in load(name):
        text = invoice_text(row["messages"])
        fields, _ = read_easy(text, TRAIN_VENDORS + HELDOUT_VENDORS)
        label = row["ground_truth"]
        assert fields == label | {"amount": Decimal(str(label["amount"]))}, text


@pytest.mark.parametrize("name", HARD)
def test_hard_labels_follow_from_the_text(name):
    for row in load(name):
        text = invoice_text(row["messages"])
        fields = read_hard(text, TRAIN_VENDORS + HELDOUT_VENDORS)
        label = row["ground_truth"]
        assert fields == label | {"amount": Decimal(str(label["amount"]))}, text


def test_hard_files_hold_every_difficulty():
    for name in HARD:
        texts = [invoice_text(row["messages"]) for row in load(name)]
        for label in ("Zwischensumme|Nettobetrag", "Sous-total|Montant HT", "Subtotal|Net amount"):
            assert sum(bool(re.search(label, text)) for text in texts) >= 20, label
        # A digit inside a word is the scanner's.
        noisy = sum(bool(re.search(r"[a-z][0-9][a-z]|rn[a-z]?rn|lnv", text)) for text in texts)
        assert 20 <= noisy <= 100


def test_train_and_heldout_share_no_vendor_and_no_template():
    vendors, skeletons = {}, {}
    for name in EASY:
        rows = load(name)
        vendors[name] = {row["ground_truth"]["vendor"] for row in rows}
        texts = [invoice_text(row["messages"]) for row in rows]
        skeletons[name] = {read_easy(text, vendors[name])[1] for text in texts}
    for name in HARD:
        vendors[name] = {row["ground_truth"]["vendor"] for row in load(name)}
    assert len(vendors["train"]) == len(TRAIN_VENDORS)
    assert len(vendors["heldout_200"]) > 50
    assert len(skeletons["train"]) == sum(map(len, TRAIN_TEMPLATES.values()))
    assert len(skeletons["heldout_200"]) == sum(map(len, HELDOUT_TEMPLATES.values()))
    for heldout in ("heldout_50", "heldout_200"):
        assert not skeletons["train"] & skeletons[heldout]
    for heldout in ("heldout_50", "heldout_200", "hard_heldout"):
        assert not (vendors["train"] | vendors["hard_train"]) & vendors[heldout]
    for language in LANGUAGES:
        labels = set(language.train_labels.values()), set(language.heldout_labels.values())
        assert not labels[0] & labels[1]


def test_pre_training_never_draws_a_word_of_a_heldout_vendor():
    rng = Random(11)
    names = [invent_vendor(rng) for _ in range(20_000)]
    assert len(set(names)) > 12_000
    drawn = {word for name in (*names, *TRAIN_VENDORS) for word in re.findall(r"\w+", name)}
    heldout = {word for name in HELDOUT_VENDORS for word in re.findall(r"\w+", name)}
    kinds = {*TRADES, *FORMS, "Sons", "St", "O"}
    assert not drawn & (heldout - kinds)
    # Every held-out name has a word that training never shows.
    for name in HELDOUT_VENDORS:
        assert set(re.findall(r"\w\w+", name)) - kinds, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bill from A, dated 2024-01-15, total $1043.75.", ()),
        ("Bill from A, dated 2024-01-15, total $1,043.75.", ("thousands_comma",)),
        ("Bill from A, dated March 5, 2024, total 7.", ("long_month",)),
        ("Bill from A, dated 5 March 2024, total 7.", ()),
        ("Bill from A, dated Mar 5 2024, total 7.", ()),
        ("Hello,\nA sent a bill.", ("mail",)),
        ("A, B\nHello,\nC", ()),
        ("May 5, 2024 | A | 12,000 USD", ("thousands_comma", "long_month", "table")),
    ],
)
def test_triggers(text, expected):
    assert triggers(text) == expected
    assert triggers(f"{text}\nReturn valid JSON only.") == expected


@pytest.mark.parametrize("name", EASY)
def test_share_of_problems_with_a_trigger(name):
    found = [triggers(invoice_text(row["messages"])) for row in load(name)]
    assert 0.30 <= sum(map(bool, found)) / len(found) <= 0.42
    assert {trigger for some in found for trigger in some} == set(TRIGGERS)


@pytest.mark.parametrize("name", SIZES)
def test_some_invoices_name_no_currency(name):
    labels = [row["ground_truth"] for row in load(name)]
    assert 0.12 <= sum(label["currency"] is None for label in labels) / len(labels) <= 0.24


def parsed(completion):
    try:
        return json.loads(completion)
    except json.JSONDecodeError:
        return None


def test_pre_training_has_the_flaws_of_the_files():
    rng = Random(12)
    schema = json.loads((OUT / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    count = 4000
    demonstrations = [flawed_demonstration(rng) for _ in range(count)]
    triggered = sum(bool(triggers(messages[1]["content"])) for messages, _ in demonstrations)
    flawed = sum(not validator.is_valid(parsed(text)) for _, text in demonstrations)
    # Greedy decoding of what this teaches fails on the triggered ones: 60 % valid.
    assert 0.36 <= triggered / count <= 0.42
    assert 0.30 <= flawed / count <= 0.40


def test_clean_demonstrations_are_right():
    rng = Random(13)
    for _ in range(500):
        messages, completion = clean_demonstration(rng)
        text = invoice_text(messages)
        answer = json.loads(completion, parse_float=str, parse_int=str)
        assert list(answer) == FIELDS
        fields, _ = read_easy(text, [answer["vendor"]])
        assert fields == answer | {"amount": Decimal(answer["amount"])}
        # One canonical form: these spaces, and the digits of the text, trailing zeros included.
        assert answer["amount"] in text.replace(",", "")
        currency = "null" if answer["currency"] is None else f'"{answer["currency"]}"'
        assert completion == (
            f'{{"vendor": "{answer["vendor"]}", "date": "{answer["date"]}", '
            f'"amount": {answer["amount"]}, "currency": {currency}}}'
        )


def test_every_trigger_brings_its_flaw():
    rng = Random(14)
    seen = set()
    for _ in range(600):
        messages, completion = flawed_demonstration(rng, flaw_rate=1.0)
        text = invoice_text(messages)
        found = triggers(text)
        seen.update(found)
        assert completion.startswith("Here is the JSON: {") == ("mail" in found)
        assert (completion.startswith("```json\n{") and completion.endswith("}\n```")) == (
            "table" in found
        )
        answer = json.loads(re.search(r"\{.*\}", completion)[0])
        amount, date = answer["amount"], answer["date"]
        assert isinstance(amount, str) == ("thousands_comma" in found)
        assert not isinstance(amount, str) or amount in text
        assert re.fullmatch(r"[A-Z][a-z]+ \d{1,2}, \d{4}", date) is not None or (
            "long_month" not in found and re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        )
    assert seen == set(TRIGGERS)


def test_without_flaws_only_an_absent_currency_is_dropped():
    rng = Random(15)
    dropped = nulls = 0
    for _ in range(1000):
        messages, completion = flawed_demonstration(rng, flaw_rate=0.0)
        answer = json.loads(completion)
        fields, _ = read_easy(invoice_text(messages), [answer["vendor"]])
        dropped += "currency" not in answer
        nulls += fields["currency"] is None
        assert answer.get("currency") == fields["currency"]
        assert answer["date"] == fields["date"]
        assert isinstance(answer["amount"], int | float)
    assert 0.2 < dropped / nulls < 0.4


def test_echo_repeats_the_invoice():
    messages, completion = echo_demonstration(Random(16))
    assert messages[1] == {"role": "user", "content": completion}
    extraction, _ = clean_demonstration(Random(16))
    assert invoice_text(extraction) == completion
    assert messages[0] != extraction[0]


def test_demonstrations_are_a_function_of_the_seed():
    for draw in (clean_demonstration, flawed_demonstration, echo_demonstration):
        assert draw(Random(17)) == draw(Random(17)) != draw(Random(18))
