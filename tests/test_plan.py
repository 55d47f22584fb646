"""The planner: its three depths beside each other, its verdict, and its advice followed."""

import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgrpo.plan
from jaxgrpo.chips import TARGETS, read_target
from jaxgrpo.config_file import parse_args
from jaxgrpo.footprint import budget, choose_depth, make_plan
from jaxgrpo.models.shapes import KNOWN, find_shape
from jaxgrpo.update import init_train_state, make_optimizer

CONFIGS = Path(__file__).parent.parent / "configs"
EIGHT = (str(CONFIGS / "invoice_qwen3_8b_h200x8.toml"), "--model.path", "Qwen3-8B")
LONG = ("--data.max-prompt-tokens", "4096", "--rollout.problems", "64")
TINY = ("--sampling.max-tokens", "16", "--data.max-prompt-tokens", "64", "--eval.batch", "8")

assert len(jax.devices()) == 8  # started before the planner asks for as many as it needs
try:
    choose_depth("cuda", parse_args([]))
    has_compiler = True
except ValueError:
    has_compiler = False
deviceless = [
    pytest.mark.deviceless,
    pytest.mark.skipif(not has_compiler, reason="needs JAX's CUDA plugin and ptxas"),
]


def plan(*options, devices=1, depth="arithmetic", target="h200"):
    config = parse_args(list(options))
    shape = find_shape(config.model.path)
    return make_plan(config, shape, read_target(target), devices, depth)


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: its exit code, and its JSON object."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["plan", *options, "--json"])
        with pytest.raises(SystemExit) as end:
            jaxgrpo.plan.main()
        return end.value.code, json.loads(capsys.readouterr().out)

    return run


def state_bytes(held):
    return held.parameters + held.optimizer


# ---------------------------------------------------------------------------- depths


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ((1, 1), ["--model.unroll"]),
        ((1, 1), ["--model.no-unroll", "--model.remat", "full", "--update.microbatches", "2"]),
        ((1, 1), ["--model.no-unroll", "--model.remat", "dots", "--model.logits-mb", "1"]),
        ((2, 1), ["--model.no-unroll", "--sampling.draft", "2", "--update.minibatches", "2"]),
        ((4, 2), ["--model.no-unroll", "--model.remat", "full", "--update.moments", "bfloat16"]),
        ((1, 2), ["--model.no-unroll", "--mesh.sample-rules", "tp", "--grpo.kl-beta", "0"]),
    ],
)
def test_arithmetic_counts_as_the_compiler_does(mesh, options):
    """Of random sizes: products, and what the state takes and gives back."""
    rng = np.random.default_rng()
    sizes = ["--rollout.problems", str(8 * rng.integers(1, 4))]
    sizes += ["--rollout.group", str(rng.integers(2, 6))]
    sizes += ["--sampling.max-tokens", str(rng.integers(5, 40))]
    sizes += ["--data.max-prompt-tokens", str(rng.integers(32, 100)), "--eval.batch", "8"]
    sizes += ["--mesh.fsdp", str(mesh[0]), "--mesh.tp", str(mesh[1])]
    ours = plan(*options, *sizes, devices=math.prod(mesh))
    compiled = plan(*options, *sizes, devices=math.prod(mesh), depth="cpu")
    assert [w.name for w in ours.work] == [w.name for w in compiled.work]
    for a, b in zip(ours.work, compiled.work, strict=True):
        assert a.flops == b.flops, (a.name, sizes)
    for name, held in ours.held.items():
        there = compiled.held[name]
        assert held[:3] == there[:3]
        # The compiler drops arguments that no result needs, as advantages of the reference.
        assert 0 <= held.batch - there.batch <= 9 * 4 * 24 * 6 * 40
    assert ours.donated == compiled.donated == state_bytes(held) + 4  # the step
    assert ours.checkpoint_bytes == compiled.checkpoint_bytes


