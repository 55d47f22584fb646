"""Reports of runs: what stands in them, hostile completions, several runs, logs that end early."""

import base64
import dataclasses
import hashlib
import json
import random
import re
import sys
from html.parser import HTMLParser
from statistics import fmean, pstdev

import pytest
from browser import MISSING, chromium

from jaxgrpo.cli import run_main
from jaxgrpo.config import DEFAULT
from jaxgrpo.config_file import load_config, save_config
from jaxgrpo.evaluate import wilson
from jaxgrpo.redact import harmless
from jaxgrpo.report import report, write_report

LOGS = ("metrics", "completions", "eval", "answers")
STEPS, GROUPS, SIZE = 6, 4, 4
HOSTILE = (
    "<script>alert(1)</script></script><!--<script>"
    '"><img src=x onerror=alert(1)> &lt;b&gt; {{ 7 * 7 }}\n\x1b[31mred\x1b[0m \u202eevil\u202c'
    "\u2028\x00\x7f\u200b\ud800 end"
)


class Page(HTMLParser):
    """Elements with their attributes, texts by the element that they stand in, and scripts."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements, self.texts, self.raw = [], [], {"script": [], "style": []}
        self._in = []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in.append(tag)

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if self._in and self._in[-1] in self.raw:
            self.raw[self._in[-1]].append(data)
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def groups(self):
        return json.loads(self.raw["script"][0])

    @property
    def policy(self):
        (policy,) = [
            a["content"] for tag, a in self.elements if tag == "meta" and "http-equiv" in a
        ]
        return policy


def write(run_dir, log, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / f"{log}.jsonl").write_text(lines)


def evaluation(step, valid, **more):
    n = 50
    return {
        "step": step,
        "data": "/data/heldout.jsonl",
        "temperature": 0.0,
        "n": n,
        **{name: wilson(valid, n) for name in ("schema_valid", "parses", "exact")},
        "fields": {"total": valid / n},
        "fields_if_valid": {"total": 1.0},
        "reasons": {"valid": valid, "fenced": n - valid},
        "truncated": 0.0,
        "tokens": 12.5,
        "seconds": 1.0,
        **more,
    }


def metrics(step):
    names = "reward_mean kl entropy grad_norm clipped_high clipped_low truncated_share valid_share"
    return {
        "step": step,
        **{name: random.random() for name in names.split()},
        **{f"ratio_{name}": random.uniform(0.9, 1.1) for name in ("min", "p01", "p99", "max")},
        "ratio_median": 1.0,
        "rewards": {"graded": 0.5},
        "zero_variance_share": 0.25,
        "length_mean": 9.5,
        "length_max": 20,
        "sample_tokens_per_s": 1000.0,
        "train_tokens_per_s": 300.0,
        "seconds": {"sample": 1.0, "update": 2.0},
    }


def completions(step, text="answer Ab{}"):
    return [
        {
            "step": step,
            "problem": f"p{group}",
            "sample": sample,
            "text": text.format(random.random()),
            "reward": random.random(),
            "reason": random.choice(["valid", "fenced", "type@/total"]),
        }
        for group in range(GROUPS)
        for sample in range(SIZE)
    ]


def answer(step, text, problem="h0", reason="valid"):
    return {"step": step, "problem": problem, "text": text, "reason": reason}


@pytest.fixture
def make_run(tmp_path):
    """Writes the directory of a run by hand, with logs of random numbers."""

    def make(name="run", steps=STEPS, **settings):
        run_dir = tmp_path / name
        run_dir.mkdir()
        config = load_config(DEFAULT)
        run = dataclasses.replace(config.run, dir=str(run_dir), steps=steps, **settings)
        save_config(dataclasses.replace(config, run=run), run_dir / "config.toml")
        write(run_dir, "metrics", [metrics(step) for step in range(1, steps + 1)])
        write(run_dir, "completions", [c for s in range(1, steps + 1) for c in completions(s)])
        write(run_dir, "eval", [evaluation(0, 20), evaluation(3, 30), evaluation(6, 45)])
        changed = ["date: May 27", "date: 05-27", "date: 05-27"]
        write(run_dir, "answers", [answer(3 * i, text) for i, text in enumerate(changed)])
        return run_dir

    return make


def page_of(*run_dirs):
    output = run_dirs[0] / "report.html"
    write_report(run_dirs, output)
    return Page(output)


def records(run_dir, log):
    return [json.loads(line) for line in (run_dir / f"{log}.jsonl").read_text().splitlines()]


def test_what_stands_in_it(make_run):
    run_dir = make_run()
    page = page_of(run_dir)
    assert page.texts[0] == "run"  # the title
    for title in ("Learning curve", "Before and after", "Training", "Completions"):
        assert title in page.texts
    for title in ("KL to the reference", "Entropy", "Gradient norm before clipping", "Speed"):
        assert title in page.texts
    share = wilson(45, 50)
    shown = f"90.0 %\n[{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    assert page.texts.count(shown) == 3  # valid, right, parses: after
    assert any("schema-valid: 60.0 % [" in text for text in page.texts)  # a tooltip at step 3
    assert "step 3\nfenced: 40.0 %" in page.texts
    kl = records(run_dir, "metrics")[2]["kl"]
    assert f"step 3\nKL: {kl:.6g}" in page.texts
    # What changed in an answer, and nothing where it stayed.
    assert [tag for tag, _ in page.elements].count("mark") == 2  # one is the explanation
    assert "step 0" in page.texts
    assert "step 3 to 6" in page.texts


def test_where_rewards_alone_decide_they_are_what_is_drawn(make_run, monkeypatch):
    def rewarded(step, mean):
        rewards = {"/a/sql.py:parses": mean, "/a/sql.py:right": mean / 2}
        by = {"decides": "reward_mean", "reward_mean": 2 * mean, "rewards": rewards}
        return evaluation(step, 0, unscored=0, **by)

    pictures = []
    monkeypatch.setattr("jaxgrpo.report.save_png", lambda *what: pictures.append(what))
    runs = [make_run(), make_run("other")]
    for run_dir in runs:
        write(run_dir, "eval", [rewarded(0, 0.25), rewarded(6, 0.75)])
        of_steps = [metrics(step) for step in range(1, STEPS + 1)]
        for record in of_steps:
            del record["valid_share"]
        write(run_dir, "metrics", of_steps)
    page = page_of(runs[0])
    assert "Held-out problems: rewards" in page.texts
    assert any("right: 0.375" in text for text in page.texts)  # a tooltip at step 6
    for before, after in (("0.500", "1.500"), ("0.250", "0.750"), ("0.125", "0.375")):
        assert {before, after} <= set(page.texts)
    assert "Rewards alone judge these answers." in page.texts
    for text in ("Held-out problems", "schema-valid", "Each field right", "fenced"):
        assert text not in page.texts
    _, lines, axis, _ = pictures[0]
    assert [(line.name, line.points[-1]) for line in lines] == [
        ("sum", (6, 1.5)),
        ("parses", (6, 0.75)),
        ("right", (6, 0.375)),
    ]
    assert not axis.percent
    assert "Held-out problems: reward" in page_of(*runs).texts
    assert [line.name for line in pictures[1][1]] == ["run", "other"]


def test_the_best_the_worst_and_the_most_divided_group(make_run):
    run_dir = make_run()
    groups = page_of(run_dir).groups
    rewards = {}
    for record in records(run_dir, "completions"):
        rewards.setdefault((record["step"], record["problem"]), []).append(record["reward"])
    for step in range(1, STEPS + 1):
        of_step = {problem: r for (s, problem), r in rewards.items() if s == step}
        expected = {
            "best": max(of_step, key=lambda p: fmean(of_step[p])),
            "worst": min(of_step, key=lambda p: fmean(of_step[p])),
            "divided": max(of_step, key=lambda p: pstdev(of_step[p])),
        }
        shown = [group for group in groups if group["step"] == step]
        assert {kind: g["problem"] for g in shown for kind in g["kinds"]} == expected
        for group in shown:
            given = [text["reward"] for text in group["texts"]]
            assert given == pytest.approx(sorted(of_step[group["problem"]])[::-1], abs=1e-4)


def test_equal_completions_are_one_and_many_are_cut(make_run):
    run_dir = make_run()
    same = {"step": 1, "problem": "p", "text": "same", "reward": 1.0, "reason": "valid"}
    other = [{**same, "text": f"{i}", "reward": i / 100} for i in range(12)]
    group = [same, *other, same]
    write(run_dir, "completions", [{**c, "sample": i} for i, c in enumerate(group)])
    (shown,) = page_of(run_dir).groups
    texts = [(text["text"], text["count"]) for text in shown["texts"]]
    assert texts == [("same", 2), *((t, 1) for t in ("11", "10", "9", "3", "2", "1", "0"))]
    assert (shown["n"], shown["left"]) == (14, 5)
    assert shown["kinds"] == ["best", "divided", "worst"]


def test_completions_without_a_score_count_for_nothing_and_come_last(make_run):
    run_dir = make_run()
    late = {"reward": None, "reason": "deadline"}
    good = {"reward": 0.5, "reason": "valid"}
    kinds = {"some": [late, good, good], "none": [late, late, late], "all": [good, good, good]}
    write(
        run_dir,
        "completions",
        [
            {"step": 1, "problem": problem, "sample": i, "text": f"{problem} {i}"} | kind
            for problem, group in kinds.items()
            for i, kind in enumerate(group)
        ]
        + [{"step": 2, "problem": "none", "sample": 0, "text": "x"} | late],
    )
    (shown,) = page_of(run_dir).groups  # of equals the first; the second step has none to show
    assert (shown["problem"], shown["mean"], shown["spread"]) == ("some", 0.5, 0.0)
    assert [text["reward"] for text in shown["texts"]] == [0.5, 0.5, None]


def test_nothing_comes_from_elsewhere(make_run):
    page = page_of(make_run())
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "style", "data"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "img", "object", "base"})
    assert not re.search(r"url\(|@import|https?:", page.raw["style"][0])
    allowed = page.policy.split("; ")
    assert "default-src 'none'" in allowed
    for kind, text in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in allowed


def make_hostile(run_dir):
    """Hostile text wherever a model or a data file can put it, and long numbers of steps."""
    group = [{**c, "problem": HOSTILE, "reason": f"enum@/{HOSTILE}"} for c in completions(1)[:SIZE]]
    group[0]["text"], group[1]["text"] = HOSTILE, "x" * 100_000
    much = [{**c, "step": 100_000 * step, "text": "x"} for step in range(1, 50) for c in group]
    write(run_dir, "completions", group + much)
    last = {"fields": {HOSTILE: 0.5}, "fields_if_valid": {HOSTILE: 1.0}, "data": f"/{HOSTILE}"}
    last["reasons"] = {HOSTILE: 30, "valid": 20}
    write(run_dir, "eval", [evaluation(100_000 * i, 20, **last) for i in range(21)])
    write(run_dir, "metrics", [metrics(100_000 * step) for step in range(1, 20)])
    given = [answer(0, f"\na {HOSTILE} b", HOSTILE, HOSTILE), answer(3, f"a {HOSTILE} c", HOSTILE)]
    write(run_dir, "answers", given)
    return run_dir


def test_hostile_text_stays_text(make_run):
    plain = page_of(make_run("plain"))
    page = page_of(make_hostile(make_run("<b>\u202e&{{ x }}")))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert len(page.raw["script"]) == 2
    assert page.source == harmless(page.source)  # no control characters, nothing invisible
    group = page.groups[0]
    texts = {text["text"] for text in group["texts"]}
    assert harmless(HOSTILE) in texts
    assert any(t.startswith("x" * 1500 + " ... (100000 characters)") for t in texts)
    assert len(page.source) < 200_000
    assert "49" not in page.texts
    assert any("{{ 7 * 7 }}" in text for text in page.texts)


def test_a_secret_is_not_shown(make_run, monkeypatch):
    run_dir = make_run()
    secret = "hunter2-hunter2"
    write(run_dir, "completions", [{**c, "text": f"{secret}!"} for c in completions(1)])
    write(run_dir, "answers", [answer(0, f"{secret}?")])
    monkeypatch.setenv("SOME_PASSWORD", secret)
    page = page_of(run_dir)
    assert secret not in page.source
    assert "[SOME_PASSWORD]!" in page.groups[0]["texts"][0]["text"]


def test_runs_are_compared(make_run, tmp_path):
    one, two = make_run("one", seed=1), make_run("two", seed=2, steps=4)
    write(two, "eval", [evaluation(0, 10), evaluation(4, 25)])
    output = tmp_path / "both.html"
    report((one, two), output=output)
    page = Page(output)
    assert page.texts[0] == "one, two"
    tips = [text for text in page.texts if text.startswith("step 0\n")]
    assert any("one: 40.0 % [" in tip and "two: 20.0 % [" in tip for tip in tips)
    assert {"step 6", "step 4"} <= {*page.texts}  # the heads of their tables
    assert page.texts.count("heldout.jsonl, greedy, n = 50") == 2
    differing = page.texts[page.texts.index("Settings that differ") :]
    assert [text for text in differing if text.startswith("run.")] == [
        *("run.dir", "run.seed", "run.steps")
    ]
    assert {group["run"] for group in page.groups} == {"one", "two"}


def test_a_long_run_has_no_longer_page(make_run):
    short, long = make_run("short", 200), make_run("long", 400)
    sizes = [len(page_of(run_dir).source) for run_dir in (short, long)]
    assert sizes[1] < 1.1 * sizes[0]
    page = Page(long / "report.html")
    steps = {group["step"] for group in page.groups}
    assert len(steps) == 20
    assert {1, 400} <= steps
    assert any("up to 4 steps" in text for text in page.texts)


@pytest.mark.parametrize("how", ["missing", "empty"])
@pytest.mark.parametrize("log", LOGS)
def test_a_log_that_is_not_there_is_left_out(make_run, log, how):
    run_dir = make_run()
    path = run_dir / f"{log}.jsonl"
    path.unlink() if how == "missing" else path.write_bytes(b"")
    page = page_of(run_dir)
    assert ("No step is in the logs." in page.texts) == (log == "metrics")
    assert ("Nothing was evaluated yet." in page.texts) == (log == "eval")
    assert (page.groups == []) == (log == "completions")
    assert ("The same problems at every evaluation" in page.texts) == (log != "answers")


@pytest.mark.parametrize(
    ("log", "whole", "cut"),
    [
        ("metrics", "6 of 6", "5 of 6"),
        ("completions", f"{STEPS * GROUPS * SIZE}", f"{STEPS * GROUPS * SIZE - 1}"),
        ("eval", "step 6", "step 3"),
        ("answers", "step 3 to 6", "step 3"),
    ],
)
def test_a_last_line_that_was_cut_does_not_count(make_run, log, whole, cut):
    run_dir = make_run()
    path = run_dir / f"{log}.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    texts = page_of(run_dir).texts
    assert whole not in texts
    assert cut in texts


def test_a_run_without_logs_has_a_report(make_run):
    run_dir = make_run()
    for log in LOGS:
        (run_dir / f"{log}.jsonl").unlink()
    assert "0 of 6" in page_of(run_dir).texts
    assert not (run_dir / "curve.png").exists()


def test_values_that_are_not_finite_are_left_out(make_run):
    run_dir = make_run()
    steps = records(run_dir, "metrics")
    steps[2] |= {"kl": None, "skipped": 1.0}
    write(run_dir, "metrics", steps)
    page = page_of(run_dir)
    shown = [text.split("\n")[0] for text in page.texts if "\nKL: " in text]
    assert shown == [f"step {step}" for step in (1, 2, 4, 5, 6)]
    assert "updates that were not finite" in page.texts


def test_the_picture(make_run, tmp_path):
    one, two = make_run("one$_1"), make_run("_two$")
    for run_dirs in ([one], [one, two]):
        output = tmp_path / f"{len(run_dirs)}" / "report.html"
        output.parent.mkdir()
        write_report(run_dirs, output)
        assert (output.parent / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_picture_is_left_out(make_run, monkeypatch, capsys):
    run_dir = make_run()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page_of(run_dir)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(r"curve\.png is left out, .*jaxgrpo\[report\]", line)
    assert not (run_dir / "curve.png").exists()


def ending(capsys, run_dirs, **options):
    with pytest.raises(SystemExit) as end:
        run_main(lambda: report(tuple(run_dirs), **options))
    return end.value.code, capsys.readouterr().err


def test_mistakes_are_one_line(make_run, tmp_path, capsys):
    run_dir = make_run()
    (tmp_path / "other").mkdir()
    (run_dir / "completions.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    for run_dirs, options, message in (
        ([], {}, "name a run directory"),
        ([tmp_path / "nowhere"], {}, "nowhere is no run directory"),
        ([run_dir, tmp_path / "other"], {}, "other is no run directory"),
        ([run_dir], {}, "completions.jsonl:1: no record of a step"),
        ([run_dir], {"output": tmp_path}, "is not a file"),
        ([run_dir], {"output": tmp_path / "no" / "x.html"}, "is not a file"),
        ([run_dir] * 9, {}, "9 runs are too many"),
    ):
        code, error = ending(capsys, run_dirs, **options)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
    assert not (run_dir / "report.html").exists()


@pytest.fixture(scope="module")
def browser():
    if MISSING:
        pytest.skip(f"not on the PATH: {', '.join(MISSING)}")
    with chromium() as browser:
        yield browser


SHOWN = "return [...document.querySelectorAll('#groups pre')].map(e => e.textContent)"


@pytest.mark.browser
def test_a_browser_shows_and_filters_it(browser, make_run):
    run_dir = make_run()
    page_of(run_dir)
    browser.open(run_dir / "report.html")
    every = browser.run(SHOWN)
    assert len(every) >= STEPS * SIZE
    wanted = every[7]
    browser.type("input[name=text]", wanted.removeprefix("answer ").swapcase())
    assert browser.run(SHOWN) == [wanted]
    choose = """
        const [name, value] = arguments, form = document.getElementById("filter");
        form.elements.text.value = "";
        form.elements[name].value = value;
        form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
    """
    browser.run(choose, "step", "3")
    of_step = {c["text"] for c in records(run_dir, "completions") if c["step"] == 3}
    shown = browser.run(SHOWN)
    assert len(shown) >= SIZE
    assert {*shown} <= of_step
    browser.run(choose, "reason", "fenced")
    fenced = {c["text"] for c in records(run_dir, "completions") if c["reason"] == "fenced"}
    assert {*browser.run(SHOWN)} == {*shown} & fenced
    assert browser.console() == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_hostile_text_does_nothing(browser, make_run, width):
    run_dir = make_hostile(make_run())
    page_of(run_dir)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.command("Emulation.setDeviceMetricsOverride", **size)
    for theme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.command("Emulation.setEmulatedMedia", features=features)
        browser.open(run_dir / "report.html")
        assert harmless(HOSTILE) in browser.run(SHOWN)
        first = browser.run("return document.querySelector('.version pre').textContent")
        assert first == harmless(f"\na {HOSTILE} b")
        assert browser.run("return document.querySelectorAll('img, script').length") == 2
        assert browser.run("return document.documentElement.scrollWidth") <= width
        # The texts of a chart lie neither on each other nor outside.
        misplaced = browser.run("""
            let count = 0;
            for (const svg of document.querySelectorAll("figure svg")) {
              const boxes = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
              const all = svg.getBoundingClientRect();
              count += boxes.filter(a => a.left < all.left - 1 || a.right > all.right + 1).length;
              boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
                count += a.width && a.left < b.right - 1 && b.left < a.right - 1 &&
                         a.top < b.bottom - 3 && b.top < a.bottom - 3;
              }));
            }
            return count;
        """)
        assert misplaced == 0
        colours = browser.run("""
            const style = getComputedStyle(document.body);
            return [style.color, style.backgroundColor]
              .map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0));
        """)
        assert (colours[0] < colours[1]) == (theme == "light")
    assert browser.console() == []
