"""A run directory: one run at a time, and only the run that it was."""

import dataclasses
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import Config, DataConfig, ModelConfig, RunConfig, UpdateConfig
from jaxgrpo.config_file import load_config
from jaxgrpo.identity import differences, digests, identity, sha256
from jaxgrpo.run_dir import open_run_dir
from jaxgrpo.types import TrainState

HOLD = """
import sys
from jaxgrpo.config import Config, RunConfig
from jaxgrpo.run_dir import open_run_dir
with open_run_dir(Config(run=RunConfig(dir=sys.argv[1])), {}, print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    """A run whose files are all there, each a few bytes."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (model / name).write_text(name)
    (model / "README.md").write_text("not read by a run")
    files = ("train.jsonl", "heldout.jsonl", "schema.json", "system.txt", "examples.jsonl")
    for name in files:
        (tmp_path / name).write_text(name)
    (tmp_path / "reward.py").write_text("def reward(completion, row): return 0.0")
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), steps=9),
        model=ModelConfig(path=str(model)),
        data=DataConfig(
            train=str(tmp_path / "train.jsonl"),
            heldout=(str(tmp_path / "heldout.jsonl"),),
            schema=str(tmp_path / "schema.json"),
            system=str(tmp_path / "system.txt"),
            examples=str(tmp_path / "examples.jsonl"),
        ),
        rewards={"graded": 1.0, f"{tmp_path}/reward.py:reward": 0.5, "json:loads": 0.1},
    )


def who(config):
    return identity(config, digests(config))


def save_step(config, step):
    open_again(config)
    state = TrainState({"w": jnp.ones(3)}, {"m": jnp.zeros(3)}, jnp.int32(step))
    with Checkpoints(f"{config.run.dir}/checkpoints") as checkpoints:
        checkpoints.save(step, state, {"identity": who(config)})


def open_again(config):
    said = []
    with open_run_dir(config, who(config), said.append) as (_, step):
        return step, said


def test_digests_are_those_of_the_files(config, tmp_path):
    files = digests(config)
    assert files.keys() == {
        "data.train",
        "data.heldout[0]",
        "data.schema",
        "data.system",
        "data.examples",
        "the source of rewards.reward.py:reward",
        "the source of rewards.json:loads",
        "model.path/config.json",
        "model.path/model.safetensors",
        "model.path/tokenizer.json",
        "model.path/chat_template.jinja",
    }
    (tmp_path / "any").write_bytes(np.random.default_rng().bytes(100_000))
    out = subprocess.run(["sha256sum", tmp_path / "any"], capture_output=True, check=True).stdout
    assert sha256([tmp_path / "any"]) == [out.split()[0].decode()]
    assert json.loads(json.dumps(who(config))) == who(config)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("train.jsonl", "data.train"),
        ("heldout.jsonl", "data.heldout[0]"),
        ("schema.json", "data.schema"),
        ("system.txt", "data.system"),
        ("examples.jsonl", "data.examples"),
        ("reward.py", "the source of rewards.reward.py:reward"),
        ("model/tokenizer.json", "model.path/tokenizer.json"),
        ("model/chat_template.jinja", "model.path/chat_template.jinja"),
        ("model/model.safetensors", "model.path/model.safetensors"),
    ],
)
def test_a_changed_file_is_refused_with_its_name(config, tmp_path, file, name):
    save_step(config, 3)
    assert open_again(config) == (3, [])
    with (tmp_path / file).open("a") as f:
        f.write(" ")
    with pytest.raises(
        ValueError,
        match=rf"another {re.escape(name)} \(sha256 \w{{12}} before, sha256 \w{{12}} now\): use",
    ):
        open_again(config)
    allowed = dataclasses.replace(config, run=dataclasses.replace(config.run, allow_change=True))
    step, (line,) = open_again(allowed)
    assert (step, line.startswith("goes on with another ")) == (3, True)
    assert not load_config(tmp_path / "run" / "config.toml").run.allow_change


def test_changed_settings_are_refused_with_both_values(config):
    save_step(config, 3)
    other = dataclasses.replace(config, update=UpdateConfig(lr=0.5, b1=0.25))
    with pytest.raises(
        ValueError, match=r"another update\.lr \(1e-06 before, 0\.5 now\), update\.b1 \(0\.9 before"
    ):
        open_again(other)
    # Where files lie, how long a run is and how it is watched may change.
    moved = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=20, stall=5.0))
    assert open_again(moved) == (3, [])
    # With a schedule that ends with the run its length decides the learning rate.
    linear = dataclasses.replace(config, update=UpdateConfig(schedule="linear"))
    now = dataclasses.replace(moved, update=linear.update)
    assert differences(who(linear), who(now)) == ["run.steps (9 before, 20 now)"]


def test_one_run_at_a_time_and_the_dead_do_not_count(config):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, config.run.dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {first.pid} on .*wait for"):
            open_again(config)
        # Not even to throw it away.
        fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=True))
        with pytest.raises(ValueError, match="is in use by"):
            open_again(fresh)
        first.kill()
    assert open_again(config) == (None, [])
    assert open_again(config) == (None, [])


def test_a_missing_checkpoint_is_no_reason_to_start_anew_in_silence(config, tmp_path):
    save_step(config, 3)
    for file in (tmp_path / "run" / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):  # nor when the checkpoint was set aside before
        with pytest.raises(ValueError, match=r"has no sound checkpoint left: use --run\.fresh"):
            open_again(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=True))
    assert open_again(fresh) == (None, [])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_killed_before_its_first_file_was_whole_is_started_again(config, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "lock").write_text("1 on here\n")
    (run_dir / "config.toml.new").write_text("[run]\nste")
    assert open_again(config) == (None, [])
    assert load_config(run_dir / "config.toml").run.steps == 9
    assert not (run_dir / "config.toml.new").exists()


def test_fresh_throws_away_what_runs_write_and_nothing_else(config, tmp_path):
    save_step(config, 3)
    run_dir = tmp_path / "run"
    written = [
        "eval.jsonl",
        "answers.jsonl",
        "report.html",
        "curve.png",
        "rewards_0.log",
        "mlflow.id",
    ]
    for name in [*written, "notes.txt", "mine.jsonl"]:
        (run_dir / name).write_text("x")
    (run_dir / "tensorboard").mkdir()
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=True))
    assert open_again(fresh) == (None, [])
    assert not any((run_dir / name).exists() for name in [*written, "checkpoints", "tensorboard"])
    assert (run_dir / "notes.txt").exists()
    assert (run_dir / "mine.jsonl").exists()
