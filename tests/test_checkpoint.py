"""Checkpoints: bit-equal on any mesh, safe from donation and kills, clear on what does not fit."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from orbax.checkpoint import v1 as ocp

from jaxgrpo.checkpoint import Checkpoints, abstract_on, load_run_model
from jaxgrpo.models.hf import export_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sharding import param_shardings
from jaxgrpo.types import TrainState

SHAPE = Qwen3Config(vocab=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=32)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 9)))


def new_state(seed: int, shape: Qwen3Config = SHAPE) -> TrainState:
    """A state of random numbers, as after `seed` updates."""
    rng = np.random.default_rng(seed)

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == jnp.int32:
            return jax.device_put(np.full(x.shape, seed, np.int32))
        return jax.device_put(rng.standard_normal(x.shape, np.float32))

    def init():
        model = Qwen3(shape, nnx.Rngs(0))
        return TrainState(model, TX.init(model), jnp.int32(0))

    return jax.tree.map(leaf, jax.eval_shape(init))


def mesh_of(fsdp: int, tp: int) -> Mesh:
    return jax.make_mesh(
        (fsdp, tp),
        ("fsdp", "tp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: fsdp * tp],
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_leaf_and_the_data_come_back_as_they_were(tmp_path):
    state = new_state(3)
    # What a comparison of numbers would not see: -0.0, denormals; the largest; other dtypes.
    odd = np.array([0x80000000, 0x00000001, 0xFF7FFFFF], np.uint32).view(np.float32)
    state.model.norm[...] = state.model.norm[...].at[:3].set(odd)
    opt_state = (state.opt_state, state.model.embed[...].astype(jnp.bfloat16), jnp.int32(2**31 - 1))
    state = state._replace(opt_state=opt_state)
    data = {"epoch": 2, "seed": 2**63 - 1, "best": 0.1, "ids": ["a", "ü"], "none": None, "f": False}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, data)
    restored, found = Checkpoints(tmp_path).restore(3, abstract_on(state))
    assert_same_bits(restored, state)
    assert type(restored.opt_state[0][1][0]) is optax.ScaleByAdamState
    assert found == data
    assert type(found["epoch"]) is int


def test_the_state_may_be_donated_and_the_data_changed_once_save_returns(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 + 7, state)

    big = dataclasses.replace(SHAPE, vocab=4096, width=64)
    data = {"seen": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            state = new_state(step, big)
            checkpoints.save(step, state, data)
            data["seen"].append(2)
            overwritten = jax.block_until_ready(overwrite(state))
            for old in jax.tree.leaves(state):
                old.delete()  # those that the donation has left
            assert (overwritten.model.embed[...] == 7).all()
    for step in range(4):
        state = new_state(step, big)
        restored, found = checkpoints.restore(step, abstract_on(state))
        assert_same_bits(restored, state)
        assert found == {"seen": [1] + [2] * step}


@pytest.mark.parametrize(
    ("saved_on", "restored_on"), [((4, 1), (1, 1)), ((1, 1), (4, 1)), ((2, 2), (1, 4))]
)
def test_another_mesh_gets_the_same_bits_in_its_own_shardings(tmp_path, saved_on, restored_on):
    shape = dataclasses.replace(SHAPE, kv_heads=4)
    plain = new_state(1, shape)
    state = jax.device_put(plain, param_shardings(plain, mesh_of(*saved_on)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    mesh = mesh_of(*restored_on)
    restored, _ = checkpoints.restore(1, abstract_on(state, mesh))
    assert_same_bits(restored, plain)
    q = restored.model.layers.q[...]
    assert q.sharding == NamedSharding(mesh, jax.P(None, "fsdp", "tp", None))
    assert len(q.addressable_shards) == restored_on[0] * restored_on[1]
    moment = restored.opt_state[1][0].mu.layers.q[...]
    assert moment.sharding == q.sharding


def test_what_a_save_keeps_and_removes(tmp_path):
    state = new_state(1)
    killed = tmp_path / "15.unfinished.orbax-checkpoint-tmp"
    killed.mkdir()
    (killed / "half").write_text("of a checkpoint")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100, 20):
        checkpoints.save(step, state, {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 100]
    assert checkpoints.latest() == 100
    assert sorted(os.listdir(tmp_path)) == ["100", "20"]
    with Checkpoints(tmp_path) as everything:
        everything.save(101, state, {})
        everything.save(102, state, {})
    assert everything.steps() == [20, 100, 101, 102]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1), {"first": True})
        with pytest.raises(ValueError, match="there is a checkpoint of step 1 already"):
            checkpoints.save(1, new_state(2), {})
    assert checkpoints.restore(1, abstract_on(new_state(1)))[1] == {"first": True}


def test_the_arrays_are_stored_under_readable_names(tmp_path):
    state = new_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    stored = ocp.metadata(tmp_path / "1").metadata
    assert {"model.embed", "model.layers.q", "opt_state.1.0.nu.layers.q", "step"} <= stored.keys()
    assert len(stored) == len(jax.tree.leaves(state))


def test_a_part_of_the_state_is_read_alone(tmp_path):
    state = new_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, {"model": abstract_on(state.model)})
    assert_same_bits(restored, {"model": state.model})


def test_what_does_not_fit_is_named(tmp_path):
    state = new_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {})

    wide = dataclasses.replace(SHAPE, ffn=48)
    with pytest.raises(
        ValueError, match=r"model.layers.down is float32\[2, 32, 16\] in it and"
    ) as e:
        checkpoints.restore(7, abstract_on(new_state(1, wide)))
    assert str(e.value) == (
        f"{tmp_path}/7: is of another model or optimiser: model.layers.down is"
        " float32[2, 32, 16] in it and float32[2, 48, 16] here (and 8 more)"
    )
    untied = abstract_on(new_state(1, dataclasses.replace(SHAPE, tied=False)).model)
    with pytest.raises(
        ValueError, match=r"model.lm_head is absent in it and float32\[64, 16\] here$"
    ):
        checkpoints.restore(7, {"model": untied})
    sgd = state._replace(opt_state=optax.sgd(1e-3, momentum=0.9).init(state.model))
    with pytest.raises(ValueError, match=r"opt_state.0.trace.embed is absent in it and float32"):
        checkpoints.restore(7, abstract_on(sgd))
    half = abstract_on(state.model.cast(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"model.embed is float32\[64, 16\] in it and bfloat16"):
        checkpoints.restore(7, {"model": half})
    with pytest.raises(ValueError, match=r"no checkpoint of step 8; there are: 7$"):
        checkpoints.restore(8, abstract_on(state))
    with pytest.raises(ValueError, match="no checkpoint of step 0; there are: none"):
        Checkpoints(tmp_path / "nowhere").restore(0, abstract_on(state))


def files_of(directory):
    """Those that are not empty."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def contents(directory):
    """Names, times and bytes of all that is in a directory."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


def test_a_flipped_bit_is_noticed_named_and_the_step_before_it_used(tmp_path):
    states = [new_state(step) for step in range(3)]
    with Checkpoints(tmp_path / "sound") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, states[step], {"step": step})
    names = [path.relative_to(tmp_path / "sound") for path in files_of(tmp_path / "sound" / "2")]
    chosen = {Path("2/manifest.json"), *random.sample(names, 4)}
    for i, name in enumerate(sorted(chosen)):
        directory = tmp_path / str(i)
        shutil.copytree(tmp_path / "sound", directory)
        flip_a_bit(directory / name)
        inside = name.relative_to("2").as_posix()

        for use in (lambda c: c.verify(2), lambda c: c.restore(2, abstract_on(states[2]))):
            with pytest.raises(
                ValueError, match=re.escape(f"{directory}/2: {inside!r} is damaged")
            ):
                use(Checkpoints(directory))
        said = []
        checkpoints = Checkpoints(directory)
        assert checkpoints.newest_sound(said.append) == 1
        (line,) = said
        assert line.startswith(f"{directory}/2: {inside!r} is damaged")
        assert line.endswith("; step 2 is set aside as 2.damaged")
        assert sorted(os.listdir(directory)) == ["1", "2.damaged"]
        assert checkpoints.steps() == [1]
        restored, data = checkpoints.restore(1, abstract_on(states[1]))
        assert_same_bits(restored, states[1])
        assert data == checkpoints.data(1) == {"step": 1}


def test_a_step_that_was_set_aside_is_saved_anew(tmp_path):
    said = []
    for name in ("5.damaged", "5.damaged2"):
        checkpoints = Checkpoints(tmp_path, keep=2)
        for step in sorted({4, 5} - set(checkpoints.steps())):
            checkpoints.save(step, new_state(step), {})
        checkpoints.wait()
        file = random.choice(files_of(tmp_path / "5"))
        file.unlink()
        assert Checkpoints(tmp_path).newest_sound(said.append) == 4
        inside = file.relative_to(tmp_path / "5").as_posix()
        assert said.pop() == f"{tmp_path}/5: {inside!r} is missing; step 5 is set aside as {name}"
        assert (tmp_path / name).is_dir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, new_state(5), {})
    assert sorted(os.listdir(tmp_path)) == ["5", "5.damaged", "5.damaged2"]
    restored, _ = Checkpoints(tmp_path).restore(5, abstract_on(new_state(5)))
    assert_same_bits(restored, new_state(5))


def test_where_nothing_is_sound_all_is_set_aside(tmp_path):
    assert Checkpoints(tmp_path / "none").newest_sound(pytest.fail) is None
    with Checkpoints(tmp_path) as checkpoints:
        for step in (9, 10):
            checkpoints.save(step, new_state(0), {})
    for step in (9, 10):
        flip_a_bit(random.choice(files_of(tmp_path / str(step))))
    (tmp_path / "11").symlink_to(tmp_path / "9")
    (tmp_path / "12.unfinished.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "13").write_text("")
    said = []
    assert Checkpoints(tmp_path).newest_sound(said.append) is None
    assert [re.search(r"step (\d+) is set aside", line)[1] for line in said] == [
        *("13", "11", "10", "9")
    ]
    assert sorted(os.listdir(tmp_path)) == [f"{step}.damaged" for step in (10, 11, 13, 9)]
    assert Checkpoints(tmp_path).newest_sound(pytest.fail) is None


def test_the_best_step_is_kept_beside_the_newest(tmp_path):
    kept = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, best in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5), (7, 5), (8, None)):
            checkpoints.save(step, new_state(0), {}, best)
            kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7], [7, 8]]


def test_without_room_a_save_changes_nothing(tmp_path, monkeypatch):
    state = new_state(1)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    before = contents(tmp_path)

    def free(amount):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=amount))

    free(math.ceil(1.2 * size) - 1)
    with pytest.raises(OSError, match="no room") as refused:
        checkpoints.save(2, state, {})
    assert str(refused.value) == (
        f"{tmp_path}: no room for the checkpoint of step 2: it needs {1.2 * size / 1e6:,.1f} MB,"
        f" and {1.2 * size / 1e6:,.1f} MB are free; the earlier steps are intact. Make room, be it"
        " by removing older steps, or mend the disk; the same command then goes on from the newest"
    )
    assert contents(tmp_path) == before
    free(math.ceil(1.2 * size))
    checkpoints.save(2, state, {})
    assert checkpoints.steps() == [2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, value):
    state = new_state(1)
    mu = state.opt_state[1][0].mu.layers.down
    mu[...] = mu[...].at[1, 2, 3].set(value)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="not finite") as refused:
            checkpoints.save(3, state, {})
        assert str(refused.value) == (
            "step 3 is not saved: opt_state.1.0.mu.layers.down holds a value that is not finite."
            " The earlier steps are intact; lower update.lr, and the same command goes on from"
            " there"
        )
    assert os.listdir(tmp_path) == []


def test_the_data_of_a_step_is_read_alone(tmp_path):
    data = {"identity": {"a": ["b", 1]}, "best": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1), data)
    assert Checkpoints(tmp_path).data(1) == data


def test_a_save_that_failed_is_not_hidden_by_leaving(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)  # of the manifest, when all else is written

    def save(error=None):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, new_state(1), {})
            if error is not None:
                raise error

    with pytest.raises(OSError, match=r"step 1 could not be written \(No space left on device\)"):
        save()
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError):  # the first error is the one to tell
        save(KeyError())
    assert os.listdir(tmp_path) == []


def start(script: str, *args: str) -> subprocess.Popen:
    """A Python process that imports what this one can."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


