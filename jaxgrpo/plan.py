"""Says what a run will hold and cost on GPUs before one is paid for.

    python -m jaxgrpo.plan CONFIG.toml [--target h200|h100|FILE] [--devices 8] [--json] [--sweep]

Exit code 0 when the run fits, 1 when it does not, 2 on a mistake. docs/plan.md says what the
figures mean and how they come.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgrpo.advice import advise, sweep
from jaxgrpo.chips import Target, attached_target, read_target
from jaxgrpo.cli import parse, run_main, say
from jaxgrpo.config import Config, check_ranges, check_settings
from jaxgrpo.config_file import parse_args
from jaxgrpo.footprint import DEPTHS, Depth, Plan, budget, choose_depth, has_plugin, make_plan
from jaxgrpo.models.shapes import find_shape
from jaxgrpo.redact import json_lines


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan for, and how."""

    target: str = ""
    """h200, h100 or a GpuTargetConfigProto in text form; the GPU of this machine if not given, and
    h200 where there is none."""
    devices: int = 0
    """Number of GPUs; those of this machine, or those that the mesh asks for, if not given."""
    depth: Literal["auto", "cuda", "cpu", "arithmetic"] = "auto"
    """Compile for the GPU (needs JAX's CUDA plugin, no GPU: pip install 'jaxgrpo[plan]'), compile
    for virtual CPU devices, or do arithmetic alone; auto takes the first that works."""
    json: bool = False
    """One JSON object in place of tables."""
    sweep: bool = False
    """Compare meshes and numbers of micro-batches instead, by arithmetic if no depth is given."""


def main() -> None:
    """The command."""
    options, rest = parse(
        Options,
        prog="python -m jaxgrpo.plan CONFIG.toml [--section.field value ...]",
        description="Says what a run will hold and cost on GPUs that need not be here. CONFIG.toml"
        " and its options are those of jaxgrpo.train; of the model only config.json is read, or"
        " nothing where the last part of model.path is a known name as Qwen3-8B. Exit code 1: it"
        " does not fit.",
        args=sys.argv[1:],
        return_unknown_args=True,
    )
    config = parse_args(rest)
    check_ranges(config)
    check_settings(config)
    if not config.model.path:
        raise ValueError(
            "model.path is not set; name a model directory, or a known shape as Qwen3-8B"
        )
    shape = find_shape(config.model.path)
    target, devices = _hardware(options, config)
    if options.sweep:
        depth = choose_depth(options.depth, config) if options.depth != "auto" else "arithmetic"
        rows = list(sweep(config, shape, target, devices, depth))
        if options.json:
            print(json_lines([{"depth": depth, "target": target.name, "sweep": rows}]), end="")
        else:
            _print_sweep(rows, depth, target, devices)
        sys.exit(0 if any(row.get("fits") for row in rows) else 1)
    depth = choose_depth(options.depth, config)
    plan = make_plan(config, shape, target, devices, depth)
    fits = plan.peak <= budget(target)
    advice = [] if fits else advise(plan, config, shape, target, devices)
    if options.json:
        print(json_lines([record(plan, config, target, devices, advice)]), end="")
    else:
        _print_plan(plan, config, target, devices, advice)
    sys.exit(0 if fits else 1)


def _hardware(options: Options, config: Config) -> tuple[Target, int]:
    """The GPU and the number of them."""
    # What was compiled for devices that are not here cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.devices < 0:
        raise ValueError(f"--devices is {options.devices}; it must be at least 1")
    attached = Path("/proc/driver/nvidia/version").exists() and has_plugin()
    if attached and not options.target and os.environ.get("JAX_PLATFORMS") != "cpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return attached_target(), options.devices or jax.device_count()
    jax.config.update("jax_platforms", "cpu")
    mesh = config.mesh
    devices = mesh.fsdp * mesh.tp if min(mesh.fsdp, mesh.tp) > 0 else 1
    return read_target(options.target or "h200"), options.devices or devices


def record(
    plan: Plan, config: Config, target: Target, devices: int, advice: list[dict[str, Any]]
) -> dict[str, Any]:
    """The plan as a JSON object."""
    return {
        "depth": plan.depth,
        "target": {
            "name": target.name,
            "memory_bytes": target.memory,
            "budget_bytes": budget(target),
            "memory_bytes_per_second": target.bandwidth,
            "rates_of": target.rates_of,
            **target.rates._asdict(),
        },
        "devices": devices,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "phases": {
            name: {**held._asdict(), "total": held.total} for name, held in plan.held.items()
        },
        "donated_bytes": plan.donated,
        "work": [work._asdict() for work in plan.work],
        "step_seconds": plan.step_seconds,
        "run_gpu_hours": _gpu_hours(plan, config, devices),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_bytes_at_most": plan.checkpoint_bytes * (config.checkpoint.keep + 1),
        "host_bytes": plan.host_bytes,
        "peak_bytes": plan.peak,
        "spare_bytes": budget(target) - plan.peak,
        "fits": plan.peak <= budget(target),
        "advice": advice,
    }


