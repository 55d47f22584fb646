"""A run that is resumed with something else than what it was made from."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from scripts.inject.base import Outcome, run_cases
from scripts.inject.runs import Small, last_step

_SAVED = 2  # steps before the change; one is made after it
_SHA = "(sha256 DIGEST before, sha256 DIGEST now)"


def row_09(work_dir: Path, seed: int, count: int | None) -> Outcome:
    """Each kind of change; and none but the place of the files, which is no change."""
    small = Small(work_dir)
    rng = np.random.default_rng(seed)
    base = work_dir / "base"
    small.finish(base, "--run.steps", _SAVED)

    def nudge_weight(file: Path) -> None:
        tensors = load_file(file)
        name = sorted(tensors)[rng.integers(len(tensors))]
        weights = tensors[name].copy()
        weights.flat[rng.integers(weights.size)] += 1e-3
        save_file(tensors | {name: weights}, file, {"format": "pt"})

    # Each is harmless: the run can go on with it if it is told to.
    files: dict[str, tuple[Callable[[Path], object], str]] = {
        "train.jsonl": (_drop_line, "data.train"),
        "heldout.jsonl": (_drop_line, "data.heldout[0]"),
        "schema.json": (_write_otherwise, "data.schema"),
        "reward.py": (_add_comment, "the source of rewards.reward.py:letters"),
        "model/tokenizer.json": (_write_otherwise, "model.path/tokenizer.json"),
        "model/tokenizer_config.json": (_write_otherwise, "model.path/tokenizer_config.json"),
        "model/config.json": (_write_otherwise, "model.path/config.json"),
        "model/model.safetensors": (nudge_weight, "model.path/model.safetensors"),
    }
    settings = {
        "update.lr": ("1e-5", "update.lr (0.0003 before, 1e-05 now)"),
        "run.seed": ("7", "run.seed (0 before, 7 now)"),
        "sampling.temperature": ("0.5", "sampling.temperature (1.0 before, 0.5 now)"),
        "rollout.group": ("8", "rollout.group (4 before, 8 now)"),
        "grpo.loss": ("dr_grpo", "grpo.loss ('dapo' before, 'dr_grpo' now)"),
    }
    cases: list[tuple[str, Callable[[Path], object]]] = [
        (name.replace("/", "_"), partial(_changed_file, small, base, name, change, said))
        for name, (change, said) in files.items()
    ]
    cases += [
        (setting, partial(_changed_setting, small, base, setting, value, said))
        for setting, (value, said) in settings.items()
    ]
    cases.append(("moved", partial(_moved, small, base)))
    outcome = run_cases(work_dir, cases[:count])
    if outcome.passed == outcome.tried:
        shutil.rmtree(base)
    return outcome


def _changed_file(
    small: Small,
    base: Path,
    name: str,
    change: Callable[[Path], object],
    said: str,
    place: Path,
) -> None:
    files = place / "files"
    shutil.copytree(small.files, files)
    change(files / name)
    _check(small, base, place, files, (), f"{said} {_SHA}")


def _changed_setting(
    small: Small, base: Path, setting: str, value: str, said: str, place: Path
) -> None:
    _check(small, base, place, small.files, (f"--{setting}", value), said)


def _moved(small: Small, base: Path, place: Path) -> None:
    files = place / "files"
    shutil.copytree(small.files, files)
    shutil.copytree(base / "run", place / "run")
    small.finish(place, "--run.steps", _SAVED + 1, files=files)
    assert last_step(place / "run") == _SAVED + 1


def _check(
    small: Small, base: Path, place: Path, files: Path, options: tuple[str, ...], said: str
) -> None:
    run_dir = place / "run"
    shutil.copytree(base / "run", run_dir)
    before = _contents(run_dir)
    more = ("--run.steps", _SAVED + 1, *options)
    with small.start(place, *more, files=files, name="refused_") as process:
        ended = process.end()
    assert ended.code == 2, f"exit code {ended.code}: {ended.last_line}"
    line = re.sub(r"sha256 \w{12}\b", "sha256 DIGEST", ended.err)
    expected = (
        f"error: {run_dir} is of a run with another {said}: use --run.allow-change to go on all"
        " the same, --run.fresh to start anew, or another --run.dir\n"
    )
    assert line == expected, ended.err
    assert _contents(run_dir) == before, "the refused run has changed something"
    ended = small.finish(place, *more, "--run.allow-change", files=files, name="allowed_")
    assert "goes on with another " in ended.out, ended.out
    assert f"restored step {_SAVED} " in ended.out, ended.out
    assert last_step(run_dir) == _SAVED + 1


def _contents(run_dir: Path) -> dict[str, bytes]:
    """All files but the lock, which names its last holder."""
    files = (file for file in run_dir.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file): file.read_bytes() for file in files}


def _drop_line(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines(True)
    file.write_text("".join(lines[:-1]), "utf-8")


def _write_otherwise(file: Path) -> None:
    # The same JSON in other bytes.
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), indent=3), "utf-8")


def _add_comment(file: Path) -> None:
    with file.open("a", encoding="utf-8") as source:
        source.write("# another one\n")
