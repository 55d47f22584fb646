"""What to change in a run that does not fit, and how meshes compare."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from jaxgrpo.chips import Target
from jaxgrpo.config import Config
from jaxgrpo.estimate import abstract_mesh
from jaxgrpo.footprint import Depth, Plan, budget, make_plan
from jaxgrpo.models.qwen3 import Qwen3Config
from jaxgrpo.programs import train_rules
from jaxgrpo.sharding import mesh_sizes, ways

Settings = dict[str, Any]  # `section.field` to value; `devices` to a number of them


def advise(
    plan: Plan, config: Config, shape: Qwen3Config, target: Target, devices: int
) -> list[dict[str, Any]]:
    """What to change first for a run that does not fit, and how many devices would do instead.

    Changes are tried by arithmetic, as far as it differs from the run's own arithmetic: one by one
    in the order of what they cost in time, then one upon the other. What is returned has been
    planned to the depth of the plan.

    Returns:
      `options`, the `peak_bytes` with them, and whether it `fits`.
    """
    before = make_plan(config, shape, target, devices, "arithmetic")

    def predicted(settings: Settings) -> tuple[int, str]:
        """Peak and its phase; a mesh that divides neither model nor batch never suffices."""
        try:
            after = make_plan(*_with(config, shape, target, devices, settings), "arithmetic")
        except ValueError:
            return sys.maxsize, plan.peak_phase
        more = {name: plan.held[name].total - before.held[name].total for name in plan.held}
        return max((held.total + more.get(name, 0), name) for name, held in after.held.items())

    def fits(settings: Settings) -> bool:
        return predicted(settings)[0] <= budget(target)

    def planned(settings: Settings) -> dict[str, Any]:
        arguments = _with(config, shape, target, devices, settings)
        try:
            peak = make_plan(*arguments, plan.depth).peak
        except ValueError:  # as more devices than there are virtual ones
            peak = predicted(settings)[0]
        options = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
        return {
            "options": " ".join(options),
            "peak_bytes": peak,
            "fits": peak <= budget(target),
        }

    def upon_each_other() -> Settings | None:
        settings: Settings = {}
        peak, phase = plan.peak, plan.peak_phase
        while peak > budget(target):
            here = _with(config, shape, target, devices, settings)[0]
            tried = (
                (settings | change, predicted(settings | change))
                for change in changes(here, devices, phase)
            )
            better = next((each for each in tried if each[1][0] < 0.995 * peak), None)
            if better is None:
                return None
            settings, (peak, phase) = better
        for name in list(settings):  # what a later change made needless
            fewer = {other: value for other, value in settings.items() if other != name}
            settings = fewer if fits(fewer) else settings
        parts = range(config.update.microbatches + 1, settings.get("update.microbatches", 0))
        less = ({"update.microbatches": count} for count in parts)
        return settings | next((each for each in less if fits(settings | each)), {})

    advice = []
    for change in filter(fits, changes(config, devices, plan.peak_phase)):
        advice.append(planned(change))
        if advice[-1]["fits"]:
            break
    else:
        if together := upon_each_other():
            advice.append(planned(together))
    more = ({"devices": devices << n, "mesh.fsdp": -1} for n in range(1, 7))
    if enough := next(filter(fits, more), None):
        advice.append(planned(enough))
    return advice


def changes(config: Config, devices: int, peak: str) -> Iterator[Settings]:
    """What would need less memory on the same devices, the cheapest in time first.

    Args:
      config: of the run.
      devices: that it has.
      peak: the phase that needs most.
    """
    update, model, rollout = config.update, config.model, config.rollout
    if peak == "update":
        sharing = ways(
            train_rules(config).problems, abstract_mesh(**mesh_sizes(config.mesh, devices))
        )
        parts = rollout.problems // (sharing * update.minibatches)
        for count in range(update.microbatches + 1, parts + 1):
            if parts % count == 0:
                yield {"update.microbatches": count}
        if model.remat != "full":
            yield {"model.remat": "full"}
    if peak == "evaluate" and config.eval.batch > 1:
        yield {"eval.batch": config.eval.batch // 2}
    if model.attention == "xla" and model.dtype == "bfloat16":
        yield {"model.attention": "cudnn"}
    if peak not in ("sample", "evaluate") and model.logits_mb > 64:
        yield {"model.logits_mb": model.logits_mb // 4}
    if config.grpo.kl_beta and config.grpo.reference == "device":
        yield {"grpo.reference": "host"}
    if update.moments == "float32":
        yield {"update.moments": "bfloat16"}
    if peak in ("sample", "evaluate") and config.mesh.sample_rules != "tp":
        yield {"mesh.sample_rules": "tp"}


def _with(
    config: Config, shape: Qwen3Config, target: Target, devices: int, settings: Settings
) -> tuple[Config, Qwen3Config, Target, int]:
    """The arguments of `make_plan` with some settings changed."""
    for name, value in settings.items():
        if name == "devices":
            devices = value
            continue
        section, field = name.split(".")
        values = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: values})
    return config, shape, target, devices


def sweep(
    config: Config, shape: Qwen3Config, target: Target, devices: int, depth: Depth
) -> Iterator[dict[str, Any]]:
    """A row for every mesh and number of micro-batches, or why that mesh cannot be."""
    for fsdp in (n for n in range(devices, 0, -1) if devices % n == 0):
        mesh = dataclasses.replace(config.mesh, fsdp=fsdp, tp=devices // fsdp)
        row = {"fsdp": fsdp, "tp": devices // fsdp}
        parts = config.rollout.problems // (fsdp * config.update.minibatches)
        for count in (n for n in range(1, max(1, parts) + 1) if max(1, parts) % n == 0):
            update = dataclasses.replace(config.update, microbatches=count)
            here = dataclasses.replace(config, mesh=mesh, update=update)
            try:
                plan = make_plan(here, shape, target, devices, depth)
            except ValueError as error:
                yield row | {"microbatches": count, "error": str(error)}
                break
            yield row | {
                "microbatches": count,
                "peak_bytes": plan.peak,
                "peak_phase": plan.peak_phase,
                "fits": plan.peak <= budget(target),
                "step_seconds": plan.step_seconds,
            }
