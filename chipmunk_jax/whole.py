"""Files and folders written whole or not at all, however the process that writes them ends.

What is being written stands beside its place under another name, and takes that place at the end. The kernel releases the lock of
a process that is killed, so what lies there without a lock is what such a process left, and the next writer removes it.
"""

import ctypes
import errno
import os
import shutil
import sys
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
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system that cannot lock or flush


@contextmanager
def whole(path: str | Path, *, wait: bool = True) -> Iterator[Path]:
    """Yields where to write a file or a folder, which takes the place of `path` at the end, and is gone after an error.

    Args:
        path: a pipe or a device is written to as it is.
        wait: for another process that writes it; else that is an error.

    Raises:
        InputError: it cannot be written, or there is no room for it.
    """
    if is_stream(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))  # of a link, what it points at is replaced
    with locked(path, wait=wait):
        finish(path)
        partial, aside = beside(path, "partial"), beside(path, "replaced")
        if left := [old for old in (partial, aside) if os.path.lexists(old)]:
            raise InputError(f"{left[0]}: left by an earlier write, cannot be removed; remove it by hand")
        try:
            yield partial
            flush(partial, *partial.rglob("*"))
            if not (partial.is_dir() and path.is_dir()):
                partial.replace(path)
            elif not exchange(partial, path):  # there is a moment between these lines: see between()
                path.rename(aside)
                partial.rename(path)
            flush(path.parent)
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


def is_stream(path: str | Path) -> bool:
    """Whether the path leads to a pipe or a device. Links are not resolved first, as /dev/stdout may resolve to no path."""
    path = Path(path)
    return path.exists() and not (path.is_file() or path.is_dir())


def exchange(one: Path, other: Path) -> bool:
    """Whether two folders have changed places at once, which Linux does on most file systems."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def finish(path: Path) -> None:
    """Ends a write: a whole new folder that was about to take its place takes it; what is half-written or replaced is removed."""
    if between(path):
        beside(path, "partial").rename(path)
    for kind in ("partial", "replaced"):
        remove(beside(path, kind))


def between(path: Path) -> bool:
    """Whether the old folder is out of its place and the new one, which is whole, is not there yet."""
    return not path.exists() and all(beside(path, kind).exists() for kind in ("partial", "replaced"))


def restore(path: Path) -> None:
    """Ends the replacement of a folder that was cut off between the two renames; called before the folder is read."""
    path = Path(os.path.realpath(path))
    for place in (path.parent, path):  # a component of a pipeline may be gone with it
        if between(place):
            with suppress(OSError, InputError), locked(place):
                finish(place)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Within, no other process or thread writes `path`.

    Raises:
        InputError: the folder around `path` cannot be written; or another process writes `path`, unless told to wait.
    """
    name = beside(path, "lock")
    try:
        with suppress(FileNotFoundError):
            beside(path, "replaced").lstat()  # the longest of the names: one that is too long is an error at once
        file = _open_locked(name, wait)
    except BlockingIOError as error:
        raise InputError(f"{path}: another process is writing it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot write into {path.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # an unlocked file that stays hinders nobody
            name.unlink()
        os.close(file)


def _open_locked(name: Path, wait: bool) -> int:
    """A descriptor of the file of this name, locked.

    Raises:
        BlockingIOError: another process has locked it, and `wait` is false.
        OSError: it cannot be made.
    """
    while True:
        file = os.open(name, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if fcntl:
                with suppress_unsupported():
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # the last holder has removed it, and others may have made a new one
                if os.path.samestat(os.fstat(file), os.stat(name)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextmanager
def suppress_unsupported() -> Iterator[None]:
    """Within, a file system that cannot do what is asked is no error."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def flush(*paths: Path) -> None:
    """Returns when files and lists of folders are on the disk, as a power cut may keep a later rename and lose an earlier write."""
    for path in paths if fcntl else ():  # Windows opens no folders
        with suppress(PermissionError):  # of a folder that may be written and not read
            file = os.open(path, os.O_RDONLY)
            try:
                with suppress_unsupported():
                    os.fsync(file)
            finally:
                os.close(file)


def beside(path: Path, kind: str) -> Path:
    """The name beside `path` of what is half-written ("partial"), was "replaced", or is the "lock"; nothing else is called so.

    Raises:
        InputError: `path` is the root of the file system.
    """
    if not path.name:
        raise InputError(f"{path}: expected a file or a folder to write, with a name")
    return path.with_name(f"{path.name}.chipmunk-{kind}")


def remove(path: Path) -> None:
    """Deletes a file or a folder, where there is one and as far as that can be done."""
    for _ in range(20):  # the threads of a write that was cut off may add files for a moment
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not os.path.lexists(path):
            break
        time.sleep(0.05)


def check_space(path: str | Path, need: int) -> None:
    """Raises InputError where the disk of `path`, whose folder exists, has less than `need` bytes free."""
    if is_stream(path):
        return
    free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
    if free < need:
        raise InputError(f"{path}: {need / 1e6:,.1f} MB needed and {free / 1e6:,.1f} MB free on its disk")
