"""The whole configuration of a run: every field with its meaning, and what must hold among them.

`jaxgrpo.config_file` reads it from TOML and the command line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

DEFAULT = Path(__file__).parent / "configs" / "invoice_tiny.toml"

# Where these come from TOML they are relative to that file, else to where the command is run;
# reading makes them absolute.
InputPath = Annotated[str, "input path"]
RewardName = Annotated[str, "reward name"]  # the file of `file.py:attribute`


TrackerName = Literal["auto", "tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how long it is."""

    dir: str = "runs/default"
    """Run directory; the same command on an existing one goes on where it stopped. For NAME.toml
    it is runs/NAME by default."""
    seed: int = 0
    """Of the data order and of every sampled token."""
    steps: int = 50
    """Optimiser rollouts (sample, score, update) in all."""
    fresh: bool = False
    """Throw away what the run directory holds and start anew."""
    allow_change: bool = False
    """Go on although settings or files are others than those of the run that is there."""
    stall: float = 300.0
    """Seconds; a phase that takes longer, and ten times longer than ever before in the run, has the
    stacks of all threads written to stacks_PROCESS.txt in the run directory."""
    quiet: bool = False
    """Plain lines instead of the live display."""
    trackers: tuple[TrackerName, ...] = ("auto",)
    """Where the numbers go beside the run directory's JSON lines. `auto` is TensorBoard's files in
    RUN_DIR/tensorboard where tensorboardX is installed; one that is named must be installed."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: InputPath = ""
    """Hugging Face directory: config.json, *.safetensors, tokenizer files."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; what is trained and its optimiser state are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; all but the products
    with weights; whole layers, which takes the least memory and about a third more work."""
    unroll: bool = False
    """Layers one by one in the compiled update, not in a loop, as they are in the sampler: on a CPU
    the update is 12 to 15 % faster; compilation takes longer with every layer."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Of the prompts among themselves: `cudnn` keeps no scores, for long prompts on NVIDIA GPUs in
    bfloat16."""
    logits_mb: int = 256
    """Size of a chunk's float32 logits over all devices, in MiB; the update takes logits in chunks
    of it, of which the backward pass holds a few copies."""


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the model, which is then kept in `model.dtype`."""

    rank: int = 0
    """Of each adapter's two matrices; 0 trains the model itself."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """The weights, of every layer, that have one: attention's projections and feed-forward's."""


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh; at most one of the two may be -1, meaning the rest of the devices."""

    fsdp: int = -1
    """Devices over which parameters, optimiser state and problems are divided."""
    tp: int = 1
    """Devices over which heads, feed-forward and vocabulary are divided."""
    train_rules: str = "fsdp"
    """Table of what each axis is divided over in the update: `fsdp`, `gathered` or `tp`, then any
    changes, as in `fsdp embed= ffn=tp+fsdp` (docs/sharding.md)."""
    sample_rules: str = "gathered"
    """The same for the sampler, which reads every parameter once a token."""


@dataclass(frozen=True)
class ClusterConfig:
    """The processes of a run: one, or as Slurm or Open MPI say, or as is said here."""

    coordinator: str = ""
    """HOST:PORT where process 0 listens for the others; the same on all."""
    processes: int = 0
    """How many there are; 1 by itself means one, whatever the cluster says."""
    process: int = -1
    """The number of this one, from 0."""
    bind: str = ""
    """Address that process 0 listens on. By default the coordinator's, which then must be a
    loopback or a private one."""
    timeout: int = 20
    """Seconds that the processes wait for each other at the start."""


@dataclass(frozen=True)
class DataConfig:
    """Problems and the schema their answers must meet."""

    train: InputPath = ""
    """JSON lines with `messages`, optionally `ground_truth`, `schema`, `id`."""
    heldout: tuple[InputPath, ...] = ()
    """Files that evaluation uses; the first is the one that decides."""
    schema: InputPath = ""
    """JSON Schema file; a row's own `schema` comes before it. None: any JSON is valid."""
    system: InputPath = ""
    """Text file: the system message of every problem, in place of the rows' own."""
    examples: InputPath = ""
    """JSON lines like those of `train`, each with `ground_truth`: questions and answers that every
    prompt shows as turns of the chat before its own question."""
    max_prompt_tokens: int = 512
    """A longer prompt is refused at the start."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """The trainer's log-probabilities are taken at this temperature too."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    max_tokens: int = 256
    """Completion limit, the stop token included."""
    constrain: bool = False
    """Draw only tokens after which an answer can still meet its schema; log-probabilities, while
    training too, are those among them (docs/constrain.md)."""
    draft: int = 0
    """Tokens that a decoding pass proposes by looking up what came after the last ones in the
    prompt and in other answers; the tokens drawn are the same. Pays only where a pass over few
    tokens more takes no longer: few completions at once, large weights (docs/performance.md)."""
    accept_mismatch: bool = False
    """Train although top_k, top_p or min_p sample from another distribution than is trained."""


