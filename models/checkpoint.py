"""Checkpoints of this library: a folder with config.json and the weights as Orbax writes them.

config.json is written last and the folder is renamed into place, so a folder that has one is whole.
"""

import gc
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from chipmunk_jax.config_file import read_config
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.memory import nbytes
from chipmunk_jax.models import MODELS, Component, Network
from chipmunk_jax.strictness import usual_modes
from chipmunk_jax.whole import NO_ROOM, check_space, restore, whole

CONFIG, WEIGHTS = "config.json", "weights"
# A model of two networks, as Wan2.2-A14B, is a folder of two checkpoints, in the order in which they sample, and of a config.json
# that says at which time the second takes over.
EXPERTS = ("high_noise", "low_noise")
FULL = re.compile(rf"os_error_code=\\?'({'|'.join(map(str, NO_ROOM))})\b")  # in TensorStore's errors, and in their repr
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Description:
    """The content of config.json."""

    model: str  # of MODELS
    dtype: str
    config: Any
    source: str  # layout that it was converted from; empty where it was not
    stored: int  # bytes of the files of the weights


@usual_modes()
def save(
    model: Network,
    folder: str | Path,
    extras: Sequence[str | Path] = (),
    *,
    source: str = "",
    overwrite: bool = False,
) -> None:
    """Writes the model to `folder`, whole or not at all.

    Args:
        model: of a class in MODELS.
        folder: to write; new, empty, or with `overwrite` a checkpoint to replace. Its parent exists.
        extras: files to copy beside the weights.
        source: layout that the model was converted from.
        overwrite: whether to replace a checkpoint.

    Raises:
        InputError: the folder cannot be written.
    """
    with replacing(folder, overwrite=overwrite, need=nbytes(leaves_of(model))) as partial:
        write(model, partial, extras, source)


@usual_modes()
def load(folder: str | Path, dtype: Any = None) -> Network:
    """The model in `folder`, on the default device.

    Args:
        folder: written by `save` or `convert`.
        dtype: to cast to on the way; None for the dtype it was saved in.

    Raises:
        FileNotFoundError: there is no such folder.
        InputError: it is not a checkpoint, is half-written, or its weights are not its config's.
    """
    model = check_weights(folder, dtype)
    sharding = jax.device_put(np.float32(0)).sharding  # of the default device
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for path, leaf in leaves_of(model).items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(weights_of(folder), nest(targets))
    except Exception as error:  # TensorStore raises a bare one for bytes that do not decode
        raise InputError(f"{folder}: damaged weights: {str(error).splitlines()[0]}") from error
    return with_arrays(model, tree)


def check_weights(folder: str | Path, dtype: Any = None) -> Network:
    """The model in `folder`, shapes in place of arrays, whose weights are all there as far as headers tell.

    Raises:
        FileNotFoundError, InputError: as load().
    """
    description = describe(folder)
    model = abstract(description.model, description.config, dtype or description.dtype)
    missing, unknown, misshapen = compare(folder, model)
    # Orbax would find a damaged file halfway through the restore. Leaves too many or misshapen are of another config.
    damaged = stored_bytes(folder) != description.stored
    if unknown or misshapen or (missing and not damaged):
        kinds = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
        summary = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)
        raise InputError(f"{folder}: the weights do not fit config.json: {summary}")
    if damaged:
        raise InputError(
            f"{folder}: damaged weights: {stored_bytes(folder):,} bytes where {description.stored:,} were written"
        )
    return model


