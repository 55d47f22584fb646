"""Adapters against merged weights, one device, whole runs, and PEFT itself."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from test_update import (
    CONFIG,
    C,
    G,
    P,
    assert_trees_close,
    make_batch,
    make_model,
    plain_loss,
    take_step,
)

from jaxgrpo import export as export_module
from jaxgrpo import train as train_module
from jaxgrpo.checkpoint import abstract_on, load_run_model
from jaxgrpo.config import GrpoConfig, LoraConfig, MeshConfig, UpdateConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.export import export
from jaxgrpo.models import lora
from jaxgrpo.models.hf import export_hf, load_hf
from jaxgrpo.models.peft import export_peft, load_peft
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import make_mesh, param_shardings, put_batch
from jaxgrpo.train import train
from jaxgrpo.types import Completions, RolloutBatch, TrainState
from jaxgrpo.update import batch_logprobs, init_train_state, make_optimizer, train_step

CONFIGS = Path(__file__).parent.parent / "configs"
LORA = LoraConfig(rank=3, alpha=5.0)
INPUTS = {"q": "d", "k": "d", "v": "d", "o": "nh", "gate": "d", "up": "d", "down": "f"}
OUTPUTS = {"q": "nh", "k": "nh", "v": "nh", "o": "d", "gate": "f", "up": "f", "down": "d"}


def adapted(model: Qwen3, config: LoraConfig = LORA, scale: float = 0.3, seed: int = 0) -> Qwen3:
    """With adapters of random numbers in both halves, as after some training."""
    rng = np.random.default_rng(seed)
    adapters, frozen = lora.split(lora.adapt(model, config, jax.random.key(seed)))
    random = jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape, np.float32)), adapters
    )
    return lora.join(random, frozen)


def multiplied_out(adapters, frozen: Qwen3, config: LoraConfig = LORA) -> Qwen3:
    """The sums `W + A B alpha / rank`, layer by layer."""
    model = jax.tree.map(lambda w: w, frozen)
    for name in config.targets:
        i, o = INPUTS[name], OUTPUTS[name]
        weight, adapter = getattr(model.layers, name), adapters[name]
        layers = [
            weight[n]
            + jnp.einsum(f"{i}r,r{o}->{i}{o}", adapter.a[n], adapter.b[n])
            * (config.alpha / config.rank)
            for n in range(model.config.layers)
        ]
        weight[...] = jnp.stack(layers)
    return model


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def step_arguments(config: GrpoConfig, tx, microbatches: int = 1) -> dict:
    return {
        "tx": tx,
        "config": config,
        "microbatches": microbatches,
        "temperature": 0.8,
        "max_tokens": C,
        "chunk_bytes": 1 << 30,
    }


# The arithmetic


@pytest.mark.parametrize(
    "targets", [("q",), ("v", "o"), ("down", "gate", "up", "k"), LORA.targets], ids="-".join
)
def test_an_adapted_model_is_the_merged_one(targets):
    config = dataclasses.replace(LORA, targets=targets)
    # Of no two sizes alike, with biases.
    shape = dataclasses.replace(
        CONFIG, width=24, heads=6, kv_heads=2, head_dim=8, ffn=40, layers=3, qkv_bias=True
    )
    model = adapted(Qwen3(shape, nnx.Rngs(0)), config)
    base, sums = lora.split(model)[1], multiplied_out(*lora.split(model), config)
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab, (4, 9))
    want = sums.logits(ids)
    assert np.abs(want - base.logits(ids)).max() > 0.01
    np.testing.assert_allclose(model.logits(ids), want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jax.jit(Qwen3.apart)(model).logits(ids), want, atol=1e-5, rtol=0)
    sums = jax.tree.map(np.array, sums)  # copies: what is merged is donated
    merged = lora.merge(model)
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, rtol=0)


def test_new_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    shape = dataclasses.replace(CONFIG, heads=5, kv_heads=1)
    model = Qwen3(shape, nnx.Rngs(0))
    config = dataclasses.replace(LORA, rank=64)
    new = lora.adapt(model.cast(jnp.bfloat16), config, jax.random.key(0))
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab, (4, 9))
    np.testing.assert_array_equal(new.logits(ids), model.cast(jnp.bfloat16).logits(ids))
    adapters, frozen = lora.split(new)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    for name, fan_in in {"q": 32, "o": 5 * 8, "down": 48}.items():
        a = np.asarray(adapters[name].a[...]) * fan_in**0.5
        assert a.shape[0] == 2
        assert a.shape[-1] == 64
        # Uniform over [-1, 1], and another draw for each number.
        assert 0.99 < np.abs(a).max() <= 1
        assert np.abs(a.mean()) < 0.05
        assert 0.95 < 3 * (a**2).mean() < 1.05
        assert len(np.unique(a)) > 0.99 * a.size
        assert not np.asarray(adapters[name].b[...]).any()
    assert not np.isin(adapters["q"].a[...], adapters["k"].a[...]).all()
    other = lora.split(lora.adapt(model, config, jax.random.key(1)))[0]
    assert (other["q"].a[...] != adapters["q"].a[...]).all()
    assert lora.adapt(model, LoraConfig(), jax.random.key(0)) is model


def draw(model: Qwen3, batch: RolloutBatch) -> Completions:
    return sample(
        model, batch.prompts, jax.random.key(0), jnp.arange(P), np.float32(0.8),
        group=G, max_tokens=C, stop_ids=(0,),
    )  # fmt: skip


def trainer_logprobs(model: Qwen3, batch: RolloutBatch) -> jax.Array:
    return batch_logprobs(model, batch, temperature=0.8, chunk_bytes=1 << 30)


def sampler_logprobs(model: Qwen3, batch: RolloutBatch) -> jax.Array:
    return draw(model, batch).logprobs_PGC


@pytest.mark.parametrize("logprobs", [trainer_logprobs, sampler_logprobs])
def test_a_change_that_merged_weights_would_lose_is_kept(logprobs):
    model = adapted(make_model().cast(jnp.bfloat16), scale=1e-3)
    model.config = model.layers.config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    batch, (_, frozen) = make_batch(), lora.split(model)
    before, after = logprobs(frozen, batch), logprobs(model, batch)
    rounded = logprobs(lora.merge(jax.tree.map(jnp.copy, model)), batch)
    assert np.mean(after != before) > 0.1
    assert np.mean(rounded != before) < np.mean(after != before) / 2


def test_sampler_and_trainer_have_the_same_probabilities():
    model, batch = adapted(make_model()), make_batch()
    drawn = draw(model, batch)
    mesh = make_mesh(MeshConfig(2, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        divided = draw(jax.device_put(model, param_shardings(model, mesh)), put_batch(batch, mesh))
    np.testing.assert_array_equal(divided.tokens_PGC, drawn.tokens_PGC)
    batch = batch._replace(completions=drawn)
    logp = trainer_logprobs(model, batch)
    counts = np.arange(C) < np.asarray(drawn.length_PG)[..., None]
    np.testing.assert_allclose(logp[counts], drawn.logprobs_PGC[counts], atol=1e-4, rtol=0)
    frozen = trainer_logprobs(lora.split(model)[1], batch)
    assert np.abs(frozen - logp)[counts].max() > 0.1


# The update


@pytest.fixture(scope="module")
def reference():
    """The step on one device, in one piece."""
    batch = make_batch()
    ref = np.random.default_rng(9).normal(-3, 0.5, (P, G, C)).astype(np.float32)
    return batch, ref, *take_step(adapted(make_model()), batch, ref)


def test_gradients_are_those_through_merged_weights(reference):
    batch, ref, grads, metrics = reference
    adapters, frozen = lora.split(adapted(make_model()))

    @jax.jit
    @jax.value_and_grad
    def plain(adapters):
        return plain_loss(multiplied_out(adapters, frozen), batch, ref, 0.8, 0.3)

    loss, want = plain(adapters)
    moved, base = lora.split(grads)
    assert_trees_close(moved, want)
    assert not any(x.any() for x in jax.tree.leaves(base))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(want), rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((1, 1), {"unroll": True}),
        ((8, 1), {"remat": "full"}),
        ((2, 2), {"unroll": True}),
        ((4, 2), {}),
    ],
)
def test_devices_parts_and_loops_change_nothing(reference, sizes, fields):
    batch, ref, want, metrics = reference
    model = adapted(make_model())
    model.config = model.layers.config = dataclasses.replace(CONFIG, **fields)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: sizes[0] * sizes[1]])
    grads, again = take_step(model, batch, ref, mesh=mesh, microbatches=8 // sizes[0])
    assert_trees_close(*(lora.split(tree)[0] for tree in (grads, want)))
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_adapters_are_divided_as_their_weights_are():
    mesh = make_mesh(MeshConfig(4, 2))
    model = make_model()
    one = lora.adapt(model, LORA, jax.random.key(0))
    with jax.set_mesh(mesh):
        model = jax.device_put(model, param_shardings(model, mesh))
        model = lora.adapt(model, LORA, jax.random.key(0))
        state = init_train_state(model, make_optimizer(UpdateConfig(lr=1e-3), 1), mesh)
    assert bits(lora.split(model)[0]) == bits(lora.split(one)[0])
    moments = state.opt_state[1][0].mu
    specs = {
        "q.a": (None, "fsdp", None), "q.b": (None, None, "tp", None),
        "o.a": (None, "tp", None, None), "o.b": (None, None, "fsdp"),
        "down.a": (None, "tp", None), "down.b": (None, None, "fsdp"),
    }  # fmt: skip
    for adapters in (model.layers.adapters, moments):
        for name, spec in specs.items():
            target, half = name.split(".")
            array = getattr(adapters[target], half)[...]
            wanted = NamedSharding(mesh, jax.P(*spec))
            assert array.sharding.is_equivalent_to(wanted, array.ndim), name


def test_the_base_passes_through_the_update_bit_by_bit_and_uncopied():
    mesh = make_mesh(MeshConfig(2, 2), jax.devices()[:4])
    tx = make_optimizer(UpdateConfig(lr=1e-2, weight_decay=0.1), 3)
    with jax.set_mesh(mesh):
        model = jax.device_put(make_model().cast(jnp.bfloat16), param_shardings(make_model(), mesh))
        state = init_train_state(lora.adapt(model, LORA, jax.random.key(0)), tx, mesh)
        before = bits(lora.split(state.model)[1])
        start = jax.tree.map(np.asarray, lora.split(state.model)[0])
        batch, ref = put_batch((make_batch(), np.full((P, G, C), -3, np.float32)), mesh)
        run = partial(train_step, **step_arguments(GrpoConfig(kl_beta=0.1), tx))
        program = train_step.lower(
            state, batch, None, ref, **step_arguments(GrpoConfig(kl_beta=0.1), tx)
        ).compile()
        bytes_of = program.memory_analysis()
        shardings = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(3):
            given = jax.tree.leaves(state)
            state, metrics = run(state, batch, None, ref)
            assert all(x.is_deleted() for x in given)
            assert metrics["skipped"] == 0
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert bits(lora.split(state.model)[1]) == before
    for old, new in zip(
        jax.tree.leaves(start), jax.tree.leaves(lora.split(state.model)[0]), strict=True
    ):
        assert (old != new).mean() > 0.9
    # Two float32 moments for each number of the adapters, and none for the base.
    trained = sum(x.size for x in jax.tree.leaves(start))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * trained
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert bytes_of.alias_size_in_bytes >= held


@pytest.mark.parametrize("devices", [1, 8])
def test_the_base_has_no_gradients(devices):
    """Forward and the gradient of activations: two thirds of the work on weights, not three."""
    wide = dataclasses.replace(CONFIG, width=128, heads=8, ffn=512, layers=2)
    mesh, tx = make_mesh(MeshConfig(devices, 1), jax.devices()[:devices]), optax.sgd(1.0)

    def program(config: LoraConfig):
        def init() -> TrainState:
            model = lora.adapt(Qwen3(wide, nnx.Rngs(0)), config, jax.random.key(0))
            return init_train_state(model, tx, mesh)

        with jax.set_mesh(mesh):
            state = abstract_on(jax.eval_shape(init), mesh)
            batch = put_batch(make_batch(), mesh)
            arguments = step_arguments(GrpoConfig(), tx)
            return train_step.lower(state, batch, None, None, **arguments).compile()

    whole, adapters = (program(LoraConfig(rank=r)).cost_analysis()["flops"] for r in (0, 1))
    assert adapters < 0.75 * whole


def test_the_reference_is_the_base_and_kl_starts_at_zero():
    batch = make_batch()
    model = lora.adapt(make_model(), LORA, jax.random.key(0))
    _, frozen = lora.split(model)
    held = {id(x) for x in jax.tree.leaves(model)}
    assert all(id(x) in held for x in jax.tree.leaves(frozen))  # no copy
    ref = trainer_logprobs(frozen, batch)
    np.testing.assert_array_equal(trainer_logprobs(model, batch), ref)
    _, metrics = take_step(model, batch, np.asarray(ref))
    assert abs(metrics["kl"]) < 1e-10  # of another program
    assert np.abs(trainer_logprobs(adapted(make_model()), batch) - ref).max() > 0.1


# Whole runs


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    heldout = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)
    heldout.write_text("".join(lines[:8]), "utf-8")
    return [
        *("--data.heldout", str(heldout)),
        *("--eval.batch", "8"),
        *("--eval.samples", "0"),
        *("--checkpoint.every", "2"),
        *("--checkpoint.keep", "9"),
        *("--rollout.group", "4"),
        *("--model.dtype", "bfloat16"),
        "--model.no-unroll",
        *("--update.lr", "3e-3"),
        *("--lora.rank", "4"),
        *("--lora.targets", "q", "v", "o", "down"),
    ]


def run(run_dir: Path, options: list[str], *more: str) -> Path:
    train(parse_args([*options, "--run.dir", str(run_dir), *more]))
    return run_dir


def records(run_dir: Path) -> list[dict]:
    speeds = ("seconds", "sample_tokens_per_s", "train_tokens_per_s", "compilations")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in speeds} for x in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, options):
    return run(tmp_path_factory.mktemp("runs") / "whole", options, "--run.steps", "4")


def test_a_run_resumes_as_if_it_had_not_stopped(whole_run, options, tmp_path, capsys, monkeypatch):
    trained, start = [], init_train_state
    monkeypatch.setattr(
        train_module,
        "init_train_state",
        lambda model, *rest: trained.append(lora.split(model)) or start(model, *rest),
    )
    run(tmp_path / "run", options, "--run.steps", "2")
    assert re.search(
        r": 5\d\d,\d{3} parameters, of which 1\d,\d{3} are trained, on 8", capsys.readouterr().out
    )
    run(tmp_path / "run", options, "--run.steps", "4")
    assert "restored step 2" in capsys.readouterr().out
    for adapters, frozen in trained:
        assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert records(tmp_path / "run") == records(whole_run)
    resumed, whole = (load_run_model(path)[0] for path in (tmp_path / "run", whole_run))
    assert bits(resumed) == bits(whole)
    kl = [record["kl"] for record in records(whole_run)]
    assert kl[0] < 1e-6 < kl[-1]


def test_a_checkpoint_holds_the_adapters_and_no_base(whole_run):
    stored = ocp.metadata(whole_run / "checkpoints" / "4").metadata
    names = {name for name in stored if name.startswith("model.")}
    assert names == {f"model.{name}.{half}" for name in ("q", "v", "o", "down") for half in "ab"}
    adapters, frozen = lora.split(load_run_model(whole_run)[0])
    assert len(stored) <= 3 * len(names) + 3
    assert {name: stored[f"model.{name}.a"].shape for name in adapters} == {
        name: adapter.a.shape for name, adapter in adapters.items()
    }
    assert bits(frozen) == bits(load_hf(CONFIGS / "tiny_qwen3"))
    early, late = (lora.split(load_run_model(whole_run, step)[0])[0] for step in (2, 4))
    assert all(x != y for x, y in zip(bits(early), bits(late), strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora.rank", "8"), r"another lora\.rank"),
        (("--lora.rank", "0"), r"another lora\.rank"),
        (("--lora.alpha", "8"), r"another lora\.alpha"),
        (("--lora.targets", "q"), r"another lora\.targets"),
    ],
)
def test_a_run_goes_on_with_the_adapters_that_it_has(whole_run, options, more, message):
    with pytest.raises(ValueError, match=message):
        run(whole_run, options, "--run.steps", "4", *more)


def test_export_merges_in_float32(whole_run, tmp_path, capsys):
    export(whole_run, tmp_path / "out")
    assert "the model of" in capsys.readouterr().out
    adapters, frozen = lora.split(load_run_model(whole_run)[0])
    config = LoraConfig(rank=4, targets=("q", "v", "o", "down"))
    want, got = multiplied_out(adapters, frozen, config), load_hf(tmp_path / "out")
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7, rtol=1e-6)
    assert bits(got.layers.gate) == bits(frozen.layers.gate)
    assert np.abs(got.layers.q[...] - frozen.layers.q[...]).max() > 1e-4


def test_export_of_adapters(whole_run, options, tmp_path, capsys):
    export(whole_run, tmp_path / "out", step=2, adapter=True)
    assert f"out: the adapters of {whole_run} at step 2" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["out"]
    adapters, _ = lora.split(load_run_model(whole_run, 2)[0])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * adapters["q"].a.shape[0]
    module = "base_model.model.model.layers.1.self_attn.o_proj"
    a, b = adapters["o"].a[1], adapters["o"].b[1]
    np.testing.assert_array_equal(tensors[f"{module}.lora_A.weight"], a.reshape(-1, 4).T)
    np.testing.assert_array_equal(tensors[f"{module}.lora_B.weight"], b.reshape(4, -1).T)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(CONFIGS / "tiny_qwen3")
    assert config["target_modules"] == ["q_proj", "v_proj", "o_proj", "down_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 32)


def test_adapters_that_read_back_differently_leave_nothing(whole_run, tmp_path, monkeypatch):
    def damaged(path, adapters):
        file = path / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return load_peft(path, adapters)

    monkeypatch.setattr(export_module, "load_peft", damaged)
    with pytest.raises(ValueError, match=r"reads back from .* as another; nothing was exported"):
        export(whole_run, tmp_path / "out", adapter=True)
    assert not os.listdir(tmp_path)


# PEFT


@pytest.mark.parity
# What PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", LoraConfig(rank=8, alpha=16.0)),
        ("qwen3", LoraConfig(rank=1, alpha=3.0, targets=("o", "k"))),
        ("qwen2", LoraConfig(rank=5, alpha=2.5, targets=("q", "v", "down"))),
        ("llama", LoraConfig(rank=2, alpha=4.0, targets=("gate", "up", "down"))),
    ],
)
def test_peft_loads_the_adapters_with_equal_logits(family, config, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from golden.make import logits, random_model

    heads = {"qwen3": 4, "qwen2": 4, "llama": 3}[family]
    theirs = random_model(
        family,
        seed=config.rank,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=1,
        tie_word_embeddings=family != "qwen2",
        **({"head_dim": 12} if family == "qwen3" else {}),
    )
    theirs.save_pretrained(tmp_path / "base")
    model = adapted(load_hf(tmp_path / "base"), config)
    adapters, _ = lora.split(model)
    export_peft(adapters, config, tmp_path / "adapter", source=tmp_path / "base")

    ids = np.random.default_rng(0).integers(0, 61, (3, 17))
    without = logits(theirs, ids)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    want = logits(loaded, ids)
    assert np.abs(want - without).max() > 0.1
    np.testing.assert_allclose(model.logits(ids), want, atol=1e-4, rtol=0)

    export_hf(lora.merge(model), None, tmp_path / "merged")
    merged = loaded.merge_and_unload().state_dict()
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, merged[name].numpy(), atol=1e-6, rtol=0, err_msg=name)
    again = type(theirs).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logits(again, ids), want, atol=1e-4, rtol=0)
