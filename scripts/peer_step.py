"""Times GRPO steps of jaxgrpo in the protocol of the comparison with other trainers.

    PYTHONPATH=PEERS python scripts/peer_step.py --shape M

PEERS is the folder that holds the comparison's `meter.py` (clocks, the common record) and
`shapes.py` (weights, prompts, reward), which every trainer compared uses; with `--probe FILE` only
the log-probabilities of its fixed batch are written, which must be those of the others.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import meter  # type: ignore[import-not-found]
import numpy as np
import shapes  # type: ignore[import-not-found]
from jax.sharding import Mesh
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxgrpo.config import GrpoConfig, MeshConfig, UpdateConfig
from jaxgrpo.grpo import group_advantages
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.qwen3 import Qwen3
from jaxgrpo.sampling import sample
from jaxgrpo.sharding import make_mesh, put_batch
from jaxgrpo.types import Prompts, RolloutBatch
from jaxgrpo.update import init_train_state, make_optimizer, train_step


def make_model(s: "shapes.Shape", mesh: Mesh, dtype: str, *, unroll: bool) -> Qwen3:
    """The common weights, written as a Hugging Face directory and loaded as any other."""
    config = f"""{{
      "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": {s.vocab},
      "hidden_size": {s.hidden}, "num_hidden_layers": {s.layers}, "num_attention_heads": {s.heads},
      "num_key_value_heads": {s.kv_heads}, "head_dim": {s.head_dim},
      "intermediate_size": {s.ffn}, "rms_norm_eps": {shapes.RMS_EPS}, "hidden_act": "silu",
      "rope_theta": {shapes.ROPE_THETA}, "tie_word_embeddings": true,
      "max_position_embeddings": {s.Lp + s.Lc}, "attention_bias": false
    }}"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(config, "utf-8")
        save_file(dict(shapes.weights(s)), Path(folder, "model.safetensors"))
        compute = jnp.bfloat16 if dtype == "bf16" else jnp.float32
        return load_hf(folder, mesh, compute_dtype=compute, unroll=unroll)


def prompts_of(ids_PL: np.ndarray) -> Prompts:
    """Prompts of equal length."""
    ids_PL = ids_PL.astype(np.int32)
    length_P = np.full(len(ids_PL), ids_PL.shape[1] - 1, np.int32)
    return Prompts(np.ascontiguousarray(ids_PL[:, :-1]), length_P, ids_PL[:, -1].copy())


def probe(s: "shapes.Shape", model: Qwen3) -> np.ndarray:
    """Log-probabilities of the fixed batch's completion part."""
    ids = jnp.asarray(shapes.probe_ids(s), jnp.int32)
    logp = jax.nn.log_softmax(model.logits(ids)[:, s.Lp - 1 : -1])
    return np.asarray(jnp.take_along_axis(logp, ids[:, s.Lp :, None], -1)[..., 0])


def main() -> None:
    """The command."""
    parser = meter.parser(__doc__)
    parser.add_argument("--probe", metavar="FILE", help="only write the probe's log-probabilities")
    parser.add_argument("--scan", action="store_true", help="layers in a loop")
    args = parser.parse_args()
    s = shapes.SHAPES[args.shape]
    rss_import = meter.rss_mb()
    mesh = make_mesh(MeshConfig(1, 1))
    jax.set_mesh(mesh)
    model = make_model(s, mesh, args.dtype, unroll=not args.scan)
    if args.probe:
        np.save(args.probe, probe(s, model))
        return

    total = args.warmup + args.steps
    prompts = [prompts_of(ids) for ids in shapes.prompt_ids(s, total)]
    tx = make_optimizer(
        UpdateConfig(lr=shapes.LEARNING_RATE, clip_norm=shapes.MAX_GRAD_NORM), total
    )
    before = np.asarray(model.embed[...]), np.asarray(model.layers.gate[...])
    state = init_train_state(model, tx, mesh)
    del model
    advantages = jax.jit(group_advantages)
    starts, ends, generate, rollout, update = [], [], [], [], []
    quiet = meter.Quiet(args.wait_quiet)
    for step in range(total):
        if step >= args.warmup:
            quiet.wait()
        starts.append(meter.Lap())
        start = time.perf_counter()
        completions = sample(
            state.model,
            put_batch(prompts[step], mesh),
            jax.random.key(step),
            put_batch(np.arange(s.P, dtype=np.uint32), mesh),
            np.float32(1),
            group=s.G,
            max_tokens=s.Lc,
            stop_ids=(s.vocab,),  # never drawn: every completion has its full length
        )
        done = jax.device_get(completions)
        generate.append(time.perf_counter() - start)
        assert (done.length_PG == s.Lc).all()
        texts = [shapes.decode(ids) for ids in done.tokens_PGC.reshape(s.B, s.Lc)]
        rewards_PG = np.float32(shapes.rewards(texts)).reshape(s.P, s.G)
        batch = RolloutBatch(
            prompts[step],
            done._replace(passes_PG=None),
            np.asarray(advantages(rewards_PG)),
            np.ones((s.P, s.G), bool),
        )
        batch = put_batch(batch, mesh)
        rollout.append(time.perf_counter() - start)
        state, metrics = train_step(
            state, batch, None, None, tx=tx, config=GrpoConfig(loss="grpo"), microbatches=1,
            temperature=1.0, max_tokens=s.Lc, chunk_bytes=256 << 20,
        )  # fmt: skip
        metrics = jax.device_get(metrics)
        jax.block_until_ready(state)
        update.append(time.perf_counter() - start - rollout[-1])
        ends.append(meter.Lap())

    now = np.asarray(state.model.embed[...]), np.asarray(state.model.layers.gate[...])
    meter.emit(
        meter.step_record(
            "jaxgrpo", s, args, [a.until(b) for a, b in zip(starts, ends, strict=True)],
            rollout, generate, update, shapes.work(s),
            scan=args.scan, rss_after_import_mb=rss_import,
            check={
                "completion_tokens": [s.Lc],
                "grad_norm": meter.r(float(metrics["grad_norm"])),
                "ratio_min": meter.r(float(metrics["ratio_min"]), 6),
                "ratio_max": meter.r(float(metrics["ratio_max"]), 6),
                "reward_std": meter.r(float(rewards_PG.std(1, ddof=1).mean())),
                "changed": [
                    meter.r(float((a != b).mean())) for a, b in zip(before, now, strict=True)
                ],
            },
            versions=meter.versions("jax", "jaxlib", "flax", "optax", "numpy"),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