SAVE_FOR_EVER = """
import sys
from jaxgrpo.checkpoint import Checkpoints
from test_checkpoint import new_state

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = checkpoints.latest() or 0
    while True:
        step += 1
        checkpoints.save(step, new_state(step), {"step": step})
        print(step, flush=True)
"""


def test_a_killed_save_leaves_the_step_before_it(tmp_path):
    rng = random.Random(0)
    checkpoints = Checkpoints(tmp_path)
    newest = 0
    for _ in range(3):
        with start(SAVE_FOR_EVER, str(tmp_path)) as process:
            for _ in range(rng.randint(3, 6)):
                started = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            assert process.stderr.read() == ""

        assert checkpoints.latest() >= started - 1 > newest
        newest = checkpoints.latest()
        for step in checkpoints.steps():
            state = new_state(step)
            restored, data = checkpoints.restore(step, abstract_on(state))
            assert_same_bits(restored, state)
            assert data == {"step": step}


FILL_THE_DISK = """
import os, resource, sys
from jaxgrpo.checkpoint import Checkpoints, abstract_on
from test_checkpoint import assert_same_bits, new_state

checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, new_state(1), {})
checkpoints.wait()
# Writes beyond this size fail, as they do on a full disk.
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, unlimited[1]))
checkpoints.save(2, new_state(2), {})
try:
    checkpoints.wait()
except OSError as error:
    print("failed:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
print(checkpoints.steps())
assert_same_bits(checkpoints.restore(1, abstract_on(new_state(1)))[0], new_state(1))
checkpoints.save(2, new_state(2), {})
checkpoints.wait()
print(os.listdir(sys.argv[1]))
"""


