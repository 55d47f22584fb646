"""Is there anything to learn from? Looked at before the first update and at every step."""

from collections.abc import Sequence

import numpy as np

from jaxgrpo.config import SignalConfig
from jaxgrpo.redact import printable
from jaxgrpo.rollout import Group

_ADVICE = (
    "try a higher sampling.temperature, a larger rollout.group, {}, a prompt that says what is"
    " wanted, or a model that was first fine-tuned on examples"
)
_ROUNDING = 1e-5  # of a sum of rewards in float32


class NoSignalError(ValueError):
    """Groups have equal rewards, so that GRPO has nothing to learn."""


def describe(groups: Sequence[Group]) -> list[str]:
    """What the untrained model does: a reward histogram and a completion for each outcome."""
    rewards = _rewards(groups).astype(np.float64)
    sampled = sum(len(group.verdicts) for group in groups)
    without = f", {sampled - len(rewards)} without a score" if sampled > len(rewards) else ""
    lines = [f"preflight: {sampled} completions of {len(groups)} problems{without}; rewards:"]
    counts, edges = np.histogram(rewards, bins=min(8, len(np.unique(rewards)) + 1))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            bar = "#" * max(1, round(30 * int(count) / len(rewards)))
            lines.append(f"  {low:6.2f} to {high:6.2f}  {count:5d} {bar}")
    examples: dict[str, tuple[str, str]] = {}
    for group in groups:
        for i, (verdict, text) in enumerate(zip(group.verdicts, group.answers.texts, strict=True)):
            reward = f"reward {group.rewards_G[i]:.2f}" if group.scored_G[i] else "no score"
            examples.setdefault(verdict.reason, (reward, text))
    for reason, (reward, text) in list(examples.items())[:5]:
        lines.append(f"  {printable(reason, 40)}, {reward}: {printable(text, 120)}")
    with_signal = sum(group.has_signal for group in groups)
    lines.append(f"  {with_signal} of {len(groups)} groups have unequal rewards to learn from")
    return lines


def check(groups: Sequence[Group], config: SignalConfig, full: float | None = None) -> None:
    """Refuses to start where too few groups have any variance.

    Args:
      groups: what was sampled.
      config: how many are too few.
      full: see `solved`.

    Raises:
      NoSignalError: with the share, what all completions have in common, and what to try.
    """
    if has_enough(groups, config):
        return
    share = _share(groups)
    if solved(groups, full):
        are, advice = "earn full marks", ""
        if full is None:  # values may be wrong in valid answers, the same way in all of a group
            are = "are valid"
            advice = (
                ", or, where values are wrong still, more varied samples: a higher"
                " sampling.temperature, a larger rollout.group"
            )
        raise NoSignalError(
            f"all {len(groups)} groups {are} already and {share:.0%} have unequal rewards (their"
            f" mean: {_rewards(groups).mean():.2f}), so there is nothing to learn from them; try"
            f" harder problems or another reward{advice}"
        )
    raise NoSignalError(
        f"only {share:.0%} of {len(groups)} groups have unequal rewards, less than"
        f" signal.min_share = {config.min_share:.0%}; {_what_to_do(groups, full)}"
    )


def has_enough(groups: Sequence[Group], config: SignalConfig) -> bool:
    """Whether so many groups have unequal rewards that a run can start."""
    return _share(groups) >= config.min_share


def _share(groups: Sequence[Group]) -> float:
    return sum(group.has_signal for group in groups) / len(groups)


class Patience:
    """Counts steps in a row in which no group had signal though the task was not `solved`.

    Attributes:
      full: see `solved`.
      idle: how many it was so far; part of what a checkpoint keeps.
    """

    def __init__(self, config: SignalConfig, idle: int = 0, full: float | None = None):
        self._config = config
        self.full = full
        self.idle = idle

    def see(self, groups: Sequence[Group]) -> None:
        """Takes note of what a step sampled.

        Raises:
          NoSignalError: this was one step too many.
        """
        learns = any(group.has_signal for group in groups) or solved(groups, self.full)
        self.idle = 0 if learns else self.idle + 1
        if self.idle >= self._config.patience:
            raise NoSignalError(
                f"{self.idle} steps in a row without a group of unequal rewards;"
                f" {_what_to_do(groups, self.full)}"
            )


def solved(groups: Sequence[Group], full: float | None) -> bool:
    """Whether every completion meets the schema, or earns full marks.

    Args:
      groups: what was sampled.
      full: what a right completion earns where rewards alone say what is right (`full_marks`).
    """
    if full is None:
        return all(verdict.score == 1.0 for group in groups for verdict in group.verdicts)
    return all(
        bool(np.all(group.scored_G & (group.rewards_G >= full - _ROUNDING))) for group in groups
    )


def _rewards(groups: Sequence[Group]) -> np.ndarray:
    """Of all completions that have a score, of which there are some."""
    return np.concatenate([group.rewards_G[group.scored_G] for group in groups])


def _what_to_do(groups: Sequence[Group], full: float | None) -> str:
    """Names the plateau, where every completion sits at one and the same value, and what helps."""
    rewards = np.unique(_rewards(groups))
    reasons = {verdict.reason for group in groups for verdict in group.verdicts}
    if full is None:
        advice = _ADVICE.format("the graded reward instead of the ladder")
        what = printable(reasons.pop(), 60) if len(reasons) == 1 else f"{len(reasons)} reasons"
        what = f" ({what})"
    else:  # the reasons are why it is no JSON, which it need not be
        advice, what = _ADVICE.format("rewards that pay for a part of what is right"), ""
    if len(rewards) > 1:
        return advice
    return f"all completions sit on one plateau at reward {rewards[0]:.2f}{what}: {advice}"