def _gpu_hours(plan: Plan, config: Config, devices: int) -> float:
    return devices * config.run.steps * plan.step_seconds / 3600


def _print_plan(
    plan: Plan, config: Config, target: Target, devices: int, advice: list[dict[str, Any]]
) -> None:
    spare = budget(target) - plan.peak
    worst = plan.peak_phase
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    name = Path(config.model.path).name
    say(f"{name}, {plan.parameters:,} parameters, on {devices} x {target.name} ({mesh})")
    say(f"Figures: {DEPTHS[plan.depth]}.")
    if target.rates_of != target.name:
        say(f"Rates are those of {target.rates_of}: none are known of this GPU.")
    say(
        f"A device has {_gb(target.memory)} GB, of which {_gb(target.memory - budget(target))} stay"
        f" in reserve: {_gb(budget(target))} GB to use.\n"
    )
    held = {name: {**h._asdict(), "total": h.total} for name, h in plan.held.items()}
    columns = ["parameters", "optimizer", "reference", "batch", "sampler_copy", "cache", "rest"]
    titles = ["params", "optimiser", "reference", "batch", "copy", "KV cache", "rest", "total"]
    _table(
        ["GB on a device", *titles],
        [[name, *(_gb(h[c]) for c in [*columns, "total"])] for name, h in held.items()],
    )
    say()
    _table(
        ["a step, each device", "TFLOP", "HBM GB", "received GB", "least s", "limited by"],
        [
            [
                w.name,
                f"{w.flops / 1e12:.1f}",
                _gb(w.memory_bytes),
                _gb(sum(w.received.values())),
                f"{w.seconds:.3f}",
                w.limit,
            ]
            for w in plan.work
        ],
    )
    kinds = sorted({kind for w in plan.work for kind in w.received})
    received = {kind: sum(w.received.get(kind, 0.0) for w in plan.work) for kind in kinds}
    if received:
        say("received: " + ", ".join(f"{_gb(n)} GB by {kind}" for kind, n in received.items()))
    keep = config.checkpoint.keep
    say(
        f"\nA step takes {plan.step_seconds:.2f} s at least, {config.run.steps} steps"
        f" {_gpu_hours(plan, config, devices):.2f} GPU-hours: every part at the GPU's best,"
        " rewards, evaluation and refills not counted.\n"
        f"A checkpoint takes {_gb(plan.checkpoint_bytes)} GB on disk,"
        f" {_gb((keep + 2) * plan.checkpoint_bytes)} while one is written beside"
        f" the newest {keep} and the best."
    )
    if plan.host_bytes:
        say(f"The reference takes {_gb(plan.host_bytes)} GB of host memory in all.")
    if spare >= 0:
        say(f"\nFITS: at most {_gb(plan.peak)} GB on a device ({worst}), {_gb(spare)} GB to spare.")
        return
    say(f"\nDOES NOT FIT: {worst} needs {_gb(plan.peak)} GB, {_gb(-spare)} GB too much.")
    for start, each in zip(["change first:", *["or:"] * len(advice)], advice, strict=False):
        verdict = "fits" if each["fits"] else "does not suffice"
        say(f"  {start} {each['options']}  ({_gb(each['peak_bytes'])} GB: {verdict})")
    if not any(each["fits"] for each in advice):
        say("  no change that is known here suffices: take more devices or another GPU")


def _print_sweep(rows: list[dict[str, Any]], depth: Depth, target: Target, devices: int) -> None:
    say(f"{devices} x {target.name}, {_gb(budget(target))} GB to use on each")
    say(f"Figures: {DEPTHS[depth]}.\n")
    cells = []
    for row in rows:
        head = [str(row["fsdp"]), str(row["tp"]), str(row["microbatches"])]
        if "error" in row:
            cells.append([*head, "-", "-", "-", row["error"]])
        else:
            verdict = "fits" if row["fits"] else "does not fit"
            peak, seconds = _gb(row["peak_bytes"]), f"{row['step_seconds']:.2f}"
            cells.append([*head, peak, row["peak_phase"], seconds, verdict])
    _table(["fsdp", "tp", "micro-batches", "peak GB", "in", "least s a step", ""], cells)


def _table(titles: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, *rows]:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        say("  ".join([first, *rest]).rstrip())


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes < 100e9 else f"{nbytes / 1e9:.1f}"


if __name__ == "__main__":
    run_main(main)
