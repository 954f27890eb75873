"""The `chipmunk` command, which Ctrl-C ends at once from its first moment on: so nothing here imports JAX."""

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status, see commands.run(); a KeyboardInterrupt ends the process with 130."""
    try:
        from chipmunk_jax.cli.commands import run

        return run(argv)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("chipmunk: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # Python would wait for what the device is doing


if __name__ == "__main__":
    sys.exit(main())
