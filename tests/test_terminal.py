"""What a run shows while it trains: the live table on terminals, plain lines elsewhere."""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jaxgrpo import cluster, live_table
from jaxgrpo.live_table import ROWS, Frame, Memory, memory_in_use
from jaxgrpo.terminal import Display

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b[2J\x1b]0;title\x07[bold][/nope]\u202e"


def record(step, **changed):
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "reward_mean": 1.25,
        "reward_std": 0.5,
        "rewards": {"graded": 0.75, "fields": 0.625},
        "unscored": 0,
        "valid_share": 0.75,
        "groups_sampled": 16,
        "groups_with_signal": 9,
        "truncated_share": 0.25,
        "length_mean": 31.5,
        "entropy": 0.125,
        "kl": 0.0625,
        "ratio_min": 0.99997,
        "ratio_max": 1.00002,
        "grad_norm": 0.5,
        "skipped": 0.0,
        "sample_tokens_per_s": 20000.0,
        "train_tokens_per_s": 9000.0,
        "seconds": {"sample": 0.2, "reward": 0.05, "update": 0.25},
    } | changed


def evaluation(step, rate, data="dir/heldout.jsonl", temperature=0.0):
    share = {"count": 1, "rate": rate, "low": 0.25, "high": 0.875}
    return {
        "step": step, "data": data, "temperature": temperature, "n": 50, "seconds": 1.0,
        "schema_valid": share, "exact": share,
    }  # fmt: skip


def console(width=80, height=40, **options):
    """A terminal that keeps what is written to it."""
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        highlight=False,
        soft_wrap=True,
        force_terminal=True,
        **options,
    )


def frame(*records, memory=None, evaluated=None, since=0.0):
    return Frame(20, records, 0.5, memory or Memory(10**9, None), evaluated, since)


def shown(a_frame, width=80, height=40, **options):
    """The lines of a frame, without colours."""
    to = console(width, height, color_system=None, **options)
    to.print(a_frame)
    return [line.rstrip() for line in to.file.getvalue().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless told."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_wide_terminal_shows_everything(clock):
    evaluated = evaluation(0, 0.5), evaluation(10, 0.75)
    memory = Memory(1_500_000_000, 64_000_000_000)
    lines = shown(frame(record(11), record(12), memory=memory, evaluated=evaluated), width=200)
    _, head, first, second, *rest = lines
    assert " ".join(head.split()) == (
        "step reward valid fields signal KL entropy cut |ratio-1| sampled/s trained/s tokens"
        " gradient graded"
    )
    assert " ".join(first.split()) == (
        "11 1.250 ± 0.500 75% 0.625 9/16 0.062 0.125 25% 3e-05 20,000 9,000 31.5 0.5 0.750"
    )
    assert second.split()[0] == "12"
    assert rest == [
        "step 12/20  0:04 left at 0.5 s each  sample 40%  reward 10%  update 50%  host 1.50 GB"
        "  device 64.00 GB",
        "evaluation at step 10  heldout.jsonl  valid 50.0% to 75.0% [25.0%, 87.5%]"
        "  exact 50.0% to 75.0% [25.0%, 87.5%]",
    ]


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 120])
def test_a_narrow_terminal_shows_what_matters_most_on_lines_that_fit(width, clock):
    evaluated = evaluation(0, 0.5), evaluation(10, 0.75)
    lines = shown(frame(record(11), record(12), evaluated=evaluated), width)
    assert max(map(len, lines)) <= width
    titles = lines[1].split()
    assert titles[:2] == ["step", "reward"]
    assert ("valid" in titles) == (width >= 30)
    assert ("entropy" in titles) == (width >= 60)
    text = " ".join(lines)
    for piece in ("step 12/20", "0:04 left", "host 1.00 GB", "50.0% to 75.0%"):
        assert piece[:width] in text


@pytest.mark.parametrize(("height", "rows"), [(40, ROWS), (10, 5), (4, 1)])
def test_rows_are_as_many_as_there_is_room_for(height, rows, clock):
    lines = shown(frame(*map(record, range(1, 9))), height=height)
    assert [line.split()[0] for line in lines[2 : 2 + rows]] == [str(n) for n in range(9 - rows, 9)]
    assert lines[2 + rows].startswith("step 8/20")
    assert len(lines) <= max(height, 5)