def test_a_failed_save_is_reported_and_leaves_the_step_before_it(tmp_path):
    # In a process of its own: Orbax's other writers have their say on stderr too.
    with start(FILL_THE_DISK, str(tmp_path)) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    failed, steps, files = out.splitlines()
    assert failed == (
        f"failed: {tmp_path}: the checkpoint of step 2 could not be written (File too large); the"
        " earlier steps are intact. Make room, be it by removing older steps, or mend the disk; the"
        " same command then goes on from the newest"
    )
    assert (steps, files) == ("[1]", "['2']")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of which steps 2 and 4 are kept."""
    root = tmp_path_factory.mktemp("run")
    export_hf(new_state(0).model, None, root / "base")
    (root / "run").mkdir()
    (root / "run" / "config.toml").write_text(
        f'[model]\npath = {json.dumps(str(root / "base"))}\ndtype = "bfloat16"\n'
    )
    with Checkpoints(root / "run" / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, new_state(step), {})
    return root / "run"


@pytest.mark.parametrize(("step", "expected"), [(None, 4), (4, 4), (2, 2)])
def test_a_runs_model_is_restored_by_its_directory(run_dir, step, expected):
    model, config, found = load_run_model(run_dir, step)
    assert found == expected
    assert model.config.dtype == config.model.dtype == "bfloat16"
    for x, y in zip(
        jax.tree.leaves(model), jax.tree.leaves(new_state(expected).model), strict=True
    ):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


def test_a_runs_model_is_restored_on_a_mesh_and_computes(run_dir):
    mesh = mesh_of(2, 2)
    model, _, _ = load_run_model(run_dir, mesh=mesh)
    assert model.embed[...].sharding == NamedSharding(mesh, jax.P("tp", "fsdp"))
    ids = jnp.zeros((1, 3), jnp.int32)
    assert jax.jit(Qwen3.logits)(model, ids).shape == (1, 3, 64)


def test_a_directory_that_is_no_run_is_refused(tmp_path, run_dir):
    with pytest.raises(ValueError, match="nowhere: no such run directory"):
        load_run_model(tmp_path / "nowhere")
    (tmp_path / "config.toml").write_text((run_dir / "config.toml").read_text())
    with pytest.raises(ValueError, match=r"has no checkpoint yet$"):
        load_run_model(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; there are: 2, 4$"):
        load_run_model(run_dir, 3)


def test_a_damaged_step_of_a_run_is_refused_and_nothing_changed(tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    damaged = random.choice(files_of(steps / "4"))
    flip_a_bit(damaged)
    (steps / "5.unfinished").mkdir()  # a save of the run, which may be alive
    before = contents(tmp_path)
    inside = damaged.relative_to(steps / "4").as_posix()
    for step in (None, 4):
        with pytest.raises(ValueError, match=re.escape(f"{steps}/4: {inside!r} is damaged")) as e:
            load_run_model(tmp_path / "run", step)
        assert str(e.value).endswith(
            ": name another step where there is a --step, or run the training command again, which"
            " sets step 4 aside and goes on from the one before"
        )
    assert load_run_model(tmp_path / "run", 2)[2] == 2
    assert contents(tmp_path) == before
