"""Checkpoints of this library: a folder with config.json and the weights as Orbax writes them.

config.json is written last and the folder is renamed into place, so a folder that has one is whole.
"""

import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS, Network

CONFIG, WEIGHTS = "config.json", "weights"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Description:
    """The content of config.json."""

    model: str  # of MODELS
    dtype: str
    config: Any
    source: str  # layout that it was converted from; empty where it was not
    stored: int  # bytes of the files of the weights


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
    with replacing(folder, overwrite=overwrite) as partial:
        write(model, partial, extras, source)


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
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not is_checkpoint(folder):
        if (folder / WEIGHTS).is_dir() and not (folder / CONFIG).exists():
            raise InputError(f"{folder}: half-written, it has weights and no {CONFIG}; convert again")
        made = f"{folder.resolve().stem if folder.is_file() else folder.resolve().name}-converted"
        command = shlex.join(("chipmunk", "convert", str(folder), made))
        raise InputError(f"{folder}: not a converted checkpoint; make one with `{command}`")
    content = json.loads((folder / CONFIG).read_text())
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
    """Whether the folder is a whole checkpoint of this library."""
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "config"} <= content.keys() and (folder / WEIGHTS).is_dir()


def compare(folder: str | Path, model: Network) -> tuple[list[str], list[str], list[str]]:
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
def replacing(folder: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, and is gone after an error.

    Raises:
        InputError: at once, where `folder` cannot be written or is not ours to replace.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder to write")
    old = folder.is_dir() and any(folder.iterdir())
    if old and not is_checkpoint(folder):
        raise InputError(f"{folder}: not empty and no checkpoint of this library; expected a new folder")
    if old and not overwrite:
        raise InputError(
            f"{folder}: already a checkpoint; add --overwrite (in Python overwrite=True), or name a new folder"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{folder}: cannot write into {folder.parent}: {error.strerror}") from error
    try:
        yield partial
        if old:
            aside = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
            folder.rename(aside)
            partial.rename(folder)
            shutil.rmtree(aside)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(model: Network, folder: Path, extras: Sequence[str | Path], source: str) -> None:
    """Writes weights, extras, and config.json last, into an existing folder."""
    name = next((name for name, network in MODELS.items() if isinstance(model, network)), None)
    if name is None:
        raise InputError(f"model {type(model).__name__}: expected one of {', '.join(MODELS)}")
    tree = nnx.to_pure_dict(nnx.state(model))
    # Orbax's defaults hold a second copy of the model while they write; so, about one leaf more: 0.3 GB beside 1.6, not 1.2.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=math.ceil(2 * largest), use_ocdbt=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(weights_of(folder), args=ocp.args.PyTreeSave(tree))
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


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's warning that there is nothing to merge: by design there is nothing."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
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


def abstract(name: str, config: Any, dtype: Any = jnp.bfloat16) -> Network:
    """The model with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: MODELS[name](config, dtype=parse_dtype(dtype), rngs=nnx.Rngs(0)))


def leaves_of(model: Network) -> dict[str, Any]:
    """Dotted path -> array, or what stands for one."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} as {"a.b": x}."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


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
