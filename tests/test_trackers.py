"""Trackers get a run's numbers, each step once, and nothing that goes wrong with them ends it."""

import resource
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgrpo import trackers
from jaxgrpo.config import Config, RunConfig
from jaxgrpo.metrics import RunLog
from jaxgrpo.trackers import Trackers, check_installed


def share(rate):
    return {"count": 1, "rate": rate, "low": rate / 2, "high": 1.0}


def metrics(step, reward=0.5):
    return {
        "step": step, "reward_mean": reward, "kl": None, "seconds": {"sample": 2.0},
        "rewards": {"graded": 0.25, "/a/my.py:f": 1.0},
    }  # fmt: skip


def evaluation(step, temperature=0.0):
    return {
        "step": step, "data": "/data/held.jsonl", "temperature": temperature, "n": 4,
        "schema_valid": share(0.5), "reasons": {"valid": 2}, "seconds": 3.0,
        "reward_mean": 0.75, "rewards": {"graded": 0.5},
    }  # fmt: skip


def opened(run_dir, said, names=("tensorboard",)):
    return Trackers(Config(run=RunConfig(trackers=names)), run_dir, said.append)


def read(run_dir):
    """What TensorBoard shows: (step, name) to the values, files in order, later starts purging."""
    shown = {}
    for file in sorted((run_dir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = {key: x for key, x in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown.setdefault((event.step, value.tag), []).append(value.simple_value)
    return shown


def test_tensorboard_has_every_number_at_its_step(tmp_path):
    said = []
    with opened(tmp_path, said) as ours:
        log = RunLog(tmp_path, said.append, ours)
        log.rewind(-1)
        log.write("eval", [evaluation(0), evaluation(0, 1.0)])
        log.write("metrics", [metrics(1)])
        log.write("completions", [{"step": 1, "text": "x", "reward": 1.0}])
    rates = {"schema_valid": [0.5], "schema_valid_low": [0.25], "schema_valid_high": [1.0]}
    rates |= {"reward_mean": [0.75], "rewards/graded": [0.5]}
    expected = {
        (0, f"eval/held/{how}/{name}"): rate
        for how in ("greedy", "T=1")
        for name, rate in rates.items()
    }
    expected |= {(1, "reward_mean"): [0.5], (1, "rewards/graded"): [0.25]}
    expected |= {(1, "rewards/_a_my.py:f"): [1.0]}
    assert read(tmp_path) == expected | {(1, "seconds/sample"): [2.0]}
    assert said == []


def test_steps_that_are_done_again_are_there_once(tmp_path):
    for done, reward in ((-1, 0.5), (2, 0.75)):
        with opened(tmp_path, []) as ours:
            log = RunLog(tmp_path, print, ours)
            log.rewind(done)
            for step in range(max(done, 0) + 1, 5):
                log.write("metrics", [metrics(step, reward)])
    rewards = {step: x for (step, name), x in read(tmp_path).items() if name == "reward_mean"}
    assert rewards == {1: [0.5], 2: [0.5], 3: [0.75], 4: [0.75]}


class Remote:
    """A tracker that keeps what it has."""

    got: tuple = ()
    starts: tuple = ()
    broken = False

    def __init__(self, start):
        if self.broken:
            raise ConnectionError("away")
        Remote.starts += (start,)
        self.id = start.id or "id1"

    def log(self, step, values):
        if self.broken:
            raise ConnectionError("away")
        Remote.got += (step,)

    def finish(self, failed):
        Remote.got += ("failed" if failed else "finished",)


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setitem(trackers._KINDS, "mlflow", (Remote, "mlflow"))
    for name in ("got", "starts"):
        monkeypatch.setattr(Remote, name, ())
    return monkeypatch


def test_a_tracker_that_keeps_its_steps_goes_on_and_gets_none_twice(tmp_path, remote):
    secret = "not-for-others"
    remote.setenv("SOME_TOKEN", secret)
    run_dir = tmp_path / secret
    run_dir.mkdir()
    config = Config(run=RunConfig(dir=str(run_dir), trackers=("mlflow",)))
    for done in (-1, 2):
        with Trackers(config, run_dir, print) as ours:
            log = RunLog(run_dir, print, ours)
            log.rewind(done)
            for step in range(max(done, 0) + 1, 4 + max(done, 0)):
                log.write("metrics", [metrics(step)])
    assert Remote.got == (1, 2, 3, "finished", 4, 5, "finished")
    assert [start.id for start in Remote.starts] == [None, "id1"]
    assert Remote.starts[0].name == "[SOME_TOKEN]"
    assert secret not in str(Remote.starts[0].settings)


def test_one_that_fails_is_said_once_and_the_others_go_on(tmp_path, remote):
    said = []
    with opened(tmp_path, said, ("mlflow", "tensorboard")) as ours:
        log = RunLog(tmp_path, said.append, ours)
        log.rewind(-1)
        remote.setattr(Remote, "broken", True)
        for step in (1, 2):
            log.write("metrics", [metrics(step)])
    assert said == ["mlflow failed (ConnectionError: away): the run goes on without it"]
    assert {step for step, _ in read(tmp_path)} == {1, 2}
    with opened(tmp_path, said, ("mlflow",)) as ours:
        ours.start(2, {"metrics": 2, "eval": 0})  # a run that has begun goes on
        assert said[1:] == said[:1]
        with pytest.raises(ValueError, match=r"run\.trackers: mlflow does not start .*away"):
            ours.start(-1, {})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # file left open
def test_a_full_disk_ends_event_files_and_no_run(tmp_path):
    said = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path, said) as ours:
        ours.start(-1, {})
        ours.log("metrics", [metrics(1)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        try:
            for step in range(2, 9):
                ours.log("metrics", [metrics(step)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = said
    assert "tensorboard failed" in line
    assert "File too large" in line


def test_one_that_is_named_must_be_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(trackers._KINDS, "wandb", (Remote, "absent_tracker"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "absent_tracker").mkdir()  # a folder of that name, as trackers leave
    with pytest.raises(ValueError, match=r"'wandb'.* pip install absent_tracker, or"):
        check_installed(("auto", "wandb"))
    check_installed(("auto", "tensorboard"))


def test_none_is_imported_that_is_not_named():
    code = (
        "import sys, jaxgrpo.train, pathlib\n"
        "from jaxgrpo import trackers, config\n"
        "run = config.RunConfig(trackers=())\n"
        "trackers.check_installed(('auto',))\n"
        "trackers.Trackers(config.Config(run=run), pathlib.Path(), print).start(-1, {})\n"
        "print({'tensorboardX', 'wandb', 'trackio', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
