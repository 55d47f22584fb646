"""Exit codes and messages of every command."""

import os
import subprocess
import sys

import pytest

from jaxgrpo.cli import run_main


def ending(capsys, main):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    return exit_.value.code, *capsys.readouterr()


def raises(error):
    def main():
        raise error

    return main


def test_a_command_that_is_done_exits_with_0(capsys):
    assert ending(capsys, lambda: print("done")) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("data.jsonl:3: not JSON"), "error: data.jsonl:3: not JSON\n"),
        (ValueError("two\n  lines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
    ],
)
def test_a_mistake_is_one_line_and_exits_with_2(capsys, error, line):
    assert ending(capsys, raises(error)) == (2, "", line)


def test_ctrl_c_exits_with_130(capsys):
    assert ending(capsys, raises(KeyboardInterrupt())) == (130, "", "interrupted\n")


def test_the_exit_code_of_the_argument_parser_stays(capsys):
    assert ending(capsys, raises(SystemExit(2))) == (2, "", "")


def test_a_bug_keeps_its_traceback(monkeypatch):
    for bug in (TypeError("bug"), AssertionError("bug"), KeyError("bug")):
        with pytest.raises(type(bug)):
            run_main(raises(bug))
    monkeypatch.setenv("JAXGRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown"):
        run_main(raises(ValueError("shown")))


def test_compiled_programs_are_kept_for_the_next_run(tmp_path):
    program = (
        "import jax, jax.numpy as jnp\n"
        "from jaxgrpo.cli import run_main\n"
        "from jaxgrpo.clock import Compilations\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))\n"
        "def main():\n"
        "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()\n"
        "    print(hits.count('/jax/compilation_cache/cache_hits'))\n"
        "run_main(main)\n"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        hits.append(int(done.stdout))
    assert hits[0] == 0
    assert hits[1] > 0
    assert any((tmp_path / "jaxgrpo" / "programs").iterdir())
