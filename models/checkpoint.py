"""Checkpoints of this library: a folder of config.json, the weights as Orbax writes them, and files beside them.

config.json is written last and the folder is then renamed into place, so a folder with a config.json is whole.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.config_file import read_config
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.memory import nbytes
from chipmunk_jax.models import MODELS, Component, Network
from chipmunk_jax.models.leaves import abstract, leaves_of, parse_dtype, with_arrays
from chipmunk_jax.models.weights import WEIGHTS, Leaf, read_leaves, shapes_in, stored_bytes, write_leaves
from chipmunk_jax.options import require
from chipmunk_jax.paths import as_path
from chipmunk_jax.strictness import check_untraced, usual_modes
from chipmunk_jax.whole import check_space, restore, whole

CONFIG = "config.json"


@dataclass(frozen=True)
class Description:
    """The content of config.json."""

    model: str  # of MODELS
    dtype: str  # of DTYPES
    config: Any  # of the model, FluxConfig for one
    source: str  # layout that the model was converted from; empty where it was not converted
    stored: int  # bytes of the files of the weights
    files: dict[str, int]  # that it was converted from, and their bytes


WITH_SIZE: Literal["with size"] = "with size"  # a shift that follows the number of tokens, as that of FLUX.1-dev
Shift = float | Literal["with size"]


@dataclass(frozen=True)
class PipelineDescription:
    """The config.json above the components of a pipeline."""

    network: str  # of MODELS, that of the transformer
    components: tuple[str, ...]  # names of their folders, those of tokenizers among them
    boundary: float | None = None  # time, 1 to 0, at which transformer_2 takes over
    shift: Shift | None = None  # of the times of a sample; None: the model's usual one


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
    with replacing(folder, overwrite=overwrite, need=nbytes(leaves_of(model))) as made:
        leaves = {path: Leaf(a.shape, a.dtype, lambda a=a: np.asarray(a)) for path, a in leaves_of(model).items()}
        write(model, leaves, made, extras, source)


@usual_modes()
def load(folder: str | Path, dtype: Any = None) -> Network:
    """The model in `folder`, on the default device.

    Args:
        folder: written by `save` or `convert`.
        dtype: to cast to on the way; None for the dtype it was saved in.

    Raises:
        FileNotFoundError: there is no such folder.
        InputError: the folder is not a checkpoint, is half-written or damaged, or its weights do not fit its config.
    """
    check_untraced("load()")
    folder = network_in(folder)
    model = check_weights(folder, dtype)
    sharding = jax.device_put(np.float32(0)).sharding  # of the default device
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for path, leaf in leaves_of(model).items()
    }
    return with_arrays(model, read_leaves(folder, targets))


def check_weights(folder: str | Path, dtype: Any = None) -> Network:
    """The model in `folder` with shapes in place of arrays, once headers and sizes of files say that all weights are there.

    Raises:
        FileNotFoundError, InputError: as load().
    """
    folder = network_in(folder)
    description = describe(folder)
    model = abstract(description.model, description.config, dtype or description.dtype)
    missing, unknown, misshapen = compare(folder, model)
    # Orbax would find a damaged file halfway through the restore. Too many or misshapen leaves belong to another config.
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
        InputError: it is not a checkpoint of one network of this library, or is half-written.
    """
    folder = network_in(folder)
    if not is_checkpoint(folder):
        _refuse(folder)
    content = read_config(folder / CONFIG)
    if content["model"] not in list(MODELS):  # a list also takes what has no hash
        raise InputError(f"{folder}: model {content['model']}, expected one of {', '.join(MODELS)}")
    try:
        return _description(content)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{folder}: bad {CONFIG}: {error}") from error


