"""The comparison as one table, one figure, one JSON file, and in plain words."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.files import replace_file
from scripts.evidence.arms import ARMS
from scripts.evidence.measure import DECODINGS, over_seeds
from scripts.evidence.statistics import mcnemar

Results = Mapping[str, Sequence[dict[str, Any]]]  # of a set of problems, by arm, one of each seed
_SIGNIFICANT = 0.05

_SHARES = {
    "valid": "schema_valid",
    "all right": "exact",
    "invented": "invented",
    "null where absent": "abstained",
}


def write_report(
    out: Path, about: Mapping[str, Any], results: Mapping[str, Sequence[dict[str, Any]]]
) -> None:
    """Writes `results.json`, `table.md` and `figure.png` into a directory.

    Args:
      out: the directory.
      about: what the results are of.
      results: by arm, of each seed what `scripts.compare` keeps.
    """
    record = {**about, "arms": results}
    replace_file(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    lines = []
    for name, of_set in by_set(results).items():
        problems = next(iter(of_set.values()))[0]["free"]["greedy"]["n"]
        lines += [f"## {name}, {problems} problems", "", *_tables(of_set), ""]
        lines += [*(f"- {line}" for line in conclusions(of_set)), ""]
    replace_file(out / "table.md", "\n".join(lines).encode())
    _draw(out / "figure.png", by_set(results))


def by_set(results: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Results]:
    """The same by the file of problems first."""
    sets = next(iter(results.values()))[0]["sets"]
    return {
        name: {
            arm: [{"seconds": run["seconds"], **run["sets"][name]} for run in runs]
            for arm, runs in results.items()
        }
        for name in sets
    }


def _tables(results: Results) -> Iterator[str]:
    """Greedy answers, fields, and samples; a line for each arm and decoding."""
    yield "| greedy | " + " | ".join(_SHARES) + " | tokens | s an answer |"
    yield "|---" * (len(_SHARES) + 3) + "|"
    for title, decoding, runs in _lines(results):
        shares = [_share(over_seeds(runs, decoding, "greedy", key)) for key in _SHARES.values()]
        greedy = [run[decoding]["greedy"] for run in runs]
        tokens = _mean(one["tokens"] for one in greedy)
        seconds = _mean(one["seconds"] / one["n"] for one in greedy)
        yield f"| {title} | {' | '.join(shares)} | {tokens:.1f} | {seconds:.3f} |"
    fields = [*next(iter(results.values()))[0]["free"]["greedy"]["fields"]]
    yield ""
    yield "| greedy, right | " + " | ".join(fields) + " | training, s |"
    yield "|---" * (len(fields) + 2) + "|"
    for title, decoding, runs in _lines(results):
        right = [_mean(run[decoding]["greedy"]["fields"][name] for run in runs) for name in fields]
        seconds = _mean(run["seconds"] for run in runs)
        cells = " | ".join(f"{100 * rate:.1f}" for rate in right)
        yield f"| {title} | {cells} | {seconds:.0f} |"
    sampled = [line for line in _lines(results) if "sampled" in line[2][0][line[1]]]
    if not sampled:
        return
    ks = [*sampled[0][2][0]["free"]["sampled"]["pass_at"]]
    yield ""
    yield f"| temperature 1 | valid | all right | {' | '.join(f'pass@{k}' for k in ks[1:])} |"
    yield "|---" * (2 + len(ks)) + "|"
    for title, decoding, runs in sampled:
        shares = [
            _share(over_seeds(runs, decoding, "sampled", key)) for key in ("schema_valid", "exact")
        ]
        passes = [_mean(run[decoding]["sampled"]["pass_at"][k] for run in runs) for k in ks[1:]]
        cells = [*shares, *(f"{100 * rate:.1f}" for rate in passes)]
        yield f"| {title} | {' | '.join(cells)} |"


def conclusions(results: Results) -> list[str]:
    """Which arms differ in how many answers are all right: all from the base, the best from all."""
    pairs = [
        ((name, decoding), ("base", against))
        for name in results
        for decoding, against in (("free", "free"), ("free", "constrained"), ("constrained",) * 2)
        if "base" in results and (name != "base" or decoding != against)
    ]
    rate = _rate(results)
    bests = sorted((_best_decoding(results, name) for name in results), key=rate, reverse=True)
    if bests[0][0] != "base":  # which is compared with all already
        pairs += [(bests[0], other) for other in bests if rate(other) < rate(bests[0])]
    return [_compared(results, one, other) for one, other in dict.fromkeys(pairs)]


def _rate(results: Results) -> Callable[[tuple[str, str]], float]:
    return lambda arm: _mean(run[arm[1]]["greedy"]["exact"]["rate"] for run in results[arm[0]])


def _best_decoding(results: Results, name: str) -> tuple[str, str]:
    """The arm as it answers best; without a constraint if that is as good."""
    return max(((name, decoding) for decoding in DECODINGS), key=_rate(results))


def _compared(results: Results, one: tuple[str, str], other: tuple[str, str]) -> str:
    """An arm against another, each as (name, decoding), by McNemar's test of each seed."""
    runs, others = (
        [run[how]["greedy"]["right"] for run in results[name]] for name, how in (one, other)
    )
    differences, ps = [], []
    for seed in range(max(len(runs), len(others))):  # what is not trained has one
        right, against = runs[seed % len(runs)], others[seed % len(others)]
        differences.append(100 * (sum(right) - sum(against)) / len(right))
        ps.append(mcnemar(right, against))
    if max(ps) < _SIGNIFICANT:
        verdict = "significant"
    elif min(ps) >= _SIGNIFICANT:
        verdict = "**not significant**"
    else:
        verdict = f"significant with {sum(p < _SIGNIFICANT for p in ps)} of {len(ps)} seeds"
    return (
        f"{_title(*one)} against {_title(*other)}: {_mean(differences):+.1f} points"
        f" all right, {verdict} (McNemar, p = {_several(ps)})"
    )


