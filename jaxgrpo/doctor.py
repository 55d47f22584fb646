"""Says whether machine, data and rewards are fit for a run, a line for each check.

    python -m jaxgrpo.doctor [CONFIG.toml] [--section.field value ...]

`ok` is well, `no` is not and says what to do, `--` does not apply. Exit code 0 if no line says no,
else 1; 2 where the command line or CONFIG.toml cannot be read.
"""

import sys

from jaxgrpo.libraries import check_libraries

if __name__ == "__main__":
    try:
        import flax.nnx  # noqa: F401
        import jax  # noqa: F401
        import optax  # noqa: F401
        import transformers  # noqa: F401
        from orbax.checkpoint import v1  # noqa: F401
    except Exception as error:  # whatever a wrong pair of libraries raises
        from jaxgrpo.findings import no

        for finding in [*check_libraries(), no(f"the libraries cannot be imported: {error}")]:
            print(finding.line())
        sys.exit(1)

import itertools
import os

from jaxgrpo.cli import run_main
from jaxgrpo.config import check_ranges, check_settings, check_weights
from jaxgrpo.config_file import parse_args
from jaxgrpo.findings import of
from jaxgrpo.inputs import check_inputs
from jaxgrpo.machine import check_devices, check_room


def main() -> None:
    """The command."""
    config = parse_args(sys.argv[1:], "doctor", "Says whether all is fit for a run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    findings = itertools.chain(
        check_libraries(),
        check_devices(),
        of("ranges of all settings", lambda: check_ranges(config)),
        of("settings agree with each other", lambda: check_settings(config)),
        of("weights of rewards", lambda: check_weights(config)),
        check_room(config),
        check_inputs(config),
    )
    fit = True
    for finding in findings:
        print(finding.line(), flush=True)
        fit = fit and finding.mark != "no"
    sys.exit(0 if fit else 1)


if __name__ == "__main__":
    run_main(main)
