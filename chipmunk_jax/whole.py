"""Files and folders written whole or not at all, however the process that writes them ends.

What is being written stands beside its place under another name, and takes that place at the end. The kernel takes a lock back
from a process that is killed, so what lies there without a lock is what such a process left, and the next one removes it.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chipmunk_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing tells two writers of one place apart
    fcntl = None

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write that fails for want of space


@contextmanager
def whole(path: str | Path, *, wait: bool = True) -> Iterator[Path]:
    """Yields where to write a file or a folder, which takes the place of `path` at the end, and is gone after an error.

    Args:
        path: a pipe or a device is written to as it is.
        wait: for another process that writes it; else that is an error.

    Raises:
        InputError: it cannot be written, or there is no room for it.
    """
    path = Path(os.path.realpath(path))  # of a link, what it points at is replaced
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    with locked(path, wait=wait):
        finish(path)
        partial, aside = beside(path, "partial"), beside(path, "replaced")
        try:
            yield partial
            if partial.is_dir() and path.is_dir():
                # No call swaps two folders on every file system, so there is a moment between these lines: see between().
                path.rename(aside)
                partial.rename(path)
            else:
                partial.replace(path)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise InputError(f"{path}: cannot be written: {os.strerror(error.errno)}") from None
        finally:
            try:
                finish(path)
            except KeyboardInterrupt:
                finish(path)
                raise


def finish(path: Path) -> None:
    """Leaves `path` alone: a new folder that was about to take its place takes it, what is half-written or replaced goes."""
    if between(path):
        beside(path, "partial").rename(path)
    for kind in ("partial", "replaced"):
        remove(beside(path, kind))


def between(path: Path) -> bool:
    """Whether the old folder is out of its place and the new one, which is whole, is not there yet."""
    return not path.exists() and all(beside(path, kind).exists() for kind in ("partial", "replaced"))


def restore(path: Path) -> None:
    """Brings back a folder whose replacement was cut off; called before it is read."""
    path = Path(os.path.realpath(path))
    if between(path):
        with suppress(OSError, InputError), locked(path):
            finish(path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Within, no other process or thread writes `path`.

    Raises:
        InputError: its folder cannot be written, or, unless told to wait, another one writes it.
    """
    name = beside(path, "lock")
    try:
        file = _open_locked(name, wait)
    except BlockingIOError as error:
        raise InputError(f"{path}: another process is writing it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot write into {path.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(file)


def _open_locked(name: Path, wait: bool) -> int:
    """A descriptor of the file of this name, locked."""
    while True:
        file = os.open(name, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if fcntl:
                with suppress_unsupported():
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # who held the lock until now has removed the file
                if os.path.samestat(os.fstat(file), os.stat(name)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextmanager
def suppress_unsupported() -> Iterator[None]:
    """Within, a file system without locks is no error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise


def beside(path: Path, kind: str) -> Path:
    """The name beside `path` of what is "partial", was "replaced" or is its "lock"; nothing else is called so."""
    return path.with_name(f"{path.name}.chipmunk-{kind}")


def remove(path: Path) -> None:
    """Deletes a file or a folder, where there is one and as far as that can be done."""
    for _ in range(20):  # the threads of a write that was cut off may add files for a moment
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            break
        time.sleep(0.05)


def check_space(path: str | Path, need: int) -> None:
    """Raises InputError where the disk of `path`, whose folder exists, has less than `need` bytes free."""
    free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
    if free < need:
        raise InputError(f"{path}: {need / 1e6:,.1f} MB needed and {free / 1e6:,.1f} MB free on its disk")
