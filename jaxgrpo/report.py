"""The report of a run, or of several side by side: one HTML file that needs nothing beside it.

python -m jaxgrpo.report RUN_DIR [RUN_DIR ...] [--output FILE]
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import jinja2
import jinja2.sandbox
import tyro

from jaxgrpo import cli, excerpts, figures
from jaxgrpo.charts import COLOURS, save_png, spread
from jaxgrpo.config_file import load_config
from jaxgrpo.figures import Run
from jaxgrpo.files import replace_file
from jaxgrpo.metrics import KEPT_ANSWERS, read_records
from jaxgrpo.redact import printable

_TEMPLATES = Path(__file__).parent / "templates"


def report(
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]")],
    /,
    *,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Writes the report of a run, or of several that are to be compared, as one HTML file.

    The learning curve is written beside it as curve.png, if matplotlib is there.

    Args:
      run_dirs: Run directories.
      output: File to write; report.html in the first run directory if not given.
    """
    if not run_dirs:
        raise ValueError("name a run directory")
    output = output or run_dirs[0] / "report.html"
    write_report(run_dirs, output)
    cli.say(f"{output} is the report of {', '.join(map(str, run_dirs))}")


def write_report(
    run_dirs: Sequence[Path], output: Path, say: Callable[[str], None] = cli.say
) -> None:
    """Writes the report of some runs, and their learning curve as curve.png beside it.

    What a run directory does not hold (an older run, one that was stopped) is left out. The page
    has a bounded size: curves are thinned, and `jaxgrpo.excerpts` chooses the texts.

    Args:
      run_dirs: Run directories, at most 8.
      output: The HTML file.
      say: Takes a line where the picture is left out.

    Raises:
      ValueError: one is no run directory, a line of a log is no record, or there are too many.
      OSError: the report cannot be written.
    """
    if len(run_dirs) > COLOURS:
        raise ValueError(f"{len(run_dirs)} runs are too many for one report; name {COLOURS}")
    for run_dir in run_dirs:
        if not (run_dir / "config.toml").is_file():
            raise ValueError(
                f"{run_dir} is no run directory, it has no config.toml; name the run.dir of a run"
            )
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output {output} is not a file in an existing directory")
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [*map(str, run_dirs)]
    runs = [_load(run_dir, name) for run_dir, name in zip(run_dirs, names, strict=True)]
    replace_file(output, _page(runs).encode())

    if any(run.evaluations for run in runs):
        picture = output.with_name("curve.png")
        try:
            save_png(picture, *figures.picture(runs))
        except ImportError:
            say(f"{picture} is left out, it takes matplotlib: pip install 'jaxgrpo[report]'")


def _load(run_dir: Path, name: str) -> Run:
    def read(log: str) -> Iterator[dict[str, Any]]:
        path = run_dir / f"{log}.jsonl"
        if path.exists():
            with path.open("rb") as file:
                yield from read_records(path, file)

    # completions.jsonl may be larger than the memory, so it is read twice.
    reasons = excerpts.count_reasons(read("completions"))
    steps = [*reasons]
    chosen = {steps[i] for i in spread(len(steps), excerpts.STEPS)}
    return Run(
        name=printable(name),
        settings=_flat(asdict(load_config(run_dir / "config.toml"))),
        metrics=[_flat(_derived(record)) for record in read("metrics")],
        evaluations=[*read("eval")],
        reasons=reasons,
        groups=[*excerpts.choose_groups(read("completions"), chosen)],
        answers=excerpts.answer_versions(read("answers")),
    )


def _derived(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl with what follows from it."""
    seconds = {"": sum(record["seconds"].values()), **record["seconds"]}
    return {**record, "seconds": seconds, "signal_share": 1 - record["zero_variance_share"]}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Objects in an object as `name.key`, and as `name` where the key is empty."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}" if key else name: item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _page(runs: Sequence[Run]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((_TEMPLATES / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    groups = [{"run": run.name, **group} for run in runs for group in run.groups]
    return environment.get_template("report.html").render(
        runs=runs,
        figures=figures,
        excerpts=excerpts,
        kept_answers=KEPT_ANSWERS,
        groups=json.dumps(groups, ensure_ascii=False).replace("<", "\\u003c"),
        css=css,
        js=js,
        hashes={"css": _digest(css), "js": _digest(js)},
    )


def _digest(text: str) -> str:
    """What the page's Content-Security-Policy knows a style or a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main() -> None:
    """The command."""
    cli.parse(report, prog="python -m jaxgrpo.report")


if __name__ == "__main__":
    cli.run_main(main)
