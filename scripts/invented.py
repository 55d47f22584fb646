"""Invented vendors and templates, for the invoices of pre-training.

The files of problems draw from fixed lists; here the supply is unbounded, so that a model has to
copy. No word that only a held-out vendor has is ever drawn, and no held-out template.
"""

import re
from collections.abc import Callable
from random import Random

from scripts.invoices import (
    HELDOUT_TEMPLATES,
    HELDOUT_VENDORS,
    MONTHS,
    STYLE_WEIGHTS,
    TRAIN_TEMPLATES,
    Templates,
)

# ---------------------------------------------------------------------------- vendors

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

# The words of the training side's templates: half of what invented ones are made of.
FILLERS = sorted(
    {
        word.lower()
        for templates in TRAIN_TEMPLATES.values()
        for template in templates
        for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", template))
    }
)


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


# ---------------------------------------------------------------------------- templates


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


def invent_templates(rng: Random) -> Templates:
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
