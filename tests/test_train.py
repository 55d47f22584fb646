"""Whole runs of the shipped example, cut short: what they write, resume, refuse and leave alone."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgrpo.train
from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.cli import run_main
from jaxgrpo.config_file import load_config, parse_args
from jaxgrpo.preflight import NoSignalError
from jaxgrpo.train import train

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Eight held-out problems: evaluation is not what these tests are about."""
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)
    path.write_text("".join(lines[:8]), "utf-8")
    return path


@pytest.fixture(scope="module")
def options(heldout):
    return [
        *("--data.heldout", str(heldout)),
        *("--eval.batch", "8"),
        *("--eval.every", "2"),
        *("--checkpoint.every", "2"),
        *("--signal.preflight-groups", "8"),
        *("--rollout.group", "4"),
        *("--sampling.draft", "2"),
    ]


def run(run_dir, options, *more):
    train(parse_args([*options, "--run.dir", str(run_dir), *more]))
    return run_dir


def read(run_dir, name):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def without_times(records):
    speeds = ("seconds", "sample_tokens_per_s", "train_tokens_per_s", "compilations")
    return [{k: v for k, v in r.items() if k not in speeds} for r in records]


def parameters(run_dir):
    model, _, _ = load_run_model(run_dir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, options):
    return run(tmp_path_factory.mktemp("runs") / "whole", options, "--run.steps", "4")


def test_run_directory_is_as_promised(whole_run, heldout):
    assert load_config(whole_run / "config.toml").run.steps == 4
    metrics = read(whole_run, "metrics")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    for record in metrics:
        # Sampler and trainer are one model: their probabilities differ by rounding alone.
        assert 0.999 < record["ratio_min"] <= record["ratio_median"] <= record["ratio_max"] < 1.001
        assert record["grad_norm"] > 0
        assert record["kl"] >= 0
        assert 0 <= record["valid_share"] <= 1
        assert 1.2 < record["tokens_per_pass"] <= 3
        assert record["reward_mean"] == pytest.approx(sum(record["rewards"].values()))
    completions = read(whole_run, "completions")
    assert len(completions) == sum(record["groups_sampled"] * 4 for record in metrics)
    assert completions[0].keys() == {"step", "problem", "sample", "text", "reward", "reason"}
    evaluations = read(whole_run, "eval")
    assert [record["step"] for record in evaluations] == [0, 0, 2, 4, 4]
    for record in (evaluations[0], evaluations[-1]):
        assert (record["data"], record["temperature"], record["n"]) == (str(heldout), 0.0, 8)
        valid = record["schema_valid"]
        assert valid["rate"] == valid["count"] / 8
        assert 0 <= valid["low"] <= valid["rate"] <= valid["high"] <= 1
        assert sum(record["reasons"].values()) == 8
        assert record["reasons"].get("valid", 0) == valid["count"] <= record["parses"]["count"]
        assert record["exact"]["count"] <= valid["count"]
        assert record["fields"].keys() == {"vendor", "date", "amount", "currency"}
    answers = read(whole_run, "answers")
    assert [record["step"] for record in answers] == [0] * 8 + [2] * 8 + [4] * 8
    reasons = Counter(record["reason"] for record in answers[-8:])
    assert reasons == evaluations[-1]["reasons"]
    assert "Before and after" in (whole_run / "report.html").read_text("utf-8")


def test_parameters_have_moved_but_not_far(whole_run):
    before = load_config(whole_run / "config.toml").model.path
    from jaxgrpo.models.hf import load_hf

    base = [np.asarray(leaf) for leaf in jax.tree.leaves(load_hf(before))]
    moved = [np.abs(a - b).max() for a, b in zip(base, parameters(whole_run), strict=True)]
    assert max(moved) > 1e-4
    assert max(moved) < 0.01