def test_what_a_run_has_not_is_left_out_and_what_went_wrong_is_shown(clock):
    plain = record(1, kl=None, rewards={"graded": 0.5})
    del plain["kl"]
    titles = shown(frame(plain), 200)[1].split()
    assert not {"KL", "fields", "graded", "skipped"} & set(titles)
    bad = record(2, skipped=1.0, unscored=3, entropy=None, ratio_min=None, grad_norm=None)
    lines = shown(frame(record(1), bad), 200)
    assert "skipped  no score" in lines[1]
    assert " ".join(lines[3].split()).startswith("2 1.250 ± 0.500 75% 0.625 9/16 1 3 0.062 25%")
    assert "31m" in coloured(frame(record(1), bad))
    assert "31m" not in coloured(frame(record(1)))


def coloured(a_frame, **options):
    to = console(color_system="standard", **options)
    to.print(a_frame)
    return to.file.getvalue()


def test_a_long_step_is_seen_to_last(clock):
    clock[0] = 200.0
    assert "the last 1:40 ago" in " ".join(shown(frame(record(3), since=100.0)))
    assert "ago" not in " ".join(shown(frame(record(3), since=199.5)))
    assert "ago" not in " ".join(shown(frame(record(20), since=100.0)))  # it is done


def test_no_colour_where_it_is_not_wanted(monkeypatch, clock):
    bad = frame(record(1, skipped=1.0))
    assert re.search(r"\x1b\[[0-9;]*3\dm", coloured(bad))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*[349]\dm", coloured(bad))


def test_a_terminal_of_few_characters_gets_those_that_it_has(clock):
    to = console()
    to.file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    to.print(frame(record(1), evaluated=(evaluation(0, 0.5),) * 2))
    to.file.flush()
    assert b"1.250 +- 0.500" in to.file.buffer.getvalue()


def test_names_from_a_configuration_are_text_and_nothing_else(clock):
    hostile = record(1, rewards={"graded": 0.5, f"/a/b.py:{HOSTILE}": 0.25})
    evaluated = (evaluation(0, 0.5, data=f"dir/{HOSTILE.replace('/', '')}"),) * 2
    text = coloured(frame(hostile, evaluated=evaluated), width=200)
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[bold][nope]" in text
    assert "\\x1b[2J" in text


def test_time_left_is_that_of_the_last_steps_and_not_of_the_first(clock, monkeypatch):
    monkeypatch.setattr(live_table, "memory_in_use", lambda: Memory(None, None))
    to = console(color_system=None)
    display = Display(100, quiet=False, console=to)
    frames = []
    monkeypatch.setattr(display._live, "update", frames.append)
    for step in range(1, 41):
        clock[0] += 60.0 if step == 1 else 1.0 if step < 20 else 2.0
        display.step(record(step))
    assert frames[0].step_s is None
    assert frames[18].step_s == pytest.approx(1.0)
    assert frames[-1].step_s == pytest.approx(2.0)
    assert "2:00 left" in " ".join(shown(frames[-1]))
    assert [r["step"] for r in frames[-1].records] == list(range(33, 41))


def test_the_evaluation_that_decides_stays_visible(clock, monkeypatch):
    display = Display(20, quiet=False, console=console())
    frames = []
    monkeypatch.setattr(display._live, "update", frames.append)
    first = evaluation(0, 0.25)
    for other in (first, evaluation(0, 0.375, temperature=1.0), evaluation(0, 0.4, data="other")):
        display.evaluation(other)
    assert not frames  # there is no table yet
    display.step(record(1))
    assert frames[-1].evaluated == (first, first)
    last = evaluation(10, 0.75)
    display.evaluation(last)
    assert frames[-1].evaluated == (first, last)


