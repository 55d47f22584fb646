"""One table of what is divided over what: any mesh and any table computes what one device does."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrpo.train
from jaxgrpo import hlo
from jaxgrpo.checkpoint import Checkpoints, load_run_model
from jaxgrpo.config import GrpoConfig, MeshConfig, UpdateConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.qwen3 import Qwen3, Qwen3Config
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import (
    FSDP,
    GATHERED,
    TABLES,
    Rules,
    make_mesh,
    param_shardings,
    parse_rules,
    put_batch,
)
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Completions, Prompts, RolloutBatch
from jaxgrpo.update import init_train_state, make_optimizer, train_step

CONFIGS = Path(__file__).parent.parent / "configs"
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]

# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory):
    """The tiny model, in function the same, with heads that divide over eight devices."""
    source, path = CONFIGS / "tiny_qwen3", tmp_path_factory.mktemp("models") / "eight_heads"
    model = load_hf(source)
    layers = model.layers
    for name, axis, times, scale in (
        ("q", 2, 2, 1),
        ("k", 2, 4, 1),
        ("v", 2, 4, 1),
        ("o", 1, 2, 2),
    ):
        weight = getattr(layers, name)
        weight.set_value(jnp.repeat(weight[...] / scale, times, axis))
    for module in (model, layers):
        module.config = dataclasses.replace(module.config, heads=8, kv_heads=8)
    export_hf(model, load_tokenizer(source).hf, path, source=source)
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory, eight_heads):
    heldout = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)
    heldout.write_text("".join(lines[:8]), "utf-8")
    return [
        *("--model.path", str(eight_heads)),
        *("--data.heldout", str(heldout)),
        *("--eval.samples", "0"),
        *("--eval.every", "0"),
        *("--signal.preflight-groups", "0"),
        *("--rollout.group", "4"),
        *("--rollout.max-refills", "0"),
        *("--run.steps", "3"),
        # Else Adam divides gradients that are all but 0 by their size, and rounding decides.
        *("--update.eps", "1e-3"),
    ]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, options):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxgrpo.train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        jaxgrpo.train.train(parse_args([*options, "--run.dir", str(run_dir)]))
    return run_dir


@pytest.mark.parametrize(
    ("sizes", "tables"),
    [*((sizes, ()) for sizes in MESHES), ((8, 1), ("gathered", "tp")), ((2, 4), ("tp", "fsdp"))],
)
def test_three_steps_are_those_of_one_device(sizes, tables, one_device, options, tmp_path):
    mesh = ["--mesh.fsdp", str(sizes[0]), "--mesh.tp", str(sizes[1])]
    if tables:
        mesh += ["--mesh.train-rules", tables[0], "--mesh.sample-rules", tables[1]]
    run_dir = tmp_path / "run"
    jaxgrpo.train.train(parse_args([*options, *mesh, "--run.dir", str(run_dir)]))

    assert read(run_dir, "completions") == read(one_device, "completions")
    evaluations = zip(read(run_dir, "eval"), read(one_device, "eval"), strict=True)
    for here, there in evaluations:
        assert here | {"seconds": 0} == there | {"seconds": 0}
    for here, there in zip(read(run_dir, "metrics"), read(one_device, "metrics"), strict=True):
        assert here["groups_with_signal"] > 0
        for name in here.keys() - {"seconds", "compilations"}:
            if not name.endswith("_per_s"):
                assert here[name] == pytest.approx(there[name], rel=2e-4, abs=2e-6), name
    start = load_hf(parse_args(options).model.path)
    (here, _, _), (there, _, _) = load_run_model(run_dir), load_run_model(one_device)
    assert Checkpoints(run_dir / "checkpoints").latest() == 3
    for path, w in jax.tree_util.tree_leaves_with_path(here):
        before, expected = at(start, path), at(there, path)
        moved = np.abs(expected - before).max()
        assert moved > 0
        np.testing.assert_allclose(w, expected, atol=1e-3 * moved, rtol=0, err_msg=str(path))


def at(model, path):
    return np.asarray(dict(jax.tree_util.tree_leaves_with_path(model))[path])


def read(run_dir, name):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- the programs

P, G, L, C, VOCAB = 8, 4, 16, 12, 1024
SHAPE = Qwen3Config(
    vocab=VOCAB, width=64, layers=3, heads=8, kv_heads=8, head_dim=16, ffn=96, remat="full"
)


def new_state(mesh, rules):
    config = dataclasses.replace(SHAPE, rules=rules)
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    create = jax.jit(
        lambda: Qwen3(config, nnx.Rngs(0)), out_shardings=param_shardings(model, mesh, rules)
    )
    return init_train_state(create(), make_optimizer(UpdateConfig(), 10), mesh)


def step(state, mesh, rules, call=train_step):
    def whole(*shape, dtype=np.float32):
        return np.ones(shape, dtype)

    prompts = Prompts(*(whole(*s, dtype=np.int32) for s in ((P, L), (P,), (P,))))
    completions = Completions(
        whole(P, G, C, dtype=np.int32),
        whole(P, G, C),
        whole(P, G, dtype=np.int32),
        whole(P, G, dtype=bool),
    )
    advantage_PG = np.random.default_rng(0).normal(size=(P, G)).astype(np.float32)
    batch = RolloutBatch(prompts, completions, advantage_PG, whole(P, G, dtype=bool))
    batch = put_batch(batch, mesh, rules)
    return call(
        state,
        batch,
        None,
        batch.completions.logprobs_PGC,
        tx=make_optimizer(UpdateConfig(), 10),
        config=GrpoConfig(kl_beta=0.1),
        microbatches=1,
        temperature=1.0,
        max_tokens=C,
        chunk_bytes=1 << 16,
    )


def sampler(mesh, rules):
    """The sampler's program for parameters divided by `FSDP`."""
    prompts = Prompts(np.zeros((P, L), np.int32), np.full(P, 9, np.int32), np.zeros(P, np.int32))
    with jax.set_mesh(mesh):
        compiled = sample.lower(
            new_state(mesh, FSDP).model,
            put_batch(prompts, mesh, rules),
            jax.random.key(0),
            put_batch(np.arange(P, dtype=np.uint32), mesh, rules),
            np.float32(1),
            group=G,
            max_tokens=C,
            stop_ids=(7,),
            rules=rules,
        ).compile()
    return hlo.parse(compiled.as_text())