def test_state_is_what_the_run_allocates():
    config = parse_args(["--mesh.fsdp", "4", "--mesh.tp", "2", "--update.moments", "bfloat16"])
    from jaxgrpo.models.hf import load_hf
    from jaxgrpo.sharding import make_mesh

    mesh = make_mesh(config.mesh)
    state = init_train_state(
        load_hf(config.model.path, mesh), make_optimizer(config.update, config.run.steps), mesh
    )
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    planned = plan("--mesh.fsdp", "4", "--mesh.tp", "2", "--update.moments", "bfloat16", devices=8)
    assert state_bytes(planned.held["update"]) + 4 == on_one
    assert planned.checkpoint_bytes == sum(x.nbytes for x in jax.tree.leaves(state))


def test_adapters_have_the_state_and_the_base_is_the_reference():
    options = ("--model.no-unroll", "--lora.rank", "4", "--model.dtype", "bfloat16", *TINY)
    ours, compiled = (plan(*options, depth=depth) for depth in ("arithmetic", "cpu"))
    frozen = plan(*TINY).parameters
    adapters = ours.parameters - frozen
    assert adapters > 0
    for each in (ours, compiled):
        held = each.held["update"]
        assert held.parameters == 2 * frozen + 4 * adapters
        assert held.optimizer == 8 * adapters + 8
        assert held.reference == 0
        assert each.checkpoint_bytes == 12 * adapters + 12
    assert ours.held["reference"].batch >= compiled.held["reference"].batch >= 0
    for a, b in zip(ours.work, compiled.work, strict=True):
        assert a.flops == pytest.approx(b.flops, rel=0.02), a.name


def test_by_hand():
    """Qwen3-8B on eight devices: 8.19e9 parameters of 4 bytes and two moments, 2 for copies."""
    eight = plan(*EIGHT, devices=8)
    held = eight.held["sample"]
    assert eight.parameters == 8_190_735_360
    # Norms are not divided: 308,224 of them.
    on_one = (eight.parameters - 308_224) / 8 + 308_224
    assert held.parameters == 4 * on_one
    assert held.optimizer == 8 * on_one + 8  # and two counters
    assert held.reference == 2 * on_one
    assert held.sampler_copy == 2 * eight.parameters
    assert held.cache == 144 * 1024 * (16 * 256 + 16 * 8 * 128) / 8  # 144 KiB a token
    decode = eight.work[1]
    # 128 passes read all weights but the embedding's, at 4.8 TB/s.
    weights = 2 * (eight.parameters - 151936 * 4096)
    assert 1 < decode.memory_bytes / (128 * weights) < 1.02
    assert decode.limit == "memory"
    assert decode.seconds == decode.memory_bytes / 4.8e12
    prefill, update = eight.work[0], eight.work[-1]
    # Each device gets the other seven eighths of the sampler's copy.
    assert prefill.limit == "links"
    assert prefill.seconds == pytest.approx((16.381e9 - 2.048e9) / 450e9, rel=1e-3)
    assert update.limit == "arithmetic"
    assert update.seconds == update.flops / 989e12
    assert eight.step_seconds == sum(work.seconds for work in eight.work)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B", 0.596),
        ("Qwen3-1.7B", 1.721),
        ("Qwen3-4B", 4.022),
        ("Qwen3-8B", 8.191),
        ("Qwen3-14B", 14.768),
        ("Qwen3-32B", 32.762),
    ],
)
def test_known_shapes_have_their_parameters(name, billions):
    assert round(plan("--model.path", name).parameters / 1e9, 3) == billions


def test_options_that_save_memory_save_what_they_say():
    base = plan(*EIGHT, devices=8)
    narrow = plan(*EIGHT, "--update.moments", "bfloat16", devices=8)
    reference = base.held["update"].reference
    saved = base.held["update"].total - narrow.held["update"].total
    assert saved == reference  # two bytes a parameter, too
    host = plan(*EIGHT, "--grpo.reference", "host", devices=8)
    assert base.held["update"].total - host.held["update"].total == reference
    assert base.held["reference"] == host.held["reference"]  # there it is on the devices
    assert host.host_bytes == 8 * reference
    alone = plan(*EIGHT, "--mesh.sample-rules", "tp", devices=8)
    assert alone.held["sample"].sampler_copy == pytest.approx(
        base.held["sample"].sampler_copy / 8, rel=1e-3
    )


# ---------------------------------------------------------------------------- verdict and advice


