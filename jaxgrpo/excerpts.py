"""What a report shows of what a model has written: few texts, chosen and cut.

So a page has a bounded size, however long the run was. All texts are harmless and redacted.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from itertools import groupby
from operator import itemgetter
from statistics import fmean, pstdev
from typing import Any

from jaxgrpo.charts import spread
from jaxgrpo.redact import harmless, printable, redact

STEPS = 20  # of a run
COMPLETIONS = 8  # of a group, that differ
VERSIONS = 6  # of an answer, that differ
CHARACTERS = 1500  # of a text
_REASON = 60  # characters

Record = Mapping[str, Any]


def count_reasons(records: Iterable[Record]) -> dict[int, Counter[str]]:
    """How often each reason was given at each step, from completions.jsonl."""
    counts: dict[int, Counter[str]] = {}
    for record in records:
        counts.setdefault(record["step"], Counter())[printable(record["reason"], _REASON)] += 1
    return counts


def choose_groups(records: Iterable[Record], steps: Collection[int]) -> Iterator[dict[str, Any]]:
    """The best, the worst and the most divided group of some steps, from completions.jsonl.

    Args:
      records: in the order of the file; only one step's are held at a time.
      steps: which of them.

    Yields:
      JSON objects: `step`, `problem`, `kinds` (of `best`, `worst`, `divided`), `mean` and `spread`
      (the standard deviation) of the rewards, `n` completions, and of those that differ `texts`
      with `text`, `reward` (None without a score), `reason` and `count`, and the number that are
      `left` out. A group without any score is none of the three.
    """
    chosen = (record for record in records if record["step"] in steps)
    for step, of_step in groupby(chosen, itemgetter("step")):
        groups: list[list[Record]] = []
        for record in of_step:
            if record["sample"] == 0:
                groups.append([])
            groups[-1].append(record)
        groups = [group for group in groups if _rewards(group)]
        if not groups:
            continue
        rewards = [*map(_rewards, groups)]
        means, spreads = [*map(fmean, rewards)], [*map(pstdev, rewards)]
        kinds = {
            "best": means.index(max(means)),
            "divided": spreads.index(max(spreads)),
            "worst": means.index(min(means)),
        }
        for index in dict.fromkeys(kinds.values()):
            yield {
                "step": step,
                "problem": printable(groups[index][0]["problem"]),
                "kinds": [kind for kind, i in kinds.items() if i == index],
                "mean": round(means[index], 4),
                "spread": round(spreads[index], 4),
                "n": len(groups[index]),
                **_texts(groups[index]),
            }


def answer_versions(records: Iterable[Record]) -> list[dict[str, Any]]:
    """How the answers to some held-out problems went, from answers.jsonl.

    Returns:
      For each problem a JSON object: `problem`, `left` versions that are not shown, and `versions`
      with the `first` and the `last` step that gave it, `reason`, and `parts`: pairs of a kind and
      a text. Beside the version before, a part is `same`, `new`, or `gone`.
    """
    answers: dict[str, dict[int, Record]] = {}
    for record in records:
        answers.setdefault(record["problem"], {})[record["step"]] = record
    result = []
    for problem, by_step in answers.items():
        versions: list[dict[str, Any]] = []
        for (text, reason), same in groupby(by_step.values(), itemgetter("text", "reason")):
            steps = [record["step"] for record in same]
            versions.append({"first": steps[0], "last": steps[-1], "text": text, "reason": reason})
        shown = [versions[i] for i in spread(len(versions), VERSIONS)]
        before = None
        for version in shown:
            text = _cut(version.pop("text"))
            version["reason"] = printable(version["reason"], _REASON)
            version["parts"] = [("same", text)] if before is None else _changes(before, text)
            before = text
        result.append(
            {
                "problem": printable(problem),
                "left": len(versions) - len(shown),
                "versions": shown,
            }
        )
    return result


def _rewards(group: Iterable[Record]) -> list[float]:
    return [record["reward"] for record in group if record["reward"] is not None]


def _texts(group: Iterable[Record]) -> dict[str, Any]:
    """Those of a group's completions that are shown, from the highest reward to none."""
    alike = Counter((r["reward"], r["text"], r["reason"]) for r in group)
    ordered = sorted(alike.items(), key=lambda item: _order(item[0][0]))
    if len(ordered) > COMPLETIONS:
        half = COMPLETIONS // 2
        ordered = [*ordered[:half], *ordered[-half:]]
    texts = [
        {
            "text": _cut(text),
            "reward": reward if reward is None else round(reward, 4),
            "reason": printable(reason, _REASON),
            "count": count,
        }
        for (reward, text, reason), count in ordered
    ]
    return {"texts": texts, "left": alike.total() - sum(count for _, count in ordered)}


def _order(reward: float | None) -> float:
    return math.inf if reward is None else -reward


def _changes(before: str, text: str) -> list[tuple[str, str]]:
    """The parts of a text, by whether they stood in the one before; and what only stood there."""
    old, new = (re.findall(r"\w+|\s+|.", each) for each in (before, text))
    parts = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new).get_opcodes():
        match kind:
            case "equal":
                parts.append(("same", "".join(new[k:m])))
            case "delete":
                parts.append(("gone", "".join(old[i:j])))
            case _:
                parts.append(("new", "".join(new[k:m])))
    return parts


def _cut(text: str) -> str:
    text = redact(text)
    more = f" ... ({len(text)} characters)" if len(text) > CHARACTERS else ""
    return harmless(text[:CHARACTERS]) + more
