"""PyTorch checkpoints, without PyTorch, as models of this library."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import jax
from tqdm import tqdm

from chipmunk_jax.convert.folder import ROLES, TOKENIZERS, Folder, open_folder
from chipmunk_jax.convert.rules import Match, fill, fill_leaf
from chipmunk_jax.convert.source import Source, check_not_converted, check_pair, open_source
from chipmunk_jax.convert.word_table import word_table_beside
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.memory import nbytes
from chipmunk_jax.models import Component, Network
from chipmunk_jax.models.checkpoint import (
    PipelineDescription,
    describe,
    describe_pipeline,
    is_checkpoint,
    is_pipeline,
    replacing,
    write,
    write_index,
)
from chipmunk_jax.models.leaves import abstract, leaves_of, parse_dtype, with_arrays
from chipmunk_jax.models.weights import Leaf
from chipmunk_jax.paths import as_path, check_parent
from chipmunk_jax.strictness import check_untraced, usual_modes
from chipmunk_jax.whole import check_space, whole


@usual_modes()
def convert(
    source: str | Path,
    target: str | Path,
    *,
    component: str | None = None,
    dtype: Any = "bfloat16",
    progress: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint `source` to the folder `target`, in this library's form.

    Everything that can be wrong is found from headers first. Host memory: a few of the leaves. Of a release of several
    components, such as a diffusers folder, each becomes a checkpoint in a folder of the target, in turn; those that are there
    already, whole and of the same files, are kept, so a conversion that was cut off goes on where it was.

    Args:
        source: a .safetensors file, an index of shards, a folder of these, or of a release (see convert.folder); or
            "hf:owner/name", a repository of Hugging Face.
        target: folder to write; its parent exists.
        component: the only one to convert: "vae", for one.
        dtype: of the weights: "bfloat16", "float16" or "float32". What a model keeps in float32 stays so.
        progress: whether to draw a bar of bytes.
        overwrite: whether to replace what is in `target`.

    Raises:
        FileNotFoundError: there is no `source`.
        InputError: a bad source, one that does not fit its model, or a target that cannot be written.
    """
    dtype, found, target = parse_dtype(dtype), open_folder(source), as_path(target)
    check_parent(target)
    if component is None and not found.several:
        check_not_converted(found.path)
        convert_one(open_source(found.path), target, dtype, progress, overwrite)
    else:
        convert_pipeline(found, target, component, dtype, progress, overwrite)


def convert_one(source: Source, target: Path, dtype: jax.numpy.dtype, progress: bool, overwrite: bool) -> None:
    """Writes a checkpoint of one component."""
    match, size = source.check(), bytes_of(source, dtype)
    if progress and source.weights.left_out:
        print(f"left out, as it is beside the network: {listed(list(source.weights.left_out))}", file=sys.stderr)
    with replacing(target, overwrite=overwrite, need=size) as partial, bar_of(size, progress) as bar:
        write_one(source, match, partial, dtype, bar)


def convert_pipeline(
    found: Folder, target: Path, only: str | None, dtype: jax.numpy.dtype, progress: bool, overwrite: bool
) -> None:
    """Writes components of a pipeline, each a checkpoint of its own, those apart that are there."""
    if only is None:
        check_pair(found.path)
    index = check_target(found, target, only)
    sources = {role: open_source(path) for role, path in found.components.items() if only in (None, role)}
    configs = [sources[role].config for role in ("transformer", "transformer_2") if role in sources]
    if any(config != configs[0] for config in configs):
        raise InputError(f"{found.path}: two networks of different sizes, expected the same")
    matches = {role: source.check() for role, source in sources.items()}
    due = {role: source for role, source in sources.items() if overwrite or not is_there(target / role, source, dtype)}
    size = sum(bytes_of(source, dtype) for source in due.values())
    check_space(target, size)
    target.mkdir(exist_ok=True)
    write_index(target, index)
    for name, folder in found.tokenizers.items():
        if only in (None, name):
            copy_tokenizer(folder, target / name)
    if progress and (kept := [role for role in sources if role not in due]):
        print(f"kept, as converted before from the same files: {listed(kept)}", file=sys.stderr)
    with bar_of(size, progress and bool(due)) as bar:
        for role, source in due.items():
            bar.set_description(f"converting {role}")
            with replacing(target / role, overwrite=True, need=bytes_of(source, dtype)) as partial:
                write_one(source, matches[role], partial, dtype, bar)
        bar.set_description("converted")


