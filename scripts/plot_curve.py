"""Draws the learning curve of a run, the picture in the README.

python -m scripts.plot_curve RUN_DIR OUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

VALID, EXACT, SAMPLED = "#1f77b4", "#d95f02", "#9ecae1"


def main(run_dir: str, out: str) -> None:
    """Plots the first held-out file's greedy evaluations and the share of valid samples."""
    evaluations = [
        json.loads(line) for line in (Path(run_dir) / "eval.jsonl").read_text("utf-8").splitlines()
    ]
    first = evaluations[0]["data"]
    greedy = [e for e in evaluations if e["data"] == first and e["temperature"] == 0]
    metrics = [
        json.loads(line)
        for line in (Path(run_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=160, layout="constrained")
    axes.plot(
        [m["step"] for m in metrics],
        [m["valid_share"] for m in metrics],
        color=SAMPLED,
        label="training samples at T=1, schema-valid",
    )
    steps = [e["step"] for e in greedy]
    for name, colour, label in (
        ("schema_valid", VALID, "schema-valid"),
        ("exact", EXACT, "all fields right"),
    ):
        shares = [e[name] for e in greedy]
        axes.plot(
            steps,
            [share["rate"] for share in shares],
            "o-",
            color=colour,
            label=f"{greedy[0]['n']} held-out problems, greedy, {label} (95 % interval)",
        )
        low, high = ([share[end] for share in shares] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="GRPO steps", ylabel="share of answers", ylim=(0, 1.02), xlim=(0, steps[-1]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
