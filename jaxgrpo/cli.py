"""How every command ends: with an exit code that scripts can trust, and one line on a mistake."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_main(main: Callable[[], object]) -> NoReturn:
    """Runs a command and exits: 0 when it is done, 2 on a user's mistake, 130 on Ctrl-C.

    A user's mistake is what this package reports as a `ValueError`, or an `OSError` (no such file,
    no permission, disk full): one line on stderr. Any other exception is a bug and keeps its
    traceback; with `JAXGRPO_TRACEBACK=1` in the environment all do.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXGRPO_TRACEBACK") == "1":
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
