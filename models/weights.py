"""The leaves of a network on disk, as Orbax writes them: a folder of Zarr each, with a header beside its bytes."""

import gc
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from chipmunk_jax.config_file import nest, read_json
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.leaves import flatten
from chipmunk_jax.whole import NO_ROOM

WEIGHTS = "weights"  # the folder of the leaves, within that of the checkpoint
FULL = re.compile(rf"os_error_code=\\?'({'|'.join(map(str, NO_ROOM))})\b")  # in TensorStore's errors, and in their repr


def weights_of(folder: str | Path) -> Path:
    """The folder of the leaves, as the absolute path that Orbax asks for.

    Raises:
        InputError: the path is no UTF-8, which TensorStore asks for.
    """
    path = Path(folder).absolute() / WEIGHTS
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{folder}: a path that is no UTF-8, as that of a checkpoint must be: rename it") from error
    return path


def stored_bytes(folder: str | Path) -> int:
    """Bytes of all files of the leaves."""
    return sum(file.stat().st_size for file in weights_of(folder).rglob("*") if file.is_file())


def shapes_in(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape, from the headers: Zarr's, as Orbax writes without OCDBT.

    Orbax's own reader of headers prints a trace for every one that is missing, as after half a copy.

    Raises:
        InputError: a header is damaged.
    """
    headers = {file.parent.name: file for file in weights_of(folder).glob("*/.zarray")}
    try:
        return {path: tuple(read_json(file)["shape"]) for path, file in headers.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: damaged weights: a header without a shape") from error


def read_leaves(folder: str | Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The leaves, each with the shape, dtype and sharding of its target.

    Raises:
        InputError: the files are damaged.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return flatten(checkpointer.restore(weights_of(folder), nest(targets)))
    except Exception as error:  # TensorStore raises a bare one for bytes that do not decode
        raise InputError(f"{folder}: damaged weights: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Leaf:
    """An array that is made when it is written, so that a model is never held whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves one after the other, as arrays of NumPy."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        for value, *about in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.make()], *([one] for one in about)):
                written.result()
        return []


def write_leaves(leaves: dict[str, Leaf], folder: Path) -> None:
    """Writes leaves into a folder that has none.

    Raises:
        OSError: there is no room left for them.
    """
    with quiet_orbax() as complaints:
        full = _save(leaves, weights_of(folder))
        if full:
            _outwait(complaints)
    if full:
        raise OSError(full, os.strerror(full), str(folder))


def _save(leaves: dict[str, Leaf], path: Path) -> int:
    """0, or the number of the error of a full disk; the error itself would keep alive what has more to complain of."""
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, LeafHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(nest(leaves)))
    except Exception as error:
        found = FULL.search(str(error))
        if found is None:
            raise
        return int(found[1])
    return 0


@contextmanager
def quiet_orbax() -> Iterator[list[None]]:
    """Silences Orbax within: it warns that there is nothing to merge, which is by design, and where the disk is full all of its
    threads complain of what it raises. Yields a list with an entry for each complaint so far.
    """
    loggers, hook, complaints = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook, []
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: complaints.append(None)  # kept, they would keep alive what complains
    try:
        yield complaints
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _outwait(complaints: list[None]) -> None:
    """Returns once no complaint has come for a moment after all that Orbax left half done was thrown away."""
    # Tasks that Orbax still keeps complain when they are dropped, which may be much later.
    logging.getLogger("asyncio").addFilter(_is_not_of_a_full_disk)
    heard = -1
    while heard < len(complaints):
        heard = len(complaints)
        gc.collect()
        time.sleep(0.1)


def _is_not_of_a_full_disk(record: logging.LogRecord) -> bool:
    return not FULL.search(record.getMessage())