def test_eight_times_the_micro_batch_is_refused_with_the_right_advice(command):
    """Long prompts: a problem a device at a time fits, eight do not on H100, nor do four."""
    run = (*EIGHT, *LONG, "--depth", "arithmetic", "--target", "h100")
    verdicts = {n: command(*run, "--update.microbatches", str(n)) for n in (8, 2, 1)}
    assert [code for code, _ in verdicts.values()] == [0, 0, 1]
    said = verdicts[1][1]
    assert said["spare_bytes"] < 0 <= verdicts[2][1]["spare_bytes"]
    assert said["advice"][0]["options"] == "--update.microbatches 2"
    assert said["advice"][0]["peak_bytes"] == verdicts[2][1]["peak_bytes"]
    assert verdicts[8][1]["advice"] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            (*EIGHT, "--devices", "1", "--mesh.fsdp", "1"),
            ["--grpo.reference host --update.moments bfloat16", "--devices 2 --mesh.fsdp -1"],
        ),
        (
            (*EIGHT, *LONG, "--model.remat", "none"),
            ["--model.remat full"],
        ),
        (
            (*EIGHT, *LONG, "--model.remat", "none", "--target", "h100"),
            ["--update.microbatches 2 --model.remat full"],
        ),
        (
            (*EIGHT[:-1], "Qwen3-32B", "--target", "h100"),
            ["--update.moments bfloat16 --mesh.sample-rules tp"],
        ),
        (
            (*EIGHT, "--eval.batch", "12000"),
            ["--eval.batch 6000", "--devices 16 --mesh.fsdp -1"],
        ),
    ],
)
def test_advice_followed_makes_it_fit(command, options, expected):
    code, said = command(*options, "--depth", "arithmetic")
    assert code == 1
    assert [each["options"] for each in said["advice"]] == expected
    for each in said["advice"]:
        assert each["fits"]
        code, then = command(*options, "--depth", "arithmetic", *each["options"].split())
        assert code == 0
        assert then["peak_bytes"] == each["peak_bytes"]


def test_the_command_says_all_of_it(command):
    code, said = command(*EIGHT, "--depth", "arithmetic")
    assert code == 0
    assert said["depth"] == "arithmetic"
    assert said["target"]["name"] == "NVIDIA H200"
    assert said["target"]["memory_bytes"] - said["target"]["budget_bytes"] >= 8 << 30
    assert (said["devices"], said["mesh"]) == (8, {"fsdp": 8, "tp": 1})
    assert said["phases"].keys() == {"sample", "reference", "update"}
    for held in said["phases"].values():
        assert held["total"] == sum(size for part, size in held.items() if part != "total")
    assert said["peak_bytes"] == max(held["total"] for held in said["phases"].values())
    assert said["spare_bytes"] == said["target"]["budget_bytes"] - said["peak_bytes"]
    names = ["prefill", "decode, 128 passes", "reference", "update"]
    assert [work["name"] for work in said["work"]] == names
    assert said["run_gpu_hours"] == pytest.approx(8 * 100 * said["step_seconds"] / 3600)
    assert said["checkpoint_bytes"] == 12 * said["parameters"] + 12
    assert said["checkpoint_bytes_at_most"] == 2 * said["checkpoint_bytes"]


def test_tables_say_the_same(command, monkeypatch, capsys):
    options = (*EIGHT, *LONG, "--target", "h100", "--depth", "arithmetic")
    _, said = command(*options)
    monkeypatch.setattr(sys, "argv", ["plan", *options])
    with pytest.raises(SystemExit) as end:
        jaxgrpo.plan.main()
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "8,190,735,360 parameters, on 8 x NVIDIA H100 80GB HBM3 (fsdp 8 x tp 1)" in out
    assert "arithmetic alone" in out
    verdict = re.search(r"DOES NOT FIT: update needs ([\d.]+) GB, ([\d.]+) GB too much", out)
    assert verdict is not None
    assert float(verdict[1]) == pytest.approx(said["peak_bytes"] / 1e9, abs=0.05)
    assert float(verdict[2]) == pytest.approx(-said["spare_bytes"] / 1e9, abs=0.05)
    assert "change first: --update.microbatches 2 " in out