def _lines(results: Results) -> Iterator[tuple[str, str, Sequence[dict[str, Any]]]]:
    for name, runs in results.items():
        for decoding in DECODINGS:
            yield _title(name, decoding), decoding, runs


def _title(name: str, decoding: str) -> str:
    return ARMS[name].title + (", constrained decoding" if decoding == "constrained" else "")


def _share(share: Mapping[str, float] | None) -> str:
    if share is None:
        return ""
    rate, low, high = (100 * share[key] for key in ("rate", "low", "high"))
    return f"{rate:.1f} [{low:.1f}, {high:.1f}]"


def _several(ps: Sequence[float]) -> str:
    return ", ".join(f"{p:.2g}" for p in ps)


def _mean(values: Any) -> float:
    values = [*values]
    return sum(values) / len(values)


def _draw(path: Path, sets: Mapping[str, Results]) -> None:
    """All right and valid, greedy, with their intervals; a panel for each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.34 * len([*_lines(next(iter(sets.values())))])
    figure, axes = pyplot.subplots(
        1, len(sets), sharey=True, squeeze=False, figsize=(5 + 4 * len(sets), height),
        layout="constrained",
    )  # fmt: skip
    for axis, (name, results) in zip(axes[0], sets.items(), strict=True):
        lines = [*_lines(results)][::-1]
        for key, colour, shift, label in (
            ("schema_valid", "#9a9ea4", 0.15, "schema-valid"),
            ("exact", "#0072b2", -0.15, "all fields right"),
        ):
            for y, (_, decoding, runs) in enumerate(lines):
                share = over_seeds(runs, decoding, "greedy", key)
                assert share is not None
                low, rate, high = (100 * share[end] for end in ("low", "rate", "high"))
                axis.plot([low, high], [y + shift] * 2, color=colour, linewidth=2)
                axis.plot(rate, y + shift, "o", color=colour, label=label if y == 0 else None)
        axis.set_yticks(range(len(lines)), [title for title, _, _ in lines])
        axis.set_title(name, fontsize="medium")
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        "% of held-out problems, greedy, with Wilson 95 % intervals", fontsize="medium"
    )
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
