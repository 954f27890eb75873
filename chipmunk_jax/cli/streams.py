"""Streams that nobody reads are no error: a reader that has read enough, such as `head -1`, has lost nothing."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Unbroken:
    """A stream that leads nowhere after an error, and escapes what its encoding lacks."""

    def __init__(self, stream: TextIO, error: type[OSError]) -> None:
        self.stream, self.error = stream, error

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with self._unbroken():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self.stream.flush()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except self.error:
            drop(self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def drop(descriptor: int) -> None:
    """Points a descriptor to nowhere, so that Python can write what its stream still holds when the process ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


@contextmanager
def unbroken_streams() -> Iterator[None]:
    """Within, and when the process ends, a stdout that is closed or whose reader is gone is no error, nor any stderr: what it would
    have told matters less than the work that it tells of.

    Raises:
        OSError: stdout is a file that cannot be written, as on a full disk.
    """
    _open_missing()
    out, err = Unbroken(sys.stdout, BrokenPipeError), Unbroken(sys.stderr, OSError)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            err.flush()
            try:
                out.flush()
            except OSError as error:
                drop(out.fileno())
                print(f"chipmunk: stdout: {error.strerror}", file=err)
                raise


def _open_missing() -> None:
    """Opens what `>&-` and the like have closed: else the next file opened gets that number, and everything that is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(number, True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