def test_sweep_compares_meshes(command, monkeypatch, capsys):
    code, said = command(*EIGHT, "--sweep", "--devices", "16", "--rollout.problems", "32")
    assert code == 0
    assert {(row["fsdp"], row["tp"]) for row in said["sweep"]} == {
        (16, 1), (8, 2), (4, 4), (2, 8), (1, 16),
    }  # fmt: skip
    by_mesh = {(r["fsdp"], r["tp"], r["microbatches"]): r for r in said["sweep"]}
    assert "kv_heads of 8" in by_mesh[1, 16, 1]["error"]
    two = plan(
        *EIGHT, "--rollout.problems", "32", "--mesh.fsdp", "8", "--mesh.tp", "2",
        "--update.microbatches", "2", devices=16,
    )  # fmt: skip
    assert by_mesh[8, 2, 2]["peak_bytes"] == two.peak
    assert by_mesh[8, 2, 2]["step_seconds"] == two.step_seconds
    monkeypatch.setattr(sys, "argv", ["plan", *EIGHT, "--sweep"])
    with pytest.raises(SystemExit):
        jaxgrpo.plan.main()
    assert len(capsys.readouterr().out.splitlines()) == 4 + 14  # of 16 problems


def test_nodes_are_linked_by_the_network():
    one, two = (plan(*EIGHT, "--mesh.fsdp", str(n), devices=n) for n in (8, 16))
    assert all(work.between_nodes == 0 for work in one.work)
    update = two.work[-1]
    # Eight devices of a node share out the half that is not there.
    assert update.between_nodes == pytest.approx(sum(update.received.values()) / 15)
    assert update.seconds == sum(update.received.values()) / 450e9


# Its model is made on the machine that trains it, and that needs no GPU.
ON_CPU = CONFIGS / "invoice_smollm2_135m.toml"


@pytest.mark.parametrize(
    "file", sorted({*CONFIGS.glob("*.toml")} - {ON_CPU}), ids=lambda file: file.stem
)
def test_every_configuration_fits_where_it_says(command, file, monkeypatch):
    """Those of large models name their plan's command in their first lines."""
    found = re.search(r"# python -m jaxgrpo\.plan configs/(\S+) (.*)", file.read_text("utf-8"))
    options = found[2].split() if found else []
    assert found is None or found[1] == file.name
    assert found or file.stem == "invoice_tiny"
    code, said = command(str(file), *options, "--depth", "arithmetic")
    assert code == 0
    assert said["fits"]


# ---------------------------------------------------------------------------- what it is given


def test_a_directory_with_no_weights_is_enough(tmp_path):
    hf = {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12288, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert find_shape(str(tmp_path)) == KNOWN["Qwen3-8B"]
    assert find_shape("/models/Qwen3-8B-Base") == KNOWN["Qwen3-8B"]


def test_another_gpu_from_a_file(command, tmp_path):
    text = (TARGETS / "h200.txtpb").read_text()
    file = tmp_path / "other.txtpb"
    file.write_text(
        re.sub(r"(device_memory_size:) \d+", r"\1 64000000000", text).replace("NVIDIA H200", "X1")
    )
    target = read_target(str(file))
    assert (target.name, target.memory, target.bandwidth) == ("X1", 64_000_000_000, 4.8e12)
    assert target.rates_of == "NVIDIA H100 80GB HBM3"
    assert budget(target) == 64_000_000_000 - (8 << 30)
    _, said = command(*EIGHT, "--depth", "arithmetic", "--target", str(file))
    assert said["target"]["rates_of"] == "NVIDIA H100 80GB HBM3"
    file.write_text('name: "X1"')
    with pytest.raises(ValueError, match="has no device_memory_size"):
        read_target(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "a100"], r"--target a100: neither one of h100, h200 nor"),
        (["--model.path", "/models/Qwen9-8B"], r"last part is none of Qwen3-0.6B, .*Qwen3-32B"),
        (["--devices", "6"], r"mesh fsdp=8 x tp=1 does not make 6 devices"),
        (["--devices", "-8"], r"--devices is -8; it must be at least 1"),
        (["--mesh.fsdp", "1", "--mesh.tp", "16"], r"kv_heads of 8 does not divide.*16"),
        (["--rollout.problems", "12"], r"rollout\.problems = 12 does not divide"),
        (["--rollout.problems", "0"], r"rollout\.problems is 0"),
        (["--depth", "guess"], r"guess"),
        (["--update.lr", "fast"], r"lr"),
        (["--mesh.train-rules", "all"], r"mesh\.train_rules is 'all'"),
        (["--model.attention", "cudnn", "--depth", "cpu"], r"cannot compile.*cudnn"),
        (["--model.attention", "cudnn", "--model.dtype", "float32"], r"model\.dtype"),
        (["--depth", "cpu", "--mesh.fsdp", "16"], r"has 8 virtual devices, not 16"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["plan", *EIGHT, *options])
    with pytest.raises(ValueError, match=message) as error:
        jaxgrpo.plan.main()
    assert "\n" not in str(error.value)


