"""What passes between the modules: problems, verdicts, batches and the training state.

Shape letters, here and everywhere:
P problems in a batch, G completions per problem, L prefix length, C completion length,
D model width, N query heads, K key/value heads, H head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # reward functions live with this module, and they need no jax
    import jax

Array = Any  # a jax.Array on the devices, or a numpy.ndarray before it is put there


@dataclass(frozen=True)
class Verdict:
    """What a reward says of one completion.

    Attributes:
      score: the reward.
      reason: `valid`, why the text does not parse (`fenced`, `prose`, ...), or the failing keyword
        and its place (`type@/amount`); the vocabulary stands in `jaxgrpo.rewards.json_schema`.
      path: the JSON pointer of the failing place, empty for the whole document.
    """

    score: float
    reason: str
    path: str = ""


@dataclass(frozen=True)
class Problem:
    """One line of a data file.

    Attributes:
      number: its place in the file, counted from 0; its random keys are made of it.
      id: the line's `id`, or the number as text.
      prompt: token ids of the rendered chat, with the generation prompt; empty where another
        program renders it.
      row: the whole line as an object; what a reward function receives.
    """

    number: int
    id: str
    prompt: tuple[int, ...]
    row: dict[str, Any] = field(repr=False)

    @property
    def ground_truth(self) -> dict[str, Any] | None:
        """The right answer, where the line has one."""
        return self.row.get("ground_truth")


class Answered(Protocol):
    """One problem's completions as far as judging and counting need them, whoever drew them."""

    @property
    def problem(self) -> Problem:
        """What was asked."""

    @property
    def texts(self) -> list[str]:
        """The completions."""

    @property
    def length_G(self) -> Array:
        """Their tokens, int."""

    @property
    def stopped_G(self) -> Array:
        """Whether the model ended them, bool; False means cut at the limit."""


class Prompts(NamedTuple):
    """Prompts split into prefixes and the token that every branch starts with.

    Attributes:
      prefix_PL: token ids of each prompt without its last token, padded on the right.
      prefix_len_P: how many of them count; 0 for a prompt of one token.
      last_P: the last token of each prompt.
    """

    prefix_PL: Array
    prefix_len_P: Array
    last_P: Array


class Completions(NamedTuple):
    """What the sampler returns.

    Attributes:
      tokens_PGC: sampled ids; past the length they mean nothing.
      logprobs_PGC: float32 log-probability of each under the sampling temperature.
      length_PG: tokens sampled, the stop token included.
      stopped_PG: whether a stop token ended it; False means it was cut at the limit.
      passes_PG: forward passes that it took after the prefill; fewer than tokens where several
        were drawn in one.
    """

    tokens_PGC: Array
    logprobs_PGC: Array
    length_PG: Array
    stopped_PG: Array
    passes_PG: Array | None = None


class Masks(NamedTuple):
    """Which tokens could be drawn at each position of constrained completions.

    Attributes:
      table_PUW: uint32, a row for each of the U different sets of tokens that a problem's
        completions came by; bit i of word w is token 32 w + i.
      index_PGC: int32, which of them a token was drawn from.
    """

    table_PUW: Array
    index_PGC: Array


class RolloutBatch(NamedTuple):
    """Everything one update needs, a pytree of arrays whose first axis is P.

    Attributes:
      prompts: see `Prompts`.
      completions: see `Completions`.
      advantage_PG: float32.
      train_PG: bool; which completions count in the loss (a cut one may be masked out).
      masks: see `Masks`; None where completions were not constrained.
    """

    prompts: Prompts
    completions: Completions
    advantage_PG: Array
    train_PG: Array
    masks: Masks | None = None


class TrainState(NamedTuple):
    """What the update changes: donated to it and returned by it.

    Attributes:
      model: the policy, an NNX module used as a pytree; what is trained of it (`lora.split`) is
        float32.
      opt_state: optax state of what is trained, sharded like it.
      step: int32 scalar, rollouts trained on.
    """

    model: Any
    opt_state: Any
    step: jax.Array