def collectives(program, root):
    """Bytes that a device gets, by kind of collective."""
    count = Counter()
    for instruction, times in hlo.written(program, root):
        count[instruction.op] += times * hlo.exchanged(instruction)
    return +count


def shapes(program, root):
    return {shape.dims for i, _ in hlo.written(program, root) for shape in i.results}


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("table", TABLES)
def test_state_is_divided_before_and_after_an_update(sizes, table):
    mesh, rules = make_mesh(MeshConfig(*sizes)), TABLES[table]
    with jax.set_mesh(mesh):
        state = new_state(mesh, rules)
        before = [(x.sharding, x.ndim) for x in jax.tree.leaves(state)]
        after, _ = step(state, mesh, rules)
    for (sharding, ndim), x in zip(before, jax.tree.leaves(after), strict=True):
        assert sharding.is_equivalent_to(x.sharding, ndim)
    divided = {
        "embed": ("vocab", "embed"),
        "layers.q": ("embed", "heads"),
        "layers.v": ("embed", "kv_heads"),
        "layers.o": ("heads", "embed"),
        "layers.down": ("ffn", "embed"),
    }
    over = dict(zip(("fsdp", "tp"), sizes, strict=True))
    moments = next(s for s in after.opt_state[1] if hasattr(s, "mu"))
    for name, axes in divided.items():
        parts = np.prod([over[a] for axis in axes for a in rules.over(axis)])
        for tree in (after.model, moments.mu, moments.nu):
            x = tree
            for part in name.split("."):
                x = getattr(x, part)
            for shard in x[...].addressable_shards:
                assert shard.data.size * parts == x.size, name


def test_moments_left_to_the_compiler_would_be_whole():
    """Why `init_train_state` asks for shardings."""
    mesh = make_mesh(MeshConfig(8, 1))
    tx = make_optimizer(UpdateConfig(), 10)
    with jax.set_mesh(mesh):
        state = new_state(mesh, FSDP)
        left_alone = jax.jit(tx.init)(state.model)
    sizes = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(opt_state))
        for opt_state in (state.opt_state, left_alone)
    ]
    assert sizes[0] < sizes[1] / 4


@pytest.fixture(scope="module")
def flops_of_one():
    """Of the update on one device."""
    one = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    with jax.set_mesh(one):
        alone = step(new_state(one, FSDP), one, FSDP, call=train_step.lower).compile()
    return hlo.matmul_flops(hlo.parse(alone.as_text()))


@pytest.mark.parametrize("sizes", MESHES)
def test_the_update_gathers_weights_over_fsdp_and_adds_up_activations_over_tp(sizes, flops_of_one):
    fsdp, tp = sizes
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        state = new_state(mesh, FSDP)
        compiled = step(state, mesh, FSDP, call=train_step.lower).compile()
    program = hlo.parse(compiled.as_text())
    # Each device does its share of the products.
    assert hlo.matmul_flops(program) * 8 == flops_of_one

    moved = collectives(program, program.entry)
    layers = [w for w in jax.tree.leaves(state.model.layers) if w.ndim > 2]
    weights = sum(w.nbytes for w in layers)
    if fsdp > 1:  # each weight forward and again backward, and little beside
        vocabulary = SHAPE.vocab * SHAPE.width * 4
        assert 0 <= moved["all-gather"] - 2 * weights / tp <= 3 * vocabulary / tp
    else:
        assert not moved["all-gather"]
    assert moved["all-reduce"]
    if tp > 1:  # logits are divided over the vocabulary and nothing makes them whole
        assert all(VOCAB not in dims for dims in shapes(program, program.entry))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("table", ["gathered", "tp"])