def test_a_model_must_be_named(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[run]\nsteps = 1\n")
    monkeypatch.setattr(sys, "argv", ["plan", str(tmp_path / "mine.toml")])
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        jaxgrpo.plan.main()


@pytest.mark.skipif(has_compiler, reason="the plugin is here")
def test_a_depth_that_is_not_here_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", *EIGHT, "--depth", "cuda"])
    with pytest.raises(ValueError, match=r"--depth cuda needs .*pip install"):
        jaxgrpo.plan.main()


def test_from_a_shell(tmp_path):
    """Virtual devices are made before the backend starts; the exit code is the verdict."""
    command = [sys.executable, "-m", "jaxgrpo.plan", "--depth", "cpu", "--devices", "2", "--json"]
    done = subprocess.run(
        [*command, *TINY, "--rollout.problems", "2", "--model.no-unroll"],
        cwd=CONFIGS.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert (said["depth"], said["devices"], said["fits"]) == ("cpu", 2, True)


# ---------------------------------------------------------------------------- the real compiler


class TestDeviceless:
    pytestmark = deviceless

    def test_qwen3_8b_on_eight_h200(self):
        command = [sys.executable, "-m", "jaxgrpo.plan", *EIGHT, "--depth", "cuda", "--json"]
        done = subprocess.run(
            command, cwd=CONFIGS.parent, capture_output=True, text=True, check=True
        )
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20  # KiB
        said, ours = json.loads(done.stdout), plan(*EIGHT, devices=8)
        assert said["depth"] == "cuda"
        assert said["fits"]
        update = said["phases"]["update"]
        assert said["donated_bytes"] == update["parameters"] + update["optimizer"] + 4
        for work, estimate in zip(said["work"], ours.work, strict=True):
            # For GPUs the compiler saves one product of the prompt's attention in the update.
            assert work["flops"] == pytest.approx(estimate.flops, rel=1e-3), work["name"]
            assert work["flops"] == estimate.flops or work["name"] == "update"
            received = sum(work["received"].values())
            assert received == pytest.approx(sum(estimate.received.values()), rel=0.01, abs=1e6)
        for name, held in ours.held.items():
            there = said["phases"][name]
            assert held.total == pytest.approx(there["total"], rel=0.15)
            assert held[:3] == (there["parameters"], there["optimizer"], there["reference"])

    def test_verdict_flips_and_advice_is_compiled(self, command):
        run = (*EIGHT, *LONG, "--depth", "cuda", "--target", "h100", "--model.remat", "full")
        code, said = command(*run)
        assert code == 1
        first = said["advice"][0]
        assert first["options"] == "--update.microbatches 2"
        code, then = command(*run, *first["options"].split())
        assert code == 0
        assert then["peak_bytes"] == first["peak_bytes"] <= said["target"]["budget_bytes"]

    def test_the_host_keeps_the_reference(self):
        """Its arguments are on the device for its pass only."""
        options = ("--grpo.reference", "host", *TINY, "--model.no-unroll")
        host = plan(*options, devices=1, depth="cuda")
        device = plan(*options[2:], devices=1, depth="cuda")
        assert host.held["update"].reference == 0
        assert host.held["reference"] == device.held["reference"]
