"""Random schemas over every keyword, values that are meant to meet them, and texts that spoil both.

Numbers are `Decimal`s here, so that a text has the digits that were drawn. Schemas and values share
a few keys, strings and numbers: what is drawn for one schema means something to the others.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from random import Random
from typing import Any

KEYS = ("a", "b", "c", "n_1", "x-1", "", "ü", "a/b~", "__proto__", "$ref")
_KEY_PATTERNS = ("^n_", "^x-", "^[a-c]$", "b", r"^\w$", ".")

_NUMBERS = [
    Decimal(text)
    for text in (
        *("0", "-0", "0.0", "-0.0", "1", "1.0", "1e0", "10e-1", "2", "3", "-1", "7", "100", "1e2"),
        *("0.1", "0.3", "0.30000000000000001", "0.1000000000000000055511151231257827", "1.1"),
        *("19.99", "19.990", "19.999", "0.01", "1043.75", "2.5", "4.5", "123456789012345678901.23"),
        *("9007199254740992", "9007199254740993", "9007199254740993.0", "18446744073709551616"),
        *("1e22", "1E300", "9" * 300, "1.7976931348623157e308", "5e-324", "1e-400", "-1e-999999"),
    )
]
_OUT_OF_RANGE = [Decimal(text) for text in ("1e400", "-1e309", "9" * 400, "1.8e308", "1e999999")]
_BOUNDS = [
    Decimal(text)
    for text in ("0", "1", "1.0", "-1", "0.3", "1.1", "100", "9007199254740993", "19.99", "1e300")
]
_STEPS = [Decimal(text) for text in ("0.01", "2", "3", "1.5", "0.1", "1e-8", "300", "1", "1e20")]
_TINY = Decimal("1e-20")

# Patterns, and strings that match them.
_PATTERNS: Mapping[str, Sequence[str]] = {
    "^[A-Z]{3}$": ("USD", "EUR"),
    r"^\d+$": ("12", "0"),
    r"^\w+$": ("a_1", "Z"),
    r"^\W$": ("-", "é"),
    "a+": ("xaay", "a"),
    "^.$": ("é", "😀", "\u2027"),
    r"a\sb": ("a b", "a\nb"),
    r"^\S*$": ("ab", ""),
    "^(?!x)": ("a", ""),
    r"^(a|b)\1$": ("aa", "bb"),
    "^[^a]{2,}$": ("bc", "b\nc"),
    "^$|^-$": ("", "-"),
    r"\bb": ("a b", "b"),
    r"^[$]\$$": ("$$",),
    r"^\u00fc{1,2}$": ("ü", "üü"),
    r"^[\s\d]*$": ("1 2", "\t"),
}
_FORMATS: Mapping[str, Sequence[str]] = {
    "date": ("2024-02-29", "0001-01-01", "2024-12-31"),
    "date-time": ("2024-01-15T10:00:00Z", "2024-01-15t10:00:00.5+01:00"),
    "time": ("10:00:00Z", "10:00:00.25-08:00", "23:59:59z"),
    "duration": ("P1DT2H", "P3W", "PT36H", "P1Y2M3DT4H5M6S"),
    "email": ("a@example.com", "a.b+c@d.ef"),
    "idn-email": ("ü@example.com", "a@bücher.de"),
    "hostname": ("example.com", "xn--bcher-kva.de", "a-b.c", "localhost"),
    "idn-hostname": ("bücher.de", "例え.jp"),
    "ipv4": ("192.168.0.1", "0.0.0.0"),
    "ipv6": ("::1", "2001:db8::ff00:42:8329", "::ffff:1.2.3.4"),
    "uri": ("https://example.com/a?b#c", "urn:a:b", "http://[::1]:80/%20"),
    "uri-reference": ("/a", "#b", "../a?b", ""),
    "uri-template": ("https://example.com/{a}", "/{+a}/{b*}{?c,d:3}", "a"),
    "iri": ("https://bücher.de/ü", "urn:ü:b"),
    "iri-reference": ("/ü", "#b"),
    "uuid": ("2eb8aa08-aa98-11ea-b4aa-73b441d16380", "2EB8AA08-AA98-11EA-B4AA-73B441D16380"),
    "json-pointer": ("/a/0", "", "/a~0b~1"),
    "relative-json-pointer": ("1/a", "0#", "0"),
    "regex": ("a+", r"^\d{2}$", "(?:a|b)*", "[^a-c]", r"\bb\B"),
}
_WORDS = (
    *("", "a", "ab", "abc", "A", "é", "e\u0301", "😀", "😀😀", "ß", "12", "١٢", "a\n", "\n", "\r"),
    *("\u2028", "\u00a0", "\ufeff", "\0", "\x7f", "\x1f", "\t", "\\", '"', "/", "null", "1", "<a>"),
    *("</think>", "```", "\U0010ffff", "k" * 70),
)
_STRINGS = (*_WORDS, *(s for group in (*_PATTERNS.values(), *_FORMATS.values()) for s in group))
_CHARACTERS = "ab019-:.@/#~{}[]()%+TZz \n\r\t\0é\u0661\u00b2\u00a0\u2028\ufeff😀xPüA_,\\*?"


# ---- schemas

_KINDS = ("number", "string", "array", "object")
_TYPES = ("null", "boolean", "integer", *_KINDS)
# What may stand where the value is the same; where it is another one, any will do.
_ALL_REFS = ("#", "#/$defs/d0", "#/$defs/d1", "#d2")

Draw = Callable[[Random, int, Sequence[str]], dict[str, Any]]


def schema_over(rng: Random, keyword: str) -> dict[str, Any]:
    """A schema with that keyword of `KEYWORDS` in it, and with others."""
    refs = _ALL_REFS[1:]
    drawn = _schema(rng, 2, refs, keyword)
    # A definition refers to later ones alone where the value is the same: no circles.
    drawn["$defs"] = {f"d{i}": _schema(rng, 1, refs[i + 1 :]) for i in range(3)}
    drawn["$defs"]["d2"]["$anchor"] = "d2"
    return drawn


def _schema(
    rng: Random, depth: int, refs: Sequence[str], keyword: str | None = None, kind: str = ""
) -> dict[str, Any]:
    kind = (keyword and _KIND_OF.get(keyword)) or kind or rng.choice(_KINDS)
    drawn: dict[str, Any] = {"type": kind} if rng.random() < 0.5 else {}
    if kind == "number" and drawn and rng.random() < 0.5:
        drawn = {"type": "integer"}
    own = [name for name in _OF_KIND[kind] if depth or name in _LEAVES]
    general = [name for name in _GENERAL if depth or name in _LEAVES]
    names = [rng.choice(own if rng.random() < 0.75 else general) for _ in range(rng.randint(0, 3))]
    if not depth:
        names = names[:1]
    for name in [*names, *([keyword] if keyword else [])]:
        drawn |= _DRAWS[name](rng, depth - 1, refs)
    items = list(drawn.items())
    rng.shuffle(items)  # reasons follow the order
    return dict(items)


def _part(rng: Random, depth: int, refs: Sequence[str], kind: str = "") -> Any:
    if rng.random() < 0.08:
        return rng.random() < 0.7
    return _schema(rng, max(0, depth), refs, kind=kind)


def _inner(rng: Random, depth: int) -> Any:
    """The schema of a value inside the value: circles are fine."""
    if rng.random() < 0.1:
        return {"$ref": rng.choice(_ALL_REFS)}
    return _part(rng, depth, _ALL_REFS[1:])


def _keys(rng: Random, most: int = 3) -> list[str]:
    return rng.sample(KEYS[: 3 if rng.random() < 0.6 else None], rng.randint(1, most))


def _size(rng: Random) -> Decimal:
    return Decimal(rng.choice(["0", "1", "1", "2", "2", "3", "2.0"]))


def _parts(rng: Random, depth: int, refs: Sequence[str]) -> list[Any]:
    kind = rng.choice(_KINDS)
    return [_part(rng, depth, refs, kind) for _ in range(rng.randint(1, 3))]


def _draw_contains(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    drawn = {"contains": _inner(rng, 0)}
    if rng.random() < 0.5:
        drawn["minContains"] = _size(rng)
    if rng.random() < 0.5:
        drawn["maxContains"] = _size(rng)
    return drawn


def _draw_if(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    kind = rng.choice(_KINDS)
    return {
        name: _part(rng, depth, refs, kind)
        for name in ("if", "then", "else")
        if name == "if" or rng.random() < 0.8
    }


def _draw_properties(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    return {"properties": {key: _inner(rng, depth) for key in _keys(rng)}}


_THAT_EVALUATE = ("properties", "patternProperties", "dependentSchemas", "additionalProperties")


def _draw_unevaluated_properties(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    draws = [_OF_KIND["object"][name] for name in _THAT_EVALUATE]
    others = [rng.choice(draws)(rng, 0, refs) for _ in range(2)]
    name = rng.choice(["allOf", "anyOf", "oneOf"])
    return {name: others, "unevaluatedProperties": rng.choice([False, _inner(rng, 0)])}


def _draw_unevaluated_items(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    others = [rng.choice([_draw_prefix_items, _draw_contains])(rng, 0, refs) for _ in range(2)]
    name = rng.choice(["allOf", "anyOf", "oneOf"])
    return {name: others, "unevaluatedItems": rng.choice([False, _inner(rng, 0)])}


def _draw_prefix_items(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    return {"prefixItems": [_inner(rng, depth) for _ in range(rng.randint(1, 3))]}


def _draw_ref(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    return {rng.choice(["$ref", "$ref", "$dynamicRef"]): rng.choice(refs)} if refs else {}


def _draw_enum(rng: Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    return {"enum": [anything(rng, 1) for _ in range(rng.randint(1, 4))]}


_OF_KIND: Mapping[str, Mapping[str, Draw]] = {
    "number": {
        "minimum": lambda rng, *_: {"minimum": rng.choice(_BOUNDS)},
        "maximum": lambda rng, *_: {"maximum": rng.choice(_BOUNDS)},
        "exclusiveMinimum": lambda rng, *_: {"exclusiveMinimum": rng.choice(_BOUNDS)},
        "exclusiveMaximum": lambda rng, *_: {"exclusiveMaximum": rng.choice(_BOUNDS)},
        "multipleOf": lambda rng, *_: {"multipleOf": rng.choice(_STEPS)},
    },
    "string": {
        "minLength": lambda rng, *_: {"minLength": _size(rng)},
        "maxLength": lambda rng, *_: {"maxLength": _size(rng)},
        "pattern": lambda rng, *_: {"pattern": rng.choice([*_PATTERNS])},
        "format": lambda rng, *_: {"format": rng.choice([*_FORMATS, "iban"])},
    },
    "array": {
        "minItems": lambda rng, *_: {"minItems": _size(rng)},
        "maxItems": lambda rng, *_: {"maxItems": _size(rng)},
        "uniqueItems": lambda rng, *_: {"uniqueItems": rng.random() < 0.8},
        "items": lambda rng, depth, _: {"items": _inner(rng, depth)},
        "prefixItems": _draw_prefix_items,
        "contains": _draw_contains,
        "unevaluatedItems": _draw_unevaluated_items,
    },
    "object": {
        "properties": _draw_properties,
        "required": lambda rng, *_: {"required": _keys(rng, 2)},
        "additionalProperties": lambda rng, depth, _: {
            "additionalProperties": rng.choice([False, _inner(rng, depth)])
        },
        "patternProperties": lambda rng, depth, _: {
            "patternProperties": {
                pattern: _inner(rng, depth) for pattern in rng.sample(_KEY_PATTERNS, 2)
            }
        },
        "propertyNames": lambda rng, _, refs: {"propertyNames": _part(rng, 0, refs, "string")},
        "minProperties": lambda rng, *_: {"minProperties": _size(rng)},
        "maxProperties": lambda rng, *_: {"maxProperties": _size(rng)},
        "dependentRequired": lambda rng, *_: {
            "dependentRequired": {key: _keys(rng, 2) for key in _keys(rng, 2)}
        },
        "dependentSchemas": lambda rng, depth, refs: {
            "dependentSchemas": {key: _part(rng, depth, refs, "object") for key in _keys(rng, 2)}
        },
        "unevaluatedProperties": _draw_unevaluated_properties,
    },
}
_GENERAL: Mapping[str, Draw] = {
    "type": lambda rng, *_: {"type": rng.sample(_TYPES, rng.randint(1, 3))},
    "enum": _draw_enum,
    "const": lambda rng, *_: {"const": anything(rng, 1)},
    "allOf": lambda rng, depth, refs: {"allOf": _parts(rng, depth, refs)},
    "anyOf": lambda rng, depth, refs: {"anyOf": _parts(rng, depth, refs)},
    "oneOf": lambda rng, depth, refs: {"oneOf": _parts(rng, depth, refs)},
    "not": lambda rng, depth, refs: {"not": _part(rng, depth, refs)},
    "if": _draw_if,
    "$ref": _draw_ref,
}


def _one_format(name: str) -> Draw:
    return lambda *_: {"format": name}


_DRAWS: dict[str, Draw] = {
    **_GENERAL,
    **{keyword: draw for keywords in _OF_KIND.values() for keyword, draw in keywords.items()},
    **{f"format:{name}": _one_format(name) for name in _FORMATS},
}
KEYWORDS = tuple(_DRAWS)
_KIND_OF = {keyword: kind for kind, keywords in _OF_KIND.items() for keyword in keywords}
_KIND_OF |= {name: "string" for name in _DRAWS if name.startswith("format:")}
_LEAVES = {"type", "enum", "const", "$ref", *_OF_KIND["number"], *_OF_KIND["string"]} | {
    *("minItems", "maxItems", "uniqueItems", "required", "minProperties", "maxProperties"),
    "dependentRequired",
}


# ---- values


def anything(rng: Random, depth: int = 3) -> Any:
    """Any JSON value."""
    draw = rng.random()
    if depth and draw < 0.2:
        return [anything(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if depth and draw < 0.4:
        return {key: anything(rng, depth - 1) for key in _keys(rng, 3)[rng.randint(0, 1) :]}
    if draw < 0.7:
        return rng.choice(_NUMBERS)
    return rng.choice([None, True, False, rng.choice(_STRINGS), rng.choice(_STRINGS)])


def meant_for(rng: Random, root: Any, schema: Any, depth: int = 6) -> Any:
    """A value that a schema seems to ask for; often it meets it."""
    schema = _merged(rng, root, schema)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match _type(rng, schema):
        case "null":
            return None
        case "boolean":
            return rng.random() < 0.5
        case "number" | "integer":
            return _number(rng, schema)
        case "string":
            return _string(rng, schema)
        case "array":
            return _array(rng, root, schema, depth)
    return _object(rng, root, schema, depth)


def _merged(rng: Random, root: Any, schema: Any, depth: int = 8) -> dict[str, Any]:
    """The keywords that a value has to meet together, as far as that is easily said."""
    if isinstance(schema, bool) or not depth:
        return {}
    parts = [*schema.get("allOf", ())]
    for name in ("anyOf", "oneOf"):
        parts += [rng.choice(schema[name])] if name in schema else []
    branch = rng.choice([("then", "if"), ("else",)])
    parts += [schema[name] for name in branch if "if" in schema and name in schema]
    if "dependentSchemas" in schema:
        parts += rng.sample([*schema["dependentSchemas"].values()], 1)
    for name in ("$ref", "$dynamicRef"):
        if name in schema:
            parts.append(root if schema[name] == "#" else root["$defs"][schema[name][-2:]])
    merged: dict[str, Any] = dict(schema)
    for part in parts:
        for keyword, argument in _merged(rng, root, part, depth - 1).items():
            if keyword in ("properties", "patternProperties"):
                argument = {**argument, **merged.get(keyword, {})}
            elif keyword == "required":
                argument = [*merged.get(keyword, ()), *argument]
            merged[keyword] = argument
    return merged


def _type(rng: Random, schema: Mapping[str, Any]) -> str:
    if "type" in schema:
        types = schema["type"]
        return types if isinstance(types, str) else rng.choice(types)
    kinds = [_KIND_OF[keyword] for keyword in schema if keyword in _KIND_OF]
    return rng.choice(kinds) if kinds and rng.random() < 0.9 else rng.choice(_TYPES)


def _number(rng: Random, schema: Mapping[str, Any]) -> Decimal:
    bounds = [schema[name] for name in schema if name.endswith("imum")]
    number = rng.choice([*bounds, *bounds, rng.choice(_NUMBERS)])
    if bounds and rng.random() < 0.5:
        number += rng.choice([-1, 1, -_TINY, _TINY])
    if "multipleOf" in schema and rng.random() < 0.8:
        number = schema["multipleOf"] * rng.choice([0, 1, -3, 1999, 10**20 + 1])
    return number.to_integral_value() if schema.get("type") == "integer" else number


def _string(rng: Random, schema: Mapping[str, Any]) -> str:
    choices = [*_PATTERNS.get(schema.get("pattern", ""), ())]
    choices += _FORMATS.get(schema.get("format", ""), ())
    text = rng.choice(choices or _STRINGS)
    if not choices:
        text += "é" * max(0, int(schema.get("minLength", 0)) - len(text))
        text = text[: int(schema.get("maxLength", len(text)))]
    return text


def _array(rng: Random, root: Any, schema: Mapping[str, Any], depth: int) -> list[Any]:
    if not depth:
        return []
    least = int(schema.get("minItems", 0))
    number = rng.randint(least, max(least, int(schema.get("maxItems", least + 2))))
    prefix = schema.get("prefixItems", ())
    rest = [schema.get("items", {})]
    rest += [schema[name] for name in ("contains", "unevaluatedItems") if schema.get(name)]
    parts = [prefix[i] if i < len(prefix) else rng.choice(rest) for i in range(number)]
    return [meant_for(rng, root, part, depth - 1) for part in parts]


def _object(rng: Random, root: Any, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    keys = {*schema.get("required", ())} | {key for key in properties if rng.random() < 0.7}
    if schema.get("additionalProperties", True) and rng.random() < 0.4:
        keys.add(rng.choice(KEYS))
    while len(keys) < min(schema.get("minProperties", 0), len(KEYS)):
        keys.add(rng.choice(KEYS))
    for key in [*keys]:
        keys |= {*schema.get("dependentRequired", {}).get(key, ())}
    if not depth:
        return {}
    other = schema.get("additionalProperties", schema.get("unevaluatedProperties", {}))
    return {
        key: meant_for(rng, root, properties.get(key, other), depth - 1) for key in sorted(keys)
    }


def near_miss(rng: Random, value: Any) -> Any:
    """The value with one thing changed somewhere in it."""
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        change = rng.random()
        if change < 0.5:
            return [*value[:place], near_miss(rng, value[place]), *value[place + 1 :]]
        again = [value[place]] if change < 0.75 else []
        return [*value[:place], *again, *value[place + 1 :], *again]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        change = rng.random()
        if change < 0.5:
            return {**value, key: near_miss(rng, value[key])}
        if change < 0.75:
            return {name: value[name] for name in value if name != key}
        return {**value, rng.choice(KEYS): anything(rng, 1)}
    if isinstance(value, Decimal) and rng.random() < 0.6:
        return rng.choice(
            [-value, str(value), rng.choice(_OUT_OF_RANGE), value + rng.choice([Decimal(1), _TINY])]
        )
    if isinstance(value, str) and rng.random() < 0.8:
        place = rng.randint(0, len(value))
        character = rng.choice([*_CHARACTERS, "", ""])
        return value[:place] + character + value[place + rng.randint(0, 1) :]
    return rng.choice([anything(rng, 2), [value], {"a": value}, str(value), None])


# ---- texts


def completion(rng: Random, value: Any) -> str:
    """The value as a model may write it: well, with another layout, or badly."""
    text = written(rng, value)
    if rng.random() < 0.25:
        text = rng.choice(_SPOILERS)(rng, text)
    if rng.random() < 0.1:
        text = rng.choice(["<think>\n\n</think>\n\n", "<think>[1] {</think>", "</think>"]) + text
    return text


def written(rng: Random, value: Any) -> str:
    """JSON with random white space and escapes."""
    spaces = rng.choice([("",), ("", " "), ("", "\n", "\t ", "\r\n")])
    return as_json(value, lambda: rng.choice(spaces), ascii_only=rng.random() < 0.5)


def as_json(value: Any, gap: Callable[[], str] = str, ascii_only: bool = True) -> str:
    """JSON with the digits that a `Decimal` has, and what `gap` gives between the tokens."""

    def write(part: Any) -> str:
        if isinstance(part, Decimal):
            return str(part)
        if isinstance(part, list):
            return "[" + ",".join(gap() + write(item) + gap() for item in part) + gap() + "]"
        if isinstance(part, dict):
            pairs = (f"{gap()}{write(k)}{gap()}:{gap()}{write(part[k])}{gap()}" for k in part)
            return "{" + ",".join(pairs) + gap() + "}"
        return json.dumps(part, ensure_ascii=ascii_only)

    return gap() + write(value) + gap()


def _insert(rng: Random, text: str, parts: Sequence[str]) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(parts) + text[place:]


def _again(rng: Random, text: str) -> str:
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    return text[:end] + text[start:]


def _nested(rng: Random, text: str) -> str:
    depth = rng.choice([1, 5, 127, 128, 129, 2000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + text + closing * (depth - (rng.random() < 0.1))


_MARKS = (
    *("\ufeff", "\0", "\ud800", "\udfff", r"\ud800", r"\udc00", r"\ud83d\ude00", "\\", '"', ","),
    *(":", "{", "}", "[", "]", "NaN", "-Infinity", "1e400", "e", ".", "-", "+", "0", "//", "/**/"),
    *("'", "\u00a0", "\u2028", "\x0b", "\x1f", "true", "None", "```", "<think>", "</think>", "\n"),
    *(",,", '"a":1,', '"a":1,"a":2', r'"\u0061":1,', r"\u00", "\U0010ffff", "1_0", "0x1", "٣"),
)
_SPOILERS: Sequence[Callable[[Random, str], str]] = (
    lambda rng, text: _insert(rng, text, _MARKS),
    lambda rng, text: _insert(rng, text, _MARKS),
    lambda rng, text: text[: rng.randint(0, len(text))],
    lambda rng, text: text[rng.randint(0, len(text)) :],
    lambda rng, text: f"```json\n{text}\n```",
    lambda rng, text: rng.choice(["Sure: {}", "{} Done.", "\ufeff{}", "{}\0", "{}{}"]).replace(
        "{}", text
    ),
    lambda rng, text: text.replace('"', "'"),
    lambda rng, text: text.replace("}", ",}").replace("]", ",]"),
    lambda rng, text: text.replace("true", "True").replace("null", "None"),
    lambda rng, text: "".join(rng.sample(text, len(text))),
    lambda rng, text: text.replace("{", '{"a":1,', 1),
    _again,
    _nested,
)
