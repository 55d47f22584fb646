"""Nothing that a terminal obeys and no secret leaves a run, whatever it reads and writes."""

import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrpo import preflight
from jaxgrpo.cli import run_main, say
from jaxgrpo.config_file import load_config, parse_args, save_config
from jaxgrpo.metrics import RunLog
from jaxgrpo.redact import harmless, json_lines, printable, redact
from jaxgrpo.terminal import Display
from jaxgrpo.types import Verdict

KEY = 'sk-live "ü\\n\x01" 0123456789'  # as JSON and Python would write it in three ways
# Colours, a title, a link, a cleared screen; C1; turned text; nothing to see; half a pair; markup.
HOSTILE = (
    "\x1b[31mred\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\r\b\x00\x7f\x9b1m"
    "\u202e\u2066\u200f\u200b\u200d\ufeff\u2060\u00ad\u3164\ufe0f\u2028\x85\udfff\ud800"
    "[bold]b[/nope]{0} %s\n\tend"
)


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("my_Api_Key", KEY)
    return KEY


def ways(secret):
    """In which a secret may be written."""
    return [
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        harmless(secret),
    ]


def assert_without(text, secret):
    for way in ways(secret):
        assert way not in text


@pytest.mark.parametrize("name", ["HF_TOKEN", "wandb_api_key", "AWS_SECRET_ACCESS", "PASSWORDS"])
def test_every_way_of_writing_a_secret_is_replaced_by_its_name(monkeypatch, name):
    assert redact(KEY) == KEY
    monkeypatch.setenv(name, f" {KEY}\n")
    for way in ways(KEY)[:-1]:
        assert redact(f"a{way}b{way}") == f"a[{name}]b[{name}]"
    assert printable("x" * 190 + KEY, limit=200).startswith("x" * 190 + f"[{name}]"[:10])
    # Digits in a number stay, or it would be no JSON.
    monkeypatch.setenv(name, "12345678")
    [line] = json_lines([{"12345678": ["12345678", 12345678, {"a": "é 12345678"}]}]).splitlines()
    assert json.loads(line) == {f"[{name}]": [f"[{name}]", 12345678, {"a": f"é [{name}]"}]}


def test_what_is_no_secret_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path))
    monkeypatch.setenv("HOMEPAGE", "something long")
    text = f"false {tmp_path} something long"
    assert redact(text) == text
    monkeypatch.setenv("THE_LONGER_KEY", "something long and longer")
    monkeypatch.setenv("A_KEY", "something long")
    assert redact("something long and longer") == "[THE_LONGER_KEY]"


def test_files_hold_no_secret_and_no_control_character(secret, tmp_path):
    log = RunLog(tmp_path, print)
    record = {"step": 1, "text": f"a {HOSTILE} {secret}", secret: [json.dumps(secret)]}
    log.write("completions", [record, record])
    log.rewind(1)
    name = HOSTILE.replace("/", "").replace("\udfff\ud800", "")  # TOML has no such halves
    config = parse_args(["--model.path", f"/m/{secret}/{name}", "--run.seed", "7"])
    save_config(config, tmp_path / "config.toml")
    for file in tmp_path.iterdir():
        text = file.read_text("utf-8")
        assert_without(text, secret)
        assert all(c.isprintable() or c == "\n" for c in text), file
    logged = log.read("completions")
    assert [r["text"] for r in logged] == [f"a {HOSTILE} [my_Api_Key]"] * 2
    assert load_config(tmp_path / "config.toml").model.path == f"/m/[my_Api_Key]/{name}"


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text(st.characters(codec=None)) | st.lists(st.sampled_from(list(HOSTILE))).map("".join))
def test_harmless_text_shows_itself_and_nothing_else(text):
    shown = harmless(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    shown.encode()
    assert harmless(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text
    assert "\n" not in printable(text)
    assert len(printable(text, 10)) < 10 * 10 + 40
    json.loads(json_lines([text]).encode("ascii"))
    assert json_lines([text]).replace("\n", "").isprintable()


def group(text, reason):
    """What the preflight looks at of a group of answers."""
    return SimpleNamespace(
        rewards_G=np.array([0.0, 0.5]),
        scored_G=np.array([True, True]),
        verdicts=[Verdict(0.0, reason, "")] * 2,
        answers=SimpleNamespace(texts=[text, text]),
        has_signal=True,
    )


def share():
    return {"count": 1, "rate": 0.5, "low": 0.1, "high": 0.9}


def test_nothing_that_a_terminal_obeys_reaches_it(monkeypatch, secret):
    """Bytes of a real terminal, of few characters, from hostile answers, names and errors."""
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "dumb")  # no colours of our own
    terminal = os.fdopen(theirs, "w", encoding="latin-1", buffering=1)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    hostile = f"{HOSTILE}{secret}"
    record = {
        "step": 1,
        "data": f"dir/{hostile}",
        "temperature": 0.0,
        "n": 2,
        "tokens": 1.0,
        "seconds": 1.0,
        "parses": share(),
        "schema_valid": share(),
        "exact": share(),
        "fields": {hostile: 0.5},
        "fields_if_valid": {},
        "reasons": {f"type@/{hostile}": 1},
    }

    def main():
        with Display(1, quiet=False) as display:
            display.say(*preflight.describe([group(hostile, hostile)]), hostile)
            display.evaluation(record)
            display.before_and_after([record, record])
        say(hostile)
        raise ValueError(f"{hostile}: no such key")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    monkeypatch.setenv("JAXGRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such key") as bug:
        run_main(main)
    sys.excepthook(bug.type, bug.value, bug.tb)
    terminal.close()
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # all was read
            break
    os.close(ours)
    text = shown.decode("latin-1").replace("\r\n", "\n")
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
    assert_without(text, secret)
    assert "\\x1b[31mred" in text
    assert "[bold]b[/nope]" in text
    assert "[my_Api_Key]" in text
    assert re.search(r"\nerror: .*no such key", text)
    assert "Traceback" in text
