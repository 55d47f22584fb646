"""A configuration from TOML and the command line, and back to TOML.

Paths of inputs (`InputPath`, `RewardName`) that a TOML file names are relative to that file, those
on the command line to where the command is run; either way they become absolute here.
"""

import dataclasses
import difflib
import json
import os
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxgrpo.cli import parse
from jaxgrpo.config import DEFAULT, Config, InputPath, RewardName
from jaxgrpo.files import replace_file
from jaxgrpo.redact import redacted

# How TOML gives each type of field, and what to call it.
_TOML: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an int"),
    float: (float, "a number"),
    str: (str, "a string"),
    tuple: (list, "a list of strings"),
    dict: (dict, "a table"),
}


def load_config(path: Path) -> Config:
    """Reads a TOML file; what it does not say keeps its default, and `run.dir` is named after it.

    Raises:
      ValueError: `FILE:LINE: what is wrong; what to do`, for a file that is not there or is not
        TOML, an unknown section or key, or a value of another type than the field's.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a TOML file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: no UTF-8 text; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        at = re.search(r"line (\d+)", where)  # else it says "end of document"
        line = int(at[1]) if at else text.rstrip().count("\n") + 1
        raise ValueError(
            f"{path}:{line}: {what}; strings, and keys with other than letters, digits, - and _,"
            " stand in double quotes"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}: {error}") from error

    def fail(keys: tuple[str, ...], message: str) -> NoReturn:
        raise ValueError(f"{path}:{_line(text, keys)}: {'.'.join(keys)} {message}")

    config = _absolute(_typed(tree, Config, (), fail), Config, path.parent.resolve())
    if "dir" not in tree.get("run", {}):
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, dir=f"runs/{path.stem}")
        )
    return config


def parse_args(
    argv: Sequence[str], command: str = "train", does: str = "Trains a model with GRPO"
) -> Config:
    """Reads `[CONFIG.toml] [--section.field value ...]`; the options override the file.

    `--help` ends in `SystemExit`, and says what the `command` of this package `does`.

    Raises:
      ValueError: an unknown option, a value of the wrong type, or a file as in `load_config`.
    """
    file, options = DEFAULT, list(argv)
    if options and not options[0].startswith("-"):
        file = Path(options.pop(0))
    config, unknown = parse(
        Config,
        prog=f"python -m jaxgrpo.{command} [CONFIG.toml]",
        description=f"{does} as CONFIG.toml says, by default the embedded example"
        " invoice_tiny.toml, with any field of it overridden by an option.",
        args=options,
        default=load_config(file),
        registry=registry_of_weights(),
        return_unknown_args=True,
    )
    if unknown:
        option = unknown[0].partition("=")[0]
        if not option.startswith("--"):
            raise ValueError(
                f"unexpected argument {option!r}; CONFIG.toml comes first, then"
                " --section.field value, where a flag takes no value"
            )
        nearest = _nearest(option[2:].replace("-", "_"), _fields())
        raise ValueError(f"unknown option {option}; the nearest known one is --{nearest}")
    return _absolute(config, Config, Path.cwd())


def save_config(config: Config, path: Path) -> None:
    """Writes every field, so that `load_config` returns the same configuration, but for secrets.

    Raises:
      ValueError: a string is no Unicode text, as a file name of other bytes than UTF-8.
      OSError: it cannot be written; what was there stays.
    """
    lines = []
    for section, table in redacted(dataclasses.asdict(config)).items():
        lines.append(f"[{section}]")
        lines += [f"{_toml_key(key)} = {to_toml(value)}" for key, value in table.items()]
        lines.append("")
    text = "\n".join(lines)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        line = lines[text.count("\n", 0, error.start)]
        raise ValueError(f"{path}: cannot hold {line!a}; rename that file in UTF-8") from error
    replace_file(path, data)


def _typed(
    value: Any, hint: Any, keys: tuple[str, ...], fail: Callable[[tuple[str, ...], str], NoReturn]
) -> Any:
    """What TOML holds under `keys` as the type of its field; only int to float is converted."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return _typed(value, args[0], keys, fail)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            fail(keys, f"must be a number that a float can hold, not {reprlib.repr(value)}")
    is_section = dataclasses.is_dataclass(kind)
    if kind is Literal:
        fits, expected = value in args, "one of " + ", ".join(map(repr, args))
    else:
        toml_kind, expected = (dict, "a table") if is_section else _TOML[kind]
        fits = type(value) is toml_kind  # a bool is no int here
    if not fits:
        fail(keys, f"is {reprlib.repr(value)}; it must be {expected}")
    if kind is tuple:
        return tuple(_typed(item, args[0], keys, fail) for item in value)
    if kind is dict:
        return {key: _typed(item, args[1], (*keys, key), fail) for key, item in value.items()}
    if not is_section:
        return value

    hints = get_type_hints(kind, include_extras=True)
    for key, item in value.items():
        if key not in hints:
            known = hints if isinstance(item, dict) else _fields()
            nearest = _nearest(".".join((*keys, key)), known)
            fail((*keys, key), f"is unknown; the nearest known one is {nearest}")
    return kind(
        **{key: _typed(item, hints[key], (*keys, key), fail) for key, item in value.items()}
    )


