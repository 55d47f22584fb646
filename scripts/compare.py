"""Does GRPO pay, and against what: every arm on the same held-out problems, by the same measure.

    python -m scripts.compare                       the tiny model; OUT is runs/compare
    python -m scripts.compare --task orders --out runs/compare_orders
    python -m scripts.compare CONFIG.toml --arms base,grpo --heldout FILE.jsonl [FILE.jsonl ...]
    python -m scripts.compare CONFIG.toml ... --run.steps 20 --update.lr 1e-5

The arms: the base, a stricter prompt with examples, SFT on flawed and on right answers, GRPO with
the schema's reward, with the configuration's rewards (both tasks have schema and fields), and with
the fields' in constrained rollouts. Each is measured as it is and under constrained decoding
(`sampling.constrain`), trained ones with each seed. OUT has a folder for each arm and seed, so that
the same command goes on where it was stopped; then `results.json`, `table.md` and `figure.png`.
Fields of the configuration are options, as they are of `jaxgrpo.train`, but for those that are set
here: `run.dir`, `run.seed`, `data.heldout`, `sampling.constrain`, `eval`. Other settings
take another OUT.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from jaxgrpo.checkpoint import load_run_model
from jaxgrpo.config import Config, SamplingConfig
from jaxgrpo.config_file import parse_args
from jaxgrpo.constrain import Constraint
from jaxgrpo.data import load_problems, read_frame
from jaxgrpo.files import replace_file
from jaxgrpo.identity import digests
from jaxgrpo.models.hf import load_hf
from jaxgrpo.models.hf_config import read_config
from jaxgrpo.rewards.json_schema import load_schema
from jaxgrpo.rewards.pool import Pool
from jaxgrpo.rollout import Sampler
from jaxgrpo.sharding import make_mesh
from jaxgrpo.tokenizer import load_tokenizer
from scripts.evidence.arms import ARMS, Arm, asked_strictly
from scripts.evidence.measure import DECODINGS, measure
from scripts.evidence.report import write_report
from scripts.evidence.tasks import TASKS, Task


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        usage="python -m scripts.compare [CONFIG.toml] [options] [--section.field value ...]",
        epilog="CONFIG.toml and its fields are those of the GRPO runs; else the task's own.",
        allow_abbrev=False,
    )
    parser.add_argument("--task", default="invoices", choices=TASKS, help="%(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--arms", help=f"some of {','.join(ARMS)}; else all that the task can have")
    parser.add_argument("--seeds", default="0,1,2", help="of what is trained (%(default)s)")
    parser.add_argument(
        "--heldout",
        type=Path,
        nargs="+",
        help="files of problems; else such as are made for this, of invoices the hard ones too",
    )
    parser.add_argument("--problems", type=int, default=500, help="at most, of each file")
    parser.add_argument("--samples", type=int, default=4, help="answers at temperature 1")
    argv = sys.argv[1:]
    file = [argv.pop(0)] if argv and not argv[0].startswith("-") else []
    args, fields = parser.parse_known_args(argv)

    task = TASKS[args.task]
    names = (
        args.arms.split(",") if args.arms else [name for name in ARMS if name not in task.without]
    )
    if unknown := set(names) - ARMS.keys():
        parser.error(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    if find_spec("matplotlib") is None:
        parser.error("the figure takes matplotlib: pip install '.[report]'")
    try:
        config = parse_args([*(file or task.config), *fields])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not Path(config.model.path).is_dir():
        parser.error(
            f"no model in {config.model.path}; that of the orders is made by"
            " `python -m scripts.build_orders`"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    fresh = args.out / f"{args.task}.jsonl"
    heldout = args.heldout or [fresh, *task.more_heldout]
    settings = {
        **{name: getattr(args, name) for name in ("task", "problems", "samples")},
        **asdict(with_heldout(config, heldout)),
    }
    if other := _other_settings(args.out / "settings.json", settings):
        parser.error(f"{args.out} has results with another {', '.join(other)}: name another --out")
    if not args.heldout:
        fresh.write_text(task.problem_lines(args.problems), "utf-8")

    results: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        arm = ARMS[name]
        for seed in map(int, args.seeds.split(",") if arm.seeds else ["0"]):
            place = args.out / f"{name}_{seed}"
            done = place / "result.json"
            if not done.exists():
                print(f"{arm.title}, seed {seed}", flush=True)
                result = try_arm(arm, task, with_seed(config, seed), heldout, args, place)
                replace_file(done, json.dumps(result).encode())
            results.setdefault(name, []).append(json.loads(done.read_text("utf-8")))
    about = {
        "command": " ".join(["python -m scripts.compare", *sys.argv[1:]]),
        "commit": _commit(),
        "digests": digests(with_heldout(config, heldout)),
        "seeds": args.seeds,
    }
    write_report(args.out, about, results)
    print((args.out / "table.md").read_text("utf-8"))


def _other_settings(file: Path, settings: Mapping[str, Any]) -> list[str]:
    """Names of what differs from the settings that `file` has; where there is none, writes it."""
    now = json.loads(json.dumps(settings))
    if not file.exists():
        replace_file(file, json.dumps(now).encode())
    kept = json.loads(file.read_text("utf-8"))
    return [name for name in now if now[name] != kept.get(name)]


def with_seed(config: Config, seed: int) -> Config:
    """The configuration with another seed."""
    return replace(config, run=replace(config.run, seed=seed))


def with_heldout(config: Config, heldout: Sequence[Path]) -> Config:
    """The configuration with other files to evaluate on."""
    return replace(config, data=replace(config.data, heldout=tuple(map(str, heldout))))


def try_arm(
    arm: Arm,
    task: Task,
    config: Config,
    heldout: Sequence[Path],
    args: argparse.Namespace,
    place: Path,
) -> dict[str, Any]:
    """Makes an arm's model and measures it.

    Returns:
      `seed`; `seconds` that making it took; `sets`: by file and decoding what `measure` says.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if arm.strict:
        config = asked_strictly(config, place)
    start = time.perf_counter()
    path = arm.make(config, place / "model", task)
    seconds = time.perf_counter() - start

    schema = load_schema(config.data.schema)
    tokenizer = load_tokenizer(config.model.path)
    limit = read_config(config.model.path).max_positions - config.sampling.max_tokens
    frame = read_frame(config.data.system, config.data.examples)
    sets = {
        file.stem: load_problems(file, tokenizer, limit, frame=frame)[: args.problems]
        for file in heldout
    }
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Pool(schema, {}, config.scoring) as pool:
        if (path / "config.toml").exists():
            model, _, _ = load_run_model(path, mesh=mesh)
        else:
            model = load_hf(path, mesh)
        constraint = Constraint(tokenizer, model.config.vocab, schema)
        sampling = SamplingConfig(max_tokens=config.sampling.max_tokens)
        sampler = Sampler(tokenizer, sampling, limit, mesh, constraint=constraint)
        measured = {
            name: {
                decoding: measure(
                    sampler,
                    pool,
                    model,
                    problems,
                    constrained=decoding == "constrained",
                    samples=args.samples,
                    seed=config.run.seed,
                    is_grounded=task.is_grounded,
                )
                for decoding in DECODINGS
            }
            for name, problems in sets.items()
        }
    return {"seed": config.run.seed, "seconds": round(seconds, 1), "sets": measured}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
