"""What the benchmark counts: the work of a step in its compiled programs, without a clock."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.work import branch_flops, prefill_flops, update_flops
from scripts.bench import SHAPES, Bench, make_model

# Prompt 256 and completion 64 as in the claims of docs/performance.md; small otherwise.
LONG = dataclasses.replace(SHAPES["S"], problems=1, prompt=256, layers=2)


def counts(shape, *, plain=False, full_head=False, unroll=True, remat="none"):
    model = jax.eval_shape(lambda: make_model(shape, "float32", unroll=unroll, remat=remat))
    return Bench(shape, model, plain=plain, full_head=full_head).counts()


@pytest.mark.parametrize("unroll", [True, False])
def test_programs_compute_little_beyond_what_the_algorithm_needs(unroll):
    counted = counts(LONG, unroll=unroll)
    # Beyond: scores that the mask throws away, and where layers are looped over, the last layer's
    # prefix, of which only keys and values are wanted.
    more = 1.12 if unroll else 1.45
    needed = update_flops(LONG)
    assert needed <= counted["update"]["matmul_flops"] < more * needed
    needed = prefill_flops(LONG) + branch_flops(LONG)
    assert needed <= counted["sample"]["matmul_flops"] < more * needed


@pytest.mark.parametrize(("group", "tokens", "work"), [(8, 3.3, 2.4), (16, 3.9, 2.8)])
def test_sharing_the_prompt_divides_the_work(group, tokens, work):
    shape = dataclasses.replace(LONG, group=group, vocab=256)
    shared, plain = counts(shape), counts(shape, plain=True)
    assert plain["update"]["forward_tokens"] > tokens * shared["update"]["forward_tokens"]
    assert plain["update"]["matmul_flops"] > work * shared["update"]["matmul_flops"]
    whole_head = counts(shape, plain=True, full_head=True)["update"]
    assert whole_head["matmul_flops"] > plain["update"]["matmul_flops"]


def test_the_whole_state_is_donated():
    counted = counts(SHAPES["XS"])["update"]
    state = 3 * 4 * 90_560 + 2 * 4  # parameters and two moments; the counters of Adam and schedule
    assert state <= counted["donated_bytes"] <= state + 16


def test_memory_does_not_grow_with_logits():
    """Four times the completions: activations grow, logits of a wide vocabulary do not."""
    shape = dataclasses.replace(SHAPES["XS"], vocab=151_936, completion=64)
    few = counts(shape)["update"]["temp_bytes"]
    many = counts(dataclasses.replace(shape, group=16))["update"]["temp_bytes"]
    all_logits = 4 * shape.vocab * shape.completion * shape.problems * (16 - shape.group)
    assert many - few < 0.35 * all_logits


def test_plain_update_is_the_update():
    """What is compared in time is the same step: parameters after it agree."""
    shape = SHAPES["XS"]
    after = []
    for plain in (False, True):
        model = make_model(shape, "float32", unroll=True, remat="none")
        bench = Bench(shape, model, plain=plain, full_head=plain)
        bench.update()
        after.append(jax.tree.leaves(bench._state.opt_state[1][0].mu))
    for a, b in zip(*after, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))


def test_the_command_prints_json_lines():
    command = [sys.executable, "-m", "scripts.bench", "--shape", "XS", "--repeats", "1"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    machine, *phases = [json.loads(line) for line in done.stdout.splitlines()]
    assert machine["machine"].keys() == {"flops", "bandwidth"}
    assert [record["phase"] for record in phases] == ["sample", "update", "step"]
    for record in phases:
        assert 0 < record["floor_seconds"] < record["seconds"]
        assert record["seconds_min"] <= record["seconds"] <= record["seconds_max"]