def check_target(found: Folder, target: Path, only: str | None) -> PipelineDescription:
    """The config.json of a target, with what it has already.

    Raises:
        InputError: a component that the source lacks, or a target that is not this pipeline's.
    """
    known = (*found.components, *found.tokenizers)
    if only is not None and only not in known:
        raise InputError(f"--component {only}: expected one of {', '.join(known)}, which {found.path} holds")
    names = {name for name in known if only in (None, name)}
    if target.is_dir() and any(target.iterdir()) and not is_pipeline(target):
        raise InputError(f"{target}: not empty and no pipeline of this library; expected a new folder")
    if is_pipeline(target):
        before = describe_pipeline(target)
        if before.network != found.network:
            raise InputError(f"{target}: holds a {before.network}, expected one of {found.network}, or a new folder")
        names |= set(before.components)
        found = replace(found, boundary=before.boundary or found.boundary, shift=before.shift or found.shift)
    order = (*ROLES.get(found.network, {}), *TOKENIZERS.values(), *sorted(names))
    names = tuple(dict.fromkeys(name for name in order if name in names))
    return PipelineDescription(found.network, names, found.boundary, found.shift)


def is_there(folder: Path, source: Source, dtype: jax.numpy.dtype) -> bool:
    """Whether the folder holds what the source would be converted to.

    Raises:
        InputError: it holds another checkpoint.
    """
    if not is_checkpoint(folder):
        return False
    made = describe(folder)
    if made.config != source.config or made.files != files_of(source) or made.dtype != dtype.name:
        raise InputError(
            f"{folder}: already converted from other files or to another dtype; add --overwrite (in Python overwrite=True), "
            "or name a new folder"
        )
    return True


def write_one(source: Source, found: Match, folder: Path, dtype: jax.numpy.dtype, bar: tqdm) -> None:
    """Writes one component to an existing folder, leaf by leaf."""
    model, table = abstract(source.layout.model, source.config, dtype), word_table_beside(source.weights.path)
    make = lambda path, leaf: Leaf(leaf.shape, leaf.dtype, lambda: fill_leaf(found, path, leaf, bar.update))
    leaves = {path: make(path, leaf) for path, leaf in leaves_of(model).items()}
    write(model, leaves, folder, table, source.layout.name, files_of(source))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer."""
    with whole(target) as partial:
        partial.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in (".json", ".txt", ".model"):
                shutil.copy(file, partial)


def files_of(source: Source) -> dict[str, int]:
    """The files of a source by name, and their bytes."""
    files = {Path(tensor.file) for tensor in source.weights.tensors.values()}
    return {file.name: file.stat().st_size for file in sorted(files)}


def bar_of(size: int, progress: bool) -> tqdm:
    """A bar of bytes."""
    return tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=not progress)


@overload
def read(source: str | Path, dtype: Any = "bfloat16", *, model: None = None, progress: bool = False) -> Network: ...


@overload
def read(source: str | Path, dtype: Any = "bfloat16", *, model: str, progress: bool = False) -> Component: ...


@usual_modes()
def read(source: str | Path, dtype: Any = "bfloat16", *, model: str | None = None, progress: bool = False) -> Component:
    """The model of a PyTorch checkpoint on the default device; other arguments and errors as of `convert`.

    Args:
        model: of MODELS, to be taken out of a file that may hold others too: its VAE, for one. None: the network where there
            are several, else whatever it is.
    """
    check_untraced("read()")
    opened, dtype = open_source(source, model), parse_dtype(dtype)
    return materialize(opened, opened.check(), dtype, progress)


def materialize(source: Source, found: Match, dtype: jax.numpy.dtype, progress: bool) -> Component:
    """The model with its weights, leaf by leaf on the default device."""
    model = abstract(source.layout.model, source.config, dtype)
    leaves = leaves_of(model)
    size, shown = bytes_of(source, dtype), f"reading {source.weights.path.name}"
    with tqdm(total=size, unit="B", unit_scale=True, desc=shown, disable=not progress, leave=None) as bar:
        filled = {path: jax.device_put(array) for path, array in fill(found, leaves, bar.update)}
    return with_arrays(model, filled)


def bytes_of(source: Source, dtype: jax.numpy.dtype) -> int:
    """Size of all weights after conversion."""
    return nbytes(leaves_of(abstract(source.layout.model, source.config, dtype)))