def _absolute(value: Any, hint: Any, folder: Path) -> Any:
    """The same with every input path absolute; a relative one starts in `folder`."""
    if hint == InputPath:
        return os.path.normpath(folder / os.path.expanduser(value)) if value else ""
    if hint == RewardName:
        file, _, attribute = value.rpartition(":")
        is_file = file.endswith(".py")
        return f"{_absolute(file, InputPath, folder)}:{attribute}" if is_file else value
    if isinstance(value, tuple):
        return tuple(_absolute(item, get_args(hint)[0], folder) for item in value)
    if isinstance(value, dict):
        return {_absolute(key, get_args(hint)[0], folder): item for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(hint, include_extras=True)
        return hint(
            **{name: _absolute(getattr(value, name), hints[name], folder) for name in hints}
        )
    return value


def _line(text: str, keys: tuple[str, ...]) -> int:
    """The line on which TOML's statement of `keys` begins.

    A file cut after any of its statements is TOML too, so the statement stands behind the longest
    such part that does not hold the keys yet.
    """
    lines = text.split("\n")
    begin = 1
    for end in range(1, len(lines) + 1):
        try:
            tree: Any = tomllib.loads("\n".join(lines[:end]))
            for key in keys:
                tree = tree[key]
            return begin
        except tomllib.TOMLDecodeError:
            continue  # within a statement of several lines
        except KeyError:
            begin = end + 1
    raise AssertionError(f"{keys} are not in the text")


def _fields() -> list[str]:
    """Every `section.field`, and `rewards`."""
    names = []
    for section, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            names += [f"{section}.{field.name}" for field in dataclasses.fields(hint)]
        else:
            names.append(section)
    return names


def _nearest(name: str, known: Iterable[str]) -> str:
    """The field of that name in another section, else the name most alike."""
    field = name.rpartition(".")[2]
    elsewhere = [other for other in known if other.rpartition(".")[2] == field]
    return difflib.get_close_matches(name, elsewhere or known, n=1, cutoff=0.0)[0]


def registry_of_weights() -> ConstructorRegistry:
    """How a command reads `--rewards NAME WEIGHT ...`."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_weights_on_command_line)
    return registry


def _weights_on_command_line(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Reads `--rewards` as a whole new table; tyro by itself offers only the names of the old."""
    if info.type_origin is not dict:
        return None

    def parse(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError(f"{words[-1]!r} has no weight")
        return dict(zip(words[::2], map(float, words[1::2]), strict=True))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME WEIGHT [NAME WEIGHT ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else to_toml(key)


def to_toml(value: Any) -> str:
    """A number, text or list as TOML."""
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's own words
    # JSON's true, integers, lists and strings are TOML, once what does not show itself is escaped.
    return re.sub(r"[^ -~]", _toml_escape, json.dumps(value, ensure_ascii=False))


def _toml_escape(char: re.Match[str]) -> str:
    # Half a surrogate pair stays: TOML has no escape for it, and UTF-8 refuses it.
    code = ord(char[0])
    if char[0].isprintable() or 0xD800 <= code <= 0xDFFF:
        return char[0]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
