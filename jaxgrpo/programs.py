"""The programs of a run on shapes alone: nothing is allocated and no weights are read.

They are the functions that training calls, with arguments as it makes them, so that what the
compiler says of them holds for the run. Prompts and completions are as long as the configuration
lets them be.
"""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxgrpo import hlo
from jaxgrpo.config import Config
from jaxgrpo.data import bucket_for
from jaxgrpo.drawing import Truncation
from jaxgrpo.models import lora
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.rollout import HINTS
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import Rules, param_shardings, parse_rules, ways
from jaxgrpo.types import Completions, Prompts, RolloutBatch, TrainState
from jaxgrpo.update import batch_logprobs, make_optimizer, train_step

AnyMesh = Mesh | AbstractMesh


class Call(NamedTuple):
    """A jitted function and its arguments, of which arrays are shapes with shardings."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        """What can be compiled for the mesh's devices."""
        return self.function.lower(*self.args, **self.kwargs)


class Costs(NamedTuple):
    """What one device does.

    Attributes:
      flops: of matrix products.
      received: bytes from other devices, by kind of collective.
      between_nodes: of them, those from other nodes.
    """

    flops: float
    received: dict[str, float]
    between_nodes: float


class Measured(NamedTuple):
    """A program on one device.

    Attributes:
      arguments: bytes.
      outputs: bytes.
      aliased: bytes of outputs that lie where donated arguments were.
      temporaries: bytes of all else.
      once: costs outside of loops whose number of trips depends on data.
      each_pass: costs of one trip through such a loop, which is the sampler's over tokens.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    once: Costs
    each_pass: Costs


class Batch(NamedTuple):
    """Sizes of what is sampled together: P problems, G completions of C tokens, prefixes of L."""

    problems: int
    group: int
    prefix: int
    tokens: int


def rollout_batch(config: Config) -> Batch:
    """What a step samples and learns from."""
    longest = config.data.max_prompt_tokens
    return Batch(
        config.rollout.problems,
        config.rollout.group,
        bucket_for(longest, longest),
        config.sampling.max_tokens,
    )


def train_rules(config: Config) -> Rules:
    """The update's table."""
    return parse_rules(config.mesh.train_rules, "mesh.train_rules")


def sample_rules(config: Config) -> Rules:
    """The sampler's table."""
    return parse_rules(config.mesh.sample_rules, "mesh.sample_rules")


def evaluation_batch(config: Config, mesh: AnyMesh) -> Batch:
    """What an evaluation samples together."""
    sharing = ways(sample_rules(config).problems, mesh)
    return rollout_batch(config)._replace(
        problems=config.eval.batch + -config.eval.batch % sharing,
        group=max(1, config.eval.samples),
    )


def with_settings(shape: Qwen3Config, config: Config) -> Qwen3Config:
    """A model's shape with the run's own arithmetic."""
    model = config.model
    return dataclasses.replace(
        shape,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        unroll=model.unroll,
        attention=model.attention,
        rules=train_rules(config),
    )


def abstract_state(config: Config, shape: Qwen3Config, mesh: AnyMesh) -> TrainState:
    """Parameters, adapters among them, optimiser state and step."""
    dtype = jnp.dtype(config.model.dtype if config.lora.rank else "float32")

    def new_model() -> Qwen3:
        model = Qwen3(with_settings(shape, config), nnx.Rngs(0)).cast(dtype)
        return lora.adapt(model, config.lora, jax.random.key(0))

    model = jax.eval_shape(new_model)
    tx = make_optimizer(config.update, config.run.steps)
    opt_state = jax.eval_shape(tx.init, lora.split(model)[0])
    step: Any = _whole(mesh, (), jnp.int32)
    rules = model.config.rules
    return TrainState(divided(model, mesh, rules), divided(opt_state, mesh, rules), step)


def abstract_reference(config: Config, model: Qwen3) -> Qwen3 | None:
    """The reference as it is on the devices, for the policy `model`."""
    if not config.grpo.kl_beta:
        return None
    _, frozen = lora.split(model)
    if frozen is not None:
        return frozen
    dtype = jnp.dtype(config.model.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), model)