def test_decoding_gathers_no_weight_and_no_logits(sizes, table):
    mesh, rules = make_mesh(MeshConfig(*sizes)), TABLES[table]
    program = sampler(mesh, rules)
    (body,) = hlo.open_loops(program)
    seen = shapes(program, body)
    over = dict(zip(("fsdp", "tp"), sizes, strict=True))
    problems = P // np.prod([over[a] for a in rules.problems], dtype=int)
    heads = SHAPE.kv_heads // np.prod([over[a] for a in rules.kv_heads], dtype=int)
    caches = {dims[:2] for dims in seen if dims[2:] == (G, C, SHAPE.head_dim)}
    assert caches == {(problems, heads)}

    moved = collectives(program, body)
    tensor_parallel = np.prod([over[a] for a in rules.vocab], dtype=int)
    if tensor_parallel == 1:
        assert not moved
    else:
        # Two sums of activations a layer and one of embeddings; beside them a few numbers for each
        # block of the vocabulary.
        activations = 4 * problems * G * SHAPE.width
        assert activations * (2 * SHAPE.layers + 1) <= moved["all-reduce"]
        assert sum(moved.values()) < activations * (2 * SHAPE.layers + 3)
        assert all(VOCAB not in dims for dims in seen)


# ---------------------------------------------------------------------------- what may be said


def test_tables_are_named_and_changed():
    assert parse_rules("fsdp", "f") == FSDP == Rules()
    assert parse_rules("gathered", "f") == GATHERED
    assert parse_rules("fsdp embed= ffn=tp+fsdp", "f") == Rules(embed=(), ffn=("tp", "fsdp"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with the name of a table"),
        ("zero3", "begins with the name of a table"),
        ("fsdp width=tp", "'width=tp' is no AXIS=MESH_AXES"),
        ("fsdp vocab", "'vocab' is no AXIS=MESH_AXES"),
        ("fsdp vocab=dp", "'vocab=dp' must end in fsdp, tp"),
        ("fsdp vocab=tp+tp", "'vocab=tp.tp' must end in fsdp, tp"),
    ],
)
def test_unknown_names_in_a_table(text, message):
    with pytest.raises(ValueError, match=f"mesh.train_rules.*{message}"):
        parse_rules(text, "mesh.train_rules")


@pytest.mark.parametrize(
    ("sizes", "rules", "message"),
    [
        ((1, 8), "fsdp", "kv_heads of 4 does not divide over mesh axis tp of 8 devices"),
        ((2, 4), "tp", "kv_heads of 4 does not divide over mesh axis tp x fsdp of 8 devices"),
        ((8, 1), "fsdp ffn=fsdp", "embed cannot be divided over mesh axis fsdp: another axis of"),
    ],
)
def test_axes_that_cannot_be_divided_are_named(sizes, rules, message):
    config = dataclasses.replace(SHAPE, kv_heads=4)
    model = jax.eval_shape(lambda: Qwen3(config, nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        param_shardings(model, make_mesh(MeshConfig(*sizes)), parse_rules(rules, "rules"))


def test_a_run_names_the_axis_of_its_model(options, tmp_path):
    tiny = ["--model.path", str(CONFIGS / "tiny_qwen3"), "--run.dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="kv_heads of 2 does not divide over mesh axis tp of 8"):
        jaxgrpo.train.train(parse_args([*options, *tiny, "--mesh.fsdp", "1", "--mesh.tp", "8"]))
    with pytest.raises(ValueError, match=r"mesh\.sample_rules is 'x'"):
        jaxgrpo.train.train(parse_args([*options, *tiny, "--mesh.sample-rules", "x"]))


def test_a_whole_axis_lets_small_models_use_many_devices(options, tmp_path):
    """What the message above leads to: the key/value heads whole, all else divided."""
    rules = ["--mesh.train-rules", "fsdp kv_heads=", "--mesh.sample-rules", "gathered kv_heads="]
    tiny = ["--model.path", str(CONFIGS / "tiny_qwen3"), "--run.dir", str(tmp_path / "run")]
    mesh = ["--mesh.fsdp", "2", "--mesh.tp", "4"]
    jaxgrpo.train.train(parse_args([*options, *tiny, *mesh, *rules, "--run.steps", "1"]))
    (record,) = read(tmp_path / "run", "metrics")
    assert record["ratio_max"] == pytest.approx(1, abs=1e-4)