@pytest.mark.parametrize("how", ["quiet", "file", "coloured file", "dumb", "processes"])
def test_plain_lines_elsewhere(how, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.delenv("TERM", raising=False)
    if how in ("quiet", "dumb", "processes"):
        monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    if how == "coloured file":
        monkeypatch.setenv("FORCE_COLOR", "1")
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if how == "processes":
        monkeypatch.setattr(cluster, "count", lambda: 2)
    with Display(2, quiet=how == "quiet") as display:
        display.step(record(1))
        display.step(record(2))
    line = (
        "step {}/2  reward 1.250  valid 75%  signal 9/16  20,000 tokens/s sampling, 9,000 training"
    )
    assert out.getvalue() == f"{line.format(1)}\n{line.format(2)}\n"


def test_where_rewards_alone_decide_counts_of_json_are_not_shown(monkeypatch, clock):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    of_json = {"parses": {"count": 0, "rate": 0.0, "low": 0.0, "high": 0.1}, "tokens": 9.0}
    before, after = (
        evaluation(step, 0.0)
        | of_json
        | {
            "reasons": {"prose": 50}, "decides": "reward_mean", "reward_mean": mean,
            "rewards": {"/a/sql.py:parses": 2 * mean, "/a/sql.py:right": 0.0}, "unscored": step,
        }
        for step, mean in ((0, 0.125), (2, 0.25))
    )  # fmt: skip
    with Display(2, quiet=True) as display:
        display.evaluation(before)
        step = record(1)
        del step["valid_share"]
        display.step(step)
        display.before_and_after([before, after])
    first, second, *table = out.getvalue().splitlines()
    assert first == "evaluation at step 0: heldout.jsonl T=0 n=50  reward 0.125  1.0 s"
    assert second.startswith("step 1/2  reward 1.250  signal 9/16  ")
    assert [" ".join(line.split()) for line in table[2:]] == [
        "before step 2",
        "reward 0.125 0.250",
        "parses 0.250 0.500",
        "right 0.000 0.000",
        "no score 0 2",
        "tokens an answer 9.0 9.0",
    ]
    lines = shown(frame(step, evaluated=(before, after)), width=100)
    assert lines[-1] == "evaluation at step 2  heldout.jsonl  reward 0.125 to 0.250"


def test_memory_is_that_of_the_process_and_of_the_fullest_device(monkeypatch):
    memory = memory_in_use()
    assert 10**7 < memory.host < 10**12
    assert memory.device is None  # CPUs do not say

    class Device:
        def __init__(self, **stats):
            self.memory_stats = lambda: stats or None

    devices = [Device(bytes_in_use=3), Device(bytes_in_use=5), Device()]
    monkeypatch.setattr(live_table.jax, "local_devices", lambda: devices)
    assert memory_in_use().device == 5


DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from tests.test_terminal import record, evaluation
from jaxgrpo.stop import Stopped, StopSignals
from jaxgrpo.terminal import Display

with StopSignals() as stop, Display(12, quiet=False) as display:
    display.evaluation(evaluation(0, 0.25))
    try:
        with stop.deferred():
            for step in range(1, 13):
                display.step(record(step))
                display._live.refresh()  # a frame each, however fast this is
                if step == 6:
                    display.say("said in between")
                    print("printed by a library")
                if step == 9:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.5)
    except Stopped:
        pass
"""


def test_a_real_terminal_shows_one_table_redrawn_in_place():
    """The screen that is left, made from the bytes that a terminal gets."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 72, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(root=str(ROOT))],
        stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                try:
                    some = os.read(ours, 1 << 16)
                except OSError:  # the other end is closed
                    break
                if not some:
                    break
                written += some
        assert child.wait(timeout=10) == 0, written
    finally:
        child.kill()
        os.close(ours)
    text = written.decode()
    assert text.count("reward") >= 13  # a frame a step and the last
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    screen = replay(text)
    assert max(map(len, screen[3:])) <= 72  # what is said goes on on the next line
    assert screen[0].startswith("evaluation at step 0: heldout.jsonl")
    for line in ("said in between", "printed by a library"):
        assert screen.count(line) == 1
    assert screen.count("SIGINT: saving, then stopping; another one stops at once") == 1
    assert sum(line.startswith("━") for line in screen) == 1
    (head,) = (n for n, line in enumerate(screen) if line.split()[:2] == ["step", "reward"])
    assert head > screen.index("printed by a library") > screen.index("said in between")
    rows = [line.split()[0] for line in screen[head + 1 : head + 1 + ROWS]]
    assert rows == [str(step) for step in range(5, 13)]
    assert screen[head + 1 + ROWS].startswith("step 12/12")


def replay(text):
    """The lines of a terminal that has understood the sequences that rich redraws with."""
    lines, row, column = [""], 0, 0
    for control, char in re.findall(r"(\x1b\[\??[0-9;]*[A-Za-z])|(.|\n)", text):
        if control:
            number = int(re.search(r"\d*", control[2:])[0] or 1) if control[2] != "?" else 0
            if control.endswith("A"):
                row -= number
                assert row >= 0
            elif control.endswith("K"):
                lines[row] = ""
            else:
                assert control[-1] in "mhl", control
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