def describe(folder: str | Path) -> Description:
    """Reads what the folder holds, without its weights.

    Raises:
        FileNotFoundError: there is no such folder.
        InputError: it is not a checkpoint of this library, or is half-written.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        if (folder / WEIGHTS).is_dir() and not (folder / CONFIG).exists():
            raise InputError(f"{folder}: half-written, it has weights and no {CONFIG}; convert again")
        made = f"{folder.resolve().stem if folder.is_file() else folder.resolve().name}-converted"
        command = shlex.join(("chipmunk", "convert", str(folder), made))
        raise InputError(f"{folder}: not a converted checkpoint; make one with `{command}`")
    content = read_config(folder / CONFIG)
    if "boundary" in content:
        first, second = (folder / name for name in EXPERTS)
        raise InputError(
            f"{folder}: two networks, one for times from 1 to {content['boundary']} and one for those below: expected {first} "
            f"or {second}; sampling with both is not here yet"
        )
    if content["model"] not in list(MODELS):
        raise InputError(f"{folder}: model {content['model']}, expected one of {', '.join(MODELS)}")
    try:
        # JSON has no tuples, and configs are hashed.
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in content["config"].items()}
        config = MODELS[content["model"]].config_class(**values)
        if wrong := [n for n, x in content["config"].items() if isinstance(x, str)]:
            raise InputError(f"{wrong[0]}={content['config'][wrong[0]]!r}: expected a number")
        dtype = parse_dtype(content["dtype"]).name
        return Description(content["model"], dtype, config, content["source"], content["stored"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: bad {CONFIG}: {error}") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a whole checkpoint of this library, if need be once its replacement, cut off, is restored."""
    restore(folder)
    try:
        content = read_config(folder / CONFIG)
    except (OSError, ValueError):
        return False
    if "boundary" in content:
        return len(parts_of(folder)) > 1
    return {"model", "config"} <= content.keys() and (folder / WEIGHTS).is_dir()


def is_converted(folder: Path) -> bool:
    """Whether the folder is a checkpoint of this library, whole or half-written: weights alone are half a one."""
    return is_checkpoint(folder) or (folder / WEIGHTS).is_dir()


def parts_of(folder: str | Path) -> tuple[Path, ...]:
    """The folders of a checkpoint's networks: its own, or those of its experts."""
    pair = tuple(Path(folder) / name for name in EXPERTS)
    return pair if all(map(is_checkpoint, pair)) else (Path(folder),)


