"""The processes that the rows about checkpoints start (`scripts.inject.store`).

    python -m scripts.inject.saver for-ever DIR
    python -m scripts.inject.saver fail DIR FAULT SEED
    python -m scripts.inject.saver on-tmpfs DIR FAULT SEED
    python -m scripts.inject.saver on-mesh save|restore DIR FSDP,TP SEED [PROCESS PORT]

Faults: `full` is a disk without room, `fills` one whose room goes while the save writes,
`read-only` one that is mounted anew, `write` and `fsync` fail with EIO in the kernel.
"""

import ctypes
import errno
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxgrpo import cluster
from jaxgrpo.checkpoint import Checkpoints, abstract_on
from jaxgrpo.cli import run_main
from jaxgrpo.config import ClusterConfig, GrpoConfig, MeshConfig, UpdateConfig
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sharding import fetch, make_mesh, param_shardings, put_batch
from jaxgrpo.types import Completions, Prompts, RolloutBatch, TrainState
from jaxgrpo.update import init_train_state, make_optimizer, train_step

SHAPE = Qwen3Config(vocab=64, width=64, layers=2, heads=8, kv_heads=8, head_dim=8, ffn=128)
TX = make_optimizer(UpdateConfig(lr=1e-3), 10)
DISK_MB = 16


def random_state(seed: int) -> TrainState:
    """A state of random bits that are numbers: about 1.1 MB."""
    rng = np.random.default_rng(seed)

    def leaf(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == jnp.int32:
            return np.full(x.shape, seed, np.int32)
        return rng.standard_normal(x.shape, np.float32)

    def init() -> TrainState:
        model = Qwen3(SHAPE, nnx.Rngs(0))
        return TrainState(model, TX.init(model), jnp.int32(0))

    return jax.device_put(jax.tree.map(leaf, jax.eval_shape(init)))


def check_holds(checkpoints: Checkpoints, step: int) -> None:
    """Raises AssertionError unless a step holds the random state of its number, to the bit."""
    want = random_state(step)
    found, data = checkpoints.restore(step, abstract_on(want))
    assert data == {"step": step}, f"step {step} has the data {data}"
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    for x, y in leaves:
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"step {step} has other bits"


def save_for_ever(directory: str) -> None:
    """Saves step after step, and says so before each."""
    with Checkpoints(directory, keep=2) as checkpoints:
        step = checkpoints.latest() or 0
        while True:
            step += 1
            state = random_state(step)
            checkpoints.wait()
            print(step, flush=True)
            checkpoints.save(step, state, {"step": step})


def fail(directory: str, fault: str, seed: str) -> None:
    """Saves step 2 while something is done to it, which ends the process as it would a run."""
    break_it = {
        "full": partial(fill, directory, 10_000),
        "fills": partial(fill, directory, random.Random(int(seed)).randrange(1_000_000)),
        "read-only": partial(remount, directory, "ro"),
        "write": partial(forbid, "write", "pwrite64"),
        "fsync": partial(forbid, "fsync", "fdatasync"),
    }[fault]
    state = random_state(2)
    if fault in ("full", "read-only"):
        break_it()
    else:  # once it has been looked whether there is room
        _call_first(ocp, "save_async", break_it)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, state, {"step": 2})


def fail_and_go_on(directory: str, fault: str, seed: str) -> None:
    """Step 1 is saved, step 2 is not because of a fault, and then it is.

    Raises:
      AssertionError: what must hold when a save fails does not.
    """
    checkpoints = Checkpoints(Path(directory) / "checkpoints")
    checkpoints.save(1, random_state(1), {"step": 1})
    checkpoints.wait()

    command = [*PROGRAM, "fail", checkpoints.directory, fault, seed]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = ended.stderr
    assert ended.returncode == 2, f"exit code {ended.returncode}: {said}"
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert "the earlier steps are intact" in said, said
    there = sorted(path.name for path in checkpoints.directory.iterdir())
    assert there == ["1"], f"there are {there}"
    check_holds(Checkpoints(checkpoints.directory), 1)

    if fault == "read-only":
        remount(directory, "rw")
    (Path(directory) / "filler").unlink(missing_ok=True)
    again = Checkpoints(checkpoints.directory)
    assert again.newest_sound(print) == 1
    again.save(2, random_state(2), {"step": 2})
    again.wait()
    check_holds(Checkpoints(checkpoints.directory), 2)
    print(said, end="")


def on_tmpfs(directory: str, fault: str, seed: str) -> None:
    """`fail_and_go_on` on a small disk, which goes with the mount namespace of this process."""
    options = f"size={DISK_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    fail_and_go_on(directory, fault, seed)


def fill(directory: str, left: int) -> None:
    """Takes all but so many bytes, to the page, of the disk for a file beside a directory."""
    disk = os.statvfs(directory)
    with (Path(directory).parent / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - left))


