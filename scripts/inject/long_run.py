"""A run of many steps, watched from outside."""

import os
import re
import time
from pathlib import Path

import numpy as np

from scripts.inject.base import Outcome
from scripts.inject.runs import TRAIN, Process, programs, records

_MOST = 1.0  # MB of resident memory, in 100 steps
_STEPS = 2000
# Of all steps. By then each shape of batch has come, and the allocator has its largest heaps.
_WARM_UP = 0.25
_SPAN = 50  # steps, of whose samples the lowest counts: what is freed within a step comes and goes


def row_12(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """The default run with `count` steps, its memory and open files seen twice a second.

    A line is fitted to the lowest resident memory of each 50 steps after the first quarter.
    """
    steps = count or _STEPS
    run_dir = work_dir / "run"
    options = ["--run.dir", run_dir, "--run.steps", steps, "--run.seed", seed]
    options += ["--eval.every", 0, "--checkpoint.every", 50]
    samples = []
    with Process(work_dir, [*TRAIN, *options], JAX_COMPILATION_CACHE_DIR=programs(work_dir)) as run:
        log = Path(run_dir, "metrics.jsonl")
        while run.running():
            if sample := _look(run.pid):
                samples.append((_count_lines(log), *sample))
            time.sleep(0.5)
        ended = run.end()
    assert ended.code == 0, f"exit code {ended.code}: {ended.last_line}"

    warm = int(_WARM_UP * steps)
    step, rss_mb, files = np.array([s for s in samples if warm <= s[0] < steps]).T
    spans = [step // _SPAN == span for span in np.unique(step // _SPAN)]
    lowest = [np.flatnonzero(span)[rss_mb[span].argmin()] for span in spans]
    growth = 100 * np.polyfit(step[lowest], rss_mb[lowest], 1)[0]
    metrics = records(run_dir, "metrics")
    compilations = [record["compilations"] for record in metrics]
    last_compiled = compilations.index(compilations[-1]) + 1
    # What is open while a checkpoint is written is no growth.
    open_files = [int(files[span].min()) for span in spans]

    failed = []
    if growth >= _MOST:
        failed.append("memory grows")
    if last_compiled > warm:
        failed.append("compiled after warm-up")
    if len(set(open_files)) > 1:
        failed.append(f"open files {open_files}")
    if [record["step"] for record in metrics] != [*range(1, steps + 1)]:
        failed.append("steps are missing")
    notes = (
        f"{steps} steps, of which {warm} are warm-up: resident memory {growth:+.2f} MB in 100"
        f" steps, {rss_mb[lowest].min():.0f} to {rss_mb[lowest].max():.0f} MB between (peak"
        f" {max(s[1] for s in samples):.0f}); {compilations[-1]} programs compiled or loaded, the"
        f" last at step {last_compiled}; open files {min(open_files)} to {max(open_files)}",
        *(f"{work_dir}: {what}" for what in failed),
    )
    return Outcome(4 - len(failed), 4, notes)


def _look(pid: int) -> tuple[float, int] | None:
    """MB of resident memory, with its children's, and the number of open files; None at its end."""
    process = Path("/proc", str(pid))
    try:
        files = len(os.listdir(process / "fd"))
        children = " ".join(file.read_text() for file in process.glob("task/*/children")).split()
        return sum(_resident_mb(pid) for pid in [str(pid), *children]), files
    except OSError:
        return None


def _resident_mb(pid: str) -> float:
    status = Path("/proc", pid, "status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