def _refuse(folder: Path) -> NoReturn:
    """Raises the error of a folder that is no checkpoint."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if is_converted(folder):
        raise InputError(f"{folder}: half-written, it has weights and no {CONFIG}; convert again, with --overwrite")
    made = f"{folder.resolve().stem if folder.is_file() else folder.resolve().name}-converted"
    command = shlex.join(("chipmunk", "convert", str(folder), made))
    raise InputError(f"{folder}: not a converted checkpoint; make one with `{command}`")


def _description(content: dict[str, Any]) -> Description:
    """The content of config.json, checked.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: a value is missing, or no checkpoint has such a one.
    """
    config, source, stored = content["config"], content["source"], content["stored"]
    require(isinstance(config, dict), "config", config, "sizes by name")
    require(isinstance(source, str), "source", source, "the name of a layout")
    require(type(stored) is int, "stored", stored, "a whole number of bytes")
    # JSON has no tuples, and configs are hashed.
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items()}
    for name, value in values.items():
        require(not isinstance(value, str), name, repr(value), "a number")
    sizes = MODELS[content["model"]].config_class(**values)
    dtype, files = parse_dtype(content["dtype"]).name, content.get("files", {})
    require(isinstance(files, dict), "files", files, "bytes by name of a file")
    return Description(content["model"], dtype, sizes, source, stored, files)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a whole checkpoint of this library; a replacement that was cut off is first brought to its end."""
    restore(folder)
    try:
        content = read_config(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return "components" in content or ({"model", "config"} <= content.keys() and (folder / WEIGHTS).is_dir())


def is_converted(folder: Path) -> bool:
    """Whether the folder is a checkpoint of this library, whole or half-written, with weights alone."""
    return is_checkpoint(folder) or (folder / WEIGHTS).is_dir()


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds components of a pipeline, each a checkpoint of this library."""
    return is_checkpoint(folder) and "components" in read_config(folder / CONFIG)


def describe_pipeline(folder: Path) -> PipelineDescription:
    """Reads which components the folder of a pipeline has.

    Raises:
        InputError: its config.json has values that no pipeline has.
    """
    content = read_config(folder / CONFIG)
    network, names, boundary, shift = (content.get(name) for name in ("network", "components", "boundary", "shift"))
    try:
        require(network in list(MODELS), "network", network, f"one of {', '.join(MODELS)}")
        named = isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)
        require(named, "components", names, "names of folders")
        between = boundary is None or (type(boundary) is float and 0 < boundary < 1)
        require(between, "boundary", boundary, "a number between 0 and 1, or null")
        fits = shift in (None, WITH_SIZE) or is_shift(shift)
        require(fits, "shift", shift, f"a positive number, {WITH_SIZE!r}, or null")
    except ValueError as error:
        raise InputError(f"{folder}: bad {CONFIG}: {error}") from error
    return PipelineDescription(network, tuple(names), boundary, shift)


def is_shift(value: Any) -> bool:
    """Whether it is a number that times can be shifted by."""
    return type(value) in (int, float) and 0 < value < 1000


def network_in(folder: str | Path) -> Path:
    """The folder of a checkpoint's network: `folder` itself, or the transformer of a pipeline.

    Raises:
        InputError: a pipeline with two of them.
    """
    folder = as_path(folder)
    if not is_pipeline(folder):
        return folder
    first, second = (folder / name for name in ("transformer", "transformer_2"))
    if is_checkpoint(second):
        boundary = describe_pipeline(folder).boundary
        raise InputError(
            f"{folder}: two networks, one for times from 1 to {boundary} and one for those below: expected {first} or "
            f"{second}; a Pipeline samples with both"
        )
    return first


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


@contextmanager
def replacing(folder: str | Path, *, overwrite: bool, need: int = 0) -> Iterator[Path]:
    """Yields a new folder, which takes the place of `folder` at the end, and is gone after an error.

    Args:
        folder: to write.
        overwrite: whether to replace a checkpoint.
        need: bytes that the weights take.

    Raises:
        InputError: at once, where `folder` cannot be written, must not be replaced, or has no room on its disk.
    """
    folder = as_path(folder).absolute()
    with whole(folder, wait=False) as partial:
        check_replaceable(folder, overwrite=overwrite)
        check_space(folder, need)
        try:
            partial.mkdir()
        except OSError as error:
            raise InputError(f"{folder}: cannot write into {folder.parent}: {error.strerror}") from error
        yield partial


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Raises InputError for what is no checkpoint, nor half a one, and for one without `overwrite`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder to write")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    complete = is_checkpoint(folder)
    if not complete and next(folder.glob(f"{WEIGHTS}/*/.zarray"), None) is None:
        raise InputError(f"{folder}: not empty and no checkpoint of this library; expected a new folder")
    if not overwrite:
        state = "already a checkpoint" if complete else "half a checkpoint"
        raise InputError(f"{folder}: {state}; add --overwrite (in Python overwrite=True), or name a new folder")


def write(
    model: Component,
    leaves: Mapping[str, Leaf],
    folder: Path,
    extras: Sequence[str | Path] = (),
    source: str = "",
    files: Mapping[str, int] = {},
) -> None:
    """Writes weights, extras, and config.json last, into an existing folder.

    Args:
        model: the component, whose arrays may be shapes alone.
        leaves: its arrays by path.
        folder: to write into.
        extras: files to copy beside the weights.
        source: layout that the component was converted from.
        files: that it was converted from, and their bytes.
    """
    name = next((name for name, network in MODELS.items() if isinstance(model, network)), None)
    if name is None:
        raise InputError(f"model {type(model).__name__}: expected one of {', '.join(MODELS)}")
    write_leaves(leaves, folder)
    for extra in extras:
        shutil.copy(extra, folder)
    content = {
        "model": name,
        "dtype": jnp.dtype(model.dtype).name,
        "config": asdict(model.config),
        "source": source,
        "stored": stored_bytes(folder),
        "files": dict(files),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n")


def write_index(folder: Path, index: PipelineDescription) -> None:
    """Writes config.json into the folder of a pipeline, whole or not at all."""
    with whole(folder / CONFIG) as partial:
        partial.write_text(json.dumps(asdict(index), indent=1) + "\n")
