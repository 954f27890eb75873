"""PyTorch checkpoints, without PyTorch, as models of this library."""

import sys
from pathlib import Path
from typing import Any, overload

import jax
from tqdm import tqdm

from chipmunk_jax.convert.rules import Match, fill
from chipmunk_jax.convert.source import Source, boundary_of, open_source, pair_of
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.memory import nbytes
from chipmunk_jax.models import Component, Network
from chipmunk_jax.models.checkpoint import (
    EXPERTS,
    abstract,
    is_checkpoint,
    leaves_of,
    nest,
    parse_dtype,
    replacing,
    with_arrays,
    write,
    write_pair,
)
from chipmunk_jax.strictness import usual_modes

# The small trained models take prompts from a table of words instead of a text encoder.
WORD_TABLE = ("words.json", "word_embeddings.safetensors")


@usual_modes()
def convert(
    source: str | Path, target: str | Path, *, dtype: Any = "bfloat16", progress: bool = True, overwrite: bool = False
) -> None:
    """Writes the checkpoint `source` to the folder `target`, in this library's form.

    Everything that can be wrong is found from headers first. Host memory: the model, and a few of its leaves.

    Args:
        source: a .safetensors file, an index of shards, a diffusers folder or the folder above its transformer/. Of a release
            of two networks (Wan2.2-A14B), both are written: folders EXPERTS of the target, a checkpoint each.
        target: folder to write; its parent exists.
        dtype: of the weights: "bfloat16", "float16" or "float32". What a model keeps in float32 stays so.
        progress: whether to draw a bar of bytes.
        overwrite: whether to replace a checkpoint in `target`.

    Raises:
        FileNotFoundError: there is no `source`.
        InputError: a bad source, one that does not fit its model, or a target that cannot be written.
    """
    source, dtype = Path(source), parse_dtype(dtype)
    pair = None if is_checkpoint(source) else pair_of(source)
    places = dict(zip(EXPERTS, pair, strict=True)) if pair else {".": source}
    opened = {place: open_source(path) for place, path in places.items()}
    found = {place: one.check() for place, one in opened.items()}
    config = next(iter(opened.values())).config
    if any(one.config != config for one in opened.values()):
        raise InputError(f"{source}: two networks of different sizes, expected the same")
    boundary = boundary_of(source, config) if pair else None
    with replacing(target, overwrite=overwrite, need=sum(bytes_of(one, dtype) for one in opened.values())) as partial:
        for place, one in opened.items():
            (partial / place).mkdir(exist_ok=True)
            write_one(one, found[place], partial / place, dtype, progress)
        if boundary:
            write_pair(partial, one.layout.model, boundary)


def write_one(source: Source, found: Match, folder: Path, dtype: jax.numpy.dtype, progress: bool) -> None:
    """Writes one network to an existing folder."""
    if progress and source.weights.left_out:
        print(f"left out, as it is beside the network: {listed(list(source.weights.left_out))}", file=sys.stderr)
    with jax.default_device(jax.devices("cpu")[0]):
        model = materialize(source, found, dtype, progress)
    if progress:
        print("writing the weights", file=sys.stderr)
    write(model, folder, word_table(source.weights.path), source.layout.name)


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
    opened, dtype = open_source(source, model), parse_dtype(dtype)
    return materialize(opened, opened.check(), dtype, progress)


def materialize(source: Source, found: Match, dtype: jax.numpy.dtype, progress: bool) -> Component:
    """The model with its weights, leaf by leaf on the default device."""
    model = abstract(source.layout.model, source.config, dtype)
    leaves = leaves_of(model)
    with tqdm(total=bytes_of(source, dtype), unit="B", unit_scale=True, desc="reading", disable=not progress) as bar:
        filled = {path: jax.device_put(array) for path, array in fill(found, leaves, bar.update)}
    return with_arrays(model, nest(filled))


def bytes_of(source: Source, dtype: jax.numpy.dtype) -> int:
    """Size of all weights after conversion."""
    return nbytes(leaves_of(abstract(source.layout.model, source.config, dtype)))


def word_table(path: Path) -> list[Path]:
    """The files of the word table beside the weights, where both are there."""
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in WORD_TABLE]
    return files if all(file.is_file() for file in files) else []
