"""What the programs of a run hold, compute and exchange, from closed formulas alone.

Products and arguments are counted as the programs have them: with the scores that a mask throws
away, with what rematerialisation computes again, and without what no result needs. Temporaries are
the large terms, with factors fitted to what the compiler says of H200; docs/plan.md says how far
they are from it.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxgrpo.config import Config
from jaxgrpo.models import lora
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.programs import (
    Batch,
    Call,
    Costs,
    Measured,
    abstract_state,
    bytes_on_device,
    divided,
    evaluation_batch,
    numbers_on_device,
    rollout_batch,
    run_programs,
    sample_rules,
    train_rules,
)
from jaxgrpo.sharding import Rules, ways
from jaxgrpo.work import Shape, cache_bytes

NOTHING = Costs(0, {}, 0)


def abstract_mesh(fsdp: int, tp: int) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


class Division(NamedTuple):
    """Into how many parts a table divides, taking its `ffn` for heads and vocabulary, too.

    Attributes:
      problems: the batch.
      products: each product with weights, whose sums are then exchanged.
      shards: the width of parameters, gathered to be multiplied.
    """

    problems: int
    products: int
    shards: int

    @classmethod
    def of(cls, rules: Rules, mesh: AbstractMesh) -> "Division":
        """That of a table on a mesh."""
        return cls(*(ways(axes, mesh) for axes in (rules.problems, rules.ffn, rules.embed)))

    @property
    def work(self) -> int:
        """Parts of the work: devices, but for those that do the same."""
        return self.problems * self.products


class Estimate:
    """Figures of one device for each of a run's programs.

    Args:
      config: of the run.
      shape: of the model.
      mesh: sizes of the mesh; it needs no devices.
      node: devices of a node.
    """

    def __init__(self, config: Config, shape: Qwen3Config, mesh: AbstractMesh, node: int):
        self.config, self.model, self.mesh, self.node = config, shape, mesh, node
        self.train = Division.of(train_rules(config), mesh)
        self.sampler = Division.of(sample_rules(config), mesh)
        self.itemsize = 2 if config.model.dtype == "bfloat16" else 4
        self.rollout = self._of(rollout_batch(config))
        self.evaluation = self._of(evaluation_batch(config, mesh))
        model = abstract_state(config, shape, mesh).model
        trained, _ = lora.split(model)
        # On a device: parameters, those that are trained, and the sampler's copy of them in bytes.
        self.parameters = numbers_on_device(model)
        self.trained = numbers_on_device(trained)
        self.adapters = sum(x.size for x in jax.tree.leaves(trained)) if config.lora.rank else 0
        copy = divided(model, mesh, sample_rules(config))
        leaves = zip(jax.tree_util.tree_leaves_with_path(copy), jax.tree.leaves(model), strict=True)
        # What is already as it is to be, and no layer to be taken out of its stack, is not copied.
        self.sampler_copy = self.itemsize * numbers_on_device(
            [
                new
                for (path, new), old in leaves
                if "layers" in jax.tree_util.keystr(path)
                or old.dtype.itemsize != self.itemsize
                or old.sharding.shard_shape(old.shape) != new.sharding.shard_shape(new.shape)
            ]
        )

    def programs(self) -> dict[str, Measured]:
        """All of them, by phase."""
        estimates = {
            "sample": lambda call: self._sampled(self.rollout, call),
            "evaluate": lambda call: self._sampled(self.evaluation, call),
            # The reference of adapters is the model without them.
            "reference": lambda call: self._logprobs(call, without=self.adapters),
            "old": self._logprobs,
            "update": self._updated,
        }
        calls = run_programs(self.config, self.model, self.mesh)
        return {name: estimates[name](call) for name, call in calls.items()}

    def cache(self, s: Shape) -> int:
        """Bytes of the sampler's keys and values."""
        return cache_bytes(s, self.itemsize) // self.sampler.work

    # ------------------------------------------------------------------------ programs

    def _sampled(self, s: Shape, call: Call) -> Measured:
        to, width = self.sampler, s.prompt - 1
        prefixes, drawn = s.problems * width, s.branches * (1 + self.config.sampling.draft)
        # Of the last layer only keys and values are wanted.
        prefill = self._products(s, prefixes, s.problems * self._own_pairs(width))
        prefill *= (s.layers - 1) / s.layers
        prefill += 4 * s.width * s.kv_heads * s.head_dim * prefixes
        decode = self._products(s, drawn, drawn * (width + s.completion))
        decode += 2 * s.head_weights * drawn
        # Beside copy and cache: while the copy is made, the parameters as they are divided and the
        # largest stack of layers; then a layer of the prefill; then logits.
        stack = s.layers * s.width * max(s.ffn, s.heads * s.head_dim) / to.products
        gathering = self.itemsize * (self.parameters + stack) * (to != self.train)
        logits = 2 * 4 * drawn * s.vocab / to.work
        prefixes_alone = dataclasses.replace(s, group=0)
        working = max(gathering, logits, self._forward_layer(prefixes_alone, to))
        copied = 0.0
        if to != self.train:
            own = self.itemsize * self.parameters
            copied = max(self.sampler_copy - own, own * (1 - 1 / self.mesh.size))
        return Measured(
            bytes_on_device(call.args),
            0,
            0,
            int(self.sampler_copy + self.cache(s) + working),
            self._costs(
                prefill / to.work,
                {"all-gather": copied, "all-reduce": self._sums(s, to) * prefixes},
                max(self.train.shards, to.products),
            ),
            self._costs(decode / to.work, {"all-reduce": self._sums(s, to) * drawn}, to.products),
        )

    def _logprobs(self, call: Call, without: int = 0) -> Measured:
        s, to = self.rollout, self.train
        tokens = s.problems * (s.prompt - 1) + s.branches * s.completion
        flops = sum(self._forward(s)) + self._logits(s) - 2 * without * tokens
        # A gathered head, and logits or a layer.
        head = self.itemsize * s.head_weights / to.products * (to.shards > 1)
        layer = max(self._gathered_layers(s), self._forward_layer(s, to))
        temporaries = head + max(self._logits_chunk(s), layer)
        return Measured(
            bytes_on_device(call.args),
            0,
            0,
            int(temporaries),
            self._costs(flops / to.work, self._exchanged(s, passes=1), max(to.shards, to.products)),
            NOTHING,
        )

    def _updated(self, call: Call) -> Measured:
        parts, to = self.config.update.microbatches, self.train
        whole = self.rollout
        problems = whole.problems // (self.config.update.minibatches * parts)
        s = dataclasses.replace(whole, problems=problems)
        state = bytes_on_device(call.args[0])
        received = self._exchanged(s, passes=2)
        layers = self.itemsize * s.layer_weights / to.products
        if self.adapters:
            received["all-reduce"] += 2 * 4 * self.trained * (1 - 1 / to.problems)
        elif to.shards > 1:
            received["reduce-scatter"] = layers * (1 - 1 / to.shards)
        else:
            received["all-reduce"] += 2 * layers * (1 - 1 / to.problems)
        if not self.adapters:
            heads = 2 * self.itemsize * s.head_weights / to.products
            received["all-reduce"] += 2 * heads * (1 - 1 / to.problems)
        return Measured(
            bytes_on_device(call.args),
            state,
            state,
            int(self._update_temporaries(s, parts)),
            self._costs(
                parts * self._update_flops(s) / to.work,
                {kind: parts * size for kind, size in received.items()},
                max(to.problems, to.products),
            ),
            NOTHING,
        )

    def _update_flops(self, s: Shape) -> float:
        weights, scores = self._forward(s)
        logits = self._logits(s) * (3 if self._chunks(s) == 1 else 4)
        tokens = s.problems * (s.prompt - 1) + s.branches * s.completion
        rest = logits
        if self.adapters:  # what is frozen has no gradients
            rest -= self._logits(s) + 2 * s.layer_weights * tokens
        match self.config.model.remat:
            case "none":
                return 3 * (weights + scores) + rest
            case "dots":
                return 3 * weights + 4 * scores + rest
        # Whole layers again, but for their last product, which no gradient needs.
        last = 2 * s.layers * s.ffn * s.width * tokens
        return 4 * (weights + scores) - last + rest

    def _update_temporaries(self, s: Shape, parts: int) -> float:
        to = self.train
        results, scores = self._results(s, to), self._scores(s, to)
        kept = {
            "full": self.itemsize * s.width * self._tokens(s, to),
            "dots": results,
            "none": 3 * (results + scores),
        }[self.config.model.remat]
        # The head as it is multiplied; its gradient likewise; float32 gradients as they are kept.
        head, kept_heads = self.itemsize * s.head_weights / to.products, 0.0
        gradients = 4.0 * self.trained
        if not self.adapters:
            gradients = 4 * s.layer_weights / (to.products * to.shards)
            kept_heads = (4 if self.model.tied else 8) * s.head_weights / (to.products * to.shards)
            kept_heads += head
        return (
            (4 * self.trained if parts > 1 else 0)
            + s.layers * kept
            + head
            + kept_heads
            + self._gathered_layers(s)
            + max(1.5 * self._logits_chunk(s), gradients + 1.5 * results + 2.2 * scores)
        )

    # ------------------------------------------------------------------------ FLOPs, all devices

    def _of(self, batch: Batch) -> Shape:
        problems, group, prefix, tokens = batch
        return Shape.of(self.model, problems, group, prefix + 1, tokens)

    def _products(self, s: Shape, tokens: float, pairs: float) -> float:
        """Of all layers, for tokens multiplied with weights and pairs of query and key."""
        weights = s.layer_weights + self.adapters
        return 2 * weights * tokens + 4 * s.layers * s.heads * s.head_dim * pairs

    def _own_pairs(self, width: int) -> float:
        """Of a prefix with itself; cuDNN's are no `dot`s and are not counted."""
        return 0 if self.config.model.attention == "cudnn" else width * width

    def _forward(self, s: Shape) -> tuple[float, float]:
        """Of prefixes and branches: products with weights, and attention's own."""
        width, unroll = s.prompt - 1, self.config.model.unroll
        prefixes, branches = s.problems * width, s.branches * s.completion
        # Layers one by one: of the last one's prefix only keys and values are wanted.
        layers = (s.layers - 1) / s.layers if unroll else 1
        weights = layers * self._products(s, prefixes, 0) + self._products(s, branches, 0)
        if unroll:
            weights += 4 * s.width * s.kv_heads * s.head_dim * prefixes
        scores = layers * self._products(s, 0, s.problems * self._own_pairs(width))
        return weights, scores + self._products(s, 0, branches * (width + s.completion))

    def _chunks(self, s: Shape) -> int:
        """As in `token_logprobs`."""
        fits = max(1, (self.config.model.logits_mb << 20) // (4 * s.branches * s.vocab))
        return -(-s.completion // min(s.completion, fits))

    def _logits(self, s: Shape) -> float:
        chunks = self._chunks(s)
        positions = chunks * -(-s.completion // chunks)
        return 2 * s.head_weights * s.branches * positions

    # ------------------------------------------------------------------------ bytes on a device

    def _tokens(self, s: Shape, to: Division) -> float:
        """Number of tokens of a device's problems, prefixes and branches."""
        return (s.problems * (s.prompt - 1) + s.branches * s.completion) / to.problems

    def _results(self, s: Shape, to: Division) -> float:
        """What a layer's products with weights give."""
        inner = (s.heads + 2 * s.kv_heads) * s.head_dim + 2 * s.ffn
        return self.itemsize * self._tokens(s, to) * (inner / to.products + 3 * s.width)

    def _scores(self, s: Shape, to: Division) -> float:
        """A layer's float32 scores."""
        width = s.prompt - 1
        pairs = s.problems * self._own_pairs(width)
        pairs += s.branches * s.completion * (width + s.completion)
        return 4 * s.heads * pairs / to.work

    def _forward_layer(self, s: Shape, to: Division) -> float:
        return 0.3 * self._results(s, to) + 1.5 * self._scores(s, to)

    def _logits_chunk(self, s: Shape) -> float:
        return 4 * s.branches * s.vocab * -(-s.completion // self._chunks(s)) / self.train.work

    def _gathered_layers(self, s: Shape) -> float:
        """Weights of a layer at work, the one that comes and the one that goes."""
        layer = self.itemsize * s.layer_weights / s.layers / self.train.products
        return 3 * layer * (self.train.shards > 1)

    # ------------------------------------------------------------------------ bytes received

    def _sums(self, s: Shape, to: Division) -> float:
        """Sums of both of a layer's products whose parts are on several devices, for a token."""
        each = s.width * self.itemsize / to.problems
        return 2 * s.layers * each * 2 * (1 - 1 / to.products)

    def _exchanged(self, s: Shape, passes: int) -> dict[str, float]:
        """Layers that are gathered in so many passes and the head once, and sums."""
        to = self.train
        layers, head = (n * self.itemsize / to.products for n in (s.layer_weights, s.head_weights))
        tokens = s.problems * (s.prompt - 1) + s.branches * s.completion
        return {
            "all-gather": (passes * layers + head) * (1 - 1 / to.shards),
            "all-reduce": passes * self._sums(s, to) * tokens,
        }

    def _costs(self, flops: float, received: dict[str, float], group: int) -> Costs:
        """With the share of the traffic that comes from other nodes, in groups of such a size."""
        nodes = max(1, self.mesh.size // self.node)
        here = group / nodes
        share = (group - here) / here / (group - 1) if group > 1 and here >= 1 else 0.0
        total = {kind: size for kind, size in received.items() if size}
        return Costs(flops, total, share * sum(total.values()))
