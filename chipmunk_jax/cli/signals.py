"""Ctrl-C, SIGTERM and SIGHUP: a process that is told to end leaves nothing half-written, and says so in one line."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from chipmunk_jax.cli.streams import drop

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
PATIENCE = 10  # seconds that cleaning up may take


class Interrupted(KeyboardInterrupt):
    """Raised where the process was when it got a signal, so that what it was writing is removed."""

    def __init__(self, number: int, stderr: int) -> None:
        super().__init__(number)
        self.number, self.stderr = number, stderr


@contextmanager
def handled(handle: Callable[[int], None]) -> Iterator[None]:
    """Within, the signals of SAID call `handle` with their number, but for those that the process was started to ignore."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers, and get no signals
        yield
        return
    before = {number: signal.getsignal(number) for number in SAID}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def unwind(number: int) -> NoReturn:
    """Raises Interrupted, once: a second signal ends the process at once.

    stderr leads nowhere from here on, as threads whose work is taken away would complain there.
    """
    stderr = os.dup(2)
    if getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()):  # a bar's line has no end yet
        with suppress(OSError):
            os.write(stderr, b"\n")
    drop(2)
    for other in SAID:
        signal.signal(other, lambda number, _: leave(number, stderr))
    # Python may be in a callback that swallows exceptions: then nothing would be raised.
    signal.signal(signal.SIGALRM, lambda *_: leave(number, stderr))
    signal.alarm(PATIENCE)
    raise Interrupted(number, stderr)


def leave(number: int, stderr: int = 2) -> NoReturn:
    """Ends the process at once with a shell's status for the signal; sys.exit would wait for what the device is doing."""
    try:
        with suppress(RuntimeError, OSError):  # in the middle of a print, stdout cannot be flushed
            sys.stdout.flush()
        os.write(stderr, f"chipmunk: {SAID[number]}\n".encode())
    finally:
        os._exit(128 + number)
