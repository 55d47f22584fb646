"""What a run is: its settings and the bytes of the files that they name.

Processes of one run must agree in it, and a run goes on only as what it was.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxgrpo.config import ClusterConfig, Config

# Of a model directory, all that is read.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def settings(config: Config) -> dict[str, Any]:
    """Every setting by its name on the command line, in JSON's types."""
    sections = asdict(replace(config, cluster=ClusterConfig()))
    return {
        f"{section}.{key}": list(value) if isinstance(value, tuple) else value
        for section, fields in sections.items()
        for key, value in fields.items()
    }


def identity(config: Config, files: Mapping[str, str]) -> dict[str, Any]:
    """What decides a run's numbers: `settings` and its `files`.

    Not part of it are how long, where and how watched it runs, and where its files lie.

    Args:
      config: of the run.
      files: its `digests`.
    """
    default = Config()
    defining = settings(
        replace(
            config,
            run=replace(default.run, seed=config.run.seed),
            model=replace(
                config.model, path="", remat="none", unroll=False, attention="xla", logits_mb=0
            ),
            data=replace(config.data, train="", heldout=(), schema="", system="", examples=""),
            sampling=replace(config.sampling, draft=0),
            grpo=replace(config.grpo, reference="device"),
            rewards={},
            mesh=default.mesh,
            scoring=default.scoring,
            eval=default.eval,
            signal=default.signal,
            checkpoint=default.checkpoint,
        )
    )
    if config.update.schedule != "constant":  # the learning rate ends with the run
        defining["run.steps"] = config.run.steps
    rewards = {f"rewards.{_place(name)}": weight for name, weight in config.rewards.items()}
    return {**defining, **rewards, **files}


def digests(config: Config) -> dict[str, str]:
    """SHA-256, in hexadecimal, of every file that a run is made from, by the names of settings.

    Raises:
      OSError: a file cannot be read.
    """
    named: list[tuple[str, Path]] = [("data.train", Path(config.data.train))]
    named += [(f"data.heldout[{i}]", Path(file)) for i, file in enumerate(config.data.heldout)]
    named += [
        (name, Path(file))
        for name, file in (
            ("data.schema", config.data.schema),
            ("data.system", config.data.system),
            ("data.examples", config.data.examples),
        )
        if file
    ]
    named += [
        (f"the source of rewards.{_place(name)}", source)
        for name in config.rewards
        if (source := _source(name)) is not None
    ]
    named += [
        (f"model.path/{file.name}", file)
        for file in sorted(Path(config.model.path).iterdir())
        if file.suffix in _MODEL_FILES and file.is_file()
    ]
    return dict(zip([name for name, _ in named], sha256(file for _, file in named), strict=True))


def sha256(files: Iterable[Path]) -> list[str]:
    """The digest of each file, in hexadecimal; several are read at a time."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter's lock
        return list(pool.map(digest, files))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one phrase for each name, with both values."""
    return [
        f"{name} ({_shown(before, name)} before, {_shown(now, name)} now)"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    value = values[name]
    is_digest = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}" if is_digest else repr(value)


def _place(reward: str) -> str:
    """A reward's name without the folders of its file."""
    source, colon, attribute = reward.rpartition(":")
    return f"{Path(source).name if source.endswith('.py') else source}{colon}{attribute}"


def _source(reward: str) -> Path | None:
    """The file that a reward is written in; None for one of this package's and one without."""
    source, _, _ = reward.rpartition(":")
    if not source:
        return None
    if source.endswith(".py"):
        return Path(source)
    try:
        spec = importlib.util.find_spec(source)
    except Exception:  # of the package around it; reported where the reward is loaded
        return None
    origin = spec.origin if spec is not None and spec.has_location else None
    return Path(origin) if origin is not None else None
