"""Documentation that cannot promise what is not there.

Examples in docstrings run, links lead somewhere, options that a page names exist, and the pages for
newcomers hold nothing that is not tried (`.ci/run` tries it).
"""

import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import jaxgrpo
from jaxgrpo.config import Config
from jaxgrpo.config_file import load_config
from scripts import newcomer, reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NEWCOMERS = [ROOT / "docs" / "quickstart.md", ROOT / "docs" / "own-task.md"]


def each_page(pages):
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


# ----------------------------------------------------------------------- examples in docstrings

MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxgrpo.__path__, "jaxgrpo.")
    if ">>> " in importlib.util.find_spec(module.name).loader.get_source(module.name)
]


@pytest.mark.parametrize("name", [*MODULES, "scripts.reference"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_are_found():
    assert {"jaxgrpo.grpo", "jaxgrpo.rewards.json_schema", "jaxgrpo.evaluate"} <= set(MODULES)


# ------------------------------------------------------------------------------------------ links


def outside_code(text):
    """A page without its blocks and pieces of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """What GitHub calls a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(page, text):
    """Targets of a page's links that are no file and no heading."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(text)):
        if re.match(r"[a-z]+:", target):  # elsewhere
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        there = path.exists() and path.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            found.append(target)
    return found


@each_page(PAGES)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text("utf-8")) == []


def test_links_that_lead_nowhere_are_found():
    assert anchors("# A title, `here`\n```\n# no title\n```\n") == {"a-title-here"}
    page = ROOT / "docs" / "faq.md"
    links = "[`b`](nothing.md) [c](faq.md#nothing) [e](rewards.md#where-rewards-run) [f](../../x)"
    assert broken(page, f"{links} `[d](code.md)` [g](http://x.y/z) [h](#out-of-memory)") == [
        "nothing.md",
        "faq.md#nothing",
        "../../x",
    ]


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = set("\n".join(re.findall(r"^```\{toctree\}(.*?)^```", index, re.M | re.S)).split())
    assert {page.stem for page in PAGES[2:]} - {"index"} <= listed


# ---------------------------------------------------------------------------------------- options

SECTIONS = {
    section.name: {field.name for field in dataclasses.fields(section.default_factory)}
    for section in dataclasses.fields(Config)
    if section.name != "rewards"
}
ENDINGS = {"jsonl", "json", "toml", "py", "md", "safetensors"}  # `eval.jsonl` is a file


def unknown_options(text):
    """What a page names as a setting, section, command or option, and what is none."""
    return [*unknown_settings(text), *unknown_keys(text), *unknown_command_options(text)]


def unknown_settings(text):
    """As `--section.field`, and as `section.field` by itself in a piece of code."""
    named = re.findall(r"--([a-z]+)\.([a-z0-9_-]+)", text)
    named = [(section, field.replace("-", "_")) for section, field in named]
    inline = re.findall(r"`([a-z]+)\.([a-z0-9_]+)(?:`| = )", text)
    named += [(s, field) for s, field in inline if s in SECTIONS and field not in ENDINGS]
    for section, field in named:
        known = SECTIONS.get(section, {"field"} if section == "section" else set())
        if field.removeprefix("no_") not in known:
            yield f"{section}.{field}"


def unknown_keys(text):
    """As TOML."""
    for block in blocks(text):
        section = ""
        for line in block.splitlines():
            header = re.fullmatch(r"\s*\[([a-z]+)\]\s*(?:#.*)?", line)
            key = re.match(r"\s*([a-z0-9_]+) = ", line)
            if header:
                section = header[1]
                if section not in {*SECTIONS, "rewards"}:
                    yield f"[{section}]"
            elif key and section in SECTIONS and key[1] not in SECTIONS[section]:
                yield f"[{section}] {key[1]}"


def blocks(text):
    """Fenced and indented code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    return fenced + re.findall(r"(?:^(?: {4,}.*)?\n)+", text, re.M)


def unknown_command_options(text):
    """As `python -m jaxgrpo.COMMAND --option`; the settings are looked at above."""
    for command, rest in re.findall(r"-m jaxgrpo\.(\w+)((?:\\\n|[^\n`])*)", text):
        if command in reference.command_names():
            options = re.findall(r"(?<=[ \[])--[a-z-]+(?![a-z.-])", rest.split("#")[0])
            yield from (f"{command} {option}" for option in options if option not in known(command))
        elif command != "NAME":  # stands for any of them
            yield f"jaxgrpo.{command}"


@cache
def known(command):
    """Options, as its help names them."""
    return {"--help", *re.findall(r"--[a-z-]+(?![a-z.-])", reference.help_of(command))}


@each_page(PAGES)
def test_options_that_a_page_names_exist(page):
    assert unknown_options(page.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`--run.step 3` and `--mesh.sample-rules tp`", ["run.step"]),
        ("    python -m jaxgrpo.train --trainer.lr 3", ["trainer.lr"]),
        ("`update.learning_rate`, `update.lr = 3` and `eval.jsonl`", ["update.learning_rate"]),
        ("text\n\n    [grpo]\n    beta = 0.1\n    kl = 'k3'\n", ["[grpo] beta"]),
        (
            "```toml\n[optimizer]\nlr = 1\n[update]\nlr = 1\nrate = 2\n```",
            ["[optimizer]", "[update] rate"],
        ),
        ("python -m jaxgrpo.export RUN OUT --steps 3 --step 3", ["export --steps"]),
        ("python -m jaxgrpo.evaluate --model M \\\n    --sample 3", ["evaluate --sample"]),
        ("python -m jaxgrpo.trian --run.fresh --run.no-fresh", ["jaxgrpo.trian"]),
    ],
)
def test_options_that_do_not_exist_are_found(text, found):
    assert unknown_options(text) == found


# --------------------------------------------------------------------------------- generated pages


def test_the_reference_has_every_field_with_its_meaning():
    text = reference.configuration()
    for section, names in SECTIONS.items():
        for name in names:
            assert f"`{section}.{name}`\n: " in text
    assert (
        "`run.seed`\n: whole number, from 0 to 2\\*\\*32 - 1; default `0`\n\n"
        "  Of the data order and of every sampled token.\n" in text
    )
    assert "`rewards`\n: table of name = weight; default `{ graded = 1.0 }`" in text
    assert ": list of path; default `[]`" in text


def test_the_reference_has_every_command_and_its_options():
    text = reference.commands()
    for name in ("doctor", "evaluate", "export", "plan", "report", "serve", "train"):
        assert f"## jaxgrpo.{name}\n" in text
        assert f"usage: python -m jaxgrpo.{name} " in text
    assert "--max-prompt-tokens INT" in text
    assert "--update.lr" not in text  # that is the configuration's
    assert str(ROOT) not in text
    assert "\x1b" not in text


# ------------------------------------------------------------------------------- newcomers' pages


@each_page(NEWCOMERS)
def test_a_newcomers_page_is_a_script(page):
    script = newcomer.script(page.read_text("utf-8"))
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert "\npython -m jaxgrpo.train" in script
    assert "\npip install" not in script


def test_the_configuration_of_a_newcomers_page_is_one(tmp_path):
    text = (ROOT / "docs" / "own-task.md").read_text("utf-8")
    (block,) = re.findall(r"<!-- file: my_task.toml -->\n```toml\n(.*?)```", text, re.S)
    (tmp_path / "my_task.toml").write_text(block)
    config = load_config(tmp_path / "my_task.toml")
    assert config.rollout.group == tomllib.loads(block)["rollout"]["group"]


def test_a_page_is_followed_and_ends_at_the_first_failure(tmp_path, capfd):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n<!-- file: it's.py -->\n```python\nprint('$HOME `x`')\n```\nThen\n\n"
        '```bash\nx="it\'s.py"\n```\n\n```text\nnot run\n```\n'
        '<!-- skip: later -->\n```bash\nfalse\n```\n\n```bash\npython "$x"\n```\n'
        "```bash\nsleep 100 &\necho $! > left\n```\n"
    )
    newcomer.follow(page, tmp_path)
    out, err = capfd.readouterr()
    assert out == "$HOME `x`\n"
    assert "skipped: later" in err
    with pytest.raises(ProcessLookupError):  # what it left behind has ended with it
        os.kill(int((tmp_path / "left").read_text()), 0)
    page.write_text("```bash\nfalse | true\ntouch here\n```\n")
    with pytest.raises(subprocess.CalledProcessError):
        newcomer.follow(page, tmp_path)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("language", ["python", "toml", "", "bash now"])
def test_a_block_that_nobody_tries_is_refused(language):
    with pytest.raises(ValueError, match=f"line 3: a block of '{language}'"):
        newcomer.script(f"# A page\n\n```{language}\nx = 1\n```\n")
