"""The reference pages of the documentation, made from the source whenever they are built.

`docs/conf.py` puts the text of `PAGES` where a page says `<!-- generated: NAME -->`.
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import jaxgrpo
from jaxgrpo.config import RANGES, Config
from jaxgrpo.config_file import to_toml

ROOT = Path(__file__).parents[1]
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_WIDTH = 88  # columns of a command's help


def configuration() -> str:
    """Every section and field with type, default, range and meaning."""
    lines = []
    hints = get_type_hints(Config, include_extras=True)
    for section in fields(Config):
        lines += [f"## {section.name}", ""]
        hint = hints[section.name]
        if is_dataclass(hint):
            lines += [inspect.getdoc(hint) or "", ""]
            lines += _entries(hint, f"{section.name}.")
        else:
            lines += _entry(section, hint, section.name, meanings(Config)[section.name])
    return "\n".join(lines)


def meanings(owner: type) -> dict[str, str]:
    """The text that stands below each field of a dataclass, on one line.

    >>> from jaxgrpo.config import LoraConfig
    >>> meanings(LoraConfig)["alpha"]
    'What an adapter adds is scaled by alpha / rank.'
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(said))),
            ):
                found[name] = " ".join(said.split())
    return found


def commands() -> str:
    """What each command of the package says to `--help`, and the first lines of its module."""
    lines = []
    for name in command_names():
        module = importlib.import_module(f"jaxgrpo.{name}")
        said = help_of(name)
        if "--run.steps" in said:  # it takes all of the configuration
            said = said[: said.index(" options\n")]
            said += "Options: those of the configuration, as --section.field value."
        title = (module.__doc__ or "").split("\n")[0]
        lines += [f"## jaxgrpo.{name}", "", _plain(title), "", "```text", said.rstrip(), "```", ""]
    return "\n".join(lines)


def command_names() -> list[str]:
    """The modules of the package that are commands."""
    folder = Path(jaxgrpo.__file__).parent
    return sorted(
        file.stem for file in folder.glob("*.py") if "run_main(main)\n" in file.read_text("utf-8")
    )


def help_of(command: str) -> str:
    """What `python -m jaxgrpo.COMMAND --help` prints, its long lines wrapped."""
    module = importlib.import_module(f"jaxgrpo.{command}")
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [command, "--help"]),
        mock.patch.dict(os.environ, COLUMNS=str(_WIDTH), NO_COLOR="1"),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    lines = said.getvalue().splitlines()
    return "\n".join(textwrap.fill(line.rstrip(), _WIDTH, break_on_hyphens=False) for line in lines)


def security() -> str:
    """SECURITY.md, which stands outside of `docs`, without its title."""
    _, _, text = (ROOT / "SECURITY.md").read_text("utf-8").partition("\n")
    return text.replace("](docs/", "](")


PAGES = {"configuration": configuration, "commands": commands, "security": security}


def _entries(owner: type, prefix: str) -> Iterator[str]:
    hints, said = get_type_hints(owner, include_extras=True), meanings(owner)
    for field in fields(owner):
        yield from _entry(field, hints[field.name], prefix + field.name, said[field.name])


def _entry(field: Field, hint: Any, name: str, meaning: str) -> list[str]:
    """A term and its definition."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    assert default is not MISSING
    must_be = [text for text, _, names in RANGES if name in names.split()]
    kind = ", ".join([kind_of(hint), *must_be])
    return [
        f"`{name}`",
        f": {_plain(kind)}; default `{_shown(default)}`",
        "",
        f"  {_plain(meaning)}",
        "",
    ]


def kind_of(hint: Any) -> str:
    """A field's type in words.

    >>> kind_of(tuple[Literal["q", "k"], ...])
    'list of `q`, `k`'
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return "path" if args[1] == "input path" else kind_of(args[0])
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        return f"list of {kind_of(args[0])}"
    if origin is dict:
        return "table of name = weight"
    return _NAMES[hint]


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        return "{ " + ", ".join(f"{k} = {to_toml(v)}" for k, v in default.items()) + " }"
    return to_toml(default)


def _plain(text: str) -> str:
    """Text whose asterisks are asterisks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)