def compare(folder: str | Path, model: Component) -> tuple[list[str], list[str], list[str]]:
    """(missing, unknown, misshapen): leaves that only `model` has, that only the folder has, that have another shape there."""
    found = shapes_in(folder)
    expected = {path: leaf.shape for path, leaf in leaves_of(model).items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shared = sorted(expected.keys() & found.keys())
    misshapen = [
        f"{path} {list(found[path])}, expected {list(expected[path])}"
        for path in shared
        if found[path] != expected[path]
    ]
    return missing, unknown, misshapen


def shapes_in(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape, from the headers of the weights: Zarr's, as Orbax writes without OCDBT.

    Orbax's own reader of them prints traces for every one that is missing, as after half a copy.
    """
    headers = {file.parent.name: file for file in weights_of(folder).glob("*/.zarray")}
    try:
        return {path: tuple(json.loads(file.read_text())["shape"]) for path, file in headers.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: damaged weights: a header without a shape") from error


@contextmanager
def replacing(folder: str | Path, *, overwrite: bool, need: int = 0) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, and is gone after an error.

    Args:
        folder: to write.
        overwrite: whether to replace a checkpoint.
        need: bytes that the weights take.

    Raises:
        InputError: at once, where `folder` cannot be written, is not ours to replace, or its disk has no room.
    """
    folder = Path(folder).absolute()
    with whole(folder, wait=False) as partial:
        check_replaceable(folder, overwrite=overwrite)
        check_space(folder, need)
        try:
            partial.mkdir()
        except OSError as error:
            raise InputError(f"{folder}: cannot write into {folder.parent}: {error.strerror}") from error
        yield partial


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Raises InputError for a file, a folder that holds something else than a checkpoint, or one that is to be kept."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder to write")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_checkpoint(folder):
        raise InputError(f"{folder}: not empty and no checkpoint of this library; expected a new folder")
    if not overwrite:
        raise InputError(
            f"{folder}: already a checkpoint; add --overwrite (in Python overwrite=True), or name a new folder"
        )


def write(model: Component, folder: Path, extras: Sequence[str | Path], source: str) -> None:
    """Writes weights, extras, and config.json last, into an existing folder."""
    name = next((name for name, network in MODELS.items() if isinstance(model, network)), None)
    if name is None:
        raise InputError(f"model {type(model).__name__}: expected one of {', '.join(MODELS)}")
    write_weights(nnx.to_pure_dict(nnx.state(model)), folder)
    for extra in extras:
        shutil.copy(extra, folder)
    content = {
        "model": name,
        "dtype": jnp.dtype(model.dtype).name,
        "config": asdict(model.config),
        "source": source,
        "stored": stored_bytes(folder),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n")


def write_pair(folder: Path, model: str, boundary: float) -> None:
    """Writes config.json over two experts, which are in their folders already.

    Args:
        folder: of both.
        model: of MODELS.
        boundary: time at which the second takes over, 1 to 0.
    """
    (folder / CONFIG).write_text(json.dumps({"model": model, "boundary": boundary}, indent=1) + "\n")


def write_weights(tree: dict[str, Any], folder: Path) -> None:
    """Writes the arrays of a nested dict.

    Raises:
        OSError: there is no room left for them.
    """
    full = None
    with quiet_orbax() as complaints:
        try:
            _save(tree, weights_of(folder))
        except Exception as error:
            found = FULL.search(str(error))
            if found is None:
                raise
            full = int(found[1])
            # Tasks that Orbax keeps for later complain when they go.
            logging.getLogger("asyncio").addFilter(_is_not_of_a_full_disk)
        while full and len(complaints) != _settled(complaints):
            pass
    if full:
        raise OSError(full, os.strerror(full), str(folder))


def _save(tree: dict[str, Any], path: Path) -> None:
    # Orbax's defaults hold a second copy of the model while they write; so, about one leaf more: 0.3 GB beside 1.6, not 1.2.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=math.ceil(2 * largest), use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _is_not_of_a_full_disk(record: logging.LogRecord) -> bool:
    return not FULL.search(record.getMessage())


def _settled(complaints: list[None]) -> int:
    """How many there were a moment ago, before what Orbax has left half done was thrown away."""
    before = len(complaints)
    gc.collect()
    time.sleep(0.1)
    return before


@contextmanager
def quiet_orbax() -> Iterator[list[None]]:
    """Silences Orbax, which warns that there is nothing to merge, by design; and whose threads, where the disk is full, complain
    one after another, some a moment later, of what it raises. Yields a list that grows by each complaint.
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


def stored_bytes(folder: str | Path) -> int:
    """Bytes of the files of the weights."""
    return sum(file.stat().st_size for file in weights_of(folder).rglob("*") if file.is_file())


def weights_of(folder: str | Path) -> Path:
    """The folder of the weights, as the absolute path that Orbax asks for."""
    return Path(folder).absolute() / WEIGHTS


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A dtype that weights may have.

    Raises:
        InputError: any other.
    """
    try:
        parsed = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}") from error
    if parsed.name not in DTYPES:
        raise InputError(f"dtype={parsed.name}: expected one of {', '.join(DTYPES)}")
    return parsed


def abstract(name: str, config: Any, dtype: Any = jnp.bfloat16) -> Component:
    """The model with shapes and dtypes in place of arrays. Not to be changed: others get the same one."""
    return _abstract(MODELS[name], config, parse_dtype(dtype))


@lru_cache(maxsize=16)  # tracing takes a tenth of a second, and a conversion asks several times
def _abstract(component: type[Component], config: Any, dtype: jnp.dtype) -> Component:
    return nnx.eval_shape(lambda: component(config, dtype=dtype, rngs=nnx.Rngs(0)))


def leaves_of(model: Component) -> dict[str, Any]:
    """Dotted path -> array, or what stands for one."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} as {"a.b": x}; an entry of a list has a number for a name."""
    return {
        ".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def with_arrays(model: Network, tree: dict[str, Any]) -> Network:
    """The model with the arrays of a nested dict."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
