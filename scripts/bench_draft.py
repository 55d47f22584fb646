"""Times sampling with and without prompt lookup, on a trained model and real problems.

    python -m scripts.bench_draft --drafts 0 1 2 4 --problems 8 --group 8

A JSON line for each number of proposed tokens: tokens a pass, seconds of a batch beside those
without lookup, and whether the completions are the same.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import jax

from jaxgrpo.config import DEFAULT, MeshConfig
from jaxgrpo.config_file import load_config
from jaxgrpo.data import draw
from jaxgrpo.models.hf import load_hf
from jaxgrpo.rollout import Answers
from jaxgrpo.sharding import make_mesh
from jaxgrpo.task import load_task

BATCHES = 8


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT, help="model, data and limits")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--problems", type=int, default=8, help="sampled together")
    parser.add_argument("--group", type=int, default=8, help="completions of each")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    config = load_config(args.config)
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    plain: list[Answers] = []
    plain_seconds = 0.0
    with jax.set_mesh(mesh):
        model = load_hf(config.model.path, mesh, unroll=config.model.unroll)
        for tokens in dict.fromkeys([0, *args.drafts]):  # first without, to compare with
            sampling = replace(config.sampling, draft=tokens)
            with load_task(replace(config, sampling=sampling), mesh) as task:

                def run() -> list[Answers]:
                    answers: list[Answers] = []
                    for batch in range(BATCHES):
                        answers += task.sampler(
                            model,
                            draw(task.problems, batch * args.problems, args.problems, 0),
                            jax.random.key(batch),
                            temperature=args.temperature,
                            group=args.group,
                            batch=args.problems,
                        )
                    return answers

                answers, times = run(), []
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    run()
                    times.append((time.perf_counter() - start) / BATCHES)
            seconds = statistics.median(times)
            if not tokens:
                plain, plain_seconds = answers, seconds
            drawn = sum(int(a.length_G.sum()) for a in answers)
            passes = sum(int(a.passes_G.sum()) for a in answers)
            record = {
                "draft": tokens,
                "branches": args.problems * args.group,
                "tokens_per_pass": round(drawn / passes, 3),
                "seconds": round(seconds, 4),
                "seconds_by_plain": round(seconds / plain_seconds, 3),
                "same_completions": [a.texts for a in answers] == [a.texts for a in plain],
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