def test_resumed_equals_uninterrupted(whole_run, options, tmp_path, capsys):
    run(tmp_path / "run", options, "--run.steps", "2")
    # What a killed run leaves: steps after the checkpoint, and half a line.
    for name in ("metrics", "completions"):
        last = (whole_run / f"{name}.jsonl").read_text().splitlines()[-1]
        with (tmp_path / "run" / f"{name}.jsonl").open("a") as file:
            file.write(last + "\n" + last[: len(last) // 2])
    capsys.readouterr()
    run(tmp_path / "run", options, "--run.steps", "4")
    assert "restored step 2" in capsys.readouterr().out
    for name in ("metrics", "completions"):
        assert without_times(read(tmp_path / "run", name)) == without_times(read(whole_run, name))
    for a, b in zip(parameters(tmp_path / "run"), parameters(whole_run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_run_again(whole_run, options, capsys):
    before = {p: p.read_bytes() for p in whole_run.glob("*.jsonl")}
    run(whole_run, options, "--run.steps", "4")
    assert {p: p.read_bytes() for p in whole_run.glob("*.jsonl")} == before
    assert re.search(r"schema valid +[\d.]+% \[", capsys.readouterr().out)


def test_a_shorter_run_than_what_is_there_is_refused(whole_run, options):
    before = (whole_run / "eval.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"at step 4 already, beyond run\.steps = 2"):
        run(whole_run, options, "--run.steps", "2")
    assert (whole_run / "eval.jsonl").read_bytes() == before
    assert load_config(whole_run / "config.toml").run.steps == 4


def test_reference_in_host_memory_is_the_same_run(whole_run, options, tmp_path, monkeypatch):
    memories, learn = set(), jaxgrpo.train.learn

    def see_reference(config, tx, state, reference, *rest):
        memories.update(leaf.sharding.memory_kind for leaf in jax.tree.leaves(reference))
        return learn(config, tx, state, reference, *rest)

    monkeypatch.setattr(jaxgrpo.train, "learn", see_reference)
    run(tmp_path, options, "--run.steps", "2", "--grpo.reference", "host")
    assert memories == {"pinned_host"}
    # Where it is kept changes no number, so that a run may go on with it elsewhere.
    run(tmp_path, options, "--run.steps", "4")
    assert memories == {"pinned_host", "device"}
    assert without_times(read(tmp_path, "metrics")) == without_times(read(whole_run, "metrics"))
    for a, b in zip(parameters(tmp_path), parameters(whole_run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_with_a_bfloat16_moment_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    narrow = ("--update.moments", "bfloat16")
    whole = run(tmp_path / "whole", options, "--run.steps", "2", *narrow)
    resumed = tmp_path / "resumed"
    run(resumed, options, "--run.steps", "1", *narrow)
    with pytest.raises(ValueError, match=r"another update\.moments.*--run\.fresh"):
        run(resumed, options, "--run.steps", "2")
    run(resumed, options, "--run.steps", "2", *narrow)
    assert without_times(read(resumed, "metrics")) == without_times(read(whole, "metrics"))
    for a, b in zip(parameters(resumed), parameters(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_configuration_does_not_go_on_in_its_place(whole_run, options):
    with pytest.raises(ValueError, match=r"another update\.lr.*--run\.fresh"):
        run(whole_run, options, "--run.steps", "4", "--update.lr", "1e-5")


def test_fresh_starts_anew(options, tmp_path):
    run(tmp_path, options, "--run.steps", "1")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, options, "--run.steps", "1", "--run.fresh", "--run.seed", "5")
    assert load_config(tmp_path / "config.toml").run.seed == 5
    assert [record["step"] for record in read(tmp_path, "metrics")] == [1]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_minibatches_and_epochs_take_more_steps(options, tmp_path):
    more = ("--run.steps", "1", "--update.epochs", "2", "--update.minibatches", "2")
    more += ("--eval.samples", "0", "--signal.preflight-groups", "0")
    fewer_devices = ("--mesh.fsdp", "4", "--mesh.tp", "2")  # a minibatch has four problems
    (record,) = read(run(tmp_path, options, *more, *fewer_devices), "metrics")
    assert record["seconds"]["old"] > 0
    # The policy moves within the step, but what it was sampled with is still what is compared.
    assert 0.999 < record["ratio_min"] <= record["ratio_max"] < 1.001
    assert abs(record["policy_loss"]) > 0


def test_equal_rewards_are_refused_before_anything_is_trained(options, tmp_path):
    reward = tmp_path / "flat.py"
    reward.write_text("def half(completion, row):\n    return 0.5\n")
    config = parse_args([*options, "--run.dir", str(tmp_path / "run")])
    config = dataclasses.replace(config, rewards={f"{reward}:half": 1.0})
    with pytest.raises(NoSignalError, match=r"only 0% of 32 groups.*plateau at reward 0\.50"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    # Nothing was trained, so the advice can be followed in the same directory.
    hotter = dataclasses.replace(config.sampling, temperature=1.3)
    with pytest.raises(NoSignalError):
        train(dataclasses.replace(config, sampling=hotter))
    assert load_config(tmp_path / "run" / "config.toml").sampling.temperature == 1.3


def test_rewards_that_become_equal_end_the_run(options, tmp_path):
    reward = tmp_path / "fading.py"
    reward.write_text(
        "calls = 0\n"
        "def fading(completion, row):\n"
        "    global calls\n"
        "    calls += 1\n"
        # 200 rows are tried first, then the preflight asks 32 times, then every step does.
        "    return len(completion) if calls < 250 else 0.5\n"
    )
    more = ("--run.steps", "9", "--signal.patience", "2", "--rollout.max-refills", "0")
    more += ("--scoring.workers", "1")  # each has a count of its own
    config = parse_args([*options, "--run.dir", str(tmp_path / "run"), *more])
    config = dataclasses.replace(config, rewards={f"{reward}:fading": 1.0})
    with pytest.raises(NoSignalError, match="2 steps in a row"):
        train(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.path", "nowhere"], r"model\.path is .*nowhere.*no directory"),
        (["--data.train", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["--rollout.group", "1"], r"rollout\.group"),
        (["--rollout.problems", "12"], r"rollout\.problems = 12 does not divide"),
        (["--mesh.fsdp", "3"], r"does not make 8 devices"),
        (["--data.max-prompt-tokens", "20"], r"prompts are longer than 20"),
        (["--sampling.top-k", "5"], r"sampling\.accept_mismatch"),
        (
            ["--model.attention", "cudnn", "--model.dtype", "bfloat16"],
            r"model\.attention = 'cudnn' needs NVIDIA GPUs, the devices are cpu",
        ),
        (
            ["--sampling.max-tokens", "1000"],
            r"completions of 1000 are beyond the model's 1024 positions",
        ),
        (["--rewards", "json:nothing", "1"], r"there is no nothing in json"),
        (
            ["--rewards", "json:loads", "1"],
            r"^'\{\}' of .* cannot be scored: reward 'json:loads' failed: TypeError",
        ),
        (["--rewards", "json:dumps", "1"], r"'json:dumps'"),
    ],
)
def test_mistakes_are_one_line_before_anything_long_starts(options, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "run", options, *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_directory_of_something_else_is_left_alone(options, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and no run directory"):
        run(tmp_path, options)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def command(module, *arguments, cwd, **env):
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(CONFIGS.parent), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_commands_end_with_one_line_on_a_mistake(tmp_path):
    process = command("jaxgrpo.train", "--run.stepz", "5", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "error: unknown option --run.stepz; the nearest known one is --run.steps\n"


def test_a_run_keeps_the_secrets_of_its_rewards(monkeypatch, options, tmp_path, capfd):
    key = 'sk-live "ü" 0123456789'
    monkeypatch.setenv("JUDGE_API_KEY", key)
    (tmp_path / "judge.py").write_text(
        "import os\n"
        "def says(completion, row):\n"
        "    return float('a' in completion)\n"
        "def raises(completion, row):\n"
        "    raise RuntimeError('denied: ' + os.environ['JUDGE_API_KEY'])\n"
    )
    data = tmp_path / "data.jsonl"
    rows = [json.loads(r) for r in (CONFIGS / "invoices/train.jsonl").read_text().splitlines()[:8]]
    data.write_text(
        "".join(json.dumps(r | {"id": f"{key} {i}"}) + "\n" for i, r in enumerate(rows))
    )
    options = [*options, "--data.train", str(data), "--run.dir", str(tmp_path / "run")]
    options += ["--run.steps", "1", "--eval.samples", "0", "--signal.min-share", "0", "--rewards"]
    train(parse_args([*options, "graded", "1", f"{tmp_path}/judge.py:says", "1"]))
    denied = parse_args([*options, f"{tmp_path}/judge.py:raises", "1", "--run.fresh"])
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train(denied))
    assert end.value.code == 2
    out, err = capfd.readouterr()
    assert "denied: [JUDGE_API_KEY]" in err
    assert key not in out + err
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any("[JUDGE_API_KEY] 3" in file.read_text("latin-1") for file in files)
    for file in files:
        assert b"sk-live" not in file.read_bytes(), file
