"""The doctor's lines and exit code: on the shipped example, and on copies with one fault each."""

import importlib.metadata
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import jax
import pytest

import jaxgrpo.doctor
from jaxgrpo import machine
from jaxgrpo.machine import free_memory
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN = CONFIGS / "invoices" / "train.jsonl"


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path):
    """The command in this process: its exit code and its lines by mark; one reward for speed."""

    def run(*options, rewards=("fields", "1")):
        where = ["--run.dir", str(tmp_path / "run"), "--rewards", *rewards]
        monkeypatch.setattr(sys, "argv", ["doctor", *where, *options])
        with pytest.raises(SystemExit) as end:
            jaxgrpo.doctor.main()
        lines = capsys.readouterr().out.splitlines()
        assert all(line[:4] in ("ok  ", "no  ", "--  ") for line in lines)
        assert not (tmp_path / "run").exists()
        return end.value.code, [x for x in lines if x[:2] == "no"], "\n".join(lines)

    return run


@pytest.fixture
def changed(tmp_path):
    """A copy of the first training lines, changed by a function of the list of lines."""

    def make(change):
        lines = TRAIN.read_text("utf-8").splitlines()[:20]
        file = tmp_path / "train.jsonl"
        file.write_text("\n".join(change(lines)), "utf-8")
        return file

    return make


def test_the_shipped_example_is_fit(doctor):
    code, faults, said = doctor(rewards=("graded", "1", "fields", "1"))
    assert (code, faults) == (0, [])
    assert f"ok  {len(jax.devices())} x cpu (cpu)" in said
    graded = SchemaReward(load_schema(CONFIGS / "invoices" / "schema.json"), "graded")("{}")
    assert f"reward graded: 1 for the ground truth, {graded:g} for {{}} of {TRAIN}:1" in said
    assert f"reward fields: 1 for the ground truth, 0 for {{}} of {TRAIN}:1" in said


def test_libraries_that_do_not_belong_together(doctor, monkeypatch):
    version = importlib.metadata.version
    fake = {"jaxlib": "0.4.1", "optax": "0.9"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fake.get(name) or version(name))
    code, faults, _ = doctor()
    assert code == 1
    assert sorted(line.split(",")[0] for line in faults) == [
        "no  jaxlib is 0.4.1",
        "no  optax is 0.9",
    ]
    assert f"jax {version('jax')} needs jaxlib<=" in "".join(faults)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/a/b", "a/b", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,memory:/a/b",
            "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_memory_is_what_the_machine_has_and_the_cgroup_allows(tmp_path, line, folder, names):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert free_memory(proc, cgroups) is None
    (proc / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    1000 kB\n")
    (proc / "self" / "cgroup").write_text(f"3:pids:/c\n{line}\n")
    assert free_memory(proc, cgroups) == 1_024_000
    limit, usage, cache = names
    group = cgroups / folder
    group.mkdir(parents=True)
    (group / usage).write_text("600\n")
    (group / "memory.stat").write_text(f"anon 500\n{cache} 100\n")
    for most, free in (("1000\n", 500), (f"{2**60}\n", 1_024_000)):
        (group / limit).write_text(most)
        assert free_memory(proc, cgroups) == free


def test_no_room_in_the_memory(doctor, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 300_000_000)
    code, [fault], _ = doctor()
    assert code == 1
    assert fault.startswith("no  host memory: 0.30 GB free, about ")


def test_no_room_on_the_disk(doctor, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**7))
    code, [fault], _ = doctor()
    assert code == 1
    # 574,528 parameters and their two moments: three kept checkpoints and room for one.
    assert "0.01 GB free, 0.03 GB needed for checkpoints: make room" in fault


def test_every_faulty_line_is_named_up_to_ten(doctor, changed):
    file = changed(lambda lines: ["\x1b[31m{", *lines, '{"id": 7}'])
    code, faults, said = doctor("--data.train", str(file))
    assert code == 1
    assert [line.partition(": ")[0] for line in faults] == [f"no  {file}:1", f"no  {file}:22"]
    assert "\x1b" not in said
    file = changed(lambda lines: [*lines, *["{"] * 13])
    _, faults, _ = doctor("--data.train", str(file))
    assert len(faults) == 11
    assert "3 more lines are faulty" in faults[-1]


def test_what_is_held_out_must_not_be_trained_on(doctor, changed):
    heldout = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines()
    file = changed(lambda lines: [*lines, json.dumps(json.loads(heldout[4]) | {"id": "new"})])
    options = ["--data.heldout", str(CONFIGS / "invoices" / "heldout_50.jsonl")]
    code, [fault], _ = doctor("--data.train", str(file), *options)
    assert code == 1
    assert f"heldout_50.jsonl:5: is trained on, as {file}:21; in all 1 of 50" in fault


def test_lines_that_repeat_another(doctor, changed):
    file = changed(lambda lines: [*lines, json.dumps(json.loads(lines[2]) | {"id": "new"})])
    code, [fault], _ = doctor("--data.train", str(file))
    assert code == 1
    assert f"{file}:21: the messages are those of line 3; in all 1 lines" in fault


def test_prompts_that_are_too_long_and_rows_without_truth(doctor, changed):
    def change(lines):
        row = json.loads(lines[3])
        row["messages"][-1]["content"] *= 20
        del row["ground_truth"]
        return [*lines[:3], json.dumps(row), *lines[4:]]

    code, [long, truth], _ = doctor("--data.train", str(changed(change)))
    assert code == 1
    assert "train.jsonl:4: the prompt has " in long
    assert "in all 1 of 20 prompts are longer than 128" in long
    assert "(lines 4)" in long
    assert "train.jsonl:4: no ground_truth for the reward `fields`; 1 of 20" in truth


def test_rewards_that_raise_or_hang_are_named_and_the_others_tried(doctor, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def raises(completion, row):\n    return 1 / (len(completion) - 2)\n\n"
        "def hangs(completion, row):\n    while True:\n        pass\n"
    )
    rewards = (f"{file}:raises", "1", f"{file}:hangs", "1", "fields", "1")
    code, [raises, hangs], said = doctor("--scoring.deadline", "1", rewards=rewards)
    assert code == 1
    assert "{} of" in raises
    assert f"{file}:2: ZeroDivisionError" in raises
    assert "longer than 1 s" in hangs or "more than 1 s of processor time" in hangs
    assert "ok  reward fields" in said


def test_a_broken_model_and_schema_do_not_hide_the_rest(doctor, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "objekt"}')
    system = tmp_path / "system.txt"
    system.write_text("")
    options = ("--model.path", str(tmp_path), "--data.schema", str(schema))
    options += ("--data.system", str(system))
    code, faults, _ = doctor(*options, "--update.b1", "1")
    assert code == 1
    for text in (
        "update.b1 is 1.0",
        "config.json",
        "no tokenizer in",
        "schema.json: ",
        "no system",
    ):
        assert any(text in fault for fault in faults), text


def test_a_gpu_that_jax_does_not_use(doctor, monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(jaxgrpo.machine, "DRIVER", driver)
    monkeypatch.setattr(jaxgrpo.machine, "has_plugin", lambda: False)
    code, faults, said = doctor()
    assert (code, faults) == (0, [])
    assert "--  there is an NVIDIA GPU, not used because JAX_PLATFORMS is cpu" in said
    monkeypatch.delenv("JAX_PLATFORMS")
    code, [fault], _ = doctor()
    assert code == 1
    assert "pip install 'jaxgrpo[cuda12]'" in fault
