"""Whether this machine is fit for a run: devices, memory, disk."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jax

from jaxgrpo.checkpoint import room
from jaxgrpo.chips import read_target
from jaxgrpo.config import Config
from jaxgrpo.findings import Finding, no, ok, skipped
from jaxgrpo.footprint import Plan, has_plugin, make_plan
from jaxgrpo.models.shapes import find_shape

DRIVER = Path("/proc/driver/nvidia/version")
_FIRST_CUDA13 = 580  # driver
# Bytes that libraries, compiler and two reward workers take in any run. The default run, whose
# programs were all compiled anew, held 1.26 GB at its peak (proportional set sizes, two CPU cores);
# 0.43 GB of them are in its plan.
_PROCESS = 800 << 20


def check_devices() -> Iterator[Finding]:
    """What JAX runs on, and whether it leaves a GPU aside."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield no(f"JAX has no devices: {error}; set or unset JAX_PLATFORMS")
        return
    first = devices[0]
    memory = (first.memory_stats() or {}).get("bytes_limit")
    each = f", {_gb(memory)} each" if memory else ""
    yield ok(f"{len(devices)} x {first.device_kind} ({first.platform}){each}")
    visible = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if first.platform != "cpu" or not visible:
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        yield skipped("there is an NVIDIA GPU, not used because JAX_PLATFORMS is cpu")
    elif not DRIVER.exists():
        yield no(f"there is an NVIDIA GPU, but no driver ({DRIVER}): install it")
    elif not has_plugin():
        found = re.search(r"Module\D+(\d+)\.", DRIVER.read_text("utf-8", "replace"))
        cuda = 13 if found and int(found[1]) >= _FIRST_CUDA13 else 12
        yield no(f"there is an NVIDIA GPU, but JAX runs on cpu: pip install 'jaxgrpo[cuda{cuda}]'")
    else:
        yield no(
            "there is an NVIDIA GPU, but JAX runs on cpu although its plugin is installed:"
            " JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' says why"
        )


def check_room(config: Config) -> Iterator[Finding]:
    """Mesh, memory of the host and disk, by the plan's arithmetic."""
    try:
        devices = jax.devices()
        # Memory and disk are counted alike for every target.
        target = read_target("h200")
        plan = make_plan(config, find_shape(config.model.path), target, len(devices), "arithmetic")
    except (ValueError, OSError) as error:
        yield no(error)
        return
    except RuntimeError:  # no devices, which was said
        yield skipped("memory and disk: not checked without devices")
        return
    yield ok("mesh " + " x ".join(f"{name} {size}" for name, size in plan.mesh.items()))
    yield _check_memory(plan, len(devices), devices[0].platform == "cpu")
    yield _check_disk(config, plan)


def _check_memory(plan: Plan, devices: int, on_cpu: bool) -> Finding:
    # A save copies the state into the host's memory.
    needed = plan.host_bytes + plan.checkpoint_bytes + (plan.peak * devices if on_cpu else 0)
    needed += _PROCESS
    free = free_memory()
    if free is None:
        return skipped(
            f"host memory: how much is free is not known; about {_gb(needed)} are needed"
        )
    text = f"host memory: {_gb(free)} free, about {_gb(needed)} needed"
    if free < needed:
        return no(f"{text}: python -m jaxgrpo.plan says of what; see its advice, or free some")
    return ok(text)


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many bytes this process can still take: what the machine has, or its cgroup allows.

    Containers and batch systems limit a cgroup, and end what goes beyond. The files are those of
    `man 7 cgroups`, versions 1 and 2.

    Args:
      proc: where the process file system is.
      cgroups: where those of cgroups are.

    Returns:
      None if neither is known.
    """
    rooms = []
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text("ascii"))
        rooms += [int(found[1]) << 10] if found else []
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = cgroups / "memory"
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(root):
                    rooms += _room_in(group, *files)
    return min(rooms, default=None)


def _room_in(group: Path, limit: str, usage: str, cache: str) -> list[int]:
    try:
        most, used = ((group / name).read_text("ascii").strip() for name in (limit, usage))
        stat = (group / "memory.stat").read_text("ascii")
    except OSError:  # the root has none, and what is mounted may be the own group alone
        return []
    if most == "max":
        return []
    # The page cache is given up when memory is needed.
    cached = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
    return [int(most) - int(used) + (int(cached[1]) if cached else 0)]


def _check_disk(config: Config, plan: Plan) -> Finding:
    run_dir = Path(config.run.dir).expanduser().absolute()
    there = sum(f.stat().st_size for f in (run_dir / "checkpoints").rglob("*") if f.is_file())
    folder = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return no(f"run.dir {run_dir}: {folder} cannot be written; name another run.dir")
    # The newest and the best, and one that is written beside them.
    kept = (config.checkpoint.keep + 1) * plan.checkpoint_bytes
    needed = max(0, kept + room(plan.checkpoint_bytes) - there)
    free = shutil.disk_usage(folder).free
    text = f"disk of {run_dir}: {_gb(free)} free, {_gb(needed)} needed for checkpoints"
    if free < needed:
        return no(f"{text}: make room, name another run.dir or lower checkpoint.keep")
    return ok(text)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB"
