"""The `chipmunk` command, which Ctrl-C ends at once from its first moment on: so nothing here imports JAX."""

import signal
import sys
from collections.abc import Sequence

from chipmunk_jax.cli.signals import Interrupted, handled, leave, unwind
from chipmunk_jax.cli.streams import unbroken_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status, see commands.run(); Ctrl-C ends the process with 130, SIGTERM with 143."""
    try:
        # While modules are imported nothing is half-written yet, and an exception would get lost in some of them.
        with unbroken_streams(), handled(leave):
            from chipmunk_jax.cli.commands import choose, run

            command, words = choose(argv)
            with handled(unwind):
                return run(command, words)
    except Interrupted as error:
        leave(error.number, error.stderr)
    except KeyboardInterrupt:
        leave(signal.SIGINT)
    except OSError:  # of stdout, and told
        return 2


if __name__ == "__main__":
    sys.exit(main())
