"""A checkpoint larger than a process may hold: each process reads what its devices are to have."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxgrpo.models.hf import export_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config

# One of two processes, with two of the four devices. What it may allocate beside what it has at the
# start is three quarters of the checkpoint; its devices' memory, on a CPU, is part of that.
PROCESS = """
import resource, sys
import jax, jax.numpy as jnp
from jaxgrpo.config import MeshConfig
from jaxgrpo.models.hf import load_hf
from jaxgrpo.sharding import make_mesh

path, port, process, size, divided = sys.argv[1], *map(int, sys.argv[2:])
address = f"127.0.0.1:{port}"
jax.distributed.initialize(
    address, 2, process, coordinator_bind_address=None if process else address
)
mesh = make_mesh(MeshConfig(4, 1))
jnp.zeros(1).block_until_ready()

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

data, resident = status("VmData"), status("VmRSS")
unlimited = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (data + size * 3 // 4, unlimited[1]))
model = load_hf(path, mesh if divided else None, jnp.bfloat16)
jax.block_until_ready(model)
peak = status("VmHWM") - resident
resource.setrlimit(resource.RLIMIT_DATA, unlimited)
held = sum(s.data.nbytes for x in jax.tree.leaves(model) for s in x.addressable_shards)
sums = [float(s.data.astype(jnp.float32).sum())
        for x in jax.tree.leaves(model) for s in x.addressable_shards if s.replica_id == 0]
print("held", held, "peak", peak, "sum", sum(sums))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A sharded checkpoint of about 300 MB in bfloat16, its bytes and the sum of its weights."""
    path = tmp_path_factory.mktemp("models") / "wide"
    config = Qwen3Config(
        vocab=16384, width=1024, layers=9, heads=16, kv_heads=8, head_dim=64, ffn=3072, tied=False
    )
    model = jax.tree.map(
        lambda x: (jnp.arange(x.size, dtype=jnp.int32) % 251).reshape(x.shape).astype(jnp.bfloat16),
        jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0))),
    )
    export_hf(model, None, path, shard_bytes=64 << 20)
    assert len(list(path.glob("*.safetensors"))) > 3
    sums = [float(x.astype(jnp.float32).sum()) for x in jax.tree.leaves(model)]
    return path, sum(x.nbytes for x in jax.tree.leaves(model)), sum(sums)


def load(path: Path, size: int, divided: bool) -> list[subprocess.CompletedProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "MALLOC_ARENA_MAX": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, (path, port, i, size, int(divided)))],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        return [
            subprocess.CompletedProcess(p.args, p.returncode, out, error)
            for p in processes
            for out, error in [p.communicate(timeout=120)]
        ]
    finally:
        for process in processes:
            process.kill()


def test_processes_load_what_none_of_them_could_hold(checkpoint):
    path, size, total = checkpoint
    assert size > 250e6
    added = 0.0
    for done in load(path, size, divided=True):
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        held, peak, added = int(words[1]), int(words[3]), added + float(words[5])
        assert held < 0.51 * size  # norms are whole on each device
        assert peak < 0.9 * size
    assert added == pytest.approx(total, rel=1e-6)  # all of it was read


def test_that_limit_is_one(checkpoint):
    path, size, _ = checkpoint
    for done in load(path, size, divided=False):
        assert done.returncode != 0
        assert "RESOURCE_EXHAUSTED" in done.stderr or "MemoryError" in done.stderr, done.stderr