@dataclass(frozen=True)
class RolloutConfig:
    """What one step samples."""

    problems: int = 8
    """Problems in a batch."""
    group: int = 8
    """Completions of each problem; at least 2."""
    max_refills: int = 2
    """Batches sampled at most in place of groups whose rewards are all equal; 0 keeps those."""


@dataclass(frozen=True)
class ScoringConfig:
    """The processes in which completions are scored, and what one completion may take there."""

    deadline: float = 10.0
    """Seconds, of time and of processor time, for all rewards of one completion; one that takes
    longer has no score."""
    memory_mb: int = 2048
    """MiB of memory that a process may hold."""
    workers: int = 0
    """Processes; 0: as many as there are processors, at most 8."""
    max_failed: float = 0.1
    """Share of a step's completions, and more than one, that end the run if they have no score."""


@dataclass(frozen=True)
class GrpoConfig:
    """The objective."""

    advantage: Literal["std", "mean", "leave_one_out"] = "std"
    """Rewards minus the group's mean over its standard deviation; without it; RLOO."""
    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """How token losses are put together, and which ratio is clipped; `gspo` wants clips of about
    3e-4 and 4e-4, `cispo` a clip_low of 1."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped; DAPO uses 0.28."""
    kl_beta: float = 0.0
    """Weight of the KL term; at 0 no reference model is kept."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator; k1 is for comparison: as a loss its gradient is zero on average."""
    reference: Literal["device", "host"] = "device"
    """Where the reference model is kept: beside the policy, or in the host's memory, from which it
    comes to the devices for its pass over each batch. With adapters it is the model without them,
    and takes none."""
    entropy_bonus: float = 0.0
    """Weight of the entropy that is added to the objective."""
    overlong: Literal["keep", "mask", "soft"] = "keep"
    """Completions cut at the limit: trained as they are, left out, or punished ahead of it."""
    overlong_buffer: int = 64
    """With `soft`: tokens before the limit over which the punishment grows to 1."""


@dataclass(frozen=True)
class UpdateConfig:
    """The optimiser, and how often a rollout is used."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: as it is, or down to 0 behind the last step of the run."""
    warmup_steps: int = 0
    """Optimiser steps from 0 up to `lr`."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW's first moment is kept; `bfloat16` saves two bytes a parameter. The second is
    float32 either way: its steps of 1 - b2 are too small for eight bits of mantissa."""
    weight_decay: float = 0.0
    """Applied to matrices, never to norms and biases."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never does."""
    epochs: int = 1
    """Passes over each rollout (mu)."""
    minibatches: int = 1
    """Optimiser steps in a pass; divides `rollout.problems`."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are added up: less memory, the same result."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out files: before the first update, on the way, and at the end."""

    every: int = 10
    """Steps between evaluations on the first file; 0 means only before and after."""
    batch: int = 50
    """Problems decoded together."""
    samples: int = 1
    """Completions of each problem at `sampling.temperature` beside the greedy one; 0 for none."""


@dataclass(frozen=True)
class SignalConfig:
    """When there is nothing to learn from, say so instead of running on."""

    preflight_groups: int = 8
    """Groups sampled before the first update, in whole batches, and four times as many before
    refusing to start; 0 skips the check."""
    min_share: float = 0.1
    """Share of them that must have unequal rewards."""
    patience: int = 5
    """Steps in a row without a single such group after which the run stops. One whose answers all
    meet the schema, or earn full marks where there is none, does not count as such a step."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = 20
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Newest checkpoints kept; the best by evaluation is kept beside them."""