def remount(directory: str, how: str) -> None:
    """Mounts the disk of a directory anew, `ro` or `rw`."""
    disk = Path(directory)
    while not disk.is_mount():
        disk = disk.parent
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jump_true", ctypes.c_ubyte),
        ("jump_false", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


_CALLS = {
    "x86_64": {"write": 1, "pwrite64": 18, "fsync": 74, "fdatasync": 75, "seccomp": 317},
    "aarch64": {"write": 64, "pwrite64": 68, "fsync": 82, "fdatasync": 83, "seccomp": 277},
}


def forbid(*names: str) -> None:
    """Has the kernel answer EIO to system calls, of all threads and for good.

    Those on the first three file descriptors go on working.
    """
    numbers = _CALLS[platform.machine()]
    load, equal, greater, answer = 0x20, 0x15, 0x25, 0x06
    program = [(load, 0, 0, 0)]  # the call's number
    for i, name in enumerate(names):
        program.append((equal, len(names) - i, 0, numbers[name]))
    program += [
        (answer, 0, 0, 0x7FFF0000),  # allowed
        (load, 0, 0, 16),  # its first argument
        (greater, 1, 0, 2),
        (answer, 0, 0, 0x7FFF0000),
        (answer, 0, 0, 0x00050000 | errno.EIO),
    ]
    instructions = (_Instruction * len(program))(*program)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, all_threads = 38, 1, 1
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    whole = _Filter(len(program), instructions)
    done = libc.syscall(numbers["seccomp"], set_filter, all_threads, ctypes.byref(whole))
    assert done == 0, os.strerror(ctypes.get_errno())


def on_mesh(do: str, directory: str, sizes: str, seed: str, *place: str) -> None:
    """Saves a state after two updates, or restores it, on a mesh; then does the next update.

    Prints the digests of what is in the checkpoint and the loss, as JSON.
    """
    config = ClusterConfig()
    if place:
        config = ClusterConfig(f"127.0.0.1:{place[1]}", 2, int(place[0]))
    with cluster.join(config):
        mesh = make_mesh(MeshConfig(*map(int, sizes.split(","))))
        with jax.set_mesh(mesh), Checkpoints(directory) as checkpoints:
            if do == "save":
                model = Qwen3(SHAPE, nnx.Rngs(int(seed)))
                model = jax.device_put(fetch(model), param_shardings(model, mesh))
                state = init_train_state(model, TX, mesh)
                for step in (1, 2):
                    state, _ = update(state, int(seed) + step)
                checkpoints.save(2, state, {"step": 2})
            else:
                abstract = jax.eval_shape(
                    lambda: init_train_state(Qwen3(SHAPE, nnx.Rngs(0)), TX, mesh)
                )
                state, _ = checkpoints.restore(2, abstract_on(abstract, mesh))
            digests = [
                [str(x.dtype), *x.shape, hashlib.sha256(np.asarray(x).tobytes()).hexdigest()]
                for x in jax.tree.leaves(fetch(state))
            ]
            _, loss = update(state, int(seed) + 3)
        if cluster.is_main():
            print(json.dumps({"digests": digests, "loss": loss}))


def update(state: TrainState, seed: int) -> tuple[TrainState, float]:
    """One update on a random batch, and its loss."""
    rng = np.random.default_rng(seed)
    p, g, length, c = 8, 4, 12, 6
    batch = RolloutBatch(
        Prompts(
            rng.integers(0, SHAPE.vocab, (p, length)).astype(np.int32),
            rng.integers(0, length + 1, p).astype(np.int32),
            rng.integers(0, SHAPE.vocab, p).astype(np.int32),
        ),
        Completions(
            rng.integers(0, SHAPE.vocab, (p, g, c)).astype(np.int32),
            rng.normal(-4, 0.3, (p, g, c)).astype(np.float32),
            rng.integers(1, c + 1, (p, g)).astype(np.int32),
            rng.random((p, g)) < 0.5,
        ),
        rng.normal(size=(p, g)).astype(np.float32),
        rng.random((p, g)) < 0.8,
    )
    reference_PGC = rng.normal(-4, 0.5, (p, g, c)).astype(np.float32)
    state, metrics = train_step(
        state,
        *put_batch((batch, None, reference_PGC), jax.sharding.get_mesh()),
        tx=TX,
        config=GrpoConfig(kl_beta=0.3),
        microbatches=1,
        temperature=1.0,
        max_tokens=c,
        chunk_bytes=1 << 30,
    )
    return state, float(jax.device_get(metrics["loss"]))


def _call_first(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Has something done before each call of a function."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        action()
        return function(*args, **kwargs)

    setattr(owner, name, call)


PROGRAM = (sys.executable, "-m", "scripts.inject.saver")
COMMANDS: dict[str, Callable[..., None]] = {
    "for-ever": save_for_ever,
    "fail": fail,
    "fail-and-go-on": fail_and_go_on,
    "on-tmpfs": on_tmpfs,
    "on-mesh": on_mesh,
}

if __name__ == "__main__":
    run_main(lambda: COMMANDS[sys.argv[1]](*sys.argv[2:]))
