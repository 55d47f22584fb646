"""Does what a page of the documentation says, from its first command to its last.

    python scripts/newcomer.py docs/own-task.md [FOLDER]

A `bash` block is run. A block that follows `<!-- file: NAME -->` is written to that file, one that
follows `<!-- skip: WHY -->` is left out; `text` is for reading. Any other is an error, so that a
page cannot hold what nobody has tried. All happens in one shell, in an empty folder (a new one that
is removed if none is named), with this interpreter as `python`; it ends at the first failure.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(
    r"^(?:<!-- (?P<what>file|skip): (?P<name>.+?) -->\n\n?)?"
    r"```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_END = "trap 'jobs -p | xargs -r kill; wait' EXIT"  # what is in the background ends with the page


def script(page: str) -> str:
    """A page as a shell script.

    Raises:
      ValueError: a block is neither run, nor written, nor skipped.
    """
    return "\n".join(["set -euo pipefail", _END, *_steps(page)]) + "\n"


def _steps(page: str) -> Iterator[str]:
    for block in _BLOCK.finditer(page):
        text, name = block["text"], block["name"]
        match block["what"], block["language"]:
            case "file", _:
                yield f"cat > {shlex.quote(name)} <<'END_OF_FILE'\n{text}END_OF_FILE"
            case "skip", _:
                yield f"echo {shlex.quote(f'skipped: {name}')} >&2"
            case None, "bash":
                yield f"echo {shlex.quote(text)} >&2\n{text}"
            case None, "text":
                continue
            case _, language:
                line = page.count("\n", 0, block.start()) + 1
                raise ValueError(f"line {line}: a block of {language!r} that nobody tries")


def follow(page: Path, folder: Path) -> None:
    """Runs a page's script in a folder.

    Raises:
      subprocess.CalledProcessError: a command of it failed.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", script(page.read_text("utf-8"))]
    subprocess.run(
        command, check=True, cwd=folder, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL
    )


if __name__ == "__main__":
    page, *folders = sys.argv[1:]
    with tempfile.TemporaryDirectory() as empty:
        follow(Path(page), Path(folders[0] if folders else empty))