def run_programs(config: Config, shape: Qwen3Config, mesh: AnyMesh) -> dict[str, Call]:
    """Every large program of a run, by the phase that it is run in."""
    state, batch = abstract_state(config, shape, mesh), rollout_batch(config)
    programs = {
        "sample": _sample(config, state.model, batch, mesh),
        "evaluate": _sample(config, state.model, evaluation_batch(config, mesh), mesh),
    }
    update = config.update
    chunks = {
        "temperature": config.sampling.temperature,
        "chunk_bytes": config.model.logits_mb << 20,
    }
    rules = state.model.config.rules
    rollout = _rollout(batch, mesh, rules)
    reference = abstract_reference(config, state.model)
    if reference is not None:
        programs["reference"] = Call(batch_logprobs, (reference, rollout), chunks)
    several_steps = update.epochs * update.minibatches > 1
    if several_steps:
        programs["old"] = Call(batch_logprobs, (state.model, rollout), chunks)
    part = batch._replace(problems=batch.problems // update.minibatches)
    minibatch = _rollout(part, mesh, rules)
    logprobs_PGC = minibatch.completions.logprobs_PGC
    programs["update"] = Call(
        train_step,
        (
            state,
            minibatch,
            logprobs_PGC if several_steps else None,
            None if reference is None else logprobs_PGC,
        ),
        {
            "tx": make_optimizer(update, config.run.steps),
            "config": config.grpo,
            "microbatches": update.microbatches,
            "max_tokens": config.sampling.max_tokens,
            **chunks,
        },
    )
    return programs


def _sample(config: Config, model: Qwen3, batch: Batch, mesh: AnyMesh) -> Call:
    sampling, rules = config.sampling, sample_rules(config)
    hints = (HINTS * (batch.tokens + 1),)
    return Call(
        sample,
        (
            model,
            _prompts(batch, mesh, rules),
            _whole(mesh, (), jax.eval_shape(lambda: jax.random.key(0)).dtype),
            _problems(mesh, rules, (batch.problems,), jnp.uint32),
            _whole(mesh, (), jnp.float32),
            _whole(mesh, hints, jnp.int32) if sampling.draft else None,
        ),
        {
            "group": batch.group,
            "max_tokens": batch.tokens,
            "stop_ids": (0, 1),
            "truncation": Truncation(sampling.top_k, sampling.top_p, sampling.min_p),
            "draft": sampling.draft,
            "rules": rules,
        },
    )


def _rollout(batch: Batch, mesh: AnyMesh, rules: Rules) -> RolloutBatch:
    each_PG, each_PGC = (batch.problems, batch.group), (batch.problems, batch.group, batch.tokens)
    return RolloutBatch(
        _prompts(batch, mesh, rules),
        Completions(
            _problems(mesh, rules, each_PGC, jnp.int32),
            _problems(mesh, rules, each_PGC, jnp.float32),
            _problems(mesh, rules, each_PG, jnp.int32),
            _problems(mesh, rules, each_PG, jnp.bool),
        ),
        _problems(mesh, rules, each_PG, jnp.float32),
        _problems(mesh, rules, each_PG, jnp.bool),
    )


def _prompts(batch: Batch, mesh: AnyMesh, rules: Rules) -> Prompts:
    shapes = ((batch.problems, batch.prefix), (batch.problems,), (batch.problems,))
    return Prompts(*(_problems(mesh, rules, shape, jnp.int32) for shape in shapes))


def divided(tree: Any, mesh: AnyMesh, rules: Rules) -> Any:
    """Abstract arrays with their shardings by a table."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        param_shardings(tree, mesh, rules),
    )


def _problems(
    mesh: AnyMesh, rules: Rules, shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(rules.problems))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _whole(mesh: AnyMesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def numbers_on_device(tree: Any) -> int:
    """How many numbers one device holds of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> int:
    """What one device holds of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def measure(compiled: jax.stages.Compiled, devices: int, node: int) -> Measured:
    """What the compiler and the program's text say of one device.

    Args:
      compiled: of a `Call`.
      devices: in all.
      node: devices of a node.
    """
    memory: Any = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text() or "")
    whole, whole_between = _received(program, program.entry, devices, node)
    received: Counter[str] = Counter()
    between = 0.0
    for body in hlo.open_loops(program):
        of_body, between_of_body = _received(program, body, devices, node)
        received += of_body
        between += between_of_body
    whole.subtract(received)  # the text has each open loop once
    outside = hlo.matmul_flops(program, open_trips=0)
    each_pass = hlo.matmul_flops(program, open_trips=1) - outside
    return Measured(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        Costs(outside, dict(+whole), whole_between - between),
        Costs(each_pass, dict(received), between),
    )


def _received(
    program: hlo.Program, root: str, devices: int, node: int
) -> tuple[Counter[str], float]:
    received: Counter[str] = Counter()
    between = 0.0
    for instruction, times in hlo.written(program, root):
        traffic = hlo.traffic(instruction, devices, node)
        if traffic is not None:
            received[traffic.kind] += round(times * traffic.nbytes)
            between += times * traffic.between_nodes
    return received, between