@dataclass(frozen=True)
class Config:
    """A run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: dict[RewardName, float] = field(default_factory=lambda: {"graded": 1.0})
    """Reward to weight: `ladder`, `graded`, `fields`, `module:attribute` or `file.py:attribute`."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    signal: SignalConfig = field(default_factory=SignalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# What the numbers must be. nan is none of it; a seed outside its range is another one's double.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "run.seed"),
    (
        "at least 0 and finite",
        lambda x: 0 <= x < math.inf,
        "run.steps lora.rank sampling.temperature sampling.top_k sampling.draft rollout.max_refills"
        " scoring.workers grpo.clip_low grpo.clip_high grpo.kl_beta update.warmup_steps"
        " update.weight_decay update.clip_norm eval.every eval.samples signal.preflight_groups",
    ),
    (
        "at least 1",
        lambda x: x >= 1,
        "model.logits_mb data.max_prompt_tokens sampling.max_tokens rollout.problems update.epochs"
        " update.minibatches update.microbatches eval.batch signal.patience checkpoint.every"
        " checkpoint.keep",
    ),
    ("at least 2: rewards are compared within a group", lambda x: x >= 2, "rollout.group"),
    (
        "above 0 and finite",
        lambda x: 0 < x < math.inf,
        "run.stall lora.alpha scoring.deadline update.lr update.eps",
    ),
    ("at least 256", lambda x: x >= 256, "scoring.memory_mb"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "sampling.min_p signal.min_share"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "sampling.top_p"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "scoring.max_failed update.b1 update.b2"),
    ("finite", math.isfinite, "grpo.entropy_bonus"),
)


def check_ranges(config: Config) -> None:
    """Refuses numbers that are none of their field's.

    Raises:
      ValueError: one line that names the field and says what it must be.
    """
    for must_be, holds, names in RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            if not holds(value):
                raise ValueError(f"{name} is {value}; it must be {must_be}")


def check_settings(config: Config) -> None:
    """Refuses settings that contradict each other, whatever the files they name.

    Raises:
      ValueError: one line that names the field and says what it must be.
    """
    if config.model.attention == "cudnn" and config.model.dtype != "bfloat16":
        raise ValueError("model.attention = 'cudnn' computes in bfloat16: set model.dtype to it")

    if config.lora.rank and not config.lora.targets:
        raise ValueError("lora.targets is empty; name at least one weight, or set lora.rank to 0")

    sampling = config.sampling
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0; training needs samples that differ")
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if truncated and not sampling.accept_mismatch:
        raise ValueError(
            "sampling.top_k, top_p and min_p draw from a part of the distribution, but training"
            " takes log-probabilities of the whole: leave them at 0, 1.0 and 0.0, or set"
            " sampling.accept_mismatch"
        )
    if config.grpo.overlong == "soft" and not (
        1 <= config.grpo.overlong_buffer <= sampling.max_tokens
    ):
        raise ValueError(
            f"grpo.overlong_buffer is {config.grpo.overlong_buffer}; with grpo.overlong = 'soft' it"
            f" must be from 1 to sampling.max_tokens ({sampling.max_tokens})"
        )


def check_weights(config: Config) -> None:
    """Refuses rewards whose weights say nothing.

    Raises:
      ValueError: one line that names the field and says what it must be.
    """
    for name, weight in config.rewards.items():
        if not math.isfinite(weight):
            raise ValueError(f"rewards: the weight of {name!r} is {weight}; it must be finite")
    if not any(config.rewards.values()):
        raise ValueError(
            "rewards has no weight other than 0; give a reward one, as in graded = 1.0"
        )


def validate(config: Config) -> None:
    """Refuses a training run that would fail late, or silently do something else than it says.

    Whether the batch divides is checked where the devices are known.

    Raises:
      ValueError: one line that names the field and says what it must be.
    """
    check_ranges(config)
    check_settings(config)
    check_weights(config)
    if not config.run.dir or Path(config.run.dir).is_file():
        raise ValueError(f"run.dir is {config.run.dir!r}; it must name a directory")
    if not config.model.path or not Path(config.model.path).is_dir():
        raise ValueError(
            f"model.path is {config.model.path!r}, which is no directory;"
            " it must be a downloaded Hugging Face model"
        )
    data = config.data
    if not data.heldout:
        raise ValueError("data.heldout is empty; name at least one file to evaluate on")
    files = [("data.train", data.train), *(("data.heldout", file) for file in data.heldout)]
    optional = ("schema", data.schema), ("system", data.system), ("examples", data.examples)
    files += [(f"data.{name}", file) for name, file in optional if file]
    for name, file in files:
        if not Path(file).is_file():
            raise ValueError(f"{name} is {file!r}, which is no file; name an existing one")
